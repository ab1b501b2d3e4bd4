"""Which number format a device computes fast in: one answer for generators, trainers and upscalers.

On a CPU it is a matter of its instructions. Where bfloat16 is emulated (x86 before AVX-512 BF16, such as Zen 3) a
matrix product was measured 150 times slower than in float32, so nothing here takes bfloat16 on a guess.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from gigdiff.errors import InputError, nearest

if TYPE_CHECKING:
    import torch

__all__ = [
    "MIXED_PRECISIONS",
    "autocast_dtype",
    "cpu_has_amx",
    "cpu_has_bfloat16",
    "embedded_dtype",
    "training_device",
    "training_precision",
]

MIXED_PRECISIONS = ("auto", "no", "bf16", "fp16")


def cpu_has_amx() -> bool:
    """Whether the CPU multiplies tiles of bfloat16 (Intel's AMX)."""
    import torch

    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX-512 BF16, AMX, Arm); emulated it would be slow."""
    import torch

    mkldnn = torch.backends.mkldnn
    return mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)())


def embedded_dtype(device: torch.device) -> torch.dtype:
    """What gigdiff's own models compute in on `device`: bfloat16, or float32 on a CPU without bfloat16 instructions."""
    import torch

    return torch.bfloat16 if device.type != "cpu" or cpu_has_bfloat16() else torch.float32


def training_device() -> str:
    """The type of device that Accelerate is going to train on: "cuda", "mps" or "cpu" (also by `--cpu`)."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def training_precision(asked: str) -> str:
    """The `mixed_precision` for Accelerate: "no", "bf16" or "fp16"; "auto" is chosen for the device.

    "auto" is bf16 where the device computes in it, float32 ("no") everywhere else: fp16 needs a loss scale and is
    left to those who ask for it. An explicit bf16 on a CPU that emulates it is obeyed, with a warning.

    Raises:
        InputError: not one of MIXED_PRECISIONS, or fp16 without a GPU.
    """
    import torch

    if asked not in MIXED_PRECISIONS:
        raise InputError(f"--mixed_precision {asked!r} is unknown; {nearest(asked, MIXED_PRECISIONS)}")
    device = training_device()
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device == "cpu" and cpu_has_bfloat16()
    if asked == "auto":
        return "bf16" if fast else "no"
    if asked == "fp16" and device != "cuda":
        raise InputError(f"--mixed_precision fp16 needs a GPU (CUDA) and this run is on {device}: use auto, no or bf16")
    if asked == "bf16" and device == "cpu" and not fast:
        print(
            "warning: this CPU has no bfloat16 instructions and emulates them, many times slower than float32: "
            "--mixed_precision auto or no is faster here",
            file=sys.stderr,
        )
    return asked


def autocast_dtype(mixed_precision: str) -> torch.dtype:
    """What Accelerate's autocast computes in under "no", "bf16" or "fp16": float32 for the first."""
    import torch

    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
