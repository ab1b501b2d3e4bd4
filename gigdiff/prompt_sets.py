"""What models are asked to draw when they are measured: the sets of prompts.

    names       as the catalogue names each product: "Turtle Check Men Navy Blue Shirt"
    short       as a shopper would ask for it: "navy shirt for men"
    wordings    the same in words that no training caption has: "tomato red sundress" for a red dress
    recombined  an article type in a colour that it never has in training, though both are common: "teal formal shoes"

The last two need the train split, to know what never occurs in it. Drawn images of "wordings" may be held against the
product's real photo; of "recombined" there is none, so only what a probe or CIEDE2000 reads off the image can be
scored.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gigdiff.data.captions import short_prompt
from gigdiff.data.records import ProductRecord
from gigdiff.data.vocabulary import ARTICLE_KINDS, ARTICLE_WORDS, COLOUR_NAMES, COLOUR_WORDS, colour_group
from gigdiff.errors import InputError
from gigdiff.products import Product

__all__ = ["PHOTO_SETS", "PROMPT_SETS", "Asked", "evaluation_prompts", "recombined", "unseen_wordings"]

PHOTO_SETS = ("names", "short")  # every product has such a prompt, so its images are held against all real photos
PROMPT_SETS = (*PHOTO_SETS, "wordings", "recombined")
COMMON = 100  # train photos that a type or a base colour needs to be recombined: what is rare alone tells nothing


@dataclass(frozen=True)
class Asked:
    """One image to draw: the prompt, what it asks for, and an id that its seed is made of."""

    id: str
    prompt: str
    product: Product


def evaluation_prompts(products: Sequence[Product], prompts: str) -> list[str]:
    """The prompt of each product: "names" = as the catalogue names it, "short" = as a shopper would ask for it."""
    if prompts == "names":
        return [product.name or product.to_prompt() for product in products]
    if prompts == "short":
        return [short_prompt(product) for product in products]
    raise InputError(f'prompts="{prompts}" is unknown; allowed are {", ".join(PHOTO_SETS)}')


def unseen_wordings(products: Sequence[Product], ids: Sequence[str], train: Iterable[ProductRecord]) -> list[Asked]:
    """Of each product that can be said so: its type and colour with at least one of them in words unseen in training.

    Words for kinds of an article (ARTICLE_KINDS) and survey colour names (COLOUR_NAMES) are understood in prompts and
    never composed into captions; those that a train photo's own name or caption holds are left out as well.
    """
    seen = " | ".join(_plain(text) for record in train for text in (record.product.name, *record.captions) if text)
    colours: dict[str, list[str]] = {}
    for word, base in COLOUR_NAMES.items():
        if _plain(word) not in seen:
            colours.setdefault(base, []).append(word)
    kinds = {
        category: [
            noun for noun in nouns if _plain(noun) not in seen and Product.from_prompt(noun).category == category
        ]
        for category, nouns in ARTICLE_KINDS.items()
    }
    asked = []
    for product, identity in zip(products, ids, strict=True):
        nouns = kinds.get(product.category or "", [])
        tints = colours.get(product.colour or "", [])
        if product.category not in ARTICLE_WORDS or not (nouns or tints):
            continue
        noun = _pick(nouns, identity, "noun") if nouns else ARTICLE_WORDS[product.category]
        plain = COLOUR_WORDS.get(product.colour or "", "")
        colour = _pick(tints, identity, "colour") if tints else plain
        asked.append(Asked(identity, f"{colour} {noun}".strip(), product))
    return asked


def recombined(train: Sequence[ProductRecord], count: int, seed: int = 0) -> list[Asked]:
    """At most `count` pairs of a common type and a common colour that no train photo shows together.

    No photo of the type may be in the colour's whole group, so that a neighbouring shade is no help. Which pairs are
    taken depends on (seed, pair) alone.
    """
    types = Counter(record.product.category for record in train)
    colours = Counter(record.product.colour for record in train)
    together = {(record.product.category, colour_group(record.product.colour)) for record in train}
    pairs = [
        (kind, colour)
        for kind, of_kind in types.items()
        for colour, of_colour in colours.items()
        if kind in ARTICLE_WORDS and of_kind >= COMMON and of_colour >= COMMON
        and colour is not None and colour_group(colour) is not None and (kind, colour_group(colour)) not in together
    ]  # fmt: skip
    pairs.sort(key=lambda pair: hashlib.sha256(f"{seed}|{pair[0]}|{pair[1]}".encode()).digest())
    products = [Product(category=kind, colour=colour) for kind, colour in pairs[:count]]
    return [Asked(f"{p.category} in {p.colour}", short_prompt(p), p) for p in products]


def _plain(text: str) -> str:
    """Lower case, words apart by one space, a space at either end."""
    return f" {' '.join(''.join(c if c.isalnum() else ' ' for c in text.lower()).split())} "


def _pick(words: Sequence[str], identity: str, what: str) -> str:
    return words[int.from_bytes(hashlib.sha256(f"{what}|{identity}".encode()).digest()[:4], "big") % len(words)]
