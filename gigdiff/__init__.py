"""gigdiff: a product description becomes a product photo.

    import gigdiff
    image = gigdiff.generate("red wool coat", seed=7)

The names below are imported when first used, so that `import gigdiff` costs no torch import (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gigdiff import errors as errors
    from gigdiff.api import generate as generate
    from gigdiff.api import load as load
    from gigdiff.editing import edit as edit
    from gigdiff.errors import GigdiffError as GigdiffError
    from gigdiff.generators.request import Capabilities as Capabilities
    from gigdiff.generators.request import GenerationRequest as GenerationRequest
    from gigdiff.generators.request import GenerationResult as GenerationResult
    from gigdiff.generators.request import ImageGenerator as ImageGenerator
    from gigdiff.products import Product as Product
    from gigdiff.upscaling import upscale as upscale

__version__ = "0.1.0"

_HOME = {
    "Capabilities": "gigdiff.generators.request",
    "GenerationRequest": "gigdiff.generators.request",
    "GenerationResult": "gigdiff.generators.request",
    "GigdiffError": "gigdiff.errors",
    "ImageGenerator": "gigdiff.generators.request",
    "Product": "gigdiff.products",
    "edit": "gigdiff.editing",
    "errors": "gigdiff",
    "generate": "gigdiff.api",
    "load": "gigdiff.api",
    "upscale": "gigdiff.upscaling",
}

__all__ = [
    "Capabilities",
    "GenerationRequest",
    "GenerationResult",
    "GigdiffError",
    "ImageGenerator",
    "Product",
    "__version__",
    "edit",
    "errors",
    "generate",
    "load",
    "upscale",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME[name] == __name__:
        return importlib.import_module(f"{__name__}.{name}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
