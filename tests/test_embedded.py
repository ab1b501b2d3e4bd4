"""The models that ship with the package: whole, described, able to draw, and following the prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gigdiff
from gigdiff.metrics.probe import load_probe, probe_features
from gigdiff.pretrained import EMBEDDED, card, folder_of, size_on_disk
from gigdiff.products import Product

#: Plain prompts and what the probes should see in them; the last three use words that no catalogue name or label holds.
ASKED = {
    "blue jeans": Product(category="Jeans", colour="Blue"),
    "black handbag": Product(category="Handbags", colour="Black"),
    "green t-shirt": Product(category="Tshirts", colour="Green"),
    "yellow dress": Product(category="Dresses", colour="Yellow"),
    "brown belt": Product(category="Belts", colour="Brown"),
    "white running shoes": Product(category="Sports Shoes", colour="White"),
    "silver watch": Product(category="Watches", colour="Silver"),
    "black spectacles": Product(category="Sunglasses", colour="Black"),
    "azure tee": Product(category="Tshirts", colour="Blue"),
    "ebony purse": Product(category="Handbags", colour="Black"),
}

#: Least share right of article types of those that draw in one pass (docs/gan.md); shuffled prompts get 0.06.
LEAST_TYPES = {"mini-gan": 0.55, "mini-flash": 0.5, "mini-vae": 0.2}
LEAST_COLOURS = {"mini-vae": 0.3}


@pytest.fixture(params=sorted(EMBEDDED))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_described(name: str) -> None:
    about = card(folder_of(name))
    assert about["parameters"] > 0 and about["licence"] and about["scores"]
    assert (folder_of(name) / "README.md").is_file(), "the model card"
    for file in folder_of(name).rglob("*.json"):
        assert "_name_or_path" not in file.read_text(encoding="utf-8"), f"{file} tells of the machine it was made on"


def test_all_together_are_small_enough_to_download_with_every_install() -> None:
    assert size_on_disk(folder_of("mini").parent) < 150e6, "with the upscaler and the probes"


def test_draws_by_name(name: str) -> None:
    large = gigdiff.generate("red wool coat", model=name, seed=0)
    image = gigdiff.generate("red wool coat", model=name, seed=0, upscale=False)
    assert large.size == (256, 320)  # type: ignore[union-attr]
    shrunk = large.resize((64, 80), Image.Resampling.BOX)  # type: ignore[union-attr]
    assert np.abs(np.asarray(shrunk, float) - np.asarray(image, float)).mean() < 4, "the same picture, larger"
    pixels = np.asarray(image).astype(float)
    assert image.size == (64, 80) and image.info["model"] == name  # type: ignore[union-attr]
    edge = np.concatenate([pixels[0], pixels[:, 0], pixels[:, -1]])
    assert edge.mean() > 200, "product photos have a light ground"
    middle = pixels[20:60, 16:48].reshape(-1, 3).mean(axis=0)
    assert middle[0] > middle[1] + 20 and middle[0] > middle[2] + 20, "it is red"


def test_the_same_bits_alone_and_in_a_batch(name: str) -> None:
    prompts = ["red wool coat", "black leather handbag", "spectacles"]
    steps = min(4, gigdiff.load(name).capabilities.max_steps)
    together = gigdiff.generate(prompts, model=name, num_images_per_prompt=2, seed=7, num_inference_steps=steps)
    alone = gigdiff.generate(prompts[1], model=name, seed=8, num_inference_steps=steps)
    np.testing.assert_array_equal(np.asarray(alone), np.asarray(together[3]))  # type: ignore[index]


def test_follows_the_prompt(name: str) -> None:
    """Two seeds of ten prompts, read by the probes that evaluation uses; a model that ignores its prompt gets few."""
    result = gigdiff.generate(
        list(ASKED), model=name, num_images_per_prompt=2, seed=0, upscale=False, return_result=True
    )
    wanted = [product for product in ASKED.values() for _ in range(2)]
    for probe, least in (("article_type", LEAST_TYPES.get(name, 0.7)), ("colour_group", LEAST_COLOURS.get(name, 0.6))):
        loaded = load_probe(probe)
        right = loaded.correct(probe_features(result.images, [loaded]), wanted)
        assert right.mean() >= least, f"{probe}: {right.reshape(-1, 2).mean(1).tolist()}"


def test_reused_guidance_saves_a_quarter_and_hardly_changes_the_picture() -> None:
    """The goal for any speed-up: at least 30 dB to the plain pictures."""
    prompts = list(ASKED)[:4]
    plain, reused = (
        gigdiff.generate(prompts, seed=0, upscale=False, guidance_reuse=reuse, return_result=True).images.astype(float)
        for reuse in (1, 8)
    )
    squared = ((plain - reused) ** 2).mean()
    assert squared > 0 and 10 * np.log10(255**2 / squared) > 30


@pytest.mark.parametrize("name", ["mini-turbo", pytest.param("mini-flash", marks=pytest.mark.slow)])
def test_a_student_is_a_lora_that_stock_diffusers_draws_alike(name: str) -> None:
    """As the model card says: the base's folder, this folder's LoRA and scheduler, and gigdiff's prompt embeddings."""
    from diffusers import StableDiffusionPipeline

    ours: Any = gigdiff.load(name, device="cpu", dtype="float32")
    folder = folder_of(name)
    stock = StableDiffusionPipeline.from_pretrained(folder_of("mini"), text_encoder=None, tokenizer=None)
    stock.load_lora_weights(folder / "unet")
    stock.scheduler = type(ours.scheduler).from_pretrained(folder / "scheduler")
    stock.set_progress_bar_config(disable=True)
    with torch.no_grad():
        images = stock(
            prompt_embeds=ours.text_encoder.encode(["red wool coat"]).condition(),
            generator=torch.Generator("cpu").manual_seed(1),
            num_inference_steps=card(folder)["num_inference_steps"],
            guidance_scale=1.0,
            height=80,
            width=64,
            output_type="np",
        ).images
    picture = gigdiff.generate("red wool coat", model=ours, seed=1, upscale=False)
    difference = np.abs((images[0] * 255).round() - np.asarray(picture).astype(float))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
