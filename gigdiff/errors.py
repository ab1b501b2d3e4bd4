"""Every error that gigdiff raises on purpose.

    GigdiffError
    ├── InputError             a bad argument: prompt, size, steps, seed, path, flag    (also a ValueError)
    │   └── CapabilityError    a control that this model does not have
    ├── DataError              a dataset, image file or caption that can't be used       (also a ValueError)
    ├── ModelNotFoundError     no such model, or its weights are missing                 (also a FileNotFoundError)
    ├── ModelMismatchError     weights or checkpoint of another architecture
    ├── NumericalError         NaN or infinity in latents, loss or features              (also an ArithmeticError)
    ├── BlockedError           a safety filter said no to a prompt or an image
    ├── OutputError            a file or folder that can't be written, or already exists (also an OSError)
    └── MissingDependencyError an optional package is needed; names the exact pip command (also an ImportError)

A message says what was given, what is allowed, and the flag or command that mends it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BlockedError",
    "CapabilityError",
    "DataError",
    "GigdiffError",
    "InputError",
    "MissingDependencyError",
    "ModelMismatchError",
    "ModelNotFoundError",
    "NumericalError",
    "OutputError",
    "nearest",
]


class GigdiffError(Exception):
    """Base of all errors that gigdiff raises on purpose."""


class InputError(GigdiffError, ValueError):
    """A bad argument: prompt, size, steps, seed, path or flag."""


class CapabilityError(InputError):
    """A control was asked for that this model does not have."""


class DataError(GigdiffError, ValueError):
    """A dataset, image file or caption that can't be used."""


class ModelNotFoundError(GigdiffError, FileNotFoundError):
    """There is no such model, or its weights are missing."""


class ModelMismatchError(GigdiffError):
    """Weights or a checkpoint that belong to another architecture."""


class NumericalError(GigdiffError, ArithmeticError):
    """NaN or infinity where finite numbers were expected."""


class BlockedError(GigdiffError):
    """A safety filter said no; `verdict` is what it said."""

    def __init__(self, message: str, verdict: object = None) -> None:
        super().__init__(message)
        self.verdict = verdict


class OutputError(GigdiffError, OSError):
    """A file or folder that can't be written, or that already exists."""


class MissingDependencyError(GigdiffError, ImportError):
    """An optional package is needed and is not installed."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known names, or all of them.

    >>> nearest("mimi", ["mini", "mini-gan"])
    'did you mean "mini"? Known: mini, mini-gan'
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    return f"{hint}Known: {', '.join(names)}"
