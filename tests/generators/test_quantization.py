"""Pipelines whose weights are one byte each (torchao)."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import gigdiff
from gigdiff.errors import CapabilityError, InputError, MissingDependencyError
from gigdiff.inspection import redraw
from gigdiff.provenance import read, save

ASKED = {"seed": 1, "num_inference_steps": 2, "height": 64, "width": 48}
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason='needs pip install "gigdiff[quantization]"')


def linears(network: torch.nn.Module) -> list[torch.nn.Linear]:
    return [m for m in network.modules() if isinstance(m, torch.nn.Linear)]


@needs_torchao
@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_weights_are_rounded_by_the_row_and_pictures_stay_near(dtype: str, tiny_pipeline: Path) -> None:
    plain, quantized = gigdiff.load(tiny_pipeline, "cpu"), gigdiff.load(tiny_pipeline, "cpu", dtype)
    before, after = linears(plain.pipeline.unet), linears(quantized.pipeline.unet)  # type: ignore[attr-defined]
    assert len(before) == len(after) > 10
    # int8: 127 steps to the greatest of a row. float8 (e4m3): three bits of a number's own size.
    for a, b in zip(before, after, strict=True):
        error = (a.weight - b.weight.dequantize()).abs()
        greatest = a.weight.abs().amax(1, keepdim=True)
        allowed = greatest / 127 / 2 if dtype == "int8" else a.weight.abs() / 16 + greatest / 448 / 2**6
        assert (error <= allowed * 1.01).all() and error.max() > 0
    assert all(type(m.weight.data) is torch.Tensor for m in linears(quantized.pipeline.text_encoder))  # type: ignore[attr-defined]
    exact, near = (np.asarray(gigdiff.generate("bag", model=m, **ASKED)).astype(int) for m in (plain, quantized))
    assert 0 < np.abs(exact - near).mean() < 0.1 * np.abs(exact - exact.mean()).mean()


@needs_torchao
def test_a_t5_is_rounded_too(tiny_flux: Path) -> None:
    pipeline = gigdiff.load(tiny_flux, "cpu", "int8").pipeline  # type: ignore[attr-defined]
    rounded = {
        part: any(type(m.weight.data) is not torch.Tensor for m in linears(getattr(pipeline, part)))
        for part in ("transformer", "text_encoder", "text_encoder_2")
    }
    assert rounded == {"transformer": True, "text_encoder": False, "text_encoder_2": True}


@needs_torchao
def test_the_file_says_so_and_is_drawn_again_bit_by_bit(tiny_pipeline: Path, tmp_path: Path) -> None:
    picture = gigdiff.generate("bag", model=gigdiff.load(tiny_pipeline, "cpu", "int8"), **ASKED)
    path = save(tmp_path / "bag.png", picture, picture.info)
    assert read(path)["backend"] == "torch int8"
    again, _ = redraw(path)
    assert np.array_equal(np.asarray(again), np.asarray(picture))


@needs_torchao
def test_a_lora_is_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="lora"):
        gigdiff.generate("bag", model=gigdiff.load(tiny_pipeline, "cpu", "int8"), lora=tmp_path, **ASKED)


def test_what_is_missing_or_meant_otherwise(
    tiny_pipeline: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(MissingDependencyError, match=r'"int8" needs torchao: pip install "gigdiff\[quantization\]"'):
        gigdiff.load(tiny_pipeline, "cpu", "int8")
    with pytest.raises(InputError, match='needs backend="openvino" for gigdiff\'s own models'):
        gigdiff.load(tiny_model, "cpu", "int8")
    with pytest.raises(InputError, match="'float8' is unknown"):
        gigdiff.load(tiny_model, "cpu", "float8")
