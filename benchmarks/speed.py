"""How many times faster than stock diffusers? Ratios, medians of interleaved runs in one process, on this machine.

    python benchmarks/speed.py                                       # every part, into runs/speed
    python benchmarks/speed.py --parts inference student --repeats 15

    inference   gigdiff's generator against diffusers' StableDiffusionPipeline: same weights, steps, guidance, seeds;
                drawn by torch and, where it is installed, by OpenVINO in bfloat16 (or float32) and in int8
    student     the few-step student at 4, 2 and 1 steps against 25-step guided stock sampling, prompt to pixels
    cold        `gigdiff generate` to a PNG on disk against `python -c "import torch, diffusers, transformers"`
    training    training/train_diffusion.py's loop against that of diffusers' train_text_to_image.py, same UNet
    scaling     images a second against batch size and against threads, with plots

Each way is warmed up once; then the ways take turns, each round beginning with another. A ratio is that of the
medians; behind it are the least and greatest ratio of one round. Peak memory is that of a fresh process which does one
way's work twice and nothing else, loading included (--no_memory leaves that out). docs/performance.md says what each
round includes.

Parts may be run one by one: <output>/speed.json keeps them all, speed.md shows them, plots are <output>/*.png.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import speed_measure as measure
import speed_ways as ways
import torch
from speed_measure import NotHere, interleaved, psnr, ratio, spread

from gigdiff.benchmark import environment
from gigdiff.evaluation import plain, write_text
from gigdiff.generators.loading import resolve
from gigdiff.pretrained import card
from gigdiff.speed import load_average

BASELINE = "import torch, diffusers, transformers"
Rows = list[dict[str, Any]]
STOCK, STOCK_BF16 = "stock, fp32", "stock, bf16 autocast"
#: gigdiff's ways to draw -> what gigdiff.load is told.
OURS: dict[str, dict[str, Any]] = {
    "gigdiff": {},
    "gigdiff, OpenVINO": {"backend": "openvino"},
    "gigdiff, guidance reused": {"guidance_reuse": 8},
    "gigdiff, OpenVINO, guidance reused": {"backend": "openvino", "guidance_reuse": 8},
    "gigdiff, OpenVINO int8, guidance reused": {"backend": "openvino", "dtype": "int8", "guidance_reuse": 8},
}
#: Those for a student, which has no guidance: int8 has work in its steps without it.
FOR_STUDENTS = {
    **{ours: how for ours, how in OURS.items() if "guidance_reuse" not in how},
    "gigdiff, OpenVINO int8": {"backend": "openvino", "dtype": "int8"},
}
ALL = list(dict.fromkeys([*OURS, *FOR_STUDENTS]))
#: (part, way, against, batch) -> the ratio that is wanted (issue 6).
GOALS = {
    **{("inference", ours, STOCK, batch): goal for ours in OURS for batch, goal in ((1, 2.0), (16, 2.5))},
    **{("inference", ours, STOCK_BF16, batch): 1.3 for ours in OURS for batch in (1, 16)},
    **{
        ("student", f"student, {steps}, {ours}", "stock, 25 steps", 1): goal
        for ours in FOR_STUDENTS for steps, goal in (("4 steps", 15.0), ("1 step", 35.0))
    },
    ("training", "gigdiff's loop", "diffusers' loop, fp32", None): 3.0,
    ("training", "gigdiff's loop", "diffusers' loop, bf16", None): 1.5,
}  # fmt: skip


def builders(part: str, args: argparse.Namespace, batch: int) -> dict[str, ways.Builder]:
    """The ways of a part by name, not yet built."""
    if part == "student":
        few = {
            f"student, {n} step{'s' * (n > 1)}, {ours}": functools.partial(
                ways.ours, args, batch, steps=n, model=args.student, **how
            )
            for ours, how in FOR_STUDENTS.items()
            if ours in args.ours
            for n in (4, 2, 1)
        }
        return {"stock, 25 steps": functools.partial(ways.stock, args, batch, steps=25), **few}
    if part == "training":
        return {
            "diffusers' loop, fp32": functools.partial(ways.their_training, args),
            "diffusers' loop, bf16": functools.partial(ways.their_training, args, bf16=True),
            "gigdiff's loop": functools.partial(ways.our_training, args),
        }
    steps = args.steps or card(resolve(args.model)[0])["num_inference_steps"]
    return {
        STOCK: functools.partial(ways.stock, args, batch, steps=steps),
        STOCK_BF16: functools.partial(ways.stock, args, batch, steps=steps, bf16=True),
        **{
            ours: functools.partial(ways.ours, args, batch, steps=steps, guidance_scale=args.guidance_scale, **how)
            for ours, how in OURS.items()
            if ours in args.ours
        },
    }


def against(part: str, args: argparse.Namespace, batch: int | None, bases: Sequence[str]) -> tuple[Rows, dict]:
    """A row for every way of the part but the bases, against each base; and the ways that were built."""
    built, reasons = {}, {}
    for name, build in builders(part, args, batch or 1).items():
        try:
            built[name] = build()
        except NotHere as reason:
            reasons[name] = str(reason)
    if not any(name in bases for name in built) or all(name in bases for name in built):
        built = {}  # nothing to hold against each other
    seconds = interleaved(built, args.repeats)
    memory = {name: peak_alone(part, name, args, batch) for name in built}
    images = batch or args.train_batch_size * args.train_steps
    rows: Rows = []
    for name in (name for name in builders(part, args, batch or 1) if name not in bases):
        for base in bases:
            row: dict[str, Any] = {"way": name, "against": base, "batch": batch}
            row["goal"] = GOALS.get((part, name, base, batch))
            if missing := reasons.get(name) or reasons.get(base):
                rows.append(row | {"status": missing})
                continue
            row["ratio"] = ratio(seconds[base], seconds[name])
            row |= {"seconds": spread(seconds[name]), "base_seconds": spread(seconds[base])}
            row |= {"memory_mb": memory[name], "base_memory_mb": memory[base]}
            row["images_per_second"] = spread([images / s for s in seconds[name]])
            rows.append(row | {"rounds": {"way": seconds[name], "against": seconds[base]}})
    return rows, built


def inference(args: argparse.Namespace) -> Rows:
    rows: Rows = []
    for batch in args.batch_sizes:
        found, built = against("inference", args, batch, (STOCK, STOCK_BF16))
        for row in found:
            if row["way"] in built and STOCK in built:
                # Always to stock's float32 pixels, whatever the speed is held against; JSON has no infinity.
                likeness = psnr(built[row["way"]](), built[STOCK]())
                shown = {"psnr_db": likeness["all"], "psnr_worst_db": likeness["worst"]}
                row |= {key: "identical" if value == float("inf") else value for key, value in shown.items()}
        rows += found
    return rows


def student(args: argparse.Namespace) -> Rows:
    return [row for batch in args.batch_sizes for row in against("student", args, batch, ("stock, 25 steps",))[0]]


def training(args: argparse.Namespace) -> Rows:
    rows, _ = against("training", args, None, ("diffusers' loop, fp32", "diffusers' loop, bf16"))
    return [row | {"data": ways.photos(args)[1], "train_batch_size": args.train_batch_size} for row in rows]


def cold(args: argparse.Namespace) -> Rows:
    """Whole processes; the goal is on the difference: at most 2 s more."""
    draw = [
        sys.executable, "-m", "gigdiff", "generate", "red wool coat", "--model", args.model, "--seed", "0",
        "--overwrite", "--quiet", "--output", str(args.output.absolute() / "cold"),
    ]  # fmt: skip
    words = {"gigdiff generate": draw, BASELINE: [sys.executable, "-c", BASELINE]}
    peaks: dict[str, list[float]] = {name: [] for name in words}

    def start(name: str) -> None:
        peaks[name].append(measure.timed_process(words[name], ways.ROOT)[1])

    seconds = interleaved({name: functools.partial(start, name) for name in words}, args.repeats)
    ours, base = seconds["gigdiff generate"], seconds[BASELINE]
    more = spread([a - b for a, b in zip(ours, base, strict=True)]) | {"median": spread(ours)["median"]}
    more["median"] -= spread(base)["median"]
    imports = {
        name: measure.import_seconds(
            subprocess.run(
                [line[0], "-X", "importtime", *line[1:]], cwd=ways.ROOT, capture_output=True, text=True, check=True
            ).stderr
        )
        for name, line in words.items()
    }
    mine, theirs = imports["gigdiff generate"], imports[BASELINE]
    extra = measure.extra_imports(mine, theirs)
    log("the ten most expensive imports that only `gigdiff generate` pays (seconds of their own, modules):")
    for package, taken, modules in extra:
        log(f"  {taken:7.3f}  {package} ({modules})")
    return [
        {
            "way": "gigdiff generate", "against": BASELINE, "difference_seconds": more,
            "goal": "at most 2 s more", "seconds": spread(ours), "base_seconds": spread(base),
            "memory_mb": max(peaks["gigdiff generate"]), "base_memory_mb": max(peaks[BASELINE]),
            "rounds": {"way": ours, "against": base}, "extra_imports": extra,
            "extra_import_seconds": sum(s for name, s in mine.items() if name not in theirs),
        }
    ]  # fmt: skip


def scaling(args: argparse.Namespace) -> Rows:
    rows: Rows = []
    threads = torch.get_num_threads()

    def add(kind: str, batch: int) -> None:
        built = {}
        for name, build in builders("scaling", args, batch).items():
            try:
                built[name] = build()
            except NotHere as reason:
                log(f"{name}: {reason}")
        for name, seconds in interleaved(built, args.repeats).items():
            speed = spread([batch / s for s in seconds])
            memory = peak_alone("scaling", name, args, batch) if kind == "batch" else None
            row = {"kind": kind, "way": name, "batch": batch, "threads": torch.get_num_threads()}
            rows.append(row | {"images_per_second": speed, "memory_mb": memory})

    for batch in args.scaling_batch_sizes:
        add("batch", batch)
    for count in range(1, (args.max_threads or os.cpu_count() or 1) + 1):
        torch.set_num_threads(count)
        add("threads", args.threads_batch_size)
    torch.set_num_threads(threads)
    for kind, label in (("batch", "images at once"), ("threads", f"threads, {args.threads_batch_size} images at once")):
        problem = measure.plot((r for r in rows if r["kind"] == kind), kind, label, args.output / f"{kind}.png")
        if problem:
            log(problem)
    return rows


def peak_alone(part: str, way: str, args: argparse.Namespace, batch: int | None) -> float | None:
    """Peak memory in MB of a process that builds this way alone and does it twice; on CUDA that of the GPU."""
    if args.no_memory:
        return None
    settings = vars(args) | {"output": str(args.output), "alone": None, "parts": []}
    words = [sys.executable, __file__, "--alone", json.dumps([part, way, batch, settings])]
    try:
        _, memory, output = measure.timed_process(words, Path.cwd())
    except RuntimeError as error:
        log(f"no peak memory of {way}: {str(error).splitlines()[-1]}")
        return None
    return float(output.split()[-1]) if args.device == "cuda" else memory


def run_alone(part: str, way: str, batch: int | None, settings: dict[str, Any]) -> float:
    """What `peak_alone` starts; torch's peak allocation on a GPU in MB."""
    args = argparse.Namespace(**settings | {"output": Path(settings["output"])})
    work = builders(part, args, batch or 1)[way]()
    work(), work()
    return torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else 0.0


PARTS = {"inference": inference, "student": student, "cold": cold, "training": training, "scaling": scaling}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default="mini", help="embedded name or gigdiff diffusion folder")
    parser.add_argument("--student", default="mini-turbo", help="the few-step student, likewise")
    parser.add_argument("--ours", nargs="+", choices=ALL, default=ALL, help="which of gigdiff's ways to draw")
    parser.add_argument("--repeats", type=int, default=9, help="rounds after the warm-up")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16], help="of inference and student")
    parser.add_argument("--steps", type=int, help="of inference and scaling; default: the model's")
    parser.add_argument("--guidance_scale", type=float, help="default: the model's")
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--train_steps", type=int, default=4, help="training steps a round")
    parser.add_argument("--photos", type=int, default=512, help="how many training photos are used")
    parser.add_argument("--data_dir", help="default: ../shared/data/fashion-products, else examples/catalogue")
    parser.add_argument("--scaling_batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--threads_batch_size", type=int, default=8, help="images at once in the plot against threads")
    parser.add_argument("--max_threads", type=int, help="default: the cores")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--no_memory", action="store_true", help="leave out the processes that peak memory is taken of")
    parser.add_argument("--output", type=Path, default=Path("runs/speed"))
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.alone:
        print(run_alone(*json.loads(args.alone)))
        return 0
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)
    result = measure.read(args.output / "speed.json")
    for part in args.parts:
        log(f"{part} ...")
        load, began = load_average(), time.perf_counter()
        rows = PARTS[part](args)
        settings = {key: value for key, value in vars(args).items() if key not in ("output", "alone", "parts")}
        result[part] = {"rows": rows, "settings": settings, **environment(load)}
        result[part]["took_seconds"] = time.perf_counter() - began
        write_text(args.output / "speed.json", json.dumps(plain(result), indent=1) + "\n")
        write_text(args.output / "speed.md", markdown(result))
        log(measure.table(rows))
    print(args.output / "speed.json")
    return 0


def markdown(result: dict[str, Any]) -> str:
    """All parts' tables, each with where and how it was run."""
    lines = ["# Speed against stock diffusers", ""]
    for part, of in result.items():
        lines += [f"## {part}", "", measure.table(of["rows"]), ""]
        loads = " and ".join("?" if load is None else f"{load:.2f}" for load in of["load_average"])
        versions = ", ".join(f"{name} {version}" for name, version in of["versions"].items())
        lines += [f"- {of['processor']}, {of['cores']} cores, {of['threads']} threads; load before and after: {loads}"]
        lines += [f"- {versions}; commit {of['git_commit']}; {of['took_seconds']:.0f} s"]
        lines += ["- settings: " + ", ".join(f"{key} {value}" for key, value in of["settings"].items()), ""]
        if part == "scaling":
            lines += ["![images a second against batch size](batch.png)", ""]
            lines += ["![images a second against threads](threads.png)", ""]
        if part == "cold" and of["rows"]:
            row = of["rows"][0]
            lines += [
                f"Imports that only `gigdiff generate` pays: {row['extra_import_seconds']:.2f} s. Most of it:",
                "",
            ]
            lines += [f"- {s:.3f} s: {name} ({count} modules)" for name, s, count in row["extra_imports"]] + [""]
    return "\n".join(lines)


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
