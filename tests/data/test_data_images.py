"""decode_image: every kind of file comes out as upright 8-bit RGB; what can't be shown is an error."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms

from gigdiff.data.decoding import decode_image
from gigdiff.errors import DataError

Encode = Callable[..., bytes]


def centre(image: Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel((image.width // 2, image.height // 2))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_rgb_files(encode: Encode, format: str) -> None:
    out = decode_image(encode(Image.new("RGB", (16, 16), (200, 40, 60)), format))
    assert out.size == (16, 16)
    assert np.abs(np.array(centre(out)) - (200, 40, 60)).max() <= 4


def test_greyscale_jpeg(encode: Encode) -> None:
    assert centre(decode_image(encode(Image.new("L", (16, 16), 120), "JPEG"))) == (120, 120, 120)


def test_one_bit(encode: Encode) -> None:
    assert centre(decode_image(encode(Image.new("1", (8, 8), 1)))) == (255, 255, 255)


def test_cmyk_jpeg_is_not_inverted(encode: Encode) -> None:
    red = decode_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    r, g, b = centre(red)
    assert r > 200 and g < 60 and b < 60


def test_palette(encode: Encode) -> None:
    image = Image.new("RGB", (8, 8), (0, 128, 255)).quantize(4)
    assert image.mode == "P"
    assert centre(decode_image(encode(image))) == (0, 128, 255)


def test_palette_with_transparency_becomes_white(encode: Encode) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert centre(decode_image(encode(image, transparency=0))) == (255, 255, 255)


def test_rgb_with_a_transparent_colour_becomes_white(encode: Encode) -> None:
    data = encode(Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3))
    assert centre(decode_image(data)) == (255, 255, 255)


@pytest.mark.parametrize(("alpha", "expected"), [(0, 255), (255, 0), (128, 127)])
def test_alpha_lies_on_white(encode: Encode, alpha: int, expected: int) -> None:
    assert centre(decode_image(encode(Image.new("RGBA", (8, 8), (0, 0, 0, alpha))))) == (expected,) * 3


def test_grey_with_alpha(encode: Encode) -> None:
    assert centre(decode_image(encode(Image.new("LA", (8, 8), (0, 0))))) == (255, 255, 255)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(encode: Encode, format: str) -> None:
    image = Image.fromarray(np.full((8, 8), 0x8080, dtype=np.uint16))
    assert centre(decode_image(encode(image, format))) == (128, 128, 128)


def test_sixteen_bit_rgb_png() -> None:
    """Pillow can't write one, so the file is put together here."""
    width = height = 4
    row = b"\0" + struct.pack(">HHH", 0xFFFF, 0x8080, 0) * width

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * height)) + chunk(b"IEND", b"")
    assert centre(decode_image(b"\x89PNG\r\n\x1a\n" + body)) == (255, 128, 0)


def test_float_tiff(encode: Encode) -> None:
    image = Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32))
    assert centre(decode_image(encode(image, "TIFF"))) == (128, 128, 128)


@pytest.mark.parametrize(("orientation", "red_at"), [(1, (0, 0)), (3, (19, 9)), (6, (9, 0)), (8, (0, 19))])
def test_exif_orientation(encode: Encode, orientation: int, red_at: tuple[int, int]) -> None:
    image = Image.new("RGB", (20, 10), "white")
    image.paste((255, 0, 0), (0, 0, 5, 5))
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = decode_image(encode(image, "JPEG", exif=exif, quality=95, subsampling=0))
    assert out.size == ((20, 10) if orientation in (1, 3) else (10, 20))
    r, g, _ = out.getpixel(red_at)
    assert r > 200 and g < 80
    assert out.getexif().get(0x0112, 1) == 1  # nothing is left to be applied twice


def test_broken_exif_is_ignored(encode: Encode) -> None:
    data = encode(Image.new("RGB", (8, 8), (9, 9, 9)), "JPEG", exif=b"Exif\0\0garbage")
    assert decode_image(data).size == (8, 8)


def test_colour_profile_is_converted(encode: Encode) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = Image.new("RGB", (8, 8), (90, 120, 200))
    assert centre(decode_image(encode(plain, icc_profile=lab))) == (90, 120, 200)
    assert centre(decode_image(encode(plain, icc_profile=b"not a profile"))) == (90, 120, 200)


def test_first_frame_of_an_animation(encode: Encode) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    assert centre(decode_image(encode(first, "GIF", save_all=True, append_images=[second]))) == (255, 0, 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_truncated_files(encode: Encode, format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="corrupt or truncated"):
        decode_image(encode(noise, format)[:-2000])


@pytest.mark.parametrize("data", [b"not an image at all", b"\x89PNG\r\n\x1a\n", b"<html></html>"])
def test_no_image(data: bytes) -> None:
    with pytest.raises(DataError, match="can't be decoded"):
        decode_image(data)


def test_empty() -> None:
    with pytest.raises(DataError, match="0 bytes"):
        decode_image(b"")


def test_bomb_is_refused_before_it_is_decoded(encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.new("1", (4000, 3000)))
    assert len(data) < 10_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("the bomb was decoded"))
    with pytest.raises(DataError, match=r"4000 x 3000 = 12,000,000 pixels, at most 1,000,000.*max_image_pixels"):
        decode_image(data, max_pixels=1_000_000)


def test_pillows_own_bomb_error_is_ours() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    with pytest.raises(DataError, match="too large"):
        decode_image(data)
