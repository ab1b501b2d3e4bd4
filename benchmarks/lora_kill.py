"""Kill a LoRA run with SIGKILL at random moments, resume it each time, and compare with an uninterrupted run.

    python benchmarks/lora_kill.py --kills 50 --during_checkpoint 10 --output runs/lora_kill.json
    python benchmarks/lora_kill.py --kills 2 --during_checkpoint 1 --max_train_steps 20        # small

The real script runs on the CPU in float32. A kill "during a checkpoint" waits for the temporary folder of one and kills
at once. Passes when every resume continued, no `latest` was unloadable, and losses, gradient norms, held-out losses,
weights, averaged weights and moments are bit-identical in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
KEYS = ("step", "loss", "grad_norm", "learning_rate", "validation_loss")
FILES = ("adapter.safetensors", "ema.safetensors", "optimizer.safetensors", "pytorch_lora_weights.safetensors")


def command(out: Path, cache: Path, arguments: argparse.Namespace) -> list[str]:
    flags = {
        "config": ROOT / "configs" / "lora_mini.yaml",
        "output_dir": out,
        "cache_dir": cache,
        "max_train_steps": arguments.max_train_steps,
        "mixed_precision": "no",
        "train_batch_size": 2,
        "rank": 4,
        "target_modules": "[to_q, to_v]",
        "checkpointing_steps": arguments.checkpointing_steps,
        "validation_steps": 10 * arguments.checkpointing_steps,
        "preview_steps": 10_000_000,  # before and after only
        "validation_prompts": "[red handbag]",
        "num_inference_steps": 1,
        "max_train_samples": 12,
        "resume_from_checkpoint": "latest",
    } | dict(pair.split("=", 1) for pair in arguments.flag)
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return [sys.executable, str(ROOT / "training" / "finetune_lora.py"), *words]


def start(words: list[str], errors: Path) -> subprocess.Popen:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with errors.open("wb") as file:
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=file)


def steps_of(out: Path) -> int:
    log = out / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def kill_once(process: subprocess.Popen, out: Path, how: str, rng: random.Random, already: int) -> bool:
    """Wait for the moment and kill; False when the run ended before."""
    if how == "checkpoint":
        while not list(out.glob(".checkpoint-*.tmp-*")):
            if process.poll() is not None:
                return False
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.01))
    else:
        # somewhere in the next few steps, or while the script still starts
        wanted, deadline = already + rng.randint(0, 8), None
        while steps_of(out) < wanted or deadline is None or time.monotonic() < deadline:
            if process.poll() is not None:
                return False
            if deadline is None and steps_of(out) >= wanted:
                deadline = time.monotonic() + rng.uniform(0, 0.3)
            time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def logged(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in KEYS if key in line} for line in lines]


def same_files(a: Path, b: Path) -> list[str]:
    """Names of the checkpoint's files whose tensors differ by a bit."""
    different = []
    for name in FILES:
        one, two = load_file(a / name), load_file(b / name)
        if one.keys() != two.keys() or not all(np.array_equal(one[k], two[k], equal_nan=True) for k in one):
            different.append(name)
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--during_checkpoint", type=int, default=10, help="how many of them while one is written")
    parser.add_argument("--max_train_steps", type=int, default=300)
    parser.add_argument("--checkpointing_steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flag", action="append", default=[], help="name=value for the script, repeatable")
    parser.add_argument("--output", help="JSON report")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    work = Path(tempfile.mkdtemp(prefix="lora-kill-"))
    whole, killed, cache, errors = work / "whole", work / "killed", work / "cache", work / "stderr"
    killed.mkdir()

    process = start(command(whole, cache, arguments), errors)
    if process.wait():
        sys.exit(f"error: the uninterrupted run failed: {errors.read_text()[-2000:]}")
    shutil.rmtree(cache)  # the killed run encodes for itself, so that kills fall there too

    plan = ["checkpoint"] * arguments.during_checkpoint + ["anywhere"] * (arguments.kills - arguments.during_checkpoint)
    rng.shuffle(plan)
    done = {"checkpoint": 0, "anywhere": 0}
    torn, failures, early = 0, [], 0
    for number, how in enumerate(plan, 1):
        process = start(command(killed, cache, arguments), errors)
        hit = kill_once(process, killed, how, rng, steps_of(killed))
        if not hit:
            if process.returncode:
                failures.append(errors.read_text()[-1000:])
                break
            early += 1  # the run came to its end: begin again, kills are still owed
            shutil.rmtree(killed)
            killed.mkdir()
            process = start(command(killed, cache, arguments), errors)
            if not kill_once(process, killed, how, rng, 0):
                failures.append("a fresh run ended before it could be killed; raise --max_train_steps")
                break
        done[how] += 1
        torn += bool(list(killed.glob(".checkpoint-*.tmp-*")))
        print(f"kill {number}/{len(plan)} ({how}) at step {steps_of(killed)}", file=sys.stderr, flush=True)
    if not failures:
        process = start(command(killed, cache, arguments), errors)
        if process.wait():
            failures.append(errors.read_text()[-1000:])
    report: dict[str, Any] = {
        "kills": done, "left_a_half_written_checkpoint": torn, "runs_that_ended_before_a_kill": early,
        "failed_resumes": failures, "max_train_steps": arguments.max_train_steps,
    }  # fmt: skip
    if not failures:
        last = f"checkpoint-{arguments.max_train_steps}"
        report["losses_identical"] = logged(whole) == logged(killed)
        report["files_that_differ"] = same_files(whole / last, killed / last)
    report["passed"] = not failures and report["losses_identical"] and not report["files_that_differ"]
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.output:
        path = Path(arguments.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    if report["passed"]:
        shutil.rmtree(work)
    else:
        sys.exit(f"failed; see {work}")


if __name__ == "__main__":
    main()
