"""Filters that look at prompts and at finished images, each giving a verdict; none is on unless you ask for it.

    safety = Safety(prompt_filters=(blocklist(BRANDS),), image_filters=(diffusers_checker("path/to/checker"),))
    gigdiff.generate("red wool coat", safety=safety)

A filter is any callable from a prompt, or from a uint8 picture (H, W, 3), to a Verdict. A blocked picture is an error
that names filter, label and score; no picture is ever blackened in silence.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gigdiff
from gigdiff.errors import BlockedError, InputError, ModelNotFoundError

if TYPE_CHECKING:
    import numpy as np

    from gigdiff.generators.request import GenerationResult

__all__ = [
    "BRANDS",
    "CELEBRITIES",
    "ImageFilter",
    "PromptFilter",
    "Safety",
    "Verdict",
    "blocklist",
    "diffusers_checker",
]


@dataclass(frozen=True)
class Verdict:
    """What one filter says of one prompt or image.

    Attributes:
        action: "allow"; "flag" = let it pass with a note; "block".
        label: what was found: "brand", "nsfw", ...; "" for nothing.
        score: how sure, 0 to 1. filter, version: who says so.
    """

    action: Literal["allow", "flag", "block"]
    label: str = ""
    score: float = 0.0
    filter: str = ""
    version: str = ""

    def __post_init__(self) -> None:
        if self.action not in ("allow", "flag", "block"):
            raise InputError(f'a verdict\'s action is "{self.action}"; "allow", "flag" and "block" are allowed.')

    def __str__(self) -> str:
        return f"{self.filter} {self.version}: {self.label}, score {self.score:.2f}".strip()


PromptFilter = Callable[[str], Verdict]
ImageFilter = Callable[["np.ndarray"], Verdict]


@dataclass(frozen=True)
class Safety:
    """Which filters to ask, and what to do when one breaks.

    Attributes:
        prompt_filters, image_filters: asked in this order; the first that blocks ends it.
        fail_closed: a filter that raises blocks. Otherwise what it looked at passes, with a note that says so.
    """

    prompt_filters: tuple[PromptFilter, ...] = ()
    image_filters: tuple[ImageFilter, ...] = ()
    fail_closed: bool = False

    def check_prompts(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """Notes on what was flagged. Raises BlockedError, before any time is spent on drawing."""
        notes: list[str] = []
        for prompt in dict.fromkeys(prompts):
            for verdict in self._verdicts(self.prompt_filters, prompt):
                if verdict.action == "block":
                    raise BlockedError(f"the prompt {_short(prompt)} was blocked by {verdict}. Reword it.", verdict)
                notes.append(f"the prompt {_short(prompt)} was flagged by {verdict}")
        return tuple(notes)

    def check_images(self, result: GenerationResult) -> GenerationResult:
        """The result, with notes on what was flagged. Raises BlockedError, naming the image's prompt and seed."""
        notes = list(result.notes)
        for i, image in enumerate(result.images):
            for verdict in self._verdicts(self.image_filters, image):
                which = f"image {i} ({_short(result.request.prompts[i])}, seed {result.request.seeds[i]})"
                if verdict.action == "block":
                    raise BlockedError(f"{which} was blocked by {verdict}. Try another seed or prompt.", verdict)
                notes.append(f"{which} was flagged by {verdict}")
        return replace(result, notes=tuple(dict.fromkeys(notes)))

    def _verdicts(self, filters: Iterable[Callable[[Any], Verdict]], subject: object) -> Iterable[Verdict]:
        """Every verdict that is not "allow"."""
        for one in filters:
            try:
                verdict = one(subject)
            except Exception as error:  # a filter is foreign code: whatever it raises, it has not checked
                name = getattr(one, "__name__", type(one).__name__)
                action: Literal["flag", "block"] = "block" if self.fail_closed else "flag"
                verdict = Verdict(action, f"unchecked, the filter failed ({type(error).__name__}: {error})", 0.0, name)
            if verdict.action != "allow":
                yield verdict


def blocklist(names: Iterable[str], label: str = "name", action: Literal["flag", "block"] = "block") -> PromptFilter:
    """A prompt filter for whole words and phrases; case, accents, punctuation and spacing do not matter.

    Args:
        names: such as BRANDS and CELEBRITIES, or your own. label: what to call a find. action: "block" or "flag".
    """
    phrases = sorted({_plain(name) for name in names} - {""}, key=len, reverse=True)
    if not phrases:
        raise InputError("blocklist got no names; give at least one.")
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, phrases)) + r")(?:s|'s)?(?!\w)")

    def filter_names(prompt: str) -> Verdict:
        found = pattern.search(_plain(prompt))
        if found is None:
            return Verdict("allow", filter="blocklist", version=gigdiff.__version__)
        return Verdict(action, f'{label} "{found[0]}"', 1.0, "blocklist", gigdiff.__version__)

    return filter_names


def diffusers_checker(folder: str | Path, threshold: float = 0.0) -> ImageFilter:
    """diffusers' StableDiffusionSafetyChecker as an image filter, from a folder that has its weights.

    Args:
        folder: a pipeline's folder with safety_checker/ and feature_extractor/, or one that holds both's files.
        threshold: added to the similarity before it is judged (diffusers' `adjustment`); higher blocks more.

    Raises:
        ModelNotFoundError: the weights are not there.
    """
    root = Path(folder)
    checker_folder = root / "safety_checker" if (root / "safety_checker").is_dir() else root
    extractor_folder = root / "feature_extractor" if (root / "feature_extractor").is_dir() else root
    if not list(checker_folder.glob("*.safetensors")):
        raise ModelNotFoundError(
            f"no safety checker in {folder}: it needs safety_checker/*.safetensors and feature_extractor/, as in a "
            "Stable Diffusion 1.5 folder."
        )
    checker, extractor = _load_checker(str(checker_folder), str(extractor_folder))

    def diffusers_safety_checker(image: np.ndarray) -> Verdict:
        import torch

        pixels = extractor([image], return_tensors="pt").pixel_values
        with torch.no_grad():
            embedding = checker.visual_projection(checker.vision_model(pixels)[1])
            unit = embedding / embedding.norm(dim=-1, keepdim=True)
            concepts = checker.concept_embeds / checker.concept_embeds.norm(dim=-1, keepdim=True)
            margin = unit @ concepts.T - checker.concept_embeds_weights + threshold
        worst = float(margin.max())
        action: Literal["allow", "block"] = "block" if worst > 0 else "allow"
        return Verdict(
            action, "nsfw" if worst > 0 else "", min(1.0, max(0.0, 0.5 + worst)), "diffusers-safety-checker", "1"
        )

    return diffusers_safety_checker


@functools.lru_cache(maxsize=1)
def _load_checker(checker: str, extractor: str) -> tuple[Any, Any]:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    model = StableDiffusionSafetyChecker.from_pretrained(checker, use_safetensors=True)
    return model.eval(), CLIPImageProcessor.from_pretrained(extractor)


def _plain(text: str) -> str:
    """Lower case, without accents, punctuation as spaces."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(re.sub(r"[^\w']+|_", " ", letters.casefold()).split())


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else prompt[:57] + "...")


#: Brands whose logos and trade dress a shop must not imitate; by no means all. "polo", "puma" and the like are words
#: too, so add your own with care.
BRANDS: tuple[str, ...] = (
    "Adidas", "Armani", "Asics", "Balenciaga", "Birkenstock", "Bottega Veneta", "Burberry", "Bvlgari", "Calvin Klein",
    "Cartier", "Casio", "Céline", "Chanel", "Christian Louboutin", "Converse", "Crocs", "Diesel", "Dior",
    "Dolce & Gabbana", "Fendi", "Ferrari", "Fila", "Fossil", "Givenchy", "Gucci", "H&M", "Hermès", "Hugo Boss",
    "Jimmy Choo", "Lacoste", "Levi's", "Louis Vuitton", "Lululemon", "Michael Kors", "Moncler", "New Balance", "Nike",
    "Omega", "Patagonia", "Prada", "Ralph Lauren", "Ray-Ban", "Reebok", "Rolex", "Saint Laurent",
    "Skechers", "Swarovski", "Swatch", "The North Face", "Tiffany", "Timberland", "Titan", "Tommy Hilfiger",
    "Under Armour", "Uniqlo", "Valentino", "Vans", "Versace", "Yves Saint Laurent", "Zara",
)  # fmt: skip

#: People whose likeness a shop must not use; by no means all.
CELEBRITIES: tuple[str, ...] = (
    "Aishwarya Rai", "Amitabh Bachchan", "Angelina Jolie", "Ariana Grande", "Beyoncé", "Brad Pitt", "Cristiano Ronaldo",
    "David Beckham", "Deepika Padukone", "Donald Trump", "Drake", "Dwayne Johnson", "Elon Musk", "Emma Watson",
    "Gigi Hadid", "Jennifer Lopez", "Justin Bieber", "Kanye West", "Kate Moss", "Kate Middleton", "Katy Perry",
    "Keanu Reeves", "Kendall Jenner", "Kim Kardashian", "Kylie Jenner", "Lady Gaga", "LeBron James",
    "Leonardo DiCaprio", "Lionel Messi", "Meghan Markle", "Michael Jordan", "Oprah Winfrey", "Priyanka Chopra",
    "Rihanna", "Roger Federer",
    "Scarlett Johansson", "Selena Gomez", "Serena Williams", "Shah Rukh Khan", "Taylor Swift", "Tom Cruise",
    "Virat Kohli", "Zendaya",
)  # fmt: skip
