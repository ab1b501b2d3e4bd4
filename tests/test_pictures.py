"""Pictures and masks that users give: what is converted, and what is refused with which words."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gigdiff.errors import DataError, GigdiffError, InputError
from gigdiff.pictures import describe_changes, open_mask, open_picture


def noise(height: int = 20, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_a_path_an_image_and_an_array_are_the_same(tmp_path: Path):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(noise()), noise()):
        assert (np.asarray(open_picture(source)) == noise()).all() and describe_changes(source) == ()


@pytest.mark.parametrize(
    ("mode", "note"),
    [("RGBA", "transparent"), ("CMYK", "CMYK"), ("I;16", "8 bits"), ("L", ""), ("P", ""), ("LA", "transparent")],
)
def test_other_modes_are_converted_and_told(mode: str, note: str, tmp_path: Path):
    if mode == "I;16":
        image = Image.fromarray((noise()[..., 0].astype(np.uint16)) * 257)
    else:
        image = Image.fromarray(noise()).convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray(noise()[..., 0]))
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "I;16") else "a.png")
    image.save(path)
    out = open_picture(path)
    assert out.mode == "RGB" and out.size == (16, 20)
    assert any(note in text for text in describe_changes(path)) if note else describe_changes(path) == ()
    if mode == "I;16":
        assert (np.asarray(out)[..., 0] == noise()[..., 0]).all(), "scaled, not clipped"


def bomb(path: Path) -> Path:
    """A PNG of a few bytes that says it has 40,000 x 40,000 pixels."""
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_bad_pictures_are_refused(tmp_path: Path):
    frames = [Image.fromarray(noise()), Image.fromarray(255 - noise())]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(noise(200, 200)).save(tmp_path / "whole.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:3000])
    (tmp_path / "text.png").write_text("not a picture")
    cases: list[tuple[object, type[GigdiffError], str]] = [
        (tmp_path / "moving.gif", InputError, r"animated \(2 frames\)"),
        (tmp_path / "torn.jpg", DataError, "truncated"),
        (Image.open(tmp_path / "torn.jpg"), DataError, "truncated"),
        (tmp_path / "text.png", DataError, "allowed are .png, .jpg"),
        (tmp_path / "nowhere.png", DataError, "there is no file"),
        (bomb(tmp_path / "bomb.png"), DataError, "pixels"),
        (7, InputError, "is a int"),
        (noise()[..., 0], InputError, "uint8"),
        (noise().astype(float), InputError, "uint8"),
    ]
    for source, kind, words in cases:
        with pytest.raises(kind, match=words):
            open_picture(source)  # type: ignore[arg-type]


def test_masks(tmp_path: Path):
    square = np.zeros((20, 16), bool)
    square[5:10, 4:9] = True
    layer = np.dstack([np.zeros((20, 16, 3), np.uint8), square.astype(np.uint8) * 255])
    forms = [
        square,
        square.astype(np.uint8) * 255,
        square.astype(np.float32),
        Image.fromarray(square.astype(np.uint8) * 255),
    ]
    for mask in [*forms, Image.fromarray(np.repeat(square[..., None] * np.uint8(255), 3, 2)), Image.fromarray(layer)]:
        assert (open_mask(mask, (16, 20)) == square).all()
    with pytest.raises(InputError, match=r"20 x 16 and the picture 16 x 20"):
        open_mask(square, (20, 16))
    with pytest.raises(InputError, match="all black"):
        open_mask(square & False, (16, 20))
    with pytest.raises(InputError, match="all white"):
        open_mask(square | True, (16, 20))
    with pytest.raises(InputError, match="int64"):
        open_mask(square.astype(int), (16, 20))
