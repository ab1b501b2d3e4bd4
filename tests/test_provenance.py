from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import gigdiff
from gigdiff.generators.request import GenerationRequest, GenerationResult
from gigdiff.images import save_image
from gigdiff.provenance import DIGITAL_SOURCE_TYPE, XMP_KEYWORD, metadata, read, sheet_metadata, weights_hash


@pytest.fixture
def result() -> GenerationResult:
    request = GenerationRequest(
        prompts=("red <wool> coat & 毛呢", "black bag"), seeds=(7, 8), negative_prompts=("blurry", ""),
        height=8, width=8, num_inference_steps=20, guidance_scale=2.5,
    )  # fmt: skip
    return GenerationResult(np.zeros((2, 8, 8, 3), np.uint8), request, "mini", 1.0, ("cut: ...",), "0123456789abcdef")


def test_a_saved_file_says_how_it_was_made(result: GenerationResult, tmp_path: Path):
    path = save_image(tmp_path / "a.png", result.images[0], metadata(result, 0))
    fields = read(path)
    assert fields | {XMP_KEYWORD: ""} == {
        "Software": f"gigdiff {gigdiff.__version__}",
        "prompt": "red <wool> coat & 毛呢",
        "negative_prompt": "blurry",
        "seed": "7",
        "model": "mini",
        "weights": "0123456789abcdef",
        "height": "8",
        "width": "8",
        "num_inference_steps": "20",
        "guidance_scale": "2.5",
        "notes": "cut: ...",
        XMP_KEYWORD: "",
    }
    assert "negative_prompt" not in metadata(result, 1), "empty fields are left out"


def test_xmp_is_well_formed_and_names_the_source_type(result: GenerationResult):
    packet = metadata(result, 0)[XMP_KEYWORD]
    root = ElementTree.fromstring(packet.split("?>", 1)[1].rsplit("<?", 1)[0])
    found = root.find(".//{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    assert found is not None and found.text == DIGITAL_SOURCE_TYPE
    assert DIGITAL_SOURCE_TYPE.endswith("/trainedAlgorithmicMedia")


def test_pillow_reads_the_xmp_of_a_saved_file(result: GenerationResult, tmp_path: Path):
    from PIL import Image

    path = save_image(tmp_path / "a.png", result.images[0], metadata(result, 0))
    with Image.open(path) as image:
        image.load()
        assert DIGITAL_SOURCE_TYPE in str(image.info["xmp"] if "xmp" in image.info else image.info[XMP_KEYWORD])


def test_pictures_carry_their_own_fields(result: GenerationResult):
    first, second = result.pictures()
    assert first.mode == "RGB" and first.size == (8, 8)
    assert (first.info["prompt"], first.info["seed"]) == (result.request.prompts[0], "7")
    assert (second.info["prompt"], second.info["seed"]) == ("black bag", "8")


def test_sheet_lists_all_prompts_and_seeds(result: GenerationResult):
    fields = sheet_metadata(result)
    assert fields["seed"] == "7\n8" and fields["prompt"].splitlines() == list(result.request.prompts)
    assert DIGITAL_SOURCE_TYPE in fields[XMP_KEYWORD]


def test_weights_hash_follows_names_and_content(tmp_path: Path):
    def write(folder: Path, value: float, name: str = "model") -> Path:
        (folder / "unet").mkdir(parents=True)
        save_file({"w": torch.full((4,), value)}, folder / "unet" / f"{name}.safetensors")
        return folder

    a, same = weights_hash(write(tmp_path / "a", 1.0)), weights_hash(write(tmp_path / "b", 1.0))
    other, renamed = weights_hash(write(tmp_path / "c", 2.0)), weights_hash(write(tmp_path / "d", 1.0, "net"))
    assert a == same and len(a) == 16 and len({a, other, renamed}) == 3
    assert weights_hash(None) == "" and weights_hash(tmp_path / "nowhere") == ""


def test_weights_hash_of_a_hub_snapshot_is_read_off_the_blob_names(tmp_path: Path):
    """The hub's cache keeps blobs/<sha256>; hashing gigabytes again would cost more than the picture."""
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"not what the name says")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    try:
        (snapshot / "model.safetensors").symlink_to(blob)
    except OSError:
        pytest.skip("no symbolic links here")
    before = weights_hash(snapshot)
    blob.write_bytes(b"changed")
    assert weights_hash(snapshot) == before != ""
