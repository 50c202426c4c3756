"""What a run says of itself at its start: on the screen, in run.json, and to its metrics."""

import platform
import socket
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from torchtrain import __version__
from torchtrain.config.layout import BatchPlan
from torchtrain.config.toml import to_toml
from torchtrain.config_manager import JobConfig
from torchtrain.dtypes import DTYPES
from torchtrain.logging_utils import logger
from torchtrain.lr_scheduling import describe as describe_schedule
from torchtrain.metrics import MetricsLogger, find_peak_flops
from torchtrain.models.decoder import Decoder, load_decoder
from torchtrain.models.moe import SparseFeedForward
from torchtrain.parallelisms.float8 import describe_float8
from torchtrain.run_folder import RunFolder
from torchtrain.set_up import Trainer
from torchtrain.utils import plural


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What run.json says of a run: what was derived, and where it runs."""

    torchtrain: str
    """Version, as are the next two."""
    torch: str
    python: str
    description: str
    host: str
    """Rank 0's."""
    device: str
    """Name of rank 0's."""
    world_size: int
    degrees: dict[str, int]
    batch: BatchPlan
    tokens_per_step: int
    shape: dict[str, int | float | bool | str]
    """The model's."""
    parameters: int
    """Of the whole model."""
    active_parameters: int
    """Those of them that take part in the computation of one token."""
    steps: int
    """Of the whole run."""
    steps_source: str
    """How `training.tokens` gives them; empty where `training.steps` does."""
    max_lr: float
    """The largest learning rate."""
    max_lr_source: str
    """How "auto" gives it; empty where `optimizer.lr` is a number."""
    data_fingerprint: str
    validation_fingerprint: str
    """Empty without validation."""
    first_step: int
    """The step after those that had been taken when the run started or resumed."""


def state_config(config: JobConfig) -> None:
    """Say what the config is, if it asks for that, and which of its options have no effect."""
    if config.job.print_config:
        logger.info(to_toml(config))
    for note in config.notes:
        logger.info(f"config     {note}")


def describe(trainer: Trainer) -> RunFacts:
    """Say what will run, and return it as facts for run.json."""
    facts = find_facts(trainer)
    config, plan = trainer.config, trainer.plan
    training = config.training
    logger.info(
        f"torchtrain {__version__}, torch {torch.__version__}: {config.job.description}, "
        f"{facts.world_size} x {facts.device}, outputs in {config.job.dump_folder}"
    )
    active = ""
    if facts.active_parameters != facts.parameters:
        active = f" ({facts.active_parameters:,} active per token)"
    logger.info(
        f"model      {config.model.name} {config.model.flavor}, {facts.parameters:,} parameters"
        f"{active}: {plan.shape.describe()}"
    )
    logger.info(f"layout     {plan.describe_layout()}")
    logger.info(f"batch      {plan.batch.describe(training.seq_len)}")
    states = config.optimizer.state_dtype
    logger.info(
        f"precision  parameters {training.dtype}, compute {training.mixed_precision_param}, "
        f"reductions {training.mixed_precision_reduce}"
        f"{f', optimizer states {states}' if states else ''}"
    )
    if config.model.converters:
        whole = build_whole(trainer)
        text = describe_float8(whole, config.quantize_linear_float8, plan.degrees.tp)
        logger.info(f"float8     {text}")
    if plan.length.source:
        logger.info(f"length     {plural(plan.steps, 'step')}: {plan.length.source}")
    logger.info(f"data       {trainer.loader.describe(plan.steps)}")
    if config.validation.enable:
        logger.info(f"validation {trainer.validator.describe()}")
    if config.lr_scheduler.log_schedule:
        logger.info(f"lr         {describe_schedule(plan.schedule, plan.rate.lr)}")
    if plan.rate.source:
        logger.info(f'lr         "auto" is {plan.rate.lr:g}: {plan.rate.source}')
    return facts


def build_whole(trainer: Trainer) -> Decoder:
    """Build the whole model on the meta device, as one process has it."""
    with torch.device("meta"):
        return load_decoder(trainer.config.model.name)(trainer.plan.shape)


def find_facts(trainer: Trainer) -> RunFacts:
    """Return the facts for run.json."""
    plan = trainer.plan
    whole = build_whole(trainer)
    parameters = sum(parameter.numel() for parameter in whole.parameters())
    sparse = [module for module in whole.modules() if isinstance(module, SparseFeedForward)]
    idle = sum(module.idle_parameters for module in sparse)
    device_name = "cpu"
    if trainer.device.type != "cpu":
        device_name = torch.get_device_module(trainer.device).get_device_name()
    return RunFacts(
        torchtrain=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        description=trainer.config.job.description,
        host=socket.gethostname(),
        device=device_name,
        world_size=dist.get_world_size(),
        degrees=asdict(plan.degrees),
        batch=plan.batch,
        tokens_per_step=trainer.tokens_per_step,
        shape=asdict(plan.shape),
        parameters=parameters,
        active_parameters=parameters - idle,
        steps=plan.steps,
        steps_source=plan.length.source,
        max_lr=plan.rate.lr,
        max_lr_source=plan.rate.source,
        data_fingerprint=trainer.loader.dataset.fingerprint,
        validation_fingerprint=trainer.validator.samples.fingerprint,
        first_step=trainer.step + 1,
    )


def open_metrics(trainer: Trainer, folder: RunFolder, facts: RunFacts) -> MetricsLogger | None:
    """Open rank 0's metrics; the other ranks have none."""
    if not folder.owner:
        return None
    config = trainer.config
    part = next(iter(trainer.parts.values()))
    dtype = DTYPES[config.training.mixed_precision_param]
    device_peak = find_peak_flops(trainer.device, dtype, config.metrics.peak_tflops)
    return MetricsLogger(
        section=config.metrics,
        run_folder=folder.path,
        total_steps=facts.steps,
        first_step=facts.first_step,
        tokens_per_step=facts.tokens_per_step,
        flops_per_token=part.flops_per_token(config.training.seq_len),
        peak_flops=None if device_peak is None else device_peak * facts.world_size,
        log_lr=config.lr_scheduler.log_lr,
        description={**config.model_dump(mode="json"), "run": asdict(facts)},
    )
