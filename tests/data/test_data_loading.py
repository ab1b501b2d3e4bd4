"""load_products from every kind of source, and what it says about sources that can't be used."""

from __future__ import annotations

import csv
import json
import multiprocessing
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from gigdiff.data import ProductDataset, StreamingProducts, load_products
from gigdiff.errors import DataError, InputError
from gigdiff.products import Product

Encode = Callable[..., bytes]


def check(ds: ProductDataset) -> None:
    """`ds` holds the four products of the `rows` fixture."""
    assert len(ds) == 4
    first = ds[0]
    assert (first.id, first.group) == ("11", "acme women red dress")
    assert first.product == Product("Dresses", "Red", None, "Women", "Casual", "Acme Women Red Dress", season="Summer")
    assert first.image is not None and first.image.mode == "RGB" and first.image.size == (6, 8)
    assert first.image.getpixel((0, 0)) == (200, 10, 20)
    assert ds.record(3).image is None
    assert ds.record(3).product.colour == "Navy Blue"


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_dataset_object(products: datasets.Dataset) -> None:
    check(load_products(products))


def test_dataset_dict(products: datasets.Dataset) -> None:
    both = datasets.DatasetDict({"train": products, "test": products.select([1])})
    assert load_products(both, split="test").record(0).id == "12"
    with pytest.raises(DataError, match='no split "tset"; did you mean "test"'):
        load_products(both, split="tset")


@pytest.mark.parametrize(
    "layout",
    [
        {"train": "train-00000-of-00001.parquet", "validation": "validation-00000-of-00001.parquet"},
        {"train": "data/train-00000-of-00001.parquet", "validation": "data/validation-00000-of-00001.parquet"},
        {"train": "train.parquet", "validation": "validation.parquet"},
        {"train": "train/0.parquet", "validation": "validation/0.parquet"},
    ],
)
def test_parquet_folder(products: datasets.Dataset, tmp_path: Path, layout: dict[str, str]) -> None:
    for split, name in layout.items():
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (products if split == "train" else products.select([2])).to_parquet(tmp_path / "d" / name)
    check(load_products(tmp_path / "d"))
    assert [r.id for r in load_products(tmp_path / "d", split="validation").records()] == ["13"]
    with pytest.raises(DataError, match=r'no split "valid"; did you mean "validation"\? Known: train, validation'):
        load_products(tmp_path / "d", split="valid")


def test_parquet_folder_with_a_custom_split_name(products: datasets.Dataset, tmp_path: Path) -> None:
    products.to_parquet(tmp_path / "holdout-00000-of-00001.parquet")
    assert len(load_products(tmp_path, split="holdout")) == 4


def test_split_slices(products: datasets.Dataset, tmp_path: Path) -> None:
    products.to_parquet(tmp_path / "train.parquet")
    assert len(load_products(tmp_path, split="train[:50%]")) == 2


def test_one_parquet_file(products: datasets.Dataset, tmp_path: Path) -> None:
    products.to_parquet(tmp_path / "goods.parquet")
    check(load_products(tmp_path / "goods.parquet"))


def test_arrow_files(products: datasets.Dataset, tmp_path: Path) -> None:
    products.save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    (tmp_path / "plain").mkdir()
    arrow.rename(tmp_path / "plain" / "train-00000-of-00001.arrow")
    check(load_products(tmp_path / "plain"))


def test_save_to_disk(products: datasets.Dataset, tmp_path: Path) -> None:
    products.save_to_disk(tmp_path / "one")
    check(load_products(tmp_path / "one"))
    datasets.DatasetDict({"train": products}).save_to_disk(tmp_path / "many")
    check(load_products(tmp_path / "many"))
    with pytest.raises(DataError, match="Known: train"):
        load_products(tmp_path / "many", split="test")


def write_images(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows' images as files under folder/images; the rows again with file_name in place of image."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    named = []
    for row in rows:
        name = f"images/{row['id']}.png"
        (folder / name).write_bytes(row["image"]["bytes"])
        named.append({"file_name": name, **{key: value for key, value in row.items() if key != "image"}})
    return named


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_image_folder_with_metadata_jsonl(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "metadata.jsonl", write_images(tmp_path, rows))
    check(load_products(tmp_path))


def test_image_folder_with_metadata_csv_in_split_folders(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    write_csv_rows = write_images(tmp_path / "train", rows)
    write_csv(tmp_path / "train" / "metadata.csv", write_csv_rows)
    write_csv(tmp_path / "test" / "metadata.csv", write_images(tmp_path / "test", rows[:1]))
    check(load_products(tmp_path))
    assert len(load_products(tmp_path, split="test")) == 1
    with pytest.raises(DataError, match="Known: test, train"):
        load_products(tmp_path, split="validation")


@pytest.mark.parametrize("write", [write_csv, write_jsonl])
def test_table_with_image_paths(
    rows: list[dict[str, Any]], tmp_path: Path, write: Callable[[Path, list[dict[str, Any]]], None]
) -> None:
    path = tmp_path / f"goods.{'csv' if write is write_csv else 'jsonl'}"
    write(path, write_images(tmp_path, rows))
    check(load_products(path))
    with pytest.raises(DataError, match='all "train"'):
        load_products(path, split="validation")


def test_csv_keeps_text_as_it_is(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    named = write_images(tmp_path, rows)
    named[0]["id"] = "00011"
    write_csv(tmp_path / "goods.csv", named)
    ds = load_products(tmp_path / "goods.csv")
    assert ds.record(0).id == "00011"
    assert ds.record(2).product.colour is None


def test_edited_files_are_read_anew(rows: list[dict[str, Any]], tmp_path: Path, encode: Encode) -> None:
    named = write_images(tmp_path, rows)
    write_csv(tmp_path / "goods.csv", named)
    before = load_products(tmp_path / "goods.csv")
    old = before.image_bytes(0)
    (tmp_path / named[0]["file_name"]).write_bytes(encode(Image.new("RGB", (6, 8), (1, 2, 3))))
    write_csv(tmp_path / "goods.csv", named[:2])
    after = load_products(tmp_path / "goods.csv")
    assert len(after) == 2
    assert after.image_bytes(0) != old


def test_binary_image_column(rows: list[dict[str, Any]]) -> None:
    plain = datasets.Dataset.from_list([{**row, "image": row["image"]["bytes"]} for row in rows])
    check(load_products(plain))


# ---- columns ---------------------------------------------------------------------------------------------------------


def foreign(rows: list[dict[str, Any]]) -> datasets.Dataset:
    table = [
        {"bild": row["image"], "art": row["articleType"], "farbe": row["baseColour"], "nummer": row["id"]}
        for row in rows
    ]
    return datasets.Dataset.from_list(table).cast_column("bild", datasets.Image())


def test_column_mapping(rows: list[dict[str, Any]]) -> None:
    ds = load_products(
        foreign(rows),
        image_column="bild",
        attribute_columns={"category": "art", "colour": "farbe"},
        id_column="nummer",
        group_column="farbe",
    )
    assert ds[0].product == Product(category="Dresses", colour="Red")
    assert (ds[0].id, ds[0].group) == ("11", "Red")


def test_unknown_schema_asks_for_a_mapping(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=r'no column "image".*Known: art, bild, farbe, nummer'):
        load_products(foreign(rows))
    with pytest.raises(
        DataError, match=r"no captions: none of its columns \(bild, art, farbe, nummer\).*caption_column="
    ):
        load_products(foreign(rows), image_column="bild")


def test_misspelt_columns_name_the_nearest(products: datasets.Dataset) -> None:
    with pytest.raises(
        DataError, match=r'"articletype" \(given as attribute_columns\["category"\]\); did you mean "articleType"'
    ):
        load_products(products, attribute_columns={"category": "articletype"})
    with pytest.raises(DataError, match="given as caption_column"):
        load_products(products, caption_column="caption")
    with pytest.raises(InputError, match='Product has no field "color"; did you mean "colour"'):
        load_products(products, attribute_columns={"color": "baseColour"})


def test_captions(rows: list[dict[str, Any]]) -> None:
    table = datasets.Dataset.from_list(
        [{"image": rows[0]["image"], "text": "A red dress"}, {"image": rows[1]["image"], "text": "Black shoes"}]
    )
    ds = load_products(table)
    assert (ds[0].caption, ds[0].captions, ds[0].id, ds[0].group) == (
        "A red dress",
        ("A red dress",),
        "0",
        "a red dress",
    )
    assert not ds[0].product


def test_several_captions_an_image(rows: list[dict[str, Any]]) -> None:
    table = datasets.Dataset.from_list([{"image": rows[0]["image"], "words": ["A red dress", "scarlet gown"]}])
    ds = load_products(table, caption_column="words")
    assert (ds.record(0).caption, ds.record(0).captions) == ("A red dress", ("A red dress", "scarlet gown"))


def test_missing_captions_name_the_row(rows: list[dict[str, Any]]) -> None:
    table = datasets.Dataset.from_list(
        [
            {"image": rows[0]["image"], "text": "A red dress", "id": "a"},
            {"image": rows[1]["image"], "text": " ", "id": "b"},
        ]
    )
    with pytest.raises(DataError, match=r"row 1 \(id b\) has no caption.*caption_column"):
        load_products(table)


def test_unknown_marks_become_none_and_the_group_is_the_name(products: datasets.Dataset) -> None:
    ds = load_products(products)
    assert (ds.record(2).product.colour, ds.record(2).product.usage) == (None, None)
    assert ds.record(1).group == ds.record(2).group == "acme men black shoes"


# ---- the dataset -----------------------------------------------------------------------------------------------------


def test_indexing_and_selection(products: datasets.Dataset) -> None:
    ds = load_products(products)
    assert [r.id for r in ds] == ["11", "12", "13", "14"]
    assert ds[-1].id == "14"
    chosen = ds.select([3, 0]).select([1])
    assert [r.id for r in chosen] == ["11"]
    assert chosen.image_bytes(0) == ds.image_bytes(0)
    with pytest.raises(IndexError):
        ds[4]


def test_limit(products: datasets.Dataset) -> None:
    assert len(load_products(products, limit=2)) == 2
    assert len(load_products(products, limit=99)) == 4
    for bad in (0, -1, 1.5):
        with pytest.raises(InputError, match="limit="):
            load_products(products, limit=bad)


def test_pickling(products: datasets.Dataset, tmp_path: Path) -> None:
    products.to_parquet(tmp_path / "train.parquet")
    check(pickle.loads(pickle.dumps(load_products(tmp_path))))


def test_workers_of_another_process(products: datasets.Dataset, tmp_path: Path) -> None:
    """What a torch DataLoader does on macOS and Windows: the dataset travels to a process started afresh."""
    products.to_parquet(tmp_path / "train.parquet")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        records = pool.map(load_products(tmp_path).__getitem__, range(4))
    assert [record.id for record in records] == ["11", "12", "13", "14"]
    assert records[0].image.getpixel((0, 0)) == (200, 10, 20)


def test_streaming(products: datasets.Dataset, tmp_path: Path) -> None:
    products.to_parquet(tmp_path / "train.parquet")
    stream = load_products(tmp_path, streaming=True, limit=3)
    assert isinstance(stream, StreamingProducts)
    for _ in range(2):  # each iteration reads from the start
        records = list(stream)
        assert [r.id for r in records] == ["11", "12", "13"]
        assert all(r.image is not None and r.image.mode == "RGB" for r in records)
    assert records[:2] == load_products(tmp_path).records()[:2]


def test_streaming_a_csv(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    write_csv(tmp_path / "goods.csv", write_images(tmp_path, rows))
    assert [r.id for r in load_products(tmp_path / "goods.csv", streaming=True)] == ["11", "12", "13", "14"]


# ---- bad images ------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_bad(rows: list[dict[str, Any]], encode: Encode) -> datasets.Dataset:
    """Rows 1 and 2 are bad: truncated, and a bomb for a limit of 1,000 pixels."""
    rows[1]["image"] = {"bytes": rows[1]["image"]["bytes"][:40], "path": "shoes.png"}
    rows[2]["image"] = {"bytes": encode(Image.new("1", (100, 100))), "path": "bomb.png"}
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def test_bad_image_names_row_id_and_file(with_bad: datasets.Dataset) -> None:
    ds = load_products(with_bad, max_image_pixels=1000)
    assert ds[0].id == "11"
    with pytest.raises(DataError, match=r"row 1, id 12, file shoes.png: .*corrupt or truncated.*on_bad_image"):
        ds[1]
    with pytest.raises(DataError, match=r"row 2, id 13, file bomb.png: .*10,000 pixels"):
        ds[2]
    with pytest.raises(DataError, match="row 2, id 13"):
        ds.select([2])[0]


def test_bad_images_can_be_skipped(with_bad: datasets.Dataset) -> None:
    ds = load_products(with_bad, max_image_pixels=1000, on_bad_image="skip")
    assert [r.id for r in ds] == ["11", "14"]
    assert [(bad.row, bad.id) for bad in ds.bad_images] == [(1, "12"), (2, "13")]
    with pytest.raises(DataError, match="2 bad images, max_bad_images=1"):
        load_products(with_bad, max_image_pixels=1000, on_bad_image="skip", max_bad_images=1)
    with pytest.raises(InputError, match='"error" or "skip"'):
        load_products(with_bad, on_bad_image="ignore")


def test_all_images_bad(with_bad: datasets.Dataset) -> None:
    with pytest.raises(DataError, match="all 1 images"):
        load_products(with_bad.select([1]), on_bad_image="skip")


def test_bad_images_while_streaming(with_bad: datasets.Dataset) -> None:
    stream = load_products(with_bad, streaming=True, max_image_pixels=1000, on_bad_image="skip")
    for _ in range(2):
        assert [r.id for r in stream] == ["11", "14"]
        assert [bad.row for bad in stream.bad_images] == [1, 2]
    with pytest.raises(DataError, match="row 1"):
        list(load_products(with_bad, streaming=True))
    with pytest.raises(DataError, match="max_bad_images=1"):
        list(load_products(with_bad, streaming=True, max_image_pixels=9, on_bad_image="skip", max_bad_images=1))


def test_empty_image_cell(rows: list[dict[str, Any]]) -> None:
    rows[0]["image"] = None
    ds = load_products(datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()))
    with pytest.raises(DataError, match='row 0, id 11: column "image" is empty'):
        ds[0]


# ---- bad sources -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metadata.json", "meta_data.jsonl", "Metadata.csv", "metadata.txt", "captions.csv"])
def test_misspelt_metadata_file(rows: list[dict[str, Any]], tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / name, write_images(tmp_path, rows))
    wanted = "metadata.csv" if name.endswith(".csv") else "metadata.jsonl"
    with pytest.raises(DataError) as caught:
        load_products(tmp_path)
    assert "4 images but no captions" in str(caught.value)
    assert f"Rename it to {tmp_path / wanted}" in str(caught.value)


def test_images_without_metadata(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    write_images(tmp_path, rows)
    with pytest.raises(DataError, match=r"no metadata file. Write .*metadata\.jsonl"):
        load_products(tmp_path)


def test_metadata_that_names_a_missing_file(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    named = write_images(tmp_path, rows)
    (tmp_path / named[2]["file_name"]).unlink()
    write_jsonl(tmp_path / "metadata.jsonl", named)
    with pytest.raises(
        DataError, match=r"1 of 4 rows name an image file that isn't there; the first is row 2 \(id 13\).*13\.png"
    ):
        load_products(tmp_path)
    assert len(load_products(tmp_path, on_bad_image="skip")) == 3


def test_two_metadata_files(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    named = write_images(tmp_path, rows)
    write_jsonl(tmp_path / "metadata.jsonl", named)
    write_csv(tmp_path / "metadata.csv", named)
    with pytest.raises(DataError, match=r"several metadata files: metadata\.jsonl, metadata\.csv"):
        load_products(tmp_path)


def test_empty_folder_and_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        load_products(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"no product data \(1 files, e.g. notes.md\)"):
        load_products(tmp_path)


def test_broken_tables(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"file_name": "x.png", \nnot json')
    (tmp_path / "b.csv").write_text("")
    (tmp_path / "c.parquet").write_bytes(b"not parquet")
    (tmp_path / "d.xlsx").write_bytes(b"x")
    (tmp_path / "e.csv").write_text("file_name,name\n")
    with pytest.raises(DataError, match="can't be read as json"):
        load_products(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="is empty"):
        load_products(tmp_path / "b.csv")
    with pytest.raises(DataError, match="can't be read as parquet"):
        load_products(tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"allowed are \.csv"):
        load_products(tmp_path / "d.xlsx")
    with pytest.raises(DataError, match=r"no rows|can't be read"):
        load_products(tmp_path / "e.csv")


def test_no_such_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load_products(tmp_path / "nothing")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load_products("./goods.csv")
    with pytest.raises(InputError, match="was given a int"):
        load_products(3)
    with pytest.raises(InputError, match="empty source"):
        load_products(" ")


def test_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r'"ashraq/products" is no folder.*hub can\'t be reached.*HF_HUB_OFFLINE'):
        load_products("ashraq/products")


def test_hub_arguments_are_passed_on(products: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def fake(name: str, config: str | None, **options: Any) -> datasets.Dataset:
        seen.update(options, name=name, config=config)
        return products

    monkeypatch.setattr(datasets, "load_dataset", fake)
    check(load_products("ashraq/products", config_name="small", revision="abc", token="t", split="test"))
    assert seen == {
        "name": "ashraq/products", "config": "small", "revision": "abc", "token": "t", "split": "test",
        "streaming": False,
    }  # fmt: skip


# ---- the real catalogue ----------------------------------------------------------------------------------------------


def test_real_data(real_data: dict[str, ProductDataset]) -> None:
    ds = real_data["validation"]
    assert len(ds) == 2087
    start = time.process_time()
    kinds = {ds.record(i).product.category for i in range(len(ds))}
    assert time.process_time() - start < 0.1  # 40,000 in well under two seconds
    assert len(kinds) > 90
    assert ds[0].image is not None and ds[0].image.mode == "RGB"
