"""The real scripts on a GPU, as users launch them: the losses of the CPU, half precision, exact numbers of steps on
resuming. Without a GPU all is skipped."""

from __future__ import annotations

import importlib.util
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

# Helpers beside this file; with pytest's importlib mode, conftest is no importable module.
_spec = importlib.util.spec_from_file_location("training_helpers", Path(__file__).with_name("conftest.py"))
assert _spec and _spec.loader
helpers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helpers)
logged, run = helpers.logged, helpers.run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

COMMON = ("--lr_warmup_steps", "1", "--report_to", "none", "--train_batch_size", "4", "--dataloader_num_workers", "2")
ADVERSARY = ("--discriminator_widths", "[16, 8]", "--discriminator_blocks", "[1, 1]", "--penalty_interval", "2")
PROMPTS = ("--validation_prompts", "[red handbag, blue watch]")
# script -> its flags, and the losses that are compared
SCRIPTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train_autoencoder.py": (
        ("--latent_channels", "4", "--half_channels", "8", "--quarter_channels", "16", "--eighth_channels", "16",
         "--encoder_blocks", "1", "--decoder_blocks", "1"),
        ("loss",),
    ),
    "train_diffusion.py": (
        ("--block_out_channels", "[32, 32]", "--captions_per_image", "2", "--num_inference_steps", "2", *PROMPTS),
        ("loss",),
    ),
    "train_gan.py": (
        ("--captions_per_image", "2", *ADVERSARY, "--generator_widths", "[16, 8]", "--generator_blocks", "[1, 1]",
         "--noise_dim", "8", "--style_dim", "16", "--augment", "fixed", *PROMPTS),
        ("loss", "discriminator_loss"),
    ),
    "train_vae.py": (
        ("--captions_per_image", "2", *ADVERSARY, "--widths", "[16, 8]", "--blocks", "[1, 1]", "--latent_dim", "2",
         "--adversarial_weight", "0.1", *PROMPTS),
        ("loss", "discriminator_loss"),
    ),
    "train_upscaler.py": (
        ("--channels", "16", "--blocks", "2", "--crop", "16", "--decoded_share", "0", "--num_validation_images", "2"),
        ("loss",),
    ),
    "distill.py": (
        ("--captions_per_image", "2", "--knots", "4", "--consistency_weight", "1", "--adversarial_weight", "0.1",
         *ADVERSARY, *PROMPTS),
        ("loss", "discriminator_loss"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gigdiff.models.autoencoder import ProductAutoencoder

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder")
    ProductAutoencoder(4, 8, 8, 8, 1, 1).save_pretrained(folder)
    return folder


def flags_of(script: str, catalogue: Path, autoencoder: Path, tiny_model: Path, cache: Path, out: Path) -> list[str]:
    flags = ["--train_data_dir", str(catalogue), "--output_dir", str(out), *COMMON, *SCRIPTS[script][0]]
    if script not in ("train_upscaler.py", "train_autoencoder.py"):
        flags += ["--cache_dir", str(cache)]
    if script in ("train_diffusion.py", "train_gan.py", "train_vae.py"):
        flags += ["--vae_name_or_path", str(autoencoder)]
    if script == "distill.py":
        flags += ["--teacher", str(tiny_model)]
    return flags


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_are_the_cpus_in_float32_and_near_them_in_bfloat16(
    script: str, catalogue: Path, autoencoder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    keys, logs = SCRIPTS[script][1], {}
    for name, precision, where in (("cpu", "no", "cpu"), ("cuda", "no", "cuda"), ("bf16", "bf16", "cuda")):
        flags = flags_of(script, catalogue, autoencoder, tiny_model, tmp_path / f"cache-{name}", tmp_path / name)
        steps = ("--max_train_steps", "4", "--checkpointing_steps", "2", "--validation_steps", "4")
        run(script, *flags, *steps, "--mixed_precision", precision, launch=True, on=where)
        logs[name] = logged(tmp_path / name, keys)
    for key in keys:
        cpu, cuda, bf16 = ([line[key] for line in logs[name]] for name in ("cpu", "cuda", "bf16"))
        assert len(cpu) == len(cuda) == len(bf16) == 4
        assert cuda[0] == pytest.approx(cpu[0], rel=5e-3, abs=1e-3), "the first step, from the same weights"
        assert bf16[0] == pytest.approx(cpu[0], rel=5e-2, abs=1e-2)
        assert all(math.isfinite(x) for x in cuda + bf16)


@pytest.mark.parametrize("script", ["train_diffusion.py", "train_gan.py", "distill.py"])
def test_a_run_resumes_on_the_gpu(
    script: str, catalogue: Path, autoencoder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """From a checkpoint of the CPU's: the next losses are those of the run that was not interrupted."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    steps = ("--checkpointing_steps", "2", "--validation_steps", "4", "--mixed_precision", "no")
    flags = [flags_of(script, catalogue, autoencoder, tiny_model, tmp_path / "cache", out) for out in (whole, resumed)]
    run(script, *flags[0], *steps, "--max_train_steps", "4", launch=True, on="cpu")
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    more = ("--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    run(script, *flags[1], *steps, *more, launch=True, on="cuda")
    for a, b in zip(logged(resumed, ("loss",)), logged(whole, ("loss",))[2:], strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_lora_is_trained_in_each_precision_and_its_weights_are_float32(
    precision: str, catalogue: Path, tiny_model: Path, tmp_path: Path
) -> None:
    flags: list[Any] = [
        "--pretrained_model_name_or_path", tiny_model, "--train_data_dir", catalogue, "--cache_dir", tmp_path / "cache",
        "--output_dir", tmp_path / "run", "--rank", "4", "--train_batch_size", "4", "--max_train_steps", "12",
        "--learning_rate", "0.01", "--validation_steps", "6", "--checkpointing_steps", "6", "--max_validation_samples",
        "4", "--num_inference_steps", "2", "--num_validation_images", "1", "--mixed_precision", precision,
        "--aspect_ratio_buckets", "false",
    ]  # fmt: skip
    run("finetune_lora.py", *map(str, flags), launch=True, on="cuda")
    log = logged(tmp_path / "run", ("loss", "grad_norm", "validation_loss"))
    assert [line["step"] for line in log] == list(range(1, 13))
    assert all(math.isfinite(line["loss"]) for line in log)
    tensors = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert all(t.dtype == torch.float32 for name, t in tensors.items() if "lora" in name)
    assert any(float(t.abs().max()) > 0 for name, t in tensors.items() if "lora_B" in name or "lora.up" in name)
    (tmp_path / "run" / "checkpoint-12").rename(tmp_path / "aside")
    run("finetune_lora.py", *map(str, flags), "--resume_from_checkpoint", "latest", launch=True, on="cuda")
    again = logged(tmp_path / "run", ("loss",))
    assert again[-1]["loss"] == pytest.approx(log[-1]["loss"], rel=2e-2)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", ["pipeline", "sdxl", "sd3", "flux"])
def test_every_familys_lora_is_trained_with_the_attention_of_the_gpu(
    family: str, precision: str, catalogue: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """--attention auto, which measures UNets' kernels there; previews are what `gigdiff.generate` draws."""
    import numpy as np
    from PIL import Image

    import gigdiff

    folder = request.getfixturevalue(f"tiny_{family}")
    flags: list[Any] = [
        "--pretrained_model_name_or_path", folder, "--train_data_dir", catalogue, "--cache_dir", tmp_path / "cache",
        "--output_dir", tmp_path / "run", "--rank", "4", "--train_batch_size", "4", "--max_train_steps", "6",
        "--learning_rate", "0.02", "--validation_steps", "6", "--checkpointing_steps", "3",
        "--max_validation_samples", "4", "--num_inference_steps", "2", "--num_validation_images", "1",
        "--mixed_precision", precision, "--resolution", "64", "--bucket_multiple", "16", "--validation_prompts",
        "[red box]",
    ]  # fmt: skip
    if family in ("sd3", "flux"):
        flags += ["--max_sequence_length", "32"]
    if family == "flux" and precision == "bf16":
        # With torch's own choice of kernel (2.11, H200) gradients of this tiny model were infinite or NaN, now and then
        # at the first step; by the plain kernel never. Not found out why: docs/lora.md.
        flags += ["--attention", "math"]
    run("finetune_lora.py", *map(str, flags), launch=True, on="cuda")
    log = logged(tmp_path / "run", ("loss", "validation_loss"))
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6] and all(math.isfinite(line["loss"]) for line in log)
    tensors = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert all(t.dtype == torch.float32 for name, t in tensors.items() if "lora" in name)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    run("finetune_lora.py", *map(str, flags), "--resume_from_checkpoint", "latest", launch=True, on="cuda")
    again = logged(tmp_path / "run", ("loss",))
    assert again[-1]["loss"] == pytest.approx(log[-1]["loss"], rel=2e-2)
    dtype = "float32" if precision == "no" else "bfloat16"
    drawn = gigdiff.generate(
        "red box", model=gigdiff.load(folder, dtype=dtype), lora=tmp_path / "run", seed=0, num_inference_steps=2,
        upscale=False, height=64, width=64,
    )  # fmt: skip
    with Image.open(tmp_path / "run" / "previews" / "step-000006" / "prompt-0-seed-0.png") as preview:
        difference = np.asarray(preview.convert("RGB"), float) - np.asarray(drawn, float)
    assert np.abs(difference).mean() < 2, "the GPU's kernels need not give the same bits twice"


def test_8bit_adam_trains_on_the_gpu_as_adam_does_and_keeps_bytes(
    catalogue: Path, tiny_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    logs = {}
    for name, more in (("plain", ()), ("8bit", ("--use_8bit_adam", "true"))):
        flags: list[Any] = [
            "--pretrained_model_name_or_path", tiny_model, "--train_data_dir", catalogue, "--cache_dir",
            tmp_path / "cache", "--output_dir", tmp_path / name, "--rank", "128", "--train_batch_size", "4",
            "--max_train_steps", "8", "--learning_rate", "0.002", "--validation_steps", "8", "--checkpointing_steps",
            "4", "--max_validation_samples", "4", "--num_inference_steps", "2", "--num_validation_images", "1",
            "--mixed_precision", "bf16", "--aspect_ratio_buckets", "false", *more,
        ]  # fmt: skip
        run("finetune_lora.py", *map(str, flags), launch=True, on="cuda")
        logs[name] = logged(tmp_path / name, ("loss",))
    for ours, theirs in zip(logs["8bit"], logs["plain"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.03)
    moments = load_file(tmp_path / "8bit" / "checkpoint-8" / "optimizer.safetensors")
    assert torch.uint8 in {t.dtype for t in moments.values()}
    shutil.rmtree(tmp_path / "8bit" / "checkpoint-8")
    run("finetune_lora.py", *map(str, flags), "--resume_from_checkpoint", "latest", launch=True, on="cuda")
    assert logged(tmp_path / "8bit", ("loss",))[-1]["loss"] == pytest.approx(logs["8bit"][-1]["loss"], rel=1e-3)


def test_a_recorded_unet_trains_as_the_plain_one_does(catalogue: Path, autoencoder: Path, tmp_path: Path) -> None:
    """--cuda_graphs: the same losses, step by step, and the weights of each step are those that the optimizer left."""
    logs = {}
    for precision in ("no", "bf16"):
        for recorded in ("true", "false"):
            out = tmp_path / f"{precision}-{recorded}"
            flags = flags_of("train_diffusion.py", catalogue, autoencoder, autoencoder, tmp_path / "cache", out)
            steps = ("--max_train_steps", "12", "--checkpointing_steps", "6", "--validation_steps", "6")
            more = ("--cuda_graphs", recorded, "--mixed_precision", precision, "--learning_rate", "0.003")
            done = run("train_diffusion.py", *flags, *steps, *more, launch=True, on="cuda")
            assert "without a CUDA graph" not in done.stderr
            logs[precision, recorded] = logged(out, ("loss", "grad_norm", "validation_loss"))
    for precision, near in (("no", 5e-3), ("bf16", 5e-2)):
        for ours, plain in zip(logs[precision, "true"], logs[precision, "false"], strict=True):
            assert ours.keys() == plain.keys()
            for key, value in plain.items():
                assert ours[key] == pytest.approx(value, rel=near), (precision, key)
        losses = [line["loss"] for line in logs[precision, "true"]]
        assert losses[-1] != pytest.approx(losses[0], rel=near), "weights that never change would give equal logs too"


def test_a_student_is_distilled_by_recorded_networks_as_by_plain_ones(
    catalogue: Path, autoencoder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Teacher, student, the network of its drawings and the discriminator's features, each by graphs of its own."""
    logs = {}
    for recorded in ("true", "false"):
        out = tmp_path / recorded
        flags = flags_of("distill.py", catalogue, autoencoder, tiny_model, tmp_path / "cache", out)
        terms = ("--distribution_weight", "1", "--distribution_updates", "2", "--distribution_warmup_steps", "2")
        steps = ("--max_train_steps", "8", "--checkpointing_steps", "8", "--validation_steps", "8")
        more = ("--cuda_graphs", recorded, "--mixed_precision", "no", "--learning_rate", "0.001")
        done = run("distill.py", *flags, *terms, *steps, *more, launch=True, on="cuda")
        assert "without a CUDA graph" not in done.stderr
        keys = ("loss", "grad_norm", "fake_loss", "matching_loss", "discriminator_loss", "validation_loss")
        logs[recorded] = logged(out, keys)
    for ours, plain in zip(logs["true"], logs["false"], strict=True):
        assert ours.keys() == plain.keys()
        for key, value in plain.items():
            assert ours[key] == pytest.approx(value, rel=2e-2, abs=1e-3), key
    losses = [line["fake_loss"] for line in logs["true"]]
    assert losses[-1] != pytest.approx(losses[0], rel=2e-2), "weights that never change would give equal logs too"
