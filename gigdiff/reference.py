"""Real photos to measure against, and what is known of them: made once, then any number of generators is held to it.

reference = make_reference(load_products(dir, split="validation"), load_products(dir), count=1000)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gigdiff.errors import DataError, InputError
from gigdiff.images import fit_image, to_pil
from gigdiff.metrics.features import FeatureExtractor, cached_features, load_extractor
from gigdiff.metrics.frechet import feature_statistics, frechet_distance
from gigdiff.metrics.probe import Probe, load_probe, probe_features
from gigdiff.products import FIELDS, Product

if TYPE_CHECKING:
    from gigdiff.data.records import ProductRecord
    from gigdiff.metrics.vision import ClipFeatures

__all__ = [
    "COUNT",
    "HEIGHT",
    "PROBE_NAMES",
    "WIDTH",
    "Products",
    "Reference",
    "TrainPhotos",
    "choose_products",
    "default_data_dir",
    "described",
    "fit_all",
    "load_images",
    "make_reference",
]

HEIGHT, WIDTH = 80, 64
COUNT = 1000
PROBE_NAMES = ("article_type", "colour_group", "gender")
FLOOR_SUBSETS = 3  # random train subsets that real photos are compared to real photos over


class Products(Protocol):
    """What is needed of a dataset: gigdiff.data.ProductDataset has it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ProductRecord: ...

    def records(self) -> list[ProductRecord]: ...


@dataclass(frozen=True)
class TrainPhotos:
    """The photos that a model may have copied.

    Attributes:
        records: all train products, without their photos.
        rows: those of `records` whose features are here, in this order.
        features: float32 (len(rows), D) of the reference's extractor.
        photos: indices into `records` -> uint8 (N, H, W, 3).
    """

    records: tuple[ProductRecord, ...]
    rows: tuple[int, ...]
    features: np.ndarray
    photos: Callable[[Sequence[int]], np.ndarray]

    @property
    def groups(self) -> list[str]:
        """Which product each of `rows` shows."""
        return [self.records[row].group for row in self.rows]


@dataclass(frozen=True)
class Reference:
    """Real photos and what is known of them.

    Attributes:
        products: the N products that are drawn. ids: their ids.
        images: their real photos, uint8 (N, H, W, 3), fitted into the frame as in training.
        features: extractor name -> float32 (N, D).
        extractor: the extractor of all distances. A report never mixes two.
        probes: by name.
        floors: Fréchet distances of N random train photos each to these photos; empty without train photos.
        floor_features: the features of those train photos, (N, D) each.
        train: for the copy test, the neighbours' control and the prompt sets that need to know what training held.
        clip: for the CLIP score, where its weights are at hand.
    """

    products: tuple[Product, ...]
    ids: tuple[str, ...]
    images: np.ndarray
    features: Mapping[str, np.ndarray]
    extractor: FeatureExtractor
    probes: Mapping[str, Probe]
    floors: tuple[float, ...] = ()
    floor_features: tuple[np.ndarray, ...] = ()
    train: TrainPhotos | None = None
    clip: ClipFeatures | None = None
    selection_seed: int = 0
    source: str = ""
    cache: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in which images are compared."""
        return self.images.shape[1], self.images.shape[2]

    @property
    def floor(self) -> float | None:
        """Mean distance of real photos to these real photos at the same count: no generator can be asked to beat it."""
        return float(np.mean(self.floors)) if self.floors else None


def default_data_dir() -> Path:
    """$GIGDIFF_DATA/fashion-products, else ../shared/data/fashion-products beside the repository."""
    root = os.environ.get("GIGDIFF_DATA") or Path(__file__).parents[2] / "shared" / "data"
    return Path(root) / "fashion-products"


def load_images(data: Products, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """All photos of a dataset, fitted into the frame as in training: uint8 (N, height, width, 3)."""
    return _photos(data, range(len(data)), height, width)


def choose_products(
    records: Sequence[ProductRecord], count: int, seed: int = 0, purpose: str = "products"
) -> list[int]:
    """A fixed random choice: indices of the `count` records whose hashed (seed, purpose, id) sorts first.

    It does not depend on the records' order, and a smaller count is a part of a larger one.
    """
    if not 1 <= count <= len(records):
        raise InputError(f"count is {count}; there are {len(records)} products to choose from; lower --count")
    keys = [hashlib.sha256(f"{seed}|{purpose}|{record.id}".encode()).digest() for record in records]
    return sorted(range(len(records)), key=keys.__getitem__)[:count]


def make_reference(
    validation: Products,
    train: Products | None = None,
    *,
    count: int = COUNT,
    seed: int = 0,
    height: int = HEIGHT,
    width: int = WIDTH,
    extractor: str | FeatureExtractor = "efficientnet-lite0",
    clip: str | None = None,
    copies: int | None = 0,
    cache_dir: Path | str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """Chooses `count` validation products, extracts their real photos' features and measures real against real.

    Args:
        train: photos for the floor of the Fréchet distance; without them there is no floor.
        extractor: see `gigdiff.metrics.features.load_extractor`.
        clip: folder or hub id of CLIP weights; without it there is no CLIP score.
        copies: train photos to search for copies: None = all of them, 0 = no copy test. Their features take a while
            once (some minutes for 40,000 on two cores) and are then read from `cache_dir`.
        cache_dir: keep features there, named by content.
        on_progress: called with (train photos whose features are there, in all).
    """
    extractor = load_extractor(extractor) if isinstance(extractor, str) else extractor
    probes = {name: load_probe(name) for name in PROBE_NAMES}
    every = validation.records()
    rows = choose_products(every, count, seed)
    chosen = [every[row] for row in rows]
    images = _photos(validation, rows, height, width)
    features = {extractor.name: cached_features(extractor, images, cache_dir)}
    statistics = feature_statistics(features[extractor.name])
    floors, floor_features = [], []
    if train is not None:
        records = train.records()
        for k in range(FLOOR_SUBSETS):
            subset = _photos(
                train, choose_products(records, min(count, len(records)), seed, f"floor {k}"), height, width
            )
            floor_features.append(cached_features(extractor, subset, cache_dir))
            floors.append(frechet_distance(feature_statistics(floor_features[-1]), statistics))
    loaded_clip = None
    if clip is not None:
        from gigdiff.metrics.vision import load_clip

        loaded_clip = load_clip(clip)
    return Reference(
        products=tuple(described(record) for record in chosen),
        ids=tuple(record.id for record in chosen),
        images=images,
        features=probe_features(images, list(probes.values()), features, cache_dir),
        extractor=extractor,
        probes=probes,
        floors=tuple(floors),
        floor_features=tuple(floor_features),
        train=None
        if train is None or copies == 0
        else _train_photos(train, copies, seed, extractor, height, width, cache_dir, on_progress),
        clip=loaded_clip,
        selection_seed=seed,
        source=str(getattr(validation, "source", "")),
    )


def described(record: ProductRecord) -> Product:
    """The record's product; where a caption stands in for a name, with what can be read off the caption."""
    if record.product.name or not record.caption:
        return record.product
    read = Product.from_prompt(record.caption)
    own = {field: getattr(record.product, field) for field in FIELDS if getattr(record.product, field) is not None}
    return replace(read, **{"name": record.caption, **own})


def fit_all(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Images of another size are fitted into the reference's frame like its photos."""
    if images.shape[1:3] == (height, width):
        return images
    return np.stack([fit_image(to_pil(image), height, width) for image in images])


def _photos(data: Products, indices: Sequence[int], height: int, width: int) -> np.ndarray:
    images = np.empty((len(indices), height, width, 3), np.uint8)
    for place, i in enumerate(indices):
        record = data[i]
        if record.image is None:
            raise DataError(f"record {i} (id {record.id}) has no image; load the dataset with its images")
        images[place] = fit_image(record.image, height, width)
    return images


def _train_photos(
    train: Products,
    copies: int | None,
    seed: int,
    extractor: FeatureExtractor,
    height: int,
    width: int,
    cache_dir: Path | str | None,
    on_progress: Callable[[int, int], None] | None,
) -> TrainPhotos:
    records = train.records()
    rows = list(range(len(records)))
    if copies is not None and copies < len(records):
        rows = choose_products(records, copies, seed, "copies")

    def photos(chosen: Sequence[int]) -> np.ndarray:
        return _photos(train, chosen, height, width)

    def extract(places: list[int]) -> np.ndarray:
        return extractor(photos([rows[place] for place in places]))

    encoded = getattr(train, "image_bytes", None)
    if cache_dir is None or encoded is None:
        features = extract(list(range(len(rows))))
    else:
        # Photo by photo, so that the 4,000 of a quick run are not extracted again for all 40,000.
        from gigdiff.data.cache import ContentStore, content_key, fill

        fingerprint = content_key(extractor.name, f"{height}x{width}").hex()[:16]
        store = ContentStore(cache_dir, "features", fingerprint)
        keys = [content_key(encoded(row)) for row in rows]
        fill(
            store,
            keys,
            lambda places: extract(places)[:, None],
            batch_size=64,
            shard_size=2048,
            on_progress=on_progress,
        )
        features = np.concatenate([store.get(key) for key in keys])
    known = tuple(replace(record, product=described(record)) for record in records)
    return TrainPhotos(known, tuple(rows), features, photos)
