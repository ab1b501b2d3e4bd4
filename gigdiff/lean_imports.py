"""Packages that a process imports only when something in them is asked for.

diffusers imports its forty transformer models with any UNet, and all of scipy.stats with any solver. A command that
draws one picture needs neither, and waited for them longer than for the picture.
"""

from __future__ import annotations

import importlib.util
import sys
import types

__all__ = ["EAGER", "import_later"]

EAGER = ("diffusers.models.transformers", "diffusers.hooks", "scipy.stats")


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


class _Later(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # Python's own questions, such as for __wrapped__
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__ = types.ModuleType  # type: ignore[assignment]
        assert self.__spec__ and self.__spec__.loader
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)
