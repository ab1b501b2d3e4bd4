"""LoRA: add to a model, save, load, take out, merge, inspect, convert (Hu et al. 2021, arXiv 2106.09685).

    W' = W + s B A,   s = alpha / rank   (rsLoRA, arXiv 2312.03732: alpha / sqrt(rank);   DoRA, arXiv 2402.09353)

peft does the adding. A file is one safetensors file with diffusers' keys, `<part>.<module>.lora_A.weight`, where part
is "unet" or "transformer" or "text_encoder", "text_encoder_2". Its header holds, beside diffusers' own
`lora_adapter_metadata` (rank, alpha, ...), a `gigdiff` entry: the resolved config, the base model and a hash of its
weights. kohya's files are read as well (see gigdiff/kohya.py).
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gigdiff
from gigdiff.errors import InputError, ModelMismatchError, ModelNotFoundError, OutputError, nearest
from gigdiff.kohya import NAMINGS, from_kohya, is_kohya, to_kohya
from gigdiff.provenance import weights_hash

__all__ = [
    "KOHYA_NAME",
    "WEIGHTS_NAME",
    "AdapterSlots",
    "LoraFile",
    "LoraSettings",
    "adaptable",
    "adapter_configs",
    "add_adapter",
    "as_kohya",
    "base_hash",
    "cast_lora_inputs",
    "convert",
    "find_lora",
    "inspect",
    "leading_terms",
    "lora_header",
    "lora_tensors",
    "merge",
    "read_lora",
    "save_lora",
]

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
KOHYA_NAME = "kohya_lora_weights.safetensors"
TRUNKS = ("unet", "transformer")
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")

# What of a LoraConfig decides the numbers. peft's full config names fields that an older peft refuses to read.
_CONFIG_KEYS = ("r", "lora_alpha", "target_modules", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class LoraSettings:
    """rank, lora_alpha (scale = alpha / rank), dropout on the adapter's input, module names, DoRA, rsLoRA, how lora_A
    starts."""

    rank: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    use_dora: bool = False
    use_rslora: bool = False
    init_lora_weights: str = "kaiming"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file read, in diffusers' terms whatever its format.

    Attributes:
        path: the file.
        format: "diffusers" or "kohya".
        tensors: "<part>.<module>.lora_A.weight" (r, in[, k, k]), ".lora_B.weight" (out, r[, 1, 1]),
            ".lora_magnitude_vector" (out,) for DoRA.
        configs: part -> the LoraConfig entries r, lora_alpha, target_modules, use_dora, use_rslora, *_pattern.
        about: the header's "gigdiff" entry: config, base_model, base_hash, family; empty in others' files.
        header: the whole header.
    """

    path: Path
    format: str
    tensors: dict[str, Tensor]
    configs: dict[str, dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)

    def modules(self, part: str) -> list[str]:
        """The modules of `part` that have a LoRA, in the file's order."""
        ending = ".lora_A.weight"
        names = (key.removeprefix(f"{part}.") for key in self.tensors if key.startswith(f"{part}."))
        return [name.removesuffix(ending) for name in names if name.endswith(ending)]

    def scales(self) -> dict[str, float]:
        """ "<part>.<module>" -> s of W + s B A."""
        found = {}
        for part, config in self.configs.items():
            for module in self.modules(part):
                rank = self.tensors[f"{part}.{module}.lora_A.weight"].shape[0]
                alpha = _of_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
                found[f"{part}.{module}"] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return found


def _of_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """What peft's rank_pattern or alpha_pattern says of a module: keys are regular expressions on its last parts."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


# ---- adding ----------------------------------------------------------------------------------------------------------


def add_adapter(model: Any, settings: LoraSettings, name: str = "default", seed: int = 0) -> dict[str, nn.Parameter]:
    """Put a fresh LoRA into a diffusers model or a transformers encoder; at first it changes nothing.

    Args:
        model: everything in it is frozen but the adapter.
        settings: see LoraSettings.
        name: the adapter's.
        seed: of lora_A's random start (lora_B starts at zero).

    Returns:
        The adapter's parameters, float32 whatever the model's dtype, by name.

    Raises:
        InputError: rank below 1, or a target module that the model doesn't have (the nearest names are listed).
    """
    from peft import LoraConfig

    if settings.rank < 1:
        raise InputError(f"--rank {settings.rank}: a rank of 1 or more is allowed")
    _check_targets(model, settings.target_modules)
    model.requires_grad_(False)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.target_modules),
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        init_lora_weights="gaussian" if settings.init_lora_weights == "gaussian" else True,
    )
    model.add_adapter(config, adapter_name=name)
    # Half precision loses updates smaller than a thousandth of the weight; the adapter is small enough for float32.
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    for p in parameters.values():
        p.data = p.data.float()
    return parameters


def cast_lora_inputs(model: Any, enabled: bool) -> None:
    """Whether LoRA layers bring their input to the LoRA's float32, as peft has it from the start.

    Under autocast that is waste: autocast brings it back to half precision for the product, to the same numbers.
    Outside of it a half-precision base needs it, and DoRA's norms do everywhere.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.cast_input_dtype_enabled = enabled or bool(getattr(layer, "lora_variant", None))


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Every target must end the path of a linear or convolution layer."""
    able = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    endings = {".".join(n.split(".")[-k:]) for n in able for k in (1, 2, 3)}
    for target in targets:
        if not any(n == target or n.endswith(f".{target}") for n in able):
            # "0" or "0.proj" would match by accident; what people mean has letters first.
            known = sorted(
                e for e in endings if not e[0].isdigit() and (e.count(".") == 0 or e.split(".")[1].isdigit())
            )
            raise InputError(
                f'--target_modules: no linear or convolution layer of {type(model).__name__} is called "{target}"; '
                f"{nearest(target, known)}."
            )


# ---- files -----------------------------------------------------------------------------------------------------------


def lora_tensors(parts: Mapping[str, Any], name: str = "default") -> dict[str, Tensor]:
    """A copy of the adapter `name` of each part, with diffusers' keys, on the CPU."""
    from peft import get_peft_model_state_dict

    tensors = {}
    for part, model in parts.items():
        # transformers 5 flattened CLIPTextModel; files keep the older, common "text_model." in front.
        inner = "text_model." if part in TEXT_PARTS and not hasattr(model, "text_model") and _is_clip(model) else ""
        for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items():
            tensors[f"{part}.{inner}{key}"] = tensor.detach().to("cpu", copy=True).contiguous()
    return tensors


def _is_clip(model: Any) -> bool:
    return getattr(model.config, "model_type", "").startswith("clip")


def adapter_configs(parts: Mapping[str, Any], name: str = "default") -> dict[str, dict[str, Any]]:
    """part -> what of the adapter's LoraConfig decides the numbers."""
    found = {}
    for part, model in parts.items():
        full = model.peft_config[name].to_dict()
        found[part] = {key: sorted(v) if isinstance(v := full[key], set) else v for key in _CONFIG_KEYS}
    return found


def lora_header(configs: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, str]:
    """A file's header: diffusers' own metadata and ours."""
    packed = {f"{part}.{key}": value for part, config in configs.items() for key, value in config.items()}
    return {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(packed, sort_keys=True),
        "gigdiff": json.dumps({"version": gigdiff.__version__, **about}, sort_keys=True),
    }


def save_lora(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    """Write a LoRA file under a temporary name and rename it, so that a file of that name is always whole.

    Raises:
        OutputError: the disk is full or the folder can't be written; an earlier file of that name is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(dict(tensors), temporary, metadata=dict(header))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise OutputError(f'can\'t write "{path}": {error}. Free some disk space or choose another folder.') from error
    return path


def find_lora(lora: str) -> Path:
    """The file that a path, a folder or a hub id stands for.

    Raises:
        ModelNotFoundError: nothing there.
    """
    path = Path(lora).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _file_in(path, lora)
    is_path = path.is_absolute() or path.suffix == ".safetensors" or lora.startswith((".", "~")) or lora.count("/") != 1
    if is_path or path.parent.is_dir():
        raise ModelNotFoundError(f"lora {lora!r}: there is no such file or folder")
    from huggingface_hub import snapshot_download

    try:
        return _file_in(Path(snapshot_download(lora, allow_patterns=["*.safetensors"])), lora)
    except ModelNotFoundError:
        raise
    except Exception as error:  # the hub client raises many kinds; all mean "not from there"
        raise ModelNotFoundError(f"lora {lora!r}: no safetensors file, folder or hub id there: {error}") from error


def _file_in(folder: Path, lora: str) -> Path:
    if (folder / WEIGHTS_NAME).is_file():
        return folder / WEIGHTS_NAME
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        have = ", ".join(file.name for file in files) or "none"
        raise ModelNotFoundError(f"lora {lora!r}: no {WEIGHTS_NAME} in it; its safetensors files: {have}. Name one.")
    return files[0]


def read_lora(path: str | os.PathLike[str]) -> LoraFile:
    """Read a LoRA file of either format.

    Raises:
        ModelNotFoundError: no such file. ModelMismatchError: it is damaged, or no LoRA of a known kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelNotFoundError(f"lora '{path}': there is no such file or folder")
    try:
        with safe_open(path, "pt") as file:
            header = dict(file.metadata() or {})
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelMismatchError(
            f"{path} is no readable safetensors file ({error}); only safetensors are read. Copy or save it again."
        ) from error
    if is_kohya(tensors):
        read = from_kohya(tensors)
        about = _json(header, "gigdiff")
        return LoraFile(path, "kohya", read.tensors, _configs_of(read.tensors, read.alphas), about, header)
    parts = {key.split(".", 1)[0] for key in tensors}
    if not tensors or not parts <= {*TRUNKS, *TEXT_PARTS} or not any(".lora_A." in key for key in tensors):
        known = ", ".join((*TRUNKS, *TEXT_PARTS))
        example = next(iter(tensors), "none")
        raise ModelMismatchError(
            f"{path} is no LoRA with diffusers' or kohya's keys (it has {len(tensors)}, such as {example}); "
            f'diffusers\' start with one of {known} and contain "lora_A".'
        )
    packed = _json(header, "lora_adapter_metadata")
    given = {
        part: {k.removeprefix(f"{part}."): v for k, v in packed.items() if k.startswith(f"{part}.")} for part in parts
    }
    alphas = {
        key.removesuffix(".lora_A.weight"): float(tensor.shape[0])  # no metadata: diffusers takes alpha = rank
        for key, tensor in tensors.items()
        if key.endswith(".lora_A.weight")
    }
    configs = {part: given[part] or config for part, config in _configs_of(tensors, alphas).items()}
    return LoraFile(path, "diffusers", tensors, configs, _json(header, "gigdiff"), header)


def _json(header: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(header.get(key, "{}"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _configs_of(tensors: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """part -> LoraConfig entries that say exactly these ranks and alphas."""
    configs: dict[str, dict[str, Any]] = {}
    for key, alpha in alphas.items():
        part, module = key.split(".", 1)
        rank = tensors[f"{key}.lora_A.weight"].shape[0]
        config = configs.setdefault(
            part,
            {
                "r": rank,
                "lora_alpha": alpha,
                "target_modules": [],
                "use_dora": f"{key}.lora_magnitude_vector" in tensors,
                "use_rslora": False,
                "rank_pattern": {},
                "alpha_pattern": {},
            },
        )
        # newer transformers dropped CLIP's "text_model."; without it a name fits both, by its end
        name = module.removeprefix("text_model.")
        pattern = ("^" if name == module else "") + re.escape(name)
        config["target_modules"].append(name)
        if rank != config["r"]:
            config["rank_pattern"][pattern] = rank
        if alpha != config["lora_alpha"]:
            config["alpha_pattern"][pattern] = alpha
    return configs


# ---- in and out of a model -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def base_hash(folder: Path | None, part: str) -> str:
    """A short hash of the weights that a LoRA is trained on, "" for a model built in memory."""
    return weights_hash(folder / part) if folder is not None and (folder / part).is_dir() else ""


def check_fits(lora: LoraFile, parts: Mapping[str, Any], model_name: str) -> None:
    """Every layer of the file must exist in the model, with its sizes.

    Raises:
        ModelMismatchError: naming the base model that the file was trained on, where it says so.
    """
    trained_on = lora.about.get("base_model")
    of = f" It was trained on {trained_on}." if trained_on else ""
    strangers = [part for part in lora.configs if part not in parts]
    if strangers:
        raise ModelMismatchError(
            f"lora '{lora.path}' holds weights for {', '.join(strangers)}; {model_name} has {', '.join(parts)}.{of}"
        )
    for part, model in parts.items():
        modules = dict(model.named_modules())
        for name in lora.modules(part):
            inner = name if name in modules else name.removeprefix("text_model.")
            layer = modules.get(inner)
            layer = getattr(layer, "base_layer", layer)
            down, up = (lora.tensors[f"{part}.{name}.lora_{x}.weight"] for x in "AB")
            if layer is None:
                raise ModelMismatchError(
                    f"lora '{lora.path}' does not fit {model_name}: its {part} has no layer {name}.{of} "
                    "Use the model it was trained on."
                )
            weight = getattr(layer, "weight", None)
            if weight is None or (up.shape[0], down.shape[1]) != (weight.shape[0], weight.shape[1]):
                has = "no weight" if weight is None else f"{weight.shape[1]} -> {weight.shape[0]}"
                raise ModelMismatchError(
                    f"lora '{lora.path}' does not fit {model_name}: {part}.{name} goes {down.shape[1]} -> "
                    f"{up.shape[0]}, the model's layer {has}.{of} Use the model it was trained on."
                )


class AdapterSlots:
    """Which LoRAs are in a model; `use` puts in and takes out what a request asks for.

    A file is read once and again only when it changes on disk. When anything goes wrong, the model is left without any.

    Args:
        parts: "unet" or "transformer" and the text encoders -> the models.
        model_name: for messages.
        folder: where the base model lies.
        unload: takes all adapters out of all parts.
    """

    def __init__(
        self, parts: Mapping[str, Any], model_name: str, folder: Path | None, unload: Callable[[], Any]
    ) -> None:
        self.parts, self._name, self._folder, self._unload = dict(parts), model_name, folder, unload
        self._loaded: dict[tuple[str, int, int], str] = {}
        self._parts_of: dict[str, list[str]] = {}
        self._active: list[tuple[str, float]] = []
        self._notes: dict[str, str] = {}

    def use(self, loras: Sequence[str], scales: Sequence[float]) -> tuple[str, ...]:
        """Make exactly `loras` active, with `scales`; none takes all out. Returns notes for the user.

        Raises:
            ModelNotFoundError: no such file. ModelMismatchError: it does not fit this model.
        """
        if not loras:
            if self._loaded:
                self._clear()
            return ()
        wanted = []
        for lora in loras:
            path = find_lora(lora)
            stat = path.stat()
            wanted.append((str(path.resolve()), stat.st_mtime_ns, stat.st_size))
        if not set(self._loaded) <= set(wanted):
            self._clear()
        try:
            for key in wanted:
                if key not in self._loaded:
                    self._put_in(key)
            names = [self._loaded[key] for key in wanted]
            active = list(zip(names, map(float, scales), strict=True))
            if active != self._active:
                self._set_scales(active)
        except BaseException:
            self._clear()
            raise
        return tuple(self._notes[name] for name in dict.fromkeys(names) if name in self._notes)

    def _clear(self) -> None:
        self._unload()
        self._loaded, self._parts_of, self._active, self._notes = {}, {}, [], {}

    def _put_in(self, key: tuple[str, int, int]) -> None:
        from diffusers.loaders import StableDiffusionLoraLoaderMixin

        lora = read_lora(key[0])
        check_fits(lora, self.parts, self._name)
        name = f"lora{len(self._loaded)}"
        try:
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
            for part, config in lora.configs.items():
                metadata = {f"{part}.{k}": v for k, v in config.items()}
                if part in TRUNKS:
                    self.parts[part].load_lora_adapter(lora.tensors, prefix=part, adapter_name=name, metadata=metadata)
                else:
                    StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
                        lora.tensors,
                        None,
                        self.parts[part],
                        prefix=part,
                        adapter_name=name,
                        metadata=metadata,
                    )
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ModelMismatchError(f"lora '{lora.path}' does not fit {self._name}: {str(error)[:300]}") from error
        for part in lora.configs:
            self.parts[part].eval()  # peft's new layers start in training mode
        self._loaded[key] = name
        self._parts_of[name] = list(lora.configs)
        trunk = next((part for part in lora.configs if part in TRUNKS), None)
        ours = base_hash(self._folder, trunk) if trunk else ""
        theirs = lora.about.get("base_hash", "")
        if ours and theirs and ours != theirs:
            self._notes[name] = (
                f"lora {lora.path.name} was trained on {lora.about.get('base_model')} ({theirs}), not on these weights "
                f"of {self._name} ({ours}): its sizes fit, its effect may differ"
            )

    def _set_scales(self, active: Sequence[tuple[str, float]]) -> None:
        from diffusers.loaders.lora_base import set_adapters_for_text_encoder

        for part, model in self.parts.items():
            mine = [(name, scale) for name, scale in active if part in self._parts_of[name]]
            if not mine:
                continue
            names, scales = [name for name, _ in mine], [scale for _, scale in mine]
            if part in TRUNKS:
                model.set_adapters(names, scales)
            else:
                set_adapters_for_text_encoder(names, model, scales)
        self._active = list(active)


# ---- merge, convert, inspect -----------------------------------------------------------------------------------------


def merge(
    model: str | os.PathLike[str],
    loras: Sequence[str],
    scales: Sequence[float],
    output: str | os.PathLike[str],
    dtype: str | None = None,
) -> Path:
    """Write a copy of a model with LoRAs folded into its weights: W <- W + scale s B A. The base is only read.

    Args:
        model: a name, folder or hub id.
        loras, scales: as for `gigdiff.generate`.
        output: the new folder; it must not exist.
        dtype: "float32" or "float16"; None = that of the base's files.

    Raises:
        OutputError: the folder exists or can't be written. As `gigdiff.load` and `AdapterSlots.use`.
    """
    from gigdiff.generators.diffusion import DiffusionGenerator, save_folder
    from gigdiff.generators.loading import load

    out = Path(output)
    if out.exists():
        raise OutputError(f'"{out}" exists already; name a new folder.')
    if not loras:
        raise InputError("no LoRA to merge; give --lora FILE.")
    # float32 whatever the files are: a delta added in half precision would be rounded twice.
    generator: Any = load(model, device="cpu", dtype="float32")
    generator.slots.use(loras, scales)
    for part in generator.slots.parts.values():
        _fold(part)
    half = dtype == "float16" or (dtype is None and _stored_half(generator.folder))
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        if isinstance(generator, DiffusionGenerator):
            card = (
                json.loads((generator.folder / "gigdiff.json").read_text(encoding="utf-8")) if generator.folder else {}
            )
            card |= {"merged": [Path(lora).name for lora in loras], "merged_scales": list(scales), "scores": {}}
            save_folder(temporary, generator.unet, generator.vae, generator.scheduler, card, half=half)
        else:
            pipeline = generator.pipeline.to(torch.float16) if half else generator.pipeline
            pipeline.save_pretrained(temporary, safe_serialization=True)
        temporary.rename(out)
    except OSError as error:
        raise OutputError(f'can\'t write "{out}": {error}. Free some disk space or choose another folder.') from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


@torch.no_grad()
def fold_file(model: nn.Module, lora: LoraFile, part: str) -> None:
    """Add a file's layers for `part` to a model's weights, W <- W + s B A, without peft: a plain model stays plain.

    Raises:
        ModelMismatchError: it does not fit, or it is DoRA, which is no sum.
    """
    check_fits(lora, {part: model}, part)
    if lora.configs[part].get("use_dora"):
        raise ModelMismatchError(f"lora '{lora.path}' is DoRA: merge it with `gigdiff lora merge`")
    modules, scales = dict(model.named_modules()), lora.scales()
    for name in lora.modules(part):
        down, up = (lora.tensors[f"{part}.{name}.lora_{x}.weight"].float().flatten(1) for x in "AB")
        weight = modules[name].weight
        weight += scales[f"{part}.{name}"] * (up @ down).view(weight.shape).to(weight)  # type: ignore[operator, union-attr, arg-type]


def adaptable(network: nn.Module) -> list[str]:
    """The names of the layers that a LoRA of any rank can change: linear ones and convolutions in one group."""
    return [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and (not isinstance(layer, nn.Conv2d) or layer.groups == 1)
    ]


def leading_terms(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(down, up), (rank, in) and (out, rank): the greatest terms of the singular value decomposition of (out, in).

    No other product of that rank comes nearer to the matrix than up @ down (Eckart and Young 1936). Both carry the root
    of the singular values; they have fewer rows and columns than `rank` where the matrix has.
    """
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


@torch.no_grad()
def extract(
    model: str | os.PathLike[str], base: str | os.PathLike[str], output: str | os.PathLike[str], rank: int
) -> tuple[Path, float]:
    """Write what a fine-tuned model's UNet or transformer has over its base as a LoRA file of `rank`.

    Of each of the `adaptable` layers the LoRA holds the `leading_terms` of the difference. Biases and norms have no
    place in a LoRA and stay the base's.

    Args:
        model, base: names, folders or hub ids of one architecture.
        output: the file. rank: at least 1.

    Returns:
        The file, and the share of the squared difference that it holds.

    Raises:
        InputError: rank below 1. ModelMismatchError: two architectures, or no difference. As `gigdiff.load`.
    """
    from gigdiff.generators.loading import load

    if rank < 1:
        raise InputError(f"--rank {rank}: a rank of 1 or more is allowed")
    tuned, first = (load(name, device="cpu", dtype="float32") for name in (model, base))
    (part, own), (_, other) = (_trunk_of(one) for one in (first, tuned))
    ours, theirs = dict(other.named_parameters()), dict(own.named_parameters())
    if {name: p.shape for name, p in ours.items()} != {name: p.shape for name, p in theirs.items()}:
        raise ModelMismatchError(f"{model} and {base} are of two architectures: their {part}s have other weights")
    layers = set(adaptable(own))
    tensors: dict[str, Tensor] = {}
    whole = kept = 0.0
    for name, weight in ours.items():
        difference = weight.float() - theirs[name].float()
        whole += difference.square().sum().item()
        layer = name.removesuffix(".weight")
        if layer not in layers or not difference.any():
            continue
        down, up = leading_terms(difference.flatten(1), rank)
        kept += (up @ down).square().sum().item()
        convolution = difference.ndim == 4
        tensors[f"{part}.{layer}.lora_A.weight"] = (
            down.view(-1, *difference.shape[1:]) if convolution else down
        ).contiguous()
        tensors[f"{part}.{layer}.lora_B.weight"] = (up[:, :, None, None] if convolution else up).contiguous()
    if not tensors:
        raise ModelMismatchError(f"{model} and {base} have the same {part}: there is nothing to extract")
    alphas = {
        key.removesuffix(".lora_A.weight"): float(tensor.shape[0])
        for key, tensor in tensors.items()
        if ".lora_A." in key
    }
    about = {
        "base_model": first.name,
        "base_hash": base_hash(first.folder, part),
        "extracted_from": tuned.name,
        "share": round(kept / whole, 4),
    }
    half = {key: tensor.half() for key, tensor in tensors.items()}
    return save_lora(output, half, lora_header(_configs_of(half, alphas), about)), kept / whole


def _trunk_of(generator: Any) -> tuple[str, nn.Module]:
    """("unet" or "transformer", it) of a diffusion model. Raises ModelMismatchError for any other."""
    parts = generator.slots.parts if hasattr(generator, "slots") else {}
    for part in TRUNKS:
        if part in parts:
            return part, parts[part]
    raise ModelMismatchError(f"{generator.name} is no diffusion model: there is no UNet or transformer to compare")


def _fold(model: nn.Module) -> None:
    """Fold the active adapters into the weights and take peft's layers out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent = model.get_submodule(name.rpartition(".")[0])
            base = module.get_base_layer()
            leaf = name.rpartition(".")[2]
            setattr(parent, leaf, base)
    if hasattr(model, "peft_config"):
        del model.peft_config
        model._hf_peft_config_loaded = False  # type: ignore[assignment]


def _stored_half(folder: Path | None) -> bool:
    for file in sorted((folder or Path()).glob("*net/*.safetensors")) + sorted(
        (folder or Path()).glob("transformer/*.safetensors")
    ):
        with safe_open(file, "pt") as opened:
            key = next(iter(opened.keys()), None)
            return key is not None and opened.get_slice(key).get_dtype() in ("F16", "BF16")
    return False


def convert(source: str | os.PathLike[str], output: str | os.PathLike[str], to: str, naming: str | None = None) -> Path:
    """Write a LoRA file in the other format; what the first format can't hold is kept in the header.

    Args:
        source: the file.
        output: the new file.
        to: "kohya" or "diffusers".
        naming: of the trunk in a kohya file, see gigdiff.kohya; None = what the file says of its family.

    Raises:
        InputError: an unknown format or naming. ModelMismatchError: something has no name in the other format.
    """
    if to not in ("kohya", "diffusers"):
        raise InputError(f"--to {to}: {nearest(to, ('kohya', 'diffusers'))}")
    if naming is not None and naming not in NAMINGS:
        raise InputError(f"--naming {naming}: {nearest(naming, NAMINGS)}")
    lora = read_lora(source)
    if to == lora.format:
        raise InputError(f"{source} is {to} already; nothing to convert.")
    if to == "diffusers":
        read = from_kohya(load_file(source))
        origin = {
            "naming": read.naming,
            "text": read.text,
            "alpha_dtype": str(read.alpha_dtype).removeprefix("torch."),
            "header": lora.header,
        }
        header = lora_header(lora.configs, lora.about) | {"kohya": json.dumps(origin)}
        return save_lora(output, lora.tensors, header)
    return save_lora(output, *as_kohya(lora, naming))


def as_kohya(lora: LoraFile, naming: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) of a LoRA as a kohya file.

    A file that was kohya's once gets its names, its alphas' dtype and its header back.

    Raises:
        ModelMismatchError: something has no name in kohya's files.
    """
    origin = _json(lora.header, "kohya")
    family = lora.about.get("family", "")
    naming = naming or origin.get("naming") or {"sdxl": "ldm", "sd3": "sd3", "flux": "flux"}.get(family)
    naming = naming or ("ldm" if "text_encoder_2" in lora.configs and "unet" in lora.configs else "diffusers")
    one = family in ("", "sd") and "text_encoder_2" not in lora.configs
    text = origin.get("text") or ("lora_te_" if one else "lora_te1_")
    # s = alpha / rank is all kohya knows, so rsLoRA's alpha becomes what gives the same s.
    alphas = {
        key: _whole(scale * lora.tensors[f"{key}.lora_A.weight"].shape[0]) for key, scale in lora.scales().items()
    }
    dtype = getattr(torch, origin.get("alpha_dtype", "float32"))
    tensors = to_kohya(lora.tensors, alphas, naming, text, dtype)
    if origin:
        return tensors, dict(origin.get("header") or {})
    first = next(iter(lora.configs.values()))
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(first["r"]),
        "ss_network_alpha": str(first["lora_alpha"]),
        "gigdiff": lora.header.get("gigdiff", "{}"),
    }
    return tensors, header


def _whole(alpha: float) -> float:
    """alpha without the rounding of a division and a multiplication: 7.999999999 is 8."""
    return round(alpha, 9)


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a LoRA file says of itself and what its tensors say.

    Returns:
        path, bytes, format, base_model, base_hash, family, parameters, config, and for each part: modules, ranks,
        alphas, kind ("LoRA", "DoRA", "rsLoRA"), targets (the last names of the modules), norm (mean of |s B A|,
        relative: how strong it is).
    """
    lora = read_lora(path)
    scales = lora.scales()
    parts = {}
    for part, config in lora.configs.items():
        modules = lora.modules(part)
        ranks = sorted({lora.tensors[f"{part}.{m}.lora_A.weight"].shape[0] for m in modules})
        alphas = sorted(
            {float(_of_pattern(config.get("alpha_pattern") or {}, m, config["lora_alpha"])) for m in modules}
        )
        norms = []
        for m in modules:
            down, up = (lora.tensors[f"{part}.{m}.lora_{x}.weight"].float().flatten(1) for x in "AB")
            norms.append(abs(scales[f"{part}.{m}"]) * float((up @ down).norm()))
        kind = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
        parts[part] = {
            "kind": kind,
            "modules": len(modules),
            "ranks": ranks,
            "alphas": alphas,
            "targets": sorted({_last_name(m) for m in modules}),
            "norm": sum(norms) / max(1, len(norms)),
        }
    return {
        "path": str(path),
        "bytes": Path(path).stat().st_size,
        "format": lora.format,
        "base_model": lora.about.get("base_model", lora.header.get("ss_sd_model_name", "unknown")),
        "base_hash": lora.about.get("base_hash", ""),
        "family": lora.about.get("family", ""),
        "parameters": sum(t.numel() for t in lora.tensors.values()),
        "config": lora.about.get("config", {}),
        "parts": parts,
    }


def _last_name(module: str) -> str:
    """The end of a module's path that means something alone: "to_q", "to_out.0"."""
    words = module.split(".")
    return ".".join(words[-2:]) if words[-1].isdigit() else words[-1]
