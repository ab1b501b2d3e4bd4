"""Random numbers that depend on what they are for, never on what ran before.

Every draw is seeded from (seed, purpose, index): the noise of training sample 1234 is the same whether the run was
resumed, sharded over processes or batched differently, so a checkpoint needs no generator state to resume exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["derive_seed", "generator", "normal", "permutation", "uniform"]


def derive_seed(seed: int, purpose: str, index: int = 0) -> int:
    """A 63-bit seed from (seed, purpose, index); any change in any of the three gives an unrelated one."""
    digest = hashlib.blake2b(f"{seed}\x00{purpose}\x00{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator for (seed, purpose, index). Always on the CPU: pixels must not depend on the device."""
    import torch

    return torch.Generator("cpu").manual_seed(derive_seed(seed, purpose, index))


def normal(shape: Sequence[int], seed: int, purpose: str, indices: Iterable[int]) -> torch.Tensor:
    """Standard normal float32 (len(indices), *shape), row i drawn for indices[i] alone."""
    import torch

    return torch.stack([torch.randn(*shape, generator=generator(seed, purpose, i)) for i in indices])


def uniform(count: int, seed: int, purpose: str, indices: Iterable[int]) -> torch.Tensor:
    """Uniform [0, 1) float32 (len(indices), count), row i drawn for indices[i] alone."""
    import torch

    return torch.stack([torch.rand(count, generator=generator(seed, purpose, i)) for i in indices])


def permutation(length: int, seed: int, purpose: str, index: int = 0) -> torch.Tensor:
    """A random permutation int64 (length,) for (seed, purpose, index), such as one epoch's order."""
    import torch

    return torch.randperm(length, generator=generator(seed, purpose, index))
