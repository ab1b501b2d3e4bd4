"""training/distill.py at tiny size: it resumes exactly, nears its teacher's path, and loads where it should."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gigdiff
from gigdiff.consistency import knot_timesteps, path_levels, path_points
from gigdiff.diffusion import log_sigmas
from gigdiff.errors import InputError
from gigdiff.fit.teacher import Teacher
from gigdiff.lora import adaptable, extract

# Helpers beside this file; with pytest's importlib mode, conftest is no importable module.
_spec = importlib.util.spec_from_file_location("training_helpers", Path(__file__).with_name("conftest.py"))
assert _spec and _spec.loader
helpers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helpers)
_spec = importlib.util.spec_from_file_location("distill", helpers.ROOT / "training" / "distill.py")
assert _spec and _spec.loader
distill = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = distill  # dataclasses look their module up
_spec.loader.exec_module(distill)

STEPS = 24
KEYS = ("loss", "grad_norm", "validation_loss", "validation_one_step_error")


def flags(teacher: Path, catalogue: Path, cache: Path, out: Path) -> list[str]:
    return [
        "--teacher", str(teacher), "--train_data_dir", str(catalogue), "--cache_dir", str(cache), "--output_dir",
        str(out), "--max_train_steps", str(STEPS), "--validation_steps", "5", "--preview_steps", "100",
        "--checkpointing_steps", "5", "--train_batch_size", "8", "--captions_per_image", "2", "--report_to", "none",
        "--lr_warmup_steps", "2", "--knots", "4", "--guidance_scale", "2", "--learning_rate", "3e-4",
        "--ema_decay", "0.8", "--validation_prompts", "[red handbag, blue watch]",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny_model: Path, catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(cache, run folder) of an uninterrupted run through `accelerate launch`."""
    root = tmp_path_factory.mktemp("distill")
    helpers.run("distill.py", *flags(tiny_model, catalogue, root / "cache", root / "whole"), launch=True)
    return root / "cache", root / "whole"


def test_kill_nine_and_resume_gives_the_uninterrupted_run_bit_for_bit(
    whole: tuple[Path, Path], tiny_model: Path, catalogue: Path, tmp_path: Path
) -> None:
    cache, run = whole
    killed = tmp_path / "killed"
    helpers.killed_and_resumed("distill.py", *flags(tiny_model, catalogue, cache, killed), out=killed)
    assert helpers.logged(killed, KEYS) == helpers.logged(run, KEYS)
    last = f"checkpoint-{STEPS}"
    assert helpers.same_checkpoints(run / last, killed / last, ("unet", "ema", "optimizer"))


def test_the_student_nears_the_end_of_its_teachers_path(whole: tuple[Path, Path]) -> None:
    measured = [line for line in helpers.logged(whole[1], KEYS) if "validation_loss" in line]
    assert measured[-1]["validation_one_step_error"] < 0.8 * measured[0]["validation_one_step_error"]


def test_the_student_is_a_model_that_draws_in_its_own_number_of_steps(whole: tuple[Path, Path]) -> None:
    folder = whole[1] / "model"
    card = json.loads((folder / "gigdiff.json").read_text())
    assert (card["num_inference_steps"], card["guidance_scale"], card["baked_guidance"]) == (4, 1.0, 2.0)
    generator = gigdiff.load(folder)
    assert type(generator.scheduler).__name__ == "LCMScheduler"  # type: ignore[attr-defined]
    alone = gigdiff.generate("red handbag", model=generator, seed=3)
    batch = gigdiff.generate(["blue watch", "red handbag"], model=generator, seed=3)
    assert alone.tobytes() == batch[1].tobytes()  # type: ignore[union-attr, index]
    one = gigdiff.generate("red handbag", model=generator, seed=3, num_inference_steps=1)
    assert one.tobytes() != alone.tobytes()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def adversarial(
    whole: tuple[Path, Path], tiny_model: Path, catalogue: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """(flags, run folder) of an uninterrupted run: a discriminator at the noisiest knot, guidance at the others."""
    more = (
        "--adversarial_weight", "1", "--adversarial_knots", "1", "--guidance_weight", "1", "--consistency_weight", "0",
        "--discriminator_widths", "[16, 16]", "--penalty_interval", "2", "--learning_rate", "2e-3",
    )  # fmt: skip
    run = tmp_path_factory.mktemp("adversarial")
    helpers.run("distill.py", *flags(tiny_model, catalogue, whole[0], run), *more)
    return list(more), run


def test_a_discriminator_brings_the_student_nearer_to_the_photos(adversarial: tuple[list[str], Path]) -> None:
    measured = [line for line in helpers.logged(adversarial[1], (*KEYS, "validation_distance")) if len(line) > 4]
    assert measured[-1]["validation_distance"] < 0.7 * measured[0]["validation_distance"]


def test_a_killed_adversarial_run_resumes_bit_for_bit(
    adversarial: tuple[list[str], Path], whole: tuple[Path, Path], tiny_model: Path, catalogue: Path, tmp_path: Path
) -> None:
    more, run = adversarial
    killed, keys = tmp_path / "killed", (*KEYS, "discriminator_loss", "penalty", "r_t", "validation_distance")
    helpers.killed_and_resumed("distill.py", *flags(tiny_model, catalogue, whole[0], killed), *more, out=killed)
    assert helpers.logged(killed, keys) == helpers.logged(run, keys)
    parts = ("unet", "ema", "optimizer", "discriminator", "discriminator_optimizer")
    assert helpers.same_checkpoints(run / f"checkpoint-{STEPS}", killed / f"checkpoint-{STEPS}", parts)


@pytest.fixture(scope="module")
def matched(
    whole: tuple[Path, Path], tiny_model: Path, catalogue: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """(flags, run folder) of an uninterrupted run of distribution matching: of a LoRA, from another student's UNet."""
    more = (
        "--distribution_weight", "1", "--consistency_weight", "0", "--knots", "1", "--num_inference_steps", "1",
        "--student", str(whole[1] / "model"), "--distribution_updates", "2", "--distribution_warmup_steps", "10",
        "--distribution_learning_rate", "1e-3", "--unet_of", str(tiny_model), "--rank", "2",
    )  # fmt: skip
    run = tmp_path_factory.mktemp("matched")
    helpers.run("distill.py", *flags(tiny_model, catalogue, whole[0], run), *more)
    return list(more), run


def test_matching_moves_the_student_from_where_it_was_told_to_start(
    matched: tuple[list[str], Path], whole: tuple[Path, Path]
) -> None:
    run = matched[1]
    measured = [line["validation_distance"] for line in helpers.logged(run, ("validation_distance",)) if len(line) > 1]
    assert measured[0] == measured[1] != measured[-1]  # after 5 and 10 steps it has not moved
    card = json.loads((run / "model" / "gigdiff.json").read_text())
    assert (card["num_inference_steps"], card["baked_guidance"]) == (1, 2.0)


def test_a_student_of_a_rank_is_its_bases_unet_with_a_lora_of_that_rank(
    matched: tuple[list[str], Path], tiny_model: Path, tmp_path: Path
) -> None:
    model = matched[1] / "model"
    _, share = extract(model, tiny_model, tmp_path / "lora.safetensors", rank=2)
    assert share > 0.999  # the model is saved in half precision
    ours, base = (gigdiff.load(m, dtype="float32").unet for m in (model, tiny_model))  # type: ignore[attr-defined]
    layers, theirs = {f"{name}.weight" for name in adaptable(base)}, base.state_dict()
    assert all(torch.equal(p, theirs[name]) == (name not in layers) for name, p in ours.state_dict().items())


def test_a_killed_run_of_matching_resumes_bit_for_bit(
    matched: tuple[list[str], Path], whole: tuple[Path, Path], tiny_model: Path, catalogue: Path, tmp_path: Path
) -> None:
    more, run = matched
    killed, keys = tmp_path / "killed", (*KEYS, "fake_loss", "matching_loss", "validation_distance")
    helpers.killed_and_resumed("distill.py", *flags(tiny_model, catalogue, whole[0], killed), *more, out=killed)
    assert helpers.logged(killed, keys) == helpers.logged(run, keys)
    parts = ("unet", "ema", "optimizer", "fake_unet", "fake_optimizer")
    assert helpers.same_checkpoints(run / f"checkpoint-{STEPS}", killed / f"checkpoint-{STEPS}", parts)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--consistency_weight", "0"), "all 0"),
        (("--adversarial_weight", "1", "--adversarial_knots", "4"), "from 1 to below --knots 4"),
        (("--adversarial_knots", "1"), "needs --adversarial_weight above 0"),
        (("--distribution_weight", "1", "--distribution_updates", "0"), "at least 1"),
        (("--num_inference_steps", "3"), "must divide --knots 4"),
        (("--path_weight", "1", "--train_batch_size", "6"), "--train_batch_size 6 must be a multiple of --knots 4"),
        (("--path_weight", "1", "--adversarial_weight", "1", "--adversarial_knots", "1"), "has all knots alike"),
        (("--rank", "2"), "a LoRA needs both"),
        (("--rank", "0", "--unet_of", "mini"), "a rank of 1 or more"),
    ],
    ids=[
        "nothing to learn",
        "all knots by number",
        "knots for nobody",
        "no updates",
        "steps between knots",
        "a path cut short",
        "a path judged in parts",
        "a rank over nothing",
        "no rank",
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_loaded(more: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        distill.main(["--teacher", "nowhere", "--knots", "4", *more])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--adversarial_weight", "1"), "has no discriminator"),
        (("--distribution_weight", "1"), "no network of the student's"),
    ],
)
def test_a_checkpoint_without_what_a_term_needs_is_refused(
    more: tuple[str, ...], message: str, whole: tuple[Path, Path], tiny_model: Path, catalogue: Path, tmp_path: Path
) -> None:
    more = (*more, "--resume_from_checkpoint", str(whole[1] / f"checkpoint-{STEPS}"))
    done = subprocess.run(
        helpers.command("distill.py", *flags(tiny_model, catalogue, whole[0], tmp_path / "out"), *more),
        capture_output=True, text=True, cwd=helpers.ROOT, env=helpers.environment(),
    )  # fmt: skip
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_a_student_of_guidance_draws_in_one_pass_what_its_teacher_draws_in_two(
    tiny_model: Path, catalogue: Path, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    """And in its teacher's solver, at the steps that are its knots."""
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_model, teacher)
    path = teacher / "scheduler" / "scheduler_config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k in ("prediction_type", "num_train_timesteps")}
    solver = {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing"}
    path.write_text(json.dumps(kept | solver))
    index = json.loads((teacher / "model_index.json").read_text())
    (teacher / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", solver["_class_name"]]}))
    card = json.loads((teacher / "gigdiff.json").read_text())
    (teacher / "gigdiff.json").write_text(json.dumps(card | {"distilled_from": "grandmother"}))
    more = (
        "--guidance_weight", "1", "--consistency_weight", "0", "--guidance_scale", "20", "--learning_rate", "5e-4",
        "--max_train_steps", "80", "--ema_decay", "0.9", "--validation_steps", "20",
    )  # fmt: skip
    helpers.run("distill.py", *flags(teacher, catalogue, whole[0], tmp_path / "run"), *more)
    student = gigdiff.load(tmp_path / "run" / "model")
    assert type(student.scheduler).__name__ == "DPMSolverMultistepScheduler"  # type: ignore[attr-defined]

    card = json.loads((tmp_path / "run" / "model" / "gigdiff.json").read_text())
    assert (card["distilled_from"], card["baked_guidance"]) == ("grandmother", 20.0)

    image = gigdiff.generate("red handbag", model=student, seed=5, num_inference_steps=4, upscale=False)
    assert image.info["guidance_scale"] == "1"  # type: ignore[union-attr]
    # On held-out photos: how far its velocity is from the guided teacher's.
    measured = [line["validation_loss"] for line in helpers.logged(tmp_path / "run", KEYS) if "validation_loss" in line]
    assert measured[-1] < 0.9 * measured[0]


def test_the_guidance_loss_is_the_squared_error_of_velocities(tiny_model: Path) -> None:
    """Against the plain formulas: v = u + w (c - u), mean over everything."""
    generator = gigdiff.load(tiny_model)
    unet, alphas = generator.unet.float(), generator.scheduler.alphas_cumprod  # type: ignore[attr-defined]
    timesteps = knot_timesteps(4)
    table = (0.5 * ((1 - alphas.double()) / alphas.double()).log()).float()
    torch.manual_seed(0)
    empty, condition = torch.randn(1, 33, 384), torch.randn(3, 33, 384)
    latents, noise, made_v = torch.randn(3, 3, 4, 10, 8)
    batch = distill.Batch(latents, condition, noise, torch.tensor([1, 3, 4]))
    task = distill.Distillation(Teacher(unet, empty, 3.0, table), timesteps)
    with torch.no_grad():
        z = task.noisy(batch)
        a = alphas[timesteps[batch.knot]].view(3, 1, 1, 1)
        assert torch.allclose(z, a.sqrt() * latents + (1 - a).sqrt() * noise, atol=1e-5)
        u, c = (unet(z, timesteps[batch.knot], x, return_dict=False)[0] for x in (empty.expand(3, -1, -1), condition))
        made = a.sqrt() * z - (1 - a).sqrt() * made_v
        expected = (made_v - (u + 3.0 * (c - u))).square().mean((1, 2, 3))
        assert torch.allclose(task.guidance_loss(made, z, batch), expected, rtol=1e-3)


def test_a_student_of_paths_ends_where_its_teachers_paths_end(
    tiny_model: Path, catalogue: Path, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    more = (
        "--path_weight", "1", "--consistency_weight", "0", "--guidance_scale", "20", "--path_steps", "2",
        "--learning_rate", "1e-3", "--max_train_steps", "40", "--validation_steps", "20",
    )  # fmt: skip
    helpers.run("distill.py", *flags(tiny_model, catalogue, whole[0], tmp_path), *more)
    card = json.loads((tmp_path / "model" / "gigdiff.json").read_text())
    assert (card["num_inference_steps"], card["guidance_scale"], card["baked_guidance"]) == (4, 1.0, 20.0)

    student, teacher = (gigdiff.load(m, dtype="float32") for m in (tmp_path / "model", tiny_model))
    scheduler = student.scheduler  # type: ignore[attr-defined]
    assert type(scheduler).__name__ == "DDIMScheduler"
    table = log_sigmas(scheduler.alphas_cumprod)
    texts = student.text_encoder.encode(["", "red handbag", "blue watch", "green shirt"]).condition()  # type: ignore[attr-defined]
    noise = torch.randn(3, 4, 10, 8, generator=torch.Generator().manual_seed(1))

    def end(unet: Any) -> torch.Tensor:
        scheduler.set_timesteps(4)
        z = noise
        for t in scheduler.timesteps:
            z = scheduler.step(unet(z, t, texts[1:], return_dict=False)[0], t, z).prev_sample
        return z

    with torch.no_grad():
        clean = Teacher(teacher.unet, texts[:1], 20.0, table).clean(texts[1:])  # type: ignore[attr-defined]
        aim = path_points(clean, noise, path_levels(table, 8))[-1]
        before, after = ((end(g.unet) - aim).square().mean() for g in (teacher, student))  # type: ignore[attr-defined]
    assert after < 0.85 * before, (before, after)


def test_a_rounds_points_lie_on_one_path_and_what_leads_from_each_is_in_its_place(tiny_model: Path) -> None:
    generator = gigdiff.load(tiny_model, dtype="float32")
    stepping, _ = distill.schedulers_of(generator.scheduler, 4)  # type: ignore[attr-defined]
    table = log_sigmas(stepping.alphas_cumprod)
    torch.manual_seed(0)
    teacher = Teacher(generator.unet, torch.randn(1, 33, 384), 3.0, table)  # type: ignore[attr-defined]
    latents, noise = torch.randn(2, 2, 4, 10, 8)
    condition = torch.randn(2, 33, 384)
    shared = (x.repeat_interleave(4, 0) for x in (latents, condition, noise))
    batch = distill.Batch(*shared, torch.tensor([1, 2, 3, 4] * 2))
    z, leading = distill.Distillation(teacher, knot_timesteps(4)).along_paths(batch, 2)
    assert torch.equal(z[3::4], noise)
    with torch.no_grad():
        ends = path_points(teacher.clean(condition), noise, path_levels(table, 8))[-1]
    stepping.set_timesteps(4)
    drawn, alphas = noise, stepping.alphas_cumprod
    for knot, t in zip((4, 3, 2, 1), stepping.timesteps, strict=True):
        assert torch.allclose(drawn, z[knot - 1 :: 4], atol=1e-4)
        x, a = leading[knot - 1 :: 4], alphas[t]
        velocity = (a.sqrt() * drawn - x) / (1 - a).sqrt()
        drawn = stepping.step(velocity, t, drawn).prev_sample
    assert torch.allclose(drawn, ends, atol=1e-4)


def test_a_teacher_of_another_kind_is_refused(tiny_model: Path, catalogue: Path, tmp_path: Path) -> None:
    other = tmp_path / "epsilon"
    shutil.copytree(tiny_model, other)
    path = other / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "epsilon"}))
    done = subprocess.run(
        helpers.command("distill.py", *flags(other, catalogue, tmp_path / "cache", tmp_path / "out")),
        capture_output=True, text=True, cwd=helpers.ROOT, env=helpers.environment(),
    )  # fmt: skip
    assert done.returncode == 1 and "is no v-prediction model" in done.stderr and "Traceback" not in done.stderr
