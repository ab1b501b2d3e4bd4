"""How surely is the watermark found, and how often is it seen where it is not? Real photos on white, all kinds of harm.

    python benchmarks/watermark.py --count 200 --unmarked 2000

Prints a Markdown table: for each change, the share of marked photos in which the mark is found, with a 95% Wilson
interval; and for unmarked photos, the share of false alarms. The last line of stdout is the same as JSON. Photos are
fitted into --height x --width, as gigdiff draws and enlarges them.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from gigdiff.data import load_products
from gigdiff.images import fit_image, to_pil
from gigdiff.watermark import THRESHOLD, detect, embed


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def resized(image: Image.Image, factor: float) -> Image.Image:
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, Image.Resampling.BICUBIC)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": lambda image: image,
    "JPEG 75": lambda image: jpeg(image, 75),
    "10% smaller": lambda image: resized(image, 0.9),
    "10% larger": lambda image: resized(image, 1.1),
    "10% smaller, then JPEG 75": lambda image: jpeg(resized(image, 0.9), 75),
    "JPEG 50": lambda image: jpeg(image, 50),
}


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927)."""
    z, p = 1.96, hits / count
    middle, half = p + z**2 / (2 * count), z * (p * (1 - p) / count + z**2 / (4 * count**2)) ** 0.5
    return (middle - half) / (1 + z**2 / count), (middle + half) / (1 + z**2 / count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("../shared/data/fashion-products-large"))
    parser.add_argument("--count", type=int, default=200, help="marked validation photos")
    parser.add_argument("--unmarked", type=int, default=2000, help="unmarked train photos")
    parser.add_argument("--height", type=int, default=320)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--strength", type=float, default=1.0)
    args = parser.parse_args()

    def photos(split: str, count: int) -> list[Image.Image]:
        data = load_products(str(args.data_dir), split=split, limit=count)
        pictures = (data[i].image for i in range(len(data)))
        return [to_pil(fit_image(picture, args.height, args.width)) for picture in pictures if picture is not None]

    plain = photos("validation", args.count)
    marked = [embed(image, args.strength) for image in plain]
    errors = [
        float(((np.asarray(a, float) - np.asarray(b, float)) ** 2).mean()) for a, b in zip(plain, marked, strict=True)
    ]
    rows: dict[str, dict[str, float]] = {}
    for name, change in CHANGES.items():
        scores = np.array([detect(change(image)) for image in marked])
        hits = int((scores > THRESHOLD).sum())
        low, high = wilson(hits, len(scores))
        rows[name] = {"found": hits / len(scores), "low": low, "high": high, "median_z": float(np.median(scores))}
        print(f"{name}: {hits}/{len(scores)}", file=sys.stderr, flush=True)
    scores = np.array([detect(image) for image in photos("train", args.unmarked)])
    alarms = int((scores > THRESHOLD).sum())
    low, high = wilson(alarms, len(scores))
    rows["unmarked"] = {"found": alarms / len(scores), "low": low, "high": high, "median_z": float(np.median(scores))}
    print(f"| {len(plain)} marked, {len(scores)} unmarked, z > {THRESHOLD:g} | found | 95% | median z |")
    print("| --- | ---: | --- | ---: |")
    for name, row in rows.items():
        print(f"| {name} | {row['found']:.4f} | {row['low']:.4f} to {row['high']:.4f} | {row['median_z']:.1f} |")
    psnr = float(np.median(10 * np.log10(255**2 / np.array(errors))))
    print(
        f"median PSNR of the mark: {psnr:.1f} dB; unmarked z: mean {scores.mean():.2f}, standard deviation "
        f"{scores.std():.2f}, greatest {scores.max():.2f}"
    )
    print(json.dumps({"threshold": THRESHOLD, "psnr": psnr, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
