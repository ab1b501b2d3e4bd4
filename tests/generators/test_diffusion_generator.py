"""The sampling loop, real classes at tiny size: exactness in batches, guidance, stock diffusers, LoRA, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import gigdiff
from gigdiff.errors import CapabilityError, InputError, ModelMismatchError, ModelNotFoundError, NumericalError
from gigdiff.generators.diffusion import DiffusionGenerator, PipelineGenerator, _Unet
from gigdiff.generators.request import GenerationRequest

PROMPTS = ("red wool coat", "black leather handbag", "spectacles")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def generator(tiny_model: Path, request: pytest.FixtureRequest) -> DiffusionGenerator:
    return DiffusionGenerator.from_pretrained(tiny_model, dtype=getattr(torch, request.param))


def draw(generator: DiffusionGenerator | PipelineGenerator, **changes: object) -> np.ndarray:
    arguments: dict = {"prompts": PROMPTS, "seeds": (1, 2, 3), "num_inference_steps": 3} | changes
    return generator.generate(GenerationRequest(**arguments)).images


def test_an_image_is_the_same_bits_alone_and_in_any_batch(generator: DiffusionGenerator) -> None:
    together = draw(generator, prompts=PROMPTS * 3, seeds=tuple(range(9)))
    assert len({image.tobytes() for image in together}) == 9
    for i in (0, 4, 8):
        assert np.array_equal(draw(generator, prompts=(PROMPTS[i % 3],), seeds=(i,))[0], together[i])
    reverse = draw(generator, prompts=(PROMPTS * 3)[::-1], seeds=tuple(range(8, -1, -1)))
    assert np.array_equal(reverse[::-1], together)


def test_prompt_seed_guidance_and_negative_prompt_each_change_the_picture(generator: DiffusionGenerator) -> None:
    base = draw(generator)
    for changes in (
        {"seeds": (4, 5, 6)},
        {"prompts": ("a", "b", "c")},
        {"guidance_scale": 6.0},
        {"negative_prompts": ("blurry",) * 3},
        {"num_inference_steps": 4},
    ):
        assert not np.array_equal(draw(generator, **changes), base), changes
    assert np.array_equal(draw(generator, negative_prompts=("",) * 3), base)


def test_a_unet_that_accelerate_wrapped_hears_its_timestep(tiny_model: Path) -> None:
    """Graphs and compiled networks draw with a shallow copy; its `forward` was still the trained UNet's: timestep 0."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    generator = DiffusionGenerator.from_pretrained(tiny_model, dtype=torch.float32)
    z, condition = torch.randn(2, generator.unet.config.in_channels, 10, 8), generator.embed(["a", "b"])
    asked = [torch.tensor(t) for t in (10, 900)]
    expected = [generator._unet(z, t, condition["prompt_embeds"]) for t in asked]
    AcceleratorState._reset_state(True)
    generator.unet = Accelerator(cpu=True, mixed_precision="bf16").prepare(generator.unet)
    AcceleratorState._reset_state(True)
    network = _Unet(generator.unet)
    with torch.no_grad():
        heard = [network(z, generator._sinusoids(t, 2), condition["prompt_embeds"]) for t in asked]
    for ours, plain in zip(heard, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1], rtol=1e-2, atol=1e-3)


def test_guidance_outside_its_interval_is_no_guidance(tiny_model: Path) -> None:
    never = DiffusionGenerator.from_pretrained(tiny_model)
    never.guidance_interval = (1e6, 2e6)
    assert np.array_equal(draw(never, guidance_scale=7.0), draw(never, guidance_scale=1.0))
    always = DiffusionGenerator.from_pretrained(tiny_model)
    assert not np.array_equal(draw(always, guidance_scale=7.0), draw(never, guidance_scale=7.0))


def test_reused_guidance_saves_rows_and_keeps_the_picture_and_its_bits_in_a_batch(
    generator: DiffusionGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    plain = DiffusionGenerator._unet
    monkeypatch.setattr(
        DiffusionGenerator, "_unet", lambda self, z, *rest, **more: rows.append(len(z)) or plain(self, z, *rest, **more)
    )
    settings = {"num_inference_steps": 9, "guidance_scale": 6.0}
    base = draw(generator, **settings)
    rows.clear()
    reused = draw(generator, **settings, guidance_reuse=3)
    # Rows an image; what comes before tries whether a batch is exact, and in float32 it may not be.
    assert [n // min(rows) for n in rows[-9:]] == [2, 2, 2, 1, 2, 1, 1, 2, 1]
    without = draw(generator, **settings | {"guidance_scale": 1.0})
    far, near = (np.abs(x.astype(float) - base).mean() for x in (without, reused))
    assert 0 < near < far / 2  # random weights: a trained model's pictures stay far nearer
    assert np.array_equal(draw(generator, **settings, guidance_reuse=3, prompts=PROMPTS[1:2], seeds=(2,))[0], reused[1])


def test_guidance_that_is_not_reused_is_as_before(generator: DiffusionGenerator) -> None:
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0}  # of three steps each guides anew
    assert np.array_equal(draw(generator, **settings, guidance_reuse=5), draw(generator, **settings))


def test_a_stock_diffusers_pipeline_reads_the_folder_and_draws_the_same(tiny_model: Path) -> None:
    """No gigdiff code but the autoencoder's class: StableDiffusionPipeline with our prompt embeddings."""
    from diffusers import StableDiffusionPipeline

    ours = DiffusionGenerator.from_pretrained(tiny_model, dtype=torch.float32)
    stock = StableDiffusionPipeline.from_pretrained(tiny_model, text_encoder=None, tokenizer=None)
    stock.set_progress_bar_config(disable=True)
    embed = ours.text_encoder.encode
    with torch.no_grad():
        images = stock(
            prompt_embeds=embed(PROMPTS).condition(),
            negative_prompt_embeds=embed([""] * 3).condition(),
            generator=[torch.Generator("cpu").manual_seed(s) for s in (1, 2, 3)],
            num_inference_steps=3,
            guidance_scale=2.0,
            height=80,
            width=64,
            output_type="np",
        ).images
    difference = np.abs((images * 255).round() - draw(ours).astype(float))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_other_sizes_and_reconstruction(generator: DiffusionGenerator) -> None:
    assert draw(generator, height=96, width=48).shape == (3, 96, 48, 3)
    photos = np.random.default_rng(0).integers(0, 256, (2, 80, 64, 3), np.uint8)
    assert generator.reconstruct(photos).shape == photos.shape
    with pytest.raises(InputError, match="height=8"):
        draw(generator, height=8)


def test_nan_weights_are_an_error_and_never_a_black_picture(tiny_model: Path) -> None:
    broken = DiffusionGenerator.from_pretrained(tiny_model)
    with torch.no_grad():
        broken.unet.conv_out.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericalError, match="NaN or infinite latents"):
        draw(broken)


def test_a_long_prompt_is_drawn_and_what_was_left_out_is_noted(tiny_model: Path) -> None:
    generator = DiffusionGenerator.from_pretrained(tiny_model)
    text = "A red wool coat for women. " + "Our founders met at university and never looked back. " * 20
    result = generator.generate(GenerationRequest((text,), (0,), num_inference_steps=1))
    assert len(result.notes) == 1 and "32 tokens" in result.notes[0] and "founders" in result.notes[0]


def test_steps_are_reported_up_to_the_last(tiny_model: Path) -> None:
    seen: list[tuple[int, int]] = []
    generator = DiffusionGenerator.from_pretrained(tiny_model)
    request = GenerationRequest(PROMPTS, (1, 2, 3), num_inference_steps=3)
    generator.generate(request, on_step=lambda done, total: seen.append((done, total)))
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def lora_file(folder: Path, base: Path) -> Path:
    """A LoRA for the tiny UNet as peft and diffusers save it, with weights that do something."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    unet.save_lora_adapter(folder, weight_name="pytorch_lora_weights.safetensors")
    return folder / "pytorch_lora_weights.safetensors"


def test_lora_goes_in_scales_and_comes_out(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    raw = load_file(lora_file(tmp_path, tiny_model))
    file = tmp_path / "lora.safetensors"
    save_file({f"unet.{name.removeprefix('unet.')}": tensor for name, tensor in raw.items()}, file)
    generator = DiffusionGenerator.from_pretrained(tiny_model)
    plain = draw(generator)
    with_lora = draw(generator, lora=str(file))
    assert not np.array_equal(with_lora, plain)
    assert not np.array_equal(draw(generator, lora=str(file), lora_scale=0.5), with_lora)
    assert np.array_equal(draw(generator, lora=str(file), lora_scale=0.0), plain)
    assert np.array_equal(draw(generator, lora=str(file)), with_lora)
    assert np.array_equal(draw(generator), plain)
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        draw(generator, lora=str(tmp_path / "nowhere.safetensors"))
    save_file({"unet.other.lora_A.weight": torch.zeros(4, 8), "unet.other.lora_B.weight": torch.zeros(8, 4)}, file)
    with pytest.raises(ModelMismatchError):
        draw(generator, lora=str(file))


def test_parts_that_do_not_fit_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    from gigdiff.models.autoencoder import ProductAutoencoder

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    shutil.rmtree(folder / "vae")
    ProductAutoencoder(latent_channels=6, half_channels=8, quarter_channels=8, eighth_channels=8).save_pretrained(
        folder / "vae"
    )
    with pytest.raises(ModelMismatchError, match=r"4 latent channels.*gives 6"):
        DiffusionGenerator.from_pretrained(folder)
    (folder / "gigdiff.json").write_text(json.dumps({}))
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ModelNotFoundError, match="not a gigdiff model folder"):
        DiffusionGenerator.from_pretrained(folder)


def test_any_diffusers_pipeline_draws_through_the_same_interface(tiny_pipeline: Path) -> None:
    generator = PipelineGenerator.from_pretrained(tiny_pipeline)
    images = draw(generator, num_inference_steps=2, guidance_scale=3.0, negative_prompts=("x", "", "y"))
    assert images.shape[0] == 3 and images.dtype == np.uint8 and images.std() > 0
    assert np.array_equal(
        images, draw(generator, num_inference_steps=2, guidance_scale=3.0, negative_prompts=("x", "", "y"))
    )
    long = generator.generate(GenerationRequest(("word " * 100,), (0,), num_inference_steps=1))
    assert "77 tokens" in long.notes[0]
    with pytest.raises((InputError, CapabilityError)):
        draw(generator, height=12)


@pytest.mark.slow
def test_compiled_networks_draw_what_plain_ones_draw(
    tiny_model: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch.compile, half a minute or more for each network."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for folder, most in ((tiny_model, 8), (tiny_pipeline, 2)):
        plain, compiled = gigdiff.load(folder, device="cpu"), gigdiff.load(folder, device="cpu", backend="compile")
        request = GenerationRequest(("red handbag", "blue watch"), (0, 1), num_inference_steps=2)
        result = compiled.generate(request)
        assert np.abs(result.images.astype(int) - plain.generate(request).images).max() <= most
        assert result.extra == {"backend": "compile"}
        if folder is tiny_model:
            assert np.array_equal(compiled.generate(request.part(1, 2)).images[0], result.images[1])
