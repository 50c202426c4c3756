"""The options of torchtitan v0.2.2 that are not ours, as data: its config files can be read.

Source: https://github.com/pytorch/torchtitan/blob/v0.2.2/torchtitan/config/job_config.py
"""

from typing import Any

SECTIONS = ("quantize", "memory_estimation", "fault_tolerance")

# By key, the values that ask for nothing that torchtrain lacks.
KEYS: dict[str, tuple[Any, ...]] = {
    "job.save_config_file": ("",),
    "job.custom_config_module": ("",),
    "metrics.save_for_all_ranks": (False,),
    "model.converters": ([],),
    "model.print_after_conversion": (False,),
    "optimizer.early_step_in_backward": (False,),
    "training.dataloader": ({},),
    "parallelism.pipeline_parallel_schedule_csv": ("",),
    "parallelism.pipeline_parallel_expert_parallel_overlap": (True, False),
    "parallelism.expert_parallel_degree": (1,),
    "parallelism.expert_tensor_parallel_degree": (1,),
    "parallelism.expert_parallel_comm_backend": ("standard",),
    "checkpoint.enable_ft_dataloader_checkpoints": (True, False),
    "checkpoint.initial_load_in_hf": (False,),
    "checkpoint.initial_load_in_hf_quantized": (False,),
    "checkpoint.last_save_model_only": (True, False),
    "checkpoint.last_save_in_hf": (False,),
    "checkpoint.export_dtype": ("float32",),
    "checkpoint.async_mode": ("disabled",),
    "checkpoint.exclude_from_loading": ([],),
    "checkpoint.create_seed_checkpoint": (False,),
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": ([],),
    "activation_checkpoint.early_stop": (False,),
    "activation_checkpoint.visualize_memory_budget_pareto": (False,),
    "activation_checkpoint.preserve_rng_state": (True, False),
    "activation_checkpoint.determinism_check": ("default",),
    "activation_checkpoint.debug": (False,),
    "comm.trace_buf_size": (0,),
    "comm.save_traces_folder": (),
    "comm.save_traces_file_prefix": (),
    "comm.mode": ("default",),
    "debug.moe_force_load_balance": (False,),
    "experimental.custom_args_module": ("",),
}

# Values that torchtitan knows for a key of ours, and we do not.
VALUES = {"parallelism.context_parallel_load_balancer": ("ptrr",)}

# What to do instead, where that is not to leave the key out.
ADVICE = {
    "checkpoint.create_seed_checkpoint": "it is not needed: initial weights are a function of "
    "debug.seed and the parameter's name, the same on every layout",
}
