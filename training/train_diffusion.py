"""Train a latent diffusion UNet on product photos and their captions.

    accelerate launch training/train_diffusion.py --config configs/diffusion_mini.yaml

The UNet is diffusers' UNet2DConditionModel; latents come from an autoencoder of train_autoencoder.py, text from a
frozen encoder. Both are encoded once, into a cache that notices changed photos, captions or encoders.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel

from gigdiff import rng
from gigdiff.attention import set_attention
from gigdiff.cuda_graphs import recorded_for_training
from gigdiff.data.encoded import EncodedProducts
from gigdiff.diffusion import add_noise, log_sigmas, min_snr_weight, timesteps_of, velocity
from gigdiff.errors import GigdiffError
from gigdiff.fit.checkpoint import find_checkpoint, optimizer_tensors, restore_training, save_checkpoint
from gigdiff.fit.config import as_yaml, parse_config
from gigdiff.fit.ema import Ema
from gigdiff.fit.layers import lighten
from gigdiff.fit.muon import build_optimizer
from gigdiff.fit.order import positions_of_step, samples_at
from gigdiff.fit.preview import save_preview
from gigdiff.fit.run import JsonLines, StopSignal, check_finite, compiles, prefetched, records_graphs, start_accelerator
from gigdiff.fit.schedule import learning_rate, set_learning_rate
from gigdiff.fit.splits import encoded_splits
from gigdiff.fit.teacher import Velocity
from gigdiff.generators.diffusion import DiffusionGenerator, load_unet, save_folder
from gigdiff.generators.request import check_size
from gigdiff.models.autoencoder import load_autoencoder
from gigdiff.models.widen import copy_leading
from gigdiff.precision import autocast_dtype, training_precision
from gigdiff.text import TextEncoder, load_text_encoder


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Keys of configs/diffusion_*.yaml.

    Args:
        train_data_dir: folder of photos (imagefolder or Parquet); or use dataset_name.
        dataset_name: hub id of a dataset.
        train_split: split to train on.
        validation_split: split of the held-out loss.
        vae_name_or_path: folder of the autoencoder.
        init_from: UNet folder whose weights to start from; it may have fewer latent channels.
        text_encoder: "minilm", or a text encoder's folder or hub id.
        output_dir: run folder: checkpoints, log.jsonl, previews/, model/.
        cache_dir: where latents and text embeddings are kept.
        height: image height in pixels, a multiple of 8.
        width: image width in pixels, a multiple of 8.
        block_out_channels: widths of the UNet's levels.
        layers_per_block: residual and attention layers a level.
        attention_heads: heads of every attention layer (diffusers calls this attention_head_dim).
        captions_per_image: wordings of each product; each epoch uses the next.
        caption_dropout: share of samples trained on the empty prompt, for guidance.
        log_sigma_mean: mean of the normal law that log noise levels are drawn from.
        log_sigma_std: its standard deviation.
        snr_gamma: min-SNR weighting of the loss; none by default.
        train_batch_size: images a step and process.
        dataloader_num_workers: processes that prepare batches; 0 is a thread, as fast on a GPU too.
        cuda_graphs: record the UNet's passes as CUDA graphs, on one GPU: a small UNet's kernels take longer to launch
            than to run.
        max_train_steps: optimizer steps in all.
        optimizer: "adamw", or "muon" for the hidden matrices with AdamW for the rest, at the same learning rate.
        learning_rate: peak of the schedule.
        lr_warmup_steps: linear warm-up.
        lr_decay_fraction: last part of the run that decays by a cosine.
        adam_beta2: AdamW's second moment decay.
        adam_weight_decay: AdamW's weight decay.
        max_grad_norm: gradient clipping.
        ema_decay: decay of the averaged weights, which are what is validated and saved.
        attention: attention backend, see gigdiff.attention.
        mixed_precision: "no", "bf16", "fp16" (CUDA only), or "auto": bf16 where the device computes in it, else no.
        seed: of data order, wordings, initialisation and noise.
        checkpointing_steps: save every so many steps.
        checkpoints_total_limit: how many checkpoints to keep.
        resume_from_checkpoint: "latest" or a checkpoint folder.
        validation_steps: held-out loss every so many steps.
        num_validation_images: how many validation photos the held-out loss is measured on.
        preview_steps: draw the validation prompts every so many steps.
        validation_prompts: what is drawn.
        num_inference_steps: denoising steps of previews, and the saved model's default.
        guidance_scale: guidance of previews, and the saved model's default.
        guidance_interval: (low, high) of sigma where guidance is applied.
        report_to: tracker of Accelerate, "tensorboard" or "none".
        max_train_samples: use only the first so many photos.
    """

    train_data_dir: str | None = None
    dataset_name: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    vae_name_or_path: str = "gigdiff/pretrained/mini/vae"
    init_from: str | None = None
    text_encoder: str = "minilm"
    output_dir: str = "runs/diffusion"
    cache_dir: str = "cache"
    height: int = 80
    width: int = 64
    block_out_channels: tuple[int, ...] = (192, 256)
    layers_per_block: int = 1
    attention_heads: int = 4
    captions_per_image: int = 5
    caption_dropout: float = 0.1
    log_sigma_mean: float = 0.0
    log_sigma_std: float = 1.3
    snr_gamma: float | None = None
    train_batch_size: int = 64
    dataloader_num_workers: int = 0
    cuda_graphs: bool = True
    max_train_steps: int = 10000
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 5e-4
    lr_warmup_steps: int = 200
    lr_decay_fraction: float = 0.35
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    attention: str = "auto"
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
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
    num_inference_steps: int = 20
    guidance_scale: float = 2.5
    guidance_interval: tuple[float, float | None] = (0.0, None)
    report_to: str = "tensorboard"
    max_train_samples: int | None = None


def build_unet(config: DiffusionConfig, latent_channels: int, text_dim: int) -> UNet2DConditionModel:
    """A UNet of cross-attention blocks whose time embedding also hears the text.

    addition_embed_type "text" pools the text tokens by attention and adds them to the time embedding, so what the
    product is reaches every residual block. attention_head_dim is the *number* of heads in diffusers' UNet.
    """
    torch.manual_seed(rng.derive_seed(config.seed, "initialisation"))
    levels = len(config.block_out_channels)
    return UNet2DConditionModel(
        sample_size=(config.height // 8, config.width // 8),  # type: ignore[arg-type]
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.attention_heads,
        cross_attention_dim=text_dim,
        addition_embed_type="text",
        addition_embed_type_num_heads=config.attention_heads,
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Stable Diffusion's noise schedule with v-prediction, sampled by DPM-Solver++(2M) (Lu et al. 2022, 2211.01095)."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        solver_order=2,
    )


@dataclasses.dataclass(frozen=True)
class Batch:
    """Latents (N, C, h, w), conditions (N, 1 + L, D), noise like latents, log_sigma (N,)."""

    latents: torch.Tensor
    condition: torch.Tensor
    noise: torch.Tensor
    log_sigma: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, f.name).to(device) for f in dataclasses.fields(self)))


def make_batch(data: EncodedProducts, positions: range, config: DiffusionConfig, length: int) -> Batch:
    """The samples at `positions` of the endless stream; each depends on (seed, position) alone."""
    indices = samples_at(positions, len(data), config.seed)
    latents = data.latents(indices)
    noise, law, choices = [], [], []
    for position, index in zip(positions, indices, strict=True):
        generator = rng.generator(config.seed, "diffusion sample", position)
        noise.append(torch.randn(latents.shape[1:], generator=generator))
        law.append(torch.randn((), generator=generator))
        dropped = torch.rand((), generator=generator).item() < config.caption_dropout
        choices.append(None if dropped else (index, position // len(data)))
    log_sigma = config.log_sigma_mean + config.log_sigma_std * torch.stack(law)
    return Batch(latents, data.conditions(choices, length), torch.stack(noise), log_sigma)


def fixed_batches(data: EncodedProducts, config: DiffusionConfig, length: int) -> list[Batch]:
    """Every held-out photo once with its first wording, fixed noise, and noise levels at the law's quantiles."""
    count = len(data)
    quantiles = (torch.arange(count) + 0.5) / count
    levels = config.log_sigma_mean + config.log_sigma_std * torch.special.ndtri(quantiles)
    levels = levels[rng.permutation(count, config.seed, "held-out levels")]
    batches = []
    for start in range(0, count, 64):
        chosen = range(start, min(start + 64, count))
        latents = data.latents(chosen)
        noise = rng.normal(latents.shape[1:], config.seed, "held-out noise", chosen)
        batches.append(
            Batch(latents, data.conditions([(i, 0) for i in chosen], length), noise, levels[start : chosen.stop])
        )
    return batches


def inputs_of(batch: Batch, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `Velocity` takes."""
    noisy = add_noise(batch.latents, batch.noise, batch.log_sigma).contiguous(memory_format=torch.channels_last)
    return noisy, timesteps_of(batch.log_sigma, table), batch.condition


def loss_of(
    predict: Callable[..., torch.Tensor], batch: Batch, table: torch.Tensor, snr_gamma: float | None
) -> torch.Tensor:
    """Mean squared error of the predicted velocity, min-SNR weighted where asked for."""
    target = velocity(batch.latents, batch.noise, batch.log_sigma)
    predicted = predict(*inputs_of(batch, table))
    error = (predicted.float() - target).square().flatten(1).mean(1)
    return (error if snr_gamma is None else error * min_snr_weight(batch.log_sigma, snr_gamma)).mean()


def main(argv: list[str] | None = None) -> None:
    config = parse_config(DiffusionConfig, __doc__.splitlines()[0], argv)  # type: ignore[union-attr]
    check_size("--height", config.height)
    check_size("--width", config.width)
    out = Path(config.output_dir)
    config = dataclasses.replace(config, mixed_precision=training_precision(config.mixed_precision))
    accelerator = start_accelerator(config.mixed_precision, config.report_to, out)
    device, main_process = accelerator.device, accelerator.is_main_process
    processes, process = accelerator.num_processes, accelerator.process_index

    vae = load_autoencoder(config.vae_name_or_path).to(device, memory_format=torch.channels_last)
    encoder: TextEncoder = load_text_encoder(config.text_encoder, str(device))
    size = (config.height, config.width)
    train, held_out_products = encoded_splits(config, vae, encoder, accelerator, size=size)
    length = encoder.max_length
    if train.cut and main_process:
        print(f"{len(train.cut)} captions were longer than {length} tokens and were condensed", file=sys.stderr)
    held_out = [batch.to(device) for batch in fixed_batches(held_out_products, config, length)]

    unet = build_unet(config, vae.config["latent_channels"], encoder.dim)
    if config.init_from is not None:
        copy_leading(load_unet(config.init_from), unet)
    unet = unet.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device.type == "cpu" and not compiles(accelerator):
        lighten(unet)
    chosen = set_attention(unet, config.attention, training=True, dtype=autocast_dtype(config.mixed_precision))
    scheduler = build_scheduler()
    table = log_sigmas(scheduler.alphas_cumprod).to(device)
    ema = Ema(unet, config.ema_decay)
    optimizer = build_optimizer(
        config.optimizer,
        unet,
        config.learning_rate,
        outer=("conv_in.", "conv_out."),
        betas=(0.9, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        mixed_precision=config.mixed_precision,
    )
    checkpoint = find_checkpoint(config.resume_from_checkpoint, out)
    first_step = 0
    if checkpoint is not None:
        first_step, _ = restore_training(checkpoint, "unet", unet, ema, optimizer)
    stop = StopSignal().install()
    if main_process:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
        count = sum(p.numel() for p in unet.parameters())
        print(f"{count / 1e6:.1f} M parameters, {len(train):,} photos, attention {chosen}", file=sys.stderr, flush=True)
    log = JsonLines(out / "log.jsonl", first_step) if main_process else None
    accelerator.init_trackers("logs")

    def averaged_unet() -> UNet2DConditionModel:
        with ema.applied_to(unet):
            return copy.deepcopy(unet)

    def save(step: int) -> None:
        tensors = {
            "unet": dict(unet.state_dict()),
            "ema": ema.shadow,
            "optimizer": optimizer_tensors(optimizer.optimizer),
        }
        state = {"ema_updates": ema.updates, "config": dataclasses.asdict(config)}
        save_checkpoint(out, step, tensors, state, limit=config.checkpoints_total_limit)

    def load(step: int) -> Batch:
        return make_batch(train, positions_of_step(step, config.train_batch_size, process, processes), config, length)

    recorded = None
    if records_graphs(config.cuda_graphs, accelerator) and first_step < config.max_train_steps:
        example = inputs_of(load(first_step).to(device), table)
        recorded = recorded_for_training(Velocity(unet), example, autocast_dtype(config.mixed_precision))
    # After recording: what Accelerate makes of `forward` is not to be part of it.
    wrapped, optimizer = accelerator.prepare(unet, optimizer)
    predict, predict_held_out = recorded or Velocity(wrapped), Velocity(accelerator.unwrap_model(wrapped))

    started, images_done = time.monotonic(), 0
    steps = range(first_step, config.max_train_steps)
    for step, batch in prefetched(steps, load, workers=config.dataloader_num_workers):
        rate = learning_rate(
            step,
            peak=config.learning_rate,
            warmup_steps=config.lr_warmup_steps,
            total_steps=config.max_train_steps,
            decay_fraction=config.lr_decay_fraction,
        )
        set_learning_rate(optimizer, rate)
        loss = loss_of(predict, batch.to(device), table, config.snr_gamma)
        check_finite(loss.item(), step, rate)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(unet)
        images_done += len(batch.latents) * processes

        done = step + 1
        values: dict[str, float] = {"loss": loss.item(), "learning_rate": rate, "grad_norm": float(norm)}
        values["images_per_second"] = images_done / (time.monotonic() - started)
        last = done == config.max_train_steps
        if main_process and (done % config.validation_steps == 0 or last):
            unet.eval()
            with torch.no_grad(), ema.applied_to(unet):
                # Through what Accelerate wrapped, so that the precision is training's.
                losses = [loss_of(predict_held_out, b, table, None).item() for b in held_out]
            unet.train()
            sizes = [len(b.latents) for b in held_out]
            values["validation_loss"] = sum(x * n for x, n in zip(losses, sizes, strict=True)) / sum(sizes)
            print(
                f"step {done}: {json.dumps({k: round(v, 5) for k, v in values.items()})}", file=sys.stderr, flush=True
            )
        if main_process and (done % config.preview_steps == 0 or last):
            generator = DiffusionGenerator(
                averaged_unet(),
                vae,
                scheduler,
                encoder,
                name="preview",
                height=config.height,
                width=config.width,
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                guidance_interval=(config.guidance_interval[0], config.guidance_interval[1] or float("inf")),
                device=device,
            )
            save_preview(generator, config.validation_prompts, range(3), out / "previews" / f"step-{done:06d}.png")
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
                "family": "diffusion",
                "text_encoder": config.text_encoder,
                "height": config.height,
                "width": config.width,
                "num_inference_steps": config.num_inference_steps,
                "guidance_scale": config.guidance_scale,
                "guidance_interval": config.guidance_interval,
                "parameters": sum(p.numel() for m in (unet, vae) for p in m.parameters()),
            }
            save_folder(out / "model", averaged_unet(), vae, scheduler, card)
            print(json.dumps({"model": str(out / "model"), "steps": config.max_train_steps}))
    accelerator.end_training()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main()
    except GigdiffError as error:
        sys.exit(f"error: {error}")
