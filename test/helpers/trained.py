"""A run's folder with checkpoints, made in this process without a step of training."""

from pathlib import Path

import torch
from helpers.launching import options

import train
from torchtrain.checkpoint import Checkpointer
from torchtrain.config.toml import to_toml
from torchtrain.config_manager import JobConfig
from torchtrain.resuming import progress_of
from torchtrain.set_up import set_up
from torchtrain.stopping import StopRequest
from torchtrain.watchdog import Watchdog


def write_run(folder, overrides, steps=(1,)):
    """Write the folder of a run with these options; return its weights at the last of `steps`.

    They are random values that let every token speak: each step has others.
    """
    given = {"job.dump_folder": folder, "checkpoint.enable": True, **overrides}
    trainer = set_up(JobConfig().parse_args(options(given), world_size=1), torch.device("cpu"))
    checkpointer = Checkpointer(trainer.config.checkpoint, folder)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for tensor in trainer.model_state.values():
            mean = 1.0 if tensor.ndim == 1 else 0.0
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            local.detach().normal_(mean, 0.3, generator=generator)
        trainer.step = step
        checkpointer.save(trainer.model_state, trainer.optimizer, progress_of(trainer))
    checkpointer.finish()
    (folder / "config.toml").write_text(to_toml(trainer.config))
    return {
        name: tensor.full_tensor().detach().clone() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in trainer.model_state.items()
    }


def validate(trainer):
    """Validate as after a step; return the results."""
    watchdog = Watchdog(trainer.config.comm, Path("unused"), trainer.mesh, loop=train.train)
    results, _ = train.validate(trainer, StopRequest(), train.Stopwatch(), watchdog, 0)
    return results
