"""How good and how fast is the upscaler: PSNR and perceptual distance against bicubic, images a second.

    python benchmarks/upscale_quality.py --model mini-upscaler --count 300

The pairs: validation products' small files (60 x 80 pixels, in 64 x 80) and large photos of the same id. Prints a
Markdown table over fidelities, with bicubic interpolation, and writes a sheet small, bicubic, upscaled, real. The last
line of stdout is JSON. The perceptual distance is gigdiff's own (EfficientNet-Lite0), which no training loss contains.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from gigdiff.data import load_products
from gigdiff.errors import GigdiffError
from gigdiff.images import contact_sheet, fit_image, save_image
from gigdiff.metrics.image_quality import image_quality
from gigdiff.upscaling import load_upscaler

GOALS = {"psnr over bicubic": 1.0, "perceptual over bicubic's": 0.5, "images/s": 20.0}
HEIGHT, WIDTH = 80, 64


def training_script() -> ModuleType:
    """training/train_upscaler.py, for how it fits large photos to small files."""
    spec = importlib.util.spec_from_file_location(
        "train_upscaler", Path(__file__).parents[1] / "training" / "train_upscaler.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_upscaler"] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-upscaler", help="embedded name, folder, or a file for spandrel")
    parser.add_argument("--fidelities", type=float, nargs="+", default=[1.0, 0.5, 0.0])
    parser.add_argument("--count", type=int, default=300, help="validation pairs")
    parser.add_argument("--large_dir", default="../shared/data/fashion-products-large")
    parser.add_argument("--small_dir", default="../shared/data/fashion-products")
    parser.add_argument("--output", type=Path, default=Path("runs/upscale_quality"))
    args = parser.parse_args()
    try:
        print(json.dumps(run(args)))
    except GigdiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> dict[str, object]:
    fit_large = training_script().fit_large
    large = load_products(args.large_dir, split="validation")
    small = load_products(args.small_dir, split="validation")
    of_id = {record.id: i for i, record in enumerate(small.records())}
    pairs = [(i, of_id[record.id]) for i, record in enumerate(large.records()) if record.id in of_id][: args.count]
    real = np.stack([fit_large(large[i].image, HEIGHT, WIDTH) for i, _ in pairs])
    inputs = np.stack([fit_image(small[j].image, HEIGHT, WIDTH) for _, j in pairs])  # type: ignore[arg-type]
    size = (WIDTH * 4, HEIGHT * 4)
    bicubic = np.stack([np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BICUBIC)) for x in inputs])
    results: dict[str, dict[str, float]] = {"bicubic": image_quality(real, bicubic)}
    made = bicubic
    for fidelity in args.fidelities:
        upscaler = load_upscaler(args.model, fidelity, "cpu")
        made = upscaler(inputs[:16])  # warms up
        started = time.perf_counter()
        made = upscaler(inputs)
        seconds = time.perf_counter() - started
        results[f"fidelity {fidelity:g}"] = image_quality(real, made) | {"images_per_second": len(inputs) / seconds}
        shown = [x for row in zip(inputs[:8], bicubic[:8], made[:8], real[:8], strict=True) for x in row]
        labels = ["small", "bicubic", f"fidelity {fidelity:g}", "real"] * 8
        save_image(args.output / f"fidelity-{fidelity:g}.png", contact_sheet(shown, 8, labels), overwrite=True)
    head = "PSNR, dB | over bicubic | perceptual | over bicubic's | sharpness | edges | images/s"
    print(f"| {len(pairs)} true pairs | {head} |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    base = results["bicubic"]
    for name, row in results.items():
        row["psnr_gain"] = row["psnr"] - base["psnr"]
        row["perceptual_ratio"] = row["perceptual"] / base["perceptual"]
        print(
            f"| {name} | {row['psnr']:.2f} | {row['psnr_gain']:+.2f} | {row['perceptual']:.4f} | "
            f"{row['perceptual_ratio']:.2f} | {row['sharpness']:.2f} | {row['edges']:.2f} | "
            f"{row.get('images_per_second', 0):.1f} |"
        )
    print(f"goals: {', '.join(f'{name} {value:g}' for name, value in GOALS.items())}")
    return {"model": args.model, "results": results}


if __name__ == "__main__":
    sys.exit(main())
