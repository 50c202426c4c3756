"""The optimizers by their names, as data. No torch here: the config check reads it."""

OPTIMIZERS: dict[str, str] = {
    "Adam": "torchtrain.optimizers.adam:build_adam",
    "AdamW": "torchtrain.optimizers.adam:build_adamw",
}
"""By `optimizer.name`, "module:build": from the weights by name and the section [optimizer] to a
`torch.optim.Optimizer`."""


def register_optimizer(name: str, build: str) -> None:
    """Let `optimizer.name` stand for what the function at `build`, a "module:build", builds."""
    OPTIMIZERS[name] = build
