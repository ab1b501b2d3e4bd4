"""The ways that speed.py holds against each other: stock diffusers and gigdiff, each built by one function.

A builder loads what its way needs and returns the way: a function that does one round of work. Nothing is shared but
the text encoder, so a builder can also run in a process of its own, where its peak memory is measured.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed_measure import NotHere, Way

import gigdiff
from gigdiff.attention import set_attention
from gigdiff.cuda_graphs import recorded_for_training
from gigdiff.data import ProductDataset, load_products
from gigdiff.data.captions import compose_captions
from gigdiff.data.encoded import EncodedProducts
from gigdiff.errors import GigdiffError
from gigdiff.fit.ema import Ema
from gigdiff.fit.layers import lighten
from gigdiff.fit.run import keep_freed_memory, prefetched
from gigdiff.fit.teacher import Velocity
from gigdiff.generators.diffusion import load_unet
from gigdiff.generators.loading import resolve
from gigdiff.generators.request import GenerationRequest
from gigdiff.images import fit_image, to_model
from gigdiff.models.autoencoder import load_autoencoder
from gigdiff.precision import cpu_has_bfloat16, embedded_dtype
from gigdiff.pretrained import card
from gigdiff.reference import default_data_dir
from gigdiff.speed import PROMPTS
from gigdiff.text import load_text_encoder

ROOT = Path(__file__).parents[1]
Builder = Callable[[], Way]


def no_bfloat16(device: str) -> str | None:
    """Why a bfloat16 row can't be measured here; None where it can."""
    if device == "cpu" and not cpu_has_bfloat16():
        return "not applicable: this CPU has no bfloat16 instructions and emulates them, many times slower than float32"
    return None


def asked(batch: int) -> tuple[list[str], list[int]]:
    """The prompts and seeds of a round of `batch` images."""
    return [PROMPTS[i % len(PROMPTS)] for i in range(batch)], list(range(batch))


def stock(args: Namespace, batch: int, *, steps: int, bf16: bool = False) -> Way:
    """diffusers' own StableDiffusionPipeline as `from_pretrained` gives it, in float32 or under bfloat16 autocast.

    A round: prompts and the empty prompt through the text encoder, guided sampling with the model's scheduler,
    decoding, uint8. The text encoder is gigdiff's, because a stock pipeline has none for these weights; it is called as
    a stock pipeline calls its own, all prompts at once, then the negative ones.
    """
    from diffusers import StableDiffusionPipeline

    if bf16 and (reason := no_bfloat16(args.device)):
        raise NotHere(reason)
    folder, _ = resolve(args.model)
    about = card(folder)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    encoder = copy.copy(load_text_encoder(about.get("text_encoder", "minilm"), args.device))
    encoder.cuda_graphs = False
    guidance = about["guidance_scale"] if args.guidance_scale is None else args.guidance_scale
    prompts, seeds = asked(batch)

    def draw() -> np.ndarray:
        autocast = torch.autocast(args.device, torch.bfloat16) if bf16 else contextlib.nullcontext()
        with torch.no_grad(), autocast:
            images = pipeline(
                prompt_embeds=encoder.encode(prompts).condition(),
                negative_prompt_embeds=encoder.encode([""] * batch).condition(),
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=about["height"],
                width=about["width"],
                output_type="np",
            ).images
        return (images * 255).round().astype("uint8")

    return draw


def ours(
    args: Namespace,
    batch: int,
    *,
    steps: int,
    model: str | None = None,
    guidance_scale: float | None = None,
    guidance_reuse: int = 1,
    backend: str = "torch",
    dtype: str | None = None,
) -> Way:
    """gigdiff's generator with its own choice of precision, layout and attention, or drawn by another backend.

    A round: `generate` with the same prompts, seeds, steps and guidance: text encoder, sampling, decoding, uint8.
    """
    try:
        generator = gigdiff.load(model or args.model, device=args.device, dtype=dtype, backend=backend)
    except GigdiffError as error:
        raise NotHere(f"not available: {' '.join(str(error).split())}") from error
    prompts, seeds = asked(batch)
    request = GenerationRequest(
        tuple(prompts),
        tuple(seeds),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        guidance_reuse=guidance_reuse,
    )

    def draw() -> np.ndarray:
        # A user's next prompts are others. That of no text comes back with each, and is remembered.
        for prompt in prompts:
            generator._recent.pop(prompt, None)  # type: ignore[attr-defined]
        return generator.generate(request).images

    return draw


def photos(args: Namespace) -> tuple[ProductDataset, str]:
    """(photos with captions to train on, what they are): the catalogue's, or the sample pictures of examples/."""
    folder = Path(args.data_dir or default_data_dir())
    if folder.is_dir():
        return load_products(folder, split="train", limit=args.photos), f"photos of {folder.name}"
    return load_products(ROOT / "examples" / "catalogue" / "train"), "sample pictures of examples/catalogue"


def their_training(args: Namespace, *, bf16: bool = False) -> Way:
    """The steps of diffusers' examples/text_to_image/train_text_to_image.py with its defaults, in its order.

    Each step reads and decodes its photos, encodes them, encodes their captions, and trains the UNet: default memory
    layout and attention, torch.optim.AdamW, clipping, constant learning rate with warm-up, no EMA. In bf16 the frozen
    parts are cast to it and the UNet runs under autocast, as there. Fitting photos is gigdiff's (the same pixels).
    """
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler

    if bf16 and (reason := no_bfloat16(args.device)):
        raise NotHere(reason)
    folder, _ = resolve(args.model)
    about, weight_dtype = card(folder), torch.bfloat16 if bf16 else torch.float32
    unet = load_unet(folder / "unet").to(args.device).train()
    vae = load_autoencoder(folder / "vae").to(args.device, weight_dtype).requires_grad_(False)
    encoder = copy.copy(load_text_encoder(about.get("text_encoder", "minilm"), args.device))
    encoder.model, encoder.cuda_graphs = copy.deepcopy(encoder.model).to(weight_dtype), False
    noise_scheduler: Any = DDPMScheduler.from_pretrained(folder / "scheduler")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    lr_scheduler = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=500, num_training_steps=15000)
    data, _ = photos(args)
    captions = [compose_captions(record, 1, seed=0)[0] for record in data.records()]

    def collate(chosen: list[int]) -> tuple[torch.Tensor, list[str]]:
        pixels = [fit_image(data[i].image, about["height"], about["width"]) for i in chosen]  # type: ignore[arg-type]
        return to_model(np.stack(pixels)), [captions[i] for i in chosen]

    def endless() -> Iterator[tuple[torch.Tensor, list[str]]]:
        indices: Any = [i % len(data) for i in range(max(len(data), args.train_batch_size))]
        loader = torch.utils.data.DataLoader(
            indices, batch_size=args.train_batch_size, shuffle=True, drop_last=True, collate_fn=collate
        )
        while True:
            yield from loader

    batches = endless()

    def train() -> None:
        for _ in range(args.train_steps):
            pixels, texts = next(batches)
            with torch.no_grad():  # frozen, so that no graph is built there either
                latents = vae.encode(pixels.to(args.device, weight_dtype)).latent_dist.sample()  # type: ignore[union-attr]
                latents = latents * vae.config["scaling_factor"]
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),)).to(args.device)
            noisy = noise_scheduler.add_noise(latents, noise, timesteps)
            condition = encoder.encode(texts).condition().to(weight_dtype)
            target = noise_scheduler.get_velocity(latents, noise, timesteps)
            with torch.autocast(args.device, torch.bfloat16, enabled=bf16):
                predicted = unet(noisy, timesteps, condition, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(predicted.float(), target.float(), reduction="mean")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            loss.detach().item()  # the progress bar's

    return train


def our_training(args: Namespace) -> Way:
    """The steps of training/train_diffusion.py with its defaults on the same UNet, photos and batch.

    Latents and embeddings come from the cache (it is filled while building, outside the time), the next batch is made
    in a thread; on a GPU the UNet's passes are CUDA graphs; channels_last, gigdiff's attention and
    layers for training, fused AdamW, EMA, clipping, the device's precision.
    """
    sys.path.insert(0, str(ROOT / "training"))
    if args.device == "cpu":
        keep_freed_memory()  # of the process, so that the peer's loop has it too
    from train_diffusion import DiffusionConfig, build_scheduler, inputs_of, loss_of, make_batch

    from gigdiff.diffusion import log_sigmas

    folder, _ = resolve(args.model)
    about, device = card(folder), torch.device(args.device)
    unet: Any = load_unet(folder / "unet").to(device, memory_format=torch.channels_last).train()
    if device.type == "cpu":
        lighten(unet)
    set_attention(unet, "auto", training=True, dtype=embedded_dtype(device))
    vae = load_autoencoder(folder / "vae").to(device, memory_format=torch.channels_last)
    encoder = load_text_encoder(about.get("text_encoder", "minilm"), args.device)
    config = DiffusionConfig(train_batch_size=args.train_batch_size, height=about["height"], width=about["width"])
    data = EncodedProducts(
        photos(args)[0], vae, encoder, height=config.height, width=config.width,
        captions_per_image=1, cache_dir=args.output / "cache", seed=0,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=config.learning_rate, betas=(0.9, config.adam_beta2),
        weight_decay=config.adam_weight_decay, fused=True,
    )  # fmt: skip
    ema, table = Ema(unet, config.ema_decay), log_sigmas(build_scheduler().alphas_cumprod).to(device)
    bf16 = embedded_dtype(device) == torch.bfloat16

    def load(step: int) -> Any:
        start = step * config.train_batch_size
        return make_batch(data, range(start, start + config.train_batch_size), config, encoder.max_length)

    predict: Any = Velocity(unet)
    if device.type == "cuda":
        predict = recorded_for_training(predict, inputs_of(load(0).to(device), table), embedded_dtype(device))
    batches = prefetched(range(10**6), load)

    def train() -> None:
        for _ in range(args.train_steps):
            _, batch = next(batches)
            with torch.autocast(args.device, torch.bfloat16, enabled=bf16):
                loss = loss_of(predict, batch.to(device), table, config.snr_gamma)
            loss.item()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(unet)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # else the last step would end in the next way's time

    return train
