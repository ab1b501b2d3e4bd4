"""Augmentation keeps size, background and the named colour, and is seeded."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from gigdiff.data.augment import Augmentation, augment
from gigdiff.data.vocabulary import COLOUR_RGB
from gigdiff.errors import InputError


def photo() -> np.ndarray:
    """An asymmetric red patch on white, 20 x 16."""
    pixels = np.full((20, 16, 3), 255, dtype=np.uint8)
    pixels[5:12, 4:8] = (200, 20, 30)
    return pixels


def test_default_does_nothing_and_copies() -> None:
    pixels = photo()
    out = augment(pixels, Augmentation(), seed=0)
    np.testing.assert_array_equal(out, pixels)
    out[:] = 0
    np.testing.assert_array_equal(pixels, photo())
    np.testing.assert_array_equal(augment(Image.fromarray(pixels), Augmentation(), seed=0), pixels)


def test_depends_on_seed_and_index_alone() -> None:
    settings = Augmentation(flip=True, shift=3, colour_jitter=1.0)
    one = augment(photo(), settings, seed=1, index=5)
    np.testing.assert_array_equal(one, augment(photo(), settings, seed=1, index=5))
    others = [augment(photo(), settings, seed=s, index=i) for s, i in ((1, 6), (2, 5), (2, 6))]
    assert any((one != other).any() for other in others)


def test_never_flips_unless_asked() -> None:
    wide = Augmentation(colour_jitter=1.0)
    for i in range(40):
        out = augment(photo(), wide, seed=0, index=i)
        assert (out[:, :8] < 250).any() and not (out[:, 8:] < 250).any()
    flipped = sum((augment(photo(), Augmentation(flip=True), seed=0, index=i)[:, 8:] < 250).any() for i in range(200))
    assert 70 < flipped < 130


def test_shift_moves_the_patch_whole_and_pads_white() -> None:
    places = set()
    for i in range(300):
        out = augment(photo(), Augmentation(shift=2), seed=0, index=i)
        assert out.shape == (20, 16, 3)
        red = np.argwhere((out == (200, 20, 30)).all(axis=2))
        assert len(red) == 7 * 4
        assert ((out == 255).all(axis=2) | (out == (200, 20, 30)).all(axis=2)).all()
        places.add(tuple(red[0] - (5, 4)))
    assert places == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


@pytest.mark.parametrize("colour", sorted(COLOUR_RGB))
def test_jitter_never_changes_the_named_colour(colour: str) -> None:
    names = list(COLOUR_RGB)
    table = rgb2lab(np.array(list(COLOUR_RGB.values()))[None] / 255.0)[0]
    patch = np.full((2, 2, 3), COLOUR_RGB[colour], dtype=np.uint8)
    for i in range(40):
        out = rgb2lab(augment(patch, Augmentation(colour_jitter=1.0), seed=0, index=i))[0, 0]
        distance = deltaE_ciede2000(np.broadcast_to(out, table.shape), table)
        assert names[int(distance.argmin())] == colour
        assert distance[names.index(colour)] < 4.0


def test_jitter_changes_something_but_not_the_background() -> None:
    settings = Augmentation(colour_jitter=1.0)
    outs = [augment(photo(), settings, seed=0, index=i) for i in range(10)]
    assert all((out[0, 0] == 255).all() for out in outs)
    assert len({tuple(out[8, 6]) for out in outs}) > 5


@pytest.mark.parametrize("bad", [{"shift": -1}, {"shift": 1.5}, {"shift": True}, {"colour_jitter": 2}, {"flip": 1}])
def test_bad_settings(bad: dict[str, object]) -> None:
    with pytest.raises(InputError, match="is allowed"):
        Augmentation(**bad)  # type: ignore[arg-type]


def test_bad_images() -> None:
    for image in (np.zeros((4, 4)), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(InputError, match="uint8"):
            augment(image, Augmentation(), seed=0)
    with pytest.raises(InputError, match="mode L"):
        augment(Image.new("L", (4, 4)), Augmentation(), seed=0)
