"""`gigdiff.upscale`: larger pictures by super-resolution, with the embedded upscaler or one that spandrel reads."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from gigdiff.errors import MissingDependencyError, ModelMismatchError, ModelNotFoundError, nearest
from gigdiff.generators.request import GenerationResult, check_number
from gigdiff.images import to_model, to_pil, to_uint8
from gigdiff.pictures import Picture, describe_changes, open_picture
from gigdiff.pretrained import UPSCALERS, folder_of
from gigdiff.provenance import complete, lora_hash, pixel_hash, weights_hash

if TYPE_CHECKING:
    import torch

__all__ = ["Upscaler", "keep_upscaler", "load_upscaler", "upscale"]

TILE = 192  # a larger picture is enlarged in tiles of so many pixels each way
PIXELS_AT_ONCE = 16 * 80 * 64
FIDELITY = 0.5


def upscale(
    images: Picture | Sequence[Picture],
    *,
    model: str | os.PathLike[str] = "mini-upscaler",
    fidelity: float = FIDELITY,
    device: str | None = None,
) -> Image.Image | list[Image.Image]:
    """Enlarges pictures, by four with the embedded upscaler.

    Args:
        images: a path, a PIL image, uint8 (H, W, 3), or a list of those. Any size; large ones are done in tiles, which
            leave no seams because each sees as much around it as the network does.
        model: an embedded upscaler, a folder of training/train_upscaler.py, or a .safetensors file that spandrel reads
            (Real-ESRGAN and many others; pip install 'gigdiff[upscalers]').
        fidelity: 0 to 1. 1 is true to the pixels and soft, 0 is sharp and invents detail. Embedded upscalers only.
        device: "cpu", "cuda", "mps"; None = the best there is.

    Returns:
        RGB PIL images, one for one; `.info` is kept and says what was done.

    Raises:
        InputError, DataError: a picture or argument. ModelNotFoundError, ModelMismatchError: the model.
    """
    several = isinstance(images, list | tuple)
    sources: Sequence[Any] = images if several else [images]  # type: ignore[assignment]
    pictures = [open_picture(source) for source in sources]
    upscaler = keep_upscaler(os.fspath(model), float(check_number("fidelity", fidelity, 0, 1, "1 is faithful")), device)
    out = []
    for source, picture in zip(sources, pictures, strict=True):
        large = to_pil(upscaler(np.asarray(picture)[None])[0])
        own = {key: text for key, text in picture.info.items() if isinstance(key, str) and isinstance(text, str)}
        if "prompt" not in own:  # a photo, and not a picture that gigdiff drew
            notes = "\n".join(describe_changes(source))
            own |= {"edit": "upscale", "source_image": pixel_hash(np.asarray(picture)), "notes": notes}
        large.info.update(complete(own | upscaler.fields()).items())
        out.append(large)
    return out if several else out[0]


class Upscaler:
    """Pictures in, larger pictures out.

    Args:
        network: float (N, 3, H, W) in [-1, 1] -> (N, 3, scale H, scale W).
        name, weights: reported. scale: each way. reach: input pixels that an output pixel depends on, each way.
        fidelity: how it was mixed, or None.
        dtype: of autocast; float32 = none.
    """

    def __init__(
        self,
        network: Callable[[torch.Tensor], torch.Tensor],
        *,
        name: str,
        scale: int,
        reach: int,
        device: torch.device,
        dtype: torch.dtype,
        weights: str = "",
        fidelity: float | None = None,
    ) -> None:
        self.network, self.name, self.scale, self.reach = network, name, scale, reach
        self.device, self.dtype, self.weights, self.fidelity = device, dtype, weights, fidelity

    def __call__(self, images: np.ndarray, tile: int = TILE) -> np.ndarray:
        """uint8 (N, H, W, 3) -> uint8 (N, scale H, scale W, 3).

        Raises:
            NumericalError: NaN came out.
        """
        height, width = images.shape[1:3]
        at_once = max(1, PIXELS_AT_ONCE // (min(height, tile) * min(width, tile)))
        out = np.empty((len(images), height * self.scale, width * self.scale, 3), np.uint8)
        for start in range(0, len(images), at_once):
            part = to_model(images[start : start + at_once])
            for top in range(0, height, tile):
                for left in range(0, width, tile):
                    self._tile(part, top, left, tile, out[start : start + at_once])
        return out

    def enlarge(self, result: GenerationResult) -> GenerationResult:
        """A result with larger images and the fields that say so."""
        import time

        started = time.perf_counter()
        images = self(result.images)
        seconds = result.seconds + time.perf_counter() - started
        return replace(result, images=images, seconds=seconds, extra={**result.extra, **self.fields()})

    def fields(self) -> dict[str, str]:
        """What goes into a saved file."""
        fidelity = "" if self.fidelity is None else f"{self.fidelity:g}"
        fields = {"upscaler": self.name, "upscaler_weights": self.weights, "fidelity": fidelity}
        return {key: text for key, text in fields.items() if text}

    def _tile(self, images: torch.Tensor, top: int, left: int, tile: int, out: np.ndarray) -> None:
        """Enlarge one tile with as much around it as the network sees, and keep the tile."""
        import torch

        height, width = images.shape[-2:]
        bottom, right = min(height, top + tile), min(width, left + tile)
        above, beside = max(0, top - self.reach), max(0, left - self.reach)
        part = images[..., above : min(height, bottom + self.reach), beside : min(width, right + self.reach)]
        part = part.to(self.device).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
            large = to_uint8(self.network(part).float().cpu())
        s = self.scale
        rows = slice((top - above) * s, (bottom - above) * s)
        columns = slice((left - beside) * s, (right - beside) * s)
        out[:, top * s : bottom * s, left * s : right * s] = large[:, rows, columns]


@functools.lru_cache(maxsize=4)
def keep_upscaler(name: str, fidelity: float = FIDELITY, device: str | None = None) -> Upscaler:
    """`load_upscaler`, loaded once a process."""
    return load_upscaler(name, fidelity, device)


def load_upscaler(name: str | os.PathLike[str], fidelity: float = FIDELITY, device: str | None = None) -> Upscaler:
    """Loads an upscaler; arguments and errors as `upscale`."""
    from gigdiff.generators.loading import pick_device

    check_number("fidelity", fidelity, 0.0, 1.0, "1 is faithful, 0 is sharp")
    where = pick_device(device)
    text = os.fspath(name)
    path = folder_of(text) if text in UPSCALERS else Path(text).expanduser()
    if path.suffix in (".safetensors", ".pth", ".pt", ".ckpt"):
        return _from_spandrel(path, text, where)
    if not path.is_dir():
        if text in UPSCALERS:
            raise ModelNotFoundError(
                f'the embedded upscaler "{text}" is not in this version; upscale=False draws without.'
            )
        raise ModelNotFoundError(
            f'there is no upscaler "{text}"; {nearest(text, UPSCALERS)}. Or give a folder, or a .safetensors file.'
        )
    return _own(path, text, fidelity, where)


def _own(folder: Path, name: str, fidelity: float, device: torch.device) -> Upscaler:
    """A network of ours: a folder with fidelity/ and sharp/ to mix, or a single one."""
    import torch

    from gigdiff.models.upscaler import interpolated, load_upscaler_network
    from gigdiff.precision import embedded_dtype

    if (folder / "fidelity").is_dir() and (folder / "sharp").is_dir():
        faithful, sharp = load_upscaler_network(folder / "fidelity"), load_upscaler_network(folder / "sharp")
        network, mixed = interpolated(faithful.float(), sharp.float(), fidelity), True
    else:
        network, mixed = load_upscaler_network(folder).float(), False
    network = network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return Upscaler(
        network,
        name=name,
        scale=network.config["scale"],
        reach=network.reach,
        device=device,
        dtype=embedded_dtype(device),
        weights=weights_hash(folder),
        fidelity=fidelity if mixed else None,
    )


def _from_spandrel(path: Path, name: str, device: torch.device) -> Upscaler:
    """Real-ESRGAN, SwinIR and others, by the spandrel library; safetensors only."""
    import torch

    if path.suffix != ".safetensors":
        raise ModelMismatchError(
            f"{name} can run code when loaded; only .safetensors is read. Convert it: "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), 'x.safetensors')."
        )
    if not path.is_file():
        raise ModelNotFoundError(f'there is no upscaler file "{path}".')
    try:
        import spandrel
    except ImportError as error:
        raise MissingDependencyError(
            "upscalers other than gigdiff's own need spandrel: pip install 'gigdiff[upscalers]'"
        ) from error
    try:
        model = spandrel.ModelLoader(device=device).load_from_file(str(path))
    except Exception as error:  # spandrel and torch raise their own, KeyError, RuntimeError, ...
        raise ModelMismatchError(f"{name} is no upscaler that spandrel knows: {str(error)[:300]}") from error
    if not isinstance(model, spandrel.ImageModelDescriptor) or model.input_channels != 3 or model.output_channels != 3:
        raise ModelMismatchError(f"{name} does not turn an RGB picture into an RGB picture.")
    model.eval()

    def network(x: torch.Tensor) -> torch.Tensor:
        return model((x + 1) / 2) * 2 - 1

    return Upscaler(
        network,
        name=name,
        scale=model.scale,
        reach=32,
        device=device,
        dtype=torch.float32,
        weights=lora_hash(str(path)),
    )
