from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gigdiff.colour import lab_to_rgb, rgb_to_lab
from gigdiff.errors import InputError
from gigdiff.foreground import bounding_box, product_mask
from gigdiff.postprocess import MARKETPLACES, STEPS, parse_steps, postprocess


def picture(height: int = 100, width: int = 80, ground: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """A red box with a white print on it, off the middle, on a plain ground."""
    pixels = np.full((height, width, 3), ground, np.uint8)
    pixels[20:70, 10:50] = (180, 30, 40)
    pixels[35:50, 20:35] = (255, 255, 255)
    pixels[35:50, 20:35:2] = (240, 240, 240)  # not even: a print, not a hole
    image = Image.fromarray(pixels)
    image.info["prompt"] = "red box"
    return image


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_lab_and_back():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    assert np.abs(lab_to_rgb(rgb_to_lab(pixels)).astype(int) - pixels).max() <= 1
    assert np.allclose(rgb_to_lab(np.array([255, 255, 255])), [100, 0, 0], atol=1e-6)
    assert np.allclose(rgb_to_lab(np.array([255, 0, 0])), [53.24, 80.09, 67.20], atol=0.02)
    navy = lab_to_rgb(np.array([15.0, 40.0, -110.0]))  # outside sRGB
    assert navy[2] > navy[0] and rgb_to_lab(navy)[0] == pytest.approx(15, abs=1.5)


@pytest.mark.parametrize("ground", [(255, 255, 255), (235, 232, 228), (90, 120, 160)])
def test_the_product_is_found_on_any_plain_ground(ground: tuple[int, int, int]):
    mask = product_mask(np.asarray(picture(ground=ground)))
    assert bounding_box(mask) == (10, 20, 50, 70)
    assert mask[42, 28] > 0.9, "a print inside is product"
    assert mask[0].max() == 0
    assert bounding_box(product_mask(np.full((40, 30, 3), ground, np.uint8))) is None


@pytest.mark.parametrize("name", sorted(STEPS))
def test_every_step_keeps_mode_and_metadata_and_is_recorded(name: str):
    out = postprocess(picture(), [name])
    assert out.mode == "RGB" and out.info["prompt"] == "red box" and out.info["postprocess"] == name
    assert "postprocess" not in picture().info


def test_crop_and_pad():
    cut = postprocess(picture(), [("crop_to_product", {"margin": 0.1})])
    assert cut.size == (40 + 10, 50 + 10) and bounding_box(product_mask(np.asarray(cut))) == (5, 5, 45, 55)
    at_edge = Image.fromarray(np.asarray(picture())[20:])  # the margin reaches beyond the picture
    assert postprocess(at_edge, [("crop_to_product", {"margin": 0.1})]).size == (50, 60)
    for ratio, size in (("square", (100, 100)), ("4:5", (80, 100)), ("16:9", (178, 100)), ("1:2", (80, 160))):
        out = postprocess(picture(), [("pad", {"ratio": ratio})])
        assert out.size == size and array(out).sum() > 0 and (array(out)[0, 0] == 255).all()
    kept = array(postprocess(picture(), [("pad", {"ratio": "square"})]))[:, 10:90]
    assert (kept == array(picture())).all()


def test_background_and_shadow():
    grey = picture(ground=(200, 205, 210))
    white = array(postprocess(grey, ["background"]))
    assert (white[0, 0] == 255).all() and (white[30, 15] == array(grey)[30, 15]).all()
    other = array(postprocess(grey, [("background", {"ground": Image.new("RGB", (7, 9), (0, 0, 255))})]))
    assert (other[0, 0] == (0, 0, 255)).all() and (other[30, 15] == array(grey)[30, 15]).all()
    assert array(postprocess(grey, [("background", {"ground": "#102030"})]))[-1, -1].tolist() == [16, 32, 48]
    dark = array(postprocess(picture(), ["shadow"]))
    assert dark[72, 30].max() < 245 and (dark[5] == 255).all() and (dark[30, 15] == array(picture())[30, 15]).all()


def test_white_balance_denoise_and_sharpen():
    tinted = array(postprocess(picture(ground=(240, 235, 220)), ["white_balance"]))
    assert tinted[0, 0].min() >= 254
    dark = picture(ground=(90, 90, 60))
    assert (array(postprocess(dark, ["white_balance"])) == array(dark)).all()
    rng = np.random.default_rng(0)
    noisy = np.clip(array(picture(ground=(200, 200, 200))) + rng.normal(0, 5, (100, 80, 3)), 0, 255).astype(np.uint8)
    smooth = array(postprocess(noisy, [("denoise", {"strength": 0.8})]))
    assert smooth[80:95, 55:75].std() < 0.5 * noisy[80:95, 55:75].std()
    assert abs(smooth[25, 10:14].mean() - smooth[25, 4:8].mean()) > 60, "the edge stays"
    soft = Image.fromarray(array(picture()).repeat(1, 0).astype(np.uint8)).resize((40, 50)).resize((80, 100))
    sharp = postprocess(soft, [("sharpen", {"amount": 1.0})])
    assert np.abs(np.diff(array(sharp), axis=1)).max() > np.abs(np.diff(array(soft), axis=1)).max()


def test_size_limits():
    assert postprocess(picture(), [("limit_size", {"max_side": 50})]).size == (40, 50)
    assert postprocess(picture(), [("limit_size", {"marketplace": "etsy", "enlarge": True})]).size == (800, 1000)
    with pytest.raises(InputError, match=r"100 pixels, amazon asks for at least 1000.*--upscale"):
        postprocess(picture(), [("limit_size", {"marketplace": "amazon"})])
    with pytest.raises(InputError, match='did you mean "amazon"'):
        postprocess(picture(), [("limit_size", {"marketplace": "amazn"})])
    assert all(0 < least < most for least, most in MARKETPLACES.values())


def test_a_profile_is_converted():
    from PIL import ImageCms

    tagged = picture()
    tagged.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    out = postprocess(tagged, ["to_srgb"])
    assert np.abs(array(out) - array(tagged)).max() <= 1 and out.info["icc_profile"]
    tagged.info["icc_profile"] = b"broken"
    assert (array(postprocess(tagged, ["to_srgb"])) == array(tagged)).all()


def test_steps_as_text_and_in_the_order_given():
    steps = parse_steps(
        ["crop_to_product:margin=0.1", "pad:ratio=4:5,colour=#ff0000; limit_size:max_side=30,enlarge=true"]
    )
    assert steps == [
        ("crop_to_product", {"margin": 0.1}), ("pad", {"ratio": "4:5", "colour": "#ff0000"}),
        ("limit_size", {"max_side": 30, "enlarge": True}),
    ]  # fmt: skip
    out = postprocess(picture(), steps)
    assert parse_steps(out.info["postprocess"]) == steps, "the record reads back"
    forth, back = (
        postprocess(picture(), order).size for order in (["crop_to_product", "pad"], ["pad", "crop_to_product"])
    )
    assert forth != back


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("denoize", 'did you mean "denoise"'),
        ("denoise:strong=1", "it takes: strength"),
        ("denoise:strength", "no step"),
        ("denoise:strength=7", "from 0 to 1"),
        ("sharpen:amount=much", "'much'"),
        ("pad:ratio=4x5", '"4x5" is none'),
        ("pad:ratio=0:5", "is none"),
        ("background:ground=whitish", '"whitish"'),
        ("shadow:opacity=-1", "from 0 to 1"),
        ("limit_size:min_side=9,max_side=3", "min_side=9"),
    ],
)
def test_mistakes(text: str, words: str):
    with pytest.raises(InputError, match=words):
        postprocess(picture(), parse_steps(text))
