"""Packages that a process imports only when something in them is asked for.

diffusers imports its forty transformer models with any UNet and all of scipy.stats with any solver, and both it and
transformers import torch's compiler to mark a few functions for it. A command that draws one picture needs none of
them, and waited for them longer than for the picture.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

__all__ = ["import_later", "lean_imports", "without_compiler"]

EAGER = ("diffusers.models.transformers", "diffusers.hooks", "scipy.integrate", "scipy.optimize", "scipy.stats")
# Functions that others take out of a module while they are imported, and call much later or never.
CALLED_LATER = {"scipy.optimize": ("linear_sum_assignment",)}


@contextlib.contextmanager
def lean_imports(*, compiles: bool) -> Iterator[None]:
    """For loading one model in a process that draws and ends; `compiles`: torch.compile will be called."""
    with contextlib.nullcontext() if compiles else without_compiler():
        import_later(*EAGER)
        yield


def import_later(*names: str) -> None:
    """Put a stand-in for each module that is not imported yet; its first use imports it.

    A package's own modules (`diffusers.models.transformers.transformer_2d`) can be imported meanwhile without it.
    """
    for name in names:
        if name in sys.modules:
            continue
        try:
            spec = importlib.util.find_spec(name)  # imports what it lies in
        except ModuleNotFoundError:
            continue
        if spec is None or spec.loader is None:
            continue
        module = importlib.util.module_from_spec(spec)
        module.__class__ = _Later
        sys.modules[name] = module
        parent, _, tail = name.rpartition(".")
        setattr(sys.modules[parent], tail, module)


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """What is imported inside does not import torch's compiler for its marks, which do nothing then.

    Afterwards, and when more than marks is asked of it, the compiler can be imported as ever. If it is there already,
    nothing happens.
    """
    import torch

    if "torch._dynamo" in sys.modules:
        yield
        return
    blank = _Unmarking("torch._dynamo")
    spec = importlib.util.find_spec("torch._dynamo")
    assert spec is not None
    blank.__path__ = spec.submodule_search_locations or []  # transformers takes a small module of it
    sys.modules["torch._dynamo"] = torch._dynamo = blank
    try:
        yield
    finally:
        blank.end()


def _unmarked(function: Any = None, *_: object, **__: object) -> Any:
    return _unmarked if function is None else function


class _Unmarking(types.ModuleType):
    """torch._dynamo with no more in it than `@mark` and `@mark(...)`, which leave a function as it is."""

    allow_in_graph = assume_constant_result = disable = staticmethod(_unmarked)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.end()
        return getattr(importlib.import_module(self.__name__), name)

    def end(self) -> None:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__], sys.modules["torch"]._dynamo


class _Later(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own questions, such as for __wrapped__
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in CALLED_LATER.get(self.__name__, ()):
            return lambda *args, **options: getattr(_imported(self), name)(*args, **options)
        return getattr(_imported(self), name)


def _imported(module: types.ModuleType) -> types.ModuleType:
    if isinstance(module, _Later):
        module.__class__ = types.ModuleType  # type: ignore[assignment]
        assert module.__spec__ and module.__spec__.loader
        module.__spec__.loader.exec_module(module)
    return module
