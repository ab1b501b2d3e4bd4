"""What the data tests share: a private cache, the real data where it is at hand, and small product tables."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from PIL import Image

from gigdiff.data import ProductDataset, load_products


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a test prepares stays in the user's cache, and no test finds what another one left."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ProductDataset]:
    """The splits of fashion-products, prepared once a session; skips where the data is missing."""
    root = Path(os.environ.get("GIGDIFF_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    folder = root / "fashion-products"
    if not folder.is_dir():
        pytest.skip(
            f"the product photos are not at {folder}; set GIGDIFF_DATA to the folder that holds fashion-products"
        )
    cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("real")
    try:
        return {split: load_products(folder, split=split) for split in ("train", "validation")}
    finally:
        datasets.config.HF_DATASETS_CACHE = cache


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """encode(image, format="PNG", **options) -> the file's bytes."""

    def _encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    return _encode


@pytest.fixture
def rows(encode: Callable[..., bytes]) -> list[dict[str, object]]:
    """Four products in the known schema, in four plain colours."""
    table = [
        (11, "Women", "Dresses", "Red", "Summer", "Casual", "Acme Women Red Dress", (200, 10, 20)),
        (12, "Men", "Casual Shoes", "Black", "Fall", "Casual", "Acme Men Black Shoes", (10, 10, 10)),
        (13, "Men", "Casual Shoes", "NA", "Fall", "NA", "ACME  men black SHOES!", (30, 30, 30)),
        (14, "Unisex", "Backpacks", "Navy Blue", "Winter", "Travel", "Hill Navy Backpack", (20, 28, 78)),
    ]
    return [
        {
            "id": identity,
            "gender": gender,
            "articleType": kind,
            "baseColour": colour,
            "season": season,
            "usage": usage,
            "productDisplayName": name,
            "image": {"bytes": encode(Image.new("RGB", (6, 8), rgb)), "path": None},
        }
        for identity, gender, kind, colour, season, usage, name, rgb in table
    ]


@pytest.fixture
def products(rows: list[dict[str, object]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
