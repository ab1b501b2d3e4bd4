"""GANs and VAEs as generators: exactness in batches, truncation, what does not apply, folders that don't fit."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import gigdiff
from gigdiff.cli import main
from gigdiff.errors import CapabilityError, InputError, ModelMismatchError, NumericalError
from gigdiff.generators import shared_vae
from gigdiff.generators.one_pass import OnePassGenerator, save_one_pass
from gigdiff.generators.request import GenerationRequest, ImageGenerator
from gigdiff.generators.shared_vae import latent_space_of
from gigdiff.models.autoencoder import ProductAutoencoder
from gigdiff.models.gan import ConvGenerator, StyleGenerator
from gigdiff.models.vae import ConditionalVae
from gigdiff.provenance import read

PROMPTS = ("red wool coat", "black leather handbag with a long strap", "spectacles")
LATENT = {"channels": 4, "widths": (64, 32), "blocks": (1, 1)}
PIXEL = {"channels": 3, "height": 80, "width": 64, "fold": 4, "widths": (64, 64, 32), "blocks": (1, 1, 1)}
MODELS = {
    "style": lambda: StyleGenerator(**LATENT, noise_dim=16, style_dim=32),
    "conv": lambda: ConvGenerator(**LATENT, noise_dim=16, style_dim=32),
    "vae": lambda: ConditionalVae(**LATENT, latent_dim=4),
    "pixel": lambda: StyleGenerator(**PIXEL, noise_dim=16, style_dim=32),
}


def autoencoder() -> ProductAutoencoder:
    torch.manual_seed(1)
    vae = ProductAutoencoder(4, 8, 8, 8, 1, 1)
    with torch.no_grad():
        for p in vae.decoder.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return vae


def save(folder: Path, kind: str, **card: object) -> Path:
    torch.manual_seed(0)
    model = MODELS[kind]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    about = {
        "family": "vae" if kind == "vae" else "gan", "text_encoder": "minilm", "height": 80, "width": 64,
        "space": "pixel" if kind == "pixel" else "latent", "truncation": 0.9, "parameters": 1, "licence": "Apache-2.0",
        "scores": {},
    }  # fmt: skip
    vae = None if kind == "pixel" or "shared_vae" in card else autoencoder()
    return save_one_pass(folder, model, vae, about | card)


@pytest.fixture(scope="module", params=sorted(MODELS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / request.param, request.param)


def draw(generator: ImageGenerator, **changes: object) -> np.ndarray:
    return generator.generate(GenerationRequest(**({"prompts": PROMPTS, "seeds": (1, 2, 3)} | changes))).images  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_image_is_the_same_bits_alone_and_in_any_batch(folder: Path, dtype: str) -> None:
    generator = gigdiff.load(folder, dtype=dtype)
    assert isinstance(generator, OnePassGenerator) and isinstance(generator, ImageGenerator)
    together = draw(generator, prompts=PROMPTS * 3, seeds=tuple(range(9)))
    assert together.shape == (9, 80, 64, 3) and len({image.tobytes() for image in together}) == 9
    for i in (0, 4, 8):
        assert np.array_equal(draw(generator, prompts=(PROMPTS[i % 3],), seeds=(i,))[0], together[i])
    reverse = draw(generator, prompts=(PROMPTS * 3)[::-1], seeds=tuple(range(8, -1, -1)))
    assert np.array_equal(reverse[::-1], together)


def test_prompt_seed_and_truncation_each_change_the_picture_and_are_recorded(folder: Path) -> None:
    base = gigdiff.generate(PROMPTS[0], model=folder, seed=5)
    assert base.info["truncation"] == "0.9" and base.info["num_inference_steps"] == "1"  # type: ignore[union-attr]
    for changes in ({"seed": 6}, {"prompt": PROMPTS[1]}, {"truncation": 0.3}):
        other = gigdiff.generate(**({"prompt": PROMPTS[0], "model": folder, "seed": 5} | changes))  # type: ignore[call-overload]
        assert not np.array_equal(np.asarray(other), np.asarray(base)), changes
    result = gigdiff.generate(PROMPTS[0], model=folder, seed=5, truncation=0.3, return_result=True)
    assert result.request.truncation == 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 3.0}, "guidance_scale=3 was given, but .* has no guidance; leave it out or set it to 1"),
        ({"num_inference_steps": 20}, "num_inference_steps=20 was given, but .* draws in one pass; leave it out"),
        ({"negative_prompt": "blurry", "guidance_scale": 3.0}, "has no guidance"),
        ({"negative_prompt": "blurry"}, "negative_prompt was given, but .* has none"),
        ({"lora": "x.safetensors"}, "can't load LoRA"),
        ({"truncation": 3.0}, "truncation=3 is out of range; allowed are 0 to 2"),
        ({"truncation": "half"}, "truncation is 'half'"),
        ({"height": 96}, "can't draw 96 x 64"),
    ],
)
def test_what_does_not_apply_is_said(folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gigdiff.generate("red coat", model=folder, **arguments)


def test_truncation_is_refused_by_models_without_it(painter) -> None:
    with pytest.raises(CapabilityError, match=r"truncation=0.5 was given, but painter has none"):
        gigdiff.generate("red coat", model=painter, truncation=0.5)


def test_the_command_draws_with_truncation_and_says_so_in_the_file(folder: Path, tmp_path: Path) -> None:
    assert main(["generate", "red coat", "-m", str(folder), "-o", str(tmp_path), "--truncation", "0.5", "--quiet"]) == 0
    assert read(tmp_path / "red-coat.png")["truncation"] == "0.5"
    assert main(["generate", "red coat", "-m", str(folder), "-o", str(tmp_path), "--steps", "9", "--quiet"]) == 1


def test_padding_the_text_less_does_not_change_what_is_read() -> None:
    """Prompts are encoded at their own length; training's were padded."""
    torch.manual_seed(0)
    generator = OnePassGenerator(MODELS["style"](), autoencoder(), gigdiff.text.load_text_encoder(), name="x")  # type: ignore[attr-defined]
    condition, notes = generator._embed((PROMPTS[1],))
    expected = generator.text_encoder.encode([PROMPTS[1]]).condition()
    assert condition.shape == expected.shape and not notes
    torch.testing.assert_close(condition, expected, rtol=1e-4, atol=1e-5)
    _, notes = generator._embed(("A red coat. " + "Our founders met at university. " * 20,))
    assert len(notes) == 1 and "32 tokens" in notes[0]


def test_nan_is_an_error_and_never_a_black_picture(folder: Path) -> None:
    broken: OnePassGenerator = gigdiff.load(folder)  # type: ignore[assignment]
    with torch.no_grad():
        broken.model.conv_out.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericalError, match="NaN or infinite"):
        draw(broken)


def test_reconstruction_is_offered_where_there_is_an_autoencoder(folder: Path) -> None:
    generator: OnePassGenerator = gigdiff.load(folder)  # type: ignore[assignment]
    if folder.name == "pixel":
        assert generator.reconstruct is None
    else:
        photos = np.random.default_rng(0).integers(0, 256, (2, 80, 64, 3), np.uint8)
        assert generator.reconstruct is not None and generator.reconstruct(photos).shape == photos.shape


class TestSharedAutoencoder:
    @pytest.fixture
    def embedded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProductAutoencoder:
        """An embedded model "mini" whose autoencoder is the tests'."""
        vae = autoencoder()
        copy.deepcopy(vae).half().save_pretrained(tmp_path / "mini" / "vae")
        monkeypatch.setattr(shared_vae, "folder_of", lambda name: tmp_path / name)
        return vae

    def test_a_model_without_one_uses_that_of_the_model_it_names(self, embedded, tmp_path: Path) -> None:
        space = latent_space_of(embedded)
        alone = save(tmp_path / "alone", "style", shared_vae="mini", latent_space=space)
        whole = save(tmp_path / "whole", "style")
        assert not (alone / "vae").exists()
        assert np.array_equal(draw(gigdiff.load(alone)), draw(gigdiff.load(whole)))

    def test_another_latent_space_is_refused_and_another_decoder_is_not(self, embedded, tmp_path: Path) -> None:
        space = latent_space_of(embedded)
        alone = save(tmp_path / "alone", "style", shared_vae="mini", latent_space=space)
        with torch.no_grad():
            embedded.decoder.linear.bias += 0.5
        embedded.save_pretrained(tmp_path / "mini" / "vae")
        gigdiff.load(alone)
        with torch.no_grad():
            embedded.encoder.linear.bias += 0.5
        embedded.save_pretrained(tmp_path / "mini" / "vae")
        with pytest.raises(ModelMismatchError, match="another autoencoder than that of"):
            gigdiff.load(alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared_vae": "nobody"}, "no embedded model"),
        ({"space": "pixel"}, "draws 4 channels, pixels have 3"),
    ],
)
def test_cards_that_do_not_fit(change: dict, message: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "style")
    card = json.loads((folder / "gigdiff.json").read_text())
    (folder / "gigdiff.json").write_text(json.dumps(card | change))
    with pytest.raises(ModelMismatchError, match=message):
        gigdiff.load(folder)


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "style")
    ProductAutoencoder(6, 8, 8, 8, 1, 1).save_pretrained(folder / "vae")
    with pytest.raises(ModelMismatchError, match="draws 4 channels, the autoencoder's latents have 6"):
        gigdiff.load(folder)
    shutil.rmtree(folder / "generator")
    with pytest.raises(gigdiff.GigdiffError, match="generator"):
        gigdiff.load(folder)
