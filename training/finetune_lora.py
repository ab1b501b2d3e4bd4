"""Fine-tune a LoRA on your own product photos, for mini, SD 1.5, SDXL, SD3 or FLUX.

    accelerate launch training/finetune_lora.py                             # configs/lora_mini.yaml on sample photos
    accelerate launch training/finetune_lora.py --train_data_dir photos/    # your own
    accelerate launch training/finetune_lora.py --config configs/lora_sdxl.yaml --train_data_dir photos/

Latents and text embeddings are encoded once, into a cache that notices changed photos, captions and encoders; then the
encoders are freed and a step runs the network alone. docs/lora.md explains every flag and what a run writes.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration
from PIL import Image

from gigdiff import rng
from gigdiff.attention import set_attention
from gigdiff.consistency import clean_from, consistency_distance, knot_timesteps
from gigdiff.data import ProductDataset, load_products
from gigdiff.data.buckets import BucketOrder, bucket_sizes, spread_quantiles, summary
from gigdiff.data.encoded import EncodedBuckets, captions_of, model_fingerprint
from gigdiff.data.splits import hold_out
from gigdiff.diffusion import guided, log_sigmas, timesteps_of
from gigdiff.errors import GigdiffError, InputError, MissingDependencyError
from gigdiff.fit.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore_training,
    save_checkpoint,
)
from gigdiff.fit.config import as_yaml, parse_config
from gigdiff.fit.ema import Ema
from gigdiff.fit.families import Family, denoiser_of, family_of, noised, to_latents
from gigdiff.fit.run import JsonLines, StopSignal, check_finite, prefetched, start_cpu_processes
from gigdiff.fit.schedule import learning_rate
from gigdiff.generators.diffusion import DiffusionGenerator
from gigdiff.generators.loading import load, resolve
from gigdiff.generators.request import GenerationRequest
from gigdiff.images import contact_sheet, save_image
from gigdiff.lora import (
    KOHYA_NAME,
    WEIGHTS_NAME,
    LoraSettings,
    adapter_configs,
    add_adapter,
    as_kohya,
    base_hash,
    lora_header,
    lora_tensors,
    read_lora,
    save_lora,
)
from gigdiff.precision import autocast_dtype, embedded_dtype, training_precision
from gigdiff.provenance import metadata, weights_hash

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "examples" / "catalogue"
DEFAULT_CONFIG = ROOT / "configs" / "lora_mini.yaml"
ADAPTER = "finetuned"
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
VALIDATIONS_AT_LEAST = 32  # noise levels that a held-out loss covers, however few photos are held out


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Keys of configs/lora_*.yaml. Names are those of diffusers' example scripts where they have one.

    Args:
        pretrained_model_name_or_path: an embedded model, a folder or a hub id; SD 1.5, SDXL, SD3, FLUX layouts.
        train_data_dir: folder of photos (imagefolder or Parquet); or use dataset_name. Neither: the sample photos.
        dataset_name: hub id of a dataset.
        image_column: column of the photos.
        caption_column: column of captions (or of lists of captions); known names are found without it.
        train_split: split to train on.
        validation_split: split of the held-out loss; by default a part of the training products is held out.
        validation_fraction: how large a part.
        max_train_samples: use only the first so many photos.
        max_validation_samples: hold out at most so many.
        max_bad_images: unreadable photos to skip and list; more are an error.
        output_dir: run folder: pytorch_lora_weights.safetensors, checkpoints, log.jsonl, previews/, best/.
        cache_dir: where latents and text embeddings are kept.
        resolution: side of a square with as many pixels as photos are brought to; None = the model's own size.
        aspect_ratio_buckets: photos of other shapes are trained in their own shape; false = all at one size.
        bucket_multiple: bucket heights and widths are multiples of this.
        max_aspect_ratio: longest over shortest side of buckets.
        image_fit: "pad" keeps the photo whole in a white frame, "crop" fills the bucket and cuts off what sticks out.
        random_flip: mirror half of the samples (it mirrors prints and logos).
        captions_per_image: captions composed from attributes for photos that have none of their own.
        instance_prompt: one caption for all photos, such as "a photo of sks shoe".
        caption_dropout: share of samples trained on the empty prompt, for guidance.
        max_sequence_length: T5's tokens (SD3, FLUX).
        with_prior_preservation: also train on pictures of the class, drawn by the base model, so that it is not lost.
        class_prompt: the prompt of those pictures.
        class_data_dir: where they are kept; by default in output_dir.
        num_class_images: how many are drawn, if there are fewer.
        prior_loss_weight: weight of their loss.
        rank: of the LoRA.
        lora_alpha: scale is lora_alpha / rank; None = rank.
        lora_dropout: dropout on the LoRA's input.
        target_modules: layers that get a LoRA; None = attention projections.
        use_dora: weight-decomposed LoRA.
        use_rslora: scale is lora_alpha / sqrt(rank).
        train_text_encoder: a LoRA for the CLIP text encoders too (text is then not cached).
        train_batch_size: photos a step and process.
        gradient_accumulation_steps: steps whose gradients are averaged before each update.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        max_train_steps: updates in all.
        learning_rate: peak of the schedule.
        text_encoder_lr: of the text encoders' LoRA; None = learning_rate.
        lr_warmup_steps: linear warm-up.
        lr_decay_fraction: last part of the run that decays by a cosine.
        use_8bit_adam: bitsandbytes' AdamW8bit.
        adam_beta1: AdamW.
        adam_beta2: AdamW.
        adam_weight_decay: AdamW.
        adam_epsilon: AdamW.
        max_grad_norm: gradient clipping.
        objective: "denoising", or "consistency": the LoRA makes the model draw in 1 to 8 steps without guidance
            (LCM-LoRA, Luo et al. 2023, arXiv 2311.05556), by what the guided base model draws; not for SD3 and FLUX.
        distill_guidance_scale: of "consistency": the base model's guidance, which the LoRA learns.
        distill_knots: of "consistency": noise levels that the LoRA learns; 50 is LCMScheduler's own number.
        snr_gamma: min-SNR weighting of the loss (5 is usual); not for SD3 and FLUX.
        noise_offset: noise added to whole channels, for very dark or bright pictures (0.1 is usual).
        train_guidance: what a guidance-distilled FLUX is fed in training.
        use_ema: average the LoRA's weights; the average is validated, previewed and saved.
        ema_decay: of that average.
        mixed_precision: "no", "bf16", "fp16" (GPU), or "auto": bf16 where the device computes in it, else no. The
            LoRA's own weights are float32 in each.
        attention: backend, see gigdiff.attention.
        seed: of everything.
        checkpointing_steps: steps between checkpoints.
        checkpoints_total_limit: how many are kept.
        resume_from_checkpoint: "latest" or a checkpoint's name.
        validation_steps: steps between held-out losses.
        early_stopping_patience: stop when so many held-out losses in a row were no better than the best.
        preview_steps: steps between previews; None = validation_steps.
        validation_prompt: a prompt to preview.
        validation_prompts: several; by default captions of held-out photos.
        num_validation_images: previews of each prompt, with seeds 0, 1, ...
        num_inference_steps: of previews; None = the model's default.
        guidance_scale: of previews; None = the model's default.
        report_to: tracker of Accelerate, "tensorboard" or "none".
        output_kohya_format: also write kohya_lora_weights.safetensors.
    """

    pretrained_model_name_or_path: str = "mini"
    train_data_dir: str | None = None
    dataset_name: str | None = None
    image_column: str = "image"
    caption_column: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    validation_fraction: float = 0.1
    max_train_samples: int | None = None
    max_validation_samples: int = 64
    max_bad_images: int = 10
    output_dir: str = "runs/lora"
    cache_dir: str = "cache"
    resolution: int | None = None
    aspect_ratio_buckets: bool = True
    bucket_multiple: int = 64
    max_aspect_ratio: float = 2.0
    image_fit: Literal["pad", "crop"] = "pad"
    random_flip: bool = False
    captions_per_image: int = 4
    instance_prompt: str | None = None
    caption_dropout: float = 0.1
    max_sequence_length: int = 256
    with_prior_preservation: bool = False
    class_prompt: str | None = None
    class_data_dir: str | None = None
    num_class_images: int = 100
    prior_loss_weight: float = 1.0
    rank: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    use_dora: bool = False
    use_rslora: bool = False
    train_text_encoder: bool = False
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    max_train_steps: int = 1000
    learning_rate: float = 1e-4
    text_encoder_lr: float | None = None
    lr_warmup_steps: int = 20
    lr_decay_fraction: float = 0.3
    use_8bit_adam: bool = False
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.01
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    objective: Literal["denoising", "consistency"] = "denoising"
    distill_guidance_scale: float = 7.5
    distill_knots: int = 50
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    train_guidance: float = 1.0
    use_ema: bool = True
    ema_decay: float = 0.99
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "no"
    attention: str = "auto"
    seed: int = 0
    checkpointing_steps: int = 200
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    validation_steps: int = 100
    early_stopping_patience: int | None = None
    preview_steps: int | None = None
    validation_prompt: str | None = None
    validation_prompts: tuple[str, ...] = ()
    num_validation_images: int = 2
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    report_to: str = "none"
    output_kohya_format: bool = False


def check(config: LoraConfig) -> None:
    """What can be told before anything is loaded. Raises InputError naming the flag."""
    for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps",
                 "validation_steps", "captions_per_image", "rank", "num_validation_images"):  # fmt: skip
        if getattr(config, name) < 1:
            raise InputError(f"--{name} {getattr(config, name)}: 1 or more is allowed")
    for name in ("caption_dropout", "lora_dropout", "validation_fraction", "ema_decay"):
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"--{name} {getattr(config, name):g}: from 0 to below 1 is allowed")
    if config.train_data_dir and config.dataset_name:
        raise InputError("--train_data_dir and --dataset_name were both given; give one.")
    if config.with_prior_preservation and not config.class_prompt:
        raise InputError('--with_prior_preservation needs --class_prompt, such as "a photo of a shoe".')
    training_precision(config.mixed_precision)
    if config.objective == "consistency":
        knot_timesteps(config.distill_knots)
        if config.train_text_encoder or config.snr_gamma is not None or config.with_prior_preservation:
            raise InputError(
                "--objective consistency goes without --train_text_encoder, --snr_gamma and --with_prior_preservation: "
                "what it learns comes from the base model alone."
            )


# ---- data ------------------------------------------------------------------------------------------------------------


def read_photos(config: LoraConfig) -> tuple[ProductDataset, ProductDataset | None]:
    """(training photos, held-out photos or None where there is but one product)."""
    source = config.train_data_dir or config.dataset_name or str(SAMPLE)

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
    """Fill the folder up to --num_class_images pictures of --class_prompt, drawn by the base model, one by one."""
    assert config.class_prompt
    folder = class_folder(config)
    for seed in range(len(sorted(folder.glob("*.png"))), config.num_class_images):
        result = generator.generate(GenerationRequest((config.class_prompt,), (seed,)))
        save_image(folder / f"class-{seed:06d}.png", result.images[0], metadata(result, 0), overwrite=True)


def read_class_photos(config: LoraConfig) -> ProductDataset:
    import datasets

    files = [str(path) for path in sorted(class_folder(config).glob("*.png"))][: config.num_class_images]
    return load_products(datasets.Dataset.from_dict({"image": files, "caption": [config.class_prompt] * len(files)}))


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


def held_out_batches(data: EncodedBuckets, family: Family, config: LoraConfig) -> list[Batch]:
    """Every held-out photo with its first caption, fixed noise, and noise levels at the law's quantiles."""
    repeats = -(-VALIDATIONS_AT_LEAST // len(data))
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


# ---- previews --------------------------------------------------------------------------------------------------------


def preview(generator: Any, config: LoraConfig, prompts: Sequence[str], out: Path, step: int) -> None:
    """Draw each prompt with seeds 0, 1, ..., one by one, by the same code as gigdiff.generate; then the grid."""
    for k, prompt in enumerate(prompts):
        for seed in range(config.num_validation_images):
            request = GenerationRequest(
                (prompt,),
                (seed,),
                height=config.resolution,
                width=config.resolution,
                **drawing_settings(config),
            )
            result = generator.generate(request)
            about = metadata(result, 0) | {"lora": f"{config.output_dir} at step {step}"}
            save_image(preview_path(out, step, k, seed), result.images[0], about, overwrite=True)
    grid(out, prompts, config.num_validation_images)


def drawing_settings(config: LoraConfig) -> dict[str, Any]:
    """How previews are drawn: a LoRA for few steps in 4 of them, without guidance, by the solver made for it."""
    settings: dict[str, Any] = {
        "num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale
    }  # fmt: skip
    if config.objective == "consistency":
        few = {"num_inference_steps": 4, "guidance_scale": 1.0}
        settings = {name: few[name] if value is None else value for name, value in settings.items()}
        settings["scheduler"] = "lcm"
    return settings


def preview_path(out: Path, step: int, prompt: int, seed: int) -> Path:
    return out / "previews" / f"step-{step:06d}" / f"prompt-{prompt}-seed-{seed}.png"


def grid(out: Path, prompts: Sequence[str], seeds: int) -> None:
    """previews/grid.png: a row for each prompt and seed, a column for each previewed step; the first is before."""
    steps = sorted(int(path.name.removeprefix("step-")) for path in (out / "previews").glob("step-*"))
    pictures, labels = [], []
    for k, prompt in enumerate(prompts):
        for seed in range(seeds):
            for step in steps:
                path = preview_path(out, step, k, seed)
                if path.is_file():
                    pictures.append(Image.open(path).convert("RGB"))
                    labels.append(f"{'before' if step == 0 else step}: {prompt}")
    scale = max(1, 128 // pictures[0].height)
    about = {"prompt": "\n".join(prompts), "seed": ", ".join(map(str, range(seeds)))}
    sheet = contact_sheet(pictures, len(steps), labels=labels, scale=scale)
    save_image(out / "previews" / "grid.png", sheet, about, overwrite=True)


# ---- the run ---------------------------------------------------------------------------------------------------------


def build_optimizer(config: LoraConfig, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the parameters themselves (a list: an iterator would be empty when clipping comes to use it)."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise MissingDependencyError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from error
        return bitsandbytes.optim.AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"), **options)


def average_over_processes(
    accelerator: Accelerator, parameters: Sequence[torch.nn.Parameter], values: Sequence[float]
) -> list[float]:
    """Average all gradients, and a few numbers with them, in one reduction; the averaged numbers.

    LoRA's gradients are small, so one reduction a step costs less than DDP's bookkeeping, and validation or previews on
    one process can't leave another waiting in a forward pass.
    """
    if accelerator.num_processes == 1:
        return list(values)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    flat = torch.cat([flat, torch.tensor(values, device=flat.device, dtype=flat.dtype)])
    flat = accelerator.reduce(flat, reduction="mean")
    offset = 0
    for p in parameters:
        if p.grad is not None:
            p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
            offset += p.numel()
    return flat[offset:].tolist()


def finetune(config: LoraConfig, on_validation: Callable[[int, float], None] | None = None) -> dict[str, Any]:
    """One run, from photos to a LoRA file.

    Args:
        config: the resolved config.
        on_validation: called with (step, held-out loss); may raise to stop the run (search_lora.py prunes so).

    Returns:
        lora: the file; steps; validation_loss_before, validation_loss, best_validation_loss, best_step (None without
        held-out photos);
        images_per_second of the steps alone; line: the Python that uses the file.
    """
    check(config)
    config = dataclasses.replace(config, mixed_precision=training_precision(config.mixed_precision))
    out = Path(config.output_dir)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(str(out)),
        # the main process may draw class images or previews for long while the others wait
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=6))],
    )
    device, main = accelerator.device, accelerator.is_main_process
    processes, process = accelerator.num_processes, accelerator.process_index
    global_batch = config.train_batch_size * processes * config.gradient_accumulation_steps
    say: Callable[[str], None] = (lambda text: print(text, file=sys.stderr, flush=True)) if main else lambda text: None

    with accelerator.main_process_first():
        train_photos, held_photos = read_photos(config)
    if held_photos is None and config.early_stopping_patience:
        raise InputError("--early_stopping_patience needs held-out photos, and all photos are of one product.")
    with accelerator.main_process_first():
        folder, _ = resolve(config.pretrained_model_name_or_path)
        # gigdiff's own models keep float32 weights and choose their precision themselves
        dtype = None if (folder / "gigdiff.json").is_file() else autocast_dtype(config.mixed_precision)
        generator: Any = load(config.pretrained_model_name_or_path, device=device, dtype=dtype)
    family = family_of(generator)
    if config.objective == "consistency" and family.flow:
        raise InputError(f"--objective consistency is for noise schedules; {family.name} is trained by rectified flow.")
    if not isinstance(generator, DiffusionGenerator) and getattr(generator.pipeline, "safety_checker", None):
        generator.pipeline.safety_checker = None  # not needed for one's own photos, and large
    model = denoiser_of(generator, family)
    base_dtype = next(model.parameters()).dtype
    scheduler = generator.scheduler if isinstance(generator, DiffusionGenerator) else generator.pipeline.scheduler

    # Photos and captions, encoded once.
    share = (process, processes)

    def captions(photos: ProductDataset) -> list[list[str]]:
        if config.instance_prompt:
            return [[config.instance_prompt]] * len(photos)
        return [captions_of(record, config.captions_per_image, config.seed) for record in photos.records()]

    encoded = {"train": encode_photos(generator, family, config, train_photos, captions(train_photos), share)}
    if held_photos is not None:
        encoded["held-out"] = encode_photos(generator, family, config, held_photos, captions(held_photos), share)
    if config.with_prior_preservation:
        if main:
            draw_class_photos(generator, config)
        accelerator.wait_for_everyone()
        pictures = read_class_photos(config)
        prompts_of_class = [[config.class_prompt or ""]] * len(pictures)
        encoded["class"] = encode_photos(generator, family, config, pictures, prompts_of_class, share)
    accelerator.wait_for_everyone()
    for data in encoded.values():
        data.refresh()
    train = encoded["train"]
    sources = [("train", train, BucketOrder(train.bucket_of, config.seed), 1.0)]
    if config.with_prior_preservation:
        prior = encoded["class"]
        sources.append(("class", prior, BucketOrder(prior.bucket_of, config.seed), config.prior_loss_weight))
    held_out = held_out_batches(encoded["held-out"], family, config) if "held-out" in encoded else []
    default = dict.fromkeys(one[0] for one in (encoded.get("held-out") or train).captions)
    prompts = tuple(filter(None, (config.validation_prompt, *config.validation_prompts))) or tuple(default)[:4]

    # The adapter, in float32; everything else is frozen.
    settings = LoraSettings(
        config.rank,
        config.rank if config.lora_alpha is None else config.lora_alpha,
        config.lora_dropout,
        config.target_modules or default_targets(family),
        config.use_dora,
        config.use_rslora,
    )
    parts = {family.part: model}
    if config.train_text_encoder:
        parts |= text_parts(generator, family)
    else:
        generator.remember(prompts)
        generator.free_encoders()
    trained = {}
    for part, network in parts.items():
        network.requires_grad_(False)
        mine = settings if part == family.part else dataclasses.replace(settings, target_modules=TEXT_TARGETS)
        seed = rng.derive_seed(config.seed, f"initialisation {part}")
        trained[part] = add_adapter(network, mine, ADAPTER, seed)
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing() if part == family.part else network.gradient_checkpointing_enable()
    adapter = torch.nn.ParameterDict(
        {f"{part}/{name}".replace(".", "/"): p for part, named in trained.items() for name, p in named.items()}
    )
    parameters = list(adapter.values())
    groups = [
        {
            "params": list(named.values()),
            "peak": config.learning_rate if part == family.part else config.text_encoder_lr,
        }
        for part, named in trained.items()
    ]
    optimizer = build_optimizer(config, groups, device)
    ema = Ema(adapter, config.ema_decay if config.use_ema else 0.0)

    # Continue, or start.
    data_fingerprint = train.fingerprint()
    best: dict[str, Any] = {"loss": None, "step": 0, "worse": 0, "before": None}
    first_step = 0
    checkpoint = find_checkpoint(config.resume_from_checkpoint, out)
    if checkpoint is not None:
        state, _ = load_checkpoint(checkpoint)
        check_resumable(state, checkpoint, global_batch, processes, config)
        if state.get("data") != data_fingerprint:
            say(f"photos or captions have changed since {checkpoint.name}: goes on, not as if it had never stopped")
        first_step, _ = restore_training(checkpoint, "adapter", adapter, ema, optimizer)
        best = state["best"]
    optimizer = accelerator.prepare(optimizer)
    configs = adapter_configs(parts, ADAPTER)
    about = {
        "base_model": config.pretrained_model_name_or_path,
        "base_hash": base_hash(generator.folder, family.part),
        "family": family.name,
        "config": dataclasses.asdict(config),
    }

    @contextmanager
    def averaged() -> Iterator[None]:
        """Inside, the models carry the averaged weights and are as in inference."""
        for network in parts.values():
            network.eval()
        if family.name == "mini":
            set_attention(model, "auto", dtype=embedded_dtype(model.device))  # as the generator that will draw with it
        try:
            with torch.no_grad(), ema.applied_to(adapter):
                yield
        finally:
            train_mode()

    def train_mode() -> None:
        if family.name == "mini":
            set_attention(model, config.attention, training=True, dtype=autocast_dtype(config.mixed_precision))
        for network in parts.values():
            network.train()

    def lora_file(step: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        with averaged():
            return lora_tensors(parts, ADAPTER), lora_header(configs, {**about, "step": step})

    def save(step: int) -> None:
        tensors, header = lora_file(step)
        stem = WEIGHTS_NAME.removesuffix(".safetensors")
        save_checkpoint(
            out,
            step,
            {
                "adapter": dict(adapter.state_dict()),
                "ema": ema.shadow,
                "optimizer": optimizer_tensors(optimizer.optimizer),
                stem: tensors,
            },
            {
                "ema_updates": ema.updates,
                "best": best,
                "data": data_fingerprint,
                "global_batch": global_batch,
                "processes": processes,
                "config": dataclasses.asdict(config),
            },
            limit=config.checkpoints_total_limit,
            headers={stem: header},
        )

    def predict(z: torch.Tensor, timesteps: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the network says, float32."""
        cast = {k: v if k in ("time_ids", "guidance") else v.to(base_dtype) for k, v in condition.items()}
        z = z.to(base_dtype)
        if family.name == "mini":
            z = z.contiguous(memory_format=torch.channels_last)
        return family.predict(model, z, timesteps, cast).float()

    if config.objective == "consistency":
        timesteps = knot_timesteps(config.distill_knots, len(scheduler.alphas_cumprod)).to(device)
        # clamped: schedules of zero terminal SNR have an infinite sigma at the end
        table = log_sigmas(scheduler.alphas_cumprod).clamp(max=15.0).to(device)

    def distillation_loss(batch: Batch) -> torch.Tensor:
        """The consistency distance of network and LoRA to what the guided network alone draws."""
        kind, n = scheduler.config.prediction_type, len(batch.latents)
        both = {name: torch.cat([batch.unguided[name], value]) for name, value in batch.condition.items()}

        def student(z: torch.Tensor, knot: torch.Tensor) -> torch.Tensor:
            return clean_from(predict(z, timesteps[knot], batch.condition), z, table[timesteps[knot]], kind)

        def teacher(z: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
            model.disable_adapters()
            t = timesteps_of(log_sigma, table)
            unconditional, conditional = predict(z.repeat(2, 1, 1, 1), t.repeat(2), both).split(n)
            model.enable_adapters()
            return clean_from(guided(unconditional, conditional, config.distill_guidance_scale), z, log_sigma, kind)

        knot = 1 + (batch.u * config.distill_knots).long().clamp(max=config.distill_knots - 1)
        with accelerator.autocast():
            return consistency_distance(
                student, student, teacher, batch.latents, batch.noise, knot, table[timesteps]
            ).mean()

    def loss_of(batch: Batch, snr_gamma: float | None) -> torch.Tensor:
        """Mean squared error of what the network says, (N,) weighted where asked for."""
        if config.objective == "consistency":
            return distillation_loss(batch)
        n = noised(family, scheduler, batch.latents, batch.noise, batch.u, snr_gamma)
        condition = dict(batch.condition)
        with accelerator.autocast():
            if config.train_text_encoder:
                condition |= embed(generator, config, batch.texts)
            predicted = predict(n.z, n.timesteps, condition)
        error = (predicted - n.target).square().flatten(1).mean(1)
        return (error * n.weight).mean()

    def held_out_loss() -> float:
        """Over all held-out batches, shared among the processes."""
        with averaged():
            mine = held_out[process::processes]
            total = sum(loss_of(batch.to(device), None).item() * len(batch.latents) for batch in mine)
        sums = torch.tensor([total, float(sum(len(batch.latents) for batch in mine))], dtype=torch.float64)
        total, count = accelerator.reduce(sums.to(device), reduction="sum").tolist() if processes > 1 else sums.tolist()
        return total / count

    Loaded = list[list[tuple[Batch, float]]]

    def load_step(step: int) -> Loaded:
        """This process's micro-batches of global batch `step`, each a batch from every source with its weight."""
        micro_batches: Loaded = [[] for _ in range(config.gradient_accumulation_steps)]
        for purpose, data, order, weight in sources:
            samples = order.batch(step, global_batch)
            for k in range(config.gradient_accumulation_steps):
                start = (k * processes + process) * config.train_batch_size
                chosen = samples[start : start + config.train_batch_size]
                first = step * global_batch + start
                micro_batches[k].append((make_batch(data, chosen, first, family, config, f"lora {purpose}"), weight))
        return micro_batches

    if main:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
    count = sum(p.numel() for p in parameters)
    say(
        f"{config.pretrained_model_name_or_path} ({family.name}), LoRA of {count / 1e6:.2f} M parameters; "
        f"{len(train)} photos: {summary(sources[0][2])}; {len(encoded.get('held-out') or [])} held out"
    )
    log = JsonLines(out / "log.jsonl", first_step) if main else None
    if config.report_to != "none":
        accelerator.init_trackers("logs")
    stop = StopSignal().install()
    preview_steps = config.preview_steps or config.validation_steps
    validation_loss: float | None = None
    if main and first_step == 0:
        with averaged():
            preview(generator, config, prompts, out, 0)
    if first_step == 0 and held_out:
        best["before"] = held_out_loss()
        say(f"before: held-out loss {best['before']:.5f}")

    train_mode()
    seconds, images_done, done, stopped = 0.0, 0, first_step, False
    for step, micro_batches in prefetched(range(first_step, config.max_train_steps), load_step):
        started = time.perf_counter()
        rate = learning_rate(
            step,
            peak=1.0,
            warmup_steps=config.lr_warmup_steps,
            total_steps=config.max_train_steps,
            decay_fraction=config.lr_decay_fraction,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * (config.learning_rate if group["peak"] is None else group["peak"])
        mean_loss = 0.0
        for k, batches in enumerate(micro_batches):
            # dropout is the only randomness that torch's own generator decides
            place = (step * len(micro_batches) + k) * processes + process
            torch.manual_seed(rng.derive_seed(config.seed, "dropout", place))
            for batch, weight in batches:
                loss = weight * loss_of(batch.to(device), config.snr_gamma) / len(micro_batches)
                accelerator.backward(loss)
                mean_loss += loss.item()
        mean_loss, stop_asked = average_over_processes(accelerator, parameters, (mean_loss, float(stop.requested)))
        check_finite(mean_loss, step, config.learning_rate * rate)
        norm = float(accelerator.clip_grad_norm_(parameters, config.max_grad_norm))
        if config.mixed_precision != "fp16":  # there, an infinite gradient only means that the loss scale is lowered
            check_finite(norm, step, config.learning_rate * rate)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(adapter)
        seconds += time.perf_counter() - started
        images_done += global_batch

        done = step + 1
        values: dict[str, float] = {"loss": mean_loss, "learning_rate": config.learning_rate * rate, "grad_norm": norm}
        values["images_per_second"] = images_done / seconds
        last = done == config.max_train_steps
        if held_out and (done % config.validation_steps == 0 or last):
            validation_loss = values["validation_loss"] = held_out_loss()
            if best["loss"] is None or validation_loss < best["loss"]:
                best = {**best, "loss": validation_loss, "step": done, "worse": 0}
                if main:
                    save_lora(out / "best" / WEIGHTS_NAME, *lora_file(done))
            else:
                best = {**best, "worse": best["worse"] + 1}
            say(f"step {done}: " + ", ".join(f"{k} {v:.5g}" for k, v in values.items()))
        stopped = stop_asked > 0 or best["worse"] >= (config.early_stopping_patience or sys.maxsize)
        if main and (done % preview_steps == 0 or last):
            with averaged():
                preview(generator, config, prompts, out, done)
        if log is not None:
            log.write(done, values)
        accelerator.log(values, step=done)
        if main and (done % config.checkpointing_steps == 0 or last or stopped):
            save(done)
        if on_validation is not None and "validation_loss" in values:
            on_validation(done, values["validation_loss"])
        if stopped:
            break

    result = {
        "lora": str(out / WEIGHTS_NAME),
        "steps": done,
        "validation_loss_before": best["before"],
        "validation_loss": validation_loss,
        "best_validation_loss": best["loss"],
        "best_step": best["step"],
        "images_per_second": images_done / seconds if seconds else None,
        "line": f"gigdiff.generate({prompts[0]!r}, model={config.pretrained_model_name_or_path!r}, lora={str(out)!r}"
        + "".join(f", {k}={v!r}" for k, v in drawing_settings(config).items() if config.objective == "consistency")
        + ")",
    }
    if stop.requested:
        say(f"stopped at step {done}; continue with --resume_from_checkpoint latest")
    if main:
        path = save_lora(out / WEIGHTS_NAME, *lora_file(done))
        if config.output_kohya_format:
            save_lora(out / KOHYA_NAME, *as_kohya(read_lora(path)))
    accelerator.end_training()
    return result


def default_targets(family: Family) -> tuple[str, ...]:
    """Attention's projections; in a transformer those of the text stream too."""
    projections = ("to_q", "to_k", "to_v", "to_out.0")
    return (
        projections if family.part == "unet" else (*projections, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    )


def text_parts(generator: Any, family: Family) -> dict[str, Any]:
    """The CLIP text encoders. Raises InputError where the family has none that can be trained."""
    if not family.text_parts:
        raise InputError(f"--train_text_encoder: {family.name} has no CLIP text encoder; drop the flag.")
    return {part: getattr(generator.pipeline, part) for part in family.text_parts}


def check_resumable(
    state: dict[str, Any], checkpoint: Path, global_batch: int, processes: int, config: LoraConfig
) -> None:
    """A run goes on exactly with any number of processes, as long as a step sees the same photos.

    Raises:
        InputError: it would not, with the reason and what mends it.
    """
    if state.get("global_batch") != global_batch:
        raise InputError(
            f"{checkpoint} was made with {state.get('processes')} processes and {state.get('global_batch')} photos a "
            f"step; this run has {processes} and {global_batch}, so it would see other photos. Choose "
            "--train_batch_size and --gradient_accumulation_steps so that batch x processes x accumulation is "
            f"{state.get('global_batch')}, or start with another --output_dir."
        )
    if state["config"].get("seed") != config.seed:
        raise InputError(f"{checkpoint} was made with --seed {state['config'].get('seed')}, not {config.seed}.")


def main(argv: list[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    start_cpu_processes(__file__, arguments)
    named = {argument.split("=")[0] for argument in arguments}
    if not named & {"--config", "--pretrained_model_name_or_path", "--help", "-h"}:
        arguments = ["--config", str(DEFAULT_CONFIG), *arguments]
    config = parse_config(LoraConfig, __doc__.splitlines()[0], arguments)  # type: ignore[union-attr]
    result = finetune(config)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(result))
        print(f"use it:  import gigdiff; {result['line']}.show()")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main()
    except GigdiffError as error:
        sys.exit(f"error: {error}")
