"""The prompt sets: what they ask for is what they say, and none of it occurs in training."""

from __future__ import annotations

import pytest

from gigdiff.data.captions import compose_captions
from gigdiff.data.records import ProductRecord
from gigdiff.data.vocabulary import colour_group
from gigdiff.errors import InputError
from gigdiff.evaluation import default_data_dir
from gigdiff.products import Product
from gigdiff.prompt_sets import evaluation_prompts, recombined, unseen_wordings


def record(i, category, colour, name=None):
    return ProductRecord(str(i), f"g{i}", Product(category=category, colour=colour, name=name))


def test_names_and_short():
    products = [
        Product(category="Shirts", colour="Navy Blue", gender="Men", name="Turtle Check Shirt"),
        Product("Caps"),
    ]
    assert evaluation_prompts(products, "names") == ["Turtle Check Shirt", "cap"]
    assert evaluation_prompts(products, "short") == ["navy blue shirt for men", "cap"]
    with pytest.raises(InputError, match="allowed are names, short"):
        evaluation_prompts(products, "wordings")


def test_unseen_wordings_mean_the_same_and_are_in_no_caption():
    train = [record(i, "Dresses", "Red", "Elle Party Dress") for i in range(20)] + [record(99, "Caps", "Red")]
    products = [Product("Dresses", "Red"), Product("Caps", "Black"), Product("Nothing known", "Red")]
    asked = unseen_wordings(products, ["a", "b", "c"], train)
    assert [one.id for one in asked] == ["a", "b"]
    captions = " ".join(caption.lower() for one in train for caption in compose_captions(one, 60))
    for one in asked:
        read = Product.from_prompt(one.prompt)
        assert read.category == one.product.category
        assert colour_group(read.colour) == colour_group(one.product.colour)
        assert one.prompt not in captions
    assert "party dress" not in asked[0].prompt  # a name of the train split holds that one
    assert asked == unseen_wordings(products, ["a", "b", "c"], train)


def test_recombined_pairs_never_occur_though_both_are_common():
    train = [record(i, "Shirts", "Red") for i in range(150)] + [record(i, "Caps", "Blue") for i in range(150)]
    train += [record(i, "Caps", "Maroon") for i in range(120)] + [record(i, "Ring", "Green") for i in range(5)]
    asked = recombined(train, 10)
    assert [(one.product.category, one.product.colour) for one in asked] == [("Shirts", "Blue")]  # Maroon is a red
    assert asked[0].prompt == "blue shirt"
    assert recombined(train, 0) == []


DATA = default_data_dir()


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no fashion products at {DATA}; set GIGDIFF_DATA")
def test_on_the_catalogue():
    load_products = pytest.importorskip("gigdiff.data").load_products
    train, validation = load_products(DATA).records(), load_products(DATA, split="validation").records()
    pairs = {(one.product.category, colour_group(one.product.colour)) for one in train}
    asked = recombined(train, 200)
    assert len(asked) == 200 == len({one.id for one in asked})
    assert not pairs & {(one.product.category, colour_group(one.product.colour)) for one in asked}
    assert recombined(train, 50) == asked[:50] != recombined(train, 50, seed=1)
    wordings = unseen_wordings([one.product for one in validation], [one.id for one in validation], train)
    assert len(wordings) > 1000
    text = " | ".join(str(one.product.name).lower() for one in train)
    for one in wordings[::50]:
        assert one.prompt.lower() not in text
