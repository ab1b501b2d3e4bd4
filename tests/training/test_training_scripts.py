"""The real scripts at tiny size: they train, survive kill -9 exactly, stop politely, and refuse bad input clearly."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gigdiff

# Helpers beside this file; with pytest's importlib mode, conftest is no importable module.
_spec = importlib.util.spec_from_file_location("training_helpers", Path(__file__).with_name("conftest.py"))
assert _spec and _spec.loader
helpers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helpers)
ROOT, command, environment, logged, run = (
    helpers.ROOT, helpers.command, helpers.environment, helpers.logged, helpers.run,
)  # fmt: skip

AUTOENCODER = (
    "--latent_channels", "4", "--half_channels", "8", "--quarter_channels", "16", "--eighth_channels", "16",
    "--encoder_blocks", "1", "--decoder_blocks", "1", "--train_batch_size", "4", "--mixed_precision", "no",
    "--lr_warmup_steps", "2", "--report_to", "none",
)  # fmt: skip
DIFFUSION = (
    "--block_out_channels", "[32, 32]", "--train_batch_size", "4", "--captions_per_image", "2", "--report_to", "none",
    "--lr_warmup_steps", "2", "--mixed_precision", "no", "--num_inference_steps", "2",
    "--validation_prompts", "[red handbag, blue watch]",
)  # fmt: skip


@pytest.fixture(scope="module")
def autoencoder(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of train_autoencoder.py through `accelerate launch`."""
    out = tmp_path_factory.mktemp("autoencoder")
    run(
        "train_autoencoder.py", "--train_data_dir", str(catalogue), "--output_dir", str(out), *AUTOENCODER,
        "--max_train_steps", "40", "--validation_steps", "20", "--checkpointing_steps", "20", launch=True,
    )  # fmt: skip
    return out


def test_the_autoencoder_learns_and_is_saved_with_unit_latents(autoencoder: Path, catalogue: Path) -> None:
    log = logged(autoencoder)
    assert [line["step"] for line in log] == list(range(1, 41))
    assert log[-1]["validation_psnr"] > 19
    assert sum(x["loss"] for x in log[-5:]) < sum(x["loss"] for x in log[:5])
    assert (autoencoder / "previews" / "step-000040.png").is_file()
    assert sorted(p.name for p in autoencoder.glob("checkpoint-*")) == ["checkpoint-20", "checkpoint-40"]
    from gigdiff.data import load_products
    from gigdiff.images import fit_image, to_model
    from gigdiff.models.autoencoder import ProductAutoencoder

    vae = ProductAutoencoder.from_pretrained(autoencoder / "autoencoder")
    import numpy as np

    pixels = np.stack([fit_image(r.image, 80, 64) for r in load_products(str(catalogue))])  # type: ignore[arg-type]
    with torch.no_grad():
        latents = vae.encode(to_model(pixels)).latent_dist.mode()  # type: ignore[union-attr]
    assert latents.shape == (24, 4, 10, 8)
    assert latents.std((0, 2, 3)).sub(1).abs().max() < 0.05 and latents.mean((0, 2, 3)).abs().max() < 0.05


def test_sharpening_trains_the_decoder_and_leaves_the_encoder_alone(
    autoencoder: Path, catalogue: Path, tmp_path: Path
) -> None:
    run(
        "train_autoencoder.py", "--train_data_dir", str(catalogue), "--output_dir", str(tmp_path), *AUTOENCODER,
        "--init_from", str(autoencoder / "autoencoder"), "--decoder_only", "true", "--adversarial_weight", "0.03",
        "--perceptual_weight", "0.1",
        "--discriminator_warmup_steps", "1", "--max_train_steps", "4", "--validation_steps", "4",
        "--checkpointing_steps", "2",
    )  # fmt: skip
    before, after = (
        load_file(p / "autoencoder" / "diffusion_pytorch_model.safetensors") for p in (autoencoder, tmp_path)
    )
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}
    assert all(line["perceptual_loss"] > 0 for line in logged(tmp_path, ("perceptual_loss",)))
    assert {p.name for p in (tmp_path / "checkpoint-4").iterdir()} >= {"discriminator.safetensors", "model.safetensors"}


def test_the_decoder_learns_from_latents_as_a_unet_leaves_them() -> None:
    """`as_drawn` against Gaussian latents, whose mean given noisy ones is known; other photos keep their own noise."""
    spec = importlib.util.spec_from_file_location("train_autoencoder", ROOT / "training" / "train_autoencoder.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    from gigdiff.diffusion import alpha_beta, log_sigmas, timesteps_of
    from gigdiff.fit.teacher import Teacher
    from gigdiff.models.autoencoder import ProductAutoencoder

    table = log_sigmas(torch.linspace(0.9999, 0.002, 1000))
    torch.manual_seed(0)
    model = ProductAutoencoder(4, 8, 16, 16, 1, 1, posterior_std=0.1)
    model.set_latent_statistics(torch.arange(4.0), torch.tensor([0.5, 1.0, 2.0, 4.0]))
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    level = torch.tensor([-1.5, -0.5, 0.5])
    chances = script.Chances(torch.randn(3, 4, 2, 2), torch.tensor([True, False, True]), level)

    def unet(z: torch.Tensor, t: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        """v of the best guess at N(0, 1) latents: alpha z."""
        torch.testing.assert_close(t, timesteps_of(level[[0, 2]], table))
        alpha, beta = alpha_beta(level[[0, 2]], z)
        return ((alpha * z - alpha * z) / beta,)

    noise = script.as_drawn(model, Teacher(unet, torch.zeros(1, 2, 3), 1.0, table), pixels, chances)
    torch.testing.assert_close(noise[1], chances.noise[1])
    _, raw = model(pixels)
    seen = raw + 0.1 * noise  # what the decoder is given
    alpha, beta = alpha_beta(level, raw)
    clean = (raw - model.latents_mean) / model.latents_std
    expected = alpha * (alpha * clean + beta * chances.noise) * model.latents_std + model.latents_mean
    torch.testing.assert_close(seen[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-5)


def test_a_decoder_is_trained_on_what_mini_draws_and_only_on_its_own_latents(
    autoencoder: Path, catalogue: Path, tmp_path: Path
) -> None:
    from gigdiff.pretrained import folder_of

    flags = (
        "train_autoencoder.py", "--train_data_dir", str(catalogue), "--output_dir", str(tmp_path), "--denoiser", "mini",
        "--train_batch_size", "4", "--mixed_precision", "no", "--report_to", "none", "--max_train_steps", "1",
    )  # fmt: skip
    mini = folder_of("mini") / "vae"
    run(*flags, "--init_from", str(mini), "--decoder_only", "true")
    before, after = (load_file(p / "diffusion_pytorch_model.safetensors") for p in (mini, tmp_path / "autoencoder"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed == {"decoder"}
    other = ("--init_from", str(autoencoder / "autoencoder"), "--decoder_only", "true", *AUTOENCODER[:12])
    for more, message in ((other, "--denoiser mini draws other latents than --init_from"), ((), "--decoder_only true")):
        done = subprocess.run(command(*flags, *more), capture_output=True, text=True, cwd=ROOT, env=environment())
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def diffusion_flags(catalogue: Path, autoencoder: Path, cache: Path, out: Path, steps: int) -> list[str]:
    return [
        "--train_data_dir", str(catalogue), "--vae_name_or_path", str(autoencoder / "autoencoder"), "--cache_dir",
        str(cache), "--output_dir", str(out), "--max_train_steps", str(steps), "--validation_steps", "10",
        "--preview_steps", "100", "--checkpointing_steps", "5", *DIFFUSION,
    ]  # fmt: skip


def test_kill_nine_and_resume_gives_the_uninterrupted_run_bit_for_bit(
    autoencoder: Path, catalogue: Path, tmp_path: Path
) -> None:
    """The losses, gradient norms, held-out losses and final weights; then the saved model draws."""
    whole, killed, cache = tmp_path / "whole", tmp_path / "killed", tmp_path / "cache"
    steps = 40
    run("train_diffusion.py", *diffusion_flags(catalogue, autoencoder, cache, whole, steps), launch=True)
    encoded = sorted(cache.glob("*/shard-*"))

    flags = diffusion_flags(catalogue, autoencoder, cache, killed, steps)
    helpers.killed_and_resumed("train_diffusion.py", *flags, out=killed)

    assert logged(killed) == logged(whole)
    assert [line["step"] for line in logged(whole)] == list(range(1, steps + 1))
    last = f"checkpoint-{steps}"
    assert helpers.same_checkpoints(whole / last, killed / last, ("unet", "ema", "optimizer"))
    assert (whole / "previews" / f"step-{steps:06d}.png").read_bytes() == (
        killed / "previews" / f"step-{steps:06d}.png"
    ).read_bytes()

    # Nothing was encoded a second time.
    assert encoded and sorted(cache.glob("*/shard-*")) == encoded
    # The saved folder is a model like any other.
    image = gigdiff.generate("red handbag", model=str(whole / "model"), seed=1, upscale=False)
    assert image.size == (64, 80)  # type: ignore[union-attr]


def test_a_wider_latent_space_starts_from_a_trained_one(autoencoder: Path, catalogue: Path, tmp_path: Path) -> None:
    """Autoencoder and UNet with more channels, each from its narrower self: no fall back to the start."""
    wider = [*AUTOENCODER, "--train_data_dir", str(catalogue), "--output_dir", str(tmp_path / "wide")]
    wider[wider.index("--latent_channels") + 1] = "6"
    last = ("--validation_steps", "1", "--max_train_steps", "1")
    run("train_autoencoder.py", *wider, "--init_from", str(autoencoder / "autoencoder"), *last)
    narrow, wide = (logged(folder)[-1]["validation_psnr"] for folder in (autoencoder, tmp_path / "wide"))
    assert abs(narrow - wide) < 1.0

    cache, four, six = tmp_path / "cache", tmp_path / "four", tmp_path / "six"
    run("train_diffusion.py", *diffusion_flags(catalogue, autoencoder, cache, four, 40))
    run(
        "train_diffusion.py", *diffusion_flags(catalogue, tmp_path / "wide", cache, six, 1), *last,
        "--init_from", str(four / "model" / "unet"),
    )  # fmt: skip
    # The two new channels start untrained (error about 1), the four old ones as good as they were.
    expected = (4 * logged(four)[-1]["validation_loss"] + 2 * 1.0) / 6
    assert logged(six)[-1]["validation_loss"] == pytest.approx(expected, rel=0.2)

    refused = [*wider, "--decoder_only", "true", "--init_from", str(autoencoder / "autoencoder")]
    done = subprocess.run(
        command("train_autoencoder.py", *refused), capture_output=True, text=True, cwd=ROOT, env=environment()
    )
    assert done.returncode == 1 and "4 latent channels and --latent_channels is 6" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_sigterm_saves_a_checkpoint_and_ends_cleanly(autoencoder: Path, catalogue: Path, tmp_path: Path) -> None:
    flags = [
        "--train_data_dir", str(catalogue), "--output_dir", str(tmp_path), *AUTOENCODER, "--max_train_steps", "100000",
        "--validation_steps", "100000", "--checkpointing_steps", "100000",
    ]  # fmt: skip
    process = subprocess.Popen(
        command("train_autoencoder.py", *flags), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "--resume_from_checkpoint latest" in errors
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert json.loads((checkpoint / "state.json").read_text())["step"] == len(logged(tmp_path))


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("train_autoencoder.py", [], "--train_data_dir"),
        ("train_diffusion.py", ["--learning_rat", "1"], 'did you mean "learning_rate"'),
        ("train_diffusion.py", ["--train_data_dir", "x", "--height", "81"], "--height=81 is not a multiple of 8"),
        ("train_diffusion.py", ["--train_data_dir", "x", "--vae_name_or_path", "nowhere"], "no autoencoder in nowhere"),
        ("train_autoencoder.py", ["--mixed_precision", "fp8"], "mixed_precision"),
    ],
)
def test_bad_flags_are_one_line_and_no_traceback(script: str, flags: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run(command(script, *flags), capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")


def test_a_checkpoint_of_another_architecture_is_refused(autoencoder: Path, catalogue: Path, tmp_path: Path) -> None:
    flags = [
        "--train_data_dir", str(catalogue), "--output_dir", str(tmp_path), *AUTOENCODER, "--quarter_channels", "24",
        "--resume_from_checkpoint", str(autoencoder / "checkpoint-40"), "--max_train_steps", "50",
    ]  # fmt: skip
    done = subprocess.run(
        command("train_autoencoder.py", *flags), capture_output=True, text=True, cwd=ROOT, env=environment()
    )
    assert done.returncode == 1 and "another architecture" in done.stderr


#: The benchmark's are tested in tests/test_benchmark.py.
TRAINING_CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if not path.name.startswith("bench_")]


@pytest.mark.parametrize("config", TRAINING_CONFIGS, ids=lambda p: p.name)
def test_every_config_parses_against_the_script_it_names(config: Path) -> None:
    """Each file's header shows its launch command; the script it names must take every key."""
    from gigdiff.fit.config import parse_config

    header = config.read_text(encoding="utf-8")
    script = header.split("training/")[1].split(".py")[0]
    assert f"--config configs/{config.name}" in header
    spec = importlib.util.spec_from_file_location(script, ROOT / "training" / f"{script}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[script] = module
    spec.loader.exec_module(module)
    places = (script, "gigdiff.fit.lora_config")
    (config_class,) = [v for k, v in vars(module).items() if k.endswith("Config") and v.__module__ in places]
    parse_config(config_class, "test", ["--config", str(config)])
