"""Aspect-ratio buckets: sizes, assignment, an order that is fair and needs no state, and the cache behind it."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gigdiff.data import load_products
from gigdiff.data.buckets import (
    BucketOrder,
    bucket_sizes,
    fit_to,
    nearest_bucket,
    photo_size,
    spread_quantiles,
)
from gigdiff.data.encoded import EncodedBuckets
from gigdiff.data.splits import hold_out
from gigdiff.errors import DataError, InputError


def test_bucket_sizes_keep_the_area_and_hold_the_default() -> None:
    sizes = bucket_sizes(1024, 1024, multiple=64, max_ratio=2.0)
    assert (1024, 1024) in sizes and (1408, 704) in sizes and (704, 1408) in sizes
    for h, w in sizes:
        assert h % 64 == w % 64 == 0 and h * w <= 1024 * 1024 and max(h, w) <= 2 * min(h, w)
        assert h * w > 0.85 * 1024 * 1024
    ratios = [h / w for h, w in sizes]
    assert ratios == sorted(ratios, reverse=True) and len(set(ratios)) == len(ratios)
    assert bucket_sizes(64, 64, multiple=64, max_ratio=1.0) == [(64, 64)]
    with pytest.raises(InputError, match=r"500 x 512.*try 448 x 512"):
        bucket_sizes(500, 512)
    with pytest.raises(InputError, match="max_aspect_ratio"):
        bucket_sizes(512, 512, max_ratio=0.5)


def test_a_photo_goes_to_the_bucket_of_the_nearest_ratio() -> None:
    sizes = bucket_sizes(512, 512, multiple=64, max_ratio=2.0)
    assert nearest_bucket((2000, 2000), sizes) == (512, 512)
    tall, wide = nearest_bucket((800, 600), sizes), nearest_bucket((600, 800), sizes)
    assert tall == wide[::-1] and abs(np.log(tall[0] / tall[1]) - np.log(800 / 600)) < 0.15
    assert nearest_bucket((5000, 100), sizes) == sizes[0]


def png(height: int, width: int, value: int = 0, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(stream, format="PNG", **options)
    return stream.getvalue()


def test_photo_size_is_that_of_the_upright_photo() -> None:
    assert photo_size(png(30, 20)) == (30, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert photo_size(png(30, 20, exif=exif)) == (20, 30)
    with pytest.raises(DataError, match="can't be read"):
        photo_size(b"nothing")


def test_pad_keeps_the_whole_photo_and_crop_fills_the_frame() -> None:
    photo = Image.fromarray(np.full((40, 80, 3), 10, np.uint8))
    padded, cropped = fit_to(photo, (64, 64), "pad"), fit_to(photo, (64, 64), "crop")
    assert padded.shape == cropped.shape == (64, 64, 3)
    assert (padded[0] == 255).all() and (padded[32] == 10).all() and (cropped == 10).all()


def test_the_order_is_fair_by_bucket_and_a_pure_function_of_the_step() -> None:
    buckets = [(64, 64)] * 10 + [(80, 48)] * 5 + [(48, 80)] * 1
    order = BucketOrder(buckets, seed=3)
    rounds, size = 3, 4
    seen: Counter[int] = Counter()
    batches = [order.batch(step, size) for step in range(rounds * len(buckets))]
    for batch in batches:
        assert len({buckets[photo] for photo, _ in batch}) == 1
        seen.update(photo for photo, _ in batch)
    # every photo exactly as often as every other, however its bucket's size compares with the batch
    assert set(seen.values()) == {rounds * size} and len(seen) == len(buckets)
    # the k-th visit of a photo is told, for its captions
    for photo in range(len(buckets)):
        visits = [times for batch in batches for index, times in batch if index == photo]
        assert visits == list(range(rounds * size))
    # any step alone, in any order, from a new object
    other = BucketOrder(buckets, seed=3)
    assert [other.batch(step, size) for step in (40, 7, 0)] == [batches[step] for step in (40, 7, 0)]
    assert (
        BucketOrder(buckets, seed=4).batch(0, size) != batches[0]
        or BucketOrder(buckets, 4).batch(1, size) != batches[1]
    )


def test_quantiles_cover_the_law_evenly() -> None:
    u = spread_quantiles(10, 0, "x")
    assert torch.allclose(u.sort().values, (torch.arange(10) + 0.5) / 10) and not torch.equal(u, u.sort().values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = []
    for i, (height, width) in enumerate([(64, 64), (80, 48), (48, 80), (64, 64)]):
        (tmp_path / f"{i}.png").write_bytes(png(height, width, 40 * i))
        rows.append({"file_name": f"{i}.png", "text": [f"photo {i}", f"picture {i}"], "name": f"thing {i // 2}"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def encoded(folder: Path, cache: Path, calls: list, **changes: object) -> EncodedBuckets:
    dataset = load_products(str(folder))

    def encode_pixels(pixels: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(pixels.shape))
        return pixels[:, :1, ::8, ::8]

    def encode_text(text: str) -> dict[str, torch.Tensor]:
        calls.append(text)
        return {"prompt_embeds": torch.full((1, 3, 2), float(len(text))), "pooled_prompt_embeds": torch.ones(1, 5)}

    arguments: dict = {
        "buckets": bucket_sizes(64, 64, multiple=16, max_ratio=2.0), "image_fit": "pad", "encode_pixels": encode_pixels,
        "encode_text": encode_text, "image_fingerprint": "v", "text_fingerprint": "t", "dtype": "float32",
        "cache_dir": cache,
    } | changes  # fmt: skip
    return EncodedBuckets(dataset, [list(r.captions) for r in dataset.records()], **arguments)  # type: ignore[arg-type]


def test_latents_and_texts_are_encoded_once_and_changes_are_noticed(folder: Path, tmp_path: Path) -> None:
    cache, calls = tmp_path / "cache", []
    data = encoded(folder, cache, calls)
    shapes = [c for c in calls if isinstance(c, tuple)]
    assert sorted(shapes) == sorted([(1, 3, 64, 64)] * 2 + [(1, 3, *data.bucket_of[1]), (1, 3, *data.bucket_of[2])])
    assert data.latents([0, 3]).shape == (2, 1, 8, 8)
    condition = data.conditions(["photo 0", ""])
    assert condition["prompt_embeds"].shape == (2, 3, 2) and condition["pooled_prompt_embeds"].shape == (2, 5)
    assert condition["prompt_embeds"][:, 0, 0].tolist() == [7.0, 0.0]  # the empty prompt is there for dropout
    assert data.size_ids([1]).tolist() == [[80, 48, 0, 0, *data.bucket_of[1]]]
    before = data.fingerprint()

    def again(**changes: object) -> int:
        calls.clear()
        encoded(folder, cache, calls, **changes)
        return sum(isinstance(c, tuple) for c in calls)

    assert again() == 0
    assert again(image_fingerprint="another encoder") == 4
    assert again(dtype="float16") == 4 and again(image_fit="crop") == 4
    assert again(flip=True) == 4  # the mirrored ones only
    (folder / "3.png").write_bytes(png(64, 64, 200))  # an edited photo
    assert again() == 1
    assert encoded(folder, cache, []).fingerprint() != before


def test_two_processes_encode_a_share_each(folder: Path, tmp_path: Path) -> None:
    cache, first, second = tmp_path / "cache", [], []
    one = encoded(folder, cache, first, share=(0, 2))
    encoded(folder, cache, second, share=(1, 2))
    assert sum(isinstance(c, tuple) for c in first) == sum(isinstance(c, tuple) for c in second) == 2
    one.refresh()
    assert one.latents([0, 3]).shape[0] == 2 and one.conditions(["picture 3"])["prompt_embeds"].shape[0] == 1


def test_hold_out_never_parts_a_product_and_serves_few_photos(folder: Path) -> None:
    dataset = load_products(str(folder))
    rest, held = hold_out(dataset, 0.1, 64)
    assert held is not None and len(rest) + len(held) == 4
    assert not {r.group for r in rest.records()} & {r.group for r in held.records()}
    assert hold_out(dataset, 0.0, 64) == (dataset, None)
    single = dataset.select([0, 1])
    assert hold_out(single, 0.5, 64) == (single, None)
