"""Two benchmark reports side by side: what moved beyond noise, and what became worse by more than is allowed.

A difference is beyond noise when it exceeds both intervals' half-widths together, sqrt(a^2 + b^2). Where a score has no
interval (one seed, no bootstrap) its noise is not known, and it is only held against the limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigdiff.errors import InputError
from gigdiff.report import METRICS, read_result

__all__ = ["Change", "compare", "regressions", "to_text"]

# Name in a row's speed -> larger or smaller is better.
SPEED = {"images/s": 1, "latency p50": -1, "first image": -1, "host memory": -1}
LIMIT = 0.05


@dataclass(frozen=True)
class Change:
    """One score in both reports. `noise` is None where it is not known; `worse`: relative worsening, below 0 =
    better."""

    row: str
    score: str
    before: float
    after: float
    noise: float | None
    worse: float

    @property
    def moved(self) -> bool:
        """Beyond noise; with unknown noise: at all."""
        return abs(self.after - self.before) > (self.noise or 0.0)


def compare(before: str | Path, after: str | Path) -> tuple[list[Change], list[str]]:
    """Changes of all scores that both reports have, and what only one of them has, in words.

    Raises:
        InputError: a file that is no benchmark.json of this version, or two that can't be compared: other extractor,
            other count, other photos.
    """
    a, b = read_result(before), read_result(after)
    for key in ("extractor", "data"):
        if a[key] != b[key]:
            raise InputError(f"{before} and {after} have another {key} ({a[key]} and {b[key]}); they can't be compared")
    if a["config"]["count"] != b["config"]["count"]:
        counts = f"{a['config']['count']} and {b['config']['count']}"
        raise InputError(f"{before} and {after} are over {counts} products; distances depend on it: take one count")
    changes, missing = [], []
    rows_a, rows_b = ({row["name"]: row for row in result["rows"]} for result in (a, b))
    for name in dict.fromkeys([*rows_a, *rows_b]):
        if name not in rows_a or name not in rows_b:
            missing.append(f"{name}: only in {before if name in rows_a else after}")
            continue
        if rows_a[name]["status"] != rows_b[name]["status"]:
            missing.append(
                f"{name}: was {rows_a[name]['status']}, is {rows_b[name]['status']}: {rows_b[name]['reason']}"
            )
        scores_a, scores_b = _scores(rows_a[name]), _scores(rows_b[name])
        for score, (better, one) in scores_a.items():
            if score not in scores_b:
                missing.append(f"{name}: {score} only in {before}")
                continue
            changes.append(_change(name, score, better, one, scores_b[score][1]))
    return changes, missing


def regressions(changes: list[Change], missing: list[str], limit: float = LIMIT) -> list[str]:
    """In words: what became worse beyond noise and by more than `limit`, relative; and rows that were lost."""
    worse = [
        f"{change.row}: {change.score} {change.before:.4g} -> {change.after:.4g}, {change.worse:.1%} worse"
        for change in changes
        if change.moved and change.worse > limit
    ]
    return worse + [line for line in missing if "was ok, is" in line]


def to_text(changes: list[Change], missing: list[str]) -> str:
    """What moved, the greatest first; then what is in one report only; then how much stayed."""
    moved = sorted((change for change in changes if change.moved), key=lambda change: -abs(change.worse))
    lines = []
    for change in moved:
        verdict = "worse" if change.worse > 0 else "better" if change.worse < 0 else "other"
        noise = "noise unknown" if change.noise is None else f"noise {change.noise:.3g}"
        lines.append(
            f"{change.row}: {change.score}  {change.before:.4g} -> {change.after:.4g}  "
            f"({abs(change.worse):.1%} {verdict}, {noise})"
        )
    lines += missing
    lines.append(f"{len(moved)} of {len(changes)} scores moved beyond noise")
    return "\n".join(lines)


def _scores(row: Mapping[str, Any]) -> dict[str, tuple[int, Mapping[str, Any]]]:
    """Score -> (direction, {value, low, high}) of a row: quality of each set of prompts, and speed."""
    found: dict[str, tuple[int, Mapping[str, Any]]] = {}
    for prompts, quality in row["quality"].items():
        for name, score in quality["scores"].items():
            if name in METRICS and score["value"] is not None:
                found[f"{METRICS[name].label} ({prompts})"] = (METRICS[name].better, score)
    speed = row["speed"]
    if speed and "best" in speed:
        unknown = {"low": None, "high": None}
        found["images/s"] = (SPEED["images/s"], speed["best"])
        found["latency p50"] = (SPEED["latency p50"], {"value": speed["latency"]["p50"], **unknown})
        found["first image"] = (SPEED["first image"], speed["first_image"])
        if speed["host_bytes"]:
            found["host memory"] = (SPEED["host memory"], {"value": speed["host_bytes"], **unknown})
    return found


def _change(row: str, name: str, better: int, a: Mapping[str, Any], b: Mapping[str, Any]) -> Change:
    noise = None
    if a["low"] is not None and b["low"] is not None:
        noise = (((a["high"] - a["low"]) / 2) ** 2 + ((b["high"] - b["low"]) / 2) ** 2) ** 0.5
    scale = max(abs(a["value"]), 1e-12)
    return Change(row, name, a["value"], b["value"], noise, -better * (b["value"] - a["value"]) / scale)
