"""Randomness depends on what it is for, and on nothing else."""

from __future__ import annotations

import torch

from gigdiff import rng


def test_a_row_depends_on_its_own_index_alone() -> None:
    together = rng.normal((3, 4), 7, "noise", range(10))
    alone = rng.normal((3, 4), 7, "noise", [6])
    assert torch.equal(together[6], alone[0])


def test_seed_purpose_and_index_each_matter() -> None:
    seeds = {rng.derive_seed(s, p, i) for s in range(5) for p in ("a", "b", "1") for i in range(50)}
    assert len(seeds) == 5 * 3 * 50
    # the parts are kept apart: (1, "12") is not (11, "2")
    assert rng.derive_seed(1, "12", 3) != rng.derive_seed(11, "2", 3)


def test_normal_is_standard_normal_and_uniform_is_uniform() -> None:
    n = rng.normal((100,), 0, "x", range(200))
    assert abs(n.mean().item()) < 0.03 and abs(n.std().item() - 1) < 0.03
    u = rng.uniform(100, 0, "x", range(200))
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean().item() - 0.5) < 0.02


def test_permutation_is_one_and_changes_with_the_epoch() -> None:
    first, second = (rng.permutation(100, 0, "order", epoch) for epoch in (0, 1))
    assert sorted(first.tolist()) == list(range(100)) == sorted(second.tolist())
    assert not torch.equal(first, second)
