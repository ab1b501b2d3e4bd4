"""Presets: a word in place of a model and its steps."""

from __future__ import annotations

import pytest

import gigdiff
from gigdiff import api
from gigdiff.errors import InputError
from gigdiff.presets import PRESETS, chosen_by
from gigdiff.pretrained import EMBEDDED


def test_presets_are_embedded_models_from_slow_to_fast() -> None:
    assert list(PRESETS) == ["best", "balanced", "fast"]
    assert {preset.model for preset in PRESETS.values()} <= set(EMBEDDED)
    # A guided step of mini is two passes of the UNet, a step of its student one.
    passes = [p.num_inference_steps * (2 if p.model == "mini" else 1) for p in PRESETS.values()]
    assert passes == sorted(passes, reverse=True) and len(set(passes)) == 3


def test_no_preset_changes_nothing_and_steps_by_hand_win() -> None:
    assert chosen_by(None, "anything", None) == ("anything", None)
    assert chosen_by("fast", "mini", None) == (PRESETS["fast"].model, PRESETS["fast"].num_inference_steps)
    assert chosen_by("best", "mini", 7) == (PRESETS["best"].model, 7)


def test_generate_draws_with_what_the_preset_names(painter, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(api, "find_generator", lambda model, device: asked.append(model) or painter)
    gigdiff.generate("red bag", preset="balanced", upscale=False)
    assert asked == [PRESETS["balanced"].model]
    assert painter.batches[0].num_inference_steps == PRESETS["balanced"].num_inference_steps


def test_bad_presets() -> None:
    with pytest.raises(InputError, match=r"'quick' is unknown.*best, balanced, fast|'quick' is unknown"):
        gigdiff.generate("red bag", preset="quick")
    with pytest.raises(InputError, match="chooses the model"):
        gigdiff.generate("red bag", preset="fast", model="stabilityai/sdxl-turbo")
