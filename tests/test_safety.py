from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gigdiff
from gigdiff.cli import main
from gigdiff.errors import BlockedError, InputError, ModelNotFoundError
from gigdiff.safety import BRANDS, CELEBRITIES, Safety, Verdict, blocklist, diffusers_checker


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a NIKE shoe", "nike"),
        ("levi's jeans", "levi's"),
        ("dress by Hermes, red", "hermes"),
        ("dolce&gabbana belt", "dolce gabbana"),
        ("Dolce & Gabbana belt", "dolce gabbana"),
        ("dress like  Taylor-Swift's", "taylor swift"),
        ("the vanserai rug", None),
        ("running shoes", None),
        ("Beyonce look", "beyonce"),
        ("off white shirt", None),
    ],
)
def test_blocklist(prompt: str, found: str | None):
    verdict = blocklist([*BRANDS, *CELEBRITIES])(prompt)
    assert (verdict.action == "block") == (found is not None)
    if found:
        assert found in verdict.label and verdict.score == 1.0 and verdict.version == gigdiff.__version__


def test_a_blocked_prompt_draws_nothing(painter, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    safety = Safety((blocklist(BRANDS, "brand"),))
    with pytest.raises(BlockedError, match=r"blocked by blocklist .*brand \"nike\", score 1.00") as caught:
        gigdiff.generate(["red coat", "Nike shoe"], model=painter, safety=safety)
    assert isinstance(caught.value.verdict, Verdict) and not painter.batches
    assert main(["generate", "Nike shoe", "--block-names", "-o", str(tmp_path)]) == 1
    assert "blocked by blocklist" in capsys.readouterr().err
    gigdiff.generate("red coat", model=painter, safety=safety)


def test_a_flag_is_a_note(painter):
    safety = Safety((blocklist(["coat"], action="flag"),))
    assert "flagged by blocklist" in gigdiff.generate("red coat", model=painter, safety=safety).info["notes"]


def too_red(image: np.ndarray) -> Verdict:
    assert image.dtype == np.uint8 and image.shape == (80, 64, 3)
    return Verdict("block", "too red", 0.75, "too_red", "3")


def test_a_blocked_image_is_an_error_that_names_prompt_and_seed(painter):
    with pytest.raises(
        BlockedError, match=r"image 0 \('red coat', seed 7\) was blocked by too_red 3: too red, score 0.75"
    ):
        gigdiff.generate("red coat", model=painter, seed=7, safety=Safety(image_filters=(too_red,)))


def test_a_filter_that_breaks(painter):
    def broken(_: object) -> Verdict:
        raise RuntimeError("no network")

    open_, closed = (Safety((broken,), (broken,), fail_closed=value) for value in (False, True))
    notes = gigdiff.generate("red coat", model=painter, safety=open_).info["notes"]
    assert notes.count("unchecked") == 2 and "no network" in notes
    with pytest.raises(BlockedError, match="unchecked, the filter failed"):
        gigdiff.generate("red coat", model=painter, safety=closed)


def test_bad_arguments(tmp_path: Path):
    with pytest.raises(InputError, match="no names"):
        blocklist(["", "--"])
    with pytest.raises(InputError, match='"maybe"'):
        Verdict("maybe")  # type: ignore[arg-type]
    with pytest.raises(ModelNotFoundError, match="no safety checker in"):
        diffusers_checker(tmp_path)


def test_the_checker_of_diffusers_with_random_weights(tmp_path: Path):
    """The real classes at tiny size; concept thresholds decide what is blocked."""
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=tiny, vision_config=tiny | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    picture = np.random.default_rng(0).integers(0, 256, (80, 64, 3), np.uint8)
    for name, limit, action in (("strict", -2.0, "block"), ("lax", 2.0, "allow")):
        with torch.no_grad():
            checker.concept_embeds.copy_(torch.randn(checker.concept_embeds.shape))
            checker.concept_embeds_weights.fill_(limit)
        checker.save_pretrained(tmp_path / name / "safety_checker")
        size = {"height": 16, "width": 16}
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(
            tmp_path / name / "feature_extractor"
        )
        verdict = diffusers_checker(tmp_path / name)(picture)
        assert verdict.action == action and verdict.filter == "diffusers-safety-checker"
