"""Product <-> prompt, and condense."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from gigdiff.data import vocabulary
from gigdiff.errors import InputError
from gigdiff.products import Product, condense, is_plural, pluralise, singularise

# ---- to_prompt -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("product", "prompt"),
    [
        (Product("Jackets", "Red", "wool", "Women"), "red wool jacket for women"),
        (Product(category="Dresses", colour="Yellow"), "yellow dress"),
        (Product(category="jackets", colour="NAVY BLUE"), "navy blue jacket"),
        (Product("Shirts", "Blue", "cotton", "Men", "Formal", pattern="striped"),
         "striped blue cotton shirt for men, formal wear"),
        (Product("Backpacks", "Black", gender="Unisex"), "black backpack for men and women"),
        (Product("Hoverboards", "teal-ish"), "teal-ish hoverboards"),
        (Product(colour="Red"), "red product"),
        (Product(name="Acme Rocket"), "Acme Rocket"),
        (Product("Shirts", "Navy Blue", gender="Men", name="Turtle Check Men Navy Blue Shirt"),
         "Turtle Check Men Navy Blue Shirt"),
        (Product("Shirts", "Red", name="Acme Best"), "red shirt, Acme Best"),
        (Product("Shirts", description="with a cat on it"), "shirt, with a cat on it"),
    ],
)  # fmt: skip
def test_to_prompt(product: Product, prompt: str) -> None:
    assert product.to_prompt() == prompt


@pytest.mark.parametrize("product", [Product(), Product(name="  "), Product(season="Summer")])
def test_nothing_to_say(product: Product) -> None:
    with pytest.raises(InputError, match="category, colour, material"):
        product.to_prompt()


def test_only_strings() -> None:
    with pytest.raises(InputError, match=r"Product\(colour=3\): a int was given"):
        Product(colour=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a list was given"):
        Product(name=["a"])  # type: ignore[arg-type]


def test_spaces_are_tidied_and_blank_is_none() -> None:
    assert Product(name=" a\n  b ", colour="") == Product(name="a b")
    assert not Product(colour=" ")
    assert Product(colour="red")


# ---- from_prompt -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red wool coat", Product("Jackets", "Red", "wool")),
        ("crimson pullover", Product("Sweaters", "Red")),
        ("sneakers", Product("Sports Shoes")),
        ("a pair of white trainers for her", Product("Sports Shoes", "White", gender="Women")),
        ("spectacles", Product("Sunglasses")),
        ("black leather handbag", Product("Handbags", "Black", "leather")),
        ("yellow summer dress", Product("Dresses", "Yellow", season="Summer")),
        ("brown leather belt", Product("Belts", "Brown", "leather")),
        ("Turtle Check Men Navy Blue Shirt", Product("Shirts", "Navy Blue", gender="Men", pattern="checked")),
        ("Red Chief Men Black Casual Shoes", Product("Casual Shoes", "Black", gender="Men")),
        ("black and white striped shirt with red belt", Product("Shirts", "Black", pattern="striped")),
        ("Nike Unisex Grey & Red Backpack", Product("Backpacks", "Grey", gender="Unisex")),
        ("t-shirt in bottle green", Product("Tshirts", "Green")),
        ("light blue denim trousers", Product("Jeans", "Blue", "denim")),
        ("women's rucksack", Product("Rucksacks", gender="Women")),
        ("eye cream", Product("Eye Cream")),
        ("cream sweater", Product("Sweaters", "Cream")),
        ("tie-dye t-shirt", Product("Tshirts", pattern="tie-dye")),
        ("lace-up shoes", Product("Casual Shoes")),
        ("formal black shoes", Product("Formal Shoes", "Black", usage="Formal")),
        ("multi-coloured sari", Product("Sarees", "Multi")),
        ("scarves", Product("Scarves")),
        ("SUNGLASS", Product("Sunglasses")),
        ("gray hoodies", Product("Sweatshirts", "Grey")),
        ("multicolor scarf", Product("Scarves", "Multi")),
        ("shirt dress", Product("Dresses")),
        ("purple unicorn", Product(colour="Purple")),
        ("zorbly quux", Product()),
    ],
)
def test_from_prompt(text: str, expected: Product) -> None:
    assert Product.from_prompt(text) == expected


def test_from_prompt_wants_text() -> None:
    with pytest.raises(InputError, match="was given a int"):
        Product.from_prompt(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="empty prompt"):
        Product.from_prompt(" \n")


@pytest.mark.parametrize("kind", sorted(vocabulary.ARTICLE_WORDS))
def test_every_article_is_read_in_all_its_words(kind: str) -> None:
    own = vocabulary.ARTICLE_WORDS[kind]
    assert Product.from_prompt(f"a {own}").category == kind
    assert Product.from_prompt(f"red {pluralise(own)} for men").category == kind
    for word in (*vocabulary.ARTICLE_SYNONYMS.get(kind, ()), *vocabulary.ARTICLE_KINDS.get(kind, ())):
        if word not in vocabulary.ARTICLE_WORDS.values():  # rucksack: another type's own word
            assert Product.from_prompt(f"nice {word}").category == kind, word


@pytest.mark.parametrize("colour", vocabulary.BASE_COLOURS)
def test_every_colour_name_is_read(colour: str) -> None:
    names = [n for n, base in vocabulary.COLOUR_NAMES.items() if base == colour]
    for word in (colour, vocabulary.COLOUR_WORDS[colour], *vocabulary.COLOUR_SYNONYMS[colour], *names):
        assert Product.from_prompt(f"{word} t-shirt").colour == colour, word


#: Pairs that English has one word for: denim trousers are jeans, and canvas shoes come before their laces.
MERGED = {("Trousers", "denim"), ("Leggings", "denim"), ("Shoe Accessories", "canvas"), ("Shoe Laces", "canvas")}


def test_round_trip() -> None:
    genders = [None, *vocabulary.GENDER_WORDS]
    usages = [None, *vocabulary.USAGE_WORDS]
    materials = [None, *vocabulary.MATERIALS]
    patterns = [None, *vocabulary.PATTERNS]
    colours = [None, *vocabulary.BASE_COLOURS]
    # Every pair (type, colour); the other fields take turns, so that each value meets many types.
    turns = zip(
        itertools.cycle(genders),
        itertools.cycle(usages),
        itertools.cycle(materials),
        itertools.cycle(patterns),
        strict=False,
    )
    for (kind, colour), (gender, usage, material, pattern) in zip(
        itertools.product(vocabulary.ARTICLE_WORDS, colours), turns, strict=False
    ):
        if (kind, material) in MERGED:
            continue
        product = Product(kind, colour, material, gender, usage, pattern=pattern)
        assert Product.from_prompt(product.to_prompt()) == product, product.to_prompt()


def test_round_trip_with_a_name_that_says_otherwise() -> None:
    product = Product("Heels", "Silver", gender="Women", name="Catwalk Women White Flats")
    read = Product.from_prompt(product.to_prompt())
    assert (read.category, read.colour, read.gender) == ("Heels", "Silver", "Women")


# ---- number ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "many"),
    [("dress", "dresses"), ("watch", "watches"), ("scarf", "scarves"), ("cami", "camis"),
     ("party dress", "party dresses"),
     ("hoody", "hoodies"), ("key", "keys"), ("t-shirt", "t-shirts"), ("box", "boxes")],
)  # fmt: skip
def test_number(one: str, many: str) -> None:
    assert pluralise(one) == many
    assert singularise(many) == one
    assert is_plural(many) and not is_plural(one)
    assert pluralise(many) == many


def test_mass_words_have_no_plural() -> None:
    assert pluralise("nail polish") == "nail polish"


# ---- condense --------------------------------------------------------------------------------------------------------

LONG = (
    "This stunning red coat is made from pure Italian wool by our craftsmen in Milan. It has a notch collar, two front "
    "pockets and long sleeves, no hood. Perfect for women who love the city. Dry clean only. Free returns within 30 "
    "days, and the coat ships in a recyclable box."
)


def test_short_descriptions_stay() -> None:
    assert condense("a  red coat,\nwool", 4) == ("a red coat, wool", "")


def test_condense_keeps_what_can_be_seen() -> None:
    kept, left_out = condense(LONG, 12)
    assert len(kept.split()) <= 12
    assert kept == "red coat wool notch collar two front pockets long sleeves women"
    assert "hood" not in kept and "no hood" in left_out
    assert "Free returns" in left_out and "Milan" in left_out
    assert Product.from_prompt(kept) == Product("Jackets", "Red", "wool", "Women")


def test_condense_drops_details_before_attributes() -> None:
    kept, left_out = condense(LONG, 4)
    assert kept == "red coat wool women"
    assert "collar" in left_out


def test_condense_loses_no_word() -> None:
    for most in (1, 5, 20):
        kept, left_out = condense(LONG, most)
        words = sorted(word.strip(",.") for word in LONG.split())
        assert sorted(w.strip(",.") for w in (*kept.split(), *left_out.split()) if w != "...") == words


def test_condense_of_something_unknown_keeps_the_beginning() -> None:
    assert condense("zorbly quux fnord blip", 2) == ("zorbly quux", "fnord blip")


def test_condense_of_a_very_long_text() -> None:
    kept, left_out = condense(" ".join([LONG] * 40), 16)
    assert 4 <= len(kept.split()) <= 16 and left_out


def test_condense_wants_text_and_a_count() -> None:
    with pytest.raises(InputError, match="was given a NoneType"):
        condense(None, 5)  # type: ignore[arg-type]
    for bad in (0, -3, 2.5, True):
        with pytest.raises(InputError, match="max_words="):
            condense("a red coat", bad)  # type: ignore[arg-type]


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_import_is_light() -> None:
    code = (
        "import sys, time; t = time.process_time(); import gigdiff.products; spent = time.process_time() - t;"
        "heavy = {'torch', 'numpy', 'datasets', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy; assert spent < 0.25, spent"
    )
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
