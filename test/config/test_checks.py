"""Combinations that cannot work, each refused with one clear fault; and some that can."""

import pytest
from helpers.configs import assert_one_fault, parse, report

BAD_COMBINATIONS = {
    "unknown choice": (
        '[optimizer]\nname = "SGD"',
        ["optimizer.name = 'SGD' is unknown", "allowed: AdamW, Adam"],
    ),
    "pattern of no parameter": (
        '[[optimizer.groups]]\npattern = "tok_embedding.*"\nweight_decay = 0',
        ['optimizer.groups: "tok_embedding.*" matches no', "such as tok_embeddings.weight"],
    ),
    "pattern of a tied output": (
        '[model]\ntied_embeddings = true\n[[optimizer.groups]]\npattern = "output.*"\nlr = 1',
        ['optimizer.groups: "output.*" matches no parameter'],
    ),
    "parameter of two groups": (
        '[optimizer]\ngroups = [{ pattern = "*wq*", lr = 1 }, { pattern = "layers.5.*", lr = 1 }]',
        ['layers.5.attention.wq.weight is matched by "*wq*" and by "layers.5.*"', "in one group"],
    ),
    "group that sets nothing": (
        '[[optimizer.groups]]\npattern = "norm.weight"',
        ['optimizer.groups: "norm.weight" sets nothing; give it lr or weight_decay'],
    ),
    "states in fp32 of weights in bf16": (
        '[optimizer]\nstate_dtype = "float32"\n[training]\ndtype = "bfloat16"',
        ['optimizer.state_dtype = "float32": with training.dtype = "bfloat16"', "or leave it out"],
    ),
    "float8 gathered by rows": (
        '[model]\nconverters = ["quantize.linear.float8"]\n[quantize.linear.float8]\n'
        'recipe_name = "rowwise"\nenable_fsdp_float8_all_gather = true',
        [
            "quantize.linear.float8.enable_fsdp_float8_all_gather = true: FSDP gathers in float8",
            'set recipe_name = "tensorwise"',
        ],
    ),
    "sequences whose tokens float8 cannot multiply": (
        '[model]\nconverters = ["quantize.linear.float8"]\n[training]\nseq_len = 100',
        ["training.seq_len = 100: with float8 (model.converters)", "a multiple of 16 tokens"],
    ),
    "small layers left out by torchtitan's own rule": (
        '[model]\nconverters = ["quantize.linear.float8"]\n'
        '[quantize.linear.float8]\nfilter_fqns = ["output", "auto_filter_small_kn"]',
        ['"auto_filter_small_kn", by which torchtitan leaves small layers out', "name them"],
    ),
    "output folder that is the run's": (
        '[checkpoint]\nfolder = "."',
        ["checkpoint.folder", "inside job.dump_folder"],
    ),
    "output folder outside": (
        '[metrics]\nsave_tb_folder = "../tb"',
        ["metrics.save_tb_folder", "inside"],
    ),
    "unknown family": (
        '[model]\nname = "lama3"',
        ["model.name = 'lama3' is unknown", "allowed: llama2, llama3"],
    ),
    "unknown flavor": (
        '[model]\nflavor = "405b"',
        ["model.flavor = '405b'", "8B, 70B, 405B", "Did you mean '405B'?"],
    ),
    "unknown dataset": (
        '[training]\ndataset = "jsnl"',
        ["'jsnl' is unknown, did you mean jsonl?", "text, jsonl"],
    ),
    "dataset without path": (
        '[training]\ndataset = "text"',
        ["needs a path (training.dataset_path)", "a text file"],
    ),
    "dataset with a path it ignores": (
        '[training]\ndataset_path = "run.toml"',
        ["= 'python_stdlib' takes no path", "'run.toml' is given"],
    ),
    "dataset path missing": (
        '[training]\ndataset = "text"\ndataset_path = "no"',
        ["'no' (training.dataset_path) does not exist"],
    ),
    "source without weight": (
        '[data]\nmixture = ["text ."]',
        ['data.mixture: "text ."', '"dataset path = weight"'],
    ),
    "source that is not there": (
        '[data]\nmixture = ["text no = 1"]',
        ["data.mixture: 'text': 'no' (after its name) does not exist"],
    ),
    "stream packed": (
        '[data]\nstreaming = true\npacking = "best_fit"',
        ["data.packing", "before the first step"],
    ),
    "stream held out": (
        "[data]\nstreaming = true\n[validation]\nenable = true",
        ["no documents can be held out", "validation.dataset"],
    ),
    "two tokenizers": (
        '[model]\ntokenizer_path = "a"\nhf_assets_path = "b"',
        ['"a"', '"b"', "give one of them"],
    ),
    "heads that do not divide": (
        "[model]\nn_heads = 12\nn_kv_heads = 12",
        ["n_heads = 12", "dim = 256"],
    ),
    "odd heads": ("[model]\ndim = 48", ["48 / 16 = 3", "must be even"]),
    "kv heads that do not divide": (
        "[model]\nn_kv_heads = 3",
        ["n_kv_heads = 3 must divide model.n_heads = 16"],
    ),
    "kv heads of the flavor": (
        "[model]\nn_heads = 8",
        ["n_kv_heads = 16", "n_heads = 8", "it does not follow n_heads; set it too"],
    ),
    "odd heads by their width": (
        "[model]\nhead_width = 9\nn_heads = 5\nn_kv_heads = 5",
        ["model.head_width = 9", "must be even"],
    ),
    "more experts than there are": (
        "[model]\nn_experts = 4\nexperts_per_token = 5",
        ["experts_per_token = 5 must be at most model.n_experts = 4"],
    ),
    "all layers dense": (
        "[model]\nn_experts = 4\nn_dense_layers = 4\nsparse_every = 3",
        ["n_dense_layers = 4", "sparse_every = 3", "none of model.n_layers = 6 layers"],
    ),
    "a router without a gradient": (
        "[model]\nn_experts = 4\nexperts_per_token = 1",
        ["router_renormalize = true", "every weight is 1", "set it to false"],
    ),
    "rope factors": (
        "[model]\nrope_scaling_factor = 8\nrope_high_freq_factor = 1",
        ["rope_high_freq_factor = 1.0", "above"],
    ),
    "initial path missing": (
        '[checkpoint]\nenable = true\ninitial_load_path = "no"',
        ['"no" is not a folder'],
    ),
    "profiler window": (
        "[profiling]\nenable_profiling = true\nprofile_freq = 3",
        ["profile_freq = 3", "at least 4"],
    ),
    "no dataset": (
        '[training]\ndataset = ""',
        ["training.dataset = '' names no dataset; set it"],
    ),
    "unknown validation set": (
        '[validation]\nenable = true\ndataset = "jsnl"',
        ["validation.dataset = 'jsnl' is unknown, did you mean jsonl?"],
    ),
    "validation set without a path": (
        '[validation]\nenable = true\ndataset = "jsonl"',
        ["validation.dataset = 'jsonl' needs a path (validation.dataset_path)"],
    ),
    "validation's length under context parallelism": (
        "[validation]\nenable = true\nseq_len = 6\n[parallelism]\ncontext_parallel_degree = 2\n"
        "data_parallel_shard_degree = 1",
        ["validation.seq_len = 6 must be divisible by 4"],
    ),
    "source named twice": (
        '[data]\nmixture = ["python_stdlib = 1", "python_stdlib=2"]',
        ['data.mixture: "python_stdlib" is listed twice; add up its weights'],
    ),
    "source of no weight": (
        '[data]\nmixture = ["python_stdlib = 0"]',
        ['data.mixture: "python_stdlib = 0"', "with a weight > 0"],
    ),
    "misspelt optimizer": (
        '[optimizer]\nname = "AdmaW"',
        ["optimizer.name = 'AdmaW' is unknown", "did you mean AdamW?"],
    ),
}


@pytest.mark.parametrize("name", BAD_COMBINATIONS)
def test_what_cannot_work_gets_one_clear_fault(name):
    text, fragments = BAD_COMBINATIONS[name]
    assert_one_fault(report(text, world_size=0), "run.toml", fragments)


PP2 = "--parallelism.pipeline_parallel_degree=2"
TP2, CP2 = "--parallelism.tensor_parallel_degree=2", "--parallelism.context_parallel_degree=2"

# Layouts that cannot be, on 4 ranks.
BAD_SHARING = {
    "experts": (
        ["--model.n_experts=6", "--parallelism.expert_parallel_degree=4"],
        ["parallelism.expert_parallel_degree = 4 must divide model.n_experts = 6"],
    ),
    "no experts": (
        ["--parallelism.expert_parallel_degree=2"],
        ["expert_parallel_degree = 2: the model has no experts (model.n_experts = 0)"],
    ),
    "tokens of experts": (
        [
            "--model.n_experts=4",
            "--parallelism.tensor_parallel_degree=4",
            "--parallelism.disable_sequence_parallel",
            "--training.seq_len=6",
            "--validation.enable",
            "--validation.seq_len=10",
        ],
        [
            "tensor_parallel_degree = 4 (experts compute shards",
            "divide training.seq_len = 6",
            "divide validation.seq_len = 10",
        ],
    ),
    "product": (
        ["--parallelism.data_parallel_shard_degree=2", TP2, CP2],
        ["tensor_parallel_degree = 2", "gives 8 ranks, but the world size is 4"],
    ),
    "left over": (
        ["--parallelism.tensor_parallel_degree=3"],
        ["tensor_parallel_degree = 3 does not divide", "1, 2, 4"],
    ),
    "heads": (
        [TP2, "--model.n_kv_heads=1"],
        ["tensor_parallel_degree = 2 must divide model.n_kv_heads = 1"],
    ),
    "ulysses heads": (
        [TP2, CP2, "--model.n_kv_heads=2", "--parallelism.context_parallel_method=ulysses"],
        [
            "context_parallel_degree = 4 (ulysses: times the tensor-parallel degree)",
            "must divide model.n_kv_heads = 2",
        ],
    ),
    "head and tail": (
        [CP2, "--training.seq_len=6"],
        ["training.seq_len = 6 must be divisible by 4", "(headtail)"],
    ),
    "sequence parallel": (
        [TP2, CP2, "--training.seq_len=12"],
        ["must be divisible by 8", "tensor_parallel_degree = 2"],
    ),
    "documents in the ring": (
        [CP2, "--training.document_masking"],
        ["training.document_masking = true", 'context_parallel_method = "ulysses"'],
    ),
    "feed-forward": ([TP2, "--model.ffn_hidden_dim=7"], ["must divide model.ffn_hidden_dim = 7"]),
    "budget": (["--activation_checkpoint.mode=memory_budget"], ["it needs compile.enable = true"]),
    "async": (
        [TP2, "--parallelism.enable_async_tensor_parallel"],
        ["it needs compile.enable = true"],
    ),
    "pp product": (
        ["--parallelism.pipeline_parallel_degree=3"],
        ["pipeline_parallel_degree = 3 does not divide"],
    ),
    "pp schedule": (
        [PP2, "--parallelism.pipeline_parallel_schedule=1f1b"],
        ["must be one of GPipe, 1F1B, Interleaved"],
    ),
    "pp layers": (
        ["--parallelism.pipeline_parallel_degree=4", "--model.n_layers=1"],
        ["too few layers, 1, for 4 pipeline stages"],
    ),
    "pp stages": (
        [PP2, "--parallelism.pipeline_parallel_layers_per_stage=2"],
        [
            "pipeline_parallel_degree = 2: 4 stages on 2 pipeline ranks; 1F1B accepts 2, one",
        ],
    ),
    "pp interleaved stages": (
        [
            PP2,
            "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
            "--parallelism.pipeline_parallel_layers_per_stage=4",
        ],
        ["2 stages on 2 pipeline ranks; Interleaved1F1B accepts 4, 6 or a higher multiple of 2"],
    ),
    "pp microbatches": (
        [PP2, "--training.local_batch_size=1"],
        [
            "1 microbatch for 2 stages; 1F1B needs at least one per stage",
            "training.local_batch_size allows more",
        ],
    ),
    "pp rounds": (
        [
            PP2,
            "--parallelism.pipeline_parallel_schedule=InterleavedZeroBubble",
            "--training.local_batch_size=5",
        ],
        [
            "5 microbatches on 2 pipeline ranks; InterleavedZeroBubble accepts up to 3, or",
        ],
    ),
    "pp microbatch size": (
        [PP2, "--parallelism.pipeline_parallel_microbatch_size=3"],
        [
            "pipeline_parallel_microbatch_size = 3 must divide the 8 sequences that pass",
        ],
    ),
    "pp pieces": (
        [PP2, "--parallelism.module_fqns_per_model_part=tok_embeddings,layers.0;layers.2,norm"],
        ["missing: layers.1", "output", "the model's layers are, in order: tok_embeddings to"],
    ),
    "pp empty stage": (
        [PP2, "--parallelism.module_fqns_per_model_part=tok_embeddings;"],
        ["a list of lists of names"],
    ),
    "pp reshard": (
        [
            PP2,
            "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble",
            "--parallelism.fsdp_reshard_after_forward=always",
        ],
        ['fsdp_reshard_after_forward = "always": ZBVZeroBubble splits the backward'],
    ),
    "n-th block": (
        ["--activation_checkpoint.selective_ac_option=0"],
        ['selective_ac_option = "0"'],
    ),
}


@pytest.mark.parametrize("name", BAD_SHARING)
def test_layouts_that_cannot_be_are_refused(name):
    args, fragments = BAD_SHARING[name]
    said = report("", *args, world_size=4)
    for fragment in fragments:
        assert fragment in said


def test_layouts_that_can_be_are_accepted():
    masked = ["--training.document_masking", "--parallelism.context_parallel_method=ulysses"]
    parse("", CP2, *masked, world_size=2)
    parse("", "--training.document_masking", world_size=2)
    parse("", TP2, CP2, "--training.seq_len=8", world_size=8)
    parse("", TP2, "--training.seq_len=3", "--parallelism.disable_sequence_parallel", world_size=2)
    parse("", PP2, TP2, CP2, "--training.seq_len=8", world_size=16)
    parse("", PP2, "--parallelism.fsdp_reshard_after_forward=always", world_size=2)
    parse(
        "[parallelism]\npipeline_parallel_degree = 2\npipeline_parallel_layers_per_stage = 4",
        world_size=2,
    )
    parse(
        "",
        CP2,
        "--training.seq_len=6",
        "--parallelism.context_parallel_load_balancer=none",
        world_size=2,
    )


BAD_LAYOUTS_OF_12 = {
    "replicas": (
        ["--parallelism.data_parallel_replicate_degree", "5"],
        ["5", "world size 12", "1, 2, 3, 4, 6, 12"],
    ),
    "degrees": (
        [
            "--parallelism.data_parallel_replicate_degree=2",
            "--parallelism.data_parallel_shard_degree=4",
        ],
        ["2 x", "= 4 gives 8 ranks", "world size is 12"],
    ),
    "global batch": (
        ["--training.global_batch_size=32"],
        ["= 32", "over 12 data-parallel ranks", "8 and 16", "24 and 36"],
    ),
}


@pytest.mark.parametrize("name", BAD_LAYOUTS_OF_12)
def test_degrees_and_batches_that_do_not_divide_are_refused(name):
    args, fragments = BAD_LAYOUTS_OF_12[name]
    assert_one_fault(report("", *args, world_size=12), "command line", fragments)


def test_an_unknown_world_size_leaves_the_layout_unjudged():
    args = ["--parallelism.data_parallel_shard_degree=4", "--training.global_batch_size=7"]
    parse("", *args, world_size=0)
    report("", *args, world_size=1)
    parse("", PP2, "--training.local_batch_size=1", world_size=0)
    report("", PP2, "--parallelism.pipeline_parallel_microbatch_size=3", world_size=0)
    report("", "--parallelism.pipeline_parallel_degree=4", "--model.n_layers=1", world_size=0)
