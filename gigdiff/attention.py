"""Attention backends: which are usable here, and which one a model should run with.

    sdpa            torch's scaled_dot_product_attention; on CUDA torch picks one of the three kernels below.
    sdpa_flash      its FlashAttention kernel alone. CUDA, float16 or bfloat16, no mask.
    sdpa_efficient  its memory-efficient kernel alone. CUDA.
    sdpa_cudnn      its cuDNN kernel alone. CUDA, float16 or bfloat16.
    xformers        xformers' memory-efficient attention. CUDA; pip install 'gigdiff[cuda]'.
    math            plain softmax(q k^T) v, any device. The fastest in training on a CPU at the embedded models' sizes.
    blockwise       plain too, over blocks of queries, with a backward pass of its own (blockwise_attention.py). The
                    fastest in training on a CPU in bfloat16 at Stable Diffusion's sizes.
    sliced          the plain one, one head of one image after another: the least memory without SDPA's kernels.
    auto            the choice of `choose`, logged at INFO.

UNets take all of them. Transformers (SD3, FLUX, ...) take all but "sliced"; with "auto" they keep diffusers' default,
SDPA.

**What "auto" may change.** Backends round differently, so another choice is another picture in its last bits. On a CPU
inference is therefore always SDPA, by a table and never by a stopwatch. Where "auto" measures (CUDA; training on a CPU
at sizes that the table lacks) the answer is kept in a file, and used only if that file could be written: two
runs on one machine choose alike. To pin it across machines, name the backend.

**What was run.** tests/test_cuda.py, on an H100 (torch 2.11, CUDA 13): SDPA's kernels, plain and sliced attention
against float64, gradients included. xformers was not: PyPI's 0.0.35 is built for CUDA 12.8 and has no kernel there, as
"auto" found and a request for it was told. Without a GPU those tests are skipped.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import platform
import statistics
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigdiff.cache import cache_folder
from gigdiff.errors import InputError, MissingDependencyError, nearest

if TYPE_CHECKING:
    import torch

__all__ = ["BACKENDS", "Workload", "available_backends", "cache_file", "choose", "measure", "set_attention"]

BACKENDS = ("auto", "sdpa", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "xformers", "math", "blockwise", "sliced")
KERNELS = {  # backend -> torch.nn.attention.SDPBackend
    "sdpa_flash": "FLASH_ATTENTION",
    "sdpa_efficient": "EFFICIENT_ATTENTION",
    "sdpa_cudnn": "CUDNN_ATTENTION",
}
DISPATCHED = {  # backend -> its name in diffusers' dispatcher
    "sdpa": "native",
    "sdpa_flash": "_native_flash",
    "sdpa_efficient": "_native_efficient",
    "sdpa_cudnn": "_native_cudnn",
    "math": "_native_math",
    "xformers": "xformers",
}
# Training on a CPU. Up to the first number whole training steps on two threads were measured a third faster with plain
# attention. Above it, in bfloat16, blockwise took a sixth off a step of a UNet of Stable Diffusion's layout at 1,024
# tokens and a tenth at 4,096 (docs/lora.md); in float32 a lone layer (4 heads of 48) took half the time with SDPA from
# the second number on, and between the two it is measured.
CPU_MATH_TOKENS = 330
CPU_SDPA_TOKENS = 1024
CLEARLY_FASTER = 1.1  # than SDPA, before "auto" leaves it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workload:
    """What "auto" decides by.

    Attributes:
        device: where it runs.
        dtype: what attention computes in, under autocast the autocast's.
        tokens: queries of the largest self-attention, at the model's own size.
        heads, head_dim: of that layer.
        training: with a backward pass.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: int
    heads: int
    head_dim: int
    training: bool

    def __str__(self) -> str:
        use = "training" if self.training else "inference"
        kind = str(self.dtype).removeprefix("torch.")
        return f"{use} on {self.device}, {kind}, {self.tokens} tokens, {self.heads} heads of {self.head_dim}"


class OneKernel:
    """A diffusers attention processor within torch's `sdpa_kernel`, so that SDPA takes this kernel or fails.

    Args:
        kernel: name of a torch.nn.attention.SDPBackend (text: a processor is copied with its model).
        processor: the processor that calls scaled_dot_product_attention.
    """

    def __init__(self, kernel: str, processor: Any) -> None:
        self.kernel, self.processor = kernel, processor

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """As the processor.

        Raises:
            InputError: the kernel can't do this call, such as one with a mask.
        """
        from torch.nn.attention import SDPBackend, sdpa_kernel

        try:
            with sdpa_kernel(getattr(SDPBackend, self.kernel)):
                return self.processor(attn, *args, **kwargs)
        except RuntimeError as error:
            if not any(words in str(error) for words in ("No available kernel", "No viable backend")):
                raise
            raise InputError(
                f"SDPA's {self.kernel} kernel can't do this layer (a mask, a dtype or a head size that it does not "
                'take); load the model with attention="sdpa".'
            ) from error


def available_backends() -> dict[str, tuple[bool, str]]:
    """Backend -> (usable on this machine, why or why not)."""
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        kernels = (True, f"torch {torch.__version__}, CUDA {torch.version.cuda}")
    elif torch.version.cuda is None:
        kernels = (
            False,
            f"torch {torch.__version__} is built without CUDA; on a machine with a GPU: pip install --force-reinstall "
            "torch (Windows: the command on https://pytorch.org/get-started/locally)",
        )
    else:
        kernels = (False, f"torch {torch.__version__} finds no CUDA device")
    return {
        "sdpa": (True, f"torch {torch.__version__}, {'CUDA kernels' if cuda else 'CPU kernel'}"),
        **dict.fromkeys(KERNELS, kernels),
        "xformers": _xformers(cuda),
        "math": (True, "plain softmax attention, any device"),
        "blockwise": (True, "plain, over blocks of queries; for training on a CPU"),
        "sliced": (True, "plain, one head at a time, any device; UNets only"),
    }


def _xformers(cuda: bool) -> tuple[bool, str]:
    if importlib.util.find_spec("xformers") is None:
        return False, "not installed: pip install 'gigdiff[cuda]' (CUDA only)"
    version = importlib.metadata.version("xformers")
    if not cuda:
        return False, f"xformers {version} needs a CUDA device, none is here"
    try:
        importlib.import_module("xformers.ops")
    except Exception as error:  # built for another torch: ImportError, OSError, RuntimeError
        reason = " ".join(str(error).split())[:200]
        mend = "pip install --force-reinstall 'gigdiff[cuda]'"
        return False, f"xformers {version} does not import ({reason}): {mend}"
    return True, f"xformers {version}"


def set_attention(
    model: Any,
    backend: str,
    *,
    training: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    size: tuple[int, int] | None = None,
) -> str:
    """Give every attention layer of a diffusers UNet or transformer the backend; returns the one that was chosen.

    Args:
        model: where its attention layers are diffusers'.
        backend: one of BACKENDS.
        training: with a backward pass; "auto" and the kernels' limits depend on it.
        dtype: what it computes in; None: what its weights are in.
        device: where it is going to run; None: where it is.
        size: latents' height and width; None: the model's own size. "auto" goes by it.

    Raises:
        InputError: no backend of that name, or one that can't run this model: its device, dtype or head size.
        MissingDependencyError: not usable on this machine; says what was found and what installs it.
    """
    import torch

    if backend not in BACKENDS:
        raise InputError(f'attention "{backend}": {nearest(backend, BACKENDS)}')
    device = model.device if device is None else torch.device(device)
    dtype = dtype or model.dtype
    is_unet = "down_block_types" in model.config
    if backend != "auto":
        chosen, reason = backend, "asked for"
    elif is_unet:
        chosen, reason = choose(_workload(model, device, dtype, training, size))
    else:
        # Left alone, not set: diffusers' default may come from its own DIFFUSERS_ATTN_BACKEND.
        log.info("attention of %s: as diffusers has it, SDPA", type(model).__name__)
        return "sdpa"
    try:
        _check(chosen, device, dtype, _head_dims(model), training)
    except InputError:
        if backend != "auto":
            raise
        # Only the outermost layer was measured; an inner one may have larger heads.
        chosen, reason = "sdpa", f"{chosen} can't run every layer"
    if is_unet:
        _set_unet(model, chosen)
    else:
        _set_transformer(model, chosen)
    log.info("attention of %s on %s: %s (%s)", type(model).__name__, device, chosen, reason)
    return chosen


def choose(work: Workload) -> tuple[str, str]:
    """What "auto" means for this work: (backend, the reason).

    From the table: SDPA in inference on a CPU, so that pictures are the same pixels in every run; in training on a CPU
    plain attention at few tokens, where SDPA's backward pass is slow, and at more blockwise in bfloat16, in float32
    SDPA at many; SDPA on devices that were never measured. Else a short measurement decides, see `measure`, whose
    answer is kept in `cache_file()`.
    """
    if work.device.type == "cpu" and not work.training:
        return "sdpa", "table: fixed for inference on a CPU, for the same pixels in every run"
    if work.device.type == "cpu" and work.tokens <= CPU_MATH_TOKENS:
        return "math", f"table: the faster in training on a CPU up to {CPU_MATH_TOKENS} tokens"
    if work.device.type == "cpu" and str(work.dtype) == "torch.bfloat16":
        return "blockwise", f"table: the faster in training on a CPU in bfloat16 above {CPU_MATH_TOKENS} tokens"
    if work.device.type == "cpu" and work.tokens >= CPU_SDPA_TOKENS:
        return "sdpa", f"table: the faster in training on a CPU from {CPU_SDPA_TOKENS} tokens on"
    if work.device.type not in ("cpu", "cuda"):
        return "sdpa", f"table: nothing was measured on {work.device.type}"
    candidates = _candidates(work)
    if len(candidates) == 1:
        return candidates[0], "the only candidate"
    return _remembered(work, candidates)


def _candidates(work: Workload) -> list[str]:
    """What is worth measuring for this work, SDPA first."""
    if work.device.type == "cpu":
        return ["sdpa", "math"]
    found = ["sdpa"]
    for backend in (*KERNELS, "xformers"):
        try:
            _check(backend, work.device, work.dtype, [work.head_dim], work.training)
        except (InputError, MissingDependencyError):
            continue
        found.append(backend)
    return found


def _remembered(work: Workload, candidates: list[str]) -> tuple[str, str]:
    """The choice in the cache file, or a measured one that was put there."""
    path, key = cache_file(), _key(work, candidates)
    known = _entry(_read(path), key, candidates)
    if known is not None:
        return known, f"measured before, see {path}"
    seconds = measure(work, candidates)
    if not seconds:
        return "sdpa", "none of the candidates could be measured"
    best = min(seconds, key=lambda name: seconds[name])
    if seconds.get("sdpa", float("inf")) <= CLEARLY_FASTER * seconds[best]:
        best = "sdpa"
    times = ", ".join(f"{name} {1000 * value:.2f} ms" for name, value in seconds.items())
    stored = _store(path, key, candidates, {"backend": best, "seconds": seconds})
    if stored is None:
        return "sdpa", f"{path} can't be written, and without it the next run might choose otherwise; {times}"
    return stored, f"measured: {times}"


def measure(work: Workload, candidates: Sequence[str], repeats: int = 5) -> dict[str, float]:
    """Median seconds of one self-attention layer of this shape with each candidate, in turns.

    Candidates that fail are left out. Projections are in the time, alike for all. Random states stay as they are.
    """
    import torch
    from diffusers.models.attention_processor import Attention

    cuda = work.device.type == "cuda"
    rows, width = (2 if cuda else 1), work.heads * work.head_dim
    with torch.random.fork_rng(devices=[work.device] if cuda else []):
        layer: Any = Attention(query_dim=width, heads=work.heads, dim_head=work.head_dim)
        layer = layer.to(work.device, work.dtype)
        x = torch.randn(rows, work.tokens, width).to(work.device, work.dtype).requires_grad_(work.training)

    def once(backend: str) -> float:
        layer.set_processor(_processor(backend))
        _wait(work.device)
        began = time.perf_counter()
        output = layer(x)
        if work.training:
            output.sum().backward()
        _wait(work.device)
        return time.perf_counter() - began

    times: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.set_grad_enabled(work.training):
        for _ in range(repeats + 1):
            for name in list(times):
                try:
                    times[name].append(once(name))
                except (RuntimeError, ValueError) as error:  # out of memory, no such kernel
                    log.info("attention %s could not be measured: %s", name, " ".join(str(error).split())[:200])
                    del times[name]
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first warms up


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def cache_file() -> Path:
    """Where measured choices are kept: attention.json in `gigdiff.cache.cache_folder`."""
    return cache_folder() / "attention.json"


def _key(work: Workload, candidates: list[str]) -> str:
    """What a measured choice depends on. Tokens count by powers of two; a newly installed xformers measures anew."""
    import torch

    name = platform.processor() or platform.machine()
    if work.device.type == "cuda":
        name = torch.cuda.get_device_name(work.device)
    bucket = 1 << (work.tokens - 1).bit_length()
    use = "training" if work.training else "inference"
    kind = str(work.dtype).removeprefix("torch.")
    shape = f"{bucket} tokens, {work.heads} x {work.head_dim}"
    return f"{name} | torch {torch.__version__} | {kind} | {shape} | {use} | {' '.join(candidates)}"


def _entry(known: dict[str, Any], key: str, candidates: list[str]) -> str | None:
    entry = known.get(key)
    backend = entry.get("backend") if isinstance(entry, dict) else None
    return backend if backend in candidates else None


def _read(path: Path) -> dict[str, Any]:
    """The cache file; what is torn or not there is an empty one."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _store(path: Path, key: str, candidates: list[str], entry: dict[str, Any]) -> str | None:
    """Put an entry into the file, under another name first; the backend that the file now says, None if it can't be.

    A process that measured at the same time may have been quicker: what is there already is kept and returned.
    """
    known = _read(path)
    there = _entry(known, key, candidates)
    if there is not None:
        return there
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known | {key: entry}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        log.info("%s can't be written: %s", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return None
    return str(entry["backend"])


def _layers(model: Any) -> list[Any]:
    """Its attention layers, diffusers' older and newer kind, outermost first."""
    return [module for module in model.modules() if hasattr(module, "inner_dim") and hasattr(module, "heads")]


def _head_dims(model: Any) -> list[int]:
    return sorted({layer.inner_dim // layer.heads for layer in _layers(model)})


def _workload(
    unet: Any, device: torch.device, dtype: torch.dtype, training: bool, size: tuple[int, int] | None
) -> Workload:
    """Tokens, heads and head size of the UNet's outermost attention, where most of the time goes."""
    own = unet.config.get("sample_size") or 64
    height, width = size or ((own, own) if isinstance(own, int) else own)
    types = unet.config["down_block_types"]
    level = next((i for i, name in enumerate(types) if "Attn" in name), len(types) - 1)
    tokens = max(1, height >> level) * max(1, width >> level)
    layers = _layers(unet)
    heads, inner = (layers[0].heads, layers[0].inner_dim) if layers else (1, 64)
    return Workload(device, dtype, tokens, heads, inner // heads, training)


def _check(backend: str, device: torch.device, dtype: torch.dtype, head_dims: list[int], training: bool) -> None:
    """Raises what set_attention says where the backend can't run this."""
    usable, reason = available_backends()[backend]
    if not usable:
        raise MissingDependencyError(f'attention "{backend}" can\'t be used: {reason}')
    if backend not in KERNELS and backend != "xformers":
        return
    if device.type != "cuda":
        raise InputError(f'attention "{backend}" runs on CUDA only, and this model is on {device}: take sdpa or auto.')
    for head_dim in head_dims:
        why = _limits(backend, dtype, head_dim) or _refusal(backend, device, dtype, head_dim, training)
        if why:
            raise InputError(f'attention "{backend}" can\'t run this model: {why} Take sdpa or auto.')


def _limits(backend: str, dtype: torch.dtype, head_dim: int) -> str:
    """Why the kernel can't do this on any GPU; "" where that is for torch to say."""
    kind = str(dtype).removeprefix("torch.")
    if backend in ("sdpa_flash", "sdpa_cudnn") and kind not in ("float16", "bfloat16"):
        return f"it computes in float16 and bfloat16, and the model in {kind}."
    if backend == "sdpa_flash" and head_dim > 256:
        return f"it takes heads of up to 256 numbers, and the model has heads of {head_dim}."
    return ""


def _refusal(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, training: bool) -> str:
    """Torch's, or xformers', own words on why the kernel can't do this on this GPU, "" if it can."""
    import torch

    if backend == "xformers":
        return _xformers_refusal(device, dtype, head_dim, training)
    from torch.backends import cuda
    from torch.nn.attention import SDPBackend, sdpa_kernel

    can = {
        "sdpa_flash": cuda.can_use_flash_attention,
        "sdpa_efficient": cuda.can_use_efficient_attention,
        "sdpa_cudnn": cuda.can_use_cudnn_attention,
    }[backend]
    q = torch.empty(1, 1, 64, head_dim, device=device, dtype=dtype, requires_grad=training)
    with warnings.catch_warnings(record=True) as said, sdpa_kernel(getattr(SDPBackend, KERNELS[backend])):
        warnings.simplefilter("always")
        usable = can(cuda.SDPAParams(q, q, q, None, 0.0, False, False), debug=True)
    reasons = " ".join(" ".join(str(warning.message).split()) for warning in said)
    return "" if usable else reasons or f"torch {torch.__version__} says that its kernel can't do {dtype} x {head_dim}."


def _xformers_refusal(device: torch.device, dtype: torch.dtype, head_dim: int, training: bool) -> str:
    """Found by trying: a build for another torch or CUDA imports, and then has no kernel for anything. (diffusers' own
    switch tries float32 alone, which newer builds lack.)"""
    import torch
    import xformers.ops

    q = torch.zeros(1, 64, 2, head_dim, device=device, dtype=dtype, requires_grad=training)
    try:
        output = xformers.ops.memory_efficient_attention(q, q, q)
        if training:
            output.sum().backward()
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        version = importlib.metadata.version("xformers")
        build = f"cu{(torch.version.cuda or '').replace('.', '')}"
        return (
            f"xformers {version} says of {dtype}, heads of {head_dim}: {' '.join(str(error).split())[:300]}. One that "
            f"is built for torch {torch.__version__}: pip install xformers --index-url "
            f"https://download.pytorch.org/whl/{build}"
        )
    return ""


def _processor(backend: str, added_kv: bool = False) -> Any:
    """diffusers' attention processor for a UNet's layers; `added_kv`: with projections of the text of their own."""
    from diffusers.models import attention_processor as kinds

    if backend == "xformers":
        return kinds.XFormersAttnAddedKVProcessor() if added_kv else kinds.XFormersAttnProcessor()
    if backend == "math":
        return kinds.AttnAddedKVProcessor() if added_kv else kinds.AttnProcessor()
    if backend == "sliced":
        return kinds.SlicedAttnAddedKVProcessor(1) if added_kv else kinds.SlicedAttnProcessor(1)
    fused = kinds.AttnAddedKVProcessor2_0() if added_kv else kinds.AttnProcessor2_0()
    if backend == "blockwise":
        from gigdiff.blockwise_attention import Blockwise

        return Blockwise(fused)
    return OneKernel(KERNELS[backend], fused) if backend in KERNELS else fused


def _set_unet(unet: Any, backend: str) -> None:
    added_kv = any(getattr(layer, "added_kv_proj_dim", None) is not None for layer in _layers(unet))
    unet.set_attn_processor(_processor(backend, added_kv))


def _set_transformer(model: Any, backend: str) -> None:
    """A transformer's layers compute more than plain attention, so their processors are kept and told what to call."""
    if backend == "sliced":
        raise InputError(
            f'attention "sliced" is for UNets, and this is a {type(model).__name__}: take sdpa, which needs as little '
            "memory."
        )
    own = {name: _plain(processor) for name, processor in model.attn_processors.items()}
    if backend == "blockwise":
        from gigdiff.blockwise_attention import Blockwise

        _set_transformer(model, "sdpa")  # what it calls then is what is routed
        model.set_attn_processor({name: Blockwise(processor) for name, processor in own.items()})
    elif all(hasattr(processor, "_attention_backend") for processor in own.values()):  # FLUX and newer
        from diffusers.models.attention_dispatch import attention_backend

        model.set_attn_processor(own)
        # set_attention_backend also changes the default of all other models: the context puts it back.
        with _no_diffusers_warnings(), attention_backend("native"):
            model.set_attention_backend(DISPATCHED[backend])
    elif backend == "xformers":
        model.set_attn_processor({name: _joint_xformers(processor, model) for name, processor in own.items()})
    elif backend == "sdpa":
        model.set_attn_processor(own)
    else:  # SD3's and other older processors call SDPA themselves
        kernel = KERNELS.get(backend, "MATH")
        model.set_attn_processor({name: OneKernel(kernel, processor) for name, processor in own.items()})


def _plain(processor: Any) -> Any:
    """The processor without what an earlier `set_attention` made of it."""
    from diffusers.models import attention_processor as kinds

    from gigdiff.blockwise_attention import Blockwise

    if isinstance(processor, kinds.XFormersJointAttnProcessor):
        return kinds.JointAttnProcessor2_0()
    return processor.processor if isinstance(processor, OneKernel | Blockwise) else processor


def _joint_xformers(processor: Any, model: Any) -> Any:
    from diffusers.models import attention_processor as kinds

    if not isinstance(processor, kinds.JointAttnProcessor2_0):
        raise InputError(f'attention "xformers": diffusers has none for {type(model).__name__}; take sdpa or auto.')
    return kinds.XFormersJointAttnProcessor()


@contextlib.contextmanager
def _no_diffusers_warnings() -> Iterator[None]:
    """diffusers calls its dispatcher experimental each time; that is no news to who loads a picture model."""
    from diffusers.utils import logging as of_diffusers

    level = of_diffusers.get_verbosity()
    of_diffusers.set_verbosity_error()
    try:
        yield
    finally:
        of_diffusers.set_verbosity(level)
