"""Diffusion models that draw: the embedded layout with its own sampling loop, and any other diffusers pipeline."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gigdiff.attention import set_attention
from gigdiff.cuda_graphs import GraphedNetwork
from gigdiff.diffusion import guided, noise_per_output, steps_guided_anew
from gigdiff.errors import (
    CapabilityError,
    InputError,
    ModelMismatchError,
    ModelNotFoundError,
    NumericalError,
    nearest,
)
from gigdiff.exactness import PerSampleLinear, rows_stand_alone
from gigdiff.generators.request import Capabilities, EditStart, GenerationRequest, GenerationResult, validate
from gigdiff.generators.shared_vae import autoencoder_of
from gigdiff.group_norm import quicken_group_norms
from gigdiff.images import to_model, to_pil, to_uint8
from gigdiff.lora import WEIGHTS_NAME, AdapterSlots, base_hash, fold_file, read_lora
from gigdiff.models.autoencoder import ProductAutoencoder
from gigdiff.models.saving import save_network
from gigdiff.openvino_backend import PRECISIONS, compiled, default_precision, imported
from gigdiff.packing import pack, unpacked
from gigdiff.precision import embedded_dtype
from gigdiff.pretrained import EMBEDDED, folder_of
from gigdiff.quantization import quantize_weights
from gigdiff.schedulers import build_scheduler, possible_schedulers
from gigdiff.text import TextEmbedding, TextEncoder, cut_note, load_text_encoder

__all__ = ["DiffusionGenerator", "PipelineGenerator", "load_unet", "save_folder", "unet_of"]

OnStep = Callable[[int, int], None]
RECENT_TEXTS = 256
# What int8 is fitted to: drawn once with a model's own steps and guidance.
TYPICAL_PROMPTS = (
    "red wool coat", "black leather handbag", "white sneakers", "navy polo shirt for men", "silver watch for women",
    "blue jeans", "yellow summer dress", "brown leather belt", "pink lipstick", "gold earrings", "green t-shirt",
    "grey backpack", "purple saree", "black sunglasses", "beige sandals", "orange shorts for boys",
)  # fmt: skip
TYPICAL_ROWS = 64


class Networks(NamedTuple):
    """What draws in place of the plain UNet and decoder: functions as `_Unet` and `_Decoder`.

    `coarse`: the UNet in int8, for steps that can bear it.
    """

    unet: Callable[..., Tensor]
    decoder: Callable[..., Tensor]
    coarse: Callable[..., Tensor] | None = None


def _loras(request: GenerationRequest) -> tuple[list[str], list[float]]:
    """The request's LoRA files and their scales."""
    pairs = request.adapters()
    return [lora for lora, _ in pairs], [scale for _, scale in pairs]


class DiffusionGenerator:
    """Text tokens -> latents by a UNet -> pixels by the autoencoder, for gigdiff's own model folders.

    On a CPU that has bfloat16 instructions everything runs under bfloat16 autocast, on other CPUs in float32. Both are
    exact in this sense: an image is the same bits in any batch. bfloat16 kernels were seen not to depend on the batch;
    for float32 see gigdiff.exactness: each size of batch is tried once, and where it fails images are drawn one by one.
    On CUDA this is not promised; there UNet and decoder are CUDA graphs (gigdiff.cuda_graphs) unless a LoRA is in use.

    Args:
        unet: UNet2DConditionModel conditioned on `TextEmbedding.condition()`.
        vae: the autoencoder, latents of unit variance.
        scheduler: any diffusers scheduler with `set_timesteps`, `step` and `alphas_cumprod`.
        text_encoder: what the UNet was trained with.
        name: reported as the model's id.
        folder: where the weights lie.
        height, width, num_inference_steps, guidance_scale: what it draws when not told otherwise.
        guidance_interval: (low, high) of sigma within which guidance is applied (Kynkäänniemi et al. 2024,
            arXiv 2404.07724); outside it one forward pass does.
        dtype: torch.float32, torch.bfloat16 or float16; None chooses for the device.
        attention: see gigdiff.attention.
    """

    def __init__(
        self,
        unet: Any,
        vae: ProductAutoencoder,
        scheduler: Any,
        text_encoder: TextEncoder,
        *,
        name: str,
        folder: Path | None = None,
        height: int = 80,
        width: int = 64,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
        guidance_interval: tuple[float, float] = (0.0, float("inf")),
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        attention: str = "auto",
    ) -> None:
        self.name, self.folder = name, folder
        self.device = torch.device(device)
        self.dtype = dtype or embedded_dtype(self.device)
        # Weights stay float32: autocast rounds them once a call, and a LoRA or an EMA copy can be put in at any time.
        # (torch's own `to`: diffusers' warns of modules to keep in float32 even where there are none.)
        move = torch.nn.Module.to
        self.unet: Any = move(unet, self.device, torch.float32, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.vae: Any = move(vae, self.device, torch.float32, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            quicken_group_norms(self.unet)
            pack(self.unet)
            pack(self.vae)
        self.scheduler = scheduler
        self.text_encoder = text_encoder
        self.guidance_interval = guidance_interval
        self.attention = set_attention(self.unet, attention, dtype=self.dtype)
        self.slots = AdapterSlots({"unet": self.unet}, name, folder, self.unet.unload_lora)
        self._remembered: dict[str, TextEmbedding] = {}
        self._recent: dict[str, TextEmbedding] = {}
        self._exact: dict[tuple[int, int, int, bool, bool, bool, bool], bool] = {}
        self._precision: str | None = None
        self._compiled: dict[tuple[int, int, bool], Networks] = {}
        self._compiled_now: Networks | None = None
        self._seen: list[tuple[Tensor, ...]] | None = None
        self._graphed: tuple[GraphedNetwork, GraphedNetwork] | None = None
        self._inductor = False
        self._inductor_unet: Callable[..., Tensor] | None = None
        self.capabilities = Capabilities(
            default_size=(height, width),
            default_steps=num_inference_steps,
            default_guidance=guidance_scale,
            size_range=(height // 2 // 8 * 8, max(height, width) * 4),
            guidance=True,
            guidance_reuse=True,
            negative_prompt=True,
            image_to_image=True,
            inpaint=True,
            lora=True,
            schedulers=possible_schedulers(scheduler),
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        attention: str = "auto",
        name: str | None = None,
    ) -> DiffusionGenerator:
        """Load a folder with unet/, vae/, scheduler/ and gigdiff.json.

        Raises:
            ModelNotFoundError: a part is missing. ModelMismatchError: parts that don't fit each other.
        """
        import diffusers

        folder = Path(folder)
        try:
            card = json.loads((folder / "gigdiff.json").read_text(encoding="utf-8"))
            scheduler_class = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))[
                "_class_name"
            ]
        except (OSError, ValueError, KeyError) as error:
            raise ModelNotFoundError(f"{folder} is not a gigdiff model folder: {error}") from error
        unet = unet_of(folder, card)
        vae = autoencoder_of(folder, card)
        scheduler = getattr(diffusers, scheduler_class).from_pretrained(folder / "scheduler")
        encoder = load_text_encoder(card.get("text_encoder", "minilm"), str(device))
        if unet.config.in_channels != vae.config["latent_channels"]:
            raise ModelMismatchError(
                f"{folder}: the UNet works on {unet.config.in_channels} latent channels, "
                f"the autoencoder gives {vae.config['latent_channels']}"
            )
        if unet.config.cross_attention_dim != encoder.dim:
            raise ModelMismatchError(
                f"{folder}: the UNet reads text of {unet.config.cross_attention_dim} numbers a token, "
                f"{encoder.name} gives {encoder.dim}"
            )
        low, high = card.get("guidance_interval") or (0.0, None)
        return cls(
            unet,
            vae,
            scheduler,
            encoder,
            name=name or folder.name,
            folder=folder,
            height=card["height"],
            width=card["width"],
            num_inference_steps=card["num_inference_steps"],
            guidance_scale=card["guidance_scale"],
            guidance_interval=(low, float("inf") if high is None else high),
            device=device,
            dtype=dtype,
            attention=attention,
        )

    def use_openvino(self, precision: str | None = None) -> None:
        """From now on UNet and decoder are those that OpenVINO compiled; see gigdiff.openvino_backend.

        They are converted when a size of picture is first drawn. With a LoRA torch draws: it is another network.

        Args:
            precision: "bfloat16", "float32", "int8", or None: the faster of the first two on this CPU. In int8 is the
                UNet in the steps that can bear it: not the first and the last, nor those with both halves of guidance,
                which magnifies errors. So it is for students, and for guided models with `guidance_reuse`.

        Raises:
            InputError: another precision, or a generator that is not on the CPU. MissingDependencyError: OpenVINO is
                not installed.
        """
        if self.device.type != "cpu":
            raise InputError(f'backend="openvino" draws on the CPU, and this generator is on {self.device}.')
        default = default_precision()
        if precision is not None and precision not in PRECISIONS:
            raise InputError(f'dtype={precision!r} is unknown to backend="openvino"; {nearest(precision, PRECISIONS)}.')
        if precision == "int8":
            imported("nncf")
        self._precision = precision or default

    def use_compile(self) -> None:
        """From now on the UNet is compiled by torch.compile, on CUDA under the CUDA graph; not with a LoRA."""
        self._inductor = True

    def generate(self, request: GenerationRequest, *, on_step: OnStep | None = None) -> GenerationResult:
        """Draw the request's images; see ImageGenerator.

        Raises:
            InputError, CapabilityError: the request. NumericalError: NaN or infinity in the latents.
        """
        return self._draw(request, None, on_step)

    def edit(self, request: GenerationRequest, start: EditStart, *, on_step: OnStep | None = None) -> GenerationResult:
        """Draw the request's images from pictures instead of from noise; errors as `generate`.

        Noise of the level at which the remaining steps begin is added to the pictures' latents (SDEdit, Meng et al.
        2021, arXiv 2108.01073). With a mask, what is kept is put back after each step, with that step's noise (RePaint,
        Lugmayr et al. 2022, arXiv 2201.09865, eq. 8), in blocks of 8 x 8 pixels: the caller pastes the exact pixels.
        """
        return self._draw(request, start, on_step)

    def _draw(self, request: GenerationRequest, edit: EditStart | None, on_step: OnStep | None) -> GenerationResult:
        request = validate(request, self.capabilities, self.name)
        started = time.perf_counter()
        notes = list(self.slots.use(*_loras(request)))
        assert request.height and request.width
        self._compiled_now = None if request.adapters() else self._networks(request)
        if self._precision == "int8" and self._compiled_now and not self._compiled_now.coarse:
            notes.append(
                f"{self.name}: int8 had nothing to do: it computes neither the first and the last step nor those with "
                "both halves of guidance. guidance_reuse=8 leaves it some; so does a student of three steps or more."
            )
        at_once = len(request) if self._batch_is_exact(request) else 1
        parts = []
        for start in range(0, len(request), at_once):
            part = request.part(start, start + at_once)
            report = None
            if on_step is not None:
                offset = start

                def report(done: int, total: int, offset: int = offset, count: int = len(part)) -> None:
                    on_step(offset * total + done * count, total * len(request))

            latents, cut = self._denoise(part, report, edit and edit.part(start, start + at_once))
            parts.append(self._decode(latents))
            notes += cut
        return GenerationResult(
            np.concatenate(parts),
            request,
            self.name,
            time.perf_counter() - started,
            tuple(dict.fromkeys(notes)),
            extra=self._drawn_by(),
        )

    def _drawn_by(self) -> dict[str, str]:
        """The backend, for the picture's file, where it was not torch itself."""
        if self._compiled_now is None or not (self._precision or self._inductor):
            return {}
        return {"backend": f"openvino {self._precision}" if self._precision else "compile"}

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) through the autoencoder and back: the best that any model on its latents can do."""
        with torch.no_grad(), self._autocast():
            pixels = to_model(images).to(self.device).contiguous(memory_format=torch.channels_last)
            return to_uint8(self.vae.decode(self.vae.encode(pixels).latent_dist.mode()).sample.float().cpu())  # type: ignore[union-attr]

    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the UNet is conditioned on, for training: "prompt_embeds" (N, 1 + L, D)."""
        return {"prompt_embeds": self.text_encoder.encode(texts).condition()}

    def remember(self, texts: Iterable[str]) -> None:
        """Encode `texts` (and "", for guidance) now, so that they can be drawn after `free_encoders`."""
        self._remembered |= {text: self.text_encoder.encode_alone(text) for text in dict.fromkeys(["", *texts])}

    def free_encoders(self) -> None:
        """Let go of the text encoder and the autoencoder's encoder: only what `remember` was given can be drawn."""
        load_text_encoder.cache_clear()  # it keeps what it has loaded
        self.text_encoder = None  # type: ignore[assignment]
        self.vae.encoder = torch.nn.Identity()

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.device.type == "cpu" and self.dtype == torch.float32 and not self._inductor:
            return PerSampleLinear()
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _batch_is_exact(self, request: GenerationRequest) -> bool:
        """Whether the kernels used (float32's, or OpenVINO's) give an image the same bits in such a batch as alone."""
        assert request.height and request.width
        count = len(request)
        compiled = self._compiled_now is not None
        if count == 1 or self.device.type != "cpu" or (self.dtype != torch.float32 and not compiled):
            return True
        guided = request.guidance_scale != 1.0
        every = self.guidance_interval == (0.0, float("inf")) and request.guidance_reuse == 1
        alone = not guided or not every  # steps of one row an image
        coarse = self._compiled_now is not None and self._compiled_now.coarse is not None
        key = (count, request.height, request.width, guided, alone, compiled, coarse)
        if key not in self._exact:
            shape = (self.unet.config.in_channels, request.height // 8, request.width // 8)
            generator = torch.Generator().manual_seed(0)
            z = torch.randn((2 * count, *shape), generator=generator)
            condition = self._embedding("").condition().repeat(2 * count, 1, 1)
            t = self.scheduler.timesteps[0]

            def unet(x: Tensor, c: Tensor, coarse: bool = False) -> Tensor:
                return self._unet(x, t, c, coarse)

            with self._autocast():
                self._exact[key] = (
                    (not guided or rows_stand_alone(unet, (z, condition), (0, count)))
                    # One row alone was seen to differ from several where two did not.
                    and (not alone or rows_stand_alone(unet, (z[:count], condition[:count]), (0,)))
                    and (
                        not coarse or rows_stand_alone(partial(unet, coarse=True), (z[:count], condition[:count]), (0,))
                    )
                    and rows_stand_alone(self._pixels, (z[:count],), (0,))
                )
        return self._exact[key]

    def _embed(self, texts: tuple[str, ...]) -> tuple[Tensor, list[str]]:
        """Conditions (N, 1 + L, D) and notes on what was cut. Texts are encoded alone: neighbours don't matter."""
        if self.device.type == "cuda":
            self._embed_at_once(texts)
        embedded = {text: self._embedding(text) for text in dict.fromkeys(texts)}
        notes = [cut_note(self.name, self.text_encoder.max_length, e.cut[0]) for e in embedded.values() if e.cut[0]]
        return torch.cat([embedded[text].condition() for text in texts]).to(self.device), notes

    def _embed_at_once(self, texts: tuple[str, ...]) -> None:
        """Encode what is not known yet of `texts` in one pass: on a GPU as quick as one text, nearly the same bits."""
        new = [t for t in dict.fromkeys(texts) if t not in self._remembered and t not in self._recent]
        if not new:
            return
        found = self.text_encoder.encode(new)
        for i, text in enumerate(new):
            row = slice(i, i + 1)
            self._recent[text] = TextEmbedding(found.tokens[row], found.mask[row], found.pooled[row], found.cut[row])

    def _embedding(self, text: str) -> TextEmbedding:
        """One text's embedding; the last few hundred are kept: "" comes back with every image, prompts with seeds."""
        if text in self._remembered:
            return self._remembered[text]
        found = self._recent.pop(text, None) or self.text_encoder.encode_alone(text)
        self._recent[text] = found  # the newest is last
        if len(self._recent) > RECENT_TEXTS:
            del self._recent[next(iter(self._recent))]
        return found

    @torch.no_grad()
    def _denoise(
        self, request: GenerationRequest, on_step: OnStep | None, edit: EditStart | None = None
    ) -> tuple[Tensor, list[str]]:
        """The sampling loop: latents (N, C, H/8, W/8), and notes."""
        assert request.height and request.width and request.num_inference_steps and request.guidance_scale is not None
        scale, (low, high) = request.guidance_scale, self.guidance_interval
        condition, notes = self._embed(request.prompts)
        if scale != 1.0:
            negative, more = self._embed(request.negative_prompts or ("",) * len(request))
            notes += more
        if request.scheduler is None:
            scheduler = copy.deepcopy(self.scheduler)  # it keeps state between steps
        else:
            scheduler = build_scheduler(request.scheduler, self.scheduler, request.num_inference_steps)
        scheduler.set_timesteps(request.num_inference_steps)
        shape = (self.unet.config.in_channels, request.height // 8, request.width // 8)
        # The same draw as a stock diffusers pipeline given a list of CPU generators.
        noise = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in request.seeds]
        drawn = torch.stack(noise).to(self.device)
        alphas = scheduler.alphas_cumprod
        timesteps, repeats, mask = scheduler.timesteps, 1, None
        if edit is None:
            latents = drawn * scheduler.init_noise_sigma
        else:
            first = edit.first_step(len(timesteps))
            timesteps = timesteps[first:]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(first)
            known = self._encode(edit.images)
            latents = _noised(known, drawn, _alpha(alphas, timesteps[0]), scheduler)
            if edit.mask is not None:
                mask = _latent_mask(edit.mask).to(self.device)
                repeats = edit.num_resample_steps
        # A stochastic scheduler (LCM, ancestral) draws more noise on the way, again from each image's own generator.
        own = [torch.Generator("cpu").manual_seed(seed ^ 0x5EED) for seed in request.seeds]
        extra = {"generator": own} if "generator" in inspect.signature(scheduler.step).parameters else {}
        kind, difference = scheduler.config.prediction_type, None
        both_halves = steps_guided_anew(len(timesteps), request.guidance_reuse)
        with self._autocast():
            for done, t in enumerate(timesteps, 1):
                a = _alpha(alphas, t)
                after = _alpha(alphas, timesteps[done]) if done < len(timesteps) else 1.0
                use_guidance = scale != 1.0 and low <= ((1 - a) / a) ** 0.5 <= high
                anew = difference is None or done - 1 in both_halves
                for left in reversed(range(repeats)):
                    solver = copy.deepcopy(scheduler) if left else scheduler  # a repeated step leaves no trace in it
                    z = solver.scale_model_input(latents, t)
                    if use_guidance and anew:
                        both = self._unet(torch.cat([z, z]), t, torch.cat([negative, condition]))
                        unconditional, conditional = both.chunk(2)
                        output = guided(unconditional, conditional, scale)
                        if request.guidance_reuse > 1:
                            # Kept as a difference of noise: that changes least from step to step.
                            difference = (conditional - unconditional) * noise_per_output(kind, a)
                    else:
                        output = self._unet(z, t, condition, coarse=1 < done < len(timesteps))
                        if use_guidance:
                            assert difference is not None
                            output = output + (scale - 1) * difference / noise_per_output(kind, a)
                    stepped = solver.step(output, t, latents, return_dict=False, **extra)[0]
                    if mask is not None:
                        stepped = mask * stepped + (1 - mask) * _noised(known, drawn, after, scheduler)
                    if left:  # back to the level before the step (RePaint's algorithm 1, line 9)
                        fresh = torch.stack([torch.randn(shape, generator=g) for g in own]).to(self.device)
                        stepped = _renoised(stepped, fresh, a, after, scheduler)
                    latents = stepped
                if on_step is not None:
                    on_step(done, len(timesteps))
        if not torch.isfinite(latents).all():
            raise NumericalError(
                f"{self.name} gave NaN or infinite latents (dtype {self.dtype}, guidance_scale {scale:g}"
                + "".join(f", lora {lora} at {scale:g}" for lora, scale in request.adapters())
                + '): nothing was drawn. Lower guidance_scale, or load with dtype="float32".'
            )
        return latents, notes

    def _networks(self, request: GenerationRequest) -> Networks | None:
        """UNet and decoder for this size as OpenVINO, CUDA graphs or torch.compile have them; None: the plain ones."""
        if self._precision is not None:
            assert request.height and request.width and request.num_inference_steps
            unguided = request.guidance_scale == 1.0 or request.guidance_reuse > 1
            unguided = unguided or self.guidance_interval != (0.0, float("inf"))
            bears = unguided and request.num_inference_steps > 2
            return self._compile(request.height, request.width, coarse=self._precision == "int8" and bears)
        if self.device.type == "cuda":
            return self._graphs()
        if not self._inductor:
            return None
        if self._inductor_unet is None:
            self._inductor_unet = torch.compile(_Unet(unpacked(self.unet)))
        return Networks(self._inductor_unet, _Decoder(self.vae))

    def _graphs(self) -> Networks | None:
        """UNet and decoder as CUDA graphs of their present weights; None while the UNet has a LoRA's layers in it."""
        if getattr(self.unet, "_hf_peft_config_loaded", False):
            return None
        if self._graphed is None:
            unet = GraphedNetwork(_Unet(self.unet), self.dtype, self._inductor)
            self._graphed = (unet, GraphedNetwork(_Decoder(self.vae), self.dtype))
        for network in self._graphed:
            network.refresh()
        return Networks(*self._graphed)

    @torch.no_grad()
    def _compile(self, height: int, width: int, coarse: bool = False) -> Networks:
        """UNet and decoder for pictures of this size, by OpenVINO, called as `_unet` and `_pixels` call them."""
        size = (height, width, coarse)
        if size not in self._compiled:
            assert self._precision is not None
            shape = (self.unet.config.in_channels, height // 8, width // 8)
            z, condition = torch.zeros(2, *shape), self._embedding("").condition().repeat(2, 1, 1)

            def rows() -> list[tuple[np.ndarray, ...]]:
                return [tuple(x.numpy() for x in row) for row in self._typical_inputs(height, width)]

            example = (z, self._sinusoids(torch.tensor(500.0), 2), condition)
            name = f"{Path(self.name).name}-unet"
            if coarse:
                plain = self._compile(height, width)
                in_int8 = compiled(_Unet(self.unet), example, "int8", name=f"{name}-int8", calibration=rows)
                self._compiled[size] = plain._replace(coarse=in_int8)
            else:
                inner = default_precision() if self._precision == "int8" else self._precision
                decoder = compiled(_Decoder(self.vae), (z,), inner, name=f"{Path(self.name).name}-decoder")
                unet = compiled(_Unet(self.unet), example, inner, name=f"{name}-{inner}")
                self._compiled[size] = Networks(unet, decoder)
        return self._compiled[size]

    def _typical_inputs(self, height: int, width: int) -> list[tuple[Tensor, ...]]:
        """Up to TYPICAL_ROWS inputs of the UNet, (1, ...) each, spread evenly over TYPICAL_PROMPTS and the steps that
        int8 computes."""
        own, guided = self.capabilities, self.capabilities.default_guidance != 1.0
        request = GenerationRequest(
            TYPICAL_PROMPTS,
            tuple(range(len(TYPICAL_PROMPTS))),
            height=height,
            width=width,
            num_inference_steps=max(own.default_steps, 5 if guided else 3),  # of fewer it computes none
            guidance_reuse=8 if guided else 1,
        )
        self._seen = []
        self._compiled_now = None  # what drew last may be for another size
        try:
            self._denoise(validate(request, self.capabilities, self.name), None)
            rows = [tuple(x[i : i + 1] for x in call) for call in self._seen for i in range(len(call[0]))]
        finally:
            self._seen = None
        return rows[:: -(-len(rows) // TYPICAL_ROWS)]

    def _unet(self, z: Tensor, t: Tensor, condition: Tensor, coarse: bool = False) -> Tensor:
        if self._seen is not None and coarse:
            self._seen.append((z.clone(), self._sinusoids(t, len(z)), condition))
        if self._compiled_now is not None:
            network = (coarse and self._compiled_now.coarse) or self._compiled_now.unet
            return network(z, self._sinusoids(t, len(z)), condition)
        z = z.contiguous(memory_format=torch.channels_last)
        return self.unet(z, t.to(z.device), encoder_hidden_states=condition, return_dict=False)[0].float()

    def _sinusoids(self, t: Tensor, count: int) -> Tensor:
        """What the UNet makes of a timestep first, (count, channels)."""
        return self.unet.time_proj(t.float().repeat(count))

    @torch.no_grad()
    def _encode(self, images: np.ndarray) -> Tensor:
        with self._autocast():
            pixels = to_model(images).to(self.device).contiguous(memory_format=torch.channels_last)
            return self.vae.encode(pixels).latent_dist.mode().float()  # type: ignore[union-attr]

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> np.ndarray:
        with self._autocast():
            return to_uint8(self._pixels(latents).float().cpu())

    def _pixels(self, latents: Tensor) -> Tensor:
        if self._compiled_now is not None:
            return self._compiled_now.decoder(latents)
        return self.vae.decode(latents.contiguous(memory_format=torch.channels_last), return_dict=False)[0]


class _Unet(torch.nn.Module):
    """A UNet as a function of latents, sinusoids of the timestep (`time_proj`'s) and condition.

    The sinusoids stay outside: computed in bfloat16 they are of another timestep.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = copy.copy(unet)  # the layers are shared
        # What Accelerate makes of `forward` in training is bound to the UNet that was copied, and its time embedding.
        self.unet.__dict__.pop("forward", None)

    def forward(self, z: Tensor, sinusoids: Tensor, condition: Tensor) -> Tensor:
        self.unet.get_time_embed = lambda sample, timestep: sinusoids
        return self.unet(z, 0, encoder_hidden_states=condition, return_dict=False)[0]


class _Decoder(torch.nn.Module):
    """An autoencoder as a function of latents."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False)[0]


def _alpha(alphas: Tensor, t: Tensor) -> float:
    """alphas_cumprod at t. It is indexed by whole timesteps; solvers on Karras sigmas give fractions."""
    return float(alphas[round(float(t))])


def _noised(x: Tensor, noise: Tensor, a: float, scheduler: Any) -> Tensor:
    """x at the noise level of alphas_cumprod = a, in the scheduler's own scaling (Euler's solvers leave x unscaled)."""
    if float(scheduler.init_noise_sigma) != 1.0:
        return x + ((1 - a) / a) ** 0.5 * noise
    return a**0.5 * x + (1 - a) ** 0.5 * noise


def _renoised(z: Tensor, noise: Tensor, a: float, after: float, scheduler: Any) -> Tensor:
    """From the level of alphas_cumprod = after back to that of a: a draw of q(z_a | z_after), in the same scaling."""
    if float(scheduler.init_noise_sigma) != 1.0:
        return z + ((1 - a) / a - (1 - after) / after) ** 0.5 * noise
    return (a / after) ** 0.5 * z + (1 - a / after) ** 0.5 * noise


def _latent_mask(mask: np.ndarray) -> Tensor:
    """bool (H, W) -> float (1, 1, H/8, W/8), 1 where any of the 8 x 8 pixels is to be drawn anew."""
    height, width = mask.shape
    blocks = mask.reshape(height // 8, 8, width // 8, 8).any(axis=(1, 3))
    return torch.from_numpy(blocks).float()[None, None]


class PipelineGenerator:
    """Any text-to-image diffusers pipeline (SD 1.5, SDXL, SD3, FLUX, ...) as an ImageGenerator."""

    def __init__(self, pipeline: Any, *, name: str, folder: Path | None = None, quantized: str = "") -> None:
        self.pipeline, self.name, self.folder, self.quantized = pipeline, name, folder, quantized
        pipeline.set_progress_bar_config(disable=True)
        self._parameters = inspect.signature(pipeline.__call__).parameters
        if "prompt" not in self._parameters:
            raise ModelMismatchError(f"{name} is a {type(pipeline).__name__}, which takes no prompt")
        model: Any = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        scale = getattr(pipeline, "vae_scale_factor", 8)
        sample: Any = getattr(pipeline, "default_sample_size", None) or getattr(model.config, "sample_size", 64)
        side = (sample if isinstance(sample, int) else sample[0]) * scale
        steps = self._parameters.get("num_inference_steps")
        guidance = self._parameters.get("guidance_scale")
        has_negative = "negative_prompt" in self._parameters
        self.capabilities = Capabilities(
            default_size=(side, side),
            default_steps=int(steps.default) if steps is not None else 1,
            default_guidance=float(guidance.default) if guidance is not None else 1.0,
            size_multiple=max(8, scale),
            guidance=guidance is not None,
            negative_prompt=has_negative,
            # diffusers says whether it has such a pipeline when asked for one; that costs an import of them all.
            image_to_image=True,
            inpaint=True,
            lora=hasattr(pipeline, "load_lora_weights") and not quantized,
            schedulers=possible_schedulers(pipeline.scheduler),
        )
        names = ("unet", "transformer", "text_encoder", "text_encoder_2")
        parts = {part: getattr(pipeline, part) for part in names if getattr(pipeline, part, None) is not None}
        self.slots = AdapterSlots(parts, name, folder, lambda: pipeline.unload_lora_weights())
        self._remembered: dict[str, dict[str, Tensor]] = {}
        self._inductor = False

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        attention: str = "auto",
        name: str | None = None,
        offload: str | None = None,
        vae_tiling: bool = False,
        vae_slicing: bool = False,
        quantized: str = "",
    ) -> PipelineGenerator:
        """Load a diffusers folder (safetensors only, no remote code).

        Args:
            quantized: one of quantization.QUANTIZED: the weights of the UNet or transformer, and of a T5.
            offload, vae_tiling, vae_slicing: see gigdiff.load. Offloading has not been run: it needs CUDA.

        Raises:
            InputError, MissingDependencyError: attention, or an autoencoder that has no tiling or slicing.
        """
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(
            folder, dtype=dtype or torch.float32, use_safetensors=True, trust_remote_code=False
        )
        model: Any = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        if quantized:  # before the first move: the GPU may not hold it whole
            encoders = (getattr(pipeline, part, None) for part in ("text_encoder_2", "text_encoder_3"))
            for network in (model, *(one for one in encoders if "T5" in type(one).__name__)):
                if network is not None:
                    quantize_weights(network, quantized)
        if offload is None:
            pipeline.to(device)
        if model is not None:
            set_attention(model, attention, device=device)
        for option, method in ((vae_tiling, "enable_tiling"), (vae_slicing, "enable_slicing")):
            if option:
                _enable_on_vae(pipeline, method)
        if offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        return cls(pipeline, name=name or str(folder), folder=Path(folder), quantized=quantized)

    def use_compile(self) -> None:
        """From now on the UNet or transformer is compiled by torch.compile, for each size when that is first drawn."""
        (getattr(self.pipeline, "unet", None) or self.pipeline.transformer).compile()
        self._inductor = True

    def generate(self, request: GenerationRequest, *, on_step: OnStep | None = None) -> GenerationResult:
        """Draw the request's images; see ImageGenerator.

        Raises:
            NumericalError: NaN came out, or the pipeline's own safety checker blacked an image out.
        """
        return self._draw(request, None, on_step)

    def edit(self, request: GenerationRequest, start: EditStart, *, on_step: OnStep | None = None) -> GenerationResult:
        """Draw from pictures by diffusers' own image-to-image or inpainting pipeline over the same weights.

        Raises:
            CapabilityError: diffusers has none for this kind of model. Else as `generate`.
        """
        return self._draw(request, start, on_step)

    def _draw(self, request: GenerationRequest, edit: EditStart | None, on_step: OnStep | None) -> GenerationResult:
        request = validate(request, self.capabilities, self.name)
        started = time.perf_counter()
        notes = self.slots.use(*_loras(request))
        with self._solver(request):
            output = self._run(request, edit, on_step)
        blocked = [i for i, hit in enumerate(getattr(output, "nsfw_content_detected", None) or []) if hit]
        if blocked:
            raise NumericalError(
                f"{self.name}'s safety checker blacked out image {blocked[0]}, "
                f"{request.prompts[blocked[0]]!r}. Change the prompt or the seed."
            )
        images = to_uint8(output.images.float().cpu() * 2 - 1)
        notes = tuple(dict.fromkeys((*notes, *self._cut(request.prompts))))
        taken = time.perf_counter() - started
        return GenerationResult(images, request, self.name, taken, notes, extra=self._drawn_by())

    def _drawn_by(self) -> dict[str, str]:
        """The backend, for the picture's file, where it was not plain torch."""
        backend = " ".join(filter(None, ("compile" if self._inductor else "torch", self.quantized)))
        return {} if backend == "torch" else {"backend": backend}

    @contextlib.contextmanager
    def _solver(self, request: GenerationRequest) -> Iterator[None]:
        """Inside, the pipeline has the request's solver; afterwards its own again."""
        own = self.pipeline.scheduler
        if request.scheduler is not None:
            assert request.num_inference_steps
            self.pipeline.scheduler = build_scheduler(request.scheduler, own, request.num_inference_steps)
        try:
            yield
        finally:
            self.pipeline.scheduler = own

    def _run(self, request: GenerationRequest, edit: EditStart | None, on_step: OnStep | None) -> Any:
        """The pipeline's output for a request that was validated."""
        pipeline = self.pipeline if edit is None else self._editing(edit)
        parameters = inspect.signature(pipeline.__call__).parameters
        arguments: dict[str, Any] = {
            **self._prompts(request),
            "num_inference_steps": request.num_inference_steps,
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds],
            "output_type": "pt",
        }
        if "height" in parameters:
            arguments |= {"height": request.height, "width": request.width}
        if edit is not None:
            arguments |= {"image": [to_pil(image) for image in edit.images], "strength": edit.strength}
        if edit is not None and edit.mask is not None:
            arguments["mask_image"] = [to_pil(np.repeat(edit.mask[..., None] * np.uint8(255), 3, 2))] * len(request)
        if self.capabilities.guidance:
            arguments["guidance_scale"] = request.guidance_scale
        if self.capabilities.negative_prompt and request.negative_prompts is not None:
            arguments["negative_prompt"] = list(request.negative_prompts)
        if on_step is not None and "callback_on_step_end" in parameters:
            total = request.num_inference_steps or 1
            total -= edit.first_step(total) if edit is not None else 0

            def report(_pipeline: Any, step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
                on_step(step + 1, total)
                return kwargs

            arguments["callback_on_step_end"] = report
        return pipeline(**arguments)

    def _prompts(self, request: GenerationRequest) -> dict[str, Any]:
        """The pipeline's arguments for the prompts: their embeddings where all are remembered."""
        known = [self._remembered.get(prompt) for prompt in request.prompts]
        if request.negative_prompts is not None or not all(known):
            return {"prompt": list(request.prompts)}
        return {key: torch.cat([one[key] for one in known if one]).to(self.device) for key in known[0] or ()}

    @property
    def device(self) -> torch.device:
        return self.pipeline._execution_device  # under offloading, `pipeline.device` is where it rests

    def embed(
        self, texts: Sequence[str], *, guidance: bool = False, max_length: int | None = None
    ) -> dict[str, Tensor]:
        """What the pipeline's own `encode_prompt` makes of `texts`, by the names of its arguments.

        "prompt_embeds" (N, L, D), "pooled_prompt_embeds" (N, P) where the family has them, and with `guidance` the
        "negative_" ones of no negative prompt. `max_length`: tokens for T5, where the pipeline has one.
        """
        takes = inspect.signature(self.pipeline.encode_prompt).parameters
        wanted: dict[str, Any] = {
            "prompt": list(texts),
            "prompt_2": None,
            "prompt_3": None,
            "device": self.device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": guidance,
        }
        if max_length is not None:
            wanted["max_sequence_length"] = max_length
        output = self.pipeline.encode_prompt(**{key: value for key, value in wanted.items() if key in takes})
        # Stable Diffusion gives two; SDXL and SD3 four; FLUX (no negative prompt) three, the last being position ids.
        names: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")
        if len(output) == 4:
            names += ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        elif len(output) == 3:
            names = ("prompt_embeds", "pooled_prompt_embeds")
        return {name: tensor for name, tensor in zip(names, output, strict=False) if tensor is not None}

    @torch.no_grad()
    def remember(self, texts: Iterable[str]) -> None:
        """Encode `texts` now, so that they can be drawn after `free_encoders`."""
        for text in dict.fromkeys(texts):
            self._remembered[text] = {k: v.cpu() for k, v in self.embed([text], guidance=True).items()}

    def free_encoders(self) -> None:
        """Let go of the text encoders and the autoencoder's encoder: only what `remember` was given can be drawn."""
        for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if getattr(self.pipeline, part, None) is not None:
                setattr(self.pipeline, part, None)
                self.slots.parts.pop(part, None)
        self.pipeline.vae.encoder = torch.nn.Identity()

    def _editing(self, edit: EditStart) -> Any:
        """diffusers' pipeline for edits with or without a mask, sharing this one's parts."""
        from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

        family = AutoPipelineForImage2Image if edit.mask is None else AutoPipelineForInpainting
        try:
            pipeline = family.from_pipe(self.pipeline)
        except ValueError as error:
            raise CapabilityError(
                f"{self.name} is a {type(self.pipeline).__name__}, for which diffusers has no "
                f"{'image-to-image' if edit.mask is None else 'inpainting'} pipeline; take another model, such as mini."
            ) from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _cut(self, prompts: tuple[str, ...]) -> Iterator[str]:
        """A note for each prompt that the pipeline's own tokenizer cuts: diffusers only logs it."""
        tokenizer = getattr(self.pipeline, "tokenizer", None)
        limit = getattr(tokenizer, "model_max_length", None)
        if tokenizer is None or limit is None or limit > 10_000 or "max_sequence_length" in self._parameters:
            return
        for prompt in dict.fromkeys(prompts):
            ids = tokenizer(prompt, verbose=False)["input_ids"]
            if len(ids) > limit:
                left_out = tokenizer.decode(ids[limit - 1 :], skip_special_tokens=True).strip()
                yield cut_note(self.name, limit, left_out)


def _enable_on_vae(pipeline: Any, method: str) -> None:
    """Calls the autoencoder's enable_tiling or enable_slicing.

    Raises:
        InputError: it has none.
    """
    vae = getattr(pipeline, "vae", None)
    if not hasattr(vae, method):
        option = method.replace("enable", "vae")
        raise InputError(f"{option}: {type(pipeline).__name__}'s {type(vae).__name__} has no such mode; leave it out.")
    getattr(vae, method)()


def load_unet(folder: str | Path) -> Any:
    """The UNet2DConditionModel in `folder`, in float32.

    Raises:
        ModelNotFoundError: there is none. ModelMismatchError: the folder holds another model.
    """
    import diffusers

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"no UNet in {folder}: give a model's unet/ folder")
    try:
        return diffusers.UNet2DConditionModel.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelMismatchError(f"{folder} does not load as a UNet2DConditionModel: {str(error)[:300]}") from error


def unet_of(folder: Path, card: dict[str, Any]) -> Any:
    """A model folder's own UNet, or that of the embedded model which its card names as `unet_of`, with the LoRA in the
    folder's unet/ folded in: another model for a fifth of the size.

    Raises:
        ModelNotFoundError: a part is missing. ModelMismatchError: the LoRA is of other weights than that model's.
    """
    base = card.get("unet_of")
    if base is None:
        return load_unet(folder / "unet")
    if base not in EMBEDDED:
        raise ModelMismatchError(f'{folder} is a LoRA on the UNet of "{base}", which is no embedded model')
    lora = read_lora(folder / "unet" / WEIGHTS_NAME)
    there, here = lora.about.get("base_hash"), base_hash(folder_of(base), "unet")
    if there != here:
        raise ModelMismatchError(f'{folder} is a LoRA on other weights ({there}) than those of "{base}" ({here})')
    unet = load_unet(folder_of(base) / "unet")
    fold_file(unet, lora, "unet")
    return unet


def save_folder(
    folder: str | Path,
    unet: Any,
    vae: ProductAutoencoder | None,
    scheduler: Any,
    card: dict[str, Any],
    *,
    half: bool = True,
) -> Path:
    """Write a model folder that `gigdiff.load` and diffusers' StableDiffusionPipeline.from_pretrained both read.

    The text encoder is not in it (gigdiff finds it, see gigdiff.text); a stock pipeline is given `prompt_embeds`.

    Args:
        folder: where; it must not exist, or be a model folder to replace.
        unet, vae, scheduler: the parts. unet None: the card names a `unet_of`, and the LoRA is the caller's to put
            into unet/. vae None: the card names a `shared_vae` (gigdiff.generators.shared_vae); a
            stock pipeline is then given it, `from_pretrained(folder, vae=load_autoencoder(...), ...)`.
        card: content of gigdiff.json, see gigdiff.pretrained.
        half: store weights in float16.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: part for name, part in (("unet", unet), ("vae", vae)) if part is not None}
    for part, model in parts.items():
        stored: Any = copy.deepcopy(model).to("cpu", memory_format=torch.contiguous_format)
        save_network(torch.nn.Module.half(stored) if half else stored, folder / part)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "unet": [None, None] if unet is None else ["diffusers", "UNet2DConditionModel"],
        "vae": [None, None] if vae is None else ["gigdiff.models.autoencoder", "ProductAutoencoder"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "gigdiff.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return folder
