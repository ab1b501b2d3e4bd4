"""Distil a latent diffusion model into a student that draws in 1, 2 or 4 steps, with guidance baked in.

    accelerate launch training/distill.py --config configs/distill_mini.yaml

The student starts as a copy of the teacher. Five terms, each with its weight, teach it to get from a noisy photo at
one of a few knots of the noise schedule to a clean one:

`--guidance_weight`: what the guided teacher says at the same knot, in one pass instead of two (Meng et al. 2023, arXiv
2210.03142, section 3.1). The student keeps the teacher's solver, whose steps fall on the knots.

`--path_weight`: progressive distillation (Salimans and Ho 2022, arXiv 2202.00512) along whole paths. The guided
teacher draws from noise, `--path_steps` steps from a knot to the next, and at every knot the student learns what leads
from there to the next in one step: of DDIM, with whose scheduler it is saved.

`--consistency_weight`: consistency distillation (Song et al. 2023, arXiv 2303.01469; Luo et al. 2023, arXiv
2310.04378). The guided teacher takes one second-order solver step to the next knot, and the student is trained to give
at the first knot what it gives, now, at the second: the clean end of the path. Nearest to clean the teacher's own point
is the target. Without a guidance term the student is saved with diffusers' LCMScheduler, whose steps fall on the knots.

`--adversarial_weight`: latent adversarial distillation (Sauer et al. 2024, arXiv 2403.12015). What the student gives at
the `--adversarial_knots` noisiest knots is judged against the photo by a discriminator that looks through frozen
features of the teacher's UNet, the one of train_gan.py with `--discriminator diffusion`.

`--distribution_weight`: distribution matching (Yin et al. 2023, arXiv 2311.18828; `gigdiff.fit.distribution`).
What the student draws is noised, and moved by what the guided teacher and a network that knows the student's drawings
say of it differently. At the noisiest knot the student then starts from noise alone, as in drawing; and it does so
whenever that is its only one.

With `--unet_of` and `--rank` the student is a LoRA over an embedded model's UNet. To make one of a student that was
trained whole, start from that (`--student`) and go on with its terms: the nearest weights of that rank alone would keep
less of it. For terms that take long, give it as the teacher too, with `--guidance_weight 1 --guidance_scale 1`: the
LoRA then learns what it draws.

The student draws at guidance 1.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, LCMScheduler, UNet2DConditionModel

from gigdiff import rng
from gigdiff.attention import set_attention
from gigdiff.consistency import (
    clean_between,
    consistency_target,
    huber,
    knot_timesteps,
    path_levels,
    path_points,
    solver_step,
)
from gigdiff.data.encoded import EncodedProducts
from gigdiff.diffusion import add_noise, alpha_beta, clean_from_velocity, log_sigmas
from gigdiff.errors import GigdiffError, InputError, ModelMismatchError
from gigdiff.fit.adversary import Adversary, AdversarySettings, Chances, diffusion_features, view_of
from gigdiff.fit.checkpoint import find_checkpoint, optimizer_tensors, restore_training, save_checkpoint
from gigdiff.fit.collapse import coarse_frechet
from gigdiff.fit.config import as_yaml, parse_config
from gigdiff.fit.distribution import DistributionMatching, NoiseDraws
from gigdiff.fit.ema import Ema
from gigdiff.fit.layers import lighten
from gigdiff.fit.low_rank import LowRankDifference
from gigdiff.fit.order import positions_of_step, samples_at
from gigdiff.fit.preview import save_preview
from gigdiff.fit.run import JsonLines, StopSignal, check_finite, prefetched, records_graphs, start_accelerator
from gigdiff.fit.schedule import learning_rate, set_learning_rate
from gigdiff.fit.splits import encoded_splits
from gigdiff.fit.teacher import Teacher, fellow_model, recorded_unet, velocity_of
from gigdiff.generators.diffusion import DiffusionGenerator, save_folder
from gigdiff.generators.loading import load
from gigdiff.generators.shared_vae import latent_space_of
from gigdiff.precision import autocast_dtype, training_precision
from gigdiff.pretrained import card as card_of

TERMS = ("guidance", "path", "consistency", "adversarial", "distribution")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Keys of configs/distill_*.yaml.

    Args:
        teacher: the model to distil: an embedded model's name or a folder of train_diffusion.py (v-prediction).
        student: the model whose UNet the student starts as; none = the teacher.
        unet_of: an embedded model over whose UNet the student is to be a LoRA (package_model.py's flag), with rank.
        rank: of that LoRA, which alone is trained; none = the whole UNet.
        train_data_dir: folder of photos (imagefolder or Parquet); or use dataset_name.
        dataset_name: hub id of a dataset.
        train_split: split to train on.
        validation_split: split of the held-out measures.
        output_dir: run folder: checkpoints, log.jsonl, previews/, model/.
        cache_dir: where latents and text embeddings are kept between runs.
        guidance_scale: the teacher's guidance, which the student learns; none = the teacher's own default.
        knots: noise levels that the student knows, in equal steps of time; it can draw in any divisor of it.
        guidance_weight: weight of the squared error to the guided teacher's velocity; 0 is off.
        path_weight: weight of the squared error to what leads along the guided teacher's own paths; 0 is off. The knots
            of a path share a batch: train_batch_size and num_validation_images count images at all of them.
        path_steps: the teacher's steps on such a path, from a knot to the next.
        consistency_weight: weight of the consistency distance; 0 is off.
        adversarial_weight: weight of the discriminator's judgement; 0 is off.
        adversarial_knots: how many knots it judges, the noisiest first; half the photos are at these then, the other
            half at the others. By default all.
        distribution_weight: weight of distribution matching; 0 is off.
        distribution_updates: of the network that knows the student's drawings, a step.
        distribution_warmup_steps: so many steps at first it learns alone, and the student stays as it is.
        distribution_learning_rate: its own peak; it has no warm-up, so that it is ahead of the student.
        discriminator_widths: channels of the discriminator's levels, coarsest first.
        discriminator_blocks: residual blocks of each.
        discriminator_learning_rate: peak of the discriminator's schedule, which has no warm-up.
        discriminator_log_sigma_mean: mean of the normal law of the log noise levels that it looks at latents through.
        discriminator_log_sigma_std: its standard deviation.
        penalty_weight: its gradient penalty (R1 + R2), averaged over steps.
        penalty_interval: take it every so many steps, times as strong.
        penalty_noise: standard deviation of the finite difference's noise.
        mismatch_weight: share of its fakes that are photos with another product's text.
        contrastive_weight: weight of finding each image's text among the batch's.
        captions_per_image: wordings of each product; each epoch uses the next.
        captions_seed: of the wordings; none = seed. A run on cached encodings takes theirs.
        train_batch_size: images a step and process.
        dataloader_num_workers: processes that prepare batches; 0 is a thread. A GPU is faster than one of either.
        cuda_graphs: record networks' passes as CUDA graphs, on one GPU: small ones take longer to launch than to run.
        max_train_steps: optimizer steps in all.
        learning_rate: peak of the schedule.
        lr_warmup_steps: linear warm-up.
        lr_decay_fraction: last part of the run that decays by a cosine.
        adam_beta1: momentum, of AdamW and of the discriminator's Adam; none = 0.9, and 0 with a discriminator.
        adam_beta2: second moment decay of both.
        adam_weight_decay: AdamW's weight decay.
        max_grad_norm: gradient clipping.
        ema_decay: decay of the averaged weights, which are what is validated and saved.
        attention: attention backend, see gigdiff.attention.
        mixed_precision: "no", "bf16", "fp16" (CUDA only), or "auto": bf16 where the device computes in it, else no.
        seed: of data order, wordings and noise.
        checkpointing_steps: save every so many steps.
        checkpoints_total_limit: how many checkpoints to keep.
        resume_from_checkpoint: "latest" or a checkpoint folder.
        validation_steps: measure on held-out photos every so many steps.
        num_validation_images: how many of them.
        preview_steps: draw the validation prompts every so many steps.
        validation_prompts: what is drawn, in 1, 2 and 4 steps.
        num_inference_steps: the saved model's default.
        report_to: tracker of Accelerate, "tensorboard" or "none".
        max_train_samples: use only the first so many photos.
    """

    teacher: str = "mini"
    student: str | None = None
    unet_of: str | None = None
    rank: int | None = None
    train_data_dir: str | None = None
    dataset_name: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    output_dir: str = "runs/distill"
    cache_dir: str = "cache"
    guidance_scale: float | None = None
    knots: int = 8
    guidance_weight: float = 0.0
    path_weight: float = 0.0
    path_steps: int = 2
    consistency_weight: float = 1.0
    adversarial_weight: float = 0.0
    adversarial_knots: int | None = None
    distribution_weight: float = 0.0
    distribution_updates: int = 5
    distribution_warmup_steps: int = 50
    distribution_learning_rate: float = 1e-4
    discriminator_widths: tuple[int, ...] = (192, 192)
    discriminator_blocks: tuple[int, ...] = (1, 1)
    discriminator_learning_rate: float = 3e-4
    discriminator_log_sigma_mean: float = -1.0
    discriminator_log_sigma_std: float = 1.2
    penalty_weight: float = 1.0
    penalty_interval: int = 4
    penalty_noise: float = 0.2
    mismatch_weight: float = 0.5
    contrastive_weight: float = 0.5
    captions_per_image: int = 5
    captions_seed: int | None = None
    train_batch_size: int = 32
    dataloader_num_workers: int = 0
    cuda_graphs: bool = True
    max_train_steps: int = 2000
    learning_rate: float = 2e-4
    lr_warmup_steps: int = 50
    lr_decay_fraction: float = 0.4
    adam_beta1: float | None = None
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.99
    attention: str = "auto"
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    seed: int = 0
    checkpointing_steps: int = 200
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    validation_steps: int = 200
    num_validation_images: int = 64
    preview_steps: int = 400
    validation_prompts: tuple[str, ...] = (
        "red wool coat",
        "yellow summer dress",
        "brown leather belt",
        "black leather handbag",
        "blue jeans",
        "white sneakers",
        "silver watch for men",
        "green t-shirt",
    )
    num_inference_steps: int = 4
    report_to: str = "tensorboard"
    max_train_samples: int | None = None

    @property
    def shared_by(self) -> int:
        """How many samples in turn have one photo, text and noise: a path's knots; else each has its own."""
        return self.knots if self.path_weight > 0 else 1


@dataclasses.dataclass(frozen=True)
class Batch:
    """Latents (N, C, h, w), conditions (N, 1 + L, D), noise like latents, knot (N,) in 1 to the config's `knots`."""

    latents: torch.Tensor
    condition: torch.Tensor
    noise: torch.Tensor
    knot: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, f.name).to(device) for f in dataclasses.fields(self)))

    def part(self, chosen: torch.Tensor) -> Batch:
        """The samples of the indices `chosen`."""
        return Batch(*(getattr(self, f.name)[chosen] for f in dataclasses.fields(self)))


def make_batch(data: EncodedProducts, positions: range, config: DistillConfig, length: int) -> Batch:
    """The samples at `positions` of the endless stream; each depends on (seed, position) alone.

    Knots go round with the position, so that every step sees all of them alike; where a discriminator judges some only,
    every other position is at one of these. On paths the positions of a round share what is sampled.
    """
    sampled = range(positions.start // config.shared_by, positions.stop // config.shared_by)
    indices = samples_at(sampled, len(data), config.seed)
    latents = data.latents(indices)
    noise = rng.normal(latents.shape[1:], config.seed, "distillation noise", sampled)
    judged = config.adversarial_knots
    if judged is None:
        knot = torch.tensor([1 + position % config.knots for position in positions])
    else:
        others = config.knots - judged
        knot = torch.tensor([others + 1 + p // 2 % judged if p % 2 else 1 + p // 2 % others for p in positions])
    choices = [(index, position // len(data)) for index, position in zip(indices, sampled, strict=True)]
    shared = (latents, data.conditions(choices, length), noise)
    return Batch(*(x.repeat_interleave(config.shared_by, 0) for x in shared), knot)


class Distillation:
    """The teacher and what is asked of the student.

    Args:
        teacher: whom it learns from. timesteps: of the knots (knots + 1,). levels: log sigma there.
    """

    def __init__(self, teacher: Teacher, timesteps: torch.Tensor) -> None:
        self.teacher, self.timesteps = teacher, timesteps
        self.levels = teacher.table[timesteps]

    def clean(self, student: Any, z: torch.Tensor, knot: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """The student's f: noisy latents at their knots -> clean ones (N, C, h, w), float32."""
        v = velocity_of(student, z, self.timesteps[knot], condition)
        return clean_from_velocity(z, v, self.levels[knot])

    def noisy(self, batch: Batch, from_noise: bool = False) -> torch.Tensor:
        """The batch's photos at their knots, (N, C, h, w); `from_noise`: nothing of them is left at the noisiest."""
        z = add_noise(batch.latents, batch.noise, self.levels[batch.knot])
        if not from_noise:
            return z
        noisiest = (batch.knot == len(self.levels) - 1).view(-1, *[1] * (z.ndim - 1))
        return torch.where(noisiest, batch.noise, z)

    def guidance_loss(self, made: torch.Tensor, z: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(N,): squared error of `made`, the student's clean ends from `z`, to the guided teacher's, as velocities."""
        with torch.no_grad():
            ends = self.teacher.clean(batch.condition)(z, self.levels[batch.knot])
        return self.velocity_error(made, ends, batch.knot)

    def velocity_error(self, made: torch.Tensor, ends: torch.Tensor, knot: torch.Tensor) -> torch.Tensor:
        """(N,): squared error of clean latents `made` to `ends`, as velocities: x = alpha z - beta v."""
        return ((made - ends) / alpha_beta(self.levels[knot], made)[1]).square().flatten(1).mean(1)

    @torch.no_grad()
    def along_paths(self, batch: Batch, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Points of the guided teacher's paths at the batch's knots, and the clean estimates that lead to the next.

        batch: rounds of the knots from 1, each of one text and noise. steps: of the teacher, from a knot to the next.

        Returns:
            Both (N, C, h, w).
        """
        knots = len(self.levels) - 1
        one = batch.part((batch.knot == knots).nonzero()[:, 0])
        levels = path_levels(self.teacher.table, knots * steps)
        points = path_points(self.teacher.clean(one.condition), one.noise, levels)[::steps]
        z, nearer = (x.flip(0).transpose(0, 1).flatten(0, 1) for x in (points[:-1], points[1:]))
        next_levels = torch.where(batch.knot == 1, -torch.inf, self.levels[batch.knot - 1])
        return z, clean_between(z, nearer, self.levels[batch.knot], next_levels)

    def consistency_loss(self, made: torch.Tensor, target_of: Any, z: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(N,): how far `made`, the student's ends from `z`, lie from those by way of the next knot.

        target_of: the student that gives the ends there.
        """
        target = consistency_target(
            lambda z, knot: self.clean(target_of, z, knot, batch.condition),
            self.teacher.clean(batch.condition),
            z,
            batch.knot,
            self.levels,
        )
        return huber(made, target)

    def path_end(self, noise: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Where the guided teacher's path from the noisiest knot ends (N, C, h, w), by a solver step a knot."""
        z = noise
        for knot in range(len(self.levels) - 1, 0, -1):
            here, there = (self.levels[k].expand(len(z)) for k in (knot, knot - 1))
            z = solver_step(self.teacher.clean(condition), z, here, there)
        return z * (1 + (2 * self.levels[0]).exp()).sqrt()


def schedulers_of(teacher: Any, knots: int) -> tuple[DDIMScheduler, LCMScheduler]:
    """The teacher's noise schedule, sampled at the knots: by DDIM; and by x, then noise of the next level (LCM)."""
    kept = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps")
    config = {k: v for k, v in teacher.config.items() if k in kept}
    config |= {"prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": True}
    return (
        DDIMScheduler.from_config(config, timestep_spacing="trailing"),
        LCMScheduler.from_config(config, original_inference_steps=knots),
    )


def main(argv: list[str] | None = None) -> None:
    config = parse_config(DistillConfig, __doc__.splitlines()[0], argv)  # type: ignore[union-attr]
    if config.knots % config.num_inference_steps:
        raise InputError(f"--num_inference_steps {config.num_inference_steps} must divide --knots {config.knots}")
    terms = [name for name in TERMS if getattr(config, f"{name}_weight") > 0]
    if not terms:
        raise InputError(f"{', '.join(f'--{name}_weight' for name in TERMS)} are all 0: nothing to learn")
    if config.distribution_weight > 0 and config.distribution_updates < 1:
        raise InputError(f"--distribution_updates {config.distribution_updates}: at least 1, 5 in the paper")
    if (config.rank is None) != (config.unet_of is None) or (config.rank is not None and config.rank < 1):
        raise InputError(
            f"--rank {config.rank} and --unet_of {config.unet_of}: a LoRA needs both, a rank of 1 or more and the "
            "model whose UNet it is for; leave both out to train the whole UNet"
        )
    judged = config.adversarial_knots
    if judged is not None and not (config.adversarial_weight > 0 and 0 < judged < config.knots):
        raise InputError(
            f"--adversarial_knots {judged} needs --adversarial_weight above 0 and a number from 1 to below --knots "
            f"{config.knots}; leave it out to have all judged"
        )
    if config.path_weight > 0 and judged is not None:
        raise InputError(f"--path_weight has all knots alike: leave --adversarial_knots {judged} out")
    for flag in ("train_batch_size", "num_validation_images"):
        if getattr(config, flag) % config.shared_by:
            raise InputError(
                f"--{flag} {getattr(config, flag)} must be a multiple of --knots {config.knots}: with "
                "--path_weight it counts images at all knots of a path"
            )
    beta1 = config.adam_beta1
    if beta1 is None:
        beta1 = 0.0 if config.adversarial_weight > 0 else 0.9
    out = Path(config.output_dir)
    config = dataclasses.replace(config, mixed_precision=training_precision(config.mixed_precision), adam_beta1=beta1)
    settings = AdversarySettings.of(config) if config.adversarial_weight > 0 else None
    accelerator = start_accelerator(config.mixed_precision, config.report_to, out)
    device, main_process = accelerator.device, accelerator.is_main_process
    processes, process = accelerator.num_processes, accelerator.process_index

    drawing = load(config.teacher, device=device)
    if not isinstance(drawing, DiffusionGenerator) or drawing.scheduler.config["prediction_type"] != "v_prediction":
        raise ModelMismatchError(
            f"--teacher {config.teacher} is no v-prediction model of training/train_diffusion.py: give such a folder, "
            'or "mini"'
        )
    vae, encoder = drawing.vae, drawing.text_encoder
    (height, width), length = drawing.capabilities.default_size, encoder.max_length
    scale = drawing.capabilities.default_guidance if config.guidance_scale is None else config.guidance_scale
    train, held_out = encoded_splits(
        config, vae, encoder, accelerator, size=(height, width), captions_seed=config.captions_seed
    )

    teacher = drawing.unet.requires_grad_(False)
    # The generator chose for the precision that it draws in; some kernels can't do training's.
    set_attention(teacher, "auto", dtype=autocast_dtype(config.mixed_precision))

    def fellow_unet(flag: str, name: str) -> UNet2DConditionModel:
        unet: UNet2DConditionModel = fellow_model(flag, name, vae, "--teacher").unet
        if unet.config["block_out_channels"] != teacher.config["block_out_channels"]:
            raise ModelMismatchError(f"{flag} {name} is a UNet of other sizes than --teacher {config.teacher}")
        return unet

    start = teacher if config.student is None else fellow_unet("--student", config.student)
    student: UNet2DConditionModel = copy.deepcopy(start).to(device).requires_grad_(True).train()
    if device.type == "cpu":
        lighten(student)
    chosen = set_attention(student, config.attention, training=True, dtype=autocast_dtype(config.mixed_precision))
    # With the guidance term the student stands in for the teacher, in its solver; along paths its steps are DDIM's;
    # else it jumps to the end and back, which from a single knot is what a solver does too.
    stepping, jumping = schedulers_of(drawing.scheduler, config.knots)
    if config.path_weight > 0:
        scheduler = stepping
    else:
        scheduler = drawing.scheduler if config.guidance_weight > 0 or config.knots == 1 else jumping
    timesteps = knot_timesteps(config.knots, scheduler.config["num_train_timesteps"]).to(device)
    table = log_sigmas(jumping.alphas_cumprod).to(device)
    task = Distillation(Teacher(teacher, train.conditions([None], length).to(device), scale, table), timesteps)
    low_rank = None
    if config.unet_of is not None and config.rank is not None:
        base = fellow_unet("--unet_of", config.unet_of)
        low_rank = LowRankDifference(student, base, config.rank, seed=config.seed)
    trained = student if low_rank is None else low_rank
    ema = Ema(trained, config.ema_decay)
    optimizer = torch.optim.AdamW(
        trained.parameters(),
        lr=config.learning_rate,
        betas=(beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        fused=True,
    )
    adversary = None
    if settings is not None:
        torch.manual_seed(rng.derive_seed(config.seed, "discriminator"))
        features = diffusion_features(drawing, config.mixed_precision, device)
        adversary = Adversary(
            settings,
            view_of(vae, held_out, features, device),
            size=(height // 8, width // 8),
            fold=1,
            text_dim=encoder.dim,
            accelerator=accelerator,
        )
    matching = None
    if config.distribution_weight > 0:
        matching = DistributionMatching(
            task.teacher,
            updates=config.distribution_updates,
            beta2=config.adam_beta2,
            max_grad_norm=config.max_grad_norm,
            attention=config.attention,
            mixed_precision=config.mixed_precision,
            accelerator=accelerator,
        )
    checkpoint = find_checkpoint(config.resume_from_checkpoint, out)
    first_step = 0
    if checkpoint is not None:
        first_step, tensors = restore_training(checkpoint, "unet", trained, ema, optimizer)
        if low_rank is not None:
            low_rank.write()
        if adversary is not None:
            if "discriminator" not in tensors:
                raise ModelMismatchError(f"{checkpoint} has no discriminator: it was made with --adversarial_weight 0")
            adversary.load(tensors)
        if matching is not None:
            if "fake_unet" not in tensors:
                raise ModelMismatchError(
                    f"{checkpoint} has no network of the student's drawings: it was made with --distribution_weight 0"
                )
            matching.load(tensors)
    recorded = None
    if records_graphs(config.cuda_graphs, accelerator):
        # Before Accelerate changes `forward`, and after the networks of `matching` are copied from the teacher.
        batch = make_batch(train, range(config.train_batch_size), config, length).to(device)
        example = (
            batch.noise.contiguous(memory_format=torch.channels_last), timesteps[batch.knot], batch.condition
        )  # fmt: skip
        precision = autocast_dtype(config.mixed_precision)
        if matching is not None:
            matching.record(tuple(x.clone() for x in example), precision)
        if adversary is not None:
            looked_at = len(batch.noise) if judged is None else len(batch.noise) // 2
            adversary.record(batch.noise[:looked_at], precision)
        rows = len(batch.noise) // config.shared_by
        task.teacher.record(batch.noise[:rows], batch.condition[:rows], precision)
        recorded = recorded_unet(student, example, precision)
    wrapped, optimizer = accelerator.prepare(student, optimizer)
    if adversary is not None:
        adversary.prepare()
    if matching is not None:
        matching.prepare()

    alone = matching is not None or config.knots == 1  # whether the noisiest knot is noise alone
    stop = StopSignal().install()
    if main_process:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
        print(
            f"{config.teacher} at guidance {scale:g}, {len(train):,} photos, {config.knots} knots, attention {chosen}",
            file=sys.stderr,
            flush=True,
        )
    log = JsonLines(out / "log.jsonl", first_step) if main_process else None
    accelerator.init_trackers("logs")

    whole_rounds = len(held_out) - len(held_out) % config.shared_by
    if whole_rounds == 0:
        raise InputError(
            f"{len(held_out)} held-out photos are fewer than --knots {config.knots}: a path needs one a knot"
        )
    fixed = make_batch(held_out, range(whole_rounds), dataclasses.replace(config, seed=config.seed + 1), length)
    fixed = fixed.to(device)
    weights = view_of(vae, held_out, None, device).weights
    with torch.no_grad(), accelerator.autocast():
        ends = task.path_end(fixed.noise, fixed.condition)
        spread = (ends - ends.mean(0)).square().mean()

    def starts(batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the student is given (N, C, h, w), and, of points on the teacher's paths, what leads along them."""
        if config.path_weight > 0:
            return task.along_paths(batch, config.path_steps)
        return task.noisy(batch, alone), None

    def regression(made: torch.Tensor, z: torch.Tensor, leading: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """The terms that have a target, with their weights; scalar."""
        loss = torch.zeros((), device=device)
        if leading is not None:
            loss = loss + config.path_weight * task.velocity_error(made, leading, batch.knot).mean()
        if config.guidance_weight > 0:  # where a drawing is judged it is not to be the mean of all that it might be
            rest = (batch.knot <= config.knots - (judged or 0)).nonzero()[:, 0]
            guided_loss = task.guidance_loss(made[rest], z[rest], batch.part(rest))
            loss = loss + config.guidance_weight * guided_loss.mean()
        if config.consistency_weight > 0:
            # The student's own latest weights give the target: an average lags behind in so short a training.
            loss = loss + config.consistency_weight * task.consistency_loss(made, student, z, batch).mean()
        return loss

    with accelerator.autocast():
        fixed_starts = starts(fixed)

    @contextlib.contextmanager
    def averaged_weights() -> Iterator[None]:
        """Inside the block the student carries the averaged weights."""
        with ema.applied_to(trained):
            if low_rank is not None:
                low_rank.write()
            yield
        if low_rank is not None:
            low_rank.write()

    @torch.no_grad()
    def measure() -> dict[str, float]:
        """Held-out loss; the one-step error: from pure noise to the end of the teacher's path, as a share of the ends'
        variance (1 = no better than the mean picture); and the `coarse_frechet` distance of these drawings from the
        photos, each channel as it shows."""
        student.eval()
        with averaged_weights(), accelerator.autocast():
            z, leading = fixed_starts
            loss = regression(task.clean(student, z, fixed.knot, fixed.condition), z, leading, fixed)
            noisiest = torch.full_like(fixed.knot, config.knots)
            made = task.clean(student, fixed.noise, noisiest, fixed.condition)
        student.train()
        return {
            "validation_loss": loss.item(),
            "validation_one_step_error": ((made - ends).square().mean() / spread).item(),
            "validation_distance": coarse_frechet(made * weights, fixed.latents * weights),
        }

    def averaged() -> UNet2DConditionModel:
        with averaged_weights():
            return copy.deepcopy(student)

    def preview(step: int) -> None:
        unet = averaged()
        for steps in (1, 2, 4):
            if config.knots % steps == 0:
                generator = DiffusionGenerator(
                    unet, vae, scheduler, encoder, name="preview", height=height, width=width,
                    num_inference_steps=steps, guidance_scale=1.0, device=device,
                )  # fmt: skip
                path = out / "previews" / f"step-{step:06d}-in-{steps}.png"
                save_preview(generator, config.validation_prompts, range(3), path)

    def save(step: int) -> None:
        tensors = {
            "unet": dict(trained.state_dict()),
            "ema": ema.shadow,
            "optimizer": optimizer_tensors(optimizer.optimizer),
        }
        if adversary is not None:
            tensors |= adversary.tensors()
        if matching is not None:
            tensors |= matching.tensors()
        state = {"ema_updates": ema.updates, "config": dataclasses.asdict(config)}
        save_checkpoint(out, step, tensors, state, limit=config.checkpoints_total_limit)

    def load_batch(step: int) -> tuple[Batch, torch.Tensor, Chances | None, NoiseDraws | None]:
        """A batch, the indices of what the discriminator judges of it, and the chances of the terms that have some."""
        positions = positions_of_step(step, config.train_batch_size, process, processes)
        batch = make_batch(train, positions, config, length)
        chosen = (batch.knot > config.knots - (judged or config.knots)).nonzero()[:, 0]
        chances = draws = None
        if adversary is not None:
            at = [positions[i] for i in chosen.tolist()]
            chances = adversary.chances(at, step, batch.latents.shape[1:], batch.condition[chosen])
        if matching is not None:
            shape, count = batch.latents.shape, len(task.teacher.table)
            draws = NoiseDraws.of(step, process, config.distribution_updates, shape, count, config.seed)
        return batch, chosen, chances, draws

    def rate_at(step: int, peak: float, warmup_steps: int) -> float:
        return learning_rate(
            step,
            peak=peak,
            warmup_steps=warmup_steps,
            total_steps=config.max_train_steps,
            decay_fraction=config.lr_decay_fraction,
        )

    started, images_done = time.monotonic(), 0
    steps = range(first_step, config.max_train_steps)
    for step, (batch, chosen, chances, draws) in prefetched(steps, load_batch, workers=config.dataloader_num_workers):
        rate = rate_at(step, config.learning_rate, config.lr_warmup_steps)
        set_learning_rate(optimizer, rate)
        batch = batch.to(device)
        values: dict[str, float] = {}
        with accelerator.autocast():
            z, leading = starts(batch)
            made = task.clean(recorded or wrapped, z, batch.knot, batch.condition)
            loss = regression(made, z, leading, batch)
        if adversary is not None and chances is not None:
            chances = chances.to(device)
            chosen = chosen.to(device)
            condition = batch.condition[chosen]
            looks = adversary.look(batch.latents[chosen], made[chosen], chances)
            critic_rate = rate_at(step, config.discriminator_learning_rate, 0)
            values |= adversary.learn(looks, condition, chances, step, critic_rate)
            fooled, more = adversary.judge(looks, condition, chances)
            values |= more
            loss = loss + config.adversarial_weight * fooled
        if matching is not None and draws is not None:
            draws = draws.to(device)
            values |= matching.learn(made, batch.condition, draws, rate_at(step, config.distribution_learning_rate, 0))
            matched = matching.loss(made, batch.condition, draws).mean()
            values["matching_loss"] = matched.item()
            loss = loss + config.distribution_weight * matched
        check_finite(loss.item(), step, rate)
        accelerator.backward(loss)
        if low_rank is not None:
            low_rank.take_gradients()
        norm = accelerator.clip_grad_norm_(trained.parameters(), config.max_grad_norm)
        if matching is None or step >= config.distribution_warmup_steps:
            optimizer.step()
            ema.update(trained)
            if low_rank is not None:
                low_rank.write()
        optimizer.zero_grad()
        images_done += len(batch.latents) * processes

        done = step + 1
        values |= {"loss": loss.item(), "learning_rate": rate, "grad_norm": float(norm)}
        values["images_per_second"] = images_done / (time.monotonic() - started)
        last = done == config.max_train_steps
        if main_process and (done % config.validation_steps == 0 or last):
            values |= measure()
            print(
                f"step {done}: {json.dumps({k: round(v, 5) for k, v in values.items()})}", file=sys.stderr, flush=True
            )
        if main_process and (done % config.preview_steps == 0 or last):
            preview(done)
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
            # A student's student was distilled from whom it was, with its guidance.
            of = {} if drawing.folder is None else card_of(drawing.folder)
            baked = of.get("baked_guidance", 1.0) if scale == 1.0 else scale
            card = {
                "family": "diffusion",
                "text_encoder": encoder.name,
                "height": height,
                "width": width,
                "num_inference_steps": config.num_inference_steps,
                "guidance_scale": 1.0,
                "guidance_interval": [0.0, None],
                "distilled_from": of.get("distilled_from", config.teacher),
                "baked_guidance": baked if terms != ["adversarial"] else 1.0,
                "latent_space": latent_space_of(vae),
                "parameters": sum(p.numel() for m in (student, vae) for p in m.parameters()),
                "trained_steps": config.max_train_steps,
                "trained_images": config.max_train_steps * config.train_batch_size * processes,
            }
            save_folder(out / "model", averaged(), vae, scheduler, card)
            print(json.dumps({"model": str(out / "model"), "steps": config.max_train_steps}))
    accelerator.end_training()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main()
    except GigdiffError as error:
        sys.exit(f"error: {error}")
