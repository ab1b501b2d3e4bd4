from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gigdiff.errors import InputError, NumericalError, OutputError
from gigdiff.images import contact_sheet, fit_image, save_image, to_model, to_pil, to_rgb, to_uint8


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


class TestFit:
    def test_a_photo_that_fits_keeps_its_pixels(self):
        photo = noise(80, 60)
        fitted = fit_image(Image.fromarray(photo), 80, 64)
        assert fitted.dtype == np.uint8 and fitted.shape == (80, 64, 3)
        np.testing.assert_array_equal(fitted[:, 2:62], photo)
        assert (fitted[:, :2] == 255).all() and (fitted[:, 62:] == 255).all()

    @pytest.mark.parametrize("size", [(600, 800), (30, 40), (1000, 10), (3, 3000), (64, 80), (1, 1)])
    def test_whole_picture_centred_on_white(self, size):
        dark = Image.new("RGB", size, (10, 20, 30))
        fitted = fit_image(dark, 80, 64)
        inked = (fitted < 128).all(axis=2)
        rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
        assert fitted.shape == (80, 64, 3)
        height, width = len(rows), len(columns)
        assert height == 80 or width == 64, "it touches the frame in one direction"
        assert abs(rows[0] - (80 - 1 - rows[-1])) <= 1 and abs(columns[0] - (64 - 1 - columns[-1])) <= 1, "centred"
        if min(size) > 30:
            assert height / width == pytest.approx(size[1] / size[0], rel=0.05), "not stretched"

    def test_downsizing_is_antialiased(self):
        stripes = np.zeros((800, 640, 3), np.uint8)
        stripes[:, ::2] = 255
        assert np.ptp(fit_image(Image.fromarray(stripes), 80, 64).astype(int)) < 30

    def test_to_rgb_of_every_mode(self):
        grey = Image.new("L", (4, 4), 100)
        assert to_rgb(grey).getpixel((0, 0)) == (100, 100, 100)
        assert to_rgb(Image.new("RGBA", (4, 4), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
        assert to_rgb(Image.new("LA", (4, 4), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
        assert to_rgb(Image.new("CMYK", (4, 4), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
        assert to_rgb(Image.new("1", (4, 4), 1)).getpixel((0, 0)) == (255, 255, 255)
        deep = Image.fromarray(np.full((4, 4), 32768, np.uint16))
        assert to_rgb(deep).getpixel((0, 0)) == (128, 128, 128)

    def test_exif_rotation_is_applied(self):
        image = Image.new("RGB", (40, 20), (0, 0, 0))
        image.getexif()[0x0112] = 6
        assert to_rgb(image).size == (20, 40)

    def test_bad_frame(self):
        with pytest.raises(InputError, match="at least 1"):
            fit_image(Image.new("RGB", (4, 4)), 0, 64)


class TestRanges:
    def test_round_trip_is_exact_for_every_value(self):
        images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
        model = to_model(images)
        assert model.dtype == torch.float32 and model.shape == (1, 3, 16, 16)
        assert model.min() == -1 and model.max() == 1
        np.testing.assert_array_equal(to_uint8(model), images)
        np.testing.assert_array_equal(to_uint8(to_model(torch.from_numpy(images))), images)

    def test_values_outside_are_clipped_not_wrapped(self):
        out = to_uint8(torch.tensor([-1.5, 1.5, 0.0]).view(1, 3, 1, 1))
        assert out.ravel().tolist() == [0, 255, 128]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_nan_is_an_error_never_a_black_image(self, bad, dtype):
        images = torch.zeros(3, 3, 8, 8, dtype=dtype)
        images[1, 0, 3, 3] = bad
        with pytest.raises(NumericalError, match=r"image 1 of 3.*float32"):
            to_uint8(images)

    def test_wrong_layouts_are_told(self):
        with pytest.raises(InputError, match="uint8"):
            to_model(np.zeros((1, 8, 8, 3), np.float32))
        with pytest.raises(InputError, match=r"float \(N, C, H, W\)"):
            to_uint8(torch.zeros(3, 8, 8))
        with pytest.raises(InputError, match="uint8"):
            to_pil(np.zeros((8, 8, 3), np.float32))


class TestContactSheet:
    def test_every_picture_is_on_it(self):
        pictures = [noise(80, 64, i) for i in range(5)]
        sheet = np.asarray(contact_sheet(pictures, columns=2, gap=4))
        assert sheet.shape == (4 + 3 * 84, 4 + 2 * 68, 3)
        for i, picture in enumerate(pictures):
            y, x = 4 + i // 2 * 84, 4 + i % 2 * 68
            np.testing.assert_array_equal(sheet[y : y + 80, x : x + 64], picture)

    def test_labels_in_any_script_and_length(self):
        pictures = [noise(80, 64)] * 3
        plain = contact_sheet(pictures, 3)
        labelled = contact_sheet(pictures, 3, ["a" * 500, "", "毛呢大衣 café 🧥"])
        assert labelled.height > plain.height and labelled.width == plain.width

    def test_scale_enlarges_without_smoothing(self):
        picture = noise(8, 8)
        sheet = np.asarray(contact_sheet([picture], 1, gap=0, scale=4))
        np.testing.assert_array_equal(sheet, picture.repeat(4, 0).repeat(4, 1))

    def test_bad_arguments(self):
        with pytest.raises(InputError, match="no images"):
            contact_sheet([], 2)
        with pytest.raises(InputError, match="columns=0"):
            contact_sheet([noise(8, 8)], 0)
        with pytest.raises(InputError, match="2 labels for 1"):
            contact_sheet([noise(8, 8)], 1, ["a", "b"])


class TestSave:
    def test_saves_pixels_and_text(self, tmp_path: Path):
        picture = noise(80, 64)
        path = save_image(tmp_path / "new" / "folder" / "a.png", picture, {"prompt": "Mäntel 毛呢", "seed": "7"})
        with Image.open(path) as image:
            image.load()
            assert image.text == {"prompt": "Mäntel 毛呢", "seed": "7"}
            np.testing.assert_array_equal(np.asarray(image), picture)
        assert os.listdir(path.parent) == ["a.png"], "no temporary file is left"

    def test_never_overwrites_unless_told(self, tmp_path: Path):
        path = save_image(tmp_path / "a.png", noise(8, 8, 1))
        before = path.read_bytes()
        with pytest.raises(OutputError, match=r"exists already.*--overwrite"):
            save_image(path, noise(8, 8, 2))
        assert path.read_bytes() == before
        save_image(path, noise(8, 8, 2), overwrite=True)
        assert path.read_bytes() != before

    def test_a_failure_leaves_the_old_file_and_no_other(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        path = save_image(tmp_path / "a.png", noise(8, 8, 1))
        before = path.read_bytes()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OutputError, match="No space left"):
            save_image(path, noise(8, 8, 2), overwrite=True)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]

    def test_a_file_in_the_way_of_the_folder(self, tmp_path: Path):
        (tmp_path / "file").write_text("x")
        for path in (tmp_path / "file" / "a.png", tmp_path / "file" / "deeper" / "a.png"):
            with pytest.raises(OutputError, match="in the way"):
                save_image(path, noise(8, 8))

    def test_a_folder_of_that_name(self, tmp_path: Path):
        (tmp_path / "a.png").mkdir()
        with pytest.raises(OutputError, match="is a folder"):
            save_image(tmp_path / "a.png", noise(8, 8), overwrite=True)

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_without_permission(self, tmp_path: Path):
        tmp_path.chmod(0o500)
        with pytest.raises(OutputError, match="permission denied"):
            save_image(tmp_path / "a.png", noise(8, 8))

    @pytest.mark.parametrize("name", ["a.gif", "a.tiff", "a", "a.png.txt"])
    def test_other_file_types(self, tmp_path: Path, name: str):
        with pytest.raises(InputError, match=r"\.png, \.jpg, \.jpeg, \.webp"):
            save_image(tmp_path / name, noise(8, 8))
