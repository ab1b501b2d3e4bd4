"""What speed.py measures with: turns, ratios and their spread, likeness, processes, imports, tables, plots."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Way = Callable[[], Any]


class NotHere(Exception):
    """A way that this machine or this checkout does not have; the text says why and becomes the row's reason."""


def interleaved(ways: Mapping[str, Way], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, after a warm-up of each. Every round begins with another way."""
    names = list(ways)
    for name in names:
        ways[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            began = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(base: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times faster: the medians' ratio, and the least and greatest ratio of a round's own pair."""
    rounds = [b / o for b, o in zip(base, ours, strict=True)]
    return {"ratio": statistics.median(base) / statistics.median(ours), "low": min(rounds), "high": max(rounds)}


def psnr(images: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Peak signal-to-noise ratio of uint8 images (N, H, W, 3) in dB: over all pixels, and of the worst image."""
    errors = np.square(images.astype(np.float64) - reference.astype(np.float64)).mean(axis=(1, 2, 3))

    def decibels(error: float) -> float:
        return float("inf") if error == 0 else 10 * float(np.log10(255.0**2 / error))

    return {"all": decibels(float(errors.mean())), "worst": decibels(float(errors.max()))}


# A child's ru_maxrss begins at the memory of the process that forked it: a small one has to stand between.
LAUNCH = """
import json, os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print()
print(json.dumps([time.perf_counter() - began, usage.ru_maxrss, os.waitstatus_to_exitcode(status)]))
"""


def timed_process(words: Sequence[str], cwd: Path) -> tuple[float, float, str]:
    """(seconds, peak memory in MB, stdout) of a process, from its start to its end. Not on Windows."""
    line = [sys.executable, "-S", "-c", LAUNCH, *words]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True)
    output, _, last = done.stdout.rstrip().rpartition("\n")
    seconds, memory, status = json.loads(last or "[0, 0, 1]")
    if status:
        raise RuntimeError(f"{' '.join(words[:6])} failed:\n{done.stderr[-2000:]}")
    return seconds, memory / (1024**2 if sys.platform == "darwin" else 1024), output


def import_seconds(report: str) -> dict[str, float]:
    """Module -> its own seconds, from the stderr of `python -X importtime` (lines "import time: self | all | name")."""
    found: dict[str, float] = {}
    for line in report.splitlines():
        if match := re.match(r"import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)", line):
            found[match[2]] = found.get(match[2], 0.0) + int(match[1]) / 1e6
    return found


def extra_imports(
    ours: Mapping[str, float], base: Mapping[str, float], count: int = 10
) -> list[tuple[str, float, int]]:
    """(package, own seconds, modules) of what `ours` imports and `base` does not, the most expensive first.

    Modules are added up by the first two parts of their name: "diffusers.models.unets.unet_2d" is diffusers.models.
    """
    packages: dict[str, tuple[float, int]] = {}
    for name, seconds in ours.items():
        if name not in base:
            package = ".".join(name.split(".")[:2])
            total, modules = packages.get(package, (0.0, 0))
            packages[package] = (total + seconds, modules + 1)
    ranked = sorted(((name, *totals) for name, totals in packages.items()), key=lambda row: -row[1])
    return ranked[:count]


def shown(value: Any) -> str:
    """A number, or a {"median", "low", "high"} or {"ratio", ...} of numbers, for a table."""
    if isinstance(value, Mapping):
        middle = value.get("median", value.get("ratio"))
        return f"{middle:.3g} ({value['low']:.3g} to {value['high']:.3g})"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


COLUMNS = {
    "way": "way", "against": "against", "batch": "batch", "ratio": "times faster (rounds)", "goal": "goal",
    "seconds": "seconds", "base_seconds": "seconds of the other", "memory_mb": "peak MB",
    "base_memory_mb": "peak MB of the other", "images_per_second": "images/s", "psnr_db": "PSNR dB",
    "psnr_worst_db": "worst image's",
    "difference_seconds": "seconds more", "threads": "threads", "status": "status",
}  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown, with those columns that any of them has."""
    used = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = ["| " + " | ".join(COLUMNS[key] for key in used) + " |", "|" + " --- |" * len(used)]
    return "\n".join(lines + ["| " + " | ".join(shown(row.get(key)) for key in used) + " |" for row in rows])


def plot(rows: Iterable[Mapping[str, Any]], x: str, label: str, path: Path) -> str | None:
    """Images a second against row[x], one line a way, least to greatest as bars; the reason if it can't be drawn."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no plots: pip install 'gigdiff[eval]' brings matplotlib"
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(row["way"], []).append(row)
    for way, points in lines.items():
        speeds = [point["images_per_second"] for point in points]
        bars = [[s["median"] - s["low"] for s in speeds], [s["high"] - s["median"] for s in speeds]]
        axes.errorbar(
            [p[x] for p in points], [s["median"] for s in speeds], yerr=bars, marker="o", capsize=3, label=way
        )
    ticks = sorted({row[x] for points in lines.values() for row in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel=label, ylabel="images a second", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return None


def read(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
