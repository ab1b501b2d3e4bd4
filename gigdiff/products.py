"""A product by its attributes, as a prompt, and read back from free text.

Imports no torch and no numpy: `import gigdiff.products` costs some milliseconds. The words are in
`gigdiff.data.vocabulary`; the look-up tables over them are built on first use.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gigdiff.data import vocabulary
from gigdiff.errors import InputError

__all__ = ["Product", "condense", "is_plural", "pluralise", "singularise"]


@dataclass(frozen=True, slots=True)
class Product:
    """What is known of a product; every field is free text or None.

    Raises InputError when a field is neither a string nor None. Blank strings become None. `bool(product)` says whether
    anything is known at all.
    """

    category: str | None = None  #: article type: "Jackets", "Casual Shoes"
    colour: str | None = None  #: base colour: "Navy Blue"
    material: str | None = None
    gender: str | None = None  #: Men, Women, Boys, Girls, Unisex
    usage: str | None = None  #: Casual, Sports, Formal, Ethnic, ...
    name: str | None = None  #: the catalogue's display name
    description: str | None = None
    pattern: str | None = None  #: striped, checked, printed, ...
    season: str | None = None  #: Summer, Fall, Winter, Spring; can't be seen, so prompts leave it out

    def __post_init__(self) -> None:
        for field in FIELDS:
            value = getattr(self, field)
            if value is None:
                continue
            if not isinstance(value, str):
                raise InputError(
                    f"Product({field}={value!r}): a {type(value).__name__} was given, a string or None is allowed"
                )
            text = " ".join(value.split())
            if text != value or not text:
                object.__setattr__(self, field, text or None)

    def __bool__(self) -> bool:
        return any(getattr(self, field) is not None for field in FIELDS)

    def to_prompt(self) -> str:
        """A plain prompt: "red wool jacket for women", then name and description where they add something.

        A catalogue name that already states every attribute is the prompt by itself. Raises InputError when the product
        has nothing in it that can be seen.
        """
        name = self.name
        if name and self._states_all(name):
            parts = [name]
        else:
            parts = [self._attributes() or "", name or ""]
        prompt = ", ".join(part for part in (*parts, self.description or "") if part)
        if not prompt:
            given = "only a season" if self.season else "nothing"
            raise InputError(
                f"this Product has {given} in it; give at least one of category, colour, material, pattern, gender, "
                "usage, "
                'name or description, e.g. Product(category="Jackets", colour="Red")'
            )
        return prompt

    @classmethod
    def from_prompt(cls, text: str) -> Product:
        """Read attributes from free text; what it doesn't say stays None.

        Types and colours come back as the catalogue names them ("crimson pullover" -> Red, Sweaters): the type is the
        head of the first phrase that has one, the colour the one before it. Raises InputError when `text` isn't a
        non-blank string.
        """
        if not isinstance(text, str):
            raise InputError(f"from_prompt was given a {type(text).__name__}; a string is allowed")
        if not text.strip():
            raise InputError('from_prompt was given an empty prompt; name at least an article, e.g. "red coat"')
        return _parse(text)

    def _attributes(self) -> str | None:
        words = [self.pattern, _say(self.colour, vocabulary.COLOUR_WORDS), self.material]
        noun = _say(self.category, vocabulary.ARTICLE_WORDS)
        gender = _say(self.gender, {key: words[0] for key, words in vocabulary.GENDER_WORDS.items()})
        usage = _say(self.usage, {key: words[0] for key, words in vocabulary.USAGE_WORDS.items()}, " wear")
        if noun is None and (any(words) or gender or usage) and not (self.name or self.description):
            noun = "product"
        prompt = " ".join(word.lower() for word in (*words, noun) if word)
        if gender:
            prompt = f"{prompt} for {gender}".strip()
        return ", ".join(part for part in (prompt, usage) if part) or None

    def _states_all(self, name: str) -> bool:
        read = _parse(name)
        return all(
            getattr(self, field) is None or _same(getattr(self, field), getattr(read, field))
            for field in ("category", "colour", "material", "pattern", "gender", "usage")
        )


FIELDS: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(Product))


def _same(a: str | None, b: str | None) -> bool:
    return a is not None and b is not None and a.lower() == b.lower()


def _say(value: str | None, words: Mapping[str, str], ending: str = "") -> str | None:
    """How a prompt says an attribute: the vocabulary's word whatever the value's case, else the value itself."""
    if value is None:
        return None
    by_lower = {key.lower(): word for key, word in words.items()}
    return by_lower.get(value.lower(), value.lower() + ending)


# ---- number ----------------------------------------------------------------------------------------------------------

_IRREGULAR = {"scarf": "scarves", "headscarf": "headscarves", "knife": "knives"}
_SINGULAR = {plural: singular for singular, plural in _IRREGULAR.items()}


def is_plural(noun: str) -> bool:
    """Whether the last word of `noun` is a plural: "jeans", "casual shoes", but not "dress" or "lip gloss"."""
    return noun.endswith("s") and not noun.endswith("ss")


def pluralise(noun: str) -> str:
    """The plural of an article word; plurals and mass words ("nail polish") stay as they are."""
    if noun in vocabulary.UNCOUNTED or is_plural(noun):
        return noun
    head, _, last = noun.rpartition(" ")
    if last in _IRREGULAR:
        plural = _IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        plural = last + "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        plural = last[:-1] + "ies"
    else:
        plural = last + "s"
    return f"{head} {plural}".strip()


def singularise(noun: str) -> str:
    """The singular of an article word: "dresses" -> "dress", "shoes" -> "shoe"."""
    head, _, last = noun.rpartition(" ")
    if last in _SINGULAR:
        last = _SINGULAR[last]
    elif last.endswith(("sses", "shes", "ches", "xes")):
        last = last[:-2]
    elif last.endswith("ies") and len(last) > 4:
        last = last[:-3] + "y"
    elif is_plural(last):
        last = last[:-1]
    return f"{head} {last}".strip()


# ---- reading free text -----------------------------------------------------------------------------------------------

_Phrase = tuple[str, ...]

#: Words after which another thing may be named than the one that is for sale: "dress with belt", "belt for jeans".
_BREAKS = frozenset(
    {"with", "without", "for", "from", "by", "in", "on", "and", "featuring", "has", "is", "plus", ",", "."}
)


class _Match(NamedTuple):
    start: int
    end: int
    value: str
    phrase: _Phrase


def _tokens(text: str) -> list[str]:
    """Lower-case words without apostrophes, hyphens as spaces, & and / as "and", sentence marks as "," and "."."""
    plain = re.sub(r"['’`´]", "", text.lower())
    return [
        "and" if token in ("&", "/", "+") else "," if token in ",;:|()" else "." if token in ".!?\n" else token
        for token in re.findall(r"[^\W_]+|[&/+]|[,;:|()]|[.!?\n]", plain)
    ]


def _table(pairs: Iterable[tuple[str, str]]) -> dict[_Phrase, str]:
    """Phrase -> value; the first of several meanings stays."""
    table: dict[_Phrase, str] = {}
    for phrase, value in pairs:
        table.setdefault(tuple(_tokens(phrase)), value)
    return table


def _article_pairs() -> Iterator[tuple[str, str]]:
    own = [(word, kind) for kind, word in vocabulary.ARTICLE_WORDS.items()]
    own += [(kind, kind) for kind in vocabulary.ARTICLE_WORDS]
    other = [
        (word, kind)
        for table in (vocabulary.ARTICLE_SYNONYMS, vocabulary.ARTICLE_KINDS)
        for kind, words in table.items()
        for word in words
    ]
    for words in (own, other):  # the catalogue's own word wins over another type's synonym, in every number
        yield from words
        for word, kind in words:
            yield pluralise(word.lower()), kind
            yield singularise(word.lower()), kind


@functools.cache
def _tables() -> dict[str, dict[_Phrase, str]]:
    def invert(table: Mapping[str, tuple[str, ...]]) -> dict[_Phrase, str]:
        pairs = [(key, key) for key in table]
        return _table(pairs + [(word, key) for key, words in table.items() for word in words])

    colours = [(colour, colour) for colour in vocabulary.BASE_COLOURS]
    colours += [(word, colour) for colour, word in vocabulary.COLOUR_WORDS.items()]
    colours += [(word, colour) for colour, words in vocabulary.COLOUR_SYNONYMS.items() for word in words]
    colours += list(vocabulary.COLOUR_NAMES.items())
    colours += [(name.replace("grey", "gray"), colour) for name, colour in colours if "grey" in name.lower()]
    colours += [(name.replace("colour", "color"), colour) for name, colour in colours if "colour" in name]
    return {
        "category": _table(_article_pairs()),
        "colour": _table(colours),
        "material": invert(vocabulary.MATERIALS),
        "pattern": invert(vocabulary.PATTERNS),
        "gender": invert(vocabulary.GENDER_WORDS),
        "usage": invert(vocabulary.USAGE_WORDS),
        "season": invert(vocabulary.SEASON_WORDS),
    }


@functools.cache
def _own_article_phrases() -> frozenset[_Phrase]:
    words = [*vocabulary.ARTICLE_WORDS, *vocabulary.ARTICLE_WORDS.values()]
    forms = [form for word in words for form in (word, pluralise(word.lower()), singularise(word.lower()))]
    return frozenset(tuple(_tokens(form)) for form in forms)


@functools.cache
def _by_first_word(field: str) -> dict[str, list[_Phrase]]:
    """First word -> the phrases of a field that start with it, longest first."""
    phrases: dict[str, list[_Phrase]] = {}
    for phrase in sorted(_tables()[field], key=len, reverse=True):
        phrases.setdefault(phrase[0], []).append(phrase)
    return phrases


def _find(tokens: list[str], field: str, blocked: frozenset[int] = frozenset()) -> list[_Match]:
    """All phrases of `field`, longest first at each place, none over a blocked token."""
    table, starting = _tables()[field], _by_first_word(field)
    found, start = [], 0
    while start < len(tokens):
        for phrase in starting.get(tokens[start], ()):
            end = start + len(phrase)
            if tuple(tokens[start:end]) == phrase and blocked.isdisjoint(range(start, end)):
                found.append(_Match(start, end, table[phrase], phrase))
                start = end
                break
        else:
            start += 1
    return found


def _spans(matches: Iterable[_Match]) -> frozenset[int]:
    return frozenset(i for match in matches for i in range(match.start, match.end))


class _Reading(NamedTuple):
    """All attribute words found in a text, by field."""

    tokens: list[str]
    found: dict[str, list[_Match]]


def _read(text: str) -> _Reading:
    tokens = _tokens(text)
    # A one-word article inside a longer phrase of another kind is none: the tie of "tie-dye".
    compounds = _spans(m for field in ("pattern", "colour") for m in _find(tokens, field) if len(m.phrase) > 1)
    articles = _find(tokens, "category")
    articles = [m for m in articles if len(m.phrase) > 1 or m.start not in compounds]
    covered = _spans(articles)
    own = _spans(m for m in articles if m.phrase in _own_article_phrases())
    laced = frozenset(i for i in range(len(tokens) - 1) if tokens[i] == "lace" and tokens[i + 1] in ("up", "ups"))
    materials = _find(tokens, "material", own | laced)
    found = {
        "category": articles,
        "colour": _find(
            tokens, "colour", covered | _spans(m for m in materials if len(m.phrase) > 1)
        ),  # stainless steel
        "material": materials,
        "gender": _find(tokens, "gender", own),
        "usage": _find(tokens, "usage", own),
        "season": _find(tokens, "season", own),
        "pattern": _find(tokens, "pattern", own),
    }
    return _Reading(tokens, found)


def _head(reading: _Reading) -> _Match | None:
    """The article that a text is about: the last of the first phrase that names any ("shirt dress" is a dress)."""
    articles = reading.found["category"]
    if not articles:
        return None
    head = articles[0]
    for nearer in articles[1:]:
        if any(token in _BREAKS for token in reading.tokens[head.end : nearer.start]):
            break
        head = nearer
    return head


def _main_colour(reading: _Reading, head: _Match | None) -> str | None:
    """The colour right before the article; of "black and white shirt" the first. Else the first colour at all."""
    colours = reading.found["colour"]
    before = [c for c in colours if head is not None and c.end <= head.start]
    if not before:
        return colours[0].value if colours else None
    i = len(before) - 1
    while i > 0 and set(reading.tokens[before[i - 1].end : before[i].start]) == {"and"}:
        i -= 1
    return before[i].value


def _parse(text: str) -> Product:
    reading = _read(text)
    head = _head(reading)
    first = {field: matches[0].value for field, matches in reading.found.items() if matches}
    category = head.value if head else None
    if head and head.phrase in (
        ("shoes",),
        ("shoe",),
    ):  # "formal black shoes": the bare word leaves the kind to the usage
        category = {"Formal": "Formal Shoes", "Sports": "Sports Shoes"}.get(first.get("usage", ""), category)
    return Product(
        category=category,
        colour=_main_colour(reading, head),
        material=first.get("material"),
        gender=first.get("gender"),
        usage=first.get("usage"),
        pattern=first.get("pattern"),
        season=first.get("season"),
    )


# ---- long descriptions -----------------------------------------------------------------------------------------------

#: Parts and shapes that a photo shows, beside the attributes.
_VISIBLE = frozenset(
    """
    adjustable ankle asymmetric back backless band bell bow brim broad buckle buckled button buttoned buttons calf cap
    chain charm chest chunky closed collar collared contrast cropped cuff cuffed cuffs cup cut dial double drawstring
    elastic fitted flap flared flat frame frames frill fringe front full gathered gradient half handle handles heel
    heeled hem high hood hooded hooks joggers knee knot large lapel laced lens lenses lining logo long loop loose low
    maxi mid midi mini neck neckline notch open oval oversized panel panels patch peep pendant piping pleated pleats
    pocket pockets point pointed print quarter racerback rectangular regular relaxed round ruched ruffle ruffled sash
    scoop seam sheer short shoulder shoulders side single skinny sleeve sleeved sleeveless sleeves slim slit small
    sole soles spaghetti square stand stitch stitched stitching stone stones straight strap straps strapless stud
    studs tailored tapered tassel tassels thick thin three tie tight tiered toe trim trims tube turtleneck two v
    velcro waist waistband wedge wide wrap yoke zip zipped zipper zippers crew polo mandarin boat halter cowl off one
    four five laces platform block kitten stiletto round-neck v-neck ballet bowknot shiny matte glossy metallic
    transparent translucent
    """.split()  # noqa: SIM905
)
_NEGATIONS = frozenset({"no", "not", "without", "never", "non"})
#: What to keep first when even the visible words are too many.
_RANKS = {"category": 0, "colour": 1, "material": 2, "pattern": 3, "gender": 4, "detail": 5, "usage": 6, "season": 7}


def condense(description: str, max_words: int) -> tuple[str, str]:
    """Shorten a description to what can be seen. Returns (kept, left out).

    A description of at most `max_words` words is kept as it is. Of a longer one the words for type, colour, material,
    pattern, gender, parts and shapes are kept, each once and in their order, without those that are negated ("no
    hood"); if they are still too many, in that order of rank. Where nothing is recognised, the first `max_words`
    words are kept. The second string holds the words left out, " ... " between runs; it is empty when nothing was.

    Raises InputError when `description` isn't a string or `max_words` isn't a positive integer.
    """
    if not isinstance(description, str):
        raise InputError(f"condense was given a {type(description).__name__}; a string is allowed")
    if isinstance(max_words, bool) or not isinstance(max_words, int) or max_words < 1:
        raise InputError(f"max_words={max_words!r}; an integer of 1 or more is allowed")
    words = description.split()
    if len(words) <= max_words:
        return " ".join(words), ""
    rank = _ranks(words)
    if not rank:
        return " ".join(words[:max_words]), " ".join(words[max_words:])
    chosen = sorted(sorted(rank, key=lambda i: (rank[i], i))[:max_words])
    kept = " ".join(words[i].strip(",.;:!?()[]\"'“”") for i in chosen)
    runs: list[list[str]] = [[]]
    for i, word in enumerate(words):
        if i in chosen:
            runs.append([])
        else:
            runs[-1].append(word)
    return kept, " ... ".join(" ".join(run) for run in runs if run)


def _ranks(words: list[str]) -> dict[int, int]:
    """Index of each word that names something visible -> its rank, the first mention only and none that is negated."""
    tokens: list[str] = []
    owner: list[int] = []  # the word that a token came from: "t-shirt," is one word and three tokens
    for i, word in enumerate(words):
        parts = _tokens(word)
        tokens += parts
        owner += [i] * len(parts)
    rank: dict[int, int] = {}
    seen: set[str] = set()
    negated = False
    fields: dict[int, str] = {i: "detail" for i, token in enumerate(tokens) if token in _VISIBLE}
    reading = _read(" ".join(words))
    for field in sorted(_RANKS, key=lambda f: -_RANKS[f]):
        for match in reading.found.get(field, ()):
            fields.update(dict.fromkeys(range(match.start, match.end), field))
    for i, token in enumerate(tokens):
        if token in _NEGATIONS:
            negated = True
        elif token in (",", ".", "but"):
            negated = False
        elif i in fields and not negated:
            word = " ".join(t for t, o in zip(tokens, owner, strict=True) if o == owner[i] and t not in ",.")
            if word in seen and owner[i] not in rank:
                continue
            seen.add(word)
            rank[owner[i]] = min(_RANKS[fields[i]], rank.get(owner[i], 99))
    return rank
