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
