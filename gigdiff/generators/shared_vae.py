"""Several embedded models draw through one autoencoder, stored once, in `mini`: finding it, and being sure of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from gigdiff.errors import ModelMismatchError
from gigdiff.models.autoencoder import ProductAutoencoder, load_autoencoder
from gigdiff.pretrained import EMBEDDED, folder_of

__all__ = ["autoencoder_of", "latent_space_of", "same_encoder"]


def autoencoder_of(folder: Path, card: dict[str, Any]) -> ProductAutoencoder:
    """A model folder's own autoencoder, or that of the embedded model that its card names as `shared_vae`.

    Raises:
        ModelMismatchError: the shared one gives other latents than it was trained on (the card's `latent_space`).
        ModelNotFoundError: there are no weights.
    """
    shared = card.get("shared_vae")
    if shared is None:
        return load_autoencoder(folder / "vae")
    if shared not in EMBEDDED:
        raise ModelMismatchError(f'{folder} draws through the autoencoder of "{shared}", which is no embedded model')
    vae = load_autoencoder(folder_of(shared) / "vae")
    if latent_space_of(vae) != card.get("latent_space"):
        raise ModelMismatchError(
            f'{folder} was trained on the latents of another autoencoder than that of "{shared}" (latent space '
            f"{card.get('latent_space')}, there it is {latent_space_of(vae)}): train it again or store its own"
        )
    return vae


def latent_space_of(vae: ProductAutoencoder) -> str:
    """16 hex digits of what makes the latents: encoder and statistics, rounded to half. A decoder may change."""
    whole = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        if not name.startswith("decoder."):
            whole.update(name.encode() + tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


def same_encoder(a: ProductAutoencoder, b: ProductAutoencoder) -> bool:
    """Whether both give the same latents: a UNet knows no others. (Weights in a model folder are rounded to half.)"""
    ours, theirs = a.state_dict(), b.state_dict()
    names = [name for name in ours if not name.startswith("decoder.")]
    return all(n in theirs and torch.equal(ours[n].half().cpu(), theirs[n].half().cpu()) for n in names)
