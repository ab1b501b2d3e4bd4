"""Train a conditional VAE on product photos and their captions; with --adversarial_weight it is a VAE-GAN.

    accelerate launch training/train_vae.py --config configs/vae_mini.yaml

In the latent space of an autoencoder of train_autoencoder.py (`--space latent`), or on pixels (`--space pixel`). It is
sampled from its prior, which is learned and depends on the text; docs/gan.md says how it is built.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch

from gigdiff import rng
from gigdiff.data.encoded import EncodedProducts
from gigdiff.errors import GigdiffError, ModelMismatchError
from gigdiff.fit.adversary import Adversary, AdversarySettings, Chances, view_of
from gigdiff.fit.checkpoint import (
    find_checkpoint,
    optimizer_tensors,
    restore_training,
    save_checkpoint,
)
from gigdiff.fit.collapse import Variety, measure_variety
from gigdiff.fit.config import as_yaml, parse_config
from gigdiff.fit.ema import Ema
from gigdiff.fit.order import positions_of_step, samples_at
from gigdiff.fit.preview import save_preview
from gigdiff.fit.run import JsonLines, StopSignal, check_finite, prefetched, start_accelerator
from gigdiff.fit.schedule import learning_rate, set_learning_rate
from gigdiff.fit.splits import encoded_splits
from gigdiff.generators.one_pass import OnePassGenerator, save_one_pass
from gigdiff.generators.request import check_size
from gigdiff.generators.shared_vae import latent_space_of
from gigdiff.models.autoencoder import load_autoencoder
from gigdiff.models.conditioning import blur_condition
from gigdiff.models.vae import ConditionalVae, VaeOutput, calibrated_nll
from gigdiff.precision import training_precision
from gigdiff.text import TextEncoder, load_text_encoder

PIXEL_FOLD = 4  # pixels are worked on as patches of 4 x 4


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Keys of configs/vae_*.yaml.

    Args:
        train_data_dir: folder of photos (imagefolder or Parquet); or use dataset_name.
        dataset_name: hub id of a dataset.
        train_split: split to train on.
        validation_split: split of the held-out bound.
        space: "latent" models an autoencoder's latents, "pixel" the pixels.
        vae_name_or_path: folder of the autoencoder (latent space).
        text_encoder: "minilm", or a text encoder's folder or hub id.
        output_dir: run folder: checkpoints, log.jsonl, previews/, model/.
        cache_dir: where latents and text embeddings are kept.
        height: image height in pixels, a multiple of 8.
        width: image width in pixels, a multiple of 8.
        condition_on: "captions", or "attributes": the attribute words alone, as text.
        captions_per_image: wordings of each product; each epoch uses the next.
        captions_seed: seed of the wordings; by default `seed`. The same one in several runs lets them share a cache.
        widths: channels of the levels, coarsest first.
        blocks: rungs of the ladder on each level.
        latent_dim: variables a position and rung.
        beta: weight of the KL divergence at the end of its warm-up; 1 is the likelihood's bound.
        beta_warmup_steps: steps over which it grows from 0.
        text_noise: noise on the text condition, relative to its size.
        adversarial_weight: weight of a discriminator's judgement of samples from the prior (VAE-GAN); 0 is off.
        discriminator_widths: channels of the discriminator's levels, coarsest first.
        discriminator_blocks: residual blocks of each.
        discriminator_learning_rate: Adam's rate for the discriminator.
        penalty_weight: its gradient penalty (R1 + R2).
        penalty_interval: take it every so many steps, times as strong.
        penalty_noise: standard deviation of the finite difference's noise.
        mismatch_weight: share of its fakes that are real images with another product's text.
        contrastive_weight: weight of finding each image's text among the batch's.
        train_batch_size: images a step and process.
        dataloader_num_workers: processes that prepare batches; 0 is a thread. A GPU is faster than one of either.
        max_train_steps: optimizer steps in all.
        learning_rate: peak of the schedule.
        lr_warmup_steps: linear warm-up.
        lr_decay_fraction: last part of the run that decays by a cosine.
        adam_beta2: second moment decay, of AdamW and of the discriminator's Adam.
        adam_weight_decay: AdamW's weight decay.
        max_grad_norm: gradient clipping.
        ema_decay: decay of the averaged weights, which are what is validated and saved.
        mixed_precision: "no", "bf16", or "auto": bf16 where the device computes in it, else no.
        seed: of data order, wordings, initialisation and noise.
        checkpointing_steps: save every so many steps.
        checkpoints_total_limit: how many checkpoints to keep.
        resume_from_checkpoint: "latest" or a checkpoint folder.
        validation_steps: held-out bound and variety every so many steps.
        num_validation_images: how many validation photos for that.
        preview_steps: draw the validation prompts every so many steps.
        validation_prompts: what is drawn.
        truncation: scale of the prior's standard deviations: the saved model's default, and that of previews.
        report_to: tracker of Accelerate, "tensorboard" or "none".
        max_train_samples: use only the first so many photos.
    """

    train_data_dir: str | None = None
    dataset_name: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    space: Literal["latent", "pixel"] = "latent"
    vae_name_or_path: str = "gigdiff/pretrained/mini/vae"
    text_encoder: str = "minilm"
    output_dir: str = "runs/vae"
    cache_dir: str = "cache"
    height: int = 80
    width: int = 64
    condition_on: Literal["captions", "attributes"] = "captions"
    captions_per_image: int = 5
    captions_seed: int | None = None
    widths: tuple[int, ...] = (256, 160)
    blocks: tuple[int, ...] = (2, 2)
    latent_dim: int = 8
    beta: float = 1.0
    beta_warmup_steps: int = 1000
    text_noise: float = 0.0
    adversarial_weight: float = 0.0
    discriminator_widths: tuple[int, ...] = (256, 192)
    discriminator_blocks: tuple[int, ...] = (2, 1)
    discriminator_learning_rate: float = 3e-4
    penalty_weight: float = 1.0
    penalty_interval: int = 4
    penalty_noise: float = 0.2
    mismatch_weight: float = 0.5
    contrastive_weight: float = 0.25
    train_batch_size: int = 64
    dataloader_num_workers: int = 0
    max_train_steps: int = 5000
    learning_rate: float = 5e-4
    lr_warmup_steps: int = 100
    lr_decay_fraction: float = 0.4
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.998
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    seed: int = 0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    validation_steps: int = 500
    num_validation_images: int = 512
    preview_steps: int = 1000
    validation_prompts: tuple[str, ...] = (
        "red wool coat",
        "yellow summer dress",
        "brown leather belt",
        "black leather handbag",
        "blue jeans",
        "white sneakers",
        "crimson pullover",
        "spectacles",
        "silver watch for men",
        "green t-shirt",
        "gold earrings",
        "pink lipstick",
    )
    truncation: float = 1.0
    report_to: str = "tensorboard"
    max_train_samples: int | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """images (N, C, H, W), condition (N, 1 + L, D), noise of the posterior and of the prior (N, noise_size), and the
    discriminator's chances; the last two None without a discriminator."""

    images: torch.Tensor
    condition: torch.Tensor
    noise: torch.Tensor
    prior_noise: torch.Tensor | None
    chances: Chances | None

    def to(self, device: torch.device) -> Batch:
        parts = (getattr(self, f.name) for f in dataclasses.fields(self))
        return Batch(*(None if part is None else part.to(device) for part in parts))


def images_of(data: EncodedProducts, indices: list[int], space: str) -> torch.Tensor:
    """float32 (N, C, H, W): latents, or pixels in [-1, 1]."""
    return data.latents(indices) if space == "latent" else data.pixels(indices)


def make_batch(
    data: EncodedProducts,
    positions: range,
    step: int,
    config: VaeConfig,
    length: int,
    noise_size: int,
    adversary: Adversary | None,
) -> Batch:
    """The samples at `positions` of the endless stream; each depends on (seed, position) alone."""
    indices = samples_at(positions, len(data), config.seed)
    images = images_of(data, indices, config.space)
    condition = data.conditions([(i, p // len(data)) for p, i in zip(positions, indices, strict=True)], length)
    prior_noise = chances = None
    if adversary is not None:
        prior_noise = rng.normal((noise_size,), config.seed, "prior noise", positions)
        chances = adversary.chances(positions, step, images.shape[1:], condition)
    if config.text_noise > 0:
        blur = rng.normal(condition.shape[1:], config.seed, "text noise", positions)
        condition = blur_condition(condition, blur, config.text_noise)
    noise = rng.normal((noise_size,), config.seed, "posterior noise", positions)
    return Batch(images, condition, noise, prior_noise, chances)


def bound(output: VaeOutput, images: torch.Tensor, beta: float) -> torch.Tensor:
    """beta-weighted negative evidence lower bound, in nats a dimension, less a constant; mean over images."""
    return (calibrated_nll(images, output.mean) + beta * output.kl.mean()) / images[0].numel()


@torch.no_grad()
def validate(model: Any, held_out: EncodedProducts, config: VaeConfig, length: int) -> tuple[dict[str, float], Variety]:
    """The bound and its KL part on held-out photos with fixed noise, and the variety of samples from the prior."""
    device = next(model.parameters()).device
    indices = list(range(len(held_out)))
    images = images_of(held_out, indices, config.space)
    condition = held_out.conditions([(i, 0) for i in indices], length)
    noise = rng.normal((model.noise_size,), config.seed, "held-out noise", indices)
    prompts = min(32, len(indices))
    repeated_noise = rng.normal((model.noise_size,), config.seed, "repeated noise", range(8 * prompts))

    def in_parts(*inputs: torch.Tensor, rebuild: bool = False) -> VaeOutput:
        parts = []
        for part in zip(*(x.to(device).split(64) for x in inputs), strict=True):
            parts.append(model(part[0], part[1], images=part[2] if rebuild else None))
        return VaeOutput(torch.cat([p.mean.cpu() for p in parts]), torch.cat([p.kl.cpu() for p in parts]))

    rebuilt = in_parts(noise, condition, images, rebuild=True)
    values = {
        "validation_loss": bound(rebuilt, images, 1.0).item(),
        "validation_kl": rebuilt.kl.mean().item() / images[0].numel(),
        "validation_l2": (rebuilt.mean - images).square().mean().item(),
    }
    samples = in_parts(noise.roll(1, 0), condition).mean
    repeated = in_parts(repeated_noise, condition[:prompts].repeat_interleave(8, 0)).mean
    return values, measure_variety(samples, repeated.unflatten(0, (prompts, 8)), images)


def main(argv: list[str] | None = None) -> None:
    config = parse_config(VaeConfig, __doc__.splitlines()[0], argv)  # type: ignore[union-attr]
    check_size("--height", config.height)
    check_size("--width", config.width)
    settings = AdversarySettings.of(config)
    adversarial = config.adversarial_weight > 0
    out = Path(config.output_dir)
    config = dataclasses.replace(config, mixed_precision=training_precision(config.mixed_precision))
    accelerator = start_accelerator(config.mixed_precision, config.report_to, out)
    device, main_process = accelerator.device, accelerator.is_main_process
    processes, process = accelerator.num_processes, accelerator.process_index

    autoencoder = None
    if config.space == "latent":
        autoencoder = load_autoencoder(config.vae_name_or_path).to(device, memory_format=torch.channels_last)
    encoder: TextEncoder = load_text_encoder(config.text_encoder, str(device))
    train, held_out = encoded_splits(
        config,
        autoencoder,
        encoder,
        accelerator,
        size=(config.height, config.width),
        captions_seed=config.captions_seed,
        attributes_only=config.condition_on == "attributes",
    )
    length = encoder.max_length

    if autoencoder is None:
        shape = {"channels": 3, "height": config.height, "width": config.width, "fold": PIXEL_FOLD}
    else:
        channels = autoencoder.config["latent_channels"]
        shape = {"channels": channels, "height": config.height // 8, "width": config.width // 8, "fold": 1}
    torch.manual_seed(rng.derive_seed(config.seed, "initialisation"))
    model: Any = ConditionalVae(
        **shape, widths=config.widths, blocks=config.blocks, latent_dim=config.latent_dim, text_dim=encoder.dim
    )
    adversary = None
    if adversarial:
        adversary = Adversary(
            settings,
            view_of(autoencoder, held_out, None, device),
            size=(shape["height"], shape["width"]),
            fold=shape["fold"],
            text_dim=encoder.dim,
            accelerator=accelerator,
        )
    # Channels last is what the CPU's and the tensor cores' convolutions want.
    model = model.to(device, memory_format=torch.channels_last)
    ema = Ema(model, config.ema_decay)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        fused=True,
    )
    checkpoint = find_checkpoint(config.resume_from_checkpoint, out)
    first_step = 0
    if checkpoint is not None:
        first_step, tensors = restore_training(checkpoint, "model", model, ema, optimizer)
        if adversary is not None:
            if "discriminator" not in tensors:
                raise ModelMismatchError(f"{checkpoint} has no discriminator: it was made with --adversarial_weight 0")
            adversary.load(tensors)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if adversary is not None:
        adversary.prepare()

    stop = StopSignal().install()
    if main_process:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
        count = sum(p.numel() for p in model.parameters())
        kind = "VAE-GAN" if adversarial else "VAE"
        print(f"{kind}, {count / 1e6:.1f} M parameters, {len(train):,} photos", file=sys.stderr, flush=True)
    log = JsonLines(out / "log.jsonl", first_step) if main_process else None
    accelerator.init_trackers("logs")

    def averaged() -> torch.nn.Module:
        with ema.applied_to(model):
            return copy.deepcopy(model)

    def save(step: int) -> None:
        tensors = {
            "model": dict(model.state_dict()),
            "ema": ema.shadow,
            "optimizer": optimizer_tensors(optimizer.optimizer),
        }
        if adversary is not None:
            tensors |= adversary.tensors()
        state = {"ema_updates": ema.updates, "config": dataclasses.asdict(config)}
        save_checkpoint(out, step, tensors, state, limit=config.checkpoints_total_limit)

    def load(step: int) -> Batch:
        positions = positions_of_step(step, config.train_batch_size, process, processes)
        return make_batch(train, positions, step, config, length, model.noise_size, adversary)

    started, images_done = time.monotonic(), 0
    steps = range(first_step, config.max_train_steps)
    for step, batch in prefetched(steps, load, workers=config.dataloader_num_workers):
        batch = batch.to(device)
        rate = learning_rate(
            step,
            peak=config.learning_rate,
            warmup_steps=config.lr_warmup_steps,
            total_steps=config.max_train_steps,
            decay_fraction=config.lr_decay_fraction,
        )
        set_learning_rate(optimizer, rate)
        beta = config.beta * min(1.0, (step + 1) / max(1, config.beta_warmup_steps))
        output: VaeOutput = wrapped(batch.noise, batch.condition, images=batch.images)
        loss = bound(output, batch.images, beta)
        check_finite(loss.item(), step, rate)
        values: dict[str, float] = {
            "loss": loss.item(),
            "kl": output.kl.mean().item() / batch.images[0].numel(),
            "l2": (output.mean.detach() - batch.images).square().mean().item(),
            "beta": beta,
            "learning_rate": rate,
        }
        if adversary is not None:
            assert batch.prior_noise is not None and batch.chances is not None
            samples = wrapped(batch.prior_noise, batch.condition).mean
            looks = adversary.look(batch.images, samples, batch.chances)
            critic_rate = config.discriminator_learning_rate * rate / config.learning_rate
            values |= adversary.learn(looks, batch.condition, batch.chances, step, critic_rate)
            fooled, more = adversary.judge(looks, batch.condition, batch.chances)
            check_finite(fooled.item(), step, rate)
            values |= more
            loss = loss + config.adversarial_weight * fooled
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        images_done += len(batch.images) * processes

        done = step + 1
        values["grad_norm"] = float(norm)
        values["images_per_second"] = images_done / (time.monotonic() - started)
        last = done == config.max_train_steps
        if main_process and (done % config.validation_steps == 0 or last):
            with ema.applied_to(model), accelerator.autocast():
                measured, variety = validate(model, held_out, config, length)
            values |= measured | dataclasses.asdict(variety)
            print(
                f"step {done}: {json.dumps({k: round(v, 5) for k, v in values.items()})}", file=sys.stderr, flush=True
            )
        if main_process and (done % config.preview_steps == 0 or last):
            drawing = OnePassGenerator(
                averaged(),
                autoencoder,
                encoder,
                name="preview",
                height=config.height,
                width=config.width,
                truncation=config.truncation,
                device=device,
            )
            save_preview(drawing, config.validation_prompts, range(4), out / "previews" / f"step-{done:06d}.png")
        if log is not None:
            log.write(done, values)
        accelerator.log(values, step=done)
        if main_process and (done % config.checkpointing_steps == 0 or last or stop.requested):
            save(done)
        if stop.requested:
            print(f"stopped at step {done}; continue with --resume_from_checkpoint latest", file=sys.stderr)
            break
    else:
        if main_process:
            card = {
                "family": "vae",
                "text_encoder": config.text_encoder,
                "space": config.space,
                "latent_space": None if autoencoder is None else latent_space_of(autoencoder),
                "height": config.height,
                "width": config.width,
                "truncation": config.truncation,
                "parameters": sum(p.numel() for m in (model, autoencoder) if m is not None for p in m.parameters()),
                "trained_steps": config.max_train_steps,
                "trained_images": config.max_train_steps * config.train_batch_size * processes,
            }
            save_one_pass(out / "model", averaged(), autoencoder, card)
            print(json.dumps({"model": str(out / "model"), "steps": config.max_train_steps}))
    accelerator.end_training()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main()
    except GigdiffError as error:
        sys.exit(f"error: {error}")
