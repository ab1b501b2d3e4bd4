"""The study of GAN losses: train each config, measure each model, one table and the grids.

    python benchmarks/gan_losses.py --output runs/gan_study
    python benchmarks/gan_losses.py --collect_only        # the table from what is there

For every config and seed it launches training/train_gan.py (a run that was cut short goes on, a finished one is left
alone) and benchmarks/quality.py on the result, then writes <output>/study.md and study.json. A run that collapsed is
measured at its best state. A score that the reports don't hold shows as "not measured". Progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIGS = ("gan_relativistic", "gan_non_saturating", "gan_hinge", "gan_wgan_gp")

#: Column -> the score of benchmarks/quality.py's report that it shows.
SCORES = {
    "Fréchet / real": "frechet_ratio",
    "precision": "precision",
    "recall": "recall",
    "type / real": "article_type_ratio",
    "colour / real": "colour_group_ratio",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="names in configs/ (default: the four losses)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--prompts", choices=("names", "short", "both"), default="names")
    parser.add_argument("--count", type=int, default=1000, help="validation products a model is measured on")
    parser.add_argument("--output", type=Path, default=Path("runs/gan_study"))
    parser.add_argument("--collect_only", action="store_true", help="train and measure nothing")
    parser.add_argument("--extra", default="", help='more flags for train_gan.py, such as "--max_train_steps 10"')
    args = parser.parse_args(arguments)
    rows = []
    for config in args.configs:
        for seed in args.seeds:
            run = args.output / f"{config.removeprefix('gan_')}-seed{seed}"
            if not args.collect_only:
                train(config, seed, run, args.extra.split())
                measure(run, args.prompts, args.count)
            rows += [row_of(config, seed, run)]
    args.output.mkdir(parents=True, exist_ok=True)
    for name, text in (("study.json", json.dumps(rows, indent=1) + "\n"), ("study.md", table(rows))):
        temporary = args.output / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(args.output / name)
    print(json.dumps({"table": str(args.output / "study.md"), "runs": len(rows)}))
    return 0


def model_of(run: Path) -> Path | None:
    """The model that a run left: of its end, or the best where it collapsed; None while it is unfinished."""
    for name in ("model", "best"):
        if (run / name / "gigdiff.json").is_file() and (name == "model" or last_line(run).get("collapsed") == 1.0):
            return run / name
    return None


def train(config: str, seed: int, run: Path, extra: Sequence[str]) -> None:
    if model_of(run) is not None:
        log(f"{run}: trained already")
        return
    command = [
        sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "training" / "train_gan.py"),
        "--config", str(ROOT / "configs" / f"{config}.yaml"), "--seed", str(seed), "--output_dir", str(run),
        "--resume_from_checkpoint", "latest", *extra,
    ]  # fmt: skip
    launch(command)


def measure(run: Path, prompts: str, count: int) -> None:
    model = model_of(run)
    if model is None or (run / "quality" / f"report-{'names' if prompts == 'both' else prompts}.json").is_file():
        return
    flags = ["--model", str(model), "--prompts", prompts, "--count", str(count), "--output", str(run / "quality")]
    launch([sys.executable, str(ROOT / "benchmarks" / "quality.py"), *flags])


def launch(command: list[str]) -> None:
    """Run to the end; stops the study if it fails, which a second start of the same command takes up again."""
    log(" ".join(command))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode != 0:
        sys.exit(f"error: exit status {done.returncode} of {' '.join(command)}; start the study again to go on")


def last_line(run: Path) -> dict[str, Any]:
    """The last line of the run's log that a measurement was made at; empty where there is none."""
    try:
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return {}
    return next((line for line in reversed(lines) if "diversity" in line), {})


def row_of(config: str, seed: int, run: Path) -> dict[str, Any]:
    """One row of the table; None where something is not known."""
    last, model = last_line(run), model_of(run)
    about: dict[str, Any] = {}
    if model is not None:
        about = json.loads((model / "gigdiff.json").read_text(encoding="utf-8"))
    row: dict[str, Any] = {
        "config": config,
        "seed": seed,
        "prompts": None,
        "images": about.get("trained_images"),
        "images/s in training": last.get("images_per_second"),
        "collapsed": None if not last else last["collapsed"] == 1.0,
        "variety": last.get("diversity"),
        "within a prompt": last.get("prompt_diversity"),
        **dict.fromkeys(SCORES),
        "model": None if model is None else str(model),
    }
    for prompts in ("short", "names"):  # the last that is there wins
        try:
            report = json.loads((run / "quality" / f"report-{prompts}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        row["prompts"] = prompts
        row |= {column: report["scores"].get(key, {}).get("value") for column, key in SCORES.items()}
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, and where their pictures are."""
    columns = [column for column in rows[0] if column != "model"]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    lines += ["| " + " | ".join(show(row[column]) for column in columns) + " |" for row in rows]
    lines += ["", "Grids (fixed prompts and seeds, nothing picked):", ""]
    lines += [f"- {row['config']}, seed {row['seed']}: {Path(row['model']).parent / 'quality' / 'grid.png'}"
              for row in rows if row["model"]]  # fmt: skip
    return "\n".join(lines) + "\n"


def show(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
