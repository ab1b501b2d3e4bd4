"""PNG, JPEG and WebP: the same fields in all, read back by us and by an independent reader."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gigdiff import xmp
from gigdiff.errors import DataError, InputError
from gigdiff.generators.request import GenerationRequest, GenerationResult
from gigdiff.images import FORMATS, check_writable, save_image
from gigdiff.provenance import XMP_KEYWORD, complete, metadata, read, save

SUFFIXES = sorted(FORMATS)
EXIFTOOL = shutil.which("exiftool")


def photo(seed: int = 0, height: int = 80, width: int = 64) -> np.ndarray:
    """A textured product on pure white."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 255, np.uint8)
    inside = (slice(height // 8, -height // 8), slice(width // 6, -width // 6))
    colour = rng.integers(30, 200, 3)
    pixels[inside] = np.clip(colour + rng.normal(0, 8, pixels[inside].shape), 0, 240)
    return pixels


def result(prompt: str = "red <wool> coat & 毛呢", seed: int = 7, **extra: str) -> GenerationResult:
    request = GenerationRequest(
        (prompt,), (seed,), ("blurry",), height=80, width=64, num_inference_steps=20, guidance_scale=2.5
    )
    return GenerationResult(photo(seed)[None], request, "mini", 1.0, (), "0123456789abcdef", extra)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_carries_every_field(suffix: str, tmp_path: Path):
    made = result("red <wool>\r\ncoat & 毛呢 🧥", lora_weights="abcd")
    path = save(tmp_path / f"a{suffix}", made.images[0], metadata(made, 0))
    expected, found = metadata(made, 0), read(path)
    assert found == expected and found["lora_weights"] == "abcd" and found["seed"] == "7"
    assert xmp.source_type(found[XMP_KEYWORD]) == xmp.GENERATED
    assert [p.name for p in tmp_path.iterdir()] == [f"a{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_edit_says_composite(suffix: str, tmp_path: Path):
    made = result(edit="inpaint", source_image="0011")
    found = read(save(tmp_path / f"a{suffix}", made.images[0], metadata(made, 0)))
    assert xmp.source_type(found[XMP_KEYWORD]) == xmp.COMPOSITE and found["edit"] == "inpaint"


def test_png_and_pixels_are_exact_and_jpeg_is_near(tmp_path: Path):
    pixels = photo()
    for suffix in SUFFIXES:
        with Image.open(save_image(tmp_path / f"b{suffix}", pixels, {"prompt": "x"})) as image:
            back = np.asarray(image.convert("RGB")).astype(int)
        assert np.abs(back - pixels).mean() < (0.1 if suffix == ".png" else 4)
        assert (back == pixels).all() == (suffix == ".png")


def test_a_prompt_larger_than_a_jpeg_segment_is_cut_and_says_so(tmp_path: Path):
    made = result("🧥" * 20_000)
    whole = read(save(tmp_path / "a.webp", made.images[0], metadata(made, 0)))
    assert whole["prompt"] == "🧥" * 20_000 and "cut" not in whole
    part = read(save(tmp_path / "a.jpg", made.images[0], metadata(made, 0)))
    assert part["cut"] == "prompt" and part["prompt"] and whole["prompt"].startswith(part["prompt"])
    assert len(part["prompt"]) > 14_000, "no more is cut than needed, about"


def test_characters_that_xml_cannot_hold(tmp_path: Path):
    fields = complete({"prompt": "a\x00b\x1b]c\ud800d", "seed": "1"})
    assert xmp.parse(fields[XMP_KEYWORD])["prompt"] == "a\ufffdb\ufffd]c\ufffdd"
    save_image(tmp_path / "a.webp", photo(), complete({"prompt": "a\x00b", "seed": "1"}))


@pytest.mark.parametrize("packet", ["", "no xml", "<x:xmpmeta><a></x:xmpmeta>", "<x:xmpmeta xmlns:x='a'/>"])
def test_a_broken_packet_says_nothing(packet: str):
    assert xmp.parse(packet) == {} and xmp.source_type(packet) == ""


def test_entities_are_not_expanded():
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa">]><x:xmpmeta xmlns:x="adobe:ns:meta/"><!ENTITY b "&a;"></x:xmpmeta>'
    assert xmp.parse(bomb) == {}


def test_the_source_type_of_other_tools_is_read_as_an_attribute_too():
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:i="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" i:DigitalSourceType="cam"/>'
        "</rdf:RDF></x:xmpmeta>"
    )
    assert xmp.source_type(packet) == "cam"


def test_bad_arguments(tmp_path: Path):
    with pytest.raises(InputError, match=r"\.png, \.jpg"):
        check_writable(tmp_path / "a.gif")
    with pytest.raises(InputError, match="quality=0"):
        save_image(tmp_path / "a.jpg", photo(), quality=0)
    (tmp_path / "torn.png").write_bytes(save_image(tmp_path / "a.png", photo()).read_bytes()[:200])
    for name in ("torn.png", "nowhere.png"):
        with pytest.raises(DataError, match="can't be read"):
            read(tmp_path / name)


def check_with_exiftool(folder: Path, expected: dict[str, dict[str, str]]) -> None:
    """Every file of the folder, read by exiftool, says what it should."""
    done = subprocess.run(
        [str(EXIFTOOL), "-json", "-XMP:all", "-EXIF:all", "-r", str(folder)],
        capture_output=True, text=True, check=True, encoding="utf-8",
    )  # fmt: skip
    found = {Path(one["SourceFile"]).name: one for one in json.loads(done.stdout)}
    assert set(found) == set(expected)
    for name, fields in expected.items():
        told = found[name]
        assert told["DigitalSourceType"].replace(" ", "").lower().endswith(fields["type"].lower()), told
        for key in ("prompt", "negative_prompt", "seed", "model", "weights", "lora_weights"):
            tag = next(t for t in told if t.lower() == key)
            assert str(told[tag]).split() == fields[key].split(), (name, key)
        assert told["CreatorTool"].startswith("gigdiff ")
        if not name.endswith(".png"):
            assert fields["prompt"].split()[0] in str(told["UserComment"]) and told["Software"].startswith("gigdiff")


def write_many(folder: Path, suffix: str, count: int) -> dict[str, dict[str, str]]:
    expected = {}
    for i in range(count):
        made = result(f"prompt-{i} <&> 毛呢 'coat'", seed=i, lora_weights=f"{i:016x}"[::-1] + "f")
        if i % 3 == 0:
            made = result(f'prompt-{i} "red" é', seed=i, lora_weights=f"f{i:015x}", edit="recolour")
        fields = metadata(made, 0)
        save(folder / f"{i}{suffix}", made.images[0], fields)
        kind = "compositeWithTrainedAlgorithmicMedia" if i % 3 == 0 else "trainedAlgorithmicMedia"
        expected[f"{i}{suffix}"] = fields | {"type": kind}
    return expected


@pytest.mark.skipif(EXIFTOOL is None, reason="exiftool is not installed: apt-get install libimage-exiftool-perl")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_exiftool_reads_it_back(suffix: str, tmp_path: Path):
    check_with_exiftool(tmp_path, write_many(tmp_path, suffix, 4))


@pytest.mark.slow
@pytest.mark.skipif(EXIFTOOL is None, reason="exiftool is not installed: apt-get install libimage-exiftool-perl")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_exiftool_reads_back_a_thousand_of_each(suffix: str, tmp_path: Path):
    check_with_exiftool(tmp_path, write_many(tmp_path, suffix, 1000))
