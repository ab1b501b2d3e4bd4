"""What a command imports: in processes of their own, for this one has imported everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


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


def test_what_others_only_take_for_later_is_imported_when_it_is_used() -> None:
    code = """
import sys
from gigdiff.lean_imports import lean_imports
with lean_imports(compiles=False):
    from scipy.optimize import linear_sum_assignment
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel
assert "torch._dynamo" not in sys.modules and "scipy.optimize._minimize" not in sys.modules
rows, columns = linear_sum_assignment([[4, 1], [2, 3]])  # its module is imported now
assert "scipy.optimize._minimize" in sys.modules and columns.tolist() == [1, 0]
import torch
double = torch.compile(lambda x: 2 * x, backend="eager")  # so is the compiler, and it compiles
assert double(torch.ones(2)).tolist() == [2, 2]
with lean_imports(compiles=False):
    assert torch._dynamo.allow_in_graph.__module__ == "torch._dynamo.decorators"
print("good")
"""
    assert run(code) == "good"


def test_a_compiler_that_is_used_meanwhile_is_the_real_one() -> None:
    code = """
import sys
from gigdiff.lean_imports import lean_imports
with lean_imports(compiles=False):
    import torch
    @torch.compiler.disable()
    def one(): return 1
    from torch._dynamo import allow_in_graph
    assert allow_in_graph(one) is one and "torch._dynamo.decorators" not in sys.modules
    assert torch._dynamo.is_compiling() is False
    from torch._dynamo import allow_in_graph
    assert allow_in_graph.__module__ == "torch._dynamo.decorators"
assert sys.modules["torch._dynamo"] is torch._dynamo
with lean_imports(compiles=True):
    assert torch._dynamo.allow_in_graph is allow_in_graph
print(one())
"""
    assert run(code) == "1"


@pytest.mark.parametrize("command", ["generate", "upscale", "edit"])
def test_commands_do_without_them(command: str, tmp_path: Path) -> None:
    Image.new("RGB", (16, 20), "red").save(tmp_path / "small.png")
    words = {
        "generate": ["generate", "red wool coat", "--steps", "1", "--model", "mini-turbo", "--output", str(tmp_path)],
        "upscale": ["upscale", str(tmp_path / "small.png")],
        "edit": ["edit", str(tmp_path / "small.png"), "red bag", "--steps", "2", "--output", str(tmp_path / "new.png")],
    }[command]
    code = f"""
import sys
from gigdiff.cli import main
try:
    main({words!r})
except SystemExit as end:
    assert not end.code
unneeded = {{
    "torch._dynamo.convert_frame", "scipy.integrate._bvp", "scipy.optimize._minimize", "scipy.stats._stats_py",
    "diffusers.models.transformers.transformer_flux",
}}
print(sorted(unneeded & set(sys.modules)))
"""
    assert run(code).splitlines()[-1] == "[]"
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.parametrize("mistake", [["nothere.png"], ["small.png", "--fidelity", "3"]])
def test_a_mistake_is_said_before_anything_is_loaded(mistake: list[str], tmp_path: Path) -> None:
    Image.new("RGB", (16, 20), "red").save(tmp_path / "small.png")
    words = ["upscale", str(tmp_path / mistake[0]), *mistake[1:]]
    code = f"""
import sys
from gigdiff.cli import main
print(main({words!r}), "torch" in sys.modules)
"""
    assert run(code).splitlines()[-1] == "1 False"
