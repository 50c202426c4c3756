"""Muon: momentum, orthogonalized, for the matrices of the blocks; AdamW for all other weights.

Sources: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the scale of the updates,
with which learning rate and weight decay are AdamW's: Liu et al. 2025 (arXiv:2502.16982). The
update of one matrix is that of `torch.optim.Muon` with adjust_lr_fn="match_rms_adamw".
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from torchtrain.bf16_states import draw, round_mean
from torchtrain.config.schema import Optimizer as OptimizerConfig
from torchtrain.dtypes import DTYPES
from torchtrain.optimizers.adam import build_adamw
from torchtrain.optimizers.build import RATE_NAME
from torchtrain.optimizers.shared_work import SharedWork
from torchtrain.shards import local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of an iteration, x ← a·x + b·x³ + c·x⁵ of each singular value: Jordan's, chosen to be
steep at 0. The values end between about 0.7 and 1.2."""

SMALLEST_NORM = 1e-7
"""A matrix with a smaller norm is divided by this."""

RMS_OF_ADAMW = 0.2
"""Root mean square of an update, as AdamW's usually has (Liu et al., section 2.2)."""


class Muon(Optimizer):
    """Updates groups with "momentum" by Muon, the others by AdamW; a step is a collective call."""

    def __init__(
        self, matrices: Mapping[str, nn.Parameter], adamw: AdamW, config: OptimizerConfig
    ) -> None:
        """Take the matrices, [F, D] or stacked [E, F, D], and the optimizer of the others."""
        self.names = {matrix: name for name, matrix in matrices.items()}
        self.state_dtype = DTYPES[config.state_dtype] if config.state_dtype else None
        self.ns_steps = config.muon_ns_steps
        self.ns_dtype = DTYPES[config.muon_ns_dtype]
        self.nesterov = config.muon_nesterov
        self.shared_work: SharedWork | None = None
        own: dict[str, Any] = {"params": list(matrices.values()), "momentum": config.muon_momentum}
        super().__init__(
            [own, *adamw.param_groups], {"lr": config.lr, "weight_decay": config.weight_decay}
        )
        self.adamw = adamw

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights that have a gradient, which all ranks have for the same weights."""
        self.update_matrices()
        self.adamw.state = self.state
        self.adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        self.adamw.step()

    def update_matrices(self) -> None:
        """Update the matrices, each orthogonalized on one of the ranks that share it."""
        matrices = [
            (weight, group)
            for group in self.param_groups
            if "momentum" in group
            for weight in group["params"]
        ]
        if self.shared_work is None:
            self.shared_work = SharedWork([weight for weight, _ in matrices])
        like = torch.empty(0, dtype=self.ns_dtype, device=self.find_device())
        directions = [self.find_direction(weight, group).to(like) for weight, group in matrices]
        orthogonalize_each = partial(orthogonalize, steps=self.ns_steps)
        updates = self.shared_work.run(directions, orthogonalize_each, like)
        for (weight, group), update in zip(matrices, updates, strict=True):
            if weight.grad is None:
                continue
            part = local(weight.detach())
            part.mul_(1 - group["lr"] * group["weight_decay"])
            scale = RMS_OF_ADAMW * math.sqrt(max(weight.shape[-2:]))
            part.add_(update.to(part.device), alpha=-group["lr"] * scale)

    def find_device(self) -> torch.device:
        """Return where this rank computes; weights may be in the host's memory."""
        weights = [weight for group in self.param_groups for weight in group["params"]]
        if not isinstance(weights[0], DTensor):
            return torch.device(weights[0].device)
        return torch.device(weights[0].device_mesh.device_type)

    def find_direction(self, weight: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """Return this rank's part of the direction that will be orthogonalized."""
        if weight.grad is None:
            return torch.zeros_like(local(weight.detach()))
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad, dtype=self.state_dtype)
            if state["momentum_buffer"].dtype != weight.dtype:
                state["step"] = torch.zeros(())
        gradient = local(weight.grad)
        kept = state["momentum_buffer"]
        wide = kept.to(gradient.dtype)
        momentum = local(wide)
        momentum.lerp_(gradient, 1 - group["momentum"])
        if "step" in state:
            state["step"] += 1
            round_mean(wide, draw(weight, self.names[weight], state["step"]), kept)
        return gradient.lerp(momentum, group["momentum"]) if self.nesterov else momentum


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Return U·Vᵀ of a matrix [F, D] = U·Σ·Vᵀ, nearly: by Newton-Schulz, in the matrix's type.

    An iteration takes X to a·X + (b·A + c·A²)·X with A = X·Xᵀ, the smaller Gram matrix.
    """
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if is_tall else x


def build_muon(weights: Mapping[str, nn.Parameter], config: OptimizerConfig) -> Muon:
    """Build Muon for the matrices of the blocks, routers' too, and AdamW for the other weights."""
    matrices = {name: weight for name, weight in weights.items() if is_matrix(name, weight)}
    others = {name: weight for name, weight in weights.items() if name not in matrices}
    adamw = build_adamw(others, config)
    if config.muon_adamw_lr is not None:
        for group in adamw.param_groups:
            group["lr"] = config.muon_adamw_lr
            group[RATE_NAME] = "adamw"
    return Muon(matrices, adamw, config)


def is_matrix(name: str, weight: Tensor) -> bool:
    """Check whether Muon updates the weight of this name."""
    return name.startswith("layers.") and weight.ndim in (2, 3)
