"""Start a model from a trained one with fewer channels somewhere, so that nothing learned is thrown away."""

from __future__ import annotations

import torch
from torch import nn

from gigdiff.errors import ModelMismatchError

__all__ = ["copy_leading"]


@torch.no_grad()
def copy_leading(source: nn.Module, target: nn.Module) -> None:
    """Set every parameter of `target` to `source`'s in its leading slice, and to zero beyond it.

    A convolution that gained inputs therefore ignores them, and one that gained outputs gives zeros there: `target`
    starts as the same function as `source` (Chen et al. 2016, "Net2Net", arXiv 1511.05641, in its simplest case).

    Raises:
        ModelMismatchError: the parameters' names or numbers of dimensions differ, or `target` is narrower somewhere.
    """
    wanted, given = dict(target.named_parameters()), dict(source.named_parameters())
    if wanted.keys() != given.keys():
        odd = sorted(wanted.keys() ^ given.keys())
        raise ModelMismatchError(f"the model to start from has other layers: {', '.join(odd[:4])}")
    for name, parameter in wanted.items():
        old = given[name]
        if old.ndim != parameter.ndim or any(o > n for o, n in zip(old.shape, parameter.shape, strict=True)):
            raise ModelMismatchError(
                f"the model to start from does not fit: {name} is {tuple(old.shape)} there and "
                f"{tuple(parameter.shape)} here; only wider is possible"
            )
    for name, parameter in wanted.items():
        parameter.zero_()
        parameter[tuple(slice(0, n) for n in given[name].shape)] = given[name].to(parameter)
