"""Saving memory: tiled and sliced decoding of pipelines, and who is told that offloading is not for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import gigdiff
from gigdiff.cli import main
from gigdiff.errors import InputError
from gigdiff.generators import diffusion
from gigdiff.generators.diffusion import PipelineGenerator
from gigdiff.provenance import read

ASKED = {"seed": 1, "num_inference_steps": 2, "height": 64, "width": 48}


def pixels(generator, **more) -> np.ndarray:
    return np.stack(
        [np.asarray(image) for image in gigdiff.generate(["coat", "bag"], model=generator, **ASKED, **more)]
    )


def test_tiles_and_slices_are_switched_on_and_draw_pictures_of_the_same_shape(tiny_pipeline: Path):
    plain = gigdiff.load(tiny_pipeline, device="cpu")
    tiled = gigdiff.load(tiny_pipeline, device="cpu", vae_tiling=True)
    sliced = gigdiff.load(tiny_pipeline, device="cpu", vae_slicing=True)
    modes = [(one.pipeline.vae.use_tiling, one.pipeline.vae.use_slicing) for one in (plain, tiled, sliced)]  # type: ignore[attr-defined]
    assert modes == [(False, False), (True, False), (False, True)]
    expected = pixels(plain)
    assert expected.shape == (2, 64, 48, 3)
    assert pixels(tiled).shape == expected.shape and not np.array_equal(pixels(tiled), expected), "seams are blended"
    assert np.abs(pixels(sliced).astype(int) - expected).max() <= 1


def test_an_autoencoder_without_tiles(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch):
    pipeline = PipelineGenerator.from_pretrained(tiny_pipeline).pipeline
    pipeline.vae = torch.nn.Identity()
    with pytest.raises(InputError, match="vae_tiling: StableDiffusionPipeline's Identity has no such mode"):
        diffusion._enable_on_vae(pipeline, "enable_tiling")


@pytest.mark.parametrize("option", [{"offload": "model"}, {"vae_tiling": True}, {"vae_slicing": True}])
def test_gigdiff_s_own_models_need_none_of_it(tiny_model: Path, option: dict):
    with pytest.raises(InputError, match=rf"{next(iter(option))}: .*own models.* not needed there, leave it out"):
        gigdiff.load(tiny_model, device="cpu", **option)


def test_offloading_needs_a_gpu(tiny_pipeline: Path):
    for offload in ("model", "sequential"):
        with pytest.raises(InputError, match=rf"offload='{offload}'.*CUDA GPU, and this runs on cpu"):
            gigdiff.load(tiny_pipeline, device="cpu", offload=offload)
    with pytest.raises(InputError, match='did you mean "sequential"'):
        gigdiff.load(tiny_pipeline, offload="sequentially")


def test_offloading_is_left_to_diffusers(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch):
    from diffusers import StableDiffusionPipeline

    calls = []
    for method in ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "to"):
        monkeypatch.setattr(
            StableDiffusionPipeline, method, lambda self, *_, method=method, **how: calls.append((method, how))
        )
    for offload in ("model", "sequential"):
        PipelineGenerator.from_pretrained(tiny_pipeline, device="cuda", offload=offload)
    how = {"device": "cuda"}
    assert calls == [("enable_model_cpu_offload", how), ("enable_sequential_cpu_offload", how)], "not moved as a whole"


def test_the_command(tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["generate", "coat", "-m", str(tiny_pipeline), "--seed", "1", "--steps", "2", "--device", "cpu", "--quiet"]
    words += ["--height", "32", "--width", "32", "-o", str(tmp_path), "--scheduler", "unipc"]
    assert main([*words, "--vae_tiling", "--vae_slicing"]) == 0
    assert read(tmp_path / "coat.png")["scheduler"] == "unipc"
    assert main([*words, "--offload", "model", "--overwrite"]) == 1
    assert "leave it out" in capsys.readouterr().err
    assert main([*words[:-1], "unipx"]) == 1
    assert 'did you mean "unipc"' in capsys.readouterr().err
