"""How fast are features extracted, against torchmetrics' default path? Goal: 1.5x, features within 1e-2 relative.

    pip install --no-deps --target /tmp/torch-fidelity torch-fidelity
    PYTHONPATH=/tmp/torch-fidelity python benchmarks/feature_speed.py --weights FILE

(torch-fidelity's __init__ needs torchvision, its Inception doesn't. FILE is its weights-inception-2015-12-05-6726825d.)
torchmetrics' FrechetInceptionDistance puts uint8 images through torch-fidelity's InceptionV3 in float32, batch norms
apart, memory in the default format. Ours is the same network with batch norms folded, channels_last, and bfloat16 by
--dtype. Where torch-fidelity is not found, its path is done by the same layers unfolded. Both take turns; the last
line is JSON.

Without --weights random ones are used: the speed is the same, the feature error is not that of trained weights.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from gigdiff.evaluation import git_commit, versions
from gigdiff.metrics.efficientnet import load_efficientnet
from gigdiff.metrics.features import EfficientNetLite0Features
from gigdiff.metrics.inception import BATCH_NORM_EPS, InceptionV3, load_inception


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="torch-fidelity's InceptionV3 file; default: random weights")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--their_batch_size", type=int, default=32, help="torchmetrics takes the batch it is given")
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()

    images = np.random.default_rng(0).integers(0, 256, (args.images, 80, 64, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        weights = args.weights or random_weights(Path(folder) / "random.pth")
        theirs = torch_fidelity(weights)
        ways: dict[str, Callable[[], np.ndarray]] = {
            "ours, float32": lambda: load(weights, torch.float32, args.batch_size)(images),
            "ours, bfloat16": lambda: load(weights, torch.bfloat16, args.batch_size)(images),
            "efficientnet-lite0 (gigdiff's default)": lambda: EfficientNetLite0Features(args.batch_size)(images),
        }
        load_efficientnet()
        if theirs is not None:
            ways = {"torchmetrics' default": lambda: run_theirs(theirs, images, args.their_batch_size), **ways}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        features = {}
        for name, way in ways.items():
            features[name] = way()  # the warm-up
        for _ in range(args.repetitions):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - began)

    base = "torchmetrics' default" if theirs is not None else "ours, float32"
    rows = {}
    for name in ways:
        error = None
        if features[name].shape == features[base].shape:
            error = float(np.linalg.norm(features[name] - features[base]) / np.linalg.norm(features[base]))
        rows[name] = {
            "images_per_second": round(args.images / statistics.median(seconds[name]), 2),
            "range": [round(args.images / s, 2) for s in (max(seconds[name]), min(seconds[name]))],
            "times_base": round(statistics.median(seconds[base]) / statistics.median(seconds[name]), 2),
            "relative_error": None if error is None else round(error, 5),
        }
        print(f"{name}: {rows[name]}", file=sys.stderr)
    about = {
        "base": base, "weights": args.weights.name if args.weights else "random", "batch_size": args.batch_size,
        "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": versions(), "git_commit": git_commit(),
    }  # fmt: skip
    print(json.dumps({"rows": rows, **about}))


_loaded: dict[tuple[str, str], object] = {}


def load(weights: Path, dtype: torch.dtype, batch_size: int):
    """Our extractor, loaded once: loading is not what is timed."""
    key = (str(weights), str(dtype))
    if key not in _loaded:
        _loaded[key] = load_inception(weights, dtype=dtype)
    extractor = _loaded[key]
    extractor.batch_size = batch_size
    return extractor


def torch_fidelity(weights: Path) -> torch.nn.Module | None:
    """What torchmetrics calls by default; None where torch-fidelity is not on the path."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or spec.submodule_search_locations is None:
        print("torch-fidelity is not on the path: see the top of this file", file=sys.stderr)
        return None
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["torch_fidelity"] = package
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    return module.FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(weights))


def run_theirs(net: torch.nn.Module, images: np.ndarray, batch_size: int) -> np.ndarray:
    """As FrechetInceptionDistance.update: uint8 NCHW in, float32 features out."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(images[start : start + batch_size]).permute(0, 3, 1, 2).contiguous()
            parts.append(net(batch)[0].numpy())
    return np.concatenate(parts)


def random_weights(path: Path) -> Path:
    """torch-fidelity's state dict with random weights that keep activations alive."""
    generator = torch.Generator().manual_seed(0)
    net = InceptionV3()
    raw = {"fc.weight": net.fc.weight.detach(), "fc.bias": net.fc.bias.detach()}
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            weight = torch.randn(module.weight.shape, generator=generator)
            raw[f"{name}.conv.weight"] = weight * (2.0 / weight[0].numel()) ** 0.5
            raw[f"{name}.bn.weight"] = torch.ones(len(weight))
            raw[f"{name}.bn.bias"] = torch.zeros(len(weight))
            raw[f"{name}.bn.running_mean"] = torch.zeros(len(weight))
            raw[f"{name}.bn.running_var"] = torch.full((len(weight),), 1.0 - BATCH_NORM_EPS)
            raw[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    torch.save(raw, path)
    return path


if __name__ == "__main__":
    main()
