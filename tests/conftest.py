"""Fixtures for more than one test file."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gigdiff.generators.request import Capabilities, GenerationRequest, GenerationResult, validate


class Painter:
    """A complete ImageGenerator that is no network: it paints noise around a colour taken from prompt and seed."""

    def __init__(self, capabilities: Capabilities) -> None:
        self.name = "painter"
        self.folder: Path | None = None
        self.capabilities = capabilities
        self.batches: list[GenerationRequest] = []

    def generate(
        self, request: GenerationRequest, *, on_step: Callable[[int, int], None] | None = None
    ) -> GenerationResult:
        start = time.perf_counter()
        request = validate(request, self.capabilities, self.name)
        self.batches.append(request)
        assert request.height and request.width and request.num_inference_steps
        images = []
        for i, (prompt, seed) in enumerate(zip(request.prompts, request.seeds, strict=True)):
            negative = request.negative_prompts[i] if request.negative_prompts else ""
            digest = hashlib.sha256(f"{prompt}\0{negative}\0{seed}".encode()).digest()
            noise = np.random.default_rng(list(digest)).integers(0, 64, (request.height, request.width, 3))
            images.append((noise + np.frombuffer(digest[:3], np.uint8) * 0.7).clip(0, 255).astype(np.uint8))
        for step in range(request.num_inference_steps):
            if on_step:
                on_step(step + 1, request.num_inference_steps)
        notes = tuple(f'"{p[:20]}...": cut' for p in dict.fromkeys(request.prompts) if len(p) > 500)
        return GenerationResult(np.stack(images), request, self.name, time.perf_counter() - start, notes)


@pytest.fixture
def painter() -> Painter:
    return Painter(
        Capabilities(
            default_size=(80, 64), default_steps=4, default_guidance=2.0, max_steps=1000,
            guidance=True, negative_prompt=True,
        )
    )  # fmt: skip


@pytest.fixture
def turbo(painter: Painter) -> Painter:
    """A one-pass generator: no guidance, no negative prompt, a single size."""
    return Painter(
        replace(
            painter.capabilities, default_steps=1, max_steps=1, default_guidance=1.0, guidance=False,
            negative_prompt=False, sizes=((80, 64),),
        )
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the embedded layout: real classes, real text encoder, few random weights. Copy it to change it."""
    import torch
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from gigdiff.generators.diffusion import save_folder
    from gigdiff.models.autoencoder import ProductAutoencoder

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=384, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    vae = ProductAutoencoder(
        latent_channels=4, half_channels=8, quarter_channels=8, eighth_channels=8, encoder_blocks=1, decoder_blocks=1
    )
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    card = {
        "family": "diffusion", "text_encoder": "minilm", "height": 80, "width": 64, "num_inference_steps": 3,
        "guidance_scale": 2.0, "guidance_interval": None, "parameters": 1, "licence": "Apache-2.0", "scores": {},
    }  # fmt: skip
    return save_folder(tmp_path_factory.mktemp("models") / "tiny", unet, vae, scheduler, card)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock Stable Diffusion folder as diffusers saves it: real classes, few random weights, its own tokenizer."""
    import json

    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "stable-diffusion"
    words = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (words / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(words, model_max_length=77)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=8, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder
