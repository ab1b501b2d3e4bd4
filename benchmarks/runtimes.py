"""One pass of the UNet by every runtime there is for a CPU: how long, and how far from float32.

    pip install onnxruntime onnx torchao              # optional; what is not there is left out, and stderr says so
    python benchmarks/runtimes.py --model mini

torch as gigdiff draws with it, OpenVINO in float32, bfloat16 and int8 (with each choice of --left_out: layers that stay
out of int8, as patterns of names), torchao's int8 by torch (weights alone, and inputs too), ONNX Runtime in float32.
All take turns on inputs as they occur in drawing. The error is the root mean square of the difference to OpenVINO's
float32, as a share of the output's, over up to 64 inputs.
Prints a Markdown table; the last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed_measure import interleaved, spread  # beside this file

import gigdiff
from gigdiff import openvino_backend
from gigdiff.errors import GigdiffError
from gigdiff.generators.diffusion import _Unet
from gigdiff.packing import unpacked
from gigdiff.quantization import quantize_weights

Inputs = tuple[np.ndarray, ...]
Way = Callable[[Inputs], np.ndarray]
LEFT_OUT = ("nothing", ",".join(openvino_backend.NOT_INT8), ".*conv_in.*", ".*conv_out.*", ".*attentions.*")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="embedded name or gigdiff diffusion folder")
    parser.add_argument("--left_out", nargs="*", default=list(LEFT_OUT), help="patterns, with commas between")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 32], help="of a pass: two an image with guidance")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    try:
        rows = measured(args)
    except GigdiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    times = [f"ms, {n} rows" for n in args.rows]
    print("| runtime | error | " + " | ".join(times) + " |\n| --- | ---: |" + " ---: |" * len(times))
    for row in rows:
        shown = [
            f"{row['error']:.4f}",
            *(f"{row[name][0]:.0f} ({row[name][1]:.0f} to {row[name][2]:.0f})" for name in times),
        ]
        print(f"| {row['runtime']} | " + " | ".join(shown) + " |")
    print(json.dumps({"model": args.model, "threads": torch.get_num_threads(), "rows": rows}))
    return 0


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each runtime: its name, its error and (median, least, greatest) milliseconds for each size."""
    generator: Any = gigdiff.load(args.model, device="cpu", backend="openvino")
    height, width = generator.capabilities.default_size
    inputs = [tuple(x.numpy() for x in row) for row in generator._typical_inputs(height, width)]
    ov = openvino_backend.imported()
    network = _Unet(copy.deepcopy(unpacked(generator.unet)).eval())
    example = tuple(torch.from_numpy(np.concatenate([x, x])) for x in inputs[0])
    converted = openvino_backend._converted(ov, network, example)

    def by_openvino(model: Any, precision: str) -> Callable[[int], Way]:
        def build(count: int) -> Way:
            request = openvino_backend._sized(ov.Core(), model.clone(), example, count, precision)
            return lambda x: request.infer(list(x))[0].copy()

        return build

    ways: dict[str, Callable[[int], Way]] = {
        "OpenVINO, float32": by_openvino(converted, "float32"),
        "OpenVINO, bfloat16": by_openvino(converted, "bfloat16"),
        f"torch, {str(generator.dtype).removeprefix('torch.')}": lambda count: by_torch(generator),
    }
    for patterns in args.left_out:
        names = () if patterns == "nothing" else tuple(patterns.split(","))
        log(f"int8 without {patterns}")
        quantised = openvino_backend._quantised(converted.clone(), inputs, names)
        ways[f"OpenVINO, int8 but {patterns}"] = by_openvino(quantised, "bfloat16")
    try:
        ways |= by_torchao(network)
    except ImportError as error:
        log(f"torchao is left out: {error}")
    try:
        ways["ONNX Runtime, float32"] = by_onnxruntime(network, example)
    except ImportError as error:
        log(f"ONNX Runtime is left out: {error}")

    exact = by_all(ways["OpenVINO, float32"](2), inputs)
    rows = [{"runtime": name, "error": relative(by_all(build(2), inputs), exact)} for name, build in ways.items()]
    for count in args.rows:
        batch = tuple(np.concatenate([inputs[i % len(inputs)][k] for i in range(count)]) for k in range(3))
        seconds = interleaved({name: partial(build(count), batch) for name, build in ways.items()}, args.repeats)
        for row in rows:
            row[f"ms, {count} rows"] = [1e3 * x for x in spread(seconds[row["runtime"]]).values()]
    return rows


def by_torch(generator: Any) -> Way:
    def call(x: Inputs) -> np.ndarray:
        z, sinusoids, condition = (torch.from_numpy(one) for one in x)
        with torch.no_grad(), generator._autocast():
            network = _Unet(generator.unet)
            return network(z.contiguous(memory_format=torch.channels_last), sinusoids, condition).float().numpy()

    return call


def by_torchao(network: torch.nn.Module) -> dict[str, Callable[[int], Way]]:
    """Its linear layers in int8, the rest in bfloat16. Raises ImportError where torchao is not installed."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    def build(quantise: Callable[[torch.nn.Module], None]) -> Way:
        quantised = copy.deepcopy(network).to(torch.bfloat16)
        quantise(quantised)

        def call(x: Inputs) -> np.ndarray:
            with torch.no_grad():
                z, sinusoids, condition = (torch.from_numpy(one).to(torch.bfloat16) for one in x)
                return quantised(z, sinusoids, condition).float().numpy()

        return call

    weights = build(partial(quantize_weights, dtype="int8"))
    both = build(partial(quantize_, config=Int8DynamicActivationInt8WeightConfig()))
    return {"torchao, int8 weights": lambda count: weights, "torchao, int8 weights and inputs": lambda count: both}


def by_onnxruntime(network: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> Callable[[int], Way]:
    """Raises ImportError where onnxruntime or onnx is not installed."""
    import onnx  # noqa: F401  # torch's exporter needs it
    import onnxruntime

    names = ["z", "sinusoids", "condition"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "unet.onnx"
        with torch.no_grad():
            torch.onnx.export(
                network, example, str(path), input_names=names, output_names=["output"], opset_version=17, dynamo=False,
                dynamic_axes={name: {0: "rows"} for name in [*names, "output"]},
            )  # fmt: skip
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda count: lambda x: session.run(None, dict(zip(names, x, strict=True)))[0]


def by_all(way: Way, inputs: list[Inputs]) -> np.ndarray:
    """What it makes of all inputs, two at a time."""
    pairs = zip(inputs[::2], inputs[1::2], strict=False)
    return np.concatenate([way(tuple(np.concatenate(both) for both in zip(*pair, strict=True))) for pair in pairs])


def relative(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(((found - exact) ** 2).mean() / (exact**2).mean()))


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
