"""Where gigdiff keeps what it can make again: measured choices, compiled networks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """$GIGDIFF_CACHE_DIR, or gigdiff/ in the platform's cache folder. It need not exist."""
    named = os.environ.get("GIGDIFF_CACHE_DIR")
    if named:
        return Path(named).expanduser()
    if sys.platform == "darwin":
        base = Path("~/Library/Caches")
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        return base.expanduser() / "gigdiff"
    except RuntimeError:  # no home folder: nothing will be found or written there
        return base / "gigdiff"
