"""What a process measures of itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux")
def test_peak_memory_is_the_process_s_own_and_not_its_parent_s() -> None:
    """ru_maxrss of a child begins at what its parent had when it forked: 400 MB too much here."""
    ballast = np.ones(50_000_000)
    code = "from gigdiff.speed import peak_memory; x = bytearray(60_000_000); print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 60e6 < int(done.stdout) < 300e6
    assert ballast.sum() == 50_000_000
