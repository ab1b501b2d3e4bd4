"""Train a text-conditioned GAN on product photos and their captions.

    accelerate launch training/train_gan.py --config configs/gan_mini.yaml

In the latent space of an autoencoder of train_autoencoder.py (`--space latent`, the diffusion model's own, with the
same captions and text encoder), or on pixels (`--space pixel`). The loss, its regulariser and the generator's
architecture are choices; docs/gan.md says what they are.
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
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from gigdiff import gan_losses, rng
from gigdiff.data.encoded import EncodedProducts
from gigdiff.errors import GigdiffError, InputError, ModelMismatchError
from gigdiff.fit.adversary import Adversary, AdversarySettings, Chances, diffusion_features, view_of
from gigdiff.fit.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore_training,
    save_checkpoint,
)
from gigdiff.fit.collapse import CollapseWatch, Variety, measure_variety, overfitting_ratio
from gigdiff.fit.config import as_yaml, parse_config
from gigdiff.fit.ema import Ema
from gigdiff.fit.order import positions_of_step, samples_at
from gigdiff.fit.preview import save_preview
from gigdiff.fit.run import JsonLines, StopSignal, check_finite, prefetched, start_accelerator
from gigdiff.fit.schedule import learning_rate, set_learning_rate
from gigdiff.fit.splits import encoded_splits
from gigdiff.fit.teacher import Teacher, fellow_model, frozen_unet
from gigdiff.generators.diffusion import DiffusionGenerator
from gigdiff.generators.one_pass import OnePassGenerator, save_one_pass
from gigdiff.generators.request import check_size
from gigdiff.generators.shared_vae import latent_space_of
from gigdiff.models.autoencoder import ProductAutoencoder, load_autoencoder
from gigdiff.models.conditioning import blur_condition
from gigdiff.models.gan import ConvGenerator, StyleGenerator
from gigdiff.precision import training_precision
from gigdiff.pretrained import EMBEDDED, folder_of
from gigdiff.text import TextEncoder, load_text_encoder

GENERATORS: dict[str, Any] = {"style": StyleGenerator, "conv": ConvGenerator}
PIXEL_FOLD = 4  # pixels are worked on as patches of 4 x 4


@dataclasses.dataclass(frozen=True)
class GanConfig:
    """Keys of configs/gan_*.yaml.

    Args:
        train_data_dir: folder of photos (imagefolder or Parquet); or use dataset_name.
        dataset_name: hub id of a dataset.
        train_split: split to train on.
        validation_split: split that variety and overfitting are measured on.
        space: "latent" draws an autoencoder's latents, "pixel" the pixels.
        vae_name_or_path: folder of the autoencoder (latent space).
        text_encoder: "minilm", or a text encoder's folder or hub id.
        init_from: another run's folder or checkpoint whose averaged generator and discriminator to start from, or a
            model folder or embedded name, which has the generator only: its discriminator then starts anew. The
            generator may have fewer blocks: those it lacks start as the identity.
        output_dir: run folder: checkpoints, log.jsonl, previews/, best/, model/.
        cache_dir: where latents and text embeddings are kept.
        height: image height in pixels, a multiple of 8.
        width: image width in pixels, a multiple of 8.
        condition_on: "captions", or "attributes": the attribute words alone, as text ("navy shirt for men").
        captions_per_image: wordings of each product; each epoch uses the next.
        captions_seed: seed of the wordings; by default `seed`. The same one in several runs lets them share a cache.
        generator: "style" (mapping network, modulated convolutions, noise a layer) or "conv" (plain).
        generator_widths: channels of the generator's levels, coarsest first.
        generator_blocks: residual blocks of each.
        discriminator: "scratch" judges latents or pixels, "diffusion" what a trained diffusion UNet sees in latents.
        discriminator_model: that UNet's model folder or embedded name; it must draw the same latents.
        discriminator_log_sigma_mean: mean of the normal law of the log noise levels that it looks at latents through.
        discriminator_log_sigma_std: its standard deviation.
        discriminator_widths: channels of the discriminator's levels, coarsest first.
        discriminator_blocks: residual blocks of each.
        noise_dim: numbers of the generator's noise vector.
        style_dim: numbers of a style.
        loss: "relativistic", "non_saturating", "hinge" or "wgan_gp"; see gigdiff.gan_losses.
        penalty: gradient penalty: "r1", "r1_r2", "wgan_gp", "none", or "auto", the one the loss goes with.
        penalty_weight: its weight, averaged over steps.
        penalty_interval: take it every so many steps, times as strong (lazy regularisation); by default 4, and 1 for
            wgan_gp, whose critic nothing else holds.
        penalty_method: "finite_difference" (no second derivative) or "exact" (wgan_gp is always exact).
        penalty_noise: standard deviation of the finite difference's noise.
        mismatch_weight: share of fakes that are real images with another product's text.
        contrastive_weight: weight of finding each image's text among the batch's; 0 is off.
        diversity_weight: weight on two drawings of a caption being too alike; 0 is off.
        diversity_target: how far apart they should lie, as a share of two photos' distance.
        distillation_weight: weight of how far a diffusion model would move what is drawn (adversarial diffusion
            distillation); 0 is off, and the GAN a plain one.
        distillation_share: of the batch that this is asked about.
        distillation_model: that model's folder or embedded name; it must draw the same latents.
        distillation_guidance_scale: its guidance; default the model's own.
        distillation_log_sigma_mean: mean of the normal law of the log noise levels that it is asked at.
        distillation_log_sigma_std: its standard deviation.
        text_noise: noise on the text condition, relative to its size, against learning names by heart.
        augment: "adaptive" (ADA), "fixed" (at augment_probability) or "none".
        augment_probability: of each transform, when fixed.
        augment_target: how sure the discriminator may be (r_t) before adaptive augmentation grows.
        augment_images: images in which it would grow from 0 to 1.
        augment_shift: largest shift, as a share of the size.
        augment_cutout: side of the blanked square, as a share of the size.
        augment_flip: mirror; only in pixel space, and it mirrors prints and logos.
        train_batch_size: images a step and process.
        dataloader_num_workers: processes that prepare batches; 0 is a thread. A GPU is faster than one of either.
        max_train_steps: optimizer steps in all.
        learning_rate: peak of the generator's schedule.
        discriminator_learning_rate: peak of the discriminator's.
        lr_warmup_steps: linear warm-up.
        lr_decay_fraction: last part of the run that decays by a cosine.
        adam_beta1: Adam's momentum, of both.
        adam_beta2: Adam's second moment decay, of both.
        ema_decay: decay of the generator's averaged weights, which are what is measured and saved.
        mixed_precision: "no", "bf16", or "auto": bf16 where the device computes in it, else no.
        seed: of data order, wordings, initialisation, noise and augmentation.
        checkpointing_steps: save every so many steps.
        checkpoints_total_limit: how many checkpoints to keep.
        resume_from_checkpoint: "latest" or a checkpoint folder.
        validation_steps: measure variety and overfitting every so many steps.
        num_validation_images: how many validation photos for that.
        collapse_diversity: variety over prompts below which a measurement is bad, as a share of the photos'.
        collapse_prompt_diversity: variety within a prompt below which it is bad.
        collapse_grace_steps: measurements before this step are not judged.
        stop_on_collapse: end the run when it has collapsed.
        preview_steps: draw the validation prompts every so many steps.
        validation_prompts: what is drawn.
        truncation: the saved model's default, and that of previews.
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
    init_from: str | None = None
    output_dir: str = "runs/gan"
    cache_dir: str = "cache"
    height: int = 80
    width: int = 64
    condition_on: Literal["captions", "attributes"] = "captions"
    captions_per_image: int = 5
    captions_seed: int | None = None
    generator: Literal["style", "conv"] = "style"
    generator_widths: tuple[int, ...] = (320, 192)
    generator_blocks: tuple[int, ...] = (2, 2)
    discriminator: Literal["scratch", "diffusion"] = "scratch"
    discriminator_model: str = "mini"
    discriminator_log_sigma_mean: float = -1.0
    discriminator_log_sigma_std: float = 1.2
    discriminator_widths: tuple[int, ...] = (256, 192)
    discriminator_blocks: tuple[int, ...] = (2, 1)
    noise_dim: int = 128
    style_dim: int = 256
    loss: Literal["relativistic", "non_saturating", "hinge", "wgan_gp"] = "relativistic"
    penalty: Literal["auto", "r1", "r1_r2", "wgan_gp", "none"] = "auto"
    penalty_weight: float = 1.0
    penalty_interval: int | None = None
    penalty_method: Literal["finite_difference", "exact"] = "finite_difference"
    penalty_noise: float = 0.2
    mismatch_weight: float = 0.5
    contrastive_weight: float = 0.25
    diversity_weight: float = 2.0
    diversity_target: float = 0.3
    distillation_weight: float = 0.0
    distillation_share: float = 0.25
    distillation_model: str = "mini"
    distillation_guidance_scale: float | None = None
    distillation_log_sigma_mean: float = 0.0
    distillation_log_sigma_std: float = 1.0
    text_noise: float = 0.1
    augment: Literal["adaptive", "fixed", "none"] = "adaptive"
    augment_probability: float = 0.3
    augment_target: float = 0.6
    augment_images: int = 500_000
    augment_shift: float = 0.125
    augment_cutout: float = 0.5
    augment_flip: bool = False
    train_batch_size: int = 32
    dataloader_num_workers: int = 0
    max_train_steps: int = 10000
    learning_rate: float = 3e-4
    discriminator_learning_rate: float = 3e-4
    lr_warmup_steps: int = 100
    lr_decay_fraction: float = 0.3
    adam_beta1: float = 0.0
    adam_beta2: float = 0.99
    ema_decay: float = 0.998
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    seed: int = 0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    validation_steps: int = 500
    num_validation_images: int = 1024
    collapse_diversity: float = 0.3
    collapse_prompt_diversity: float = 0.02
    collapse_grace_steps: int = 1000
    stop_on_collapse: bool = False
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

    def check(self) -> None:
        """Raises InputError for combinations that make no sense."""
        if self.augment_flip and self.space == "latent":
            raise InputError(
                "--augment_flip true needs --space pixel: mirrored latents are not the latents of a mirrored photo"
            )
        if self.discriminator == "diffusion" and self.space == "pixel":
            raise InputError("--discriminator diffusion needs --space latent: its UNet sees latents, not pixels")
        if self.distillation_weight > 0 and self.space == "pixel":
            raise InputError("--distillation_weight needs --space latent: its model draws latents, not pixels")
        if not 0 < self.distillation_share <= 1:
            raise InputError(f"--distillation_share {self.distillation_share:g}: above 0 and at most 1 is possible")


@dataclasses.dataclass(frozen=True)
class Batch:
    """images (N, C, H, W), condition (N, 1 + L, D), noise (N, noise_size), and the discriminator's chances; for the
    share that a teacher corrects, or empty: text, the condition without noise, its noise like images, log sigma."""

    images: torch.Tensor
    condition: torch.Tensor
    noise: torch.Tensor
    chances: Chances
    text: torch.Tensor
    teacher_noise: torch.Tensor
    teacher_level: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, f.name).to(device) for f in dataclasses.fields(self)))


def images_of(data: EncodedProducts, indices: list[int], space: str) -> torch.Tensor:
    """float32 (N, C, H, W): latents, or pixels in [-1, 1]."""
    return data.latents(indices) if space == "latent" else data.pixels(indices)


def make_batch(
    data: EncodedProducts,
    positions: range,
    step: int,
    config: GanConfig,
    length: int,
    noise_size: int,
    adversary: Adversary,
) -> Batch:
    """The samples at `positions` of the endless stream; each depends on (seed, position) alone."""
    indices = samples_at(positions, len(data), config.seed)
    images = images_of(data, indices, config.space)
    condition = data.conditions([(i, p // len(data)) for p, i in zip(positions, indices, strict=True)], length)
    chances = adversary.chances(positions, step, images.shape[1:], condition)
    text = teacher_noise = teacher_level = torch.empty(0)
    if config.distillation_weight > 0:
        corrected = positions[: portion(len(positions), config.distillation_share)]
        text = condition[: len(corrected)]
        teacher_noise = rng.normal(images.shape[1:], config.seed, "teacher noise", corrected)
        law = rng.normal((1,), config.seed, "teacher level", corrected)[:, 0]
        teacher_level = config.distillation_log_sigma_mean + config.distillation_log_sigma_std * law
    if config.text_noise > 0:
        blur = rng.normal(condition.shape[1:], config.seed, "text noise", positions)
        condition = blur_condition(condition, blur, config.text_noise)
    noise = rng.normal((noise_size,), config.seed, "gan noise", positions)
    return Batch(images, condition, noise, chances, text, teacher_noise, teacher_level)


def portion(count: int, share: float) -> int:
    """How many of `count` drawings a share is, at least one."""
    return max(1, int(share * count))


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What variety and overfitting are measured on: held-out photos and their first wordings (reals, condition), as
    many train photos and theirs, fixed noise, and eight seeds each for the first 32 prompts; view_noise and log_sigma
    as a batch's."""

    reals: torch.Tensor
    condition: torch.Tensor
    train: torch.Tensor
    train_condition: torch.Tensor
    noise: torch.Tensor
    repeated_noise: torch.Tensor
    view_noise: torch.Tensor
    log_sigma: torch.Tensor


def held_out_set(
    held_out: EncodedProducts,
    train: EncodedProducts,
    config: GanConfig,
    length: int,
    noise_size: int,
    adversary: Adversary,
) -> HeldOut:
    count = min(len(held_out), len(train))
    chosen = rng.permutation(len(train), config.seed, "measured train photos")[:count].tolist()
    indices = list(range(count))
    reals = images_of(held_out, indices, config.space)
    return HeldOut(
        reals,
        held_out.conditions([(i, 0) for i in indices], length),
        images_of(train, chosen, config.space),
        train.conditions([(i, 0) for i in chosen], length),
        rng.normal((noise_size,), config.seed, "held-out noise", indices),
        rng.normal((noise_size,), config.seed, "repeated noise", range(8 * min(32, count))),
        *adversary.view_noise(reals.shape[1:], indices),
    )


def drawn(generator: torch.nn.Module, noise: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """What the generator draws, in parts, float32 on the CPU."""
    device = next(generator.parameters()).device
    parts = zip(noise.split(64), condition.split(64), strict=True)
    return torch.cat([generator(z.to(device), c.to(device)).float().cpu() for z, c in parts])


@torch.no_grad()
def measure(generator: torch.nn.Module, adversary: Adversary, data: HeldOut) -> tuple[Variety, float]:
    """Variety of what the generator draws, and the discriminator's r_v, in the caller's precision."""
    critic, view = adversary.critic, adversary.view
    device = next(critic.parameters()).device
    fakes = drawn(generator, data.noise, data.condition)
    prompts = len(data.repeated_noise) // 8
    repeated = drawn(generator, data.repeated_noise, data.condition[:prompts].repeat_interleave(8, 0))

    def scores(images: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        found = []
        for i in range(0, len(images), 64):
            x, noise, level = (part[i : i + 64].to(device) for part in (images, data.view_noise, data.log_sigma))
            found.append(critic(view(x, noise, level), condition[i : i + 64].to(device)).scores[0].cpu())
        return torch.cat(found)

    ratio = overfitting_ratio(
        scores(data.train, data.train_condition), scores(data.reals, data.condition), scores(fakes, data.condition)
    )
    fakes, repeated, reals = (images * view.weights.cpu() for images in (fakes, repeated, data.reals))
    return measure_variety(fakes, repeated.unflatten(0, (prompts, 8)), reals), ratio


def fellow(flag: str, name: str, config: GanConfig, vae: ProductAutoencoder, encoder: TextEncoder) -> Any:
    """The diffusion model `name`, given by `flag`, on the CPU.

    Raises:
        ModelMismatchError: no diffusion model of gigdiff's, or one on other latents or another text encoder.
    """
    drawing = fellow_model(flag, name, vae, f"--vae_name_or_path {config.vae_name_or_path}")
    if drawing.text_encoder.fingerprint != encoder.fingerprint:
        raise ModelMismatchError(f"{flag} {name} reads another text encoder than --text_encoder {config.text_encoder}")
    return drawing


def teacher_of(config: GanConfig, drawing: DiffusionGenerator, device: torch.device) -> Teacher:
    """The guided UNet of `drawing`."""
    scale = config.distillation_guidance_scale
    scale = drawing.capabilities.default_guidance if scale is None else scale
    unet, empty, table = frozen_unet(drawing, config.mixed_precision, device)
    return Teacher(unet, empty, scale, table)


def start_from(run: str, generator: torch.nn.Module, adversary: Adversary) -> None:
    """Averaged generator and discriminator of another run, or a model's generator; residual blocks that it lacks start
    as the identity.

    Raises:
        InputError: there is neither. ModelMismatchError: they differ in more than the generator's blocks.
    """
    what, folder = f"--init_from {run}", folder_of(run) if run in EMBEDDED else Path(run)
    weights = folder / "generator" / "diffusion_pytorch_model.safetensors"
    found = folder if (folder / "state.json").is_file() else find_checkpoint("latest", folder)
    if found is None and not weights.is_file():
        raise InputError(
            f"{what}: no checkpoint there; give a run folder of train_gan.py, one of its checkpoints, or a GAN's folder"
        )
    try:
        if found is None:
            averaged = load_file(weights)
        else:
            _, tensors = load_checkpoint(found)
            adversary.critic.load_state_dict(tensors["discriminator"])
            averaged = tensors["generator"] | tensors["ema"]
        lacking, unknown = generator.load_state_dict(averaged, strict=False)
    except (RuntimeError, KeyError) as error:
        raise ModelMismatchError(f"{what} is of other networks: {str(error)[:300]}") from error
    if unknown or not all(name.startswith("levels.") for name in lacking):
        raise ModelMismatchError(f"{what} is of another generator: {', '.join([*unknown, *lacking][:4])} differ")
    for name, parameter in generator.named_parameters():
        if name in lacking and name.endswith(".gain"):  # a convolutional block's last weights are zeros already
            torch.nn.init.zeros_(parameter)


def gigaflops(model: torch.nn.Module, *inputs: torch.Tensor) -> float:
    """GFLOP of one forward pass of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() / 1e9


def main(argv: list[str] | None = None) -> None:
    config = parse_config(GanConfig, __doc__.splitlines()[0], argv)  # type: ignore[union-attr]
    check_size("--height", config.height)
    check_size("--width", config.width)
    config.check()
    settings = AdversarySettings.of(config)
    out = Path(config.output_dir)
    config = dataclasses.replace(config, mixed_precision=training_precision(config.mixed_precision))
    accelerator = start_accelerator(config.mixed_precision, config.report_to, out)
    device, main_process = accelerator.device, accelerator.is_main_process
    processes, process = accelerator.num_processes, accelerator.process_index

    vae = None
    if config.space == "latent":
        vae = load_autoencoder(config.vae_name_or_path).to(device, memory_format=torch.channels_last)
    encoder: TextEncoder = load_text_encoder(config.text_encoder, str(device))
    train, held_out = encoded_splits(
        config,
        vae,
        encoder,
        accelerator,
        size=(config.height, config.width),
        captions_seed=config.captions_seed,
        attributes_only=config.condition_on == "attributes",
    )
    length = encoder.max_length

    if vae is None:
        shape = {"channels": 3, "height": config.height, "width": config.width, "fold": PIXEL_FOLD}
    else:
        channels = vae.config["latent_channels"]
        shape = {"channels": channels, "height": config.height // 8, "width": config.width // 8, "fold": 1}
    torch.manual_seed(rng.derive_seed(config.seed, "initialisation"))
    generator = GENERATORS[config.generator](
        **shape,
        widths=config.generator_widths,
        blocks=config.generator_blocks,
        text_dim=encoder.dim,
        noise_dim=config.noise_dim,
        style_dim=config.style_dim,
    )
    features = None
    if vae is not None and config.discriminator == "diffusion":
        seeing = fellow("--discriminator_model", config.discriminator_model, config, vae, encoder)
        features = diffusion_features(seeing, config.mixed_precision, device)
    teacher = None
    if vae is not None and config.distillation_weight > 0:
        telling = fellow("--distillation_model", config.distillation_model, config, vae, encoder)
        teacher = teacher_of(config, telling, device)
    view = view_of(vae, held_out, features, device)
    adversary = Adversary(
        settings,
        view,
        size=(shape["height"], shape["width"]),
        fold=shape["fold"],
        text_dim=encoder.dim,
        accelerator=accelerator,
    )
    noise_size: int = generator.noise_size
    if config.init_from is not None:
        start_from(config.init_from, generator, adversary)
    measured = held_out_set(held_out, train, config, length, noise_size, adversary)
    flops = {
        "generator": gigaflops(generator, measured.noise[:1], measured.condition[:1]),
        "discriminator": gigaflops(
            adversary.critic,
            torch.zeros(1, view.channels, *measured.reals.shape[2:], device=device),
            measured.condition[:1].to(device),
        ),
    }
    # Channels last is what the CPU's and the tensor cores' convolutions want.
    generator = generator.to(device, memory_format=torch.channels_last)
    ema = Ema(generator, config.ema_decay)
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.learning_rate, betas=betas, fused=True)
    watch = CollapseWatch(
        config.collapse_diversity, config.collapse_prompt_diversity, grace_steps=config.collapse_grace_steps
    )
    checkpoint = find_checkpoint(config.resume_from_checkpoint, out)
    first_step = 0
    if checkpoint is not None:
        first_step, tensors = restore_training(checkpoint, "generator", generator, ema, optimizer)
        try:
            adversary.load(tensors)
            watch.load(tensors["watch"])
        except (RuntimeError, KeyError) as error:
            raise ModelMismatchError(
                f"{checkpoint} is of another discriminator: {str(error)[:300]} Start with another --output_dir, or "
                "with the settings in the run's config.yaml."
            ) from error
    wrapped, optimizer = accelerator.prepare(generator, optimizer)
    adversary.prepare()

    stop = StopSignal().install()
    if main_process:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
        sizes = {
            name: sum(p.numel() for p in m.parameters()) for name, m in (("G", generator), ("D", adversary.critic))
        }
        print(
            f"generator {sizes['G'] / 1e6:.1f} M parameters, {flops['generator']:.2f} GFLOP a pass; discriminator "
            f"{sizes['D'] / 1e6:.1f} M, {flops['discriminator']:.2f}; {len(train):,} photos; {config.loss} with "
            f"{settings.penalty_kind}",
            file=sys.stderr,
            flush=True,
        )
    log = JsonLines(out / "log.jsonl", first_step) if main_process else None
    accelerator.init_trackers("logs")

    def averaged() -> torch.nn.Module:
        with ema.applied_to(generator):
            return copy.deepcopy(generator)

    def card(step: int) -> dict[str, Any]:
        return {
            "family": "gan",
            "text_encoder": config.text_encoder,
            "space": config.space,
            "latent_space": None if vae is None else latent_space_of(vae),
            "height": config.height,
            "width": config.width,
            "truncation": config.truncation,
            "parameters": sum(p.numel() for m in (generator, vae) if m is not None for p in m.parameters()),
            "trained_steps": step,
            "trained_images": step * config.train_batch_size * processes,
        }

    def save(step: int) -> None:
        tensors = {
            "generator": dict(generator.state_dict()),
            "ema": ema.shadow,
            "optimizer": optimizer_tensors(optimizer.optimizer),
            "watch": watch.tensors(),
        } | adversary.tensors()
        state = {"ema_updates": ema.updates, "config": dataclasses.asdict(config)}
        save_checkpoint(out, step, tensors, state, limit=config.checkpoints_total_limit)

    def load_batch(step: int) -> Batch:
        positions = positions_of_step(step, config.train_batch_size, process, processes)
        return make_batch(train, positions, step, config, length, noise_size, adversary)

    started, images_done = time.monotonic(), 0
    steps = range(first_step, config.max_train_steps)
    for step, batch in prefetched(steps, load_batch, workers=config.dataloader_num_workers):
        batch = batch.to(device)
        rates = [
            learning_rate(
                step,
                peak=peak,
                warmup_steps=config.lr_warmup_steps,
                total_steps=config.max_train_steps,
                decay_fraction=config.lr_decay_fraction,
            )
            for peak in (config.learning_rate, config.discriminator_learning_rate)
        ]
        set_learning_rate(optimizer, rates[0])
        # One drawing serves both players: the discriminator learns on it, then the generator by the new discriminator.
        # A quarter of the captions is drawn a second time, with a neighbour's noise.
        count = len(batch.images)
        twice = portion(count, 0.25) if config.diversity_weight > 0 else 0
        noise = torch.cat([batch.noise, batch.noise.roll(1, 0)[:twice]])
        fake, again = wrapped(noise, torch.cat([batch.condition, batch.condition[:twice]])).split([count, twice])

        looks = adversary.look(batch.images, fake, batch.chances)
        values = adversary.learn(looks, batch.condition, batch.chances, step, rates[1])
        total, more = adversary.judge(looks, batch.condition, batch.chances)
        values |= {"loss": more["adversarial_loss"], "contrast_fake": more["contrast_fake"]}
        if twice:
            alike = gan_losses.diversity_loss(
                *(view.weights * images for images in (fake[:twice], again, batch.images)), config.diversity_target
            )
            values["too_alike"] = alike.item()
            total = total + config.diversity_weight * alike
        if teacher is not None:
            part = fake[: len(batch.text)]
            with accelerator.autocast():
                moved = teacher.correction(part, batch.teacher_noise, batch.teacher_level, batch.text, view.weights)
            correction = moved.mean()
            values["correction"] = correction.item()
            total = total + config.distillation_weight * correction
        check_finite(total.item(), step, rates[0])
        accelerator.backward(total)
        norm = accelerator.clip_grad_norm_(generator.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(generator)
        images_done += count * processes

        done = step + 1
        values |= {
            "learning_rate": rates[0],
            "grad_norm": float(norm),
            "images_per_second": images_done / (time.monotonic() - started),
        }
        last = done == config.max_train_steps
        if main_process and (done % config.validation_steps == 0 or last):
            with ema.applied_to(generator), accelerator.autocast():
                variety, values["r_v"] = measure(generator, adversary, measured)
            before = watch.collapsed
            best = watch.see(done, variety)
            values |= dataclasses.asdict(variety) | {"collapsed": float(watch.collapsed)}
            if best:
                save_one_pass(out / "best", averaged(), vae, card(done))
            if watch.collapsed and not before:
                print(watch.message(done, variety), file=sys.stderr, flush=True)
            print(
                f"step {done}: {json.dumps({k: round(v, 5) for k, v in values.items()})}", file=sys.stderr, flush=True
            )
        if main_process and (done % config.preview_steps == 0 or last):
            drawing = OnePassGenerator(
                averaged(),
                vae,
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
        if stop.requested or (config.stop_on_collapse and watch.collapsed):
            why = "stopped" if stop.requested else "collapsed and stopped"
            print(f"{why} at step {done}; continue with --resume_from_checkpoint latest", file=sys.stderr)
            break
    else:
        if main_process:
            if not watch.collapsed or watch.best_step == 0:
                save_one_pass(out / "model", averaged(), vae, card(config.max_train_steps))
            summary = {
                "model": str(out / ("model" if (out / "model").is_dir() else "best")),
                "steps": config.max_train_steps,
                "collapsed": watch.collapsed,
                "best_step": watch.best_step,
            }
            print(json.dumps(summary))
    accelerator.end_training()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main()
    except GigdiffError as error:
        sys.exit(f"error: {error}")
