"""`load_products`: a hub id, a folder, a file or a datasets.Dataset -> ProductDataset or StreamingProducts.

Reading is Hugging Face `datasets`' work; what is added here is finding the splits, mapping columns to Product fields,
decoding images strictly, and saying what is wrong with a dataset before a training run finds out.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex, TypeAlias, overload

import datasets
import fsspec

from gigdiff.data.decoding import MAX_IMAGE_PIXELS, decode_image
from gigdiff.data.records import BadImage, Columns, ProductRecord, choose_columns, make_record
from gigdiff.errors import DataError, InputError, nearest

__all__ = ["ProductDataset", "StreamingProducts", "load_products"]

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TABLE_BUILDERS = {".csv": "csv", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
#: Columns that hold an image's path, tried in turn where `image_column` was left at its default and isn't there.
PATH_COLUMNS = ("file_name", "filename", "image_path", "image_file", "path", "file")
SPLIT_NAMES = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")

OnBadImage = Literal["error", "skip"]


class _Opened(NamedTuple):
    """A dataset as `datasets` opened it, what to call it in messages, and what its image paths are relative to."""

    rows: datasets.Dataset | datasets.IterableDataset
    label: str
    base: Path | None


class _ImageReader(NamedTuple):
    """How to get from a row's image value to bytes and to pixels, with errors that say which row it was."""

    column: str
    label: str
    base: Path | None
    max_pixels: int

    def encoded(self, value: Any, row: int, identity: str) -> bytes:
        """The encoded bytes of `value`: bytes, a path, or the {"bytes", "path"} pair that `datasets` stores."""
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(data, str):
            data, path = None, data
        if isinstance(data, (bytes, bytearray, memoryview)):
            return bytes(data)
        if data is not None:
            raise DataError(
                f'{self._where(row, identity)}: column "{self.column}" holds a {type(data).__name__}; encoded image '
                "bytes, "
                "a path or a datasets.Image is allowed: name the right one with image_column"
            )
        if path is None:
            raise DataError(
                f'{self._where(row, identity)}: column "{self.column}" is empty. Drop the row or fill it in'
            )
        try:
            if "://" in path:  # hf://, zip://, s3://: whatever fsspec has a driver for
                with fsspec.open(path, "rb") as stream:
                    return stream.read()
            return self.resolve(path).read_bytes()
        except (OSError, ImportError, ValueError) as error:
            raise DataError(
                f"{self._where(row, identity)}: its image file {path} can't be read ({error}). Put the file there or "
                "drop "
                'the row, or load with on_bad_image="skip"'
            ) from error

    def decoded(self, value: Any, row: int, identity: str) -> Any:
        """`value` as an RGB PIL image; DataError names the row, the id and, where there is one, the file."""
        data = self.encoded(value, row, identity)
        try:
            return decode_image(data, max_pixels=self.max_pixels)
        except DataError as error:
            path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
            file = f", file {path}" if path else ""
            raise DataError(
                f"{self._where(row, identity)}{file}: {error}. Replace the image or drop the row, or load with "
                'on_bad_image="skip"'
            ) from error

    def resolve(self, path: str) -> Path:
        return self.base / path if self.base is not None else Path(path)

    def _where(self, row: int, identity: str) -> str:
        return f"{self.label}, row {row}, id {identity}"


class ProductDataset:
    """Products with their photos, by index: `len(ds)`, `ds[i]`, iteration, `ds.select(indices)`.

    Metadata is held in memory, images stay in the (memory-mapped) source until asked for. Picklable, so that a torch
    DataLoader may hand it to its workers.
    """

    def __init__(
        self,
        images: datasets.Dataset,
        records: Sequence[ProductRecord],
        rows: Sequence[int],
        reader: _ImageReader,
        columns: Columns,
        bad_images: Sequence[BadImage] = (),
    ) -> None:
        self._images = images
        self._records = list(records)
        self._rows = list(rows)
        self._reader = reader
        self.columns = columns
        self.bad_images: list[BadImage] = list(bad_images)

    @property
    def source(self) -> str:
        """What the products were loaded from, in words."""
        return self._reader.label

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> ProductRecord:
        """The record at `index` with its image decoded to RGB. Raises DataError when the image is bad."""
        i = self._at(index)
        record = self._records[i]
        image = self._reader.decoded(self._value(i), self._rows[i], record.id)
        return ProductRecord(record.id, record.group, record.product, record.caption, image, record.captions)

    def __iter__(self) -> Iterator[ProductRecord]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"ProductDataset({self.source}: {len(self):,} products)"

    def record(self, index: SupportsIndex) -> ProductRecord:
        """The record at `index` without its image: nothing is read or decoded."""
        return self._records[self._at(index)]

    def records(self) -> list[ProductRecord]:
        """All records without their images."""
        return list(self._records)

    def image_bytes(self, index: SupportsIndex) -> bytes:
        """The image as it is stored, still encoded: what a content-keyed cache hashes."""
        i = self._at(index)
        return self._reader.encoded(self._value(i), self._rows[i], self._records[i].id)

    def select(self, indices: Iterable[SupportsIndex]) -> ProductDataset:
        """The products at `indices`, in that order; images are shared, not copied."""
        chosen = [self._at(index) for index in indices]
        return ProductDataset(
            self._images,
            [self._records[i] for i in chosen],
            [self._rows[i] for i in chosen],
            self._reader,
            self.columns,
            self.bad_images,
        )

    def find_bad_images(self) -> list[tuple[int, BadImage]]:
        """Decode every image once; the index and reason of each that can't be."""
        bad = []
        for i, record in enumerate(self._records):
            try:
                self._reader.decoded(self._value(i), self._rows[i], record.id)
            except DataError as error:
                bad.append((i, BadImage(self._rows[i], record.id, str(error))))
        return bad

    def _value(self, i: int) -> Any:
        return self._images[self._rows[i]][self._reader.column]

    def _at(self, index: SupportsIndex) -> int:
        i = index.__index__()
        if not -len(self) <= i < len(self):
            raise IndexError(f"product {i} of {self.source}, which has {len(self):,}")
        return i % len(self)


class StreamingProducts:
    """Products read one after another, each time anew: iteration only, no length.

    With `on_bad_image="skip"` bad images are left out and listed in `bad_images`, which each iteration starts afresh.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        reader: _ImageReader,
        columns: Columns,
        *,
        on_bad_image: OnBadImage,
        max_bad_images: int | None,
    ) -> None:
        self._stream = rows
        self._reader = reader
        self.columns = columns
        self._on_bad_image = on_bad_image
        self._max_bad_images = max_bad_images
        self.bad_images: list[BadImage] = []

    @property
    def source(self) -> str:
        """What the products are read from, in words."""
        return self._reader.label

    def __iter__(self) -> Iterator[ProductRecord]:
        self.bad_images = []
        for index, row in enumerate(self._stream):
            record = make_record(row, self.columns, index)
            try:
                image = self._reader.decoded(row[self._reader.column], index, record.id)
            except DataError as error:
                if self._on_bad_image == "error":
                    raise
                self.bad_images.append(BadImage(index, record.id, str(error)))
                _limit_bad_images(self.bad_images, self._max_bad_images, self.source)
                continue
            yield ProductRecord(record.id, record.group, record.product, record.caption, image, record.captions)

    def __repr__(self) -> str:
        return f"StreamingProducts({self.source})"


Source: TypeAlias = str | os.PathLike[str] | datasets.Dataset | datasets.IterableDataset | Mapping[str, Any]


@overload
def load_products(
    source: Source,
    *,
    split: str = ...,
    image_column: str = ...,
    caption_column: str | None = ...,
    attribute_columns: Mapping[str, str] | None = ...,
    id_column: str | None = ...,
    group_column: str | None = ...,
    config_name: str | None = ...,
    revision: str | None = ...,
    token: str | None = ...,
    streaming: Literal[False] = ...,
    limit: int | None = ...,
    max_image_pixels: int = ...,
    on_bad_image: OnBadImage = ...,
    max_bad_images: int | None = ...,
) -> ProductDataset: ...


@overload
def load_products(
    source: Source,
    *,
    split: str = ...,
    image_column: str = ...,
    caption_column: str | None = ...,
    attribute_columns: Mapping[str, str] | None = ...,
    id_column: str | None = ...,
    group_column: str | None = ...,
    config_name: str | None = ...,
    revision: str | None = ...,
    token: str | None = ...,
    streaming: Literal[True],
    limit: int | None = ...,
    max_image_pixels: int = ...,
    on_bad_image: OnBadImage = ...,
    max_bad_images: int | None = ...,
) -> StreamingProducts: ...


def load_products(
    source: Source,
    *,
    split: str = "train",
    image_column: str = "image",
    caption_column: str | None = None,
    attribute_columns: Mapping[str, str] | None = None,
    id_column: str | None = None,
    group_column: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    on_bad_image: OnBadImage = "error",
    max_bad_images: int | None = None,
) -> ProductDataset | StreamingProducts:
    """Load products from `source`.

    source: a folder of Parquet or Arrow files named `<split>-*`, a folder written by `save_to_disk`, a folder of images
        with metadata.jsonl / metadata.csv (in it, or in a subfolder named like the split), a .csv, .jsonl, .parquet or
        .arrow file, a datasets.Dataset or DatasetDict, or else the id of a dataset on the Hugging Face hub.
    split: which split; the error for a wrong one lists those that exist.
    image_column: encoded images or their paths. Where it is left at "image" and there is none, file_name and its like.
    caption_column: a column of captions, or of lists of captions.
    attribute_columns: Product field -> column, e.g. {"category": "kind"}. The columns of
        `ashraq/fashion-product-images-small` and the Product fields' own names are found without it.
    id_column, group_column: default to "id" (else the row's number) and to the product's name, normalised.
    config_name, revision, token: for hub ids, as in datasets.load_dataset; the token defaults to that of `hf auth
        login`.
    streaming: read while iterating, without preparing or downloading first: returns StreamingProducts.
    limit: only the first so many rows.
    max_image_pixels: images whose header says more are refused before they are decoded.
    on_bad_image: "error" raises when a bad image is asked for. "skip" decodes every image once now, leaves out the bad
        and lists them in `bad_images` (with streaming: while iterating).
    max_bad_images: with "skip", more than so many are an error after all.

    Raises DataError when the data can't be used and InputError when an argument can't be.
    """
    if on_bad_image not in ("error", "skip"):
        raise InputError(f'on_bad_image={on_bad_image!r}; "error" or "skip" is allowed')
    for argument, value, least in (("limit", limit, 1), ("max_bad_images", max_bad_images, 0)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise InputError(f"{argument}={value!r}; an integer of {least} or more, or None, is allowed")
    if max_image_pixels < 1:
        raise InputError(f"max_image_pixels={max_image_pixels!r}; a positive number of pixels is allowed")

    opened = _open(source, split, config_name=config_name, revision=revision, token=token, streaming=streaming)
    rows = opened.rows
    names = _column_names(rows, opened.label)
    if image_column == "image" and "image" not in names:
        image_column = next((name for name in PATH_COLUMNS if name in names), image_column)
    columns = choose_columns(
        names,
        image_column=image_column,
        caption_column=caption_column,
        attribute_columns=attribute_columns,
        id_column=id_column,
        group_column=group_column,
        source=opened.label,
    )
    if isinstance((rows.features or {}).get(image_column), datasets.Image):
        rows = rows.cast_column(image_column, datasets.Image(decode=False))  # decoding is ours: strict, always RGB
    reader = _ImageReader(image_column, opened.label, opened.base, max_image_pixels)

    if isinstance(rows, datasets.IterableDataset):
        if limit is not None:
            rows = rows.take(limit)
        return StreamingProducts(rows, reader, columns, on_bad_image=on_bad_image, max_bad_images=max_bad_images)
    return _materialise(rows, reader, columns, limit, on_bad_image, max_bad_images)


def _materialise(
    rows: datasets.Dataset,
    reader: _ImageReader,
    columns: Columns,
    limit: int | None,
    on_bad_image: OnBadImage,
    max_bad_images: int | None,
) -> ProductDataset:
    rows = rows.with_format(None)
    if limit is not None and limit < len(rows):
        rows = rows.select(range(limit))
    if len(rows) == 0:
        raise DataError(f"{reader.label} has no rows")
    metadata = columns.metadata()
    held = rows.select_columns(metadata).to_dict()
    records = [
        make_record(dict(zip(metadata, values, strict=True)), columns, index)
        for index, values in enumerate(zip(*(held[name] for name in metadata), strict=True))
    ]
    images = rows.select_columns([columns.image])
    if on_bad_image == "error":
        _check_files_exist(images, records, reader)
    dataset = ProductDataset(images, records, range(len(records)), reader, columns)
    if on_bad_image == "skip":
        bad = dict(dataset.find_bad_images())
        _limit_bad_images(list(bad.values()), max_bad_images, reader.label)
        if len(bad) == len(dataset):
            raise DataError(f"all {len(bad)} images of {reader.label} are bad; the first: {bad[0].reason}")
        dataset = dataset.select(i for i in range(len(dataset)) if i not in bad)
        dataset.bad_images = list(bad.values())
    return dataset


def _limit_bad_images(bad: Sequence[BadImage], most: int | None, label: str) -> None:
    if most is not None and len(bad) > most:
        raise DataError(
            f"{label} has {len(bad)} bad images, max_bad_images={most} are allowed. The first: {bad[0].reason}. "
            "Replace them or raise max_bad_images"
        )


def _check_files_exist(images: datasets.Dataset, records: Sequence[ProductRecord], reader: _ImageReader) -> None:
    """A metadata row that names a missing file is found now, not in the third hour of training."""
    if (
        not isinstance(images.features[reader.column], datasets.Value)
        or "string" not in images.features[reader.column].dtype
    ):
        return
    paths = images[reader.column][:]
    missing = [
        (row, path)
        for row, path in enumerate(paths)
        if path is not None and "://" not in path and not reader.resolve(path).is_file()
    ]
    if missing:
        row, path = missing[0]
        raise DataError(
            f"{reader.label}: {len(missing)} of {len(paths)} rows name an image file that isn't there; the first is "
            "row "
            f'{row} (id {records[row].id}): {reader.resolve(path)}. Correct column "{reader.column}", put the files '
            "there, or "
            'load with on_bad_image="skip"'
        )


# ---- opening sources -------------------------------------------------------------------------------------------------


def _open(
    source: Any, split: str, *, config_name: str | None, revision: str | None, token: str | None, streaming: bool
) -> _Opened:
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        if streaming and isinstance(source, datasets.Dataset):
            source = source.to_iterable_dataset()
        return _Opened(source, f"the given {type(source).__name__}", None)
    if isinstance(source, Mapping):
        chosen = source[_existing_split(split, source, "the given DatasetDict")]
        return _open(chosen, split, config_name=None, revision=None, token=None, streaming=streaming)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"load_products was given a {type(source).__name__}; a folder, a file, a hub dataset id or a "
            "datasets.Dataset is "
            "allowed"
        )
    text = os.fspath(source)
    if not text.strip():
        raise InputError("load_products was given an empty source; a folder, a file or a hub dataset id is allowed")
    path = Path(text).expanduser()
    if path.is_dir():
        return _open_folder(path, split, streaming)
    if path.is_file():
        return _open_table(path, split, streaming)
    if (
        isinstance(source, os.PathLike)
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text)
        or path.suffix in TABLE_BUILDERS
    ):
        raise DataError(f'{text} is neither a file nor a folder, and no hub dataset id ("owner/name") either')
    return _open_hub(text, split, config_name, revision, token, streaming)


def _open_folder(folder: Path, split: str, streaming: bool) -> _Opened:
    label = str(folder)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, Mapping):
            label = f"{label} ({split})"
            saved = saved[_existing_split(split, saved, str(folder))]
        elif split != str(saved.split or "train"):
            raise DataError(f'{label} has no split "{split}": it holds one dataset, split "{saved.split or "train"}"')
        return _Opened(saved.to_iterable_dataset() if streaming else saved, label, folder)

    metadata = _find_metadata(folder, split)
    if metadata is not None:
        return _open_table(metadata, split, streaming, splits_checked=True)

    for suffix in (".parquet", ".arrow"):
        by_split = _files_by_split(folder, suffix)
        if by_split:
            base_name = re.sub(r"\[.*\]$", "", split)
            files = by_split[_existing_split(base_name, by_split, str(folder))]
            rows = _load(TABLE_BUILDERS[suffix], {base_name: files}, split, streaming, label)
            return _Opened(rows, f"{label} ({split})", folder)
    raise DataError(_what_is_wrong_with(folder, split))


def _find_metadata(folder: Path, split: str) -> Path | None:
    """The metadata file of an image folder: that of the split's subfolder, else the folder's own."""
    subfolders = sorted(sub.name for sub in folder.iterdir() if sub.is_dir() and _metadata_in(sub) is not None)
    if split in subfolders:
        return _metadata_in(folder / split)
    own = _metadata_in(folder)
    if subfolders and (own is None or split != "train"):
        known = [*subfolders, *(["train"] if own is not None else [])]
        raise DataError(f'{folder} has no split "{split}"; {nearest(split, known)}')
    if own is not None and split != "train":
        raise DataError(f'{folder} has no split "{split}"; {own.name} lies at its top, so all of it is "train"')
    return own


def _metadata_in(folder: Path) -> Path | None:
    found = [folder / name for name in METADATA_FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(
            f"{folder} has several metadata files: {', '.join(path.name for path in found)}. Keep one of them, or "
            "pass the "
            "file itself as the source"
        )
    return found[0] if found else None


def _what_is_wrong_with(folder: Path, split: str) -> str:
    """Why nothing could be loaded: an empty folder, images without metadata, or a metadata file of a wrong name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        return f"{folder} is empty; {_ALLOWED_IN_A_FOLDER}"
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    tables = [path for path in files if path.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv", ".txt", ".ndjson")]
    if images:
        folder_of_images = images[0].parent
        count = f"{folder} has {len(images):,} images but no captions"
        if tables:
            found = min(tables, key=lambda path: ("meta" not in path.name.lower(), path.name))
            wanted = "metadata.csv" if found.suffix == ".csv" else "metadata.jsonl"
            one_a_line = ", one JSON object a line," if wanted.endswith(".jsonl") and found.suffix != ".jsonl" else ""
            return (
                f"{count}: {found} is not a name that is looked for. Rename it to {found.with_name(wanted)}"
                f'{one_a_line} with a column "file_name", or pass the file itself as the source'
            )
        return (
            f"{count}: there is no metadata file. Write {folder_of_images / 'metadata.jsonl'}, one JSON object a line: "
            '{"file_name": "0001.png", "text": "red wool coat"}'
        )
    return f"{folder} has no product data ({len(files):,} files, e.g. {files[0].name}); {_ALLOWED_IN_A_FOLDER}"


_ALLOWED_IN_A_FOLDER = (
    "allowed are <split>-*.parquet or .arrow files, a folder written by datasets' save_to_disk, or images beside a "
    "metadata.jsonl or metadata.csv"
)


def _files_by_split(folder: Path, suffix: str) -> dict[str, list[str]]:
    """Data files by split: `train-00000-of-00002.parquet`, `train.parquet`, `train/0.parquet`, `data/train-*`."""
    by_split: dict[str, list[str]] = {}
    for path in sorted(folder.rglob(f"*{suffix}")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts):
            continue
        name = re.match(r"(.+?)-\d+(-of-\d+)?$", path.stem)
        candidates = [name.group(1) if name else path.stem.split("-")[0], *reversed(parts[:-1])]
        if name and len(parts) == 1:
            split = name.group(1)
        else:
            split = next((c for c in candidates if c in SPLIT_NAMES), "train")
        by_split.setdefault(split, []).append(str(path))
    return by_split


def _existing_split(split: str, known: Iterable[str], label: str) -> str:
    names = [str(name) for name in known]
    if split not in names:
        raise DataError(f'{label} has no split "{split}"; {nearest(split, names)}')
    return split


def _open_table(path: Path, split: str, streaming: bool, splits_checked: bool = False) -> _Opened:
    builder = TABLE_BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise DataError(f"{path} is a {path.suffix or 'nameless'} file; allowed are {', '.join(TABLE_BUILDERS)}")
    if not splits_checked and re.sub(r"\[.*\]$", "", split) != "train" and not path.stem.startswith(split):
        raise DataError(f'{path} has no split "{split}": a single file is all "train"')
    options: dict[str, Any] = {}
    if builder == "csv":
        # As text throughout: pandas would turn the id "00123" into 123 and the colour "NA" into NaN.
        header = _csv_header(path)
        options = {
            "features": datasets.Features({name: datasets.Value("string") for name in header}),
            "keep_default_na": False,
        }
    base_name = re.sub(r"\[.*\]$", "", split)
    rows = _load(builder, {base_name: [str(path)]}, split, streaming, str(path), **options)
    return _Opened(rows, str(path), path.parent)


def _csv_header(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        try:
            header = next(csv.reader(stream), [])
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    if not header:
        raise DataError(f"{path} is empty; a header line with column names is needed")
    repeated = {name for name in header if header.count(name) > 1}
    if repeated:
        raise DataError(f"{path} names these columns more than once: {', '.join(sorted(repeated))}")
    return header


def _load(builder: str, files: Any, split: str, streaming: bool, label: str, **options: Any) -> Any:
    try:
        return datasets.load_dataset(builder, data_files=files, split=split, streaming=streaming, **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError, KeyError, TypeError) as error:
        reason = error.__cause__ or error
        raise DataError(f"{label} can't be read as {builder}: {type(reason).__name__}: {reason}") from error


def _open_hub(
    name: str, split: str, config_name: str | None, revision: str | None, token: str | None, streaming: bool
) -> _Opened:
    try:
        rows = datasets.load_dataset(
            name, config_name, split=split, revision=revision, token=token, streaming=streaming
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f'the hub has no dataset "{name}"'
            + (f" at revision {revision}" if revision else "")
            + ", or it is private or gated, "
            f"and there is no folder or file of that name here ({error}). For a private or gated one run `hf auth "
            "login`, or "
            "pass token="
        ) from error
    except (ConnectionError, OSError) as error:
        raise DataError(
            f'"{name}" is no folder or file here, and the Hugging Face hub can\'t be reached '
            f"({type(error).__name__}: {error}). Go online (and unset HF_HUB_OFFLINE), or download the dataset "
            "elsewhere and "
            "pass its folder"
        ) from error
    except ValueError as error:  # an unknown config or split; datasets' message lists those that exist
        raise DataError(f'hub dataset "{name}", split "{split}": {error}') from error
    return _Opened(rows, f"{name} ({split})", None)


def _column_names(rows: datasets.Dataset | datasets.IterableDataset, label: str) -> list[str]:
    names = rows.column_names
    if names is None:  # a stream whose schema is only known from its first row
        first = next(iter(rows), None)
        if first is None:
            raise DataError(f"{label} has no rows")
        names = list(first)
    return list(names)
