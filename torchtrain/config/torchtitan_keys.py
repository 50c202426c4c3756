"""The options of torchtitan v0.2.2 that are not ours, as data: its config files can be read.

Source: https://github.com/pytorch/torchtitan/blob/v0.2.2/torchtitan/config/job_config.py
"""

from typing import Any

ANY_VALUE = None

# By key, table or section: the values that ask for nothing that torchtrain lacks. The longest entry
# that leads to a key counts.
IDLE_VALUES: dict[str, tuple[Any, ...] | None] = {
    "job.save_config_file": ("",),
    "job.custom_config_module": ("",),
    "metrics.save_for_all_ranks": (False,),
    "model.print_after_conversion": (False,),
    "optimizer.early_step_in_backward": (False,),
    "training.dataloader": ANY_VALUE,  # no process reads ahead here, so none is to be set up
    "validation.dataloader": ANY_VALUE,
    "parallelism.pipeline_parallel_schedule_csv": ("",),
    "parallelism.expert_tensor_parallel_degree": (1,),
    "parallelism.expert_parallel_comm_backend": ANY_VALUE,  # needs a degree
    "checkpoint.enable_ft_dataloader_checkpoints": ANY_VALUE,  # needs [fault_tolerance]
    "checkpoint.initial_load_in_hf_quantized": (False,),
    "checkpoint.create_seed_checkpoint": (False,),
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": (
        [],
        ["moe.router.gate"],  # the default; a Llama has no such layer
    ),
    "activation_checkpoint.early_stop": (False,),
    "activation_checkpoint.visualize_memory_budget_pareto": (False,),
    "activation_checkpoint.preserve_rng_state": ANY_VALUE,  # nothing in a Llama is random
    "activation_checkpoint.determinism_check": ("default",),
    "activation_checkpoint.debug": (False,),
    "comm.trace_buf_size": (0,),
    "comm.save_traces_folder": ANY_VALUE,  # needs trace_buf_size
    "comm.save_traces_file_prefix": ANY_VALUE,
    "comm.mode": ("default",),
    "experimental.custom_args_module": ("",),
    "quantize.linear.mx": ANY_VALUE,  # needs model.converters
    "quantize.grouped_mm": ANY_VALUE,
    "memory_estimation": ANY_VALUE,
    "memory_estimation.enable": (False,),
    "fault_tolerance": ANY_VALUE,
    "fault_tolerance.enable": (False,),
}

SECTIONS = ("quantize", "memory_estimation", "fault_tolerance")

# Values that torchtitan knows for a key of ours, and we do not.
UNSUPPORTED_VALUES = {"parallelism.context_parallel_load_balancer": ("ptrr",)}

# What to do instead, where that is not to leave the key out.
ADVICE = {
    "checkpoint.create_seed_checkpoint": "it is not needed: initial weights are a function of "
    "debug.seed and the parameter's name, the same on every layout",
}


def find_entry(name: str) -> str:
    """Return the entry of IDLE_VALUES that leads to a key, or "" where it is not torchtitan's."""
    while name and name not in IDLE_VALUES:
        name = name.rpartition(".")[0]
    return name


def is_idle(name: str, value: Any) -> bool:
    """Return whether torchtitan's key asks for nothing that torchtrain lacks."""
    values = IDLE_VALUES[find_entry(name)]
    if values is ANY_VALUE:
        return True
    return any(type(value) is type(idle) and value == idle for idle in values)
