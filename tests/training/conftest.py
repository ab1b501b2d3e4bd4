"""A small catalogue, and the real scripts launched on it as users launch them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 + 8 drawn products as an imagefolder with metadata.jsonl: coloured boxes and discs on white."""
    root = tmp_path_factory.mktemp("catalogue")
    colours = {"Red": (200, 30, 30), "Blue": (30, 60, 200), "Green": (30, 150, 60), "Black": (20, 20, 20)}
    for split, count in (("train", 24), ("validation", 8)):
        folder = root / split
        folder.mkdir()
        rows = []
        for i in range(count):
            name, rgb = list(colours.items())[i % 4]
            pixels = np.full((80, 60, 3), 255, np.uint8)
            size = 14 + i % 9
            y, x = np.mgrid[:80, :60]
            inside = (abs(y - 40) < size) & (abs(x - 30) < size) if i % 2 else (y - 40) ** 2 + (x - 30) ** 2 < size**2
            pixels[inside] = rgb
            Image.fromarray(pixels).save(folder / f"{i}.png")
            article = "Handbags" if i % 2 else "Watches"
            rows.append(
                {"file_name": f"{i}.png", "id": f"{split}-{i}", "articleType": article, "baseColour": name,
                 "productDisplayName": f"{name} {article} {split} {i}", "gender": "Women"}
            )  # fmt: skip
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


def command(script: str, *flags: str, launch: bool = False, on: str = "cpu") -> list[str]:
    """The command line of a training script, through `accelerate launch` or plain."""
    start = [sys.executable]
    if launch:
        device = ["--cpu"] if on == "cpu" else []
        start += ["-m", "accelerate.commands.launch", *device, "--num_processes", "1"]
    return [*start, str(ROOT / "training" / script), *flags]


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(script: str, *flags: str, launch: bool = False, on: str = "cpu") -> subprocess.CompletedProcess[str]:
    """Run to the end; fails the test with the script's stderr."""
    done = subprocess.run(
        command(script, *flags, launch=launch, on=on),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def killed_and_resumed(script: str, *flags: str, out: Path) -> None:
    """Run a script whose run folder is `out`, SIGKILL it between two checkpoints, and run it again to the end."""
    process = subprocess.Popen(command(script, *flags), cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    log = out / "log.jsonl"
    # Steps that are already logged, of which some have no checkpoint yet, have to be done again.
    while not (log.exists() and len(log.read_text().splitlines()) >= 8):
        assert process.poll() is None, process.stderr.read().decode()[-2000:]  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (out / "model").exists()
    run(script, *flags, "--resume_from_checkpoint", "latest")


def same_checkpoints(first: Path, second: Path, parts: Sequence[str]) -> bool:
    """Whether two checkpoint folders hold the same bits in each of `parts`."""
    for part in parts:
        a, b = (load_file(folder / f"{part}.safetensors") for folder in (first, second))
        if a.keys() != b.keys() or not all(torch.equal(a[k], b[k]) for k in a):
            return False
    return True


def logged(
    folder: Path, keys: Sequence[str] = ("loss", "grad_norm", "validation_loss", "validation_psnr")
) -> list[dict]:
    """The run's log without what may differ between two equal runs (times)."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k in ("step", *keys)} for line in lines]
