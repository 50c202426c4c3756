"""What a run has trained, ready for a forward: from a run's folder, or one of its checkpoints.

It needs no corpus and no optimizer, and takes no lock: the run may be going on. On several ranks
the model is shared as in training, by the run's own options; what the run itself was split into
does not matter. Nothing is written, and nothing that the folder names is imported.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli
import torch
import torch.distributed as dist

from torchtrain.catalog.identity import ModelIdentity, Sections, find_saved_model
from torchtrain.catalog.models import FAMILIES
from torchtrain.checkpoint import Checkpointer
from torchtrain.checkpoint.commit import INDEX, MARKER, STATE, Source
from torchtrain.checkpoint.foreign import open_hf_source
from torchtrain.config.options import options
from torchtrain.config.plans import RunPlan, find_tokenizer, plan_run
from torchtrain.config.reading import Source as ConfigSource
from torchtrain.config.schema import Checkpoint, Training
from torchtrain.config_manager import JobConfig
from torchtrain.datasets.data_state import find_tokenizers
from torchtrain.datasets.tokenizer import Tokenizer, load_tokenizer
from torchtrain.errors import SharedUserError, UserError
from torchtrain.kernel_checks import check_kernels, find_device_facts
from torchtrain.logging_utils import logger
from torchtrain.ranks import on_rank_zero, patient_group, together
from torchtrain.set_up import ParallelModel, set_up_model
from torchtrain.utils import expand_user, user_errors

CONFIG_FILE = "config.toml"  # in a run's folder


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Weights on the disk, and what is known of them."""

    path: Path
    """The folder with the weights."""
    identity: ModelIdentity
    """Of the model."""
    seq_len: int
    """Tokens of the sequences that it was trained on."""
    tokenizer: str | None
    """Its tokenizer's file or folder; None: that of the debug runs."""
    tokenizer_fingerprints: set[str]
    """Of the tokenizers that made its samples; empty where that is not known."""
    config: Sections
    """The run's as saved, by section and key; empty where there was none."""
    load: Callable[[ParallelModel], None]
    """Fills the model's weights, sharded or not. A collective call."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model that was trained, ready for a forward."""

    model: ParallelModel
    """Its weights are loaded. `model.config` and `model.plan` are of this process, not the run's:
    see `trained`."""
    tokenizer: Tokenizer
    trained: Trained


def load_trained(
    folder: str,
    device: torch.device,
    given: list[str],
    *,
    dtype: str | None = None,
    tokenizer: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> TrainedModel:
    """Load the newest checkpoint of a run's folder, or the one that is named. A collective call.

    Args:
        folder: of a run, of a checkpoint, or of a Hugging Face model.
        device: of this rank.
        given: options of the run's own, such as `--parallelism.tensor_parallel_degree 2`. They
            stand over the defaults: how the run was parallelized does not count.
        dtype: of the weights and of the computation; None: bfloat16, on a CPU float32.
        tokenizer: its file or folder; None: the run's.
        defaults: by full option name, what counts where nothing is given.

    Raises:
        UserError: whatever is wrong with folder, tokenizer or options, on one rank.
        PeerFault: the same, on the others.
    """
    trained = find_trained(folder)
    config = together(
        lambda: configure(
            replace(trained, tokenizer=tokenizer or trained.tokenizer),
            given,
            dtype or ("float32" if device.type == "cpu" else "bfloat16"),
            defaults or {},
        )
    )
    together(lambda: check_kernels(config, find_device_facts(device)))
    if trained.config.get("model", {}).get("converters") and not config.model.converters:
        logger.info(
            f"the run computed linear layers in float8; here they compute in "
            f"{config.training.mixed_precision_param}, so a loss differs from the run's own"
        )
    own_tokenizer = together(lambda: load_own_tokenizer(trained, config))
    size = own_tokenizer.vocab_size
    plan = together(lambda: plan_run(config, dist.get_world_size(), tokenizer_size=size))
    fsdp = needs_fsdp(config, plan)
    model = set_up_model(config, plan, device, draws=False, fsdp=fsdp)
    trained.load(model)
    return TrainedModel(model=model, tokenizer=own_tokenizer, trained=trained)


def needs_fsdp(config: JobConfig, plan: RunPlan) -> bool:
    """Check whether the forward needs FSDP: to gather shards, to copy, or to cast.

    It gathers into a copy of its own, also on one rank.
    """
    training, degrees = config.training, plan.degrees
    shares_weights = degrees.dp_replicate * degrees.dp_shard * degrees.cp * degrees.pp > 1
    shares_experts = plan.shape.n_experts > 0 and degrees.expert_shard > 1
    casts = training.dtype != training.mixed_precision_param
    return shares_weights or shares_experts or casts or training.enable_cpu_offload


def find_trained(folder: str) -> Trained:
    """Find the weights of a folder, and verify them to the last byte. A collective call.

    Raises:
        UserError: there are none, or they are damaged; on one rank.
        PeerFault: the same, on the others.
    """
    path = on_rank_zero(lambda: find_weights(expand_user(folder)))
    if not (path / MARKER).exists() and (path / "config.json").exists():
        return find_in_hf(path)
    checkpointer = Checkpointer(Checkpoint(enable=True, load_only=True), path.parent)
    source = checkpointer.verify(path, model_only=True)
    if not isinstance(source, Source):
        raise SharedUserError(
            f"{path} cannot be used: {source}. It is left as it is; another checkpoint of the run "
            "can be given by its own folder, such as outputs/checkpoint/step-1000"
        )
    config = source.progress.config
    return Trained(
        path=path,
        identity=find_saved_model(config, source.progress.shape),
        seq_len=config["training"]["seq_len"],
        tokenizer=on_rank_zero(lambda: find_saved_tokenizer(config, path)),
        tokenizer_fingerprints=find_tokenizers(source.progress.data),
        config=config,
        load=lambda model: checkpointer.load(source, model.model_state, None),
    )


def find_in_hf(path: Path) -> Trained:
    """Find the weights of a Hugging Face folder. A collective call.

    Raises:
        UserError: it is damaged, or a model that is none of ours; on one rank.
        PeerFault: the same, on the others.
    """
    source = together(lambda: open_hf_source(path))
    has_tokenizer = any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    return Trained(
        path=path,
        identity=source.identity,
        seq_len=source.folder.seq_len or Training().seq_len,
        tokenizer=str(path) if has_tokenizer else None,
        tokenizer_fingerprints=set(),
        config={},
        load=lambda model: logger.info(source.load(model.weights, patient_group())),
    )


def find_weights(folder: Path) -> Path:
    """Return the folder with the weights: this one, or of a run's the newest checkpoint.

    Raises:
        UserError: there is none.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r} (looked from {Path.cwd()})")
    if any((folder / name).exists() for name in (MARKER, STATE, INDEX, "config.json")):
        return folder
    is_run = (folder / CONFIG_FILE).exists()
    for holder in (folder, folder / find_checkpoint_folder(folder)):
        if holder.is_dir():
            names = [path.name for path in holder.iterdir()]
            steps = [int(name[5:]) for name in names if re.fullmatch(r"step-(0|[1-9]\d*)", name)]
            if steps:
                return holder / f"step-{max(steps)}"
    if is_run:
        raise UserError(
            f"the run in {str(folder)!r} has no complete checkpoint: it is saved every "
            "checkpoint.interval steps and after the last, where checkpoint.enable is set"
        )
    raise UserError(
        f"{str(folder)!r} holds no checkpoint: give the folder of a run, or of one of its "
        "checkpoints (such as outputs/checkpoint/step-1000), or a Hugging Face folder"
    )


def find_checkpoint_folder(run_folder: Path) -> str:
    """Return the folder of a run's checkpoints, from the run's.

    Raises:
        UserError: its config.toml cannot be read.
    """
    config = run_folder / CONFIG_FILE
    if not config.exists():
        return Checkpoint().folder
    with user_errors(f"{config} cannot be read", OSError, ValueError):
        saved = tomli.loads(config.read_text(encoding="utf-8"))
    return str(expand_user(saved.get("checkpoint", {}).get("folder", Checkpoint().folder)))


def find_saved_tokenizer(config: Sections, checkpoint: Path) -> str | None:
    """Return the run's tokenizer, a relative path from the current folder, or from the run's.

    None: the run had that of the debug runs.

    Raises:
        UserError: it is not there.
    """
    section = config["model"]
    given = section.get("tokenizer_path") or section.get("hf_assets_path")
    if given is None:
        return None
    run_folder = next(
        (parent for parent in checkpoint.parents if (parent / CONFIG_FILE).exists()),
        checkpoint.parent,
    )
    for path in (expand_user(given), run_folder / expand_user(given)):
        if path.exists():
            return str(path)
    raise UserError(
        f"the tokenizer that {checkpoint} was trained with, {given!r}, is neither in the current "
        f"folder nor in {run_folder}: give it by --tokenizer"
    )


def configure(
    trained: Trained, given: list[str], dtype: str, defaults: Mapping[str, Any]
) -> JobConfig:
    """Return the config of a forward of the model: the given options over what is saved.

    Raises:
        UserError: an option is wrong, or the run's model comes from code that nobody has named.
    """
    identity = trained.identity
    code = trained.config.get("experimental", {}).get("custom_import")
    names_code = any(option.startswith("--experimental.custom_import") for option in given)
    if identity.family not in FAMILIES and code and not names_code:
        raise UserError(
            f"model.name = {identity.family!r} of {trained.path} comes from your own code, and a "
            f"checkpoint does not run code: name it by --experimental.custom_import {code}"
        )
    values = {
        "model.name": identity.family,
        "model.tokenizer_path": trained.tokenizer,
        "training.seq_len": trained.seq_len,
        "training.dtype": dtype,
        "training.mixed_precision_param": dtype,
        "training.local_batch_size": 1,
        "training.document_masking": trained.config.get("training", {}).get("document_masking"),
    }
    if identity.family in FAMILIES:
        # Any flavor: each of its values is given.
        values["model.flavor"] = next(iter(FAMILIES[identity.family].flavors))
    else:
        values["model.flavor"] = trained.config["model"]["flavor"]
    for field, value in identity.shape.items():
        if f"model.{field}" in options():
            values[f"model.{field}"] = value
    values |= defaults
    known = {name: value for name, value in values.items() if value is not None}
    return JobConfig().parse_args(given, beneath=ConfigSource(str(trained.path), known))


def load_own_tokenizer(trained: Trained, config: JobConfig) -> Tokenizer:
    """Load the tokenizer that the config names, and compare it with the model.

    Raises:
        UserError: it is not there, damaged, or larger than the model's vocabulary.
    """
    path = find_tokenizer(config.model)
    tokenizer = load_tokenizer(path)
    vocab_size = trained.identity.shape["vocab_size"]
    if 0 < vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"the tokenizer {path!r} has {tokenizer.vocab_size:,} tokens and the vocabulary of "
            f"{trained.path} only {vocab_size:,}: give the model's own by --tokenizer"
        )
    known = trained.tokenizer_fingerprints
    if known and tokenizer.fingerprint not in known and os.environ.get("RANK", "0") == "0":
        logger.warning(
            f"{trained.path} was trained with another tokenizer than {path}: to it the same id is "
            "another token"
        )
    return tokenizer
