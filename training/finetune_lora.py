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
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from gigdiff import rng
from gigdiff.attention import set_attention
from gigdiff.consistency import clean_from, consistency_distance, knot_timesteps
from gigdiff.data import ProductDataset
from gigdiff.data.buckets import BucketOrder, summary
from gigdiff.data.encoded import captions_of
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
from gigdiff.fit.families import Family, denoiser_of, family_of, noised
from gigdiff.fit.layers import lighten
from gigdiff.fit.lora_config import LoraConfig, check
from gigdiff.fit.lora_data import (
    Batch,
    draw_class_photos,
    embed,
    encode_photos,
    held_out_batches,
    make_batch,
    read_class_photos,
    read_photos,
)
from gigdiff.fit.lora_preview import drawing_settings, preview
from gigdiff.fit.run import JsonLines, StopSignal, check_finite, prefetched, start_accelerator, start_cpu_processes
from gigdiff.fit.schedule import learning_rate
from gigdiff.generators.diffusion import DiffusionGenerator
from gigdiff.generators.loading import load, resolve
from gigdiff.lora import (
    KOHYA_NAME,
    WEIGHTS_NAME,
    LoraSettings,
    adapter_configs,
    add_adapter,
    as_kohya,
    base_hash,
    cast_lora_inputs,
    lora_header,
    lora_tensors,
    read_lora,
    save_lora,
)
from gigdiff.precision import autocast_dtype, training_precision

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "examples" / "catalogue"
DEFAULT_CONFIG = ROOT / "configs" / "lora_mini.yaml"
ADAPTER = "finetuned"
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


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
    accelerator = start_accelerator(
        config.mixed_precision,
        config.report_to,
        out,
        # the main process may draw class images or previews for long while the others wait
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=6))],
    )
    device, main = accelerator.device, accelerator.is_main_process
    processes, process = accelerator.num_processes, accelerator.process_index
    global_batch = config.train_batch_size * processes * config.gradient_accumulation_steps
    say: Callable[[str], None] = (lambda text: print(text, file=sys.stderr, flush=True)) if main else lambda text: None

    with accelerator.main_process_first():
        train_photos, held_photos = read_photos(config, str(SAMPLE))
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

    def use_attention(training: bool, size: tuple[int, int] | None = None) -> None:
        """The kernel that was asked for, or a generator's, in the precision of the steps and the held-out loss."""
        drawn_with = "auto" if family.part == "unet" or config.attention == "auto" else "sdpa"
        backend, dtype = config.attention if training else drawn_with, autocast_dtype(config.mixed_precision)
        set_attention(model, backend, training=training, dtype=dtype, size=size)

    if config.attention != "auto":  # says now, not after an hour of encoding, that it can't be had
        use_attention(training=True)
        use_attention(training=False)  # class images are drawn yet
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
        drawn_for = [list(record.captions) for record in pictures.records()]
        encoded["class"] = encode_photos(generator, family, config, pictures, drawn_for, share)
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
        config.init_lora_weights,
    )
    parts = {family.part: model}
    if config.train_text_encoder:
        parts |= text_parts(generator, family)
    else:
        generator.remember(prompts)
        generator.free_encoders()
    trained = {}
    channels_last = False
    for part, network in parts.items():
        network.requires_grad_(False)
        mine = settings if part == family.part else dataclasses.replace(settings, target_modules=TEXT_TARGETS)
        seed = rng.derive_seed(config.seed, f"initialisation {part}")
        trained[part] = add_adapter(network, mine, ADAPTER, seed)
        channels_last = lighten(network) or channels_last
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
    latent_size: Any = tuple(train.latents([0]).shape[-2:])
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
            cast_lora_inputs(network, True)
        use_attention(training=False)
        try:
            with torch.no_grad(), ema.applied_to(adapter):
                yield
        finally:
            train_mode()

    def train_mode() -> None:
        use_attention(training=True, size=latent_size)
        for network in parts.values():
            network.train()
            cast_lora_inputs(network, config.mixed_precision == "no")

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
        if family.name == "mini" or (channels_last and torch.is_grad_enabled()):
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
            check_finite(norm, step, config.learning_rate * rate, gradient=True)
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
