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


def clip_tokenizer(folder: Path):
    """A CLIPTokenizer that knows letters only."""
    import json

    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def clip_config(tokenizer, width: int = 16, **more):
    from transformers import CLIPTextConfig

    size = len(tokenizer)
    return CLIPTextConfig(
        vocab_size=size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=size - 2, eos_token_id=size - 1, projection_dim=width, **more,
    )  # fmt: skip


def t5(width: int = 16):
    """(T5EncoderModel, its tokenizer): letters again."""
    import string

    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *string.ascii_lowercase])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=77
    )
    config = T5Config(
        vocab_size=len(words),
        d_model=width,
        d_ff=2 * width,
        d_kv=8,
        num_heads=2,
        num_layers=1,
        is_encoder_decoder=False,
    )
    return T5EncoderModel(config), tokenizer


def tiny_vae(channels: int = 4, **more):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=8, sample_size=32, latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **more,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionXLPipeline folder: two CLIPs, size embeddings, two residual blocks a level as SDXL has."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    tokenizer = clip_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32, 32), layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32,
        attention_head_dim=(2, 4, 4), use_linear_projection=True, transformer_layers_per_block=(1, 1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8,
        norm_num_groups=8,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=tiny_vae(), text_encoder=CLIPTextModel(clip_config(tokenizer)), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, hidden_act="gelu")), tokenizer_2=tokenizer,
        unet=unet, scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading"),
        add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusion3Pipeline folder: two CLIPs with projection and T5, MMDiT, rectified flow."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "sd3"
    tokenizer = clip_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    encoder_3, tokenizer_3 = t5(32)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=32,
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer)), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, hidden_act="gelu")), tokenizer_2=tokenizer,
        text_encoder_3=encoder_3, tokenizer_3=tokenizer_3,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FluxPipeline folder as FLUX.1-dev is: CLIP's pooled text, T5's tokens, guidance as an input, dynamic shift."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "flux"
    tokenizer = clip_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    encoder_2, tokenizer_2 = t5(32)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(clip_config(tokenizer)), tokenizer=tokenizer,
        text_encoder_2=encoder_2, tokenizer_2=tokenizer_2,
    ).save_pretrained(folder)  # fmt: skip
    return folder


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
