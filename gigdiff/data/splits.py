"""Splits that never part photos of one product, and a report of what two splits share."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from gigdiff.data.loading import ProductDataset
from gigdiff.data.records import ProductRecord, group_key
from gigdiff.data.vocabulary import BASE_COLOURS
from gigdiff.errors import DataError, InputError

__all__ = ["LeakageReport", "hold_out", "leakage_report", "split_by_group"]

_COLOUR_WORDS = frozenset(word for colour in BASE_COLOURS for word in colour.lower().split()) | {
    "coloured",
    "light",
    "dark",
}

DEFAULT_FRACTIONS: Mapping[str, float] = {"train": 0.95, "validation": 0.05}


def split_by_group(
    ds: ProductDataset, fractions: Mapping[str, float] = DEFAULT_FRACTIONS, seed: int = 0
) -> dict[str, ProductDataset]:
    """Split `ds` so that all photos of a group (by default: of a product name) fall on one side.

    A group's side depends on (seed, group) alone, by hash: adding or removing products moves no others. The fractions
    are therefore met on average, not exactly; a part that comes out empty raises DataError. Fractions are positive
    and add up to 1, else InputError.
    """
    if not fractions or any(not isinstance(f, (int, float)) or not 0 < f <= 1 for f in fractions.values()):
        raise InputError(f"fractions={dict(fractions)!r}; each must lie above 0 and at most at 1")
    if not math.isclose(sum(fractions.values()), 1.0, abs_tol=1e-6):
        raise InputError(f"fractions={dict(fractions)!r} add up to {sum(fractions.values()):g}; they must add up to 1")
    rows: dict[str, list[int]] = {name: [] for name in fractions}
    for i in range(len(ds)):
        rows[_side(ds.record(i).group, fractions, seed)].append(i)
    for name, chosen in rows.items():
        if not chosen:
            raise DataError(
                f'split "{name}" ({fractions[name]:.1%} of {len(ds):,} products of {ds.source}) came out empty; '
                "raise its "
                "fraction or choose another seed"
            )
    return {name: ds.select(chosen) for name, chosen in rows.items()}


def hold_out(
    ds: ProductDataset, fraction: float, limit: int, seed: int = 0
) -> tuple[ProductDataset, ProductDataset | None]:
    """(the rest, about `fraction` of the products but at least one and at most `limit` photos), never parting a group.

    Unlike `split_by_group` it also serves a dozen photos: groups go out in the order of their hash until there are
    enough. (ds, None) where all photos are of one group, or `fraction` is 0.
    """
    groups: dict[str, list[int]] = {}
    for i in range(len(ds)):
        groups.setdefault(ds.record(i).group, []).append(i)
    if len(groups) < 2 or fraction == 0:
        return ds, None
    wanted = min(limit, max(1, round(fraction * len(ds))))
    order = sorted(groups, key=lambda g: hashlib.blake2b(f"hold out\0{seed}\0{g}".encode(), digest_size=8).digest())
    out: list[int] = []
    for group in order[:-1]:  # at least one group stays
        if len(out) >= wanted:
            break
        out += groups[group]
    held = set(out)
    return ds.select(i for i in range(len(ds)) if i not in held), ds.select(sorted(held)[:limit])


def _side(group: str, fractions: Mapping[str, float], seed: int) -> str:
    digest = hashlib.blake2b(f"split\0{seed}\0{group}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    upper = 0.0
    for name, fraction in fractions.items():
        upper += fraction
        if place < upper:
            return name
    return name  # rounding: the fractions add up to a hair less than 1


@dataclass(frozen=True)
class LeakageReport:
    """What two splits share; each field maps what is shared to (ids in the first, ids in the second).

    `groups`, `ids` and `images` (identical bytes) are leaks. `names` are near-identical names (the same but for colour
    words, sizes, numbers and order) of different groups: mostly another colour of the same series.
    """

    sizes: tuple[int, int]
    groups: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    ids: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    images: dict[str, tuple[list[str], list[str]]] | None = None  # None: not compared
    names: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether no group, id or image is shared. Near-identical names don't count."""
        return not (self.groups or self.ids or self.images)

    def __str__(self) -> str:
        lines = [f"{self.sizes[0]:,} against {self.sizes[1]:,} products: {'no leak' if self.clean else 'LEAK'}"]
        for title, shared in (
            ("groups shared", self.groups),
            ("ids shared", self.ids),
            ("identical images", self.images),
            ("near-identical names", self.names),
        ):
            if shared is None:
                lines.append(f"  {title}: not compared")
                continue
            second = len({identity for _, ids in shared.values() for identity in ids})
            line = f"  {title}: {len(shared):,}"
            if shared:
                key, (left, right) = next(iter(shared.items()))
                example = f'"{key}"' if shared is not self.images else f"{key[:12]}"
                line += f" (touching {second:,} of the second; e.g. {example}: ids {left[0]} and {right[0]})"
            lines.append(line)
        return "\n".join(lines)


def leakage_report(a: ProductDataset, b: ProductDataset, *, images: bool = True) -> LeakageReport:
    """Compare two splits: shared groups, ids, identical image bytes and near-identical names.

    images=False leaves out the images, which have to be read (not decoded) one by one.
    """
    first, second = a.records(), b.records()
    groups = _shared([(r.group, r.id) for r in first], [(r.group, r.id) for r in second])
    names = _shared(_near_names(first), _near_names(second))
    return LeakageReport(
        sizes=(len(a), len(b)),
        groups=groups,
        ids=_shared([(r.id, r.id) for r in first], [(r.id, r.id) for r in second]),
        images=_shared(_hashes(a), _hashes(b)) if images else None,
        names=names,
    )


def _shared(first: list[tuple[str, str]], second: list[tuple[str, str]]) -> dict[str, tuple[list[str], list[str]]]:
    """Keys that occur in both lists of (key, id) -> the ids on each side."""
    left: dict[str, list[str]] = {}
    right: dict[str, list[str]] = {}
    for table, pairs in ((left, first), (right, second)):
        for key, identity in pairs:
            table.setdefault(key, []).append(identity)
    return {key: (ids, right[key]) for key, ids in left.items() if key in right}


def _near_names(records: list[ProductRecord]) -> list[tuple[str, str]]:
    pairs = [(_near(r.product.name or r.caption or ""), r.id) for r in records]
    return [(key, identity) for key, identity in pairs if key]


def _near(name: str) -> str:
    """A name without colour words, numbers and plurals, its words in alphabetical order."""
    words = {re.sub(r"s$", "", word) for word in group_key(name).split() if not any(c.isdigit() for c in word)}
    return " ".join(sorted(words - _COLOUR_WORDS))


def _hashes(ds: ProductDataset) -> list[tuple[str, str]]:
    return [(hashlib.blake2b(ds.image_bytes(i), digest_size=16).hexdigest(), ds.record(i).id) for i in range(len(ds))]
