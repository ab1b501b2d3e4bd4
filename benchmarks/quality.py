"""How good is one model, quickly: its scores, their controls and an uncurated grid. For several with speed: run.py.

    python benchmarks/quality.py --model mini --prompts both --count 1000 --output runs/quality/mini

Writes <output>/report-<prompts>.json and .md, grid.png (fixed prompts x seeds, nothing picked) and
products-<prompts>.png (the first products of the choice, real photo above drawn one). Progress on stderr; the last line
of stdout is the result as JSON. `--model` is what gigdiff.load takes, or a control that hands out photos:

    control:train      a train photo of the same article type and colour group (the best that copying can do)
    control:shuffled   the real validation photos, each for another product's prompt
    control:one        one train photo for every prompt (mode collapse)
    control:blank      white
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gigdiff.benchmark import GRID_PROMPTS
from gigdiff.data import ProductDataset, load_products
from gigdiff.errors import GigdiffError, InputError, nearest
from gigdiff.evaluation import (
    COUNT,
    EvalReport,
    Reference,
    default_data_dir,
    evaluate,
    evaluation_prompts,
    make_reference,
    write_report,
)
from gigdiff.generators.request import GenerationRequest, ImageGenerator
from gigdiff.images import contact_sheet, fit_image, save_image
from gigdiff.metrics.controls import PhotoGenerator, shuffled_photos
from gigdiff.metrics.probe import target_of
from gigdiff.products import Product
from gigdiff.rng import derive_seed

CONTROLS = ("control:train", "control:shuffled", "control:one", "control:blank")
GRID_SEEDS = (0, 1, 2, 3)
SHOWN_PRODUCTS = 24


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="embedded name, folder, hub id, or a control (above)")
    parser.add_argument("--prompts", choices=("names", "short", "both"), default="both")
    parser.add_argument("--count", type=int, default=COUNT, help="validation products, a fixed choice (default: 1000)")
    parser.add_argument("--num_inference_steps", type=int, help="default: the model's")
    parser.add_argument("--guidance_scale", type=float, help="default: the model's")
    parser.add_argument("--guidance_reuse", type=int, default=1, help="as gigdiff.generate's")
    parser.add_argument("--backend", default="torch", help="torch or openvino, as gigdiff.load's")
    parser.add_argument("--dtype", help="as gigdiff.load's")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="of the images; the choice of products stays")
    parser.add_argument("--data_dir", type=Path, default=default_data_dir())
    parser.add_argument("--cache_dir", type=Path, default=Path("cache/eval"), help="features of real photos")
    parser.add_argument("--output", type=Path, help="default: runs/quality/<model>")
    parser.add_argument("--no_grid", action="store_true", help="scores only")
    args = parser.parse_args(arguments)
    try:
        print(json.dumps(run(args)))
    except GigdiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> dict[str, object]:
    output = args.output or Path("runs/quality") / args.model.replace(":", "-").replace("/", "-")
    if not args.model.startswith("control:"):
        import gigdiff

        generator: ImageGenerator = gigdiff.load(args.model, dtype=args.dtype, backend=args.backend)
    train = load_products(args.data_dir, split="train")
    log(f"features of real photos (kept in {args.cache_dir})")
    reference = make_reference(
        load_products(args.data_dir, split="validation"), train, count=args.count, cache_dir=args.cache_dir
    )
    sets = ("names", "short") if args.prompts == "both" else (args.prompts,)
    result: dict[str, object] = {"model": args.model}
    for prompts in sets:
        if args.model.startswith("control:"):
            generator = control(args.model, evaluation_prompts(reference.products, prompts), reference, train)
        drawn: list[np.ndarray] = []
        report = evaluate(
            generator,
            reference,
            prompts=prompts,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            guidance_reuse=args.guidance_reuse,
            batch_size=args.batch_size,
            seed=args.seed,
            on_progress=Progress(f"{args.model}, {prompts}"),
            keep_images=drawn,
        )
        path = write_report(report, output, f"report-{prompts}")
        result[prompts] = summary(report) | {"report": str(path)}
        log(report.to_markdown())
        if not args.no_grid:
            texts = evaluation_prompts(reference.products, prompts)
            save_image(output / f"products-{prompts}.png", products_sheet(reference, drawn[0], texts), overwrite=True)
    if not args.no_grid and not args.model.startswith("control:"):
        save_image(output / "grid.png", prompt_sheet(generator, args), overwrite=True)
    return result


def control(name: str, prompts: Sequence[str], reference: Reference, train: ProductDataset) -> PhotoGenerator:
    """The control generator of that name for these prompts of the reference's products."""
    height, width = reference.images.shape[1:3]
    if name == "control:shuffled":
        return shuffled_photos(prompts, reference.images)
    if name == "control:blank":
        return PhotoGenerator(name, dict.fromkeys(prompts, np.full((1, height, width, 3), 255, np.uint8)))
    if name == "control:one":
        return PhotoGenerator(name, dict.fromkeys(prompts, photo(train, 0, height, width)))
    if name != "control:train":
        raise InputError(f'unknown control "{name}"; {nearest(name, CONTROLS)}')

    def key(product: Product) -> tuple[str | None, str | None]:
        return target_of("article_type", product), target_of("colour_group", product)

    of_kind: dict[object, list[int]] = {}
    for i, record in enumerate(train.records()):
        of_kind.setdefault(key(record.product), []).append(i)
        of_kind.setdefault(record.product.category, []).append(i)  # where no train photo has that type in that colour
    photos: dict[str, list[np.ndarray]] = {}
    for i, (prompt, product) in enumerate(zip(prompts, reference.products, strict=True)):
        choices = of_kind.get(key(product)) or of_kind.get(product.category) or [0]
        chosen = choices[derive_seed(0, "control:train", i) % len(choices)]
        photos.setdefault(prompt, []).append(photo(train, chosen, height, width))
    return PhotoGenerator(name, {prompt: np.concatenate(several) for prompt, several in photos.items()})


def photo(data: ProductDataset, index: int, height: int, width: int) -> np.ndarray:
    """One photo, uint8 (1, height, width, 3)."""
    image = data[index].image
    if image is None:
        raise InputError(f"product {index} has no image")
    return fit_image(image, height, width)[None]


def prompt_sheet(generator: ImageGenerator, args: argparse.Namespace) -> Image.Image:
    """Fixed prompts, fixed seeds, all of what came out: four images a prompt, two prompts a row."""
    images, labels = [], []
    for prompt in GRID_PROMPTS:
        request = GenerationRequest(
            prompts=(prompt,) * len(GRID_SEEDS),
            seeds=GRID_SEEDS,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            guidance_reuse=args.guidance_reuse,
        )
        images += list(generator.generate(request).images)
        labels += [f"{prompt} #{seed}" for seed in GRID_SEEDS]
    return contact_sheet(images, 2 * len(GRID_SEEDS), labels, scale=2)


def products_sheet(reference: Reference, drawn: np.ndarray, prompts: Sequence[str]) -> Image.Image:
    """The first products of the choice: a row of real photos above a row of drawn ones, again and again."""
    images, labels, columns = [], [], 8
    count = min(SHOWN_PRODUCTS, len(drawn))
    for start in range(0, count, columns):
        row = range(start, min(start + columns, count))
        filler = [np.full_like(drawn[0], 255)] * (columns - len(row))
        images += [reference.images[i] for i in row] + filler + [drawn[i] for i in row] + filler
        labels += ["real photo"] * len(row) + [""] * len(filler) + [prompts[i] for i in row] + [""] * len(filler)
    return contact_sheet(images, columns, labels, scale=2)


def summary(report: EvalReport) -> dict[str, object]:
    """What one reads first, rounded."""
    return {
        name: round(score.value, 4) if np.isfinite(score.value) else None
        for name, score in {**report.scores, **report.controls}.items()
    }


class Progress:
    """Images drawn and images a second, on stderr, every ten seconds."""

    def __init__(self, label: str) -> None:
        self.label, self.began, self.shown = label, time.perf_counter(), 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if done == total or now - self.shown > 10:
            self.shown = now
            log(f"{self.label}: {done}/{total}, {done / (now - self.began):.1f} images/s")


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
