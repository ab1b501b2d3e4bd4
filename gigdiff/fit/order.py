"""Which samples a training step sees: a pure function of (seed, step), so resuming needs only the step number."""

from __future__ import annotations

from functools import lru_cache

import torch

from gigdiff import rng

__all__ = ["positions_of_step", "samples_at"]


def positions_of_step(step: int, batch_size: int, process_index: int = 0, num_processes: int = 1) -> range:
    """This process's positions in the endless stream of training samples at `step` (0-based).

    `batch_size` is the batch of one process; the processes' slices together are the global batch, in order, so the
    stream is the same for any number of processes at equal global batch.
    """
    start = (step * num_processes + process_index) * batch_size
    return range(start, start + batch_size)


@lru_cache(maxsize=4)
def _epoch_order(length: int, seed: int, epoch: int) -> torch.Tensor:
    return rng.permutation(length, seed, "data order", epoch)


def samples_at(positions: range, length: int, seed: int) -> list[int]:
    """Dataset indices at `positions` of the stream: each epoch visits all `length` samples once in its own order."""
    return [int(_epoch_order(length, seed, p // length)[p % length]) for p in positions]
