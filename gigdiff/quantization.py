"""Weights in one byte: big pipelines on small GPUs, by torchao. gigdiff's own models have OpenVINO's int8 instead."""

from __future__ import annotations

from typing import Any

from gigdiff.errors import MissingDependencyError

__all__ = ["QUANTIZED", "quantize_weights"]

QUANTIZED = ("int8", "float8")


def quantize_weights(network: Any, dtype: str) -> None:
    """Round the weights of the linear layers in `network` to one byte each, with a scale a row; changes it.

    They are brought back to the network's own dtype where they are used, so activations lose nothing.

    Args:
        network: a torch.nn.Module.
        dtype: "int8", or "float8" (e4m3).

    Raises:
        MissingDependencyError: torchao is not installed.
    """
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise MissingDependencyError(
            f'dtype="{dtype}" needs torchao: pip install "gigdiff[quantization]"; or leave dtype out.'
        ) from error
    quantize_(network, {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[dtype]())
