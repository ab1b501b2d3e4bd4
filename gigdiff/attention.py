"""Attention backends: which are usable here, and which one a UNet should run with.

    math      plain softmax(q k^T) v. The fastest in training on a CPU at the embedded models' sizes.
    sdpa      torch's scaled_dot_product_attention: flash, memory-efficient or cuDNN kernels on CUDA.
    xformers  xformers' memory-efficient attention, CUDA only (pip install 'gigdiff[cuda]').
    auto      the choice of `choose`.

xformers and SDPA on CUDA have not been run by this project's tests: they had no GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

from gigdiff.errors import InputError, MissingDependencyError, nearest

__all__ = ["BACKENDS", "available_backends", "choose", "set_attention"]

BACKENDS = ("auto", "sdpa", "xformers", "math")


def available_backends() -> dict[str, tuple[bool, str]]:
    """Backend -> (usable here, why or why not)."""
    import torch

    cuda = torch.cuda.is_available()
    found: dict[str, tuple[bool, str]] = {
        "math": (True, "plain softmax attention, any device"),
        "sdpa": (True, f"torch {torch.__version__}, {'CUDA kernels' if cuda else 'CPU kernel'}"),
    }
    if importlib.util.find_spec("xformers") is None:
        found["xformers"] = (False, "not installed: pip install 'gigdiff[cuda]' (CUDA only)")
    elif not cuda:
        found["xformers"] = (
            False,
            f"xformers {importlib.metadata.version('xformers')} needs a CUDA device, none is here",
        )
    else:
        found["xformers"] = (True, f"xformers {importlib.metadata.version('xformers')}")
    return found


def choose(device_type: str, training: bool) -> str:
    """What "auto" means: math on a CPU in training, SDPA everywhere else.

    Measured on a CPU only: PyTorch's fused CPU attention has a slow backward pass at 80 to 330 tokens. On CUDA, SDPA
    picks flash or memory-efficient kernels itself.
    """
    return "math" if device_type == "cpu" and training else "sdpa"


def set_attention(unet: Any, backend: str, *, training: bool = False) -> str:
    """Give every attention layer of a diffusers UNet the backend; the one that was chosen.

    Raises:
        InputError: no backend of that name.
        MissingDependencyError: it is not usable here; says why and what installs it.
    """
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    if backend not in BACKENDS:
        raise InputError(f'attention "{backend}": {nearest(backend, BACKENDS)}')
    chosen = choose(unet.device.type, training) if backend == "auto" else backend
    usable, reason = available_backends()[chosen]
    if not usable:
        raise MissingDependencyError(f'attention "{chosen}" can\'t be used: {reason}')
    if chosen == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    else:
        unet.set_attn_processor(AttnProcessor() if chosen == "math" else AttnProcessor2_0())
    return chosen
