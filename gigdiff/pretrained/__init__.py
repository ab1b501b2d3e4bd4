"""The embedded models: one folder each beside this file, with weights (safetensors), configs and a model card.

A folder holds gigdiff.json for `gigdiff models`:

    family         "diffusion", "gan" or "vae": which generator class draws with it
    parameters     count of all its weights
    licence        of the weights
    training_cost  photos seen, time and processor, in words
    scores         measured name -> value
    height, width, num_inference_steps, guidance_scale    what it draws when not told otherwise

and where it draws through another embedded model's autoencoder:

    shared_vae     that model
    latent_space   hash of the encoder it was trained on, see gigdiff.generators.shared_vae

and where its UNet is a LoRA on another embedded model's:

    unet_of        that model; the LoRA is unet/pytorch_lora_weights.safetensors
    lora_scale     the share of the trained difference that is in it

and of a student of one step:

    baked_truncation    how much of the noise its UNet is given, folded into the first convolution

and for "gan" and "vae":

    truncation     default of that control
    space          "latent" or "pixel"
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["EMBEDDED", "UPSCALERS", "card", "folder_of", "size_on_disk"]

#: name -> what it is, in a line
EMBEDDED: dict[str, str] = {
    "mini": "latent diffusion, 80 x 64 (height x width)",
    "mini-turbo": "mini in 4 steps without guidance passes",
    "mini-flash": "mini in a single step: quicker still, its pictures less varied",
    "mini-gan": "a GAN, one pass, through mini's decoder",
    "mini-vae": "a VAE, one pass, through mini's decoder: a baseline to compare with",
}


#: The same for upscalers, which enlarge pictures and draw none; the first is the default.
UPSCALERS: dict[str, str] = {
    "mini-upscaler": "super-resolution, 4x",
}


def folder_of(name: str) -> Path:
    """Where an embedded model's files lie (whether or not they are there)."""
    return Path(__file__).parent / name


def card(folder: Path) -> dict[str, Any]:
    """A model folder's gigdiff.json; empty where there is none or it can't be read."""
    try:
        content = json.loads((folder / "gigdiff.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def size_on_disk(folder: Path) -> int:
    """Bytes of all files in a model folder, 0 where it is missing."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
