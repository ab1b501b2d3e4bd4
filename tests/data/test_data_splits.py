"""Splits by group, and the leakage report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import pytest
from PIL import Image

from gigdiff.data import LeakageReport, ProductDataset, leakage_report, load_products, split_by_group
from gigdiff.errors import DataError, InputError

Encode = Callable[..., bytes]


def catalogue(encode: Encode, names: list[str], start: int = 0) -> ProductDataset:
    """A product a name, each with a picture of its own colour."""
    rows: list[dict[str, Any]] = [
        {
            "id": str(start + i),
            "name": name,
            "image": encode(Image.new("RGB", (2, 2), ((start + i) % 256, (start + i) // 256, 7))),
        }
        for i, name in enumerate(names)
    ]
    return load_products(datasets.Dataset.from_list(rows))


def names(ds: ProductDataset) -> list[str]:
    return [str(record.product.name) for record in ds.records()]


@pytest.fixture
def many(encode: Encode) -> ProductDataset:
    """1,000 photos of 500 products."""
    return catalogue(encode, [f"Acme Shirt {i // 2}" for i in range(1000)])


def test_no_group_is_parted(many: ProductDataset) -> None:
    parts = split_by_group(many, {"train": 0.8, "validation": 0.1, "test": 0.1})
    assert sum(len(part) for part in parts.values()) == len(many)
    groups = [{record.group for record in part.records()} for part in parts.values()]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert 0.72 < len(parts["train"]) / len(many) < 0.88


def test_splitting_is_deterministic_and_depends_on_the_seed(many: ProductDataset) -> None:
    first, again, other = (split_by_group(many, seed=seed)["validation"] for seed in (0, 0, 1))
    assert names(first) == names(again)
    assert set(names(first)) != set(names(other))


def test_adding_products_moves_no_other(many: ProductDataset, encode: Encode) -> None:
    more = catalogue(encode, ["Brand New Coat", *names(many), "Another Coat"])
    before = split_by_group(many, {"train": 0.7, "validation": 0.3})
    after = split_by_group(more, {"train": 0.7, "validation": 0.3})
    for split in before:
        assert set(names(before[split])) == {name for name in names(after[split]) if name.startswith("Acme")}


def test_spelling_does_not_part_a_product(encode: Encode) -> None:
    ds = catalogue(encode, ["Acme Red-Coat", "ACME  red coat!", "Acmé Red Coat", "acme RED (coat)"])
    assert len({record.group for record in ds.records()}) == 1


@pytest.mark.parametrize("fractions", [{}, {"train": 0.5}, {"train": 0.6, "test": 0.6}, {"train": 1.5, "test": -0.5}])
def test_bad_fractions(many: ProductDataset, fractions: dict[str, float]) -> None:
    with pytest.raises(InputError, match="fractions="):
        split_by_group(many, fractions)


def test_an_empty_part_is_an_error(encode: Encode) -> None:
    with pytest.raises(DataError, match=r'split "validation".*came out empty'):
        split_by_group(catalogue(encode, ["One Coat"]), {"train": 0.999, "validation": 0.001})


def test_leakage_report_finds_each_kind(encode: Encode) -> None:
    a = catalogue(encode, ["Acme Red Coat", "Hill Blue Bag 21", "Dune Hat"])
    b = catalogue(
        encode, ["ACME red coat", "Hill Green Bags 34", "Sun Cap"], start=2
    )  # id 2 and its picture are Dune's too
    report = leakage_report(a, b)
    assert not report.clean
    assert report.groups == {"acme red coat": (["0"], ["2"])}
    assert report.ids == {"2": (["2"], ["2"])}
    assert report.images is not None and list(report.images.values()) == [(["2"], ["2"])]
    assert report.names["bag hill"] == (["1"], ["3"])
    text = str(report)
    assert "3 against 3 products: LEAK" in text
    assert 'groups shared: 1 (touching 1 of the second; e.g. "acme red coat": ids 0 and 2)' in text


def test_clean_report(encode: Encode) -> None:
    report = leakage_report(catalogue(encode, ["Red Coat"]), catalogue(encode, ["Blue Bag"], start=5))
    assert report.clean
    assert str(report).startswith("1 against 1 products: no leak")
    without = leakage_report(catalogue(encode, ["Red Coat"]), catalogue(encode, ["Blue Bag"], start=5), images=False)
    assert without.images is None and "identical images: not compared" in str(without)


def test_own_split_is_clean(many: ProductDataset) -> None:
    parts = split_by_group(many)
    report: LeakageReport = leakage_report(parts["train"], parts["validation"])
    assert report.clean


def test_real_data(real_data: dict[str, ProductDataset]) -> None:
    """What docs/data.md says of the published split: names that differ by punctuation or case, and reused photos."""
    report = leakage_report(real_data["train"], real_data["validation"])
    assert not report.ids
    assert report.images is not None
    assert (len(report.groups), len(report.images)) == (11, 23)
