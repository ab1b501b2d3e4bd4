"""Aspect-ratio buckets: photos of similar shape are trained together at about one number of pixels.

A square crop cuts shoes at the toe and coats at the hem; a square frame fills a third with white. Instead each photo
goes into the bucket whose aspect ratio is nearest to its own, and batches are of one bucket each (as in NovelAI's
improvements on Stable Diffusion, 2022). Everything here is pure: sizes in, plans out.
"""

from __future__ import annotations

import io
import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from gigdiff import rng
from gigdiff.errors import DataError, InputError
from gigdiff.images import fit_image, to_rgb

__all__ = ["BucketOrder", "bucket_sizes", "fill_frame", "fit_to", "nearest_bucket", "photo_size", "spread_quantiles"]

Size = tuple[int, int]  # height, width


def bucket_sizes(height: int, width: int, *, multiple: int = 64, max_ratio: float = 2.0) -> list[Size]:
    """Bucket sizes of at most height x width pixels, from tall to wide.

    Args:
        height, width: the size the model draws by default; always among the buckets.
        multiple: heights and widths are multiples of this.
        max_ratio: longest side over shortest.

    Raises:
        InputError: a size that is no multiple, or a ratio below 1.
    """
    if height % multiple or width % multiple:
        raise InputError(
            f"{height} x {width} (height x width) is not in multiples of --bucket_multiple {multiple}; "
            f"try {max(multiple, height // multiple * multiple)} x {max(multiple, width // multiple * multiple)}, or "
            "another --bucket_multiple."
        )
    if max_ratio < 1:
        raise InputError(f"--max_aspect_ratio {max_ratio:g}: longest side over shortest, so 1 or more is allowed")
    area = height * width
    sizes = {(height, width)}
    for h in range(multiple, int(math.sqrt(area * max_ratio)) + multiple, multiple):
        w = min(area // h, int(max_ratio * h)) // multiple * multiple
        if w and max(h, w) <= max_ratio * min(h, w):
            sizes.add((h, w))
    # of several of one ratio the largest
    by_ratio: dict[float, Size] = {}
    for h, w in sorted(sizes):
        by_ratio[h / w] = (h, w)
    return sorted(by_ratio.values(), key=lambda size: -size[0] / size[1])


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to a photo's `size`, by the ratio of the ratios."""
    ratio = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - ratio), -bucket[0] * bucket[1]))


def photo_size(data: bytes) -> Size:
    """(height, width) of an encoded photo, upright, read from its header.

    Raises:
        DataError: it is no image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
    except Exception as error:  # Pillow's plugins raise many kinds
        raise DataError(f"the image can't be read ({type(error).__name__}: {error})") from error
    return (width, height) if turned else (height, width)


def fit_to(image: Image.Image, size: Size, how: Literal["pad", "crop"] = "pad") -> np.ndarray:
    """A photo as uint8 (height, width, 3): whole in a white frame ("pad"), or filling it, centre cut out ("crop")."""
    return fit_image(image, *size) if how == "pad" else fill_frame(image, *size)


def fill_frame(image: Image.Image, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3): resized (Lanczos) to cover the frame, what sticks out is cut off evenly."""
    fitted = ImageOps.fit(to_rgb(image), (width, height), Image.Resampling.LANCZOS)
    return np.array(fitted, dtype=np.uint8)


class BucketOrder:
    """Which photos a global batch holds: a pure function of (seed, step), so resuming needs only the step number.

    Each batch is of one bucket. Buckets come in turn in proportion to their photos (every `len(bucket_of)` batches
    exactly), and each bucket runs through permutations of its photos, so every photo is seen as often as every other.

    Args:
        bucket_of: each photo's bucket.
        seed: of all orders.
    """

    def __init__(self, bucket_of: Sequence[Size], seed: int) -> None:
        if not bucket_of:
            raise DataError("there are no photos to train on.")
        self.seed = seed
        self.bucket_of = list(bucket_of)
        self.members: dict[Size, list[int]] = {}
        for index, bucket in enumerate(bucket_of):
            self.members.setdefault(bucket, []).append(index)
        self._turns: dict[int, list[Size]] = {}
        self._turns_of: dict[int, dict[Size, list[int]]] = {}

    def _epoch(self, epoch: int) -> tuple[list[Size], dict[Size, list[int]]]:
        """The buckets' turns of one round of `len(bucket_of)` batches, and the turns of each bucket."""
        if epoch not in self._turns:
            if len(self._turns) > 4:
                self._turns, self._turns_of = {}, {}
            order = rng.permutation(len(self.bucket_of), self.seed, "bucket turns", epoch).tolist()
            turns = [self.bucket_of[i] for i in order]
            of: dict[Size, list[int]] = {bucket: [] for bucket in self.members}
            for turn, bucket in enumerate(turns):
                of[bucket].append(turn)
            self._turns[epoch], self._turns_of[epoch] = turns, of
        return self._turns[epoch], self._turns_of[epoch]

    def batch(self, step: int, size: int) -> list[tuple[int, int]]:
        """The `size` samples of global batch `step`: (photo, how often it was seen before)."""
        epoch, turn = divmod(step, len(self.bucket_of))
        turns, turns_of = self._epoch(epoch)
        bucket = turns[turn]
        members = self.members[bucket]
        before = epoch * len(members) + bisect_left(turns_of[bucket], turn)  # this bucket's batches so far
        found = []
        for position in range(before * size, (before + 1) * size):
            seen, place = divmod(position, len(members))
            found.append((members[self._permutation(bucket, seen)[place]], seen))
        return found

    def _permutation(self, bucket: Size, index: int) -> list[int]:
        key = (bucket, index)
        if getattr(self, "_last_key", None) != key:
            purpose = f"data order {bucket[0]}x{bucket[1]}"
            self._last = rng.permutation(len(self.members[bucket]), self.seed, purpose, index).tolist()
            self._last_key = key
        return self._last


def summary(order: BucketOrder) -> str:
    """ "12 at 80 x 64, 3 at 64 x 80": photos in each bucket."""
    return ", ".join(f"{len(members)} at {h} x {w}" for (h, w), members in sorted(order.members.items()))


def spread_quantiles(count: int, seed: int, purpose: str) -> torch.Tensor:
    """(count,) the quantiles (i + 1/2) / count in a fixed random order: noise levels that cover the law evenly."""
    quantiles = (torch.arange(count) + 0.5) / count
    return quantiles[rng.permutation(count, seed, purpose)]
