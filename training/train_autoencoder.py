"""Train the autoencoder of the embedded models on product photos.

    accelerate launch training/train_autoencoder.py --config configs/autoencoder_mini.yaml

Phase 1 learns encoder and decoder for fidelity. Phase 2 (`--decoder_only true --init_from runs/.../autoencoder`, see
configs/autoencoder_mini_sharp.yaml) freezes the encoder, so that diffusion models trained on its latents stay valid,
and sharpens the decoder with a perceptual term on EfficientNet-Lite2's features (the result is measured with another
network, Lite0), an adversarial one, or both. `--denoiser mini` shows it latents as a diffusion model leaves them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from gigdiff import rng
from gigdiff.data import ProductDataset, load_products
from gigdiff.diffusion import add_noise
from gigdiff.errors import GigdiffError, InputError, ModelMismatchError
from gigdiff.fit.checkpoint import (
    find_checkpoint,
    load_optimizer,
    optimizer_tensors,
    restore_training,
    save_checkpoint,
)
from gigdiff.fit.config import as_yaml, parse_config
from gigdiff.fit.ema import Ema
from gigdiff.fit.order import positions_of_step, samples_at
from gigdiff.fit.run import JsonLines, StopSignal, check_finite, prefetched, start_accelerator
from gigdiff.fit.schedule import learning_rate, set_learning_rate
from gigdiff.fit.teacher import Teacher, fellow_model, frozen_unet
from gigdiff.generators.request import check_size
from gigdiff.images import contact_sheet, fit_image, save_image, to_model, to_uint8
from gigdiff.metrics.efficientnet import load_efficientnet
from gigdiff.models.autoencoder import ProductAutoencoder, load_autoencoder
from gigdiff.models.discriminator import build_discriminator, discriminator_loss, generator_loss
from gigdiff.models.perceptual import feature_losses, perceptual_loss
from gigdiff.models.saving import save_network
from gigdiff.precision import training_precision

# Photos of 80 x 64 are small for a network that was trained at 260: the larger size is where it tells edges apart.
PERCEPTUAL_SIZES = (2, 1)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Keys of configs/autoencoder_*.yaml.

    Args:
        train_data_dir: folder of photos (imagefolder or Parquet); or use dataset_name.
        dataset_name: hub id of a dataset.
        train_split: split to train on.
        validation_split: split that measures it.
        output_dir: run folder: checkpoints, log.jsonl, previews/, autoencoder/.
        height: image height in pixels, a multiple of 8.
        width: image width in pixels, a multiple of 8.
        latent_channels: channels of a latent position.
        half_channels: width at 1/2 resolution (decoder).
        quarter_channels: width at 1/4 resolution.
        eighth_channels: width at 1/8 resolution.
        encoder_blocks: residual blocks a resolution in the encoder.
        decoder_blocks: residual blocks a resolution in the decoder.
        posterior_std: noise on raw latents during training.
        init_from: autoencoder folder whose weights to start from; it may have fewer latent channels.
        decoder_only: freeze the encoder.
        denoiser: diffusion model on these latents. A share of each batch is decoded not from the photo's own latents
            but from what its UNet says, given noise on them and the empty text, that they were: the mean of what they
            can have been, as drawing ends with. Left out: never.
        denoiser_share: that share.
        denoiser_log_sigma_mean: of the log-normal noise on them.
        denoiser_log_sigma_std: of the same.
        train_batch_size: images a step and process.
        dataloader_num_workers: processes that prepare batches; 0 is a thread. A GPU is faster than one of either.
        max_train_steps: optimizer steps in all.
        learning_rate: peak of the schedule.
        lr_warmup_steps: linear warm-up.
        lr_decay_fraction: last part of the run that decays by a cosine.
        adam_beta2: AdamW's second moment decay.
        adam_weight_decay: AdamW's weight decay.
        max_grad_norm: gradient clipping.
        ema_decay: decay of the averaged weights, which are what is validated and saved.
        l1_weight: weight of the mean absolute error.
        l2_weight: weight of the mean squared error.
        edge_weight: weight of the absolute error of horizontal and vertical differences.
        perceptual_weight: weight of the distance of EfficientNet-Lite2's features; 0 is off.
        pooled_weight: weight of the distance of its pooled features, one vector a photo; 0 is off.
        adversarial_weight: weight of the adversarial loss; 0 is off. Its gradient is capped at the others'.
        discriminator: "features": heads on EfficientNet-Lite2's features; "patch": a network of its own on pixels.
        discriminator_warmup_steps: steps that train the discriminator alone.
        discriminator_learning_rate: Adam's rate for the discriminator.
        discriminator_gamma: weight of its gradient penalty.
        prior_weight: weight of mean squared raw latents (the KL divergence's mean term at fixed variance).
        mixed_precision: "no", "bf16", or "auto": bf16 where the device computes in it, else no.
        seed: of data order, initialisation and noise.
        checkpointing_steps: save every so many steps.
        checkpoints_total_limit: how many checkpoints to keep.
        resume_from_checkpoint: "latest" or a checkpoint folder.
        validation_steps: validate every so many steps.
        num_validation_images: how many validation photos are measured.
        report_to: tracker of Accelerate, "tensorboard" or "none".
        max_train_samples: use only the first so many photos.
    """

    train_data_dir: str | None = None
    dataset_name: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    output_dir: str = "runs/autoencoder"
    height: int = 80
    width: int = 64
    latent_channels: int = 16
    half_channels: int = 48
    quarter_channels: int = 160
    eighth_channels: int = 320
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    posterior_std: float = 0.05
    init_from: str | None = None
    decoder_only: bool = False
    denoiser: str | None = None
    denoiser_share: float = 0.75
    denoiser_log_sigma_mean: float = -1.0
    denoiser_log_sigma_std: float = 0.5
    train_batch_size: int = 32
    dataloader_num_workers: int = 0
    max_train_steps: int = 4000
    learning_rate: float = 3e-4
    lr_warmup_steps: int = 50
    lr_decay_fraction: float = 0.5
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.998
    l1_weight: float = 0.5
    l2_weight: float = 2.0
    edge_weight: float = 0.5
    perceptual_weight: float = 0.0
    pooled_weight: float = 0.0
    adversarial_weight: float = 0.0
    discriminator: Literal["features", "patch"] = "features"
    discriminator_learning_rate: float = 2e-4
    discriminator_gamma: float = 0.02
    discriminator_warmup_steps: int = 100
    prior_weight: float = 1e-4
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    seed: int = 0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    validation_steps: int = 500
    num_validation_images: int = 500
    report_to: str = "tensorboard"
    max_train_samples: int | None = None


def load_pixels(dataset: ProductDataset, indices: list[int], height: int, width: int) -> torch.Tensor:
    """The photos at `indices` as float32 (N, 3, height, width) in [-1, 1], channels last in memory."""
    pixels = np.stack([fit_image(dataset[i].image, height, width) for i in indices])  # type: ignore[arg-type]
    return to_model(pixels).contiguous(memory_format=torch.channels_last)


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of neighbouring pixels, across and down."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


@torch.no_grad()
def validate(model: ProductAutoencoder, photos: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """Mean PSNR in dB over images (of [-1, 1] pixels, clamped), mean absolute error, and the reconstructions."""
    device = next(model.parameters()).device
    rebuilt = torch.cat([model(batch.to(device))[0].float().cpu() for batch in photos.split(64)]).clamp(-1, 1)
    error = (rebuilt - photos).square().flatten(1).mean(1)
    values = {"psnr": (10 * torch.log10(4 / error)).mean().item(), "l1": (rebuilt - photos).abs().mean().item()}
    return values, rebuilt


@torch.no_grad()
def latent_statistics(model: ProductAutoencoder, dataset: ProductDataset, config: AutoencoderConfig) -> None:
    """Measure mean and standard deviation of each latent channel on up to 4,096 training photos, and set them."""
    chosen = rng.permutation(len(dataset), config.seed, "latent statistics")[:4096].tolist()
    device = next(model.parameters()).device
    raw = []
    for start in range(0, len(chosen), 64):
        batch = load_pixels(dataset, chosen[start : start + 64], config.height, config.width)
        raw.append(model.encoder(batch.to(device)).float().cpu())
    latents = torch.cat(raw)
    model.set_latent_statistics(latents.mean((0, 2, 3)), latents.std((0, 2, 3)))


def build(config: AutoencoderConfig, dataset: ProductDataset) -> ProductAutoencoder:
    """A new model, started as the best linear codec of the data, or from the one of `init_from`."""
    torch.manual_seed(rng.derive_seed(config.seed, "initialisation"))
    model = ProductAutoencoder(
        latent_channels=config.latent_channels,
        half_channels=config.half_channels,
        quarter_channels=config.quarter_channels,
        eighth_channels=config.eighth_channels,
        encoder_blocks=config.encoder_blocks,
        decoder_blocks=config.decoder_blocks,
        posterior_std=config.posterior_std,
    )
    chosen = rng.permutation(len(dataset), config.seed, "linear start")[:4096].tolist()
    model.init_linear_from_patches(load_pixels(dataset, chosen, config.height, config.width))
    if config.init_from is not None:
        known = load_autoencoder(config.init_from)
        if config.decoder_only and known.config["latent_channels"] != config.latent_channels:
            raise InputError(
                f"{config.init_from} has {known.config['latent_channels']} latent channels and --latent_channels is "
                f"{config.latent_channels}: with --decoder_only true they must be the same"
            )
        model.start_from(known)
    return model


@torch.no_grad()
def as_drawn(model: ProductAutoencoder, teacher: Teacher, pixels: torch.Tensor, chances: Chances) -> torch.Tensor:
    """The posterior noise with which photos' latents become what `teacher` says they were, where `chances` want that.

    Args:
        pixels: (N, 3, H, W). chances: of the same N.

    Returns:
        (N, C, h, w), in units of `posterior_std`; the chances' own noise for the other photos.
    """
    noise = chances.noise.clone()
    rows = chances.denoised.nonzero().flatten()
    if len(rows):
        mean, std = model.latents_mean, model.latents_std
        clean = (model.encoder(pixels[rows]).float() - mean) / std
        level = chances.log_sigma[rows].clamp(teacher.table[0], teacher.table[-1])
        condition = teacher.empty.expand(len(rows), -1, -1)
        told = teacher.clean(condition)(add_noise(clean, chances.noise[rows], level), level)
        noise[rows] = (told - clean) * std / model.config["posterior_std"]
    return noise


class Chances(NamedTuple):
    """A step's random numbers: noise (N, C, h, w), whether to denoise (N,), and from which log_sigma (N,)."""

    noise: torch.Tensor
    denoised: torch.Tensor
    log_sigma: torch.Tensor


def main(argv: list[str] | None = None) -> None:
    config = parse_config(AutoencoderConfig, __doc__.splitlines()[0], argv)  # type: ignore[union-attr]
    source = config.train_data_dir or config.dataset_name
    if source is None:
        raise InputError("no training data: give --train_data_dir DIR or --dataset_name ID")
    check_size("--height", config.height)
    check_size("--width", config.width)
    adversarial = config.adversarial_weight > 0
    if adversarial and not config.decoder_only:
        raise InputError(
            "adversarial_weight > 0 trains the decoder only: add --decoder_only true and --init_from FOLDER"
        )
    if config.denoiser is not None and not config.decoder_only:
        raise InputError(
            "--denoiser knows the latents of one encoder and must find it unchanged: add --decoder_only true and "
            "--init_from FOLDER"
        )
    out = Path(config.output_dir)
    config = dataclasses.replace(config, mixed_precision=training_precision(config.mixed_precision))
    accelerator = start_accelerator(config.mixed_precision, config.report_to, out)
    train = load_products(source, split=config.train_split, limit=config.max_train_samples)
    held_out = load_products(source, split=config.validation_split, limit=config.num_validation_images)
    photos = load_pixels(held_out, list(range(len(held_out))), config.height, config.width)

    model = build(config, train)
    if config.decoder_only:
        model.encoder.requires_grad_(False)
    teacher = None
    if config.denoiser is not None:
        drawing = fellow_model("--denoiser", config.denoiser, model, f"--init_from {config.init_from}")
        unet, empty, table = frozen_unet(drawing, config.mixed_precision, accelerator.device)
        teacher = Teacher(unet, empty, 1.0, table)
    # Channels last is what the CPU's and the tensor cores' convolutions want.
    model = model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    needs_features = max(config.perceptual_weight, config.pooled_weight) > 0 or (
        adversarial and config.discriminator == "features"
    )
    feature_net = load_efficientnet("lite2").to(accelerator.device) if needs_features else None
    ema = Ema(model, config.ema_decay)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        fused=True,
    )
    torch.manual_seed(rng.derive_seed(config.seed, "discriminator initialisation"))
    critic = build_discriminator(config.discriminator, feature_net)
    critic = critic.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    critic_optimizer = torch.optim.Adam(
        critic.parameters(), lr=config.discriminator_learning_rate, betas=(0.5, 0.99), fused=True
    )
    checkpoint = find_checkpoint(config.resume_from_checkpoint, out)
    first_step = 0
    if checkpoint is not None:
        first_step, tensors = restore_training(checkpoint, "model", model, ema, optimizer)
        if adversarial:
            if "discriminator" not in tensors:
                raise ModelMismatchError(f"{checkpoint} has no discriminator: it was made with --adversarial_weight 0")
            critic.load_state_dict(tensors["discriminator"])
            load_optimizer(critic_optimizer, tensors["discriminator_optimizer"])
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if adversarial:
        critic, critic_optimizer = accelerator.prepare(critic, critic_optimizer)

    processes, process = accelerator.num_processes, accelerator.process_index
    stop = StopSignal().install()
    main_process = accelerator.is_main_process
    if main_process:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
    log = JsonLines(out / "log.jsonl", first_step) if main_process else None
    accelerator.init_trackers("logs")

    def save(step: int) -> None:
        tensors = {
            "model": dict(model.state_dict()),
            "ema": ema.shadow,
            "optimizer": optimizer_tensors(optimizer.optimizer),
        }
        if adversarial:
            tensors["discriminator"] = dict(accelerator.unwrap_model(critic).state_dict())
            tensors["discriminator_optimizer"] = optimizer_tensors(critic_optimizer.optimizer)
        state = {"ema_updates": ema.updates, "config": dataclasses.asdict(config)}
        save_checkpoint(out, step, tensors, state, limit=config.checkpoints_total_limit)

    def load(step: int) -> tuple[torch.Tensor, Chances]:
        positions = positions_of_step(step, config.train_batch_size, process, processes)
        pixels = load_pixels(train, samples_at(positions, len(train), config.seed), config.height, config.width)
        shape = (config.latent_channels, config.height // 8, config.width // 8)
        share = config.denoiser_share if config.denoiser is not None else 0.0
        level = rng.normal((1,), config.seed, "denoiser noise level", positions)[:, 0]
        chances = Chances(
            rng.normal(shape, config.seed, "posterior noise", positions),
            rng.uniform(1, config.seed, "denoised", positions)[:, 0] < share,
            config.denoiser_log_sigma_mean + config.denoiser_log_sigma_std * level,
        )
        return pixels, chances

    started, images_done = time.monotonic(), 0
    steps = range(first_step, config.max_train_steps)
    for step, (pixels, chances) in prefetched(steps, load, workers=config.dataloader_num_workers):
        rate = learning_rate(
            step,
            peak=config.learning_rate,
            warmup_steps=config.lr_warmup_steps,
            total_steps=config.max_train_steps,
            decay_fraction=config.lr_decay_fraction,
        )
        set_learning_rate(optimizer, rate)
        pixels = pixels.to(accelerator.device)
        chances = Chances(*(part.to(accelerator.device) for part in chances))
        noise = chances.noise
        if teacher is not None:
            with accelerator.autocast():
                noise = as_drawn(model, teacher, pixels, chances)
        rebuilt, raw = wrapped(pixels, noise)
        difference = rebuilt.float() - pixels
        across, down = edges(difference)
        loss = (
            config.l1_weight * difference.abs().mean()
            + config.l2_weight * difference.square().mean()
            + config.edge_weight * (across.abs().mean() + down.abs().mean())
            + config.prior_weight * raw.float().square().mean()
        )
        values: dict[str, float] = {"learning_rate": rate}
        if feature_net is not None and config.pooled_weight > 0:
            alike, same = feature_losses(feature_net, pixels, rebuilt.float(), PERCEPTUAL_SIZES)
            loss = loss + config.perceptual_weight * alike + config.pooled_weight * same
            values |= {"perceptual_loss": alike.item(), "pooled_loss": same.item()}
        elif feature_net is not None and config.perceptual_weight > 0:
            alike = perceptual_loss(feature_net, pixels, rebuilt.float(), PERCEPTUAL_SIZES)
            loss = loss + config.perceptual_weight * alike
            values["perceptual_loss"] = alike.item()
        check_finite(loss.item(), step, rate)
        values["loss"] = loss.item()
        if adversarial:
            (fidelity,) = torch.autograd.grad(loss, rebuilt, retain_graph=True)
            with accelerator.autocast():
                generator = generator_loss(critic, pixels, rebuilt)
            (sharpness,) = torch.autograd.grad(generator, rebuilt)
            # Capped, never raised: scaling a weak discriminator's gradient up made both run away together.
            ratio = float(sharpness.norm() / fidelity.norm())
            scale = min(config.adversarial_weight, 1 / max(ratio, 1e-12))
            if step < config.discriminator_warmup_steps:
                scale = 0.0
            rebuilt.backward(fidelity + scale * sharpness)
            values["adversarial_share"] = scale * ratio
            positions = positions_of_step(step, config.train_batch_size, process, processes)
            critic_noise = rng.normal(pixels.shape[1:], config.seed, "discriminator noise", positions).to(pixels)
            with accelerator.autocast():
                critic_loss = discriminator_loss(
                    critic, pixels, rebuilt.detach(), critic_noise, gamma=config.discriminator_gamma
                )
            accelerator.backward(critic_loss)
            critic_optimizer.step()
            critic_optimizer.zero_grad()
            values |= {"generator_loss": generator.item(), "discriminator_loss": critic_loss.item()}
        else:
            accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        images_done += len(pixels) * processes

        done = step + 1
        values["grad_norm"] = float(norm)
        values["images_per_second"] = images_done / (time.monotonic() - started)
        last = done == config.max_train_steps
        if main_process and (done % config.validation_steps == 0 or last):
            with ema.applied_to(model):
                measured, pictures = validate(model, photos)
            values |= {f"validation_{name}": value for name, value in measured.items()}
            pairs = [p for pair in zip(to_uint8(photos[:12]), to_uint8(pictures[:12]), strict=True) for p in pair]
            save_image(out / "previews" / f"step-{done:06d}.png", contact_sheet(pairs, 8, scale=2), overwrite=True)
            print(
                f"step {done}: {json.dumps({k: round(v, 5) for k, v in values.items()})}", file=sys.stderr, flush=True
            )
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
            with ema.applied_to(model):
                if not config.decoder_only:  # a frozen encoder keeps its statistics: models were trained on them
                    latent_statistics(model, train, config)
                save_network(model, out / "autoencoder")
            print(json.dumps({"autoencoder": str(out / "autoencoder"), "steps": config.max_train_steps}))
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except GigdiffError as error:
        sys.exit(f"error: {error}")
