"""training/train_upscaler.py at tiny size, in this process: it learns, resumes exactly, sharpens, refuses bad input."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gigdiff.errors import InputError, ModelMismatchError
from gigdiff.upscaling import load_upscaler

ROOT = Path(__file__).parents[2]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def script(name: str) -> object:
    spec = importlib.util.spec_from_file_location(name, ROOT / "training" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train() -> Callable[..., None]:
    module = script("train_upscaler")

    def call(out: Path, *flags: str) -> None:
        module.main(["--output_dir", str(out), *flags])  # type: ignore[attr-defined]

    return call


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Large and small files of the same products, in two folders."""
    roots = tmp_path_factory.mktemp("large"), tmp_path_factory.mktemp("small")
    for split, count in (("train", 12), ("validation", 3)):
        for root, (height, width) in zip(roots, ((160, 120), (40, 30)), strict=True):
            folder = root / split
            folder.mkdir()
            rows = []
            for i in range(count):
                y, x = np.mgrid[-1:1:160j, -0.75:0.75:120j]
                pixels = np.full((160, 120, 3), 255, np.uint8)
                pixels[(x**2 + y**2 < 0.3 + i / 40) & ((x * 12 + i).astype(int) % 2 == 0)] = (40 * (i % 6), 90, 120)
                image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
                image.save(folder / f"{i}.png")
                rows.append({"file_name": f"{i}.png", "id": f"{split}-{i}", "productDisplayName": f"thing {split} {i}"})
            (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return roots


@pytest.fixture(scope="module")
def flags(photos: tuple[Path, Path], tiny_model: Path) -> tuple[str, ...]:
    return (
        "--train_data_dir", str(photos[0]), "--small_data_dir", str(photos[1]),
        "--autoencoder", str(tiny_model / "vae"),
        "--height", "40", "--width", "32", "--crop", "16", "--channels", "8", "--blocks", "1",
        "--train_batch_size", "4", "--mixed_precision", "no", "--lr_warmup_steps", "1", "--report_to", "none",
        "--learning_rate", "5e-3", "--decoded_share", "0.1",
    )  # fmt: skip


@pytest.fixture(scope="module")
def first(train: Callable[..., None], flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("upscaler")
    train(
        out, *flags, "--max_train_steps", "120", "--checkpointing_steps", "60", "--validation_steps", "60",
        "--ema_decay", "0.8",
    )  # fmt: skip
    return out


def log(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def test_it_learns_and_beats_bicubic_on_true_pairs(first: Path):
    lines = log(first)
    assert lines[-1]["validation_psnr"] > lines[-1]["validation_bicubic_psnr"] > 15
    assert (first / "previews" / "step-000120.png").is_file()
    upscaler = load_upscaler(first / "upscaler", device="cpu")
    assert upscaler(np.zeros((1, 40, 32, 3), np.uint8)).shape == (1, 160, 128, 3)


def test_resuming_is_exact(train: Callable[..., None], first: Path, flags: tuple[str, ...], tmp_path: Path):
    out = tmp_path / "again"
    shutil.copytree(first, out)
    shutil.rmtree(out / "checkpoint-120")
    train(
        out, *flags, "--max_train_steps", "120", "--checkpointing_steps", "60", "--validation_steps", "60",
        "--ema_decay", "0.8", "--resume_from_checkpoint", "latest",
    )  # fmt: skip
    assert log(out) == log(first)
    ours, theirs = (load_file(folder / "upscaler" / WEIGHTS) for folder in (out, first))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_sharpening_goes_on_from_it_resumes_exactly_and_mixes(
    train: Callable[..., None], first: Path, flags: tuple[str, ...], tmp_path: Path
):
    more = (
        *flags, "--init_from", str(first / "upscaler"), "--adversarial_weight", "0.1", "--perceptual_weight", "0.5",
        "--blocks", "2", "--optimizer", "muon",
        "--discriminator_width", "4", "--discriminator_warmup_steps", "1", "--checkpointing_steps", "2",
        "--max_train_steps", "4", "--validation_steps", "4",
    )  # fmt: skip
    train(tmp_path / "a", *more)
    lines = log(tmp_path / "a")
    assert lines[0]["adversarial_share"] == 0 and 0 < lines[-1]["adversarial_share"] <= 1
    for line in lines:
        assert line["loss"] == pytest.approx(line["l1_loss"] + 0.5 * line["perceptual_loss"], rel=1e-5)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-4")
    train(tmp_path / "b", *more, "--resume_from_checkpoint", "latest")
    assert log(tmp_path / "b") == lines
    folder = tmp_path / "packed"
    script("package_upscaler").main(  # type: ignore[attr-defined]
        [
            "--fidelity",
            str(first / "upscaler"),
            "--sharp",
            str(tmp_path / "a" / "upscaler"),
            "--output_dir",
            str(folder),
        ]
    )
    assert json.loads((folder / "gigdiff.json").read_text())["family"] == "upscaler"
    assert "GFLOP" in (folder / "README.md").read_text()
    picture = np.random.default_rng(0).integers(0, 256, (1, 24, 16, 3), np.uint8)
    made = {f: load_upscaler(folder, f, "cpu")(picture).astype(int) for f in (0.0, 0.5, 1.0)}
    assert (made[1.0] == load_upscaler(folder / "fidelity", device="cpu")(picture)).all()
    assert (made[0.0] == load_upscaler(folder / "sharp", device="cpu")(picture)).all()
    assert (made[0.5] != made[1.0]).any()
    # A newer faithful network takes over what sharpening changed: new + (sharp - first), weight by weight.
    newer, moved = tmp_path / "b" / "upscaler", tmp_path / "moved"
    packed = ["--fidelity", str(newer), "--sharp", str(folder / "sharp"), "--sharp_base", str(folder / "fidelity")]
    script("package_upscaler").main([*packed, "--output_dir", str(moved)])  # type: ignore[attr-defined]
    new, old, sharp, result = (
        load_file(where / WEIGHTS) for where in (newer, folder / "fidelity", folder / "sharp", moved / "sharp")
    )
    for name, tensor in result.items():
        expected = new[name].float() + sharp[name].float() - old[name].float()
        assert torch.allclose(tensor.float(), expected, atol=1e-3) and tensor.dtype == torch.float16
    assert not torch.equal(result["body.0.conv1.weight"], sharp["body.0.conv1.weight"])


def test_mistakes(
    train: Callable[..., None], flags: tuple[str, ...], first: Path, photos: tuple[Path, Path], tmp_path: Path
):
    cases: list[tuple[tuple[str, ...], type[Exception], str]] = [
        (("--crop", "12"), InputError, "multiples of 8"),
        (("--degraded_share", "0.95"), InputError, "1 at most together"),
        (("--perceptual_weight", "-1"), InputError, "0 or more"),
        (("--adversarial_weight", "1"), InputError, "--init_from"),
        (("--init_from", str(first / "upscaler"), "--channels", "4"), ModelMismatchError, "must be the same"),
        (("--croq", "16"), InputError, "crop"),
    ]
    for extra, kind, words in cases:
        with pytest.raises(kind, match=words):
            train(tmp_path / "x", *flags, *extra)
