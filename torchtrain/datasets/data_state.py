"""The data state of a checkpoint: what was read, and from where reading resumes.

    samples_consumed    samples that the steps so far have read
    origin              step and sample from which samples are counted, see DataLoader
    global_batch_size   samples per step
    name                what messages call the dataset
    dataset             its identity: what fixes samples and their order (samples.Identity)
    positions           of every stream, in order, by the names of token_stream.Position

Until version 1 the identity's entries stood beside the others, those of a mixture under names such
as "corpus of source 3"; positions had names such as "stream 4 of source 3"; `origin` was a pair.
"""

from typing import Any

from torchtrain.datasets.samples import flatten
from torchtrain.datasets.token_stream import Position

DataState = dict[str, Any]

OPTIONS = {
    "corpus": "the corpus' contents (training.dataset, its path, data.text_key, [validation])",
    "tokenizer": "the tokenizer (model.tokenizer_path)",
    "seq_len": "training.seq_len",
    "seed": "debug.seed",
    "n_samples": "the number of samples in an epoch",
    "packing": "data.packing",
    "streams": "data.streams",
    "global_batch_size": "training.global_batch_size",
}
"""What messages call an entry; those of a mixture's sources are data.mixture's."""

NOT_OF_DATASET = ("samples_consumed", "origin", "global_batch_size", "source", "positions")


def upgrade(saved: DataState) -> DataState:
    """Return a saved state in today's form; entries that it lacks are empty or 0."""
    if "dataset" in saved:
        return saved
    by_source: dict[int, dict[str, Any]] = {0: {}}  # 0: what all sources have in common
    for key, value in saved.items():
        if key not in NOT_OF_DATASET:
            name, number = _split(key)
            by_source.setdefault(number, {})[name] = value
    dataset = by_source.pop(0)
    if by_source:
        dataset["sources"] = [by_source[number] for number in sorted(by_source)]
    step, sample = saved.get("origin", (0, 0))
    return {
        "samples_consumed": saved.get("samples_consumed"),
        "origin": {"step": step, "sample": sample},
        "global_batch_size": saved.get("global_batch_size", 0),
        "name": saved.get("source"),
        "dataset": dataset,
        "positions": _upgrade_positions(saved.get("positions", {})),
    }


def _split(name: str) -> tuple[str, int]:
    """Return what comes before " of source ", and the source's number; 0 where it isn't there."""
    name, _, number = name.partition(" of source ")
    return name, int(number or 0)


def _upgrade_positions(saved: dict[str, list[int]]) -> list[dict[str, int]]:
    """Return positions in the order of sources and streams."""
    positions = {}
    for name, numbers in saved.items():
        stream, source = _split(name.removeprefix("stream "))
        positions[source, int(stream)] = Position(*numbers)._asdict()
    return [positions[key] for key in sorted(positions)]


def differences(saved: DataState, current: DataState) -> list[str]:
    """Return one line per entry that fixes the samples' order and is not what it was."""
    before, now = _entries(saved), _entries(current)
    lines = []
    for key in dict.fromkeys([*OPTIONS, *before, *now]):
        if before.get(key) != now.get(key):
            name = OPTIONS.get(key, f"{key} (data.mixture)")
            lines.append(
                f"  {name}: {before.get(key, 'none')} in the checkpoint, {now.get(key, 'none')} now"
            )
    return lines


def find_tokenizers(state: DataState) -> set[str]:
    """Return the fingerprints of the tokenizers that made the samples; none of an empty state."""
    entries = flatten(upgrade(state)["dataset"])
    return {value for key, value in entries.items() if key.startswith("tokenizer")}


def _entries(state: DataState) -> dict[str, Any]:
    return {**flatten(state["dataset"]), "global_batch_size": state["global_batch_size"]}
