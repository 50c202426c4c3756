"""The run plan against values worked out by hand."""

from pathlib import Path

import pytest

from torchtrain.config.layout import BatchPlan, Degrees
from torchtrain.config.plans import PipelinePlan, Schedule, find_tokenizer, plan_run
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError

# 32 ranks: 2 stages of the pipeline x 2 replicas x 2 shards x 2 ranks per sequence x 2 per product.
LARGE = {
    "model.name": "llama3",
    "model.flavor": "debugmodel",
    "model.n_layers": 7,
    "parallelism.pipeline_parallel_degree": 2,
    "parallelism.data_parallel_replicate_degree": 2,
    "parallelism.context_parallel_degree": 2,
    "parallelism.tensor_parallel_degree": 2,
    "parallelism.pipeline_parallel_schedule": "Interleaved1F1B",
    "parallelism.pipeline_parallel_microbatch_size": 2,
    "training.seq_len": 64,
    "training.global_batch_size": 48,
    "training.local_batch_size": 8,
    "training.steps": 200,
    "validation.enable": True,
    "validation.seq_len": 32,
    "validation.local_batch_size": 4,
    "validation.steps": 3,
    "validation.freq": 50,
    "lr_scheduler.warmup_steps": 10,
    "lr_scheduler.total_steps": 150,
    "lr_scheduler.decay_ratio": 0.357,
}


def planned(world_size=32, saved=None, **overrides):
    given = {**LARGE, **{key.replace("__", "."): value for key, value in overrides.items()}}
    texts = [
        f"--{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in given.items()
        if value is not None
    ]
    config = JobConfig().parse_args(texts, world_size)
    return plan_run(config, world_size, tokenizer_size=2000, global_batch_size=saved)


def test_degrees_and_what_follows_from_them():
    degrees = planned().degrees
    assert degrees == Degrees(pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=2)
    assert degrees.data_parallel * degrees.ranks_per_sample == 32
    assert degrees.data_parallel == 4
    assert degrees.ranks_per_stage == 4
    assert degrees.ranks_per_sample == 8


def test_the_batch_is_split_into_the_largest_microbatches():
    """48 sequences over 4 data ranks are 12 each: 6 is the largest divisor up to 8."""
    assert planned().batch == BatchPlan(
        global_batch_size=48, microbatch_size=6, accumulation_steps=2, data_parallel_degree=4
    )


@pytest.mark.parametrize(("saved", "batch"), [(None, 32), (96, 96)])
def test_a_batch_left_open_is_the_checkpoints(saved, batch):
    plan = planned(saved=saved, training__global_batch_size=-1)
    assert plan.batch.global_batch_size == batch
    assert plan.validation.max_sequences == 3 * batch


def test_the_pipeline():
    """A sequence of 64 is 32 tokens on each context rank, and 16 of them on each tensor rank."""
    assert planned().pipeline == PipelinePlan(
        schedule="Interleaved1F1B",
        stages=4,
        last_rank=1,
        microbatches=3,
        microbatch_size=2,
        seq_len=32,
        activation_len=16,
        whole_backward=False,
        overlaps=False,
    )
    assert planned().sequence_shards == 2
    whole = planned(parallelism__disable_sequence_parallel=True)
    assert whole.sequence_shards == 1
    assert whole.pipeline.activation_len == 32
    v_shaped = planned(parallelism__pipeline_parallel_schedule="ZBVZeroBubble")
    assert v_shaped.pipeline.last_rank == 0


@pytest.mark.parametrize(
    ("schedule", "option", "is_whole"),
    [
        ("ZBVZeroBubble", {}, False),
        ("ZBVZeroBubble", {"activation_checkpoint__mode": "full"}, True),
        ("ZBVZeroBubble", {"compile__enable": True}, True),
        ("ZBVZeroBubble", {"compile__enable": True, "compile__components": "loss"}, False),
        ("GPipe", {"activation_checkpoint__mode": "full", "compile__enable": True}, False),
    ],
)
def test_a_split_backward_is_whole_under_recomputation_and_compilation(schedule, option, is_whole):
    plan = planned(parallelism__pipeline_parallel_schedule=schedule, **option)
    assert plan.pipeline.whole_backward == is_whole
    assert plan.validation.pipeline.whole_backward == is_whole


def test_the_layers_of_each_stage():
    """7 blocks, and the ends count for one each: 9 over 4 stages are 3, 2, 2, 2."""
    blocks = [len([n for n in stage if n.startswith("layers.")]) for stage in planned().stages]
    assert blocks == [2, 2, 2, 1]
    even = {
        "parallelism__pipeline_parallel_first_stage_less_layers": 0,
        "parallelism__pipeline_parallel_last_stage_less_layers": 0,
    }
    stages = planned(parallelism__pipeline_parallel_layers_per_stage=2, **even).stages
    assert [len([n for n in stage if n.startswith("layers.")]) for stage in stages] == [2, 2, 2, 1]


def test_validation():
    plan = planned().validation
    assert (plan.seq_len, plan.batch_size, plan.max_sequences) == (32, 4, 3 * 48)
    assert (plan.freq, plan.last_step) == (50, 200)
    assert (plan.pipeline.microbatches, plan.pipeline.seq_len) == (2, 16)
    unset = planned(
        validation__seq_len=None, validation__local_batch_size=None, validation__steps=-1
    ).validation
    assert (unset.seq_len, unset.batch_size, unset.max_sequences) == (64, 6, None)


def test_the_schedule():
    """0.357 of 150 steps are 53.55."""
    assert planned().schedule == Schedule(
        total_steps=150,
        warmup_steps=10,
        stable_steps=86,
        decay_steps=54,
        decay_type="linear",
        min_lr_factor=0.1,
    )
    assert planned(lr_scheduler__total_steps=None).schedule.total_steps == 200
    assert planned(lr_scheduler__warmup_steps=0).schedule.warmup_steps == 0
    squeezed = planned(lr_scheduler__warmup_steps=140).schedule
    assert (squeezed.stable_steps, squeezed.decay_steps) == (0, 10)


def test_the_vocabulary():
    assert planned().shape.vocab_size == 2000
    assert planned(model__vocab_size=2000).shape.vocab_size == 2000
    with pytest.raises(UserError, match=r"model\.vocab_size = 1999 is smaller than .* 2000 tokens"):
        planned(model__vocab_size=1999)


def test_the_tokenizer_has_two_names():
    for key in ("model.tokenizer_path", "model.hf_assets_path"):
        assert find_tokenizer(JobConfig().parse_args([f"--{key}=here"]).model) == "here"
    assert Path(find_tokenizer(JobConfig().model)).name == "debug_tokenizer.model"
