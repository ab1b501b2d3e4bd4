"""Distil a latent diffusion model into a student that draws in 1, 2 or 4 steps, with guidance baked in.

    accelerate launch training/distill.py --config configs/distill_mini.yaml

Consistency distillation (Song et al. 2023, arXiv 2303.01469; Luo et al. 2023, arXiv 2310.04378): the student starts as
a copy of the teacher. At one of a few knots of the noise schedule it sees a photo with noise; the guided teacher takes
one second-order solver step to the next knot; and the student is trained to give at the first knot what it gives, now,
at the second: the clean end of the path. Nearest to clean the teacher's own point is the target. The student is saved
with diffusers' LCMScheduler, whose steps fall on these knots, and draws at guidance 1.
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
from typing import Any, Literal

import torch
from diffusers import LCMScheduler, UNet2DConditionModel

from gigdiff import rng
from gigdiff.attention import set_attention
from gigdiff.consistency import consistency_distance, knot_timesteps, solver_step
from gigdiff.data.encoded import EncodedProducts
from gigdiff.diffusion import clean_from_velocity, guided, log_sigmas, timesteps_of
from gigdiff.errors import GigdiffError, InputError, ModelMismatchError
from gigdiff.fit.checkpoint import find_checkpoint, optimizer_tensors, restore_training, save_checkpoint
from gigdiff.fit.config import as_yaml, parse_config
from gigdiff.fit.ema import Ema
from gigdiff.fit.order import positions_of_step, samples_at
from gigdiff.fit.preview import save_preview
from gigdiff.fit.run import JsonLines, StopSignal, check_finite, prefetched, start_accelerator
from gigdiff.fit.schedule import learning_rate, set_learning_rate
from gigdiff.fit.splits import encoded_splits
from gigdiff.generators.diffusion import DiffusionGenerator, save_folder
from gigdiff.generators.loading import load
from gigdiff.generators.shared_vae import latent_space_of
from gigdiff.precision import autocast_dtype, training_precision


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Keys of configs/distill_*.yaml.

    Args:
        teacher: the model to distil: an embedded model's name or a folder of train_diffusion.py (v-prediction).
        train_data_dir: folder of photos (imagefolder or Parquet); or use dataset_name.
        dataset_name: hub id of a dataset.
        train_split: split to train on.
        validation_split: split of the held-out measures.
        output_dir: run folder: checkpoints, log.jsonl, previews/, model/.
        cache_dir: where latents and text embeddings are kept between runs.
        guidance_scale: the teacher's guidance, which the student learns; none = the teacher's own default.
        knots: noise levels that the student knows, in equal steps of time; it can draw in any divisor of it.
        captions_per_image: wordings of each product; each epoch uses the next.
        captions_seed: of the wordings; none = seed. A run on cached encodings takes theirs.
        train_batch_size: images a step and process.
        max_train_steps: optimizer steps in all.
        learning_rate: peak of the schedule.
        lr_warmup_steps: linear warm-up.
        lr_decay_fraction: last part of the run that decays by a cosine.
        adam_beta2: AdamW's second moment decay.
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
    train_data_dir: str | None = None
    dataset_name: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    output_dir: str = "runs/distill"
    cache_dir: str = "cache"
    guidance_scale: float | None = None
    knots: int = 8
    captions_per_image: int = 5
    captions_seed: int | None = None
    train_batch_size: int = 32
    max_train_steps: int = 2000
    learning_rate: float = 2e-4
    lr_warmup_steps: int = 50
    lr_decay_fraction: float = 0.4
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


@dataclasses.dataclass(frozen=True)
class Batch:
    """Latents (N, C, h, w), conditions (N, 1 + L, D), noise like latents, knot (N,) in 1 to the config's `knots`."""

    latents: torch.Tensor
    condition: torch.Tensor
    noise: torch.Tensor
    knot: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, f.name).to(device) for f in dataclasses.fields(self)))


def make_batch(data: EncodedProducts, positions: range, config: DistillConfig, length: int) -> Batch:
    """The samples at `positions` of the endless stream; each depends on (seed, position) alone.

    Knots go round with the position, so that every step sees all of them alike.
    """
    indices = samples_at(positions, len(data), config.seed)
    latents = data.latents(indices)
    noise = rng.normal(latents.shape[1:], config.seed, "distillation noise", positions)
    knot = torch.tensor([1 + position % config.knots for position in positions])
    choices = [(index, position // len(data)) for index, position in zip(indices, positions, strict=True)]
    return Batch(latents, data.conditions(choices, length), noise, knot)


class Distillation:
    """The teacher and what is asked of the student.

    Args:
        teacher: its UNet, frozen. empty: the empty prompt's condition (1, 1 + L, D), for guidance.
        levels: log sigma (knots + 1,) and timesteps: of the knots. table: `log_sigmas` of the schedule.
    """

    def __init__(
        self, teacher: Any, empty: torch.Tensor, guidance_scale: float, timesteps: torch.Tensor, table: torch.Tensor
    ) -> None:
        self.teacher, self.empty, self.scale = teacher, empty, guidance_scale
        self.timesteps, self.table = timesteps, table
        self.levels = table[timesteps]

    def clean(self, student: Any, z: torch.Tensor, knot: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """The student's f: noisy latents at their knots -> clean ones (N, C, h, w), float32."""
        v = _velocity(student, z, self.timesteps[knot], condition)
        return clean_from_velocity(z, v, self.levels[knot])

    def guided_clean(self, condition: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The guided teacher's estimate of the clean latents, for `solver_step`."""
        both = torch.cat([self.empty.expand_as(condition), condition])

        def estimate(z: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
            t = timesteps_of(log_sigma, self.table)
            unconditional, conditional = _velocity(self.teacher, z.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
            return clean_from_velocity(z, guided(unconditional, conditional, self.scale), log_sigma)

        return estimate

    def losses(self, student: Any, target_of: Any, batch: Batch) -> torch.Tensor:
        """(N,): `consistency_distance`; `target_of` gives the student's end at the lower knot."""
        return consistency_distance(
            lambda z, knot: self.clean(student, z, knot, batch.condition),
            lambda z, knot: self.clean(target_of, z, knot, batch.condition),
            self.guided_clean(batch.condition),
            batch.latents,
            batch.noise,
            batch.knot,
            self.levels,
        )

    def path_end(self, noise: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Where the guided teacher's path from the noisiest knot ends (N, C, h, w), by a solver step a knot."""
        z = noise
        for knot in range(len(self.levels) - 1, 0, -1):
            here, there = (self.levels[k].expand(len(z)) for k in (knot, knot - 1))
            z = solver_step(self.guided_clean(condition), z, here, there)
        return z * (1 + (2 * self.levels[0]).exp()).sqrt()


def _velocity(unet: Any, z: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    z = z.contiguous(memory_format=torch.channels_last)
    return unet(z, t, encoder_hidden_states=condition, return_dict=False)[0].float()


def build_scheduler(teacher: Any, knots: int) -> LCMScheduler:
    """The teacher's noise schedule, sampled at the knots: x by the student, then noise of the next level (LCM)."""
    return LCMScheduler.from_config(
        {k: v for k, v in teacher.config.items() if k in ("beta_start", "beta_end", "beta_schedule", "trained_betas")},
        num_train_timesteps=teacher.config["num_train_timesteps"],
        prediction_type="v_prediction",
        original_inference_steps=knots,
        clip_sample=False,
        set_alpha_to_one=True,
    )


def main(argv: list[str] | None = None) -> None:
    config = parse_config(DistillConfig, __doc__.splitlines()[0], argv)  # type: ignore[union-attr]
    if config.knots % config.num_inference_steps:
        raise InputError(f"--num_inference_steps {config.num_inference_steps} must divide --knots {config.knots}")
    out = Path(config.output_dir)
    config = dataclasses.replace(config, mixed_precision=training_precision(config.mixed_precision))
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
    student: UNet2DConditionModel = copy.deepcopy(teacher).requires_grad_(True).train()
    chosen = set_attention(student, config.attention, training=True, dtype=autocast_dtype(config.mixed_precision))
    scheduler = build_scheduler(drawing.scheduler, config.knots)
    timesteps = knot_timesteps(config.knots, scheduler.config["num_train_timesteps"]).to(device)
    table = log_sigmas(scheduler.alphas_cumprod).to(device)
    task = Distillation(teacher, train.conditions([None], length).to(device), scale, timesteps, table)
    ema = Ema(student, config.ema_decay)
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        fused=True,
    )
    checkpoint = find_checkpoint(config.resume_from_checkpoint, out)
    first_step = 0
    if checkpoint is not None:
        first_step, _ = restore_training(checkpoint, "unet", student, ema, optimizer)
    wrapped, optimizer = accelerator.prepare(student, optimizer)

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

    fixed = make_batch(held_out, range(len(held_out)), dataclasses.replace(config, seed=config.seed + 1), length)
    fixed = fixed.to(device)
    with torch.no_grad(), accelerator.autocast():
        ends = task.path_end(fixed.noise, fixed.condition)
        spread = (ends - ends.mean(0)).square().mean()

    @torch.no_grad()
    def measure() -> dict[str, float]:
        """Held-out loss, and the one-step error: from pure noise to the end of the teacher's path, as a share of the
        ends' variance (1 = no better than the mean picture)."""
        student.eval()
        with ema.applied_to(student), accelerator.autocast():
            loss = task.losses(student, student, fixed).mean()
            noisiest = torch.full_like(fixed.knot, config.knots)
            made = task.clean(student, fixed.noise, noisiest, fixed.condition)
        student.train()
        return {
            "validation_loss": loss.item(),
            "validation_one_step_error": ((made - ends).square().mean() / spread).item(),
        }

    def averaged() -> UNet2DConditionModel:
        with ema.applied_to(student):
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
            "unet": dict(student.state_dict()),
            "ema": ema.shadow,
            "optimizer": optimizer_tensors(optimizer.optimizer),
        }
        state = {"ema_updates": ema.updates, "config": dataclasses.asdict(config)}
        save_checkpoint(out, step, tensors, state, limit=config.checkpoints_total_limit)

    def load_batch(step: int) -> Batch:
        return make_batch(train, positions_of_step(step, config.train_batch_size, process, processes), config, length)

    started, images_done = time.monotonic(), 0
    for step, batch in prefetched(range(first_step, config.max_train_steps), load_batch):
        rate = learning_rate(
            step,
            peak=config.learning_rate,
            warmup_steps=config.lr_warmup_steps,
            total_steps=config.max_train_steps,
            decay_fraction=config.lr_decay_fraction,
        )
        set_learning_rate(optimizer, rate)
        with accelerator.autocast():
            # The student's own latest weights give the target: an average lags behind in so short a training.
            loss = task.losses(wrapped, student, batch.to(device)).mean()
        check_finite(loss.item(), step, rate)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(student.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(student)
        images_done += len(batch.latents) * processes

        done = step + 1
        values: dict[str, float] = {"loss": loss.item(), "learning_rate": rate, "grad_norm": float(norm)}
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
            card = {
                "family": "diffusion",
                "text_encoder": encoder.name,
                "height": height,
                "width": width,
                "num_inference_steps": config.num_inference_steps,
                "guidance_scale": 1.0,
                "guidance_interval": [0.0, None],
                "distilled_from": config.teacher,
                "baked_guidance": scale,
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
