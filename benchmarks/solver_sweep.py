"""Which solver, steps, guidance and guidance interval draw best for their cost? Defaults are chosen from its table.

    python benchmarks/solver_sweep.py --count 300                 # the default grid, into runs/solver_sweep
    python benchmarks/solver_sweep.py --schedulers dpm++ unipc --steps 8 12 --guidance_scales 3 5 --intervals 0.3:8

Each combination draws the prompts of the same validation products from the same seeds (as benchmarks/quality.py does)
and is scored by the same functions: article type and colour group over real photos', Fréchet distance over real photos
against real photos. Guidance is applied where sigma lies in the interval. What a combination costs is counted, not
timed: UNet passes an image, with guidance two a step. One JSON a combination: a sweep that was killed, or is given more
values, draws only what is missing. The table is <output>/sweep.md; Fréchet distances compare only at the same --count.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gigdiff.errors import GigdiffError, InputError
from gigdiff.generators.request import GenerationRequest, GenerationResult, ImageGenerator

SCHEDULERS = ("ddim", "euler", "dpm++", "unipc", "lcm")  # lcm is for models distilled for it
SCORES = ("article_type_ratio", "colour_group_ratio", "frechet_ratio")
OWN = "own"  # the scheduler in the model's folder


@dataclasses.dataclass(frozen=True)
class Combination:
    """One way to draw. `interval`: (low, high) of sigma."""

    scheduler: str
    steps: int
    guidance: float
    interval: tuple[float, float]

    def name(self) -> str:
        """Its file's name."""
        low, high = self.interval
        return f"{self.scheduler}-{self.steps}-g{self.guidance:g}-{low:g}-{high:g}".replace("+", "p")


class Drawn:
    """A generator that draws by one combination and counts the UNet's passes."""

    def __init__(self, generator: Any, combination: Combination) -> None:
        self.generator, self.combination = generator, combination
        self.name: str = generator.name
        self.folder: Path | None = generator.folder
        self.capabilities = generator.capabilities
        self.rows = self.images = 0

    def generate(
        self, request: GenerationRequest, *, on_step: Callable[[int, int], None] | None = None
    ) -> GenerationResult:
        if self.combination.scheduler != OWN:
            request = dataclasses.replace(request, scheduler=self.combination.scheduler)  # type: ignore[call-arg]

        unet = self.generator._unet  # not a hook on its network: OpenVINO and CUDA graphs draw without calling that

        def counted(z: Any, *others: Any, **options: Any) -> Any:
            self.rows += len(z)
            return unet(z, *others, **options)

        before, self.generator.guidance_interval = self.generator.guidance_interval, self.combination.interval
        self.generator._unet = counted
        try:
            result = self.generator.generate(request, on_step=on_step)
        finally:
            del self.generator._unet
            self.generator.guidance_interval = before
        self.images += len(result.images)
        return result


def can_choose_scheduler() -> bool:
    """Whether a request names its scheduler in this version of gigdiff."""
    return any(field.name == "scheduler" for field in dataclasses.fields(GenerationRequest))


def combinations(
    schedulers: Iterable[str],
    steps: Iterable[int],
    guidances: Iterable[float],
    intervals: Iterable[tuple[float, float]],
) -> list[Combination]:
    """The whole grid; without guidance the interval does not matter, so it is drawn once there."""
    grid = [Combination(*values) for values in itertools.product(schedulers, steps, guidances, intervals)]
    everywhere = (0.0, float("inf"))
    return list(
        dict.fromkeys(dataclasses.replace(one, interval=everywhere) if one.guidance == 1 else one for one in grid)
    )


def interval(text: str) -> tuple[float, float]:
    """ "0.3:8" -> (0.3, 8.0)"""
    low, high = text.split(":")
    return float(low), float(high)


def done_before(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The combination's result, if it was drawn with these settings."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if found["settings"] == settings else None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, cheapest first; the best Fréchet distance that can be had for at most so many passes in bold."""
    lines = [
        "| scheduler | steps | guidance | sigma | UNet passes | type / real | colour / real | Fréchet / real |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    best = float("inf")
    for row in sorted(rows, key=lambda row: (row["passes"], row["scores"]["frechet_ratio"]["value"])):
        type_right, colour_right, frechet = (row["scores"][name]["value"] for name in SCORES)
        shown = f"**{frechet:.3f}**" if frechet < best else f"{frechet:.3f}"
        best = min(best, frechet)
        low, high = row["interval"]
        where = "all" if low == 0 and high is None else f"{low:g} to {'∞' if high is None else f'{high:g}'}"
        lines.append(
            f"| {row['scheduler']} | {row['steps']} | {row['guidance']:g} | {where} | {row['passes']:.1f} "
            f"| {type_right:.3f} | {colour_right:.3f} | {shown} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="embedded name or gigdiff diffusion folder")
    parser.add_argument(
        "--schedulers", nargs="+", help=f"of {', '.join(SCHEDULERS)}, and {OWN}; default: the first four"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 10, 15, 20])
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[2.5, 5.0])
    parser.add_argument("--intervals", type=interval, nargs="+", default=[(0.0, float("inf")), (0.3, 8.0)])
    parser.add_argument("--prompts", choices=("names", "short"), default="names")
    parser.add_argument("--count", type=int, default=300, help="validation products, a fixed choice")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_dir", type=Path, help="default: ../shared/data/fashion-products")
    parser.add_argument("--cache_dir", type=Path, default=Path("cache/eval"), help="features of real photos")
    parser.add_argument("--output", type=Path, default=Path("runs/solver_sweep"))
    args = parser.parse_args(arguments)
    try:
        print(run(args))
    except GigdiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> Path:
    """Draws and scores what is missing and writes the table."""
    import gigdiff
    from gigdiff.data import load_products
    from gigdiff.evaluation import (
        default_data_dir,
        evaluate,
        git_commit,
        make_reference,
        plain,
        weights_hash,
        write_text,
    )

    if can_choose_scheduler():
        schedulers = args.schedulers or list(SCHEDULERS[:4])
    else:
        schedulers = args.schedulers or [OWN]
        if schedulers != [OWN]:
            raise InputError(f"this gigdiff has no scheduler option: leave --schedulers out, or give {OWN}")
    generator: ImageGenerator = gigdiff.load(args.model)
    data = args.data_dir or default_data_dir()
    reference = make_reference(
        load_products(data, split="validation"), load_products(data, split="train"),
        count=args.count, cache_dir=args.cache_dir,
    )  # fmt: skip
    settings = {"model": args.model, "weights": weights_hash(generator.folder), "prompts": args.prompts}
    settings |= {"count": args.count, "seed": args.seed}
    rows = []
    grid = combinations(schedulers, args.steps, args.guidance_scales, args.intervals)
    for number, one in enumerate(grid, 1):
        path = args.output / f"{one.name()}.json"
        row = done_before(path, settings)
        if row is None:
            drawn = Drawn(generator, one)
            report = evaluate(
                drawn, reference, prompts=args.prompts, num_inference_steps=one.steps, guidance_scale=one.guidance,
                batch_size=args.batch_size, seed=args.seed,
            )  # fmt: skip
            scores = {name: dataclasses.asdict(report.scores[name]) for name in SCORES}
            row = dataclasses.asdict(one) | {"passes": drawn.rows / drawn.images, "scores": scores}
            row = plain(row | {"settings": settings, "seconds": report.seconds, "git_commit": git_commit()})
            write_text(path, json.dumps(row, indent=1) + "\n")
        rows.append(row)
        values = ", ".join(f"{name} {row['scores'][name]['value']:.3f}" for name in SCORES)
        print(f"{number}/{len(grid)} {one.name()}: {values}", file=sys.stderr, flush=True)
    about = ", ".join(f"{key} {value}" for key, value in settings.items())
    text = f"{table(rows)}\n\nBold: no combination of as few UNet passes has a smaller Fréchet distance. {about}.\n"
    return write_text(args.output / "sweep.md", text)


if __name__ == "__main__":
    sys.exit(main())
