"""Fits the probes that gigdiff ships, on real train photos, and reads their ceiling off real validation photos.

    python benchmarks/fit_probes.py --data_dir ../shared/data/fashion-products

Writes gigdiff/pretrained/probes/<name>.{safetensors,json} and prints the accuracies as JSON. Settings were chosen on a
tenth of the train photos, grouped by product name, not on the validation split. Features are cached under --cache_dir.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gigdiff.data import load_products
from gigdiff.evaluation import HEIGHT, WIDTH, default_data_dir, load_images
from gigdiff.metrics.colour import ColourHistogram
from gigdiff.metrics.features import cached_features, load_extractor
from gigdiff.metrics.probe import PROBES, bootstrap_interval, fit_probe, target_of

# The article type is read off the network's features alone; the colour needs the histogram, and the network to know
# which part of the picture is the product (a shirt is photographed with the trousers below it).
SETTINGS: dict[str, dict[str, Any]] = {
    "article_type": {"inputs": ("network",), "hidden": 0, "epochs": 10, "dropout": 0.3, "min_count": 20},
    "colour_group": {"inputs": ("network", "colour"), "hidden": 128, "epochs": 10, "dropout": 0.4, "min_count": 20},
    "gender": {"inputs": ("network",), "hidden": 0, "epochs": 8, "dropout": 0.3, "min_count": 20},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=default_data_dir())
    parser.add_argument("--output", type=Path, default=PROBES)
    parser.add_argument("--cache_dir", type=Path, default=Path("cache/eval"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    extractors = {"network": load_extractor(), "colour": ColourHistogram()}
    features: dict[str, dict[str, np.ndarray]] = {}
    products = {}
    for split in ("train", "validation"):
        data = load_products(args.data_dir, split=split)
        print(f"{split}: {len(data)} photos", file=sys.stderr, flush=True)
        images = load_images(data, HEIGHT, WIDTH)
        features[split] = {key: cached_features(x, images, args.cache_dir) for key, x in extractors.items()}
        products[split] = [record.product for record in data.records()]

    summary = {}
    for name, settings in SETTINGS.items():
        inputs = settings["inputs"]
        named = {s: {extractors[key].name: features[s][key] for key in inputs} for s in features}
        options = {key: value for key, value in settings.items() if key != "inputs"}
        targets = [target_of(name, product) for product in products["train"]]
        probe = fit_probe(name, named["train"], targets, seed=args.seed, **options)
        correct = probe.correct(named["validation"], products["validation"])
        low, high = bootstrap_interval(correct)
        counted = int((~np.isnan(correct)).sum())
        measured = {
            "validation_accuracy": round(float(np.nanmean(correct)), 4),
            "validation_interval_95": [round(low, 4), round(high, 4)],
            "validation_images": counted,
            "validation_images_of_no_class": len(correct) - counted,
            "command": "python benchmarks/fit_probes.py",
            "data": args.data_dir.name,
        }
        replace(probe, details={**probe.details, **measured}).save(args.output)
        summary[name] = {"classes": len(probe.classes), **measured}
        print(f"{name}: {measured['validation_accuracy']:.3f}", file=sys.stderr, flush=True)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
