"""What follows from a config and the world size, against values worked out by hand."""

from dataclasses import asdict
from fractions import Fraction

import pytest
from helpers.configs import parse
from helpers.launching import ROOT
from hypothesis import given
from hypothesis import strategies as st

from torchtrain.catalog.models import FAMILIES
from torchtrain.config.layout import (
    DEGREE_KEYS,
    Degrees,
    count_sequence_shards,
    find_divisors,
    plan_batch,
    plan_degrees,
)
from torchtrain.config.plans import find_tokenizer, plan_run, plan_shape, plan_vocabulary
from torchtrain.config.schema import SECTIONS, Parallelism, Training
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError


def test_overrides_go_over_the_flavor():
    config = parse(
        '[model]\nname = "llama2"\nflavor = "7B"\n'
        "n_layers = 3\nrope_theta = 5\ntied_embeddings = true"
    )
    shape = plan_shape(config.model)
    base = FAMILIES["llama2"].flavors["7B"]
    assert (shape.n_layers, shape.rope_theta, shape.tied_embeddings) == (3, 5.0, True)
    assert (shape.dim, shape.n_heads, shape.vocab_size) == (base.dim, base.n_heads, base.vocab_size)


def test_every_dimension_of_a_shape_can_be_overridden():
    shape = FAMILIES["llama3"].flavors["8B"]
    assert set(type(shape).__dataclass_fields__) <= set(SECTIONS["model"].model_fields)


def test_tokenizer_path():
    assert find_tokenizer(JobConfig().model) == str(
        ROOT / "torchtrain" / "datasets" / "debug_tokenizer.model"
    )
    assert find_tokenizer(parse('[model]\ntokenizer_path = "a/b"').model) == "a/b"
    assert find_tokenizer(parse('[model]\nhf_assets_path = "c"').model) == "c"


def test_data_parallel_degree():
    def degree(replicate: int, shard: int, world_size: int) -> int:
        section = Parallelism(
            data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard
        )
        return plan_degrees(section, world_size).data_parallel

    assert degree(1, -1, 6) == degree(2, -1, 6) == degree(2, 3, 6) == degree(6, 1, 6) == 6
    for replicate, shard in ((4, -1), (1, 1), (2, 2), (12, -1)):
        with pytest.raises(UserError, match="world size"):
            degree(replicate, shard, 6)


def test_plan_batch_examples():
    plan = plan_batch(Training(global_batch_size=24, local_batch_size=5), 2)
    assert (plan.microbatch_size, plan.accumulation_steps, plan.global_batch_size) == (4, 3, 24)
    plan = plan_batch(Training(global_batch_size=-1, local_batch_size=5), 3)
    assert (plan.microbatch_size, plan.accumulation_steps, plan.global_batch_size) == (5, 1, 15)
    for total, ranks, degrees, batches in (
        (24, 5, "4 and 6", "20 and 25"),
        (24, 32, "24", "32"),
        (7, 3, "1 and 7", "6 and 9"),
    ):
        with pytest.raises(UserError, match=f"divide it: {degrees}; .* ranks: {batches}$"):
            plan_batch(Training(global_batch_size=total), ranks)


@given(st.integers(1, 64), st.integers(1, 300), st.integers(1, 64))
def test_plan_batch_is_the_largest_even_split(ranks, per_rank, local):
    plan = plan_batch(Training(global_batch_size=ranks * per_rank, local_batch_size=local), ranks)
    assert (
        plan.microbatch_size * plan.accumulation_steps * ranks
        == plan.global_batch_size
        == ranks * per_rank
    )
    assert plan.microbatch_size <= local
    assert not any(
        per_rank % size == 0 for size in range(plan.microbatch_size + 1, min(local, per_rank) + 1)
    )


@given(st.integers(1, 500), st.integers(2, 64))
def test_plan_batch_names_degrees_and_batches_that_work(total, ranks):
    if total % ranks == 0:
        return
    with pytest.raises(UserError) as raised:
        plan_batch(Training(global_batch_size=total), ranks)
    _, degrees, batches = (part.split(":")[-1] for part in str(raised.value).split(";"))
    for degree in degrees.split(" and "):
        assert plan_batch(
            Training(global_batch_size=total), int(degree)
        ).data_parallel_degree == int(degree)
    for batch in batches.split(" and "):
        assert plan_batch(Training(global_batch_size=int(batch)), ranks).global_batch_size == int(
            batch
        )


def test_plan_batch_of_the_largest_values_is_quick():
    plan = plan_batch(Training(global_batch_size=10**9, local_batch_size=10**9), 1)
    assert (plan.microbatch_size, plan.accumulation_steps) == (10**9, 1)


def test_the_factors_of_the_world_size_are_listed():
    """Not every key that ends in _degree is one: experts share ranks that share something else."""
    ending = [f"parallelism.{key}" for key in Parallelism.model_fields if key.endswith("_degree")]
    assert set(ending) - set(DEGREE_KEYS) == {"parallelism.expert_parallel_degree"}
    assert set(DEGREE_KEYS) <= set(ending)


def test_the_ranks_that_share_experts_are_some_of_those_that_share_data():
    section = Parallelism(
        tensor_parallel_degree=2, context_parallel_degree=3, expert_parallel_degree=4
    )
    degrees = plan_degrees(section, 24)
    assert degrees == Degrees(pp=1, dp_replicate=1, dp_shard=4, cp=3, tp=2, ep=4)
    assert degrees.expert_shard == 6
    assert degrees.data_parallel * degrees.ranks_per_sample == 24
    assert degrees.describe().endswith("; expert parallel: 4 ranks share the experts of a layer")
    with pytest.raises(UserError) as refused:
        plan_degrees(section, 6)
    assert str(refused.value) == (
        "parallelism.expert_parallel_degree = 4 must divide the 6 ranks of the data-shard, context "
        "and tensor degrees together; allowed: 1, 2, 3, 6"
    )


def test_degrees_of_a_mixed_layout():
    section = Parallelism(
        data_parallel_replicate_degree=2,
        tensor_parallel_degree=4,
        pipeline_parallel_degree=3,
        context_parallel_degree=5,
    )
    degrees = plan_degrees(section, 840)
    assert degrees == Degrees(pp=3, dp_replicate=2, dp_shard=7, cp=5, tp=4)
    assert degrees.data_parallel * degrees.ranks_per_sample == 840
    assert degrees.data_parallel == 14
    assert degrees.ranks_per_stage == 20
    assert degrees.ranks_per_sample == 60
    assert degrees.describe() == (
        "pipeline parallel: 3 ranks share the layers; 2 replicas; FSDP: parameters, gradients and "
        "optimizer states sharded over 35 ranks; context parallel: 5 ranks share each sequence; "
        "tensor parallel: 4 ranks share each matrix product"
    )
    assert plan_degrees(Parallelism(), 1).describe() == "one process"


def test_divisors():
    assert find_divisors(1) == [1]
    assert find_divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert find_divisors(97) == [1, 97]


def test_sequences_are_split_by_sequence_parallelism_alone():
    assert count_sequence_shards(Parallelism(tensor_parallel_degree=4)) == 4
    plain = Parallelism(tensor_parallel_degree=4, disable_sequence_parallel=True)
    assert count_sequence_shards(plain) == 1


# 2 pipeline x 2 data-parallel x 2 context-parallel x 2 tensor-parallel ranks.
MIXED = """
[model]
name = "llama2"
flavor = "debugmodel"
[training]
seq_len = 64
steps = 100
global_batch_size = 24
local_batch_size = 6
[parallelism]
pipeline_parallel_degree = 2
pipeline_parallel_schedule = "ZBVZeroBubble"
pipeline_parallel_microbatch_size = 2
context_parallel_degree = 2
tensor_parallel_degree = 2
[validation]
enable = true
seq_len = 32
steps = 3
freq = 7
local_batch_size = 4
[activation_checkpoint]
mode = "full"
"""


def test_the_whole_plan_of_a_mixed_layout():
    plan = plan_run(parse(MIXED, world_size=16), 16, tokenizer_size=1000)
    assert plan.degrees == Degrees(pp=2, dp_replicate=1, dp_shard=2, cp=2, tp=2)
    assert plan.shape.vocab_size == 1000
    assert plan.sequence_shards == 2
    assert asdict(plan.batch) == {
        "global_batch_size": 24,
        "microbatch_size": 6,
        "accumulation_steps": 2,
        "data_parallel_degree": 2,
    }
    # Six blocks, and one each for the embedding and the output, over four stages.
    assert plan.stages == [
        ["tok_embeddings", "layers.0"],
        ["layers.1", "layers.2"],
        ["layers.3", "layers.4"],
        ["layers.5", "norm", "output"],
    ]
    assert asdict(plan.pipeline) == {
        "schedule": "ZBVZeroBubble",
        "stages": 4,
        "last_rank": 0,
        "microbatches": 3,
        "microbatch_size": 2,
        "seq_len": 32,
        "activation_len": 16,
        "whole_backward": True,
        "overlaps": False,
    }
    assert [(s.dataset, s.path, s.share, s.held_out_share, s.side) for s in plan.sources] == [
        ("python_stdlib", None, Fraction(1), 0.01, "training")
    ]
    validation = plan.validation
    assert [(s.dataset, s.held_out_share, s.side) for s in validation.sources] == [
        ("python_stdlib", 0.01, "validation")
    ]
    assert (validation.seq_len, validation.batch_size, validation.max_sequences) == (32, 4, 72)
    assert (validation.freq, validation.last_step) == (7, 100)
    evaluation = validation.pipeline
    assert (evaluation.microbatches, evaluation.seq_len, evaluation.activation_len) == (2, 16, 8)
    assert asdict(plan.schedule) == {
        "total_steps": 100,
        "warmup_steps": 10,
        "stable_steps": 0,
        "decay_steps": 90,
        "decay_type": "linear",
        "min_lr_factor": 0.1,
    }


def test_nothing_is_held_out_where_other_documents_are_validated_on():
    plan = plan_run(parse('[validation]\nenable = true\ndataset = "c4_validation"'), 1)
    assert [source.held_out_share for source in plan.sources] == [0.0]
    (validated,) = plan.validation.sources
    assert (validated.dataset, validated.held_out_share) == ("c4_validation", 0.0)
    assert validated.option == "validation.dataset"


def test_shares_of_a_mixture_are_exact():
    text = '[data]\nmixture = ["python_stdlib = 0.1", "c4 = 0.2", "text . = 1/10"]'
    sources = plan_run(parse(text), 1).sources
    assert [(source.name, source.share) for source in sources] == [
        ("python_stdlib", Fraction(1, 4)),
        ("c4", Fraction(1, 2)),
        ("text .", Fraction(1, 4)),
    ]


def test_the_plan_of_one_process_has_no_pipeline():
    plan = plan_run(JobConfig(), 1)
    assert plan.pipeline is None
    assert plan.validation.pipeline is None
    assert plan.validation.sources == []
    assert plan.validation.max_sequences is None
    assert plan.stages == [plan.shape.layer_names]
    assert plan.shape.vocab_size == 0
    assert (plan.batch.global_batch_size, plan.batch.microbatch_size) == (8, 8)


def test_a_pipeline_splits_its_backward_only_where_nothing_recomputes():
    recomputing = "--activation_checkpoint.mode=full"
    plain = "--activation_checkpoint.mode=none"
    one_stage = "--parallelism.pipeline_parallel_schedule=GPipe"
    for args, whole in (
        ([recomputing], True),
        ([plain], False),
        ([plain, "--compile.enable"], True),
        ([plain, "--compile.enable", "--compile.components=loss"], False),
        ([recomputing, one_stage], False),
    ):
        config = parse(MIXED, *args, world_size=16)
        assert plan_run(config, 16).pipeline.whole_backward is whole, args


def test_a_checkpoints_batch_counts_where_none_is_given():
    config = parse("[training]\nlocal_batch_size = 4", world_size=2)
    assert plan_run(config, 2).batch.global_batch_size == 8
    assert plan_run(config, 2, global_batch_size=24).batch.accumulation_steps == 3
    given = parse("[training]\nglobal_batch_size = 12", world_size=2)
    assert plan_run(given, 2, global_batch_size=24).batch.global_batch_size == 12
    with pytest.raises(UserError, match="7 cannot be divided over 2"):
        plan_run(config, 2, global_batch_size=7)


def test_the_vocabulary_is_the_tokenizers_or_larger():
    model = JobConfig().model
    shape = plan_shape(model)
    assert plan_vocabulary(model, shape, 500) == 500
    model.vocab_size = 600
    shape = plan_shape(model)
    assert plan_vocabulary(model, shape, 500) == 600
    assert plan_vocabulary(model, shape, 600) == 600
    with pytest.raises(UserError, match="= 600 is smaller than the tokenizer's 601 tokens"):
        plan_vocabulary(model, shape, 601)


def test_the_choices_of_a_schedule_are_the_catalogs():
    from torchtrain.catalog.schedules import SCHEDULES
    from torchtrain.config.options import options

    allowed = options()["parallelism.pipeline_parallel_schedule"].allowed
    assert allowed == f"one of {', '.join(SCHEDULES)}"
