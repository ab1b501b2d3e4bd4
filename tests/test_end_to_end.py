"""From prompt to file through the real classes, at tiny size with random weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import gigdiff
from gigdiff import api, provenance
from gigdiff.cli import main
from gigdiff.errors import GigdiffError, InputError, ModelMismatchError, ModelNotFoundError, NumericalError
from gigdiff.inspection import redraw
from gigdiff.provenance import read, weights_hash

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


def pixels(image: Image.Image | Path) -> np.ndarray:
    if isinstance(image, Path):
        with Image.open(image) as opened:
            return np.asarray(opened)
    return np.asarray(image)


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copied"))


class TestGenerate:
    def test_a_prompt_becomes_a_picture(self, tiny_model):
        image = gigdiff.generate("red wool coat", model=tiny_model, seed=7, upscale=False)
        assert image.mode == "RGB" and image.size == (64, 80)
        assert len(np.unique(pixels(image))) > 10
        assert image.info["weights"] == weights_hash(tiny_model) and image.info["seed"] == "7"
        assert (image.info["num_inference_steps"], image.info["guidance_scale"]) == ("3", "2")

    def test_prompt_and_seed_matter(self, tiny_model):
        base = pixels(gigdiff.generate("red wool coat", model=tiny_model, seed=7))
        for prompt, seed in (("red wool coat", 8), ("black bag", 7)):
            assert (pixels(gigdiff.generate(prompt, model=tiny_model, seed=seed)) != base).any()

    def test_alone_or_in_any_batch_the_same_bits(self, tiny_model):
        prompts = ["red wool coat", "black leather handbag", "blue striped shirt for men with long sleeves"]
        arguments = {"model": tiny_model, "num_inference_steps": 2}
        whole = gigdiff.generate(prompts, num_images_per_prompt=3, seed=7, **arguments)
        parts = gigdiff.generate(prompts[::-1], num_images_per_prompt=3, seed=7, batch_size=2, **arguments)
        for i, image in enumerate(whole):
            p, j = divmod(i, 3)
            np.testing.assert_array_equal(pixels(image), pixels(parts[(2 - p) * 3 + j]))
            np.testing.assert_array_equal(pixels(image), pixels(gigdiff.generate(prompts[p], seed=7 + j, **arguments)))

    def test_a_model_is_loaded_once(self, tiny_model):
        gigdiff.generate("coat", model=tiny_model, num_inference_steps=1)
        before = api._keep.cache_info()
        gigdiff.generate("bag", model=str(tiny_model), num_inference_steps=1)
        after = api._keep.cache_info()
        assert (after.misses, after.hits) == (before.misses, before.hits + 1)

    def test_load_then_generate(self, tiny_model):
        generator = gigdiff.load(tiny_model, device="cpu")
        assert isinstance(generator, gigdiff.ImageGenerator) and generator.folder == tiny_model
        request = gigdiff.GenerationRequest(prompts=("coat", "bag"), seeds=(1, 2))
        result = generator.generate(request)
        assert result.images.shape == (2, 80, 64, 3) and result.request.num_inference_steps == 3
        np.testing.assert_array_equal(
            pixels(gigdiff.generate("bag", model=generator, seed=2, upscale=False)), result.images[1]
        )

    def test_other_sizes_and_settings(self, tiny_model):
        image = gigdiff.generate(
            "coat",
            model=tiny_model,
            height=96,
            width=64,
            guidance_scale=3.0,
            negative_prompt="blue",
            seed=1,
            upscale=False,
        )
        assert image.size == (64, 96)
        with pytest.raises(InputError, match=r"multiples of 8 from 40 to .*80 x 64"):
            gigdiff.generate("coat", model=tiny_model, height=16)

    def test_reused_guidance_is_in_the_file_and_is_drawn_again(self, tiny_model, tmp_path):
        settings = {"model": str(tiny_model), "seed": 4, "num_inference_steps": 6, "upscale": False}
        image = gigdiff.generate("coat", guidance_reuse=2, **settings)
        assert image.info["guidance_reuse"] == "2" and "guidance_reuse" not in gigdiff.generate("coat", **settings).info
        path = provenance.save(tmp_path / "coat.png", image, image.info)
        again, _ = redraw(path)
        np.testing.assert_array_equal(pixels(again), pixels(image))

    def test_ten_thousand_characters_are_condensed_and_reported(self, tiny_model):
        long = "This coat is a dream come true for cold mornings, dear customer. " * 160 + "It is made of red wool."
        assert len(long) > 10_000
        image = gigdiff.generate(long, model=tiny_model, num_inference_steps=1)
        assert "left out" in image.info["notes"]

    def test_the_callers_random_state_is_left_alone(self, tiny_model):
        torch.manual_seed(0)
        expected = torch.rand(1)
        torch.manual_seed(0)
        gigdiff.generate("coat", model=tiny_model, num_inference_steps=1)
        assert torch.rand(1) == expected

    def test_any_diffusers_folder(self, tiny_pipeline):
        images = gigdiff.generate(["coat", "bag"], model=tiny_pipeline, seed=3, num_inference_steps=2)
        assert len(images) == 2 and (pixels(images[0]) != pixels(images[1])).any()
        again = gigdiff.generate("bag", model=gigdiff.load(tiny_pipeline), seed=3, num_inference_steps=2)
        # A stock pipeline runs float32 kernels that may differ by a rounding between batch sizes.
        assert np.abs(pixels(again).astype(int) - pixels(images[1])).max() <= 2


class TestCommand:
    def test_offline_in_a_fresh_process(self, tiny_model, tmp_path):
        """Every connection refused, not just HF_HUB_OFFLINE; no extra installed; and the pixels are this process's."""
        code = (
            "import socket, sys\n"
            "def refuse(*_): raise AssertionError('the network was asked')\n"
            "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
            "for name in ('datasets', 'jsonargparse', 'skimage', 'tensorboard'): sys.modules[name] = None\n"
            "from gigdiff.cli import main\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "generate", "red wool coat", "-n", "2", "--seed", "7", "-o", str(tmp_path),
             "--grid", "--model", str(tiny_model)],
            capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert sorted(os.listdir(tmp_path)) == [
            "red-wool-coat-grid.png", "red-wool-coat-seed7.png", "red-wool-coat-seed8.png"
        ]  # fmt: skip
        assert len(done.stdout.splitlines()) == 3 and "2.0/2 images" in done.stderr
        expected = gigdiff.generate("red wool coat", model=tiny_model, seed=8)
        np.testing.assert_array_equal(pixels(tmp_path / "red-wool-coat-seed8.png"), pixels(expected))
        assert read(tmp_path / "red-wool-coat-seed8.png")["weights"] == weights_hash(tiny_model)


def swap_weights(folder: Path) -> None:
    shutil.copy(folder / VAE, folder / UNET)


def other_width(folder: Path) -> None:
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": [32, 64]}))


def lose_some_weights(folder: Path) -> None:
    weights = load_file(folder / UNET)
    save_file({key: value for key, value in weights.items() if "mid_block" not in key}, folder / UNET)


def truncate(folder: Path) -> None:
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-100])


def other_latents(folder: Path) -> None:
    from gigdiff.models.autoencoder import ProductAutoencoder

    small = {"half_channels": 8, "quarter_channels": 8, "eighth_channels": 8, "encoder_blocks": 1, "decoder_blocks": 1}
    ProductAutoencoder(latent_channels=6, **small).save_pretrained(folder / "vae")


def other_family(folder: Path) -> None:
    (folder / "gigdiff.json").write_text(json.dumps({"family": "gan"}))


def broken_card(folder: Path) -> None:
    (folder / "gigdiff.json").write_text("{")


def card_without_size(folder: Path) -> None:
    (folder / "gigdiff.json").write_text(json.dumps({"family": "diffusion"}))


def broken_config(folder: Path) -> None:
    (folder / "vae" / "config.json").write_text("{")


@pytest.mark.parametrize(
    "damage",
    [
        swap_weights, other_width, lose_some_weights, truncate, other_latents, other_family, broken_card,
        card_without_size, broken_config,
    ],
)  # fmt: skip
def test_another_architecture_never_draws(damage, copied, tmp_path, capsys):
    damage(copied)
    with pytest.raises(ModelMismatchError, match=str(copied.name)):
        gigdiff.generate("coat", model=copied)
    capsys.readouterr()
    assert main(["generate", "coat", "--model", str(copied), "-o", str(tmp_path / "out"), "--quiet"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("gigdiff: error: ")
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("part", [UNET, VAE, "scheduler/scheduler_config.json", "model_index.json"])
def test_missing_files_are_named(part, copied, tmp_path, capsys):
    (copied / part).unlink()
    with pytest.raises(GigdiffError, match=part.split("/")[0]) as caught:
        gigdiff.generate("coat", model=copied)
    assert isinstance(caught.value, ModelNotFoundError)
    assert main(["generate", "coat", "--model", str(copied), "-o", str(tmp_path / "out"), "--quiet"]) == 1
    assert part.split("/")[0] in capsys.readouterr().err


@pytest.mark.parametrize("part", [UNET, VAE])
def test_nan_is_an_error_never_a_black_picture(part, copied, tmp_path, capsys):
    weights = load_file(copied / part)
    for key in weights:
        if "conv_out" in key:
            weights[key] = torch.full_like(weights[key], float("nan"))
    save_file(weights, copied / part)
    with pytest.raises(NumericalError, match="NaN"):
        gigdiff.generate("coat", model=copied)
    assert main(["generate", "coat", "--model", str(copied), "-o", str(tmp_path / "out"), "--quiet"]) == 1
    assert "NaN" in capsys.readouterr().err and not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("lora", ["./nowhere", "nowhere.safetensors"])
def test_a_lora_that_is_not_there(lora, tiny_model, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(GigdiffError, match="nowhere"):
        gigdiff.generate("coat", model=tiny_model, lora=lora)
