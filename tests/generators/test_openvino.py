"""Networks compiled by OpenVINO draw what torch draws, alone or in a batch, and are converted once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gigdiff
from gigdiff import openvino_backend
from gigdiff.cli import main
from gigdiff.errors import InputError, MissingDependencyError
from gigdiff.generators.request import GenerationRequest

pytest.importorskip("openvino", reason='needs pip install "gigdiff[openvino]"')
pytest.importorskip("nncf", reason='needs pip install "gigdiff[openvino]"')

PROMPTS = ("red handbag", "blue watch", "green shoe")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("compiled")
        patch.setenv("GIGDIFF_CACHE_DIR", str(folder))
        yield folder


def draw(generator: Any, prompts: tuple[str, ...] = PROMPTS, first_seed: int = 0, **settings: Any) -> np.ndarray:
    seeds = tuple(range(first_seed, first_seed + len(prompts)))
    return generator.generate(GenerationRequest(prompts, seeds, num_inference_steps=3, **settings)).images


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-3, ((a.astype(float) - b) ** 2).mean())))


def test_it_draws_what_torch_draws_alone_or_in_a_batch(tiny_model: Path) -> None:
    """In float32 to a grey level; with guidance (two rows an image) and without, at another size too."""
    reference = gigdiff.load(tiny_model, dtype="float32")
    generator = gigdiff.load(tiny_model, backend="openvino", dtype="float32")
    for settings in ({}, {"guidance_scale": 1.0}, {"height": 64, "width": 96}):
        images = draw(generator, **settings)
        assert np.abs(images.astype(int) - draw(reference, **settings)).max() <= 1
        for i, prompt in enumerate(PROMPTS):
            assert np.array_equal(draw(generator, (prompt,), i, **settings)[0], images[i])
    assert draw(reference).std() > 5, "there is something to see"


def test_a_lower_precision_stays_close(tiny_model: Path) -> None:
    """bfloat16 keeps timesteps apart (their sinusoids stay out of it); int8 is further off, and not the same."""
    reference = draw(gigdiff.load(tiny_model, dtype="float32"), guidance_scale=1.0)
    close, coarse = (
        psnr(draw(gigdiff.load(tiny_model, backend="openvino", dtype=precision), guidance_scale=1.0), reference)
        for precision in (openvino_backend.default_precision(), "int8")
    )
    assert close > 40 and 30 < coarse < close


def test_int8_leaves_alone_the_ends_and_the_steps_that_magnify_its_error(tiny_model: Path) -> None:
    """With every step in int8 `mini` drew another product one time in nine."""
    plain, int8 = (gigdiff.load(tiny_model, backend="openvino", dtype=dtype) for dtype in (None, "int8"))

    def drawn(generator: Any, prompts: tuple[str, ...] = PROMPTS, first: int = 0, **settings: Any) -> Any:
        seeds = tuple(range(first, first + len(prompts)))
        return generator.generate(GenerationRequest(prompts, seeds, **settings))

    for settings in ({"num_inference_steps": 6}, {"num_inference_steps": 2, "guidance_scale": 1.0}):
        result = drawn(int8, **settings)
        assert np.array_equal(result.images, drawn(plain, **settings).images)
        assert "int8 had nothing to do" in result.notes[0]
    reused = {"num_inference_steps": 6, "guidance_reuse": 8}
    result = drawn(int8, **reused)
    assert not result.notes and 30 < psnr(result.images, drawn(plain, **reused).images) < 60
    for i, prompt in enumerate(PROMPTS):
        assert np.array_equal(drawn(int8, (prompt,), i, **reused).images[0], result.images[i])


def test_int8_is_fitted_to_a_second_size_too(tiny_model: Path, cache: Path) -> None:
    """The networks of the first size were asked for inputs of the second."""
    generator = gigdiff.load(tiny_model, backend="openvino", dtype="int8")
    for height, width in ((80, 64), (64, 96)):
        assert draw(generator, height=height, width=width, guidance_scale=1.0).shape == (3, height, width, 3)


def test_int8_leaves_the_first_and_last_layers_alone(tiny_model: Path, cache: Path) -> None:
    """conv_in in int8 rounds the noise itself: half of the error of a pass came from it."""
    draw(gigdiff.load(tiny_model, backend="openvino", dtype="int8"), guidance_scale=1.0)
    folder = next((cache / "openvino").glob("*-unet-int8-*"))
    operators = openvino_backend.imported().Core().read_model(folder / "model.xml").get_ops()
    in_int8 = {
        operator.get_friendly_name()
        for operator in operators
        if operator.get_type_name() in ("Convolution", "MatMul")
        and operator.input_value(0).get_node().get_type_name() == "FakeQuantize"
    }
    assert any("resnets" in name for name in in_int8)
    assert not any(part in name for name in in_int8 for part in ("conv_in", "conv_out", "time_embedding"))


@pytest.mark.slow
def test_the_benchmark_of_runtimes_measures_each(tiny_model: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "runtimes.py"
    command = [sys.executable, str(script), "--model", str(tiny_model), "--rows", "2", "--repeats", "2"]
    done = subprocess.run([*command, "--left_out", "nothing"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["runtime"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}
    assert rows["OpenVINO, float32"]["error"] == 0 < rows["OpenVINO, int8 but nothing"]["error"] < 0.5
    assert all(row["ms, 2 rows"][1] <= row["ms, 2 rows"][0] <= row["ms, 2 rows"][2] for row in rows.values())


def test_timesteps_are_not_rounded() -> None:
    """In bfloat16 999 is 1000 and 501 is 500: the network is handed sinusoids of the exact ones."""
    generator: Any = gigdiff.load("mini-turbo", backend="openvino")
    generator._compiled_now = generator._compile(80, 64)
    condition = generator._embedding("red coat").condition()
    z = torch.randn(1, 16, 10, 8, generator=torch.Generator().manual_seed(0))
    exact: Any = gigdiff.load("mini-turbo", dtype="float32")
    with torch.no_grad():
        for t in (251, 501, 999):
            found, wanted = (g._unet(z, torch.tensor(t), condition) for g in (generator, exact))
            assert ((found - wanted).square().mean() / wanted.var()).sqrt() < 0.03


def test_with_a_lora_torch_draws(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    plain: Any = gigdiff.load(tiny_model)
    plain.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    plain.unet.save_lora_adapter(tmp_path, weight_name="raw.safetensors")
    lora = str(tmp_path / "lora.safetensors")
    save_file({f"unet.{key}": value for key, value in load_file(tmp_path / "raw.safetensors").items()}, lora)
    generator = gigdiff.load(tiny_model, backend="openvino")
    without = draw(generator)
    assert np.array_equal(draw(generator, lora=lora), draw(gigdiff.load(tiny_model), lora=lora))
    assert np.array_equal(draw(generator), without)
    assert not np.array_equal(draw(generator, lora=lora), without)


def test_it_is_converted_once_for_the_same_weights(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIGDIFF_CACHE_DIR", str(tmp_path / "cache"))
    made = []
    convert = openvino_backend._converted
    monkeypatch.setattr(openvino_backend, "_converted", lambda *a: (made.append(1), convert(*a))[1])
    first = draw(gigdiff.load(tiny_model, backend="openvino", dtype="float32"))
    assert len(made) == 2, "UNet and decoder"
    assert np.array_equal(draw(gigdiff.load(tiny_model, backend="openvino", dtype="float32")), first)
    assert len(made) == 2
    other = tmp_path / "other" / tiny_model.name
    shutil.copytree(tiny_model, other)
    weights = next((other / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["conv_out.bias"] += 0.5
    save_file(tensors, weights, metadata={"format": "pt"})
    changed = draw(gigdiff.load(other, backend="openvino", dtype="float32"))
    assert len(made) == 3, "the UNet anew, the decoder is the same"
    assert not np.array_equal(changed, first)


def test_a_cache_that_cant_be_written_is_no_obstacle(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("GIGDIFF_CACHE_DIR", str(tmp_path / "file" / "cache"))
    draw(gigdiff.load(tiny_model, backend="openvino"), PROMPTS[:1])
    assert "can't be kept in" in caplog.text


def test_what_makes_no_sense_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="backend='openvin' is unknown; did you mean \"openvino\""):
        gigdiff.load(tiny_model, backend="openvin")
    with pytest.raises(InputError, match="dtype='int4' is unknown to backend=\"openvino\""):
        gigdiff.load(tiny_model, backend="openvino", dtype="int4")
    with pytest.raises(InputError, match='dtype="int8" needs backend="openvino"'):
        gigdiff.load(tiny_model, dtype="int8")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "gigdiff\[openvino\]"'):
        gigdiff.load(tiny_model, backend="openvino")


def test_a_pipeline_is_refused(tiny_pipeline: Path) -> None:
    with pytest.raises(InputError, match='backend="openvino" is for gigdiff\'s own diffusion models'):
        gigdiff.load(tiny_pipeline, backend="openvino")


def test_nothing_is_sent_to_anyone(tiny_model: Path) -> None:
    """The package that reports to Google Analytics is never loaded, nor does nncf report."""
    code = f"""
import sys, gigdiff
from gigdiff.generators.request import GenerationRequest
request = GenerationRequest(("red bag",), (0,), guidance_scale=1.0)
gigdiff.load({str(tiny_model)!r}, backend="openvino", dtype="int8").generate(request)
assert sys.modules["openvino_telemetry"] is None
from nncf.telemetry.wrapper import telemetry, NNCFTelemetryStub
assert isinstance(telemetry, NNCFTelemetryStub)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_command_line_takes_it_and_the_file_says_so(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With it the picture is drawn again bit for bit."""
    common = ["generate", "red handbag", "--model", str(tiny_model), "--seed", "3", "--steps", "2", "--no-upscale"]
    for out, more in (("torch", []), ("openvino", ["--backend", "openvino"])):
        status = main([*common, "--quiet", "--output", str(tmp_path / out), "--dtype", "float32", *more])
        assert status == 0
    from PIL import Image

    drawn = tmp_path / "openvino" / "red-handbag.png"
    assert Image.open(drawn).info["backend"] == "openvino float32"
    assert "backend" not in Image.open(tmp_path / "torch" / "red-handbag.png").info
    assert main(["inspect", str(drawn), "--regenerate", str(tmp_path / "again.png")]) == 0
    assert "identical: all" in capsys.readouterr().out
    a, b = (np.asarray(Image.open(tmp_path / out / "red-handbag.png")).astype(int) for out in ("torch", "openvino"))
    assert np.abs(a - b).max() <= 1
