"""Captions as shoppers type them, composed from a catalogue record.

A catalogue name ("Turtle Check Men Navy Blue Shirt") holds brands and fits but seldom the plain words of a prompt, so a
record's captions are a mix: its exact name, its name with attributes, short prompts with fields dropped, and templates,
some of them with synonyms of the article and the colour. Caption k of a record depends on (seed, record.id, k) alone:
not on the batch, the order, or how many are composed.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gigdiff.data.records import ProductRecord
from gigdiff.data.vocabulary import ARTICLE_SYNONYMS, ARTICLE_WORDS, COLOUR_SYNONYMS, COLOUR_WORDS, UNCOUNTED
from gigdiff.errors import DataError, InputError
from gigdiff.products import Product, is_plural, pluralise

__all__ = ["compose_captions", "short_prompt"]

#: Types whose photo doesn't show for whom they are.
_NO_GENDER = frozenset({
    "Accessory Gift Set", "Basketballs", "Beauty Accessory", "Body Lotion", "Body Wash and Scrub", "Compact",
    "Concealer", "Cushion Covers", "Deodorant", "Eye Cream", "Eyeshadow", "Face Moisturisers",
    "Face Scrub and Exfoliator",
    "Face Serum and Gel", "Face Wash and Cleanser", "Footballs", "Foundation and Primer", "Fragrance Gift Set",
    "Free Gifts", "Hair Colour", "Highlighter and Blush", "Ipad", "Kajal and Eyeliner", "Key chain", "Laptop Bag",
    "Lip Care", "Lip Gloss", "Lip Liner", "Lip Plumper", "Lipstick", "Makeup Remover", "Mascara", "Mask and Peel",
    "Mens Grooming Kit", "Mobile Pouch", "Nail Essentials", "Nail Polish", "Perfume and Body Mist", "Shoe Accessories",
    "Shoe Laces", "Sunscreen", "Tablet Sleeve", "Toner", "Travel Accessory", "Trolley Bag", "Umbrellas", "Water Bottle",
})  # fmt: skip

#: Types that go without saying for women, or for men: "red saree", never "red saree for women".
_IMPLIED_GENDER = {
    **dict.fromkeys(
        ("Baby Dolls", "Bangle", "Bra", "Camisoles", "Capris", "Churidar", "Clutches", "Dresses", "Dupatta", "Earrings",
         "Flats", "Handbags", "Heels", "Jeggings", "Jewellery Set", "Jumpsuit", "Kurta Sets", "Kurtis", "Leggings",
         "Lehenga Choli", "Necklace and Chains", "Nightdress", "Patiala", "Pendant", "Salwar", "Salwar and Dupatta",
         "Sarees", "Shapewear", "Shrug", "Skirts", "Stockings", "Stoles", "Tights", "Tops", "Tunics"), "Women"),
    **dict.fromkeys(
        ("Boxers", "Cufflinks", "Nehru Jackets", "Suspenders", "Ties and Cufflinks", "Trunk", "Waistcoat"), "Men"),
    "Booties": None,
    "Rompers": None,
}  # fmt: skip

#: What a season or a usage may be said of: things to wear.
_NOT_WORN = _NO_GENDER | {
    "Backpacks",
    "Duffel Bag",
    "Handbags",
    "Messenger Bag",
    "Ring",
    "Rucksacks",
    "Waist Pouch",
    "Wallets",
}

#: What shoppers name a season with.
_SEASONAL = frozenset({
    "Capris", "Casual Shoes", "Dresses", "Flats", "Flip Flops", "Gloves", "Jackets", "Jumpsuit", "Kurtas", "Kurtis",
    "Mufflers", "Sandals", "Sarees", "Scarves", "Shirts", "Shorts", "Skirts", "Socks", "Stoles", "Sweaters",
    "Sweatshirts", "Tops", "Trousers", "Tshirts", "Tunics",
})  # fmt: skip

#: Synonyms that fit a woman's article only.
_LADIES_ONLY = frozenset({"panties", "knickers", "ladies bag", "ladies top", "blouse", "purse"})

#: "men's shoes" and the like; the first of each may stand after "for" as well.
_POSSESSIVES: dict[str, tuple[str, ...]] = {
    "Men": ("men's", "men's", "mens", "men"),
    "Women": ("women's", "women's", "womens", "ladies", "women"),
    "Boys": ("boys'", "boys", "boy's"),
    "Girls": ("girls'", "girls", "girl's"),
    "Unisex": ("unisex",),
}
_FOR: dict[str, tuple[str, ...]] = {
    "Men": ("men", "men", "men", "him", "a man"),
    "Women": ("women", "women", "women", "her", "ladies", "a woman"),
    "Boys": ("boys", "boys", "a boy"),
    "Girls": ("girls", "girls", "a girl"),
    "Unisex": ("men and women",),
}
_USAGE: dict[str, str] = {
    "Casual": "casual", "Ethnic": "ethnic", "Formal": "formal", "Party": "party", "Smart Casual": "smart casual",
    "Sports": "sports",
}  # fmt: skip

_PHOTO = (
    "a photo of {}",
    "photo of {}",
    "a product photo of {}",
    "picture of {}",
    "an image of {}",
    "product shot of {}",
    "a studio photo of {}",
    "{} on a white background",
    "catalogue photo of {}",
    "{}, product photo",
)


def short_prompt(product: Product) -> str:
    """The plain short prompt of a product: "red jacket for women". Deterministic; what evaluation asks models for.

    Colour and article type, and for whom it is where the photo can show that and the type doesn't already say it. A
    product without a type falls back on `Product.to_prompt`; raises InputError when there is nothing in it at all.
    """
    noun = ARTICLE_WORDS.get(product.category or "", (product.category or "").lower())
    if not noun:
        return product.to_prompt()
    colour = COLOUR_WORDS.get(product.colour or "", (product.colour or "").lower())
    words = f"{colour} {noun}".strip()
    if _gender_matters(product):
        words += f" for {(product.gender or '').lower()}"
    return words


def compose_captions(record: ProductRecord, count: int, *, seed: int = 0) -> list[str]:
    """`count` captions of a record, reproducibly: the k-th depends on (seed, record.id, k) alone.

    About a quarter are the catalogue name as it is, a seventh the name with attributes, a third short prompts, a
    quarter sentences and templates; in three of ten of the composed ones article or colour are said in other words. A
    record with captions of its own gets those instead of the name. Raises InputError when `count` isn't a positive
    integer and DataError when the record has nothing to say.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"count={count!r}; an integer of 1 or more is allowed")
    wording = _Wording.of(record)
    return [_compose(wording, _generator(seed, record.id, k)) for k in range(count)]


def _generator(seed: int, identity: str, k: int) -> random.Random:
    digest = hashlib.blake2b(f"caption\0{seed}\0{identity}\0{k}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


@dataclass(frozen=True, slots=True)
class _Wording:
    """What can be said of a record: its texts as they are, and its attributes, completed from those texts."""

    texts: tuple[str, ...]
    product: Product
    states: Product  # what the first text already says

    @staticmethod
    def of(record: ProductRecord) -> _Wording:
        product = record.product
        texts = record.captions or ((product.name,) if product.name else ())
        if not texts and product.description:
            texts = (product.description,)
        if not texts and not product:
            raise DataError(
                f"product {record.id} has neither caption nor attributes: nothing to compose a caption from. Name a "
                "caption "
                "or attribute column in load_products"
            )
        states = _stated(texts[0]) if texts else Product()
        # "Free Gifts" says nothing that can be seen; its names do: watches and sarees.
        category = states.category if product.category in (None, "Free Gifts") and states.category else product.category
        colour, gender = product.colour, product.gender
        if record.captions and not product.name:
            colour, gender = colour or states.colour, gender or states.gender
        return _Wording(
            texts,
            replace(
                product,
                category=category,
                colour=colour,
                gender=gender,
                material=product.material or states.material,
                pattern=product.pattern or states.pattern,
            ),
            states,
        )


@functools.lru_cache(maxsize=65536)
def _stated(text: str) -> Product:
    return Product.from_prompt(text)


def _compose(wording: _Wording, rng: random.Random) -> str:
    if not wording.product.category and not wording.product.colour:
        # No type to build a phrase on: say what the record says.
        return rng.choice(wording.texts) if wording.texts else wording.product.to_prompt()
    choice = rng.random()
    if wording.texts and choice < 0.25:
        return rng.choice(wording.texts)
    if wording.texts and choice < 0.40:
        return _name_with_attributes(wording, rng)
    if choice < 0.75:
        return _case(_phrase(wording.product, rng, _SHORT), rng)
    return _case(_template(wording.product, rng), rng)


def _name_with_attributes(wording: _Wording, rng: random.Random) -> str:
    """The name, and what it leaves out: "Lucera Lotus, silver earrings for women"."""
    text = rng.choice(wording.texts)
    product, states = wording.product, wording.states
    added = Product(
        category=product.category if product.category != states.category or rng.random() < 0.3 else None,
        colour=product.colour if product.colour != states.colour or rng.random() < 0.3 else None,
        gender=product.gender if product.gender != states.gender else None,
        usage=product.usage if rng.random() < 0.2 else None,
    )
    if added.category or added.colour:
        words = _phrase(replace(added, category=product.category), rng, _FULL)
    else:
        words = _phrase(replace(product, material=None, pattern=None), rng, _FULL)
    return f"{text}, {words}" if rng.random() < 0.6 else f"{words}, {text}"


@dataclass(frozen=True, slots=True)
class _Chances:
    """How often a phrase says each field that is known, and says it in other words."""

    colour: float
    pattern: float
    material: float
    gender: float
    usage: float
    season: float
    synonym: float


_SHORT = _Chances(colour=0.9, pattern=0.3, material=0.5, gender=0.4, usage=0.07, season=0.04, synonym=0.3)
_FULL = _Chances(colour=1.0, pattern=0.6, material=0.8, gender=0.7, usage=0.25, season=0.05, synonym=0.3)


def _phrase(product: Product, rng: random.Random, chances: _Chances, *, with_gender: bool = True) -> str:
    """A noun phrase: "striped navy t-shirt for men"."""
    noun, colour = _words(product, rng, chances.synonym)
    says: dict[str, bool] = {
        field: rng.random() < getattr(chances, field)
        for field in ("colour", "pattern", "material", "gender", "usage", "season")
    }
    possessive = rng.random() < 0.4
    plural = rng.random() < 0.12
    if plural:
        noun = pluralise(noun)
    usage = _USAGE.get(product.usage or "") if says["usage"] and product.category not in _NOT_WORN else None
    if usage == "casual" and rng.random() < 0.6:  # four products of five are: it distinguishes nothing
        usage = None
    before: list[str] = []
    if usage and "casual" in usage:
        before.append(usage)
    if says["pattern"] and product.pattern:
        before.append(product.pattern.lower())
    if colour and (says["colour"] or not noun):
        before.append(colour)
    if says["material"] and product.material:
        before.append(product.material.lower())
    if says["season"] and product.season and product.category in _SEASONAL:
        before.append({"Fall": "autumn"}.get(product.season, product.season.lower()))
    if usage and "casual" not in usage:
        before.append(usage)
    seen = noun.replace("-", " ").split()
    words = [word for word in before if word not in seen] + [noun or "product"]
    phrase = " ".join(words)
    if not with_gender or not says["gender"] or not product.gender or not _gender_matters(product, often=True):
        return phrase
    if possessive:
        owner = rng.choice(_POSSESSIVES.get(product.gender, (product.gender.lower(),)))
        return f"{owner} {phrase}" if rng.random() < 0.8 or not colour else f"{colour} {owner} {noun}"
    whom = rng.choice(_FOR.get(product.gender, (product.gender.lower(),)))
    if plural and whom.startswith("a "):
        whom = _FOR[product.gender][0]
    return f"{phrase} for {whom}"


def _template(product: Product, rng: random.Random) -> str:
    """A phrase in a sentence or with parts after commas."""
    choice = rng.random()
    phrase = _phrase(product, rng, _FULL, with_gender=choice >= 0.15)
    if choice < 0.15:  # "blue t-shirt, casual, men"
        extras: Sequence[str | None] = (
            _USAGE.get(product.usage or "") if product.category not in _NOT_WORN else None,
            (product.gender or "").lower() if _gender_matters(product, often=True) else None,
        )
        return ", ".join([phrase, *(extra for extra in extras if extra and extra not in phrase.split())])
    if choice < 0.55:
        return rng.choice(_PHOTO).format(_with_article(phrase, rng))
    if choice < 0.7:
        return _with_article(phrase, rng)
    if choice < 0.85:  # "jacket in red", colour last
        noun, colour = _words(product, rng, _FULL.synonym)
        owner = product.gender if _gender_matters(product) and product.gender in _POSSESSIVES else None
        head = f"{_POSSESSIVES[owner][0]} {noun}" if owner and noun else noun
        return f"{head} in {colour}" if head and colour else phrase
    return phrase


def _words(product: Product, rng: random.Random, synonym: float) -> tuple[str, str]:
    """(noun, colour) as this caption says them; with chance `synonym` at least one of them in other words."""
    noun = ARTICLE_WORDS.get(product.category or "", (product.category or "").lower())
    colour = COLOUR_WORDS.get(product.colour or "", (product.colour or "").lower())
    other, which, noun_at, colour_at = rng.random() < synonym, rng.random(), rng.random(), rng.random()
    if not other:
        return noun, colour
    nouns = ARTICLE_SYNONYMS.get(product.category or "", ())
    if product.gender != "Women":
        nouns = tuple(word for word in nouns if word not in _LADIES_ONLY)
    colours = COLOUR_SYNONYMS.get(product.colour or "", ())
    if nouns and (which < 0.65 or not colours):
        noun = nouns[int(noun_at * len(nouns))]
    if colours and (which > 0.5 or not nouns):
        colour = colours[int(colour_at * len(colours))]
    return noun, colour


def _with_article(phrase: str, rng: random.Random) -> str:
    """ "a red dress", "an olive cap", "black jeans", "a pair of black jeans"; mass words stay bare."""
    noun = phrase.split(" for ")[0]
    pair = rng.random() < 0.3
    if any(noun.endswith(word) for word in UNCOUNTED):
        return phrase
    if is_plural(noun):
        return f"a pair of {phrase}" if pair and noun.split()[-1] in _PAIRS else phrase
    return (
        f"an {phrase}"
        if phrase[0] in "aeio" or (phrase.startswith("un") and not phrase.startswith("uni"))
        else f"a {phrase}"
    )


_PAIRS = frozenset(
    """
    boxers briefs capris cufflinks denims earrings flats flops footwear glasses gloves heels jeans jeggings leggings
    mittens pants sandals shades shoes shorts slippers sneakers socks spectacles sunglasses tights trainers trousers
    trunks
    """.split()  # noqa: SIM905
)


def _gender_matters(product: Product, *, often: bool = False) -> bool:
    """Whether to say for whom it is. `often` includes Unisex, which a short prompt leaves out."""
    if not product.gender or product.category in _NO_GENDER:
        return False
    if product.gender == "Unisex":
        return often
    return _IMPLIED_GENDER.get(product.category or "", "?") not in (product.gender, None)


def _case(text: str, rng: random.Random) -> str:
    """Mostly as it is; sometimes Capitalised, Title Case or UPPER CASE, as people type."""
    choice = rng.random()
    styles: Mapping[float, Callable[[str], str]] = {0.03: str.upper, 0.08: _title, 0.16: _capital}
    return next((style(text) for limit, style in styles.items() if choice < limit), text)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _title(text: str) -> str:
    return " ".join(_capital(word) for word in text.split(" "))
