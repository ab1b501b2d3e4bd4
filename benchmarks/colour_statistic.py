"""Which statistic of a photo's pixels says best whether it has the colour that was asked for? For colour_difference.py.

    python benchmarks/colour_statistic.py --count 300

Over real validation photos: CIEDE2000 to the photo's own base colour against that of a random other photo's. Prints
for each statistic the share of pairs in which the own colour is nearer (0.5 = no use), and both means.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from gigdiff.data import load_products
from gigdiff.data.vocabulary import COLOUR_RGB
from gigdiff.evaluation import choose_products, default_data_dir, load_images
from gigdiff.metrics.ciede2000 import ciede2000
from gigdiff.metrics.colour import centre_weights, foreground_weights, srgb_to_lab
from gigdiff.metrics.colour_difference import HEIGHT, LEAST_WEIGHT, WIDTH
from gigdiff.metrics.features import resize_antialiased

QUANTILES = (0.5, 0.25, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=default_data_dir())
    parser.add_argument("--count", type=int, default=300)
    args = parser.parse_args()

    data = load_products(args.data_dir, split="validation")
    data = data.select(choose_products(data.records(), args.count))
    colours = [record.product.colour for record in data.records()]
    kept = [i for i, colour in enumerate(colours) if colour in COLOUR_RGB]
    others = np.random.default_rng(0).permutation(kept)
    pixels = resize_antialiased(load_images(data), HEIGHT, WIDTH).permute(0, 2, 3, 1).reshape(len(data), -1, 3)
    lab, centre = srgb_to_lab(pixels), centre_weights(HEIGHT, WIDTH)
    named = {name: srgb_to_lab(torch.tensor(rgb).double()).numpy() for name, rgb in COLOUR_RGB.items()}
    for where, weights in (("everywhere", torch.ones_like(centre)), ("near the centre", centre)):
        weight = ((foreground_weights(lab) + LEAST_WEIGHT) * weights).double().numpy()
        pixels = list(zip(lab.double().numpy(), weight, strict=True))
        for quantile in (None, *QUANTILES):
            own = np.array([difference(*pixels[i], named[str(colours[i])], quantile) for i in kept])
            other = np.array(
                [difference(*pixels[i], named[str(colours[j])], quantile) for i, j in zip(kept, others, strict=True)]
            )
            what = "difference of the median colour" if quantile is None else f"{quantile} quantile of differences"
            nearer = (own[:, None] < other[None]).mean()
            print(f"{what}, {where}: {nearer:.3f} of pairs; mean {own.mean():.1f} own, {other.mean():.1f} other")


def difference(lab: np.ndarray, weights: np.ndarray, wanted: np.ndarray, quantile: float | None) -> float:
    """Of a photo's pixels (P, 3), weights (P,), to a colour (3,): that of the median colour, or a quantile of all."""
    if quantile is None:
        return float(ciede2000(np.array([weighted_quantile(axis, weights, 0.5) for axis in lab.T]), wanted))
    return weighted_quantile(ciede2000(lab, wanted), weights, quantile)


def weighted_quantile(values: np.ndarray, weights: np.ndarray, quantile: float) -> float:
    """The least value that `quantile` of the weight does not exceed."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, quantile * reached[-1])])


if __name__ == "__main__":
    main()
