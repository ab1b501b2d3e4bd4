"""Models that draw in one pass: GANs and VAEs, on the diffusion model's latents or on pixels.

Both are a network from (noise, text) to latents or pixels, so one class draws with both. Guidance, denoising steps and
negative prompts have no meaning for them; `truncation` has, and says how far from the most typical picture of a prompt
an image may lie.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gigdiff.errors import ModelMismatchError, ModelNotFoundError, NumericalError
from gigdiff.generators.diffusion import OnStep
from gigdiff.generators.request import Capabilities, GenerationRequest, GenerationResult, validate
from gigdiff.generators.shared_vae import autoencoder_of
from gigdiff.images import to_model, to_uint8
from gigdiff.models.autoencoder import ProductAutoencoder
from gigdiff.models.one_pass import load_one_pass
from gigdiff.models.saving import save_network
from gigdiff.models.vae import VaeOutput
from gigdiff.packing import pack
from gigdiff.precision import embedded_dtype
from gigdiff.text import TextEncoder, cut_note, load_text_encoder

__all__ = ["OnePassGenerator", "save_one_pass"]


class OnePassGenerator:
    """Noise and text -> latents or pixels -> uint8, for folders of family "gan" and "vae".

    As DiffusionGenerator, it runs in bfloat16 where the CPU has instructions for it and else in float32, one image at a
    time: either way an image is the same bits in any batch. Image i's noise comes from its own seed.

    Args:
        model: ConvGenerator, StyleGenerator or ConditionalVae.
        vae: the autoencoder whose latents it draws; None where it draws pixels.
        text_encoder: what it was trained with.
        name: reported as the model's id. folder: where the weights lie.
        height, width: what it draws, pixels; it can't draw other sizes.
        truncation: default of the request's truncation.
        dtype: torch.float32, torch.bfloat16 or float16; None chooses for the device.
    """

    def __init__(
        self,
        model: Any,
        vae: ProductAutoencoder | None,
        text_encoder: TextEncoder,
        *,
        name: str,
        folder: Path | None = None,
        height: int = 80,
        width: int = 64,
        truncation: float = 1.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.name, self.folder = name, folder
        self.device = torch.device(device)
        self.dtype = dtype or embedded_dtype(self.device)
        move = torch.nn.Module.to
        self.model: Any = move(model, self.device, torch.float32, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.vae: Any = vae
        if vae is not None:
            self.vae = move(vae, self.device, torch.float32, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            for part in (self.model, self.vae):
                if part is not None:
                    pack(part)
        self.text_encoder = text_encoder
        self.capabilities = Capabilities(
            default_size=(height, width),
            max_steps=1,
            sizes=((height, width),),
            truncation=True,
            default_truncation=truncation,
        )
        # What evaluation asks for where a generator draws through an autoencoder.
        self.reconstruct = None if vae is None else self._reconstruct

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        attention: str = "auto",
        name: str | None = None,
    ) -> OnePassGenerator:
        """Load a folder with generator/, gigdiff.json and, for latents, vae/ or the name of the model that has it.

        Args:
            attention: taken for all models' sake; there is but a little attention to text here, always plain.

        Raises:
            ModelNotFoundError: a part is missing. ModelMismatchError: parts that don't fit each other.
        """
        folder = Path(folder)
        try:
            card = json.loads((folder / "gigdiff.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(f"{folder} is not a gigdiff model folder: {error}") from error
        if not (folder / "generator").is_dir():
            raise ModelMismatchError(f"{folder} is of family {card.get('family')!r}, but holds no generator/")
        model = load_one_pass(folder / "generator")
        vae = None if card.get("space", "latent") == "pixel" else autoencoder_of(folder, card)
        encoder = load_text_encoder(card.get("text_encoder", "minilm"), str(device))
        wanted = 3 if vae is None else vae.config["latent_channels"]
        if model.config["channels"] != wanted:
            raise ModelMismatchError(
                f"{folder}: the generator draws {model.config['channels']} channels, "
                + (f"pixels have {wanted}" if vae is None else f"the autoencoder's latents have {wanted}")
            )
        if model.config["text_dim"] != encoder.dim:
            raise ModelMismatchError(
                f"{folder}: the generator reads text of {model.config['text_dim']} numbers a token, "
                f"{encoder.name} gives {encoder.dim}"
            )
        return cls(
            model,
            vae,
            encoder,
            name=name or folder.name,
            folder=folder,
            height=card["height"],
            width=card["width"],
            truncation=card.get("truncation", 1.0),
            device=device,
            dtype=dtype,
        )

    def generate(self, request: GenerationRequest, *, on_step: OnStep | None = None) -> GenerationResult:
        """Draw the request's images; see ImageGenerator.

        Raises:
            InputError, CapabilityError: the request. NumericalError: NaN or infinity came out.
        """
        request = validate(request, self.capabilities, self.name)
        started = time.perf_counter()
        condition, notes = self._embed(request.prompts)
        noise = torch.stack(
            [torch.randn(self.model.noise_size, generator=torch.Generator("cpu").manual_seed(s)) for s in request.seeds]
        )
        # Exactness in batches: float32 kernels depend on the batch, so images go one by one; bfloat16 ones were seen to
        # depend on it only between one image and more, so a single one is drawn as two.
        at_once = 1 if self.device.type == "cpu" and self.dtype == torch.float32 else max(2, len(request))
        if at_once == 2 and len(request) == 1:
            noise, condition = torch.cat([noise, noise]), torch.cat([condition, condition])
        assert request.truncation is not None
        parts = [
            self._draw(noise[start : start + at_once], condition[start : start + at_once], request.truncation)
            for start in range(0, len(noise), at_once)
        ]
        if on_step is not None:
            on_step(1, 1)
        images = np.concatenate(parts)[: len(request)]
        return GenerationResult(images, request, self.name, time.perf_counter() - started, tuple(dict.fromkeys(notes)))

    @torch.no_grad()
    def _draw(self, noise: Tensor, condition: Tensor, truncation: float) -> np.ndarray:
        """uint8 (N, height, width, 3)."""
        with self._autocast():
            drawn = self.model(noise.to(self.device), condition.to(self.device), truncation)
            drawn = drawn.mean if isinstance(drawn, VaeOutput) else drawn
            if not torch.isfinite(drawn).all():
                raise NumericalError(
                    f"{self.name} gave NaN or infinite {'pixels' if self.vae is None else 'latents'} (dtype "
                    f'{self.dtype}): nothing was drawn. Load it with dtype="float32", or train it again.'
                )
            if self.vae is not None:
                latents = drawn.contiguous(memory_format=torch.channels_last)
                drawn = self.vae.decode(latents, return_dict=False)[0]
        return to_uint8(drawn.float().cpu())

    def _reconstruct(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) through the autoencoder and back: the best that any model on its latents can do."""
        with torch.no_grad(), self._autocast():
            pixels = to_model(images).to(self.device).contiguous(memory_format=torch.channels_last)
            return to_uint8(self.vae.decode(self.vae.encode(pixels).latent_dist.mode()).sample.float().cpu())

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _embed(self, texts: tuple[str, ...]) -> tuple[Tensor, list[str]]:
        """Conditions (N, 1 + L, D) and notes on what was cut."""
        conditions, notes = {}, []
        for text in dict.fromkeys(texts):
            embedding = self.text_encoder.encode_alone(text)
            conditions[text] = embedding.condition()
            if embedding.cut[0]:
                notes.append(cut_note(self.name, self.text_encoder.max_length, embedding.cut[0]))
        return torch.cat([conditions[text] for text in texts]), notes


def save_one_pass(
    folder: str | Path, model: Any, vae: ProductAutoencoder | None, card: dict[str, Any], *, half: bool = True
) -> Path:
    """Write a model folder that `gigdiff.load` reads, under another name first; an existing one is replaced.

    Args:
        model: what draws. vae: the autoencoder to store with it; None for pixels, or where card names a "shared_vae".
        card: content of gigdiff.json, see gigdiff.pretrained. half: store weights in float16.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    parts = {"generator": model} | ({} if vae is None else {"vae": vae})
    try:
        for part, module in parts.items():
            stored: Any = copy.deepcopy(module).to("cpu", memory_format=torch.contiguous_format)
            save_network(torch.nn.Module.half(stored) if half else stored, temporary / part)
        index = {"_class_name": "OnePassGenerator", "_diffusers_version": "0.42.1"}
        index |= {part: [type(module).__module__, type(module).__name__] for part, module in parts.items()}  # type: ignore[misc]
        (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (temporary / "gigdiff.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
