"""`preset="best" | "balanced" | "fast"`: an embedded model and its steps, see docs/performance.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gigdiff.errors import InputError, nearest

__all__ = ["PRESETS", "Preset", "chosen_by"]


@dataclass(frozen=True)
class Preset:
    """An embedded model's name and its num_inference_steps."""

    model: str
    num_inference_steps: int


PRESETS = {
    "best": Preset("mini", 15),
    "balanced": Preset("mini", 8),
    "fast": Preset("mini-turbo", 4),
}


def chosen_by(preset: str | None, model: Any, num_inference_steps: int | None) -> tuple[Any, int | None]:
    """(model, num_inference_steps) that `preset` stands for; None leaves both. Steps given by hand win.

    Raises:
        InputError: no preset of that name, or a model was chosen as well ("mini", the default, counts as none).
    """
    if preset is None:
        return model, num_inference_steps
    if preset not in PRESETS:
        raise InputError(f"preset={preset!r} is unknown; {nearest(str(preset), PRESETS)}.")
    if model != "mini":
        raise InputError(
            f'preset="{preset}" chooses the model, and model={str(model)!r} was given too; leave one of them out. For '
            "another model choose its steps with num_inference_steps."
        )
    chosen = PRESETS[preset]
    return chosen.model, chosen.num_inference_steps if num_inference_steps is None else num_inference_steps
