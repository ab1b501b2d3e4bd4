"""LoRA files: in and out of models, stock diffusers, merging, several at once, kohya names, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gigdiff
from gigdiff import lora as L
from gigdiff.errors import InputError, ModelMismatchError, ModelNotFoundError, OutputError
from gigdiff.generators.diffusion import DiffusionGenerator, PipelineGenerator
from gigdiff.generators.request import GenerationRequest


def make_lora(path: Path, model: Any, part: str, seed: int = 0, std: float = 0.3, **settings: Any) -> Path:
    """A LoRA file for `model` with weights that do something; the model is left as it was, frozen."""
    chosen = L.LoraSettings(**({"rank": 4, "lora_alpha": 2} | settings))
    parameters = L.add_adapter(model, chosen, "made")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in parameters.items():
            if "magnitude" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * std)
    about = {"base_model": "tiny", "family": "sd", "config": {"rank": chosen.rank}}
    header = L.lora_header(L.adapter_configs({part: model}, "made"), about)
    L.save_lora(path, L.lora_tensors({part: model}, "made"), header)
    model.unload_lora()
    return path


@pytest.fixture(scope="module")
def loras(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    generator = DiffusionGenerator.from_pretrained(tiny_model)
    kinds = {
        "plain": {"target_modules": ("to_q", "to_v", "conv1", "to_out.0")},
        "other": {"seed": 1, "rank": 2, "target_modules": ("to_k", "ff.net.2")},
        "dora": {"use_dora": True},
        "rslora": {"use_rslora": True},
    }
    return {
        name: make_lora(folder / f"{name}.safetensors", generator.unet, "unet", **kind)  # type: ignore[arg-type]
        for name, kind in kinds.items()
    }


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> DiffusionGenerator:
    return DiffusionGenerator.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.mark.parametrize("rank", [4, 16])
def test_how_lora_a_starts(generator: DiffusionGenerator, rank: int) -> None:
    """kaiming: uniform below 1 / sqrt(width), whatever the rank; gaussian: deviation 1 / rank, whatever the width."""
    spread = {}
    for start in ("kaiming", "gaussian"):
        parameters = L.add_adapter(generator.unet, L.LoraSettings(rank, rank, init_lora_weights=start), "start")
        spread[start] = {p.shape[1]: float(p.std()) for name, p in parameters.items() if "lora_A" in name}
        assert all(not p.any() for name, p in parameters.items() if "lora_B" in name)
        generator.unet.unload_lora()
    assert len(spread["kaiming"]) > 1
    for width, deviation in spread["kaiming"].items():
        assert deviation == pytest.approx((3 * width) ** -0.5, rel=0.2)
    for deviation in spread["gaussian"].values():
        assert deviation == pytest.approx(1 / rank, rel=0.2)


def draw(generator: Any, **changes: Any) -> np.ndarray:
    arguments: dict = {"prompts": ("red coat", "blue bag"), "seeds": (1, 2), "num_inference_steps": 2} | changes
    return generator.generate(GenerationRequest(**arguments)).images


def stock_pipeline(tiny_model: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(tiny_model, text_encoder=None, tokenizer=None)
    stock.set_progress_bar_config(disable=True)
    return stock


def draw_stock(stock: Any, generator: DiffusionGenerator) -> np.ndarray:
    embed = generator.text_encoder.encode
    with torch.no_grad():
        images = [
            stock(
                prompt_embeds=embed([prompt]).condition(),
                negative_prompt_embeds=embed([""]).condition(),
                generator=torch.Generator("cpu").manual_seed(seed),
                num_inference_steps=2, guidance_scale=2.0, height=80, width=64, output_type="np",
            ).images[0]
            for prompt, seed in (("red coat", 1), ("blue bag", 2))
        ]  # fmt: skip
    return (np.stack(images) * 255).round()


@pytest.mark.parametrize("kind", ["plain", "dora", "rslora"])
def test_stock_diffusers_gives_the_same_pixels(
    kind: str, loras: dict[str, Path], generator: DiffusionGenerator, tiny_model: Path
) -> None:
    """alpha / rank is 1/2 here: a loader that lost alpha would draw something else."""
    plain, ours = draw(generator), draw(generator, lora=str(loras[kind]))
    effect = np.abs(ours.astype(float) - plain).mean()
    assert effect > 1
    stock = stock_pipeline(tiny_model)
    stock.load_lora_weights(str(loras[kind]))
    difference = np.abs(draw_stock(stock, generator) - ours)
    assert difference.max() <= 1 and difference.mean() < 0.01 * effect


def test_adapters_go_in_together_scale_and_come_out(loras: dict[str, Path], generator: DiffusionGenerator) -> None:
    plain = draw(generator)
    one, two = (draw(generator, lora=str(loras[name])) for name in ("plain", "other"))
    both = draw(generator, lora=(str(loras["plain"]), str(loras["other"])))
    assert len({image.tobytes() for image in (plain, one, two, both)}) == 4
    first_only = draw(generator, lora=(str(loras["plain"]), str(loras["other"])), lora_scale=(1.0, 0.0))
    assert np.abs(first_only.astype(int) - one).max() <= 1  # adding zeros may round
    assert not np.array_equal(draw(generator, lora=str(loras["plain"]), lora_scale=0.5), one)
    assert np.array_equal(draw(generator, lora=str(loras["plain"])), one)
    assert np.array_equal(draw(generator), plain)
    assert not any("lora" in name for name, _ in generator.unet.named_parameters())


def test_a_failed_lora_leaves_none_in_and_a_changed_file_is_read_again(
    loras: dict[str, Path], generator: DiffusionGenerator, tmp_path: Path
) -> None:
    plain = draw(generator)
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        draw(generator, lora=(str(loras["plain"]), str(tmp_path / "nowhere.safetensors")))
    assert np.array_equal(draw(generator), plain)
    file = tmp_path / "lora.safetensors"
    file.write_bytes(loras["plain"].read_bytes())
    before = draw(generator, lora=str(file))
    file.write_bytes(loras["other"].read_bytes())
    assert not np.array_equal(draw(generator, lora=str(file)), before)
    draw(generator)


def test_the_api_takes_paths_lists_and_scales_and_pictures_say_so(loras: dict[str, Path], generator: Any) -> None:
    image: Any = gigdiff.generate(
        "coat", model=generator, seed=0, num_inference_steps=1,
        lora=[loras["plain"], str(loras["other"])], lora_scale=[0.5, 1],
    )  # fmt: skip
    assert image.info["lora"].splitlines() == [f"{loras['plain']} at 0.5", f"{loras['other']} at 1"]
    with pytest.raises(InputError, match="2 lora_scale for 1 lora"):
        gigdiff.generate("coat", model=generator, lora=loras["plain"], lora_scale=[1, 2])
    with pytest.raises(InputError, match="twice"):
        gigdiff.generate("coat", model=generator, lora=[loras["plain"]] * 2)


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_merged_equals_unmerged(kind: str, loras: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    base = {p: p.read_bytes() for p in sorted(tiny_model.rglob("*.safetensors"))}
    out = L.merge(tiny_model, [str(loras[kind])], [0.7], tmp_path / "merged", dtype="float32")
    generator = DiffusionGenerator.from_pretrained(tiny_model, dtype=torch.float32)
    plain = draw(generator)
    unmerged = draw(generator, lora=str(loras[kind]), lora_scale=0.7)
    merged = draw(DiffusionGenerator.from_pretrained(out, dtype=torch.float32))
    effect = np.abs(unmerged.astype(float) - plain).mean()
    assert effect > 1  # the adapter does something at all
    assert np.abs(merged.astype(float) - unmerged).max() <= 1
    assert {p: p.read_bytes() for p in base} == base  # the base is untouched
    assert not (out / "unet" / "adapter_config.json").exists()
    with pytest.raises(OutputError, match="exists already"):
        L.merge(tiny_model, [str(loras[kind])], [1.0], out)


def test_a_pipeline_with_a_text_encoder_lora(tiny_pipeline: Path, tmp_path: Path) -> None:
    generator = PipelineGenerator.from_pretrained(tiny_pipeline)
    plain = draw(generator)
    encoder = generator.pipeline.text_encoder
    parameters = L.add_adapter(encoder, L.LoraSettings(target_modules=("q_proj", "v_proj")), "made")
    with torch.no_grad():
        for p in parameters.values():
            p.normal_(std=0.5)
    header = L.lora_header(L.adapter_configs({"text_encoder": encoder}, "made"), {})
    file = L.save_lora(tmp_path / "te.safetensors", L.lora_tensors({"text_encoder": encoder}, "made"), header)
    assert all(key.startswith("text_encoder.text_model.encoder.") for key in load_file(file))
    generator = PipelineGenerator.from_pretrained(tiny_pipeline)
    changed = draw(generator, lora=str(file))
    assert not np.array_equal(changed, plain)
    assert np.array_equal(draw(generator), plain)
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(file))
    again = draw(PipelineGenerator(stock, name="stock"))
    assert np.array_equal(again, changed)
    unet_lora = make_lora(tmp_path / "unet.safetensors", generator.pipeline.unet, "unet", std=1.0)
    both = draw(generator, lora=(str(file), str(unet_lora)))
    assert not np.array_equal(both, changed)
    merged = L.merge(tiny_pipeline, [str(file), str(unet_lora)], [1, 1], tmp_path / "merged")
    assert np.abs(draw(PipelineGenerator.from_pretrained(merged)).astype(int) - both).max() <= 1


def test_a_lora_of_another_base_is_named(
    loras: dict[str, Path], generator: DiffusionGenerator, tiny_pipeline: Path, tmp_path: Path
) -> None:
    pipeline = PipelineGenerator.from_pretrained(tiny_pipeline)
    with pytest.raises(ModelMismatchError, match=r"384 -> 32.*16 -> 32.*trained on tiny"):
        draw(pipeline, lora=str(loras["other"]))
    tensors = load_file(loras["plain"])
    file = tmp_path / "deep.safetensors"
    save_file({key.replace("mid_block", "mid_block.more"): t for key, t in tensors.items()}, file)
    with pytest.raises(ModelMismatchError, match=r"has no layer mid_block\.more"):
        draw(generator, lora=str(file))
    save_file({key.replace("unet.", "transformer."): t for key, t in tensors.items()}, file)
    with pytest.raises(ModelMismatchError, match="holds weights for transformer; tiny has unet"):
        draw(generator, lora=str(file))
    file.write_bytes(b"not a safetensors file")
    with pytest.raises(ModelMismatchError, match="no readable safetensors"):
        draw(generator, lora=str(file))
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(ModelMismatchError, match="no LoRA with diffusers' or kohya's keys"):
        draw(generator, lora=str(file))


def test_other_weights_of_the_same_layout_are_noted(loras: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    tensors = load_file(loras["plain"])
    with safe_open(loras["plain"], "pt") as opened:
        header = dict(opened.metadata())
    header["gigdiff"] = json.dumps({"base_model": "elsewhere", "base_hash": "0123456789abcdef"})
    file = L.save_lora(tmp_path / "lora.safetensors", tensors, header)
    generator = DiffusionGenerator.from_pretrained(tiny_model)
    request = GenerationRequest(("coat",), (0,), num_inference_steps=1, lora=str(file))
    (note,) = generator.generate(request).notes
    assert "trained on elsewhere (0123456789abcdef)" in note
    header["gigdiff"] = json.dumps({"base_hash": L.base_hash(tiny_model, "unet")})
    L.save_lora(file, tensors, header)
    assert generator.generate(request).notes == ()


def test_wrong_targets_and_ranks_are_refused_with_the_nearest_names(tiny_model: Path) -> None:
    unet = DiffusionGenerator.from_pretrained(tiny_model).unet
    with pytest.raises(InputError, match=r'called "to_querry"; did you mean "to_q'):
        L.add_adapter(unet, L.LoraSettings(target_modules=("to_q", "to_querry")))
    with pytest.raises(InputError, match="--rank 0"):
        L.add_adapter(unet, L.LoraSettings(rank=0))
    assert not any("lora" in name for name, _ in unet.named_parameters())


def test_a_fresh_adapter_changes_nothing_and_is_float32_in_half_precision(tiny_model: Path) -> None:
    generator = DiffusionGenerator.from_pretrained(tiny_model, dtype=torch.float32)
    plain = draw(generator)
    parameters = L.add_adapter(generator.unet, L.LoraSettings())
    assert np.array_equal(draw(generator), plain)
    trainable = {name for name, p in generator.unet.named_parameters() if p.requires_grad}
    assert trainable == set(parameters) and trainable
    half = DiffusionGenerator.from_pretrained(tiny_model).unet.to(torch.bfloat16)
    assert {p.dtype for p in L.add_adapter(half, L.LoraSettings()).values()} == {torch.float32}


def test_inspect_reports_what_is_in_a_file(loras: dict[str, Path]) -> None:
    about = L.inspect(loras["plain"])
    assert about["base_model"] == "tiny" and about["format"] == "diffusers" and about["config"] == {"rank": 4}
    unet = about["parts"]["unet"]
    assert (unet["kind"], unet["ranks"], unet["alphas"]) == ("LoRA", [4], [2.0])
    assert unet["targets"] == ["conv1", "to_out.0", "to_q", "to_v"] and unet["norm"] > 0
    assert L.inspect(loras["dora"])["parts"]["unet"]["kind"] == "DoRA"


def test_a_full_disk_leaves_the_earlier_file(loras: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    file = L.save_lora(tmp_path / "lora.safetensors", load_file(loras["plain"]), {})
    before = file.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(L, "save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        L.save_lora(file, load_file(loras["other"]), {})
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
