"""What is asked of an image generator and what it gives back; every check of a request is in this file.

A `GenerationRequest` that exists is well formed: its constructor raises on what no model could do. What one model can't
do (its sizes, its steps, no guidance) is checked by `validate(request, capabilities)`, which also fills in the model's
defaults; every generator's `generate` starts with it. Nothing here imports torch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from gigdiff.errors import CapabilityError, InputError
from gigdiff.schedulers import check_scheduler

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

__all__ = [
    "MAX_PROMPT_CHARACTERS",
    "MAX_SEED",
    "MAX_SIZE",
    "MAX_STEPS",
    "Capabilities",
    "EditStart",
    "GenerationRequest",
    "GenerationResult",
    "ImageGenerator",
    "validate",
]

# A long description is condensed by the text encoder, which reports what it left out. Beyond this it is not a
# description any more but a file given by mistake, and encoding its sentences would take longer than the picture.
MAX_PROMPT_CHARACTERS = 20_000
MAX_SEED = 2**63 - 1  # what torch.Generator.manual_seed takes on every platform
MAX_SIZE = 4096
MAX_STEPS = 1000  # the length of the training noise schedule
MAX_GUIDANCE = 100.0
MAX_TRUNCATION = 2.0


@dataclass(frozen=True)
class Capabilities:
    """What one model can do, and what it does when not told otherwise.

    Attributes:
        default_size: (height, width) drawn when the request names none: the size it was trained at.
        default_steps: denoising steps when the request names none; 1 for a GAN or VAE.
        default_guidance: guidance_scale when the request names none; 1.0 = off.
        max_steps: most steps accepted, 1 for a one-pass model.
        sizes: the only (height, width) it can draw, or None: any multiple of `size_multiple` in `size_range`.
        size_multiple: height and width must be multiples of this (at least 8).
        size_range: least and greatest height or width.
        text: follows a prompt. guidance, guidance_reuse, negative_prompt, image_to_image, inpaint, lora, truncation:
            has that control.
        default_truncation: truncation when the request names none; 1.0 = off.
        schedulers: the solvers of gigdiff.schedulers that it can draw with; () = none but its own.
    """

    default_size: tuple[int, int]
    default_steps: int = 1
    default_guidance: float = 1.0
    max_steps: int = MAX_STEPS
    sizes: tuple[tuple[int, int], ...] | None = None
    size_multiple: int = 8
    size_range: tuple[int, int] = (8, MAX_SIZE)
    text: bool = True
    guidance: bool = False
    guidance_reuse: bool = False
    negative_prompt: bool = False
    image_to_image: bool = False
    inpaint: bool = False
    lora: bool = False
    truncation: bool = False
    default_truncation: float = 1.0
    schedulers: tuple[str, ...] = ()


@dataclass(frozen=True)
class GenerationRequest:
    """Images to draw: one prompt and one seed an image, in order; None means the model's default.

    Image i depends on prompts[i], negative_prompts[i] and seeds[i] alone, never on its neighbours. To draw four
    pictures of one prompt, repeat the prompt and give four seeds.

    Attributes:
        prompts: one an image; not empty, at most 20,000 characters each.
        seeds: one an image, 0 to 2**63 - 1.
        negative_prompts: one an image ("" = none for that image), or None.
        height, width: pixels, multiples of 8 up to 4096.
        num_inference_steps: 1 to 1000.
        guidance_scale: 0 to 100; 1 = off, w means uncond + w (cond - uncond).
        guidance_reuse: 1 to 1000; most steps, after the first third of them, that share one cond - uncond; 1 = none.
        lora: paths or hub ids of LoRA files, used together; one text or several, kept as a tuple, () for none.
        lora_scale: their strengths, 1.0 = as trained; one for all or one each, kept as a tuple of as many as loras.
        truncation: 0 to 2, for GANs and VAEs: how far from the most typical picture of a prompt; 1 = as trained.
        scheduler: "ddim", "euler", "dpm++", "unipc" or "lcm", see gigdiff.schedulers; None = the model's own solver.

    Raises:
        InputError: anything else; the message says what was given, what is allowed and what mends it.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative_prompts: tuple[str, ...] | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_reuse: int = 1
    lora: str | tuple[str, ...] | None = None
    lora_scale: float | tuple[float, ...] = 1.0
    truncation: float | None = None
    scheduler: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds", "negative_prompts"):
            value = getattr(self, name)
            if value is None and name == "negative_prompts":
                continue
            if not isinstance(value, tuple | list):
                raise InputError(f"{name} is {_show(value)}; it must be a tuple with one entry an image.")
            object.__setattr__(self, name, tuple(value))
        if not self.prompts:
            raise InputError("there are no prompts; give at least one.")
        for prompt in self.prompts:
            check_prompt(prompt)
        for name in ("seeds", "negative_prompts"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.prompts):
                raise InputError(f"{len(value)} {name} for {len(self.prompts)} prompts; give one of each an image.")
        for prompt in self.negative_prompts or ():
            check_prompt(prompt, "negative_prompt", empty_allowed=True)

        object.__setattr__(self, "seeds", tuple(check_integer("seed", seed, 0, MAX_SEED) for seed in self.seeds))
        for name in ("height", "width"):
            check_size(name, getattr(self, name))
        if self.num_inference_steps is not None:
            check_integer("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        if self.guidance_scale is not None:
            check_number("guidance_scale", self.guidance_scale, 0.0, MAX_GUIDANCE, "1 turns guidance off")
            if self.guidance_scale <= 1.0 and any(text.strip() for text in self.negative_prompts or ()):
                raise InputError(
                    f"negative_prompt does nothing at guidance_scale={self.guidance_scale:g}; "
                    "set guidance_scale above 1 or drop negative_prompt."
                )
        check_integer("guidance_reuse", self.guidance_reuse, 1, MAX_STEPS)
        loras, scales = check_loras(self.lora, self.lora_scale)
        object.__setattr__(self, "lora", loras)
        object.__setattr__(self, "lora_scale", scales)
        if self.truncation is not None:
            check_number("truncation", self.truncation, 0.0, MAX_TRUNCATION, "1 is as trained")
        check_scheduler(self.scheduler)

    def __len__(self) -> int:
        """The number of images asked for."""
        return len(self.prompts)

    def adapters(self) -> list[tuple[str, float]]:
        """(LoRA file, scale) of each LoRA."""
        return list(zip(self.lora, self.lora_scale, strict=True))  # type: ignore[arg-type]  # tuples since __post_init__

    def part(self, start: int, stop: int) -> GenerationRequest:
        """Images start to stop of this request, as a request: what a generator does in one batch."""
        negatives = None if self.negative_prompts is None else self.negative_prompts[start:stop]
        return replace(self, prompts=self.prompts[start:stop], seeds=self.seeds[start:stop], negative_prompts=negatives)


@dataclass(frozen=True)
class EditStart:
    """The pictures that an edit begins with, beside its request.

    Attributes:
        images: uint8 (N, height, width, 3), one for each image of the request, of the request's size.
        strength: above 0, up to 1: the share of the denoising steps that are done. 1 keeps next to nothing.
        mask: bool (height, width), True where to draw anew, or None: everywhere.
        num_resample_steps: with a mask, how often each step is done (RePaint's resampling, arXiv 2201.09865): more
            makes what is drawn fit better to what is kept, at that many times the cost.

    Raises:
        InputError: a strength or count out of its range.
    """

    images: np.ndarray
    strength: float
    mask: np.ndarray | None = None
    num_resample_steps: int = 1

    def __post_init__(self) -> None:
        check_number("strength", self.strength, 0.0, 1.0, "1 keeps next to nothing of the picture")
        if self.strength <= 0:
            raise InputError("strength=0 would change nothing; give more than 0, up to 1.")
        check_integer("num_resample_steps", self.num_resample_steps, 1, 50)

    def first_step(self, num_inference_steps: int) -> int:
        """The step (from 0) that an edit begins with, as diffusers counts: the last `strength` of them are done."""
        return num_inference_steps - max(1, min(num_inference_steps, int(num_inference_steps * self.strength)))

    def part(self, start: int, stop: int) -> EditStart:
        """Images start to stop of it."""
        return replace(self, images=self.images[start:stop])


@dataclass(frozen=True)
class GenerationResult:
    """What came out.

    Attributes:
        images: uint8 (N, height, width, 3), in the order of request.prompts.
        request: as asked, with every None replaced by what was used.
        model: the generator's name ("mini", a path, a hub id).
        seconds: wall-clock time of `generate`, loading not included.
        notes: what the user should know, such as the part of a long prompt that was left out.
        weights: short hash of the weights files, "" where unknown.
        extra: further fields for the saved file: what drew the images if not torch, and what was done to them then.
    """

    images: np.ndarray
    request: GenerationRequest
    model: str
    seconds: float
    notes: tuple[str, ...] = ()
    weights: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)

    def pictures(self) -> list[Image.Image]:
        """The images as PIL, each with its prompt, seed, model and settings in `.info` (see `gigdiff.provenance`)."""
        from gigdiff.images import to_pil
        from gigdiff.provenance import metadata

        pictures = [to_pil(image) for image in self.images]
        for i, picture in enumerate(pictures):
            picture.info.update(metadata(self, i))
        return pictures


@runtime_checkable
class ImageGenerator(Protocol):
    """A loaded model that draws. Diffusion, GAN, VAE and any diffusers pipeline look the same from outside.

    Attributes:
        name: what `gigdiff.load` was given; goes into results and files.
        folder: where its weights lie, or None for a model that was built in memory.
        capabilities: what it can do.
    """

    name: str
    folder: Path | None
    capabilities: Capabilities

    def generate(
        self, request: GenerationRequest, *, on_step: Callable[[int, int], None] | None = None
    ) -> GenerationResult:
        """Draws the request's images, all in one batch.

        Starts with `validate(request, self.capabilities, self.name)`. `on_step(done, total)` is called after each
        denoising step. Raises GigdiffError only: InputError, CapabilityError, NumericalError.
        """
        ...


def validate(request: GenerationRequest, capabilities: Capabilities, model: str = "this model") -> GenerationRequest:
    """Checks a request against what a model can do, and fills in the model's defaults.

    Returns:
        The request with height, width, num_inference_steps, guidance_scale and, where it applies, truncation set.

    Raises:
        CapabilityError: a control the model does not have. InputError: a size or step count out of its range.
    """
    can, default = capabilities, capabilities
    height = default.default_size[0] if request.height is None else request.height
    width = default.default_size[1] if request.width is None else request.width
    if can.sizes is not None:
        if (height, width) not in can.sizes:
            allowed = ", ".join(f"{h} x {w}" for h, w in can.sizes)
            raise InputError(f"{model} can't draw {height} x {width} (height x width); it draws {allowed}.")
    else:
        low, high = can.size_range
        for name, value in (("height", height), ("width", width)):
            if value % can.size_multiple or not low <= value <= high:
                raise InputError(
                    f"{name}={value} does not suit {model}: it takes multiples of {can.size_multiple} from {low} to "
                    f"{high}; leave height and width out for {default.default_size[0]} x {default.default_size[1]}."
                )

    steps = default.default_steps if request.num_inference_steps is None else request.num_inference_steps
    if steps > 1 and can.max_steps == 1:
        raise CapabilityError(
            f"num_inference_steps={steps} was given, but {model} draws in one pass; leave it out or set it to 1."
        )
    if not 1 <= steps <= can.max_steps:
        raise InputError(
            f"num_inference_steps={steps} does not suit {model}: it takes 1 to {can.max_steps}; "
            f"leave it out for {default.default_steps}."
        )

    guidance = default.default_guidance if request.guidance_scale is None else float(request.guidance_scale)
    if guidance != 1.0 and not can.guidance:
        raise CapabilityError(
            f"guidance_scale={guidance:g} was given, but {model} has no guidance; leave it out or set it to 1."
        )
    if request.guidance_reuse > 1:
        if not can.guidance_reuse:
            raise CapabilityError(
                f"guidance_reuse={request.guidance_reuse} was given, but {model} can't; leave it out. gigdiff's own "
                "diffusion models can."
            )
        if guidance == 1.0:
            raise InputError(
                f"guidance_reuse does nothing without guidance, and {model} draws at guidance_scale=1 here; "
                "leave it out or set guidance_scale above 1."
            )
    if any(text.strip() for text in request.negative_prompts or ()):
        if not can.negative_prompt:
            raise CapabilityError(f"negative_prompt was given, but {model} has none; leave it out.")
        if guidance <= 1.0:
            raise InputError(
                f"negative_prompt does nothing without guidance, and {model} draws at guidance_scale={guidance:g} "
                "unless told otherwise; set guidance_scale above 1 or drop negative_prompt."
            )
    if request.lora and not can.lora:
        raise CapabilityError(f"lora={request.lora!r} was given, but {model} can't load LoRA files; leave it out.")
    truncation = request.truncation
    if truncation is not None and not can.truncation:
        raise CapabilityError(f"truncation={truncation:g} was given, but {model} has none; leave it out.")
    if truncation is None and can.truncation:
        truncation = can.default_truncation
    if request.scheduler is not None and request.scheduler not in can.schedulers:
        if can.max_steps == 1:
            why = "draws in one pass"
        elif can.schedulers:
            why = f"draws with {', '.join(can.schedulers)}"
        else:
            why = (
                "draws with its own solver alone (flow matching, as in SD3 and FLUX, is not what the named ones solve)"
            )
        raise CapabilityError(f'scheduler="{request.scheduler}" was given, but {model} {why}; leave it out.')
    return replace(
        request,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        truncation=truncation,
    )


def check_prompt(prompt: object, name: str = "prompt", empty_allowed: bool = False) -> str:
    """The prompt, if it is text of a sane length.

    Raises:
        InputError: not text, blank, or over 20,000 characters.
    """
    if not isinstance(prompt, str):
        raise InputError(
            f'{name} is {_show(prompt)}; it must be text such as "red wool coat" (or, for prompt, a gigdiff.Product).'
        )
    if not prompt.strip() and not empty_allowed:
        raise InputError(f'{name} is empty; describe the product, for example "red wool coat".')
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise InputError(
            f"{name} has {len(prompt):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are taken "
            "(long descriptions are condensed to what can be seen). Shorten it."
        )
    return prompt


def check_size(name: str, value: object) -> None:
    """Raises InputError unless `value` is None or a multiple of 8 from 8 to 4096; names the nearest that is."""
    if value is None:
        return
    number = check_integer(name, value, 8, MAX_SIZE)
    if number % 8:
        below = max(8, number // 8 * 8)
        raise InputError(
            f"{name}={number} is not a multiple of 8 (8 to {MAX_SIZE}); try {below} or {min(MAX_SIZE, below + 8)}."
        )


def check_loras(lora: object, scale: object) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """(LoRA files, their scales), as many of one as of the other.

    Raises:
        InputError: not text, blank, given twice, or another number of scales than of files.
    """
    loras = () if lora is None else tuple(lora) if isinstance(lora, tuple | list) else (lora,)
    for one in loras:
        if not isinstance(one, str) or not one.strip():
            raise InputError(
                f"lora is {_show(one)}; give the path or hub id of a LoRA file as text, or a list of several."
            )
    if len(set(loras)) < len(loras):
        raise InputError(f"lora={loras!r} names a file twice; name it once and raise its lora_scale.")
    given = tuple(scale) if isinstance(scale, tuple | list) else (scale,) * max(1, len(loras))
    numbers = tuple(check_number("lora_scale", one, -10.0, 10.0, "1 is as trained") for one in given)
    if isinstance(scale, tuple | list) and len(numbers) != len(loras):
        raise InputError(f"{len(numbers)} lora_scale for {len(loras)} lora; give one for all, or one each.")
    return loras, numbers[: len(loras)]


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """The value as an int (numpy integers too, bool not).

    Raises:
        InputError: not a whole number, or out of range.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"{name} is {_show(value)}; it must be a whole number from {low} to {high}.") from None
    if not low <= number <= high:
        raise InputError(f"{name}={number} is out of range; allowed are {low} to {high}.")
    return number


def check_number(name: str, value: object, low: float, high: float, hint: str) -> float:
    """The value as a finite float.

    Raises:
        InputError: not a number, NaN, infinite, or out of range.
    """
    try:
        if isinstance(value, bool | str):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise InputError(f"{name} is {_show(value)}; it must be a number from {low:g} to {high:g} ({hint}).") from None
    if not math.isfinite(number) or not low <= number <= high:
        raise InputError(f"{name}={number:g} is out of range; allowed are {low:g} to {high:g} ({hint}).")
    return number


def _show(value: object) -> str:
    """The value and its type, short enough for one line of an error message."""
    text = repr(value).replace("\n", " ")
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
