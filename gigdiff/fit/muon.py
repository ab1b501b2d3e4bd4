"""Muon for the weight matrices, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ["MuonAdamW", "build_optimizer", "orthogonalised"]

# Quintic whose slope at 0 is largest; singular values end between about 0.7 and 1.2 (Jordan et al. 2024).
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalised(matrix: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """U V^T of a matrix U S V^T, nearly: Newton-Schulz steps X <- a X + (b X X^T + c (X X^T)^2) X.

    (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".) Computed in `dtype`: bfloat16 is
    accurate enough for training, and two to three times as fast where the device has it.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x if wide else x.T


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on hidden weight matrices and convolutions, AdamW on the rest.

        M <- m M + (1 - m) G;  W <- (1 - r w) W - 0.2 r sqrt(max(rows, columns)) orthogonalised((1 - m) G + m M)

    The factor 0.2 sqrt(max) gives an update AdamW's size (Liu et al. 2025, arXiv 2502.16982), so one learning rate r
    serves both. A convolution (out, in, h, w) counts as a matrix (out, in * h * w). A test holds it against
    torch.optim.Muon, which takes matrices only.

    Args:
        named_parameters: of the model. Tensors of two and more dimensions are Muon's.
        lr: learning rate r.
        outer: beginnings of the names of the first and the last layer, which are AdamW's whatever their shape.
        momentum: m.
        betas: AdamW's.
        weight_decay: w, of both.
        dtype: what Muon's matrices are multiplied in.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        lr: float,
        *,
        outer: tuple[str, ...] = (),
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        matrices: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        for name, parameter in named_parameters:
            (matrices if parameter.ndim >= 2 and not name.startswith(outer) else rest).append(parameter)
        groups = [{"params": params, "muon": muon} for params, muon in ((matrices, True), (rest, False)) if params]
        self.dtype = dtype
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. `closure` is not supported."""
        if closure is not None:
            raise NotImplementedError("MuonAdamW takes no closure")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                for p in params:
                    self._muon(p, group)
            elif params:
                self._adamw(params, group)

    def _muon(self, p: torch.nn.Parameter, group: dict) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(state["momentum_buffer"], group["momentum"])
        if p.ndim == 4:  # channels_last in memory, so that this is a view; the order of columns does not matter
            update = update.permute(0, 2, 3, 1)
        shape = update.shape
        update = orthogonalised(update.flatten(1), dtype=self.dtype)
        scale = 0.2 * max(update.shape) ** 0.5
        update = update.reshape(shape)
        if p.ndim == 4:
            update = update.permute(0, 3, 1, 2)
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)

    def _adamw(self, params: list[torch.nn.Parameter], group: dict) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        states = [self.state[p] for p in params]
        adamw(
            list(params),
            [p.grad for p in params],  # type: ignore[misc]
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def build_optimizer(
    name: str,
    model: torch.nn.Module,
    lr: float,
    *,
    outer: tuple[str, ...],
    betas: tuple[float, float],
    weight_decay: float,
    mixed_precision: str,
) -> torch.optim.Optimizer:
    """A trainer's `--optimizer`: "adamw" (fused), or "muon", see MuonAdamW for `outer`."""
    if name == "muon":
        dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
        return MuonAdamW(model.named_parameters(), lr, outer=outer, betas=betas, weight_decay=weight_decay, dtype=dtype)
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
