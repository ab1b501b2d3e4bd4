"""Train the 4x upscaler of the embedded models: small product photos, and what the autoencoder makes of them, to large.

    accelerate launch training/train_upscaler.py --config configs/upscaler_mini.yaml

Phase 1 learns fidelity (L1). Phase 2 (`--init_from`, configs/upscaler_mini_sharp.yaml) goes on from it with SRGAN's
line of losses: adversarial, relativistic (Wang et al. 2018, arXiv 1809.00219), and perceptual, on EfficientNet-Lite2's
features (the results are measured with another network, Lite0). A small picture comes from one of three sources, drawn
for each sample: the catalogue's own small file (a true pair), the large photo degraded, or the small file through the
autoencoder with noisy latents.
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from gigdiff import rng
from gigdiff.data import ProductDataset, load_products
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
from gigdiff.fit.muon import build_optimizer
from gigdiff.fit.order import positions_of_step, samples_at
from gigdiff.fit.run import JsonLines, StopSignal, check_finite, prefetched, start_accelerator
from gigdiff.fit.schedule import learning_rate, set_learning_rate
from gigdiff.images import contact_sheet, fit_image, fitted_box, save_image, to_model, to_uint8
from gigdiff.metrics.efficientnet import load_efficientnet
from gigdiff.models.autoencoder import ProductAutoencoder, load_autoencoder
from gigdiff.models.discriminator import build_discriminator, discriminator_loss, generator_loss
from gigdiff.models.perceptual import perceptual_loss
from gigdiff.models.saving import save_network
from gigdiff.models.upscaler import ProductUpscaler, deepened, load_upscaler_network
from gigdiff.precision import training_precision

SCALE = 4


@dataclasses.dataclass(frozen=True)
class UpscalerConfig:
    """Keys of configs/upscaler_*.yaml.

    Args:
        train_data_dir: the large photos (imagefolder or Parquet), in height * 4 x width * 4 or larger.
        small_data_dir: the same products' small files, matched by id; none = degraded large photos only.
        autoencoder: folder of the autoencoder whose decodings are a source; none = without.
        train_split: split to train on.
        validation_split: split that measures it.
        output_dir: run folder: checkpoints, log.jsonl, previews/, upscaler/.
        height: small height in pixels, a multiple of 8.
        width: small width in pixels, a multiple of 8.
        crop: side of the small crops a step sees, a multiple of 8.
        channels: width of the network.
        blocks: its residual blocks.
        init_from: upscaler folder to start from; with fewer blocks it is given more, see `deepened`.
        degraded_share: share of samples that are degraded large photos.
        decoded_share: share of samples that went through the autoencoder.
        latent_noise: greatest standard deviation of the noise on its latents.
        train_batch_size: crops a step and process.
        dataloader_num_workers: processes that prepare batches; 0 is a thread. A GPU is faster than one of either.
        max_train_steps: optimizer steps in all.
        optimizer: "adamw", or "muon" for the hidden convolutions with AdamW for the rest, at the same learning rate.
        learning_rate: peak of the schedule.
        lr_warmup_steps: linear warm-up.
        lr_decay_fraction: last part of the run that decays by a cosine.
        adam_beta2: AdamW's second moment decay.
        max_grad_norm: gradient clipping.
        ema_decay: decay of the averaged weights, which are what is validated and saved.
        l1_weight: weight of the mean absolute error.
        perceptual_weight: weight of the distance of EfficientNet-Lite2's features; 0 is off.
        perceptual_sizes: factors by which pictures are resized for it; one that is named twice counts twice.
        adversarial_weight: weight of the adversarial loss, whose gradient is capped at the others' size; 0 is off.
        discriminator: "features": heads on EfficientNet-Lite2's features; "patch": a network of its own on pixels.
        discriminator_width: channels of the heads, or of the patch discriminator's first layer.
        discriminator_warmup_steps: steps that train the discriminator alone.
        discriminator_learning_rate: Adam's rate for the discriminator.
        discriminator_gamma: weight of its gradient penalty.
        mixed_precision: "no", "bf16", or "auto": bf16 where the device computes in it, else no.
        seed: of data order, crops, sources, initialisation and noise.
        checkpointing_steps: save every so many steps.
        checkpoints_total_limit: how many checkpoints to keep.
        resume_from_checkpoint: "latest" or a checkpoint folder.
        validation_steps: validate every so many steps.
        num_validation_images: how many validation pairs are measured.
        report_to: tracker of Accelerate, "tensorboard" or "none".
        max_train_samples: use only the first so many photos.
    """

    train_data_dir: str | None = None
    small_data_dir: str | None = None
    autoencoder: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    output_dir: str = "runs/upscaler"
    height: int = 80
    width: int = 64
    crop: int = 32
    channels: int = 64
    blocks: int = 10
    init_from: str | None = None
    degraded_share: float = 0.2
    decoded_share: float = 0.4
    latent_noise: float = 0.25
    train_batch_size: int = 16
    dataloader_num_workers: int = 0
    max_train_steps: int = 3000
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 4e-4
    lr_warmup_steps: int = 100
    lr_decay_fraction: float = 0.5
    adam_beta2: float = 0.99
    max_grad_norm: float = 1.0
    ema_decay: float = 0.998
    l1_weight: float = 1.0
    perceptual_weight: float = 0.0
    perceptual_sizes: tuple[float, ...] = (1.0, 0.5)
    adversarial_weight: float = 0.0
    discriminator: Literal["features", "patch"] = "features"
    discriminator_width: int = 64
    discriminator_warmup_steps: int = 100
    discriminator_learning_rate: float = 2e-4
    discriminator_gamma: float = 0.02
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    seed: int = 0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    validation_steps: int = 500
    num_validation_images: int = 64
    report_to: str = "tensorboard"
    max_train_samples: int | None = None


class Pairs:
    """Pairs of one product's pictures: large (uint8, 4H x 4W) and small (uint8, H x W), fitted alike.

    Args:
        large: the large photos. small: the small files of products with the same ids, or None.
    """

    def __init__(self, large: ProductDataset, small: ProductDataset | None, config: UpscalerConfig) -> None:
        self.large, self.small, self.config = large, small, config
        self.of_id = {} if small is None else {r.id: i for i, r in enumerate(small.records())}
        ids = [record.id for record in large.records()]
        if small is not None and not any(one in self.of_id for one in ids):
            raise InputError(
                "no product of --train_data_dir has its id in --small_data_dir; give the same products' small files, "
                "or leave it out"
            )
        self.ids = ids

    def __len__(self) -> int:
        return len(self.large)

    def pair(self, index: int, source: str, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(small, large) of one product. `source` "degraded" makes the small one from the large; all else takes the
        catalogue's small file where it has one.
        """
        height, width = self.config.height, self.config.width
        photo = self.large[index].image
        assert photo is not None
        large = fit_large(photo, height, width)
        at = self.of_id.get(self.ids[index])
        if source != "degraded" and at is not None and self.small is not None:
            file = self.small[at].image
            assert file is not None
            return fit_image(file, height, width), large
        return degraded(large, random, clean=source != "degraded"), large


def fit_large(photo: Image.Image, height: int, width: int) -> np.ndarray:
    """The photo as uint8 (4 height, 4 width, 3), exactly where `fit_image` puts a small file of its shape."""
    # The shop's small files are of 3:4 like the large: the frame's margin must be four times the small one's.
    inner = (height * 3 // 4, height) if abs(photo.width / photo.height - 0.75) < 0.02 else photo.size
    left, top, right, bottom = (SCALE * edge for edge in fitted_box(inner, height, width))
    frame = np.full((SCALE * height, SCALE * width, 3), 255, np.uint8)
    frame[top:bottom, left:right] = np.asarray(
        photo.convert("RGB").resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    )
    return frame


def degraded(large: np.ndarray, random: np.random.Generator, clean: bool = False) -> np.ndarray:
    """A quarter of the size, as cameras, editors and shops make it: blur, a filter, noise, JPEG (`clean`: a filter)."""
    image = Image.fromarray(large)
    size = (large.shape[1] // SCALE, large.shape[0] // SCALE)
    if clean:
        return np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    # All draws are made whatever comes of them, so that one setting does not change the others.
    blurred, filtered, noise, quality, pressed = (float(draw) for draw in random.random(5))
    if blurred < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(2.4 * blurred))
    filters = (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.BOX, Image.Resampling.BILINEAR)
    small = np.asarray(image.resize(size, filters[int(4 * filtered)]), dtype=np.float64)
    if noise > 0.7:
        small = small + random.normal(0, 20 * (noise - 0.7), small.shape)
    out = Image.fromarray(np.clip(np.rint(small), 0, 255).astype(np.uint8))
    if pressed < 0.6:
        file = io.BytesIO()
        out.save(file, "JPEG", quality=60 + int(36 * quality))
        out = Image.open(file)
    return np.asarray(out.convert("RGB"))


def sample(
    pairs: Pairs, index: int, position: int, config: UpscalerConfig
) -> tuple[np.ndarray, np.ndarray, str, tuple[int, int]]:
    """What training sample `position` sees: small and large picture, its source, and where its crop begins (y, x)."""
    random = np.random.default_rng(rng.derive_seed(config.seed, "upscaler sample", position))
    which, y, x, flip = random.random(4)
    source = "real"
    if which < config.degraded_share:
        source = "degraded"
    elif which < config.degraded_share + config.decoded_share:
        source = "decoded"
    small, large = pairs.pair(index, source, random)
    if flip < 0.5:  # no caption is at stake, so lettering may be mirrored
        small, large = small[:, ::-1], large[:, ::-1]

    # A third of a photo is white ground; crops that begin nearer the middle see more of the product.
    def begin(free: int, u: float) -> int:
        return round(free * (0.5 + 0.5 * np.sign(u - 0.5) * abs(2 * u - 1) ** 1.5))

    place = begin(config.height - config.crop, y), begin(config.width - config.crop, x)
    return small, large, source, place


@torch.no_grad()
def decoded(vae: ProductAutoencoder, small: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Small pictures through the autoencoder, noise of standard deviation `level` (N, 1, 1, 1) on their latents."""
    latents = vae.encode(small).latent_dist.mode()  # type: ignore[union-attr]
    return vae.decode(latents + level * noise, return_dict=False)[0].float().clamp(-1, 1)


@torch.no_grad()
def validate(
    model: ProductUpscaler, small: torch.Tensor, large: torch.Tensor
) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """Mean PSNR in dB of the model and of bicubic interpolation over real pairs, and both's pictures."""
    device = next(model.parameters()).device
    made = torch.cat([model(batch.to(device)).float().cpu() for batch in small.split(8)]).clamp(-1, 1)
    plain = F.interpolate(small, scale_factor=SCALE, mode="bicubic").clamp(-1, 1)

    def psnr(x: torch.Tensor) -> float:
        return (10 * torch.log10(4 / (x - large).square().flatten(1).mean(1))).mean().item()

    values = {"psnr": psnr(made), "bicubic_psnr": psnr(plain)}
    return values, made, plain


def main(argv: list[str] | None = None) -> None:
    config = parse_config(UpscalerConfig, __doc__.splitlines()[0], argv)  # type: ignore[union-attr]
    if config.train_data_dir is None:
        raise InputError("no training data: give --train_data_dir DIR, the large photos")
    if (
        config.crop % 8
        or not 8 <= config.crop <= min(config.height, config.width)
        or config.height % 8
        or config.width % 8
    ):
        raise InputError(
            f"--crop {config.crop}, --height {config.height}, --width {config.width}: all must be multiples of 8, and "
            "the crop no larger than the others"
        )
    if (
        not 0 <= config.degraded_share + config.decoded_share <= 1
        or min(config.degraded_share, config.decoded_share) < 0
    ):
        raise InputError("--degraded_share and --decoded_share are shares: each 0 or more, 1 at most together")
    if config.decoded_share > 0 and config.autoencoder is None:
        raise InputError(
            "--decoded_share needs --autoencoder FOLDER, such as gigdiff/pretrained/mini/vae; or set it to 0"
        )
    adversarial = config.adversarial_weight > 0
    if min(config.l1_weight, config.perceptual_weight, config.adversarial_weight) < 0:
        raise InputError("--l1_weight, --perceptual_weight and --adversarial_weight must be 0 or more")
    if adversarial and config.init_from is None:
        raise InputError("--adversarial_weight is phase 2: give phase 1's network with --init_from RUN/upscaler")
    out = Path(config.output_dir)
    config = dataclasses.replace(config, mixed_precision=training_precision(config.mixed_precision))
    accelerator = start_accelerator(config.mixed_precision, config.report_to, out)
    device = accelerator.device

    def load_pairs(split: str, limit: int | None) -> Pairs:
        large = load_products(config.train_data_dir, split=split, limit=limit)  # type: ignore[arg-type]
        small = None if config.small_data_dir is None else load_products(config.small_data_dir, split=split)
        return Pairs(large, small, config)

    train, held_out = (
        load_pairs(config.train_split, config.max_train_samples),
        load_pairs(config.validation_split, config.num_validation_images),
    )
    shown = [held_out.pair(i, "real", np.random.default_rng(0)) for i in range(len(held_out))]
    small_held_out, large_held_out = (to_model(np.stack([pair[k] for pair in shown])) for k in (0, 1))

    torch.manual_seed(rng.derive_seed(config.seed, "initialisation"))
    model = ProductUpscaler(channels=config.channels, blocks=config.blocks, scale=SCALE)
    if config.init_from is not None:
        model = deepened(load_upscaler_network(config.init_from), config.channels, config.blocks, SCALE)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    vae = None
    if config.decoded_share > 0:
        vae = load_autoencoder(str(config.autoencoder)).eval()
        vae = vae.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    needs_features = config.perceptual_weight > 0 or (adversarial and config.discriminator == "features")
    feature_net = load_efficientnet("lite2").to(device) if needs_features else None
    ema = Ema(model, config.ema_decay)
    optimizer = build_optimizer(
        config.optimizer,
        model,
        config.learning_rate,
        outer=("conv_in.", "conv_out."),
        betas=(0.9, config.adam_beta2),
        weight_decay=0.0,
        mixed_precision=config.mixed_precision,
    )
    torch.manual_seed(rng.derive_seed(config.seed, "discriminator initialisation"))
    critic = build_discriminator(config.discriminator, feature_net, config.discriminator_width)
    critic = critic.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
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

    def load(step: int) -> tuple[torch.Tensor, torch.Tensor, list[str], list[tuple[int, int]], range]:
        positions = positions_of_step(step, config.train_batch_size, process, processes)
        chosen = samples_at(positions, len(train), config.seed)
        seen = [sample(train, i, position, config) for i, position in zip(chosen, positions, strict=True)]
        small, large = (to_model(np.stack([np.ascontiguousarray(one[k]) for one in seen])) for k in (0, 1))
        return small, large, [one[2] for one in seen], [one[3] for one in seen], positions

    def crops(pictures: torch.Tensor, places: list[tuple[int, int]], scale: int) -> torch.Tensor:
        side = config.crop * scale
        cut = [
            p[:, y * scale : y * scale + side, x * scale : x * scale + side]
            for p, (y, x) in zip(pictures, places, strict=True)
        ]
        return torch.stack(cut).contiguous(memory_format=torch.channels_last)

    def through_autoencoder(small: torch.Tensor, sources: list[str], positions: range) -> torch.Tensor:
        rows = [i for i, source in enumerate(sources) if source == "decoded"]
        if vae is None or not rows:
            return small
        picked = [positions[i] for i in rows]
        shape = (vae.config["latent_channels"], config.height // 8, config.width // 8)
        noise = rng.normal(shape, config.seed, "latent noise", picked).to(device)
        level = rng.uniform(1, config.seed, "latent noise level", picked).to(device)[..., None, None]
        with accelerator.autocast():
            small[rows] = decoded(vae, small[rows], noise, config.latent_noise * level)
        return small

    started, images_done = time.monotonic(), 0
    steps = range(first_step, config.max_train_steps)
    for step, batch in prefetched(steps, load, workers=config.dataloader_num_workers):
        small, large, sources, places, positions = batch
        rate = learning_rate(
            step,
            peak=config.learning_rate,
            warmup_steps=config.lr_warmup_steps,
            total_steps=config.max_train_steps,
            decay_fraction=config.lr_decay_fraction,
        )
        set_learning_rate(optimizer, rate)
        small = through_autoencoder(small.to(device), sources, positions)
        inputs, targets = crops(small, places, 1), crops(large.to(device), places, SCALE)
        made = wrapped(inputs).float()
        loss = config.l1_weight * (made - targets).abs().mean()
        values: dict[str, float] = {"l1_loss": loss.item(), "learning_rate": rate}
        if feature_net is not None and config.perceptual_weight > 0:
            alike = perceptual_loss(feature_net, targets, made, config.perceptual_sizes)
            loss = loss + config.perceptual_weight * alike
            values["perceptual_loss"] = alike.item()
        check_finite(loss.item(), step, rate)
        values["loss"] = loss.item()
        if adversarial:
            (gradient,) = torch.autograd.grad(loss, made, retain_graph=True)
            with accelerator.autocast():
                fooling = generator_loss(critic, targets, made)
            (sharpness,) = torch.autograd.grad(fooling, made, retain_graph=True)
            # Capped, never raised: scaling a weak discriminator's gradient up made both run away together.
            ratio = float(sharpness.norm() / gradient.norm().clamp(min=1e-12))
            warm = step >= config.discriminator_warmup_steps
            scale = min(config.adversarial_weight, 1 / max(ratio, 1e-12)) if warm else 0.0
            values["adversarial_share"] = scale * ratio
            made.backward(gradient + scale * sharpness)
            noise = rng.normal(targets.shape[1:], config.seed, "discriminator noise", positions).to(targets)
            with accelerator.autocast():
                critic_loss = discriminator_loss(
                    critic, targets, made.detach(), noise, gamma=config.discriminator_gamma
                )
            # The term above left gradients of its own in the discriminator; only its own loss may move it.
            critic_optimizer.zero_grad()
            accelerator.backward(critic_loss)
            critic_optimizer.step()
            critic_optimizer.zero_grad()
            values |= {"generator_loss": fooling.item(), "discriminator_loss": critic_loss.item()}
        else:
            accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        images_done += len(inputs) * processes

        done = step + 1
        values["grad_norm"] = float(norm)
        values["images_per_second"] = images_done / (time.monotonic() - started)
        last = done == config.max_train_steps
        if main_process and (done % config.validation_steps == 0 or last):
            with ema.applied_to(model):
                measured, pictures, plain = validate(model, small_held_out, large_held_out)
            values |= {f"validation_{name}": value for name, value in measured.items()}
            rows = [to_uint8(x[:6]) for x in (plain, pictures, large_held_out)]
            triples = [picture for triple in zip(*rows, strict=True) for picture in triple]
            save_image(out / "previews" / f"step-{done:06d}.png", contact_sheet(triples, 6), overwrite=True)
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
                save_network(model, out / "upscaler")
            print(json.dumps({"upscaler": str(out / "upscaler"), "steps": config.max_train_steps}))
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except GigdiffError as error:
        sys.exit(f"error: {error}")
