"""benchmarks/speed.py and solver_sweep.py: their arithmetic, and one tiny comparison with stock diffusers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the next ones import it, as they do beside it
    spec.loader.exec_module(module)
    return module


measure = script("speed_measure")
ways = script("speed_ways")
speed = script("speed")
sweep = script("solver_sweep")


def test_a_ratio_is_that_of_the_medians_and_its_spread_that_of_the_rounds() -> None:
    found = measure.ratio([4.0, 6.0, 100.0], [2.0, 3.0, 2.0])
    assert found == {"ratio": 3.0, "low": 2.0, "high": 50.0}
    assert measure.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


def test_ways_take_turns_after_one_warm_up_and_each_round_begins_with_another() -> None:
    order: list[str] = []
    seconds = measure.interleaved({name: lambda name=name: order.append(name) for name in "abc"}, repeats=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_psnr_against_its_definition() -> None:
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert measure.psnr(black, black) == {"all": float("inf"), "worst": float("inf")}
    off = black.copy()
    off[1] = 10  # mean squared error 100 in one image of two
    found = measure.psnr(off, black)
    assert found["worst"] == pytest.approx(10 * np.log10(255**2 / 100))
    assert found["all"] == pytest.approx(10 * np.log10(255**2 / 50))
    assert measure.psnr(black, off) == found  # uint8 must not wrap around


def test_a_processs_memory_is_its_own_and_not_that_of_who_started_it() -> None:
    ballast = np.ones(40_000_000)  # 320 MB here
    seconds, memory, output = measure.timed_process([sys.executable, "-S", "-c", "print('drawn')"], ROOT)
    assert ballast.nbytes > 3e8 and 0 < memory < 100 and seconds > 0 and output.strip() == "drawn"
    with pytest.raises(RuntimeError, match="no such thing"):
        measure.timed_process([sys.executable, "-S", "-c", "raise SystemExit('no such thing')"], ROOT)


def test_imports_that_only_one_side_pays_are_added_up_by_package() -> None:
    header = "import time: self [us] | cumulative | imported package\n"
    base = measure.import_seconds(header + "import time:       100 |        100 |   torch\n")
    ours = measure.import_seconds(
        header + "import time:       900 |        900 |   torch\n"
        "import time:      2000 |       3000 | a.b.c\nimport time:      1000 |       1000 |   a.b\n"
        "import time:      2500 |       2500 | z\n"
    )
    assert base == {"torch": pytest.approx(1e-4)}
    found = measure.extra_imports(ours, base)
    assert [(name, modules) for name, _, modules in found] == [("a.b", 2), ("z", 1)]
    assert found[0][1] == pytest.approx(3e-3)


def test_the_table_has_only_the_columns_that_are_used() -> None:
    text = measure.table([{"way": "a", "ratio": {"ratio": 2.0, "low": 1.5, "high": 2.5}}, {"way": "b", "status": "no"}])
    assert text.splitlines()[0] == "| way | times faster (rounds) | status |"
    assert "| a | 2 (1.5 to 2.5) |  |" in text and "| b |  | no |" in text


def test_inference_and_student_end_to_end(tiny_model: Path, tmp_path: Path) -> None:
    words = ["--parts", "inference", "student", "--model", str(tiny_model), "--student", str(tmp_path / "mini-turbo")]
    words += ["--steps", "2", "--repeats", "1", "--batch_sizes", "2", "--no_memory", "--output", str(tmp_path)]
    words += ["--ours", "gigdiff", "gigdiff, OpenVINO"]
    assert speed.main(words) == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    rows = {(row["way"], row["against"]): row for row in result["inference"]["rows"]}
    for way in ("gigdiff", "gigdiff, OpenVINO"):
        row = rows[way, "stock, fp32"]
        assert row["ratio"]["ratio"] > 0 and row["batch"] == 2
        assert row["psnr_db"] == "identical" or row["psnr_db"] > 30
    bf16 = rows["gigdiff", "stock, bf16 autocast"]
    assert "ratio" in bf16 or "bfloat16" in bf16["status"]
    assert all(row["status"].startswith("not available") for row in result["student"]["rows"])
    text = (tmp_path / "speed.md").read_text()
    assert "## inference" in text and "## student" in text and "mini-turbo" in text


def test_the_sweeps_grid_names_and_table() -> None:
    everywhere, middle = (0.0, float("inf")), (0.3, 8.0)
    grid = sweep.combinations(["own"], [4, 8], [1.0, 5.0], [everywhere, middle])
    assert len(grid) == 6, "without guidance the interval makes no difference"
    assert len({one.name() for one in grid}) == 6

    def row(steps: int, passes: float, frechet: float) -> dict:
        scores = {name: {"value": frechet if name == "frechet_ratio" else 0.9} for name in sweep.SCORES}
        return {
            "scheduler": "own", "steps": steps, "guidance": 5.0, "interval": [0.0, None], "passes": passes,
            "scores": scores,
        }  # fmt: skip

    lines = sweep.table([row(8, 16, 1.4), row(15, 30, 1.5), row(4, 8, 2.0)]).splitlines()[2:]
    assert [line.split("|")[2].strip() for line in lines] == ["4", "8", "15"]
    assert "**2.000**" in lines[0] and "**1.400**" in lines[1] and "**" not in lines[2]


def test_a_combination_draws_within_its_interval_and_counts_the_passes(tiny_model: Path) -> None:
    from gigdiff.generators.diffusion import DiffusionGenerator
    from gigdiff.generators.request import GenerationRequest

    generator = DiffusionGenerator.from_pretrained(tiny_model)
    request = GenerationRequest(("a", "b"), (0, 1), num_inference_steps=3, guidance_scale=2.0)
    for interval, passes in (((0.0, float("inf")), 6), ((1e6, 2e6), 3)):
        drawn = sweep.Drawn(generator, sweep.Combination(sweep.OWN, 3, 2.0, interval))
        drawn.generate(request)
        assert drawn.rows / drawn.images == passes
    assert generator.guidance_interval == (0.0, float("inf")), "put back"


def test_a_combination_is_done_only_with_the_same_settings(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert sweep.done_before(file, {"count": 1}) is None
    file.write_text(json.dumps({"settings": {"count": 1}, "passes": 2.0}))
    assert sweep.done_before(file, {"count": 1}) == {"settings": {"count": 1}, "passes": 2.0}
    assert sweep.done_before(file, {"count": 2}) is None
