"""How much a model has to compute."""

from dataclasses import dataclass
from pathlib import Path

import torch

from torchtrain.catalog.models import ModelShape
from torchtrain.config.plans import DEBUG_TOKENIZER, plan_run
from torchtrain.config_manager import JobConfig
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.models.decoder import load_decoder
from torchtrain.tools.bench.runs import Setting, list_options
from torchtrain.tools.bench.sizes import Size


@dataclass(frozen=True)
class Work:
    """What a model of a size has to compute."""

    shape: ModelShape
    flops_per_token: float
    """Forward and backward, recomputation not counted."""


def find_work(size: Size, setting: Setting) -> Work:
    """Return what the runs of a size have to compute.

    Raises:
        ConfigError: the trainer's options make no run.
    """
    options = list_options(size, setting, Path("unused"))
    config = JobConfig().parse_args(options, setting.ranks)
    tokenizer_size = load_tokenizer(DEBUG_TOKENIZER).vocab_size
    plan = plan_run(config, setting.ranks, tokenizer_size=tokenizer_size)
    with torch.device("meta"):
        model = load_decoder(config.model.name)(plan.shape)
    return Work(plan.shape, model.flops_per_token(config.training.seq_len))
