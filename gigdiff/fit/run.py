"""A run's surroundings: prefetching, the JSONL log, and stopping politely."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from gigdiff.errors import NumericalError

__all__ = ["JsonLines", "StopSignal", "check_finite", "prefetched"]

Item = TypeVar("Item")


def prefetched(steps: range, load: Callable[[int], Item], ahead: int = 2) -> Iterator[tuple[int, Item]]:
    """(step, load(step)) in order, with `ahead` of them being loaded in a thread while the model works."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [(step, pool.submit(load, step)) for step in steps[:ahead]]
        for following in [*steps[ahead:], *[None] * ahead]:
            if not waiting:
                return
            step, future = waiting.pop(0)
            if following is not None:
                waiting.append((following, pool.submit(load, following)))
            yield step, future.result()


class JsonLines:
    """A log of one JSON object a line, each with its `step`; lines past the step a run resumes from are dropped."""

    def __init__(self, path: str | Path, resume_step: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if self.path.exists() and resume_step > 0:
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= resume_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError):  # a line cut short by a kill
                    continue
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self.path)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append {"step": step, **values}, flushed at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


class StopSignal:
    """After `install`, SIGTERM and the first Ctrl-C only set `requested`: the loop saves a checkpoint and ends."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handle)
            signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:  # a second Ctrl-C means now
            raise KeyboardInterrupt
        self.requested = True


def check_finite(loss: float, step: int, learning_rate: float) -> None:
    """Stop before a NaN reaches the weights.

    Raises:
        NumericalError: naming step and learning rate.
    """
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise NumericalError(
            f"the loss is {loss} at step {step} (learning rate {learning_rate:g}). The last checkpoint is untouched: "
            "continue from it with --resume_from_checkpoint latest and a lower --learning_rate."
        )
