"""The word tables hold together, and the stored colour names are near the base colours that they map to."""

from __future__ import annotations

import numpy as np
import pytest

from gigdiff.data import ProductDataset
from gigdiff.data import vocabulary as words
from gigdiff.data.vocabulary import colour_group


def test_every_type_has_a_word_of_its_own() -> None:
    assert len(set(words.ARTICLE_WORDS.values())) == len(words.ARTICLE_WORDS) >= 141
    assert all(word == word.lower().strip() and word for word in words.ARTICLE_WORDS.values())


def test_synonyms_belong_to_known_types_and_to_one() -> None:
    owner: dict[str, str] = {}
    for table in (words.ARTICLE_SYNONYMS, words.ARTICLE_KINDS):
        assert set(table) <= set(words.ARTICLE_WORDS)
        for kind, synonyms in table.items():
            assert len(set(synonyms)) == len(synonyms)
            for word in synonyms:
                assert word == word.lower()
                assert owner.setdefault(word, kind) == kind, word


def test_shoppers_words_are_there() -> None:
    def of(kind: str) -> set[str]:
        return {*words.ARTICLE_SYNONYMS.get(kind, ()), *words.ARTICLE_KINDS.get(kind, ())}

    assert {"sneakers", "trainers", "running shoes"} <= of("Sports Shoes")
    assert {"shades", "spectacles"} <= of("Sunglasses")
    assert {"pullover", "jumper", "knitwear"} <= of("Sweaters")
    assert "rucksack" in of("Backpacks")
    assert {"denim trousers", "dungarees"} <= of("Jeans")
    assert "purse" in of("Handbags")
    assert {"coat", "parka"} <= of("Jackets")


def test_colours() -> None:
    assert len(words.BASE_COLOURS) == 46
    assert set(words.COLOUR_RGB) == set(words.BASE_COLOURS) - {"Multi"}
    assert set(words.COLOUR_SYNONYMS) == set(words.COLOUR_WORDS) == set(words.BASE_COLOURS)
    own = [name for names in words.COLOUR_SYNONYMS.values() for name in names]
    assert len(set(own)) == len(own)
    assert not set(own) & set(words.COLOUR_NAMES), "a name is either set by hand or computed"
    assert set(words.COLOUR_NAMES.values()) <= set(words.BASE_COLOURS)
    for name in ("teal", "navy", "crimson", "scarlet", "emerald", "ebony", "ivory", "mustard"):
        known = {*own, *words.COLOUR_NAMES, *words.COLOUR_WORDS.values()}
        assert name in known, name


def test_groups_part_the_base_colours() -> None:
    grouped = [colour for colours in words.COLOUR_GROUPS.values() for colour in colours]
    assert sorted(grouped) == sorted(words.COLOUR_RGB)
    assert 12 <= len(words.COLOUR_GROUPS) <= 16


def test_colour_group() -> None:
    assert colour_group("Navy Blue") == colour_group("blue") == "blue"
    assert colour_group("Maroon") == "red"
    assert colour_group("Multi") is colour_group("NA") is colour_group(None) is colour_group("") is None


def test_base_colours_are_told_apart() -> None:
    color = pytest.importorskip("skimage.color")
    lab = color.rgb2lab(np.array(list(words.COLOUR_RGB.values()))[None] / 255.0)[0]
    distance = color.deltaE_ciede2000(lab[:, None], lab[None])
    assert distance[~np.eye(len(lab), dtype=bool)].min() > 2.0


def test_light_and_dark_names_lie_in_the_right_group() -> None:
    for name, group in {
        "powder blue": "blue", "sky blue": "blue", "forest green": "green", "mint": "green", "dusty pink": "pink",
        "lemon": "yellow", "russet": "brown", "cerise": "pink", "royal purple": "purple", "cranberry": "red",
    }.items():  # fmt: skip
        base = words.COLOUR_NAMES.get(name) or next(b for b, names in words.COLOUR_SYNONYMS.items() if name in names)
        assert colour_group(base) == group, name


def test_real_catalogue_is_covered(real_data: dict[str, ProductDataset]) -> None:
    for ds in real_data.values():
        for record in ds.records():
            product = record.product
            assert product.category in words.ARTICLE_WORDS
            assert product.colour is None or product.colour in words.BASE_COLOURS
            assert product.gender in words.GENDER_WORDS
            assert product.usage is None or product.usage in words.USAGE_WORDS
