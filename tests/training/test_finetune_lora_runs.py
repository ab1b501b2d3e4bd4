"""finetune_lora.py launched as users launch it: killed and resumed, on two processes, from the command line alone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("training_helpers", Path(__file__).with_name("conftest.py"))
assert _spec and _spec.loader
helpers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helpers)
environment, run = helpers.environment, helpers.run

TINY = (
    "--config", "configs/lora_mini.yaml", "--target_modules", "[to_q, to_v]", "--rank", "4", "--mixed_precision", "no",
    "--validation_prompts", "[red bag]", "--num_inference_steps", "1", "--max_train_samples", "12", "--ema_decay",
    "0.9", "--learning_rate", "0.01", "--lr_warmup_steps", "2",
)  # fmt: skip


def flags(model: Path, out: Path, cache: Path, **more: Any) -> list[str]:
    named = {"pretrained_model_name_or_path": model, "output_dir": out, "cache_dir": cache, **more}
    return [*TINY, *(str(word) for name, value in named.items() for word in (f"--{name}", value))]


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_two_processes_give_the_single_process_result(tiny_model: Path, tmp_path: Path) -> None:
    """At equal global batch: losses to 1e-4, weights to 1e-3 of their size; sums over processes round differently.

    Rank 0 validates and previews at every other step while rank 1 waits; and what one process began two go on with.
    """
    steps = {"max_train_steps": 6, "checkpointing_steps": 3, "validation_steps": 2}
    one, two, cache = tmp_path / "one", tmp_path / "two", tmp_path / "cache"
    run("finetune_lora.py", *flags(tiny_model, one, cache, train_batch_size=4, **steps))

    def launch_two(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
        script = str(ROOT / "training" / "finetune_lora.py")
        words = [*start, script, *flags(tiny_model, out, cache, train_batch_size=2, **steps), *more]
        return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=600)

    done = launch_two(two)
    assert done.returncode == 0, done.stderr[-3000:]

    def same(a: Path, b: Path) -> None:
        for ours, theirs in zip(log(a), log(b), strict=True):
            for key in ("loss", "grad_norm", "validation_loss"):
                if key in theirs:
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (key, ours["step"])
        ours, theirs = (load_file(p / "pytorch_lora_weights.safetensors") for p in (a, b))
        for name, tensor in theirs.items():
            assert torch.allclose(ours[name], tensor, atol=1e-3 * float(tensor.abs().max())), name

    same(two, one)
    # a checkpoint of one process, continued by two
    resumed = tmp_path / "resumed"
    (one / "checkpoint-6").rename(one / "finished")
    one.rename(resumed)
    done = launch_two(resumed, "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr[-3000:]
    same(resumed, two)


def test_kill_nine_a_small_version(tiny_model: Path, tmp_path: Path) -> None:
    """benchmarks/lora_kill.py with two kills, one of them while a checkpoint is written."""
    words = [
        sys.executable, str(ROOT / "benchmarks" / "lora_kill.py"), "--kills", "2", "--during_checkpoint", "1",
        "--max_train_steps", "40", "--flag", f"pretrained_model_name_or_path={tiny_model}", "--output",
        str(tmp_path / "report.json"),
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, env=environment() | {"PYTHONPATH": path}, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kills"] == {"checkpoint": 1, "anywhere": 1} and report["losses_identical"]


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    words = helpers.command("finetune_lora.py", "--learning_rat", "1")
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(
        "error: unknown flag --learning_rat"
    )
    assert "Traceback" not in done.stderr


def test_the_sample_catalogue_is_small_and_whole() -> None:
    """A few dozen captioned pictures of mini's own size, under a megabyte, each saying that mini drew it."""
    from gigdiff.data import load_products
    from gigdiff.provenance import read

    folder = ROOT / "examples" / "catalogue"
    photos = load_products(str(folder))
    assert 24 <= len(photos) <= 60
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 1_000_000
    sand = [np.asarray(photos[i].image)[0, 0] for i in range(len(photos))]  # type: ignore[arg-type]
    assert np.abs(np.median(sand, axis=0) - (222, 196, 160)).max() < 20
    assert all(len(record.captions) == 2 for record in photos.records())
    assert all(read(path)["model"] == "mini" for path in folder.rglob("*.png"))
