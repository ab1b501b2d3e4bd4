"""DINOv2 and CLIP image features through transformers, by hub id or local folder.

Both see the whole picture: it is padded with white to a square and resized, antialiased, to the network's own size. The
usual preprocessing crops to the centre instead, which cuts sleeves and soles off a product photo.

DINOv2: Oquab et al., arXiv 2304.07193; Stein et al., arXiv 2306.04675, found Fréchet distances over it to agree with
people better than Inception's. CLIP: Radford et al., arXiv 2103.00020.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gigdiff.errors import InputError, ModelMismatchError, ModelNotFoundError, NumericalError
from gigdiff.metrics.features import check_images, resize_antialiased

__all__ = ["ClipFeatures", "DinoFeatures", "load_clip", "load_dino"]

DINO, CLIP = "facebook/dinov2-base", "openai/clip-vit-base-patch32"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIDE = 224  # DINOv2's own is 518, but it is used and compared at 224


class DinoFeatures:
    """DINOv2's class token after the last norm.

    Args:
        model: transformers' Dinov2Model. label: what it was loaded from and a digest of its weights.
    """

    def __init__(self, model: Any, label: str, *, batch_size: int = 32) -> None:
        self.model, self.batch_size = model.eval().requires_grad_(False), batch_size
        self.dim = int(model.config.hidden_size)
        self.side = min(SIDE, int(model.config.image_size))
        self.name = f"dinov2-{label}-{self.side}"
        self.resize = _describe(self.side)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) -> float32 (N, dim)."""
        return _extract(self, images, IMAGENET, lambda x: self.model(pixel_values=x).pooler_output)


class ClipFeatures:
    """CLIP's projected image embedding, and its text embedding for the CLIP score.

    Args:
        model: transformers' CLIPModel. label: as above.
        tokenizer: needed for `texts` alone.
    """

    def __init__(self, model: Any, label: str, tokenizer: Any = None, *, batch_size: int = 32) -> None:
        self.model, self.tokenizer, self.batch_size = model.eval().requires_grad_(False), tokenizer, batch_size
        self.dim = int(model.config.projection_dim)
        self.side = int(model.config.vision_config.image_size)
        self.name = f"clip-{label}-{self.side}"
        self.resize = _describe(self.side)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) -> float32 (N, dim), not normalised."""

        def embed(x: torch.Tensor) -> torch.Tensor:
            return self.model.visual_projection(self.model.vision_model(pixel_values=x).pooler_output)

        return _extract(self, images, OPENAI, embed)

    def texts(self, texts: list[str]) -> np.ndarray:
        """Texts, cut at the model's own length, -> float32 (N, dim), not normalised."""
        if self.tokenizer is None:
            raise InputError(f"{self.name} was made without its tokenizer, so it can't read texts")
        length = self.model.config.text_config.max_position_embeddings
        out = []
        with torch.inference_mode():
            for start in range(0, len(texts), self.batch_size):
                part = texts[start : start + self.batch_size]
                batch = self.tokenizer(part, padding=True, truncation=True, max_length=length, return_tensors="pt")
                pooled = self.model.text_model(batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
                out.append(self.model.text_projection(pooled).float().numpy())
        return np.concatenate(out)


def load_dino(source: str | None = None) -> DinoFeatures:
    """DINOv2 from a hub id or a folder; facebook/dinov2-base by default."""
    from transformers import Dinov2Model

    model, label = _load(Dinov2Model, source or DINO, "dinov2")
    return DinoFeatures(model, label)


def load_clip(source: str | None = None) -> ClipFeatures:
    """CLIP with its tokenizer from a hub id or a folder; openai/clip-vit-base-patch32 by default."""
    from transformers import AutoTokenizer, CLIPModel

    model, label = _load(CLIPModel, source or CLIP, "clip")
    return ClipFeatures(model, label, AutoTokenizer.from_pretrained(source or CLIP, trust_remote_code=False))


def _load(kind: Any, source: str, family: str) -> tuple[Any, str]:
    """The model and a label that tells its weights apart."""
    try:
        model = kind.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelNotFoundError(
            f'no {family} weights at "{source}" ({reason}): give a folder with config.json and model.safetensors, '
            f'or a hub id, as in --extractor "{family}:/path/to/folder"'
        ) from error
    if model.config.model_type != family:
        raise ModelMismatchError(f'"{source}" is a {model.config.model_type} model, not {family}')
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return model, f"{Path(source).name}-{digest.hexdigest()[:8]}"


def _describe(side: int) -> str:
    return f"padded white to a square, antialiased bicubic, float32, to {side} x {side}, clamped to 0-255"


def _extract(extractor: Any, images: np.ndarray, normal: tuple[tuple[float, ...], ...], embed: Any) -> np.ndarray:
    check_images(images)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normal)
    out = np.empty((len(images), extractor.dim), np.float32)
    with torch.inference_mode():
        for start in range(0, len(images), extractor.batch_size):
            batch = _square(images[start : start + extractor.batch_size])
            x = resize_antialiased(batch, extractor.side, extractor.side) / 255.0
            out[start : start + len(batch)] = embed((x - mean) / std).float().numpy()
    if not np.isfinite(out).all():
        raise NumericalError(f"{extractor.name} gave NaN or infinite features")
    return out


def _square(images: np.ndarray) -> np.ndarray:
    """White beside or above and below, so that height equals width."""
    height, width = images.shape[1:3]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    ends = (top, side - height - top), (left, side - width - left)
    return np.pad(images, ((0, 0), *ends, (0, 0)), constant_values=255)
