"""From a name, a folder or a hub id to a loaded ImageGenerator.

    "mini"                        embedded: gigdiff/pretrained/mini
    "./runs/7/model", "/models/x" a folder written by gigdiff's training scripts or by diffusers' save_pretrained
    "stabilityai/sdxl-turbo"      a hub id; downloaded once, then read from the cache, offline too

Only safetensors are read, and no code from a model's folder is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigdiff.attention import BACKENDS
from gigdiff.errors import GigdiffError, InputError, ModelMismatchError, ModelNotFoundError, nearest
from gigdiff.generators.request import ImageGenerator
from gigdiff.pretrained import EMBEDDED, card, folder_of
from gigdiff.quantization import QUANTIZED

if TYPE_CHECKING:
    import torch

__all__ = ["check_folder", "load", "pick_device", "pick_dtype", "resolve"]

DTYPES = ("float32", "bfloat16", "float16")
BACKENDS_OF_NETWORKS = ("torch", "compile", "openvino")
OFFLOAD = ("model", "sequential")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Parts of a pipeline that have a config and no weights of their own.
WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "feature_extractor", "image_processor", "processor")


def load(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str = "auto",
    *,
    backend: str = "torch",
    offload: str | None = None,
    vae_tiling: bool = False,
    vae_slicing: bool = False,
) -> ImageGenerator:
    """Loads a model, ready to draw.

    Args:
        name_or_path: an embedded model's name, a folder, or a hub id ("org/name"). A name wins over a folder of the
            same name; write "./mini" for the folder.
        device: "cpu", "cuda", "cuda:1", "mps"; None takes the best there is.
        dtype: "float32", "bfloat16", "float16"; None leaves it to gigdiff's own models, and for others takes
            float32 on the CPU and half precision on a GPU. For other pipelines also "int8" or "float8": computed as
            with None, with the weights of the UNet or transformer, and of a T5, in one byte each (torchao; for less
            memory). LoRA is not for these.
        attention: a backend of gigdiff.attention; see `gigdiff doctor` for what is usable here.
        backend: "torch"; or "compile": UNet or transformer go through torch.compile, which takes half a minute or more
            for each size of batch and was measured to pay on a GPU only; or "openvino": UNet and decoder of gigdiff's
            own diffusion models are compiled for the CPU: a single picture in about half the time, differing from
            torch's in its last bits. dtype may then also be "int8", for the steps that can bear it: a student's, or
            with `guidance_reuse=8`; a fifth more in batches for half a point to one of type accuracy. Needs
            `pip install "gigdiff[openvino]"`; docs/performance.md.
        offload: for big pipelines on small GPUs (CUDA): "model" keeps each part on the GPU only while it works,
            "sequential" each layer (least memory, slow). Not for gigdiff's own models, which need no gigabyte.
        vae_tiling: a pipeline's autoencoder works in tiles: large pictures in little memory, faint changes at seams.
        vae_slicing: its autoencoder decodes one picture of a batch after another.

    Raises:
        InputError: a device, dtype, attention, backend or offload that does not exist, is not here or not for this
            model.
        MissingDependencyError: an attention or backend that needs what is not installed; says what installs it.
        ModelNotFoundError: no such model (the nearest name is given), or files of it are missing (they are named).
        ModelMismatchError: the folder holds something else than a model that draws.
    """
    if attention not in BACKENDS:
        raise InputError(f"attention={attention!r} is unknown; {nearest(str(attention), BACKENDS)}.")
    if offload is not None and offload not in OFFLOAD:
        raise InputError(f"offload={offload!r} is unknown; {nearest(str(offload), OFFLOAD)}.")
    if backend not in BACKENDS_OF_NETWORKS:
        raise InputError(f"backend={backend!r} is unknown; {nearest(str(backend), BACKENDS_OF_NETWORKS)}.")
    folder, name = resolve(name_or_path)
    index = check_folder(folder, name)
    own = (folder / "gigdiff.json").is_file()
    family = card(folder).get("family", "unreadable") if own else "pipeline"
    if backend == "openvino":
        if family != "diffusion":
            raise InputError(
                f'backend="openvino" is for gigdiff\'s own diffusion models, and "{name}" is of family "{family}": '
                "leave it out."
            )
        device = "cpu" if device is None else device
    if backend == "compile" and family in ("gan", "vae"):
        raise InputError(
            f'backend="compile" is for diffusion models, and "{name}" is of family "{family}": leave it out.'
        )
    precision = None
    if dtype is not None and (backend == "openvino" or (dtype in QUANTIZED and not own)):
        precision, dtype = str(dtype).removeprefix("torch."), None
    device = pick_device(device)
    savings = {"offload": offload, "vae_tiling": vae_tiling, "vae_slicing": vae_slicing}
    savings = {option: value for option, value in savings.items() if value}
    if family == "pipeline" and precision is not None:
        savings["quantized"] = precision
    _check_savings(savings, name, own, device)
    # gigdiff's own models choose for themselves, by what the device is fast at and what keeps pixels reproducible.
    dtype = None if own and dtype is None else pick_dtype(dtype, device)

    from gigdiff.generators.diffusion import DiffusionGenerator, PipelineGenerator
    from gigdiff.generators.one_pass import OnePassGenerator

    classes: dict[str, Any] = {
        "diffusion": DiffusionGenerator,
        "gan": OnePassGenerator,
        "vae": OnePassGenerator,
        "pipeline": PipelineGenerator,
    }
    if family not in classes:
        raise ModelMismatchError(
            f'"{name}" ({folder / "gigdiff.json"}) is of family "{family}"; this version of gigdiff draws with: '
            f"{', '.join(classes)}. Update gigdiff, or save the model again."
        )
    try:
        with _no_loading_bars():
            generator = classes[family].from_pretrained(
                folder, device=device, dtype=dtype, attention=attention, name=name, **savings
            )
            if backend == "openvino":
                generator.use_openvino(precision)
            elif backend == "compile":
                generator.use_compile()
            return generator
    except GigdiffError:
        raise
    except Exception as error:
        # diffusers and transformers report a wrong shape, key, class or a torn file as RuntimeError, ValueError,
        # OSError, KeyError, SafetensorError and more; for the user they are all "this folder does not fit".
        first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no details")
        raise ModelMismatchError(
            f'"{name}" ({folder}) does not load as {index["_class_name"]}: {type(error).__name__}: {first_line} '
            "Its weights and configs must come from one save of one model; save or download it again."
        ) from error


def _check_savings(savings: dict[str, Any], name: str, own: bool, device: torch.device) -> None:
    """Raises InputError where a way to save memory was asked for that is of no use, or that can't be had."""
    if savings and own:
        raise InputError(
            f'{", ".join(savings)}: "{name}" is one of gigdiff\'s own models, which need little memory: it is '
            "not needed there, leave it out."
        )
    if "offload" in savings and device.type != "cuda":
        raise InputError(
            f"offload={savings['offload']!r} moves parts of a model between main memory and a CUDA GPU, and this runs "
            f"on {device}: leave it out."
        )


@contextlib.contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Switches off transformers' and diffusers' own bars ("Loading weights: 100%"): a caller asks for progress."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def resolve(name_or_path: str | os.PathLike[str]) -> tuple[Path, str]:
    """The folder a name, path or hub id stands for (downloaded where needed), and the name to report.

    Raises:
        ModelNotFoundError: nothing of that name; InputError: not text or a path.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise InputError(
            f"model is {name_or_path!r} ({type(name_or_path).__name__}); give a name ({', '.join(EMBEDDED)}), "
            "a folder, a hub id, or what gigdiff.load returned."
        )
    name = os.fspath(name_or_path)
    if not name.strip():
        raise InputError(f"model is empty; give a name ({', '.join(EMBEDDED)}), a folder or a hub id.")
    if name in EMBEDDED:
        return folder_of(name), name
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return path, name
        is_file = path.exists()
    except (OSError, ValueError):  # a name too long for the file system, a NUL
        is_file = False
    if is_file:
        raise ModelMismatchError(
            f'"{name}" is a file; a model is a folder with model_index.json. Turn a single-file checkpoint into one '
            "with diffusers: StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)."
        )
    # "org/name" is a hub id, unless it is written as a path ("./x/y", "~/x") or lies beside a local folder ("runs/x").
    if isinstance(name_or_path, str) and HUB_ID.fullmatch(name) and name[0] not in ".~" and not path.parent.is_dir():
        return _download(name), name
    if os.sep in name or "/" in name:
        raise ModelNotFoundError(f'there is no folder "{name}"; give an existing folder, a hub id or an embedded name.')
    raise ModelNotFoundError(
        f'there is no model "{name}"; {nearest(name, EMBEDDED)}. A folder is written ./{name}, a hub id org/{name}.'
    )


def _download(hub_id: str) -> Path:
    """The local snapshot of a hub model: its safetensors and configs, nothing else."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    try:
        folder = DiffusionPipeline.download(
            hub_id, use_safetensors=True, trust_remote_code=False, local_files_only=offline
        )
    except Exception as error:  # HTTP, connection, gated repository, no such repository, not a pipeline, not cached
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        mend = (
            "HF_HUB_OFFLINE is set: unset it to download, or give a local folder"
            if offline
            else "check the spelling, the network (`gigdiff doctor`) and, for a gated model, `hf auth login`"
        )
        raise ModelNotFoundError(
            f'can\'t get "{hub_id}" from the hub or its cache: {reason} To mend it: {mend}. '
            f"Embedded models need neither: {', '.join(EMBEDDED)}."
        ) from error
    return Path(folder)


def check_folder(folder: Path, name: str) -> dict[str, Any]:
    """The folder's model_index.json, once every weights file it needs is known to be there.

    Raises:
        ModelNotFoundError: files are missing. ModelMismatchError: it is something else.
    """
    mend = (
        "reinstall gigdiff (in a clone: git checkout gigdiff/pretrained)"
        if name in EMBEDDED
        else "copy or save the model again"
    )
    path = folder / "model_index.json"
    if not path.is_file():
        other = _what_else(folder)
        if other:
            raise ModelMismatchError(f'"{name}" is {other}; a model that draws is a folder with model_index.json.')
        raise ModelNotFoundError(f'"{name}" is missing {path}: {mend}.')
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        components = {part: value for part, value in index.items() if isinstance(value, list) and value[0]}
        class_name = index["_class_name"]
    except (ValueError, KeyError, AttributeError, IndexError, OSError) as error:
        raise ModelMismatchError(f"{path} is not a diffusers model index ({error!r}): {mend}.") from error
    if not isinstance(class_name, str):
        raise ModelMismatchError(f"{path} asks for code of its own ({class_name!r}), which gigdiff does not run.")

    for part in components:
        if part.startswith(WITHOUT_WEIGHTS):
            needed = folder / part
            if not needed.is_dir():
                raise ModelNotFoundError(f'"{name}" is missing its {part}, {needed}: {mend}.')
            continue
        weights = sorted((folder / part).glob("*.safetensors"))
        if not weights:
            if any((folder / part).glob("*.bin")):
                raise ModelMismatchError(
                    f'"{name}" has its {part} as .bin, which can run code when loaded; only safetensors are read. '
                    "Save it again with save_pretrained(folder, safe_serialization=True)."
                )
            files = folder / part / "*.safetensors"
            raise ModelNotFoundError(f'"{name}" is missing the weights of its {part}, {files}: {mend}.')
        for file in weights:
            if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
                raise ModelNotFoundError(f"{file} is a git-lfs pointer, not the weights; run: git lfs pull")
    return index


def _what_else(folder: Path) -> str:
    """What a folder without model_index.json seems to be, for the error message; "" when nothing is recognised."""
    if (folder / "adapter_config.json").is_file() or (folder / "pytorch_lora_weights.safetensors").is_file():
        return "a LoRA, not a whole model (pass it as lora= or --lora)"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = config.get("_class_name") or (config.get("architectures") or ["model"])[0]
    except (OSError, ValueError, AttributeError, IndexError):
        inner = next((path.parent for path in sorted(folder.glob("*/model_index.json"))), None)
        return f'a folder that holds a model in "{inner}" (give that one)' if inner else ""
    return f"a single {architecture}"


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the best there is: CUDA, then Apple's MPS, then the CPU.

    Raises:
        InputError: it does not exist, or is not usable here.
    """
    import torch

    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there[:0] = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device is None:
        return torch.device("cuda" if there[0].startswith("cuda") else there[0])
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device={device!r} is unknown; usable here: {', '.join(there)}.") from error
    full = f"cuda:{wanted.index or 0}" if wanted.type == "cuda" else wanted.type
    if full not in there:
        hint = "; see `gigdiff doctor`" if wanted.type == "cuda" else ""
        raise InputError(f"device={str(device)!r} is not usable here; usable are: {', '.join(there)}{hint}.")
    return wanted


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for, or what suits the device: float32 on CPU, bfloat16 or else float16 on CUDA, float16 on MPS.

    Raises:
        InputError: not one of float32, bfloat16, float16.
    """
    import torch

    if dtype is None:
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.float16 if device.type == "mps" else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name == "int8":
        raise InputError(
            'dtype="int8" needs backend="openvino" for gigdiff\'s own models (diffusion, on a CPU); without it is for '
            "other diffusers pipelines."
        )
    if name not in DTYPES:
        raise InputError(f"dtype={name!r} is unknown; {nearest(name, DTYPES)}.")
    return getattr(torch, name)
