"""`generate` and `load`: thin functions over a loaded ImageGenerator.

str | Product | list --> GenerationRequest (checked) --> generator, one batch after the other --> PIL images
"""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from gigdiff.errors import InputError
from gigdiff.generators.request import (
    GenerationRequest,
    GenerationResult,
    ImageGenerator,
    check_integer,
    check_prompt,
    validate,
)
from gigdiff.presets import chosen_by
from gigdiff.products import Product

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from gigdiff.safety import Safety
    from gigdiff.upscaling import Upscaler

__all__ = [
    "build_request",
    "choose_upscaler",
    "draw_seed",
    "find_generator",
    "generate",
    "iter_results",
    "join_results",
    "load",
]

MAX_IMAGES = 10_000  # a prompt; a larger job is several calls
# Pixels drawn at once unless told otherwise: 32 images of 80 x 64, two of 512 x 512, one of 1024 x 1024.
PIXELS_PER_BATCH = 2 * 512 * 512

Prompt = str | Product
Lora = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None


def load(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str = "auto",
    *,
    backend: str = "torch",
    offload: str | None = None,
    vae_tiling: bool = False,
    vae_slicing: bool = False,
) -> ImageGenerator:
    """Loads a model afresh; see `gigdiff.generators.loading.load` for arguments and errors.

    `generate(model="mini")` keeps what it loaded, so this is for holding several, or for other devices and dtypes.
    """
    from gigdiff.generators.loading import load

    return load(
        name_or_path,
        device=device,
        dtype=dtype,
        attention=attention,
        backend=backend,
        offload=offload,
        vae_tiling=vae_tiling,
        vae_slicing=vae_slicing,
    )


@overload
def generate(
    prompt: Prompt | Sequence[Prompt],
    *,
    model: str | os.PathLike[str] | ImageGenerator = ...,
    preset: str | None = ...,
    negative_prompt: str | Sequence[str] | None = ...,
    num_images_per_prompt: int = ...,
    num_inference_steps: int | None = ...,
    guidance_scale: float | None = ...,
    guidance_reuse: int = ...,
    height: int | None = ...,
    width: int | None = ...,
    seed: int | None = ...,
    lora: Lora = ...,
    lora_scale: float | Sequence[float] = ...,
    truncation: float | None = ...,
    scheduler: str | None = ...,
    batch_size: int | None = ...,
    device: str | torch.device | None = ...,
    progress: bool = ...,
    upscale: bool | str | None = ...,
    fidelity: float | None = ...,
    safety: Safety | None = ...,
    return_result: Literal[True],
) -> GenerationResult: ...


@overload
def generate(
    prompt: Prompt | Sequence[Prompt],
    *,
    model: str | os.PathLike[str] | ImageGenerator = ...,
    preset: str | None = ...,
    negative_prompt: str | Sequence[str] | None = ...,
    num_images_per_prompt: int = ...,
    num_inference_steps: int | None = ...,
    guidance_scale: float | None = ...,
    guidance_reuse: int = ...,
    height: int | None = ...,
    width: int | None = ...,
    seed: int | None = ...,
    lora: Lora = ...,
    lora_scale: float | Sequence[float] = ...,
    truncation: float | None = ...,
    scheduler: str | None = ...,
    batch_size: int | None = ...,
    device: str | torch.device | None = ...,
    progress: bool = ...,
    upscale: bool | str | None = ...,
    fidelity: float | None = ...,
    safety: Safety | None = ...,
    return_result: Literal[False] = ...,
) -> Image.Image | list[Image.Image]: ...


def generate(
    prompt: Prompt | Sequence[Prompt],
    *,
    model: str | os.PathLike[str] | ImageGenerator = "mini",
    preset: str | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    num_images_per_prompt: int = 1,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_reuse: int = 1,
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    lora: Lora = None,
    lora_scale: float | Sequence[float] = 1.0,
    truncation: float | None = None,
    scheduler: str | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
    upscale: bool | str | None = None,
    fidelity: float | None = None,
    safety: Safety | None = None,
    return_result: bool = False,
) -> Image.Image | list[Image.Image] | GenerationResult:
    """Draws product photos.

    Image j of a prompt is drawn from seed + j, whatever else is drawn in the same call: the same prompt and seed give
    the same picture alone, in a list and in any batch. (So a prompt given twice gives the same pictures twice.)

    Args:
        prompt: a description, a Product, or a list of either. At most 20,000 characters each; what a long one says
            beyond what the model reads is listed in the result's `notes` and in each image's `.info["notes"]`.
        model: an embedded model's name, a folder, a hub id, or what `gigdiff.load` returned. A model loaded by name is
            kept for the next call.
        preset: "best", "balanced" or "fast" in place of model and steps, see gigdiff.presets.
        negative_prompt: what to steer away from, one for all prompts or one each; needs guidance_scale above 1.
        num_images_per_prompt: 1 to 10,000.
        num_inference_steps: 1 to 1000; None = the model's default, as for the next three.
        guidance_scale: 0 to 100; 1 turns guidance off.
        guidance_reuse: most steps, after the first third of them, that share what guidance changes; 1 = none. 8 saves a
            quarter of the work and hardly changes the picture (docs/performance.md). gigdiff's own models only.
        height, width: pixels, multiples of 8.
        seed: 0 to 2**63 - 1; None draws one, reported in `.info["seed"]` and in the result.
        lora: a LoRA file, folder or hub id, or a list of several to use together; None takes out what was in.
        lora_scale: strength, 1 = as trained; one for all, or one each.
        truncation: 0 to 2, for GANs and VAEs; below 1 = nearer to the most typical picture of the prompt.
        scheduler: "ddim", "euler", "dpm++", "unipc" or "lcm"; None = the model's own solver. Not for one-pass models,
            nor for flow matching (SD3, FLUX).
        batch_size: images drawn at once; None = as many as make about half a million pixels, at most 32.
        device: "cpu", "cuda", "mps"; None = the best there is. Not for a model that is loaded already.
        progress: a progress bar on stderr.
        upscale: True enlarges four times, False gives the model's own size; a name or file chooses the upscaler. None
            enlarges what gigdiff's own models draw, if the embedded upscaler is there.
        fidelity: of upscaling, see `gigdiff.upscale`.
        safety: prompt and image filters, see gigdiff.safety.
        return_result: return the GenerationResult (arrays, seeds, settings used) instead of PIL images.

    Returns:
        One RGB PIL image for a single prompt (not a list) with num_images_per_prompt=1; else a flat list, all images of
        the first prompt first. Each has its prompt, seed, model and settings in `.info`.

    Raises:
        InputError, CapabilityError: an argument; checked before a model is loaded as far as possible.
        ModelNotFoundError, ModelMismatchError: the model. NumericalError: NaN came out; nothing is returned.
        BlockedError: a safety filter said no.
    """
    model, num_inference_steps = chosen_by(preset, model, num_inference_steps)
    request = build_request(
        prompt,
        negative_prompt=negative_prompt,
        num_images_per_prompt=num_images_per_prompt,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        guidance_reuse=guidance_reuse,
        height=height,
        width=width,
        seed=seed,
        lora=lora,
        lora_scale=lora_scale,
        truncation=truncation,
        scheduler=scheduler,
    )
    parts = list(
        iter_results(
            request,
            model=model,
            batch_size=batch_size,
            device=device,
            progress=progress,
            upscale=upscale,
            fidelity=fidelity,
            safety=safety,
        )
    )
    result = join_results(parts)
    if return_result:
        return result
    pictures = result.pictures()
    return pictures[0] if isinstance(prompt, str | Product) and len(pictures) == 1 else pictures


def build_request(
    prompt: Prompt | Sequence[Prompt],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    num_images_per_prompt: int = 1,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_reuse: int = 1,
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    lora: Lora = None,
    lora_scale: float | Sequence[float] = 1.0,
    truncation: float | None = None,
    scheduler: str | None = None,
) -> GenerationRequest:
    """`generate`'s arguments as a request of one prompt and one seed an image, prompt-major; a seed is drawn if None.

    Raises:
        InputError: as `generate`, for all that can be told without the model.
    """
    if isinstance(prompt, str | Product):
        prompts = [prompt]
    elif isinstance(prompt, list | tuple):
        prompts = list(prompt)
    else:
        prompts = [check_prompt(prompt)]  # raises, naming the type
    if not prompts:
        raise InputError('prompt is an empty list; give at least one description, such as "red wool coat".')
    texts = [_text(one) for one in prompts]
    n = check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)

    negatives: list[str] | None = None
    if isinstance(negative_prompt, list | tuple):
        if len(negative_prompt) != len(texts):
            raise InputError(
                f"{len(negative_prompt)} negative prompts for {len(texts)} prompts; give one for all, or one each."
            )
        negatives = list(negative_prompt)
    elif negative_prompt is not None:
        negatives = [check_prompt(negative_prompt, "negative_prompt", empty_allowed=True)] * len(texts)

    first = draw_seed() if seed is None else check_integer("seed", seed, 0, 2**63 - n)
    return GenerationRequest(
        prompts=tuple(text for text in texts for _ in range(n)),
        seeds=tuple(first + j for _ in texts for j in range(n)),
        negative_prompts=None if negatives is None else tuple(text for text in negatives for _ in range(n)),
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        guidance_reuse=guidance_reuse,
        lora=_as_text(lora),
        lora_scale=tuple(lora_scale) if isinstance(lora_scale, list) else lora_scale,  # type: ignore[arg-type]
        truncation=truncation,
        scheduler=scheduler,
    )


def _as_text(lora: Lora) -> Any:
    """Paths as text, a list as a tuple; what is neither is left for GenerationRequest to refuse."""
    if isinstance(lora, list | tuple):
        return tuple(os.fspath(one) if isinstance(one, os.PathLike) else one for one in lora)
    return os.fspath(lora) if isinstance(lora, os.PathLike) else lora


def iter_results(
    request: GenerationRequest,
    *,
    model: str | os.PathLike[str] | ImageGenerator = "mini",
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
    upscale: bool | str | None = None,
    fidelity: float | None = None,
    safety: Safety | None = None,
) -> Iterator[GenerationResult]:
    """Draws a request batch by batch and gives each batch as soon as it is there, so that a caller can save it.

    Arguments and errors as `generate`.
    """
    if batch_size is not None:
        batch_size = check_integer("batch_size", batch_size, 1, MAX_IMAGES)
    notes = safety.check_prompts(request.prompts) if safety is not None else ()
    generator = find_generator(model, device)
    request = validate(request, generator.capabilities, generator.name)
    if batch_size is None:
        assert request.height and request.width  # set by validate
        batch_size = max(1, min(32, PIXELS_PER_BATCH // (request.height * request.width)))
    weights = _weights(generator.folder)
    upscaler = choose_upscaler(upscale, fidelity, generator, device)
    extra = _lora_weights(request)
    with _Bar(len(request), progress) as report:
        for start in range(0, len(request), batch_size):
            part = request.part(start, start + batch_size)
            result = generator.generate(part, on_step=functools.partial(report, start, len(part)))
            report(start, len(part), 1, 1)
            result = replace(
                result,
                weights=result.weights or weights,
                notes=tuple(dict.fromkeys((*result.notes, *notes))),
                extra={**result.extra, **extra},
            )
            if upscaler is not None:
                result = upscaler.enlarge(result)
            if safety is not None:
                result = safety.check_images(result)
            yield result


def find_generator(
    model: str | os.PathLike[str] | ImageGenerator, device: str | torch.device | None = None
) -> ImageGenerator:
    """The generator itself, or the one of that name, loaded once.

    Raises:
        InputError: neither, or a device for a model that is loaded already.
    """
    if isinstance(model, str | os.PathLike):
        return _keep(os.fspath(model), None if device is None else str(device))
    if not isinstance(model, ImageGenerator):
        raise InputError(
            f"model is a {type(model).__name__}; give a name, a folder, a hub id, or what gigdiff.load returned."
        )
    if device is not None:
        raise InputError(f"device={str(device)!r} came with a loaded model; choose it in gigdiff.load(device=).")
    return model


def choose_upscaler(
    upscale: bool | str | None,
    fidelity: float | None,
    generator: ImageGenerator,
    device: str | torch.device | None = None,
) -> Upscaler | None:
    """What enlarges this generator's images: what was asked for; by default the embedded upscaler, for our own models.

    Raises:
        InputError: a fidelity without upscaling, or out of range. ModelNotFoundError: no such upscaler.
    """
    from gigdiff.pretrained import UPSCALERS, folder_of

    embedded = next(iter(UPSCALERS))
    if upscale is None:
        own = generator.folder is not None and (generator.folder / "gigdiff.json").is_file()
        upscale = own and (folder_of(embedded) / "gigdiff.json").is_file()
    if upscale is False:
        if fidelity is not None:
            raise InputError(f"fidelity={fidelity:g} is about upscaling, which is off; leave it out or turn that on.")
        return None
    from gigdiff.upscaling import keep_upscaler

    name = embedded if upscale is True else os.fspath(upscale)
    return keep_upscaler(name, 0.5 if fidelity is None else float(fidelity), None if device is None else str(device))


def _lora_weights(request: GenerationRequest) -> dict[str, str]:
    """The hashes of the request's LoRA files, one a line, as a field."""
    from gigdiff.provenance import lora_hash

    loras = (request.lora,) if isinstance(request.lora, str) else tuple(request.lora or ())
    return {"lora_weights": "\n".join(lora_hash(name) for name in loras)} if loras else {}


def draw_seed() -> int:
    """A random seed, short enough to type again: 0 to 2**32 - 1."""
    return secrets.randbelow(2**32)


def _text(prompt: Prompt) -> str:
    return check_prompt(prompt.to_prompt() if isinstance(prompt, Product) else prompt)


@functools.lru_cache(maxsize=2)
def _keep(name: str, device: str | None) -> ImageGenerator:
    """Loaded once a process. Two, because people compare two models; more would fill a GPU."""
    return load(name, device=device)


@functools.lru_cache(maxsize=8)
def _weights(folder: Path | None) -> str:
    from gigdiff.provenance import weights_hash

    return weights_hash(folder)


def join_results(parts: list[GenerationResult]) -> GenerationResult:
    """Batches of one request as one result."""
    import numpy as np

    requests = [part.request for part in parts]
    negatives = [request.negative_prompts for request in requests]
    return replace(
        parts[0],
        images=np.concatenate([part.images for part in parts]),
        request=replace(
            requests[0],
            prompts=tuple(text for request in requests for text in request.prompts),
            seeds=tuple(seed for request in requests for seed in request.seeds),
            negative_prompts=None if negatives[0] is None else tuple(t for texts in negatives for t in texts or ()),
        ),
        seconds=sum(part.seconds for part in parts),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


class _Bar:
    """A progress bar on stderr that counts images, moving with each denoising step; silent where not asked for."""

    def __init__(self, total: int, visible: bool) -> None:
        from tqdm import tqdm

        form = "{desc}{percentage:3.0f}%|{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}]"
        self.bar = tqdm(total=total, disable=not visible, bar_format=form, leave=False)

    def __enter__(self) -> Callable[[int, int, int, int], None]:
        return self.report

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def report(self, start: int, count: int, done: int, total: int) -> None:
        if not self.bar.disable:
            self.bar.n = start + count * min(1.0, done / max(1, total))
            self.bar.refresh()
