"""One row of a product dataset, and which columns of any dataset it is read from."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from gigdiff.errors import DataError, InputError, nearest
from gigdiff.products import FIELDS, Product

__all__ = ["BadImage", "Columns", "ProductRecord", "choose_columns", "group_key", "make_record"]

#: Product field -> columns that mean it, first found wins. The first of each is the schema of
#: `ashraq/fashion-product-images-small`; the others are what small catalogues call it.
KNOWN_COLUMNS: dict[str, tuple[str, ...]] = {
    "category": ("articleType", "article_type", "category", "product_type"),
    "colour": ("baseColour", "base_colour", "colour", "color"),
    "material": ("material", "fabric"),
    "gender": ("gender",),
    "usage": ("usage",),
    "name": ("productDisplayName", "product_display_name", "product_name", "name", "title"),
    "description": ("description",),
    "pattern": ("pattern",),
    "season": ("season",),
}
ID_COLUMNS = ("id", "product_id", "sku")
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt")

#: What catalogues write where they know nothing.
_UNKNOWN = frozenset({"", "na", "n/a", "nan", "none", "null", "unknown", "-"})


@dataclass(frozen=True, slots=True)
class ProductRecord:
    """One product photo with what is known of it.

    `image` is RGB, or None where the record was read without its image. `group` names the product that the photo is of:
    photos of one group never part in a split. `captions` holds all captions of the row, `caption` the first.
    """

    id: str
    group: str
    product: Product
    caption: str | None = None
    image: Image.Image | None = field(default=None, compare=False, repr=False)
    captions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BadImage:
    """An image that was skipped: its row in the source, its product id and why."""

    row: int
    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column of a dataset holds what; `attributes` maps Product fields to columns."""

    image: str
    caption: str | None
    id: str | None
    group: str | None
    attributes: dict[str, str]

    def metadata(self) -> list[str]:
        """All columns but the image, each once."""
        wanted = [self.caption, self.id, self.group, *self.attributes.values()]
        return list(dict.fromkeys(name for name in wanted if name is not None))


def choose_columns(
    names: Sequence[str],
    *,
    image_column: str = "image",
    caption_column: str | None = None,
    attribute_columns: Mapping[str, str] | None = None,
    id_column: str | None = None,
    group_column: str | None = None,
    source: str = "the dataset",
) -> Columns:
    """Decide which of the columns `names` hold what: those asked for, else the known ones.

    Raises DataError when a column asked for isn't there, or when nothing describes the images; InputError when
    `attribute_columns` names a field that Product does not have.
    """

    def existing(column: str, argument: str) -> str:
        if column not in names:
            raise DataError(f'{source} has no column "{column}" (given as {argument}); {nearest(column, names)}')
        return column

    for name in attribute_columns or {}:
        if name not in FIELDS:
            raise InputError(f'attribute_columns: Product has no field "{name}"; {nearest(name, FIELDS)}')
    existing(image_column, "image_column")
    for argument, column in (
        ("caption_column", caption_column),
        ("id_column", id_column),
        ("group_column", group_column),
    ):
        if column is not None:
            existing(column, argument)
    taken = {image_column, caption_column, group_column}
    attributes = {
        name: found
        for name, candidates in KNOWN_COLUMNS.items()
        if (found := next((c for c in candidates if c in names and c not in taken), None)) is not None
    }
    for name, column in (attribute_columns or {}).items():
        attributes[name] = existing(column, f'attribute_columns["{name}"]')
    if caption_column is None:
        used = {image_column, *attributes.values()}
        caption_column = next((c for c in CAPTION_COLUMNS if c in names and c not in used), None)
    if caption_column is None and not attributes:
        raise DataError(
            f"{source} has no captions: none of its columns ({', '.join(names)}) is a known caption or attribute "
            "column. "
            'Name one: caption_column="..." or attribute_columns={"category": "...", "colour": "...", "name": "..."}'
        )
    return Columns(
        image=image_column,
        caption=caption_column,
        id=id_column or next((c for c in ID_COLUMNS if c in names), None),
        group=group_column,
        attributes=attributes,
    )


def group_key(name: str) -> str:
    """A product name reduced to what identifies it: case, accents, punctuation and spacing don't count."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode() or name
    return " ".join(re.findall(r"[a-z0-9]+", plain.lower())) or name.strip().lower()


def _text(value: Any) -> str | None:
    if value is None or value != value:  # NaN is the one value that differs from itself
        return None
    text = value if isinstance(value, str) else str(value)
    return None if text.strip().lower() in _UNKNOWN else text.strip()


def make_record(row: Mapping[str, Any], columns: Columns, index: int) -> ProductRecord:
    """The record of one row, without its image. The id defaults to the row's index, the group to the product's name.

    Raises DataError when the row has neither a caption nor an attribute.
    """
    product = Product(**{name: _text(row[column]) for name, column in columns.attributes.items()})
    raw = row[columns.caption] if columns.caption is not None else None
    several = raw if isinstance(raw, (list, tuple)) else [raw]
    captions = tuple(text for text in map(_text, several) if text is not None)
    identity = _text(row[columns.id]) if columns.id is not None else None
    if identity is None:
        identity = str(index)
    if not captions and not product:
        where = f"columns {', '.join(columns.metadata())}"
        raise DataError(
            f"row {index} (id {identity}) has no caption: {where} are all empty there. Fill them in, drop the row, "
            "or name "
            "another column with caption_column or attribute_columns"
        )
    group = _text(row[columns.group]) if columns.group is not None else None
    if group is None:
        words = product.name or (captions[0] if captions else None)
        group = group_key(words) if words else f"id {identity}"
    return ProductRecord(identity, group, product, captions[0] if captions else None, None, captions)
