"""Networks compiled by OpenVINO for drawing on a CPU: fewer, larger operators than torch runs one by one, or int8.

A network is converted once for its weights and the size of picture, for int8 also quantised, and kept in
`gigdiff.cache.cache_folder`/openvino (some seconds; later processes read it). In a process it is then compiled anew
for each size of batch, half a second: compiled for any size at once it took a fifth longer to run in bfloat16 and two
fifths in int8. Needs `pip install "gigdiff[openvino]"`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import os
import shutil
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gigdiff.cache import cache_folder
from gigdiff.errors import InputError, MissingDependencyError, nearest

__all__ = ["PRECISIONS", "compiled", "default_precision", "imported"]

log = logging.getLogger(__name__)

PRECISIONS = ("float32", "bfloat16", "int8")
Rows = list[tuple[np.ndarray, ...]]
#: Layers of a UNet that int8 leaves alone, as patterns of names: where latents, noise level and pooled text come in and
#: where the result goes out. They are little of the work and half of the error (docs/performance.md).
NOT_INT8 = (".*conv_in.*", ".*conv_out.*", ".*time_embedding.*", ".*add_embedding.*")
SIZES_KEPT = 6  # of batches, compiled, in memory at once: each holds the weights, arranged as it wants them


def imported(name: str = "openvino") -> Any:
    """The package openvino, or nncf, which quantises.

    Both report their use to Google Analytics unless told otherwise. Nobody who draws a picture has agreed to that: the
    package that sends it is made to look absent, which both allow for, and nncf is told as its own CI tells it.

    Raises:
        MissingDependencyError: it is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    os.environ.setdefault("NNCF_CI", "1")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f'backend="openvino" needs the package {name} ({error}): pip install "gigdiff[openvino]"'
        ) from error


def default_precision() -> str:
    """bfloat16 where OpenVINO says that the CPU computes in it, else float32.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
    """
    able = imported().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bfloat16" if "BF16" in able else "float32"


def compiled(
    network: nn.Module,
    example: tuple[Tensor, ...],
    precision: str,
    *,
    name: str,
    calibration: Callable[[], Rows] | None = None,
) -> Callable[..., Tensor]:
    """`network` as a function of tensors like `example`'s in all but their first size, on the CPU, float32.

    Args:
        network: takes tensors, gives one; in evaluation mode. What it holds is converted as it is now.
        example: its inputs, float32, of two samples or more.
        precision: one of PRECISIONS. "int8": weights and activations, what is left of it in bfloat16 or float32.
        name: of its files in the cache, for people.
        calibration: for int8, gives inputs as they occur, one sample each: their ranges are what int8 is fitted to.

    Returns:
        A function that may be called from several threads, which then take turns.

    Raises:
        InputError: an unknown precision. MissingDependencyError: openvino or nncf is not installed.
    """
    if precision not in PRECISIONS:
        raise InputError(f'dtype={precision!r} is unknown to backend="openvino"; {nearest(precision, PRECISIONS)}.')
    ov = imported()
    core = ov.Core()
    path = cache_folder() / "openvino" / f"{name}-{_fingerprint(network, example, precision, ov.__version__)}"
    if (path / "model.xml").is_file():
        model = core.read_model(path / "model.xml")
    else:
        log.info("converting %s to OpenVINO, %s, for the first time", name, precision)
        model = _converted(ov, network, example)
        if precision == "int8":
            assert calibration is not None
            model = _quantised(model, calibration())
        _save(ov, model, path)
    inner = default_precision() if precision == "int8" else precision
    requests: dict[int, Any] = {}
    turn = threading.Lock()

    def request(size: int) -> Any:
        found = requests.pop(size, None)
        if found is None:
            found = _sized(core, model, example, size, inner)
        requests[size] = found  # the newest is last
        if len(requests) > SIZES_KEPT:
            del requests[next(iter(requests))]
        return found

    def call(*inputs: Tensor) -> Tensor:
        with turn:
            found = request(len(inputs[0])).infer([x.float().contiguous().numpy() for x in inputs], share_inputs=True)
            return torch.from_numpy(found[0].copy())

    return call


def _converted(ov: Any, network: nn.Module, example: tuple[Tensor, ...]) -> Any:
    shapes = [ov.PartialShape([-1, *x.shape[1:]]) for x in example]
    with torch.no_grad(), _quiet_tracer():
        return ov.convert_model(network, example_input=example, input=shapes)


def _sized(core: Any, model: Any, example: Sequence[Tensor], size: int, precision: str) -> Any:
    """The model compiled for `size` samples of `example`'s shapes, ready to infer. The model itself is reshaped."""
    model.reshape({i: [size, *x.shape[1:]] for i, x in enumerate(example)})
    hints = {
        "INFERENCE_PRECISION_HINT": {"bfloat16": "bf16", "float32": "f32"}[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    return core.compile_model(model, "CPU", hints).create_infer_request()


def _quantised(model: Any, rows: Rows, left_out: Sequence[str] = NOT_INT8) -> Any:
    """NNCF's post-training quantisation of all layers but `left_out`, patterns of their names.

    With smoothing for transformers (Xiao et al. 2023, arXiv 2211.10438) and bias correction (Nagel et al. 2019, arXiv
    1906.04721).
    """
    nncf = imported("nncf")
    logging.getLogger("nncf").setLevel(logging.ERROR)  # its own set_log_level reaches the root's handlers as well
    return nncf.quantize(
        model,
        nncf.Dataset(rows),
        subset_size=len(rows),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(patterns=list(left_out), validate=False),  # not every network has them all
    )


def _save(ov: Any, model: Any, path: Path) -> None:
    """Under another name first; where the cache can't be written, the next process converts again."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        ov.save_model(model, temporary / "model.xml", compress_to_fp16=False)
        temporary.rename(path)
    except (OSError, RuntimeError) as error:  # read-only or full; or another process was first
        if not path.is_dir():
            log.warning("%s can't be kept in %s: %s", path.name, path.parent, " ".join(str(error).split()))
        shutil.rmtree(temporary, ignore_errors=True)


def _fingerprint(network: nn.Module, example: Sequence[Tensor], precision: str, version: str) -> str:
    """Of the weights and all else that the converted network depends on."""
    import diffusers

    what: list[Any] = [
        precision,
        version,
        torch.__version__,
        diffusers.__version__,
        [list(x.shape[1:]) for x in example],
    ]
    what += [*NOT_INT8, "fitted to steps of one row"] if precision == "int8" else []
    found = hashlib.sha256(json.dumps([*what, repr(network)]).encode())
    for key, tensor in network.state_dict().items():
        found.update(key.encode())
        found.update(np.ascontiguousarray(tensor.detach().contiguous().numpy()).tobytes())
    return found.hexdigest()[:24]


@contextlib.contextmanager
def _quiet_tracer() -> Iterator[None]:
    """diffusers checks shapes while it computes, of which the tracer warns; they are the same at every call here. torch
    warns of tracing itself, which is how OpenVINO reads a module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
