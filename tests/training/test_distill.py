"""training/distill.py at tiny size: it resumes exactly, nears its teacher's path, and loads where it should."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest

import gigdiff

# Helpers beside this file; with pytest's importlib mode, conftest is no importable module.
_spec = importlib.util.spec_from_file_location("training_helpers", Path(__file__).with_name("conftest.py"))
assert _spec and _spec.loader
helpers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helpers)

STEPS = 40
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
