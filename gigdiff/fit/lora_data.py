"""What a LoRA learns from: photos and captions, encoded once, and the batches of each step."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gigdiff import rng
from gigdiff.data import ProductDataset, load_products
from gigdiff.data.buckets import bucket_sizes, spread_quantiles
from gigdiff.data.encoded import EncodedBuckets, model_fingerprint
from gigdiff.data.splits import hold_out
from gigdiff.fit.families import Family, to_latents
from gigdiff.fit.lora_config import LoraConfig
from gigdiff.generators.diffusion import DiffusionGenerator
from gigdiff.generators.request import GenerationRequest
from gigdiff.images import save_image
from gigdiff.provenance import metadata, weights_hash

__all__ = [
    "Batch",
    "draw_class_photos",
    "embed",
    "encode_photos",
    "held_out_batches",
    "make_batch",
    "read_class_photos",
    "read_photos",
]

VALIDATIONS_AT_LEAST = 32  # noise levels that a held-out loss covers, however few photos are held out


def read_photos(config: LoraConfig, sample: str) -> tuple[ProductDataset, ProductDataset | None]:
    """(training photos, held-out photos or None where there is but one product); of `sample` where none are named."""
    source = config.train_data_dir or config.dataset_name or sample

    def photos(split: str, limit: int | None) -> ProductDataset:
        data = load_products(
            source,
            split=split,
            image_column=config.image_column,
            caption_column=config.caption_column,
            limit=limit,
            on_bad_image="skip",
            max_bad_images=config.max_bad_images,
        )
        for bad in data.bad_images:
            print(f"skipped photo {bad.id} (row {bad.row}): {bad.reason}", file=sys.stderr)
        return data

    train = photos(config.train_split, config.max_train_samples)
    if config.validation_split:
        return train, photos(config.validation_split, config.max_validation_samples)
    return hold_out(train, config.validation_fraction, config.max_validation_samples, config.seed)


def encode_photos(
    generator: Any, family: Family, config: LoraConfig, dataset: ProductDataset, captions: list[list[str]],
    share: tuple[int, int],
) -> EncodedBuckets:  # fmt: skip
    """Latents and text embeddings of `dataset`, from the cache where they are in it."""
    vae = generator.vae if isinstance(generator, DiffusionGenerator) else generator.pipeline.vae
    device = generator.device
    height, width = generator.capabilities.default_size
    if config.resolution:
        height = width = config.resolution
    buckets = [(height, width)]
    if config.aspect_ratio_buckets:
        buckets = bucket_sizes(height, width, multiple=config.bucket_multiple, max_ratio=config.max_aspect_ratio)
    stored = next(vae.parameters()).dtype
    if stored != torch.float32:
        vae.float()  # SDXL's autoencoder overflows in half precision

    def encode_pixels(pixels: torch.Tensor) -> torch.Tensor:
        return to_latents(vae, pixels.to(device))

    text_fingerprint = f"{text_fingerprint_of(generator)} {config.max_sequence_length}"
    data = EncodedBuckets(
        dataset,
        captions,
        buckets=buckets,
        image_fit=config.image_fit,
        encode_pixels=encode_pixels,
        encode_text=None if config.train_text_encoder else lambda text: embed(generator, config, [text]),
        image_fingerprint=model_fingerprint(vae),
        text_fingerprint=text_fingerprint,
        dtype="float32" if config.mixed_precision == "no" else "float16",
        cache_dir=config.cache_dir,
        flip=config.random_flip,
        share=share,
    )
    if stored != torch.float32:
        vae.to(stored)
    return data


def text_fingerprint_of(generator: Any) -> str:
    """Changes with the weights of any text encoder."""
    if isinstance(generator, DiffusionGenerator):
        return generator.text_encoder.fingerprint
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    parts = [part for part in names if getattr(generator.pipeline, part, None) is not None]
    folder = generator.folder
    if folder is not None and all((folder / part).is_dir() for part in parts):
        return " ".join(
            weights_hash(folder / part) for part in parts
        )  # T5-XXL's file is hashed faster than its tensors
    return " ".join(model_fingerprint(getattr(generator.pipeline, part)) for part in parts)


def embed(generator: Any, config: LoraConfig, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Text as the network is fed it. T5's length is the flag's where the family has T5."""
    if isinstance(generator, DiffusionGenerator):
        return generator.embed(texts)
    return generator.embed(texts, max_length=config.max_sequence_length)


def class_folder(config: LoraConfig) -> Path:
    return Path(config.class_data_dir or Path(config.output_dir) / "class_images")


def draw_class_photos(generator: Any, config: LoraConfig) -> None:
    """Fill the folder up to --num_class_images pictures, drawn by the base model, one by one: the k-th is of the k-th
    class prompt, in turn, with seed k."""
    folder, prompts = class_folder(config), config.prompts_of_class()
    for seed in range(len(sorted(folder.glob("*.png"))), config.num_class_images):
        result = generator.generate(GenerationRequest((prompts[seed % len(prompts)],), (seed,)))
        save_image(folder / f"class-{seed:06d}.png", result.images[0], metadata(result, 0), overwrite=True)


def read_class_photos(config: LoraConfig) -> ProductDataset:
    """The folder's pictures, each with the prompt that its file says it was drawn for; files of one's own, which say
    nothing, with the class prompts in turn."""
    import datasets

    files = sorted(class_folder(config).glob("*.png"))[: config.num_class_images]
    prompts, captions = config.prompts_of_class(), []
    for k, file in enumerate(files):
        with Image.open(file) as picture:
            captions.append(picture.info.get("prompt") or prompts[k % len(prompts)])
    rows = {"image": [str(file) for file in files], "caption": captions}
    return load_products(datasets.Dataset.from_dict(rows))


@dataclasses.dataclass(frozen=True)
class Batch:
    """Latents and noise (N, C, h, w), u (N,) in (0, 1) for noise levels, condition: named tensors (N, ...), texts.

    unguided: the same as condition for the empty prompt, where a guided model is distilled.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    u: torch.Tensor
    condition: dict[str, torch.Tensor]
    texts: list[str]
    unguided: dict[str, torch.Tensor]

    def to(self, device: torch.device) -> Batch:
        latents, noise, u = (tensor.to(device) for tensor in (self.latents, self.noise, self.u))
        told = ({name: t.to(device) for name, t in one.items()} for one in (self.condition, self.unguided))
        condition, unguided = told
        return Batch(latents, noise, u, condition, self.texts, unguided)


def make_batch(
    data: EncodedBuckets, samples: Sequence[tuple[int, int]], first: int, family: Family, config: LoraConfig,
    purpose: str,
) -> Batch:  # fmt: skip
    """`samples` (photo, how often seen) at positions `first`, `first` + 1, ... of the endless stream of samples.

    Noise, noise level, dropout, mirroring: all depend on (seed, purpose, position) alone.
    """
    noises, levels, texts, mirrored = [], [], [], []
    shape = data.latents([samples[0][0]]).shape[1:]
    for position, (photo, seen) in enumerate(samples, first):
        generator = rng.generator(config.seed, purpose, position)
        level, dropped, flipped = torch.rand(3, generator=generator).tolist()
        noise = torch.randn(shape, generator=generator)
        offset = torch.randn((shape[0], 1, 1), generator=generator)
        noises.append(noise + config.noise_offset * offset)
        levels.append(level)
        captions = data.captions[photo]
        texts.append("" if dropped < config.caption_dropout else captions[seen % len(captions)])
        mirrored.append(config.random_flip and flipped < 0.5)
    photos = [photo for photo, _ in samples]
    return Batch(
        data.latents(photos, mirrored),
        torch.stack(noises),
        torch.tensor(levels),
        condition_of(data, photos, texts, family, config),
        texts,
        unguided_of(data, photos, family, config),
    )


def condition_of(
    data: EncodedBuckets, photos: Sequence[int], texts: Sequence[str], family: Family, config: LoraConfig
) -> dict[str, torch.Tensor]:
    """All that the network is told: text embeddings from the cache, SDXL's sizes, FLUX's guidance."""
    condition = data.conditions(texts)
    if family.size_ids:
        condition["time_ids"] = data.size_ids(photos)
    if family.name == "flux":
        condition["guidance"] = torch.full((len(photos),), config.train_guidance)
    return condition


def unguided_of(
    data: EncodedBuckets, photos: Sequence[int], family: Family, config: LoraConfig
) -> dict[str, torch.Tensor]:
    """What the guided base model is told beside the prompt, for distilling it: the empty one. Else nothing."""
    return condition_of(data, photos, [""] * len(photos), family, config) if config.objective == "consistency" else {}


def held_out_batches(
    data: EncodedBuckets, family: Family, config: LoraConfig, levels: int = VALIDATIONS_AT_LEAST
) -> list[Batch]:
    """Every held-out photo with its first caption, fixed noise, and noise levels at the law's quantiles.

    Where there are fewer photos than `levels`, they come several times.
    """
    repeats = -(-levels // len(data))
    u = spread_quantiles(repeats * len(data), config.seed, "held-out levels")
    batches = []
    by_bucket: dict[tuple[int, int], list[int]] = {}
    for position in range(repeats * len(data)):
        by_bucket.setdefault(data.bucket_of[position % len(data)], []).append(position)
    for positions in by_bucket.values():
        for start in range(0, len(positions), config.train_batch_size):
            chosen = positions[start : start + config.train_batch_size]
            photos = [position % len(data) for position in chosen]
            latents = data.latents(photos)
            texts = [data.captions[photo][0] for photo in photos]
            noise = rng.normal(latents.shape[1:], config.seed, "held-out noise", chosen)
            condition = condition_of(data, photos, texts, family, config)
            unguided = unguided_of(data, photos, family, config)
            batches.append(Batch(latents, noise, u[chosen], condition, texts, unguided))
    return batches
