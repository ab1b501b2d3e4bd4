"""`gigdiff edit`, `upscale`, `inspect` on files; edits that need no model, so that this is quick."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gigdiff.cli import main
from gigdiff.provenance import read


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.full((120, 90, 3), 255, np.uint8)
    pixels[30:90, 20:70] = (180, 40, 45)
    pixels[30:90:2, 20:70] -= 12
    Image.fromarray(pixels).save(tmp_path / "coat.jpg", quality=95)
    return tmp_path / "coat.jpg"


def test_edit_writes_beside_the_picture_and_says_what_it_did(photo: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["edit", str(photo), "the same coat in navy"]) == 0
    out = photo.with_name("coat-edited.png")
    assert capsys.readouterr().out.strip() == f"{out}  120 x 90 px, recolour to navy"
    fields = read(out)
    assert fields["edit"] == "recolour to navy" and len(fields["source_image"]) == 16
    assert main(["edit", str(photo), "the same coat in navy"]) == 1, "never replaces a file"
    assert "--overwrite" in capsys.readouterr().err


def test_post_processing_watermark_and_formats(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "new" / "a.webp"
    steps = ["--post", "crop_to_product:margin=0.1", "--post", "pad:ratio=square"]
    assert main(["edit", str(photo), "--background", "white", *steps, "--watermark", "-o", str(target)]) == 0
    with Image.open(target) as image:
        assert image.format == "WEBP" and image.width == image.height
    assert read(target)["postprocess"] == "crop_to_product:margin=0.1; pad:ratio=square"
    capsys.readouterr()
    assert main(["inspect", str(target)]) == 0
    shown = capsys.readouterr().out
    for part in ("compositeWithTrainedAlgorithmicMedia", "background white", "gigdiff-spread-spectrum-1", "WEBP"):
        assert part in shown
    assert main(["inspect", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["made with"]["edit"] == "background white"
    assert main(["inspect", str(target), "--regenerate", str(tmp_path / "b.webp")]) == 1
    assert "has no prompt" in capsys.readouterr().err


def test_a_picture_from_elsewhere_says_nothing(photo: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(photo)]) == 0
    assert "marking\n  nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["edit", "nowhere.jpg", "--background", "white"], "there is no file"),
        (["edit", "PHOTO", "--colour", "red", "--background", "white"], "one edit at a time"),
        (["edit", "PHOTO", "--colour", "red", "--post", "denoize"], 'did you mean "denoise"'),
        (["edit", "PHOTO", "--colour", "red", "-n", "2"], "all are alike"),
        (["edit", "PHOTO", "--colour", "red", "--sign-cert", "a.pem"], "both --sign-cert and --sign-key"),
        (["edit", "PHOTO", "--colour", "red", "-o", "OUT/a.gif"], "must end in one of"),
        (["inspect", "nowhere.png"], "can't be read"),
        (["generate", "coat", "--post", "pad:ratio=wide", "--sign-key", "k"], "both --sign-cert"),
    ],
)
def test_mistakes(photo: Path, tmp_path: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    words = [word.replace("PHOTO", str(photo)).replace("OUT", str(tmp_path / "out")) for word in words]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error


def test_upscale_without_the_embedded_upscaler(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["upscale", str(photo), "--model", "mini-upscalr", "-o", str(tmp_path / "large")]) == 1
    assert 'did you mean "mini-upscaler"' in capsys.readouterr().err
    assert main(["upscale", str(photo), str(photo), "-o", str(tmp_path / "a.png")]) == 1
    assert "is one file for 2 pictures" in capsys.readouterr().err
