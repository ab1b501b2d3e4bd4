"""What a command imports: in processes of their own, for this one has imported everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_a_stand_in_is_imported_when_it_is_used() -> None:
    code = """
import sys
from gigdiff.lean_imports import EAGER, import_later
import_later(*EAGER, "no.such.module")
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
assert "diffusers.models.transformers.transformer_flux" not in sys.modules
assert "scipy.stats._stats_py" not in sys.modules
import_later(*EAGER)
import scipy.stats
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers import Transformer2DModel as same
from diffusers.hooks import ModelHook
assert same is Transformer2DModel and "diffusers.models.transformers.transformer_flux" in sys.modules
assert not hasattr(scipy.stats, "no_such_law")
print(scipy.stats.norm.cdf(0.0))
"""
    assert run(code) == "0.5"


def test_the_command_draws_without_them(tmp_path: Path) -> None:
    code = f"""
import sys
from gigdiff.cli import main
try:
    main(["generate", "red wool coat", "--steps", "1", "--model", "mini-turbo", "--output", {str(tmp_path)!r}])
except SystemExit as end:
    assert not end.code
unneeded = {{"scipy.stats._stats_py", "diffusers.models.transformers.transformer_flux"}}
print(sorted(unneeded & set(sys.modules)))
"""
    assert run(code).splitlines()[-1] == "[]"
    assert list(tmp_path.glob("*.png"))
