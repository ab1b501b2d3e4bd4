"""The models that ship with the package: whole, described, and able to draw."""

from __future__ import annotations

import numpy as np
import pytest

import gigdiff
from gigdiff.pretrained import EMBEDDED, card, folder_of, size_on_disk


@pytest.fixture(params=sorted(EMBEDDED))
def name(request: pytest.FixtureRequest) -> str:
    if not (folder_of(request.param) / "gigdiff.json").is_file():
        pytest.skip(f"{request.param} is not trained yet")  # to be removed with the first weights
    return request.param


def test_described(name):
    about = card(folder_of(name))
    assert about["parameters"] > 0 and about["licence"] and about["scores"]
    assert size_on_disk(folder_of(name)) < 200e6, "it has to be downloaded with every install"
    assert (folder_of(name) / "README.md").is_file(), "the model card"


def test_draws_by_name(name):
    image = gigdiff.generate("red wool coat", model=name, seed=0)
    pixels = np.asarray(image).astype(float)
    assert image.size == (64, 80) and image.info["model"] == name
    edge = np.concatenate([pixels[0], pixels[:, 0], pixels[:, -1]])
    assert edge.mean() > 200, "product photos have a light ground"
    middle = pixels[20:60, 16:48].reshape(-1, 3).mean(axis=0)
    assert middle[0] > middle[1] + 20 and middle[0] > middle[2] + 20, "it is red"
