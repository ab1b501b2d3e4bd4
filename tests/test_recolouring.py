"""Edits that are arithmetic on the picture's own pixels: recolouring, restyling, backgrounds. No torch."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import gigdiff
from gigdiff.colour import rgb_to_lab
from gigdiff.errors import InputError
from gigdiff.recolouring import WORN_CHROMA, asked_colour, colour_rgb, worn_rgb


def photo(height: int = 120, width: int = 90, colour: tuple[int, int, int] = (180, 40, 45)) -> Image.Image:
    """A shaded box with a white print, on white."""
    y, x = np.mgrid[:height, :width]
    pixels = np.full((height, width, 3), 255.0)
    inside = (slice(height // 6, -height // 6), slice(width // 5, -width // 5))
    shade = 0.8 + 0.2 * np.sin(x / 9) * np.cos(y / 11)
    pixels[inside] = np.array(colour) * shade[inside][..., None]
    pixels[height // 2 : height // 2 + 8, width // 3 : width // 2] = 250
    return Image.fromarray(pixels.astype(np.uint8))


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


class TestRecolour:
    @pytest.mark.parametrize("name", ["navy", "Black", "white", "dark red", "yellow", "beige", "grey", "#208040"])
    @pytest.mark.parametrize("source", [(180, 40, 45), (30, 30, 32), (225, 222, 220), (60, 90, 160)])
    def test_the_colour_is_reached_and_the_rest_stays(self, name: str, source: tuple[int, int, int]):
        picture = photo(colour=source)
        out = gigdiff.edit(picture, colour=name)
        before, after = array(picture), array(out)
        ground = (before == 255).all(axis=-1)
        assert (after[ground] == 255).all() and out.size == picture.size
        goods = (slice(26, 55), slice(24, 66))
        reached, wanted = (
            np.median(rgb_to_lab(a).reshape(-1, 3), axis=0) for a in (after[goods], np.array(worn_rgb(name))[None])
        )
        wanted[0] = np.clip(wanted[0], 14, 93)
        assert np.linalg.norm(reached - wanted) < 12, (reached, wanted)
        # Shape kept: light and shade go together as before.
        old, new = (rgb_to_lab(a[goods])[..., 0].ravel() for a in (before, after))
        assert np.corrcoef(old, new)[0, 1] > 0.8
        if source != (225, 222, 220):
            print_ = rgb_to_lab(after[62:66, 34:42])[..., 0].mean()
            assert print_ > 85, "a white print stays white"

    def test_a_named_colour_is_as_goods_wear_it_and_a_number_is_exact(self):
        assert worn_rgb("#ff0000") == (255, 0, 0)
        assert worn_rgb("grey") == pytest.approx(colour_rgb("grey"), abs=1)
        named, worn = (rgb_to_lab(np.array(f("red"))) for f in (colour_rgb, worn_rgb))
        assert np.hypot(*worn[1:]) == pytest.approx(WORN_CHROMA * np.hypot(*named[1:]), rel=0.02)
        assert worn[0] == pytest.approx(named[0], abs=1)
        assert np.arctan2(worn[2], worn[1]) == pytest.approx(np.arctan2(named[2], named[1]), abs=0.02)

    def test_a_sentence_is_a_recolouring(self):
        assert asked_colour("the same coat, but in a dark red.") == "dark red" and asked_colour("coat in red") is None
        out = gigdiff.edit(photo(), "The same bag in navy")
        assert out.info["edit"] == "recolour to navy"

    def test_unknown_colours_and_empty_pictures(self):
        with pytest.raises(InputError, match='"nvay blue" is unknown; did you mean "navy blue"'):
            gigdiff.edit(photo(), colour="nvay blue")
        with pytest.raises(InputError, match="no product was found"):
            gigdiff.edit(Image.new("RGB", (40, 50), "white"), colour="red")

    def test_restyle_takes_the_reference_s_colours(self):
        out = gigdiff.edit(photo(), reference_image=photo(colour=(40, 120, 60)))
        goods = array(out)[30:50, 30:60].reshape(-1, 3).mean(axis=0)
        assert goods[1] > goods[0] + 20 and (array(out)[0] == 255).all()

    def test_background(self):
        grey = Image.fromarray(np.where(array(photo()) == 255, 205, array(photo())).astype(np.uint8))
        out = gigdiff.edit(grey, background="white")
        assert (array(out)[:5] == 255).all() and out.info["edit"] == "background white"
        scene = gigdiff.edit(grey, background=Image.new("RGB", (10, 10), (10, 20, 200)))
        assert (array(scene)[0, 0] == (10, 20, 200)).all() and (array(scene)[30, 30] == array(grey)[30, 30]).all()
