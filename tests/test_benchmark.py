"""The harness with a tiny real model: rows and their reasons, resuming, the report, comparing two."""

from __future__ import annotations

import copy
import json
import re
import shutil
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from gigdiff import benchmark
from gigdiff.benchmark import (
    BenchmarkConfig,
    Scenario,
    over_seeds,
    pareto_front,
    run_benchmark,
    seed_interval,
    summarise_speed,
)
from gigdiff.cli import main
from gigdiff.compare import compare, regressions, to_text
from gigdiff.data.records import ProductRecord
from gigdiff.errors import InputError
from gigdiff.evaluation import Reference, Score, TrainPhotos
from gigdiff.fit.config import parse_config
from gigdiff.generators.diffusion import DiffusionGenerator
from gigdiff.metrics.frechet import feature_statistics, frechet_distance
from gigdiff.metrics.probe import Probe
from gigdiff.products import Product
from gigdiff.report import read_result, to_html, to_markdown, write_reports

ROOT = Path(__file__).parent.parent
COUNT = 12


class Means:
    """Mean colours of the picture's four quarters: twelve numbers, no weights."""

    name, dim, resize = "means", 12, "none"

    def __call__(self, images):
        halves = images.reshape(len(images), 2, images.shape[1] // 2, 2, images.shape[2] // 2, 3).mean(axis=(2, 4))
        return halves.reshape(len(images), 12).astype(np.float32)


@pytest.fixture(scope="module")
def reference():
    rng = np.random.default_rng(0)
    products = [
        Product(["Shirts", "Caps"][i % 2], ["Red", "Blue"][i // 2 % 2], name=f"product {i}") for i in range(COUNT)
    ]
    photos, others = (rng.integers(0, 256, (COUNT, 80, 64, 3), dtype=np.uint8) for _ in range(2))
    weight = rng.normal(size=(2, 12)).astype(np.float32)
    probes = {
        "article_type": Probe("article_type", ("Caps", "Shirts"), ("means",), ((weight, np.zeros(2, np.float32)),)),
        "colour_group": Probe("colour_group", ("blue", "red"), ("means",), ((-weight, np.zeros(2, np.float32)),)),
    }
    extractor = Means()
    floor = frechet_distance(feature_statistics(extractor(others)), feature_statistics(extractor(photos)))
    records = tuple(ProductRecord(f"t{i}", f"g{i}", product) for i, product in enumerate(products))
    train = TrainPhotos(records, tuple(range(COUNT)), extractor(others), lambda rows: others[list(rows)])
    return Reference(
        tuple(products), tuple(map(str, range(COUNT))), photos, {"means": extractor(photos)}, extractor, probes,
        (floor,), (extractor(others),), train, source="toy",
    )  # fmt: skip


def config(folder, model, **changes):
    scenarios = (
        {"name": "tiny", "model": str(model), "family": "diffusion"},
        {"name": "tiny, 1 step", "model": str(model), "num_inference_steps": 1, "seeds": [0]},
        {"name": "not there", "model": "mini-gann", "family": "GAN"},
        {"name": "no such LoRA", "model": str(model), "lora": "./nowhere.safetensors"},
        {"name": "too many steps", "model": str(model), "num_inference_steps": 100_000},
    )
    values = {
        "scenarios": scenarios, "output_dir": str(folder), "count": COUNT, "seeds": (0, 1), "repetitions": 0,
        "grid_prompts": ("red coat", "blue hat"), "grid_seeds": (0, 1),
    }  # fmt: skip
    return BenchmarkConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def run(tiny_model, reference, tmp_path_factory):
    """A whole run, with made-up speeds for the rows that work (a test below measures real ones)."""
    folder = tmp_path_factory.mktemp("bench")
    result = run_benchmark(config(folder, tiny_model), reference=reference)
    for factor, row in enumerate([row for row in result["rows"] if row["status"] == "ok"], 1):
        one = {
            "first_image_seconds": 3.0, "load_seconds": 1.0, "latencies": [0.5 / factor] * 4, "device": "cpu",
            "throughput": {"1": 2.0 * factor, "4": 3.0 * factor}, "failed": {"16": "out of memory"},
            "host_bytes": 800_000_000, "cuda_bytes": None, "threads": 1, "load_average": [0.5, 0.6],
        }  # fmt: skip
        row["speed"] = summarise_speed([one, {**one, "throughput": {"1": 2.2 * factor, "4": 3.2 * factor}}])
    (folder / "benchmark.json").write_text(json.dumps(result))
    return folder, result


def row(result, name):
    return next(row for row in result["rows"] if row["name"] == name)


def test_every_scenario_is_a_row_and_says_why_it_has_no_numbers(run):
    _, result = run
    status = {row["name"]: row["status"] for row in result["rows"]}
    assert status == {
        "tiny": "ok", "tiny, 1 step": "ok", "not there": "not available", "no such LoRA": "not available",
        "too many steps": "not applicable",
    }  # fmt: skip
    assert 'no model "mini-gann"' in row(result, "not there")["reason"]
    assert "100000" in row(result, "too many steps")["reason"]


def test_a_row_has_its_scores_controls_and_size(run, tiny_model):
    folder, result = run
    tiny = row(result, "tiny")
    names = tiny["quality"]["names"]
    assert names["count"] == COUNT and names["seeds"] == [0, 1] and len(names["per_seed"]) == 2
    assert names["scores"]["frechet_distance"]["interval"] == "95% over seeds"
    values = [seed["frechet_distance"] for seed in names["per_seed"]]
    assert names["scores"]["frechet_distance"]["value"] == pytest.approx(np.mean(values))
    assert row(result, "tiny, 1 step")["quality"]["names"]["scores"]["article_type"]["interval"] == "95%"
    for control in ("real_frechet_distance", "neighbour_copied", "shuffled_article_type", "reconstructed_psnr"):
        assert control in names["controls"], control
    assert names["controls"]["neighbour_copied"]["value"] == 1.0
    weights = sum(p.stat().st_size for p in tiny_model.rglob("*.safetensors"))
    assert abs(2 * tiny["parameters"] - weights) < 0.2 * weights  # float16
    assert tiny["bytes_on_disk"] > weights
    assert tiny["diversity"]["count"] == 4
    assert all((folder / name).is_file() for name in tiny["grid"].values())
    assert (folder / "pictures" / "tiny" / "closest-names.png").is_file()
    assert result["environment"]["versions"]["torch"] and result["extractor"] == "means"


def test_a_second_run_draws_and_scores_nothing(run, tiny_model, reference, monkeypatch):
    folder, result = run
    whole = DiffusionGenerator.generate

    def once(self, request, **kwargs):
        assert request.lora, "drew again"  # what failed is tried again
        return whole(self, request, **kwargs)

    monkeypatch.setattr(DiffusionGenerator, "generate", once)
    again = run_benchmark(config(folder, tiny_model), reference=reference)
    assert again["cells"]["made"] == 0 and again["cells"]["kept"] > 0
    for one, other in zip(again["rows"], result["rows"], strict=True):
        assert one["quality"] == other["quality"] and one.get("grid") == other.get("grid")


def test_a_killed_run_goes_on_and_a_change_makes_only_what_it_touches(
    run, tiny_model, reference, tmp_path, monkeypatch
):
    folder, result = run
    calls = []
    whole = DiffusionGenerator.generate

    def counted(self, request, **kwargs):
        calls.append(len(request))
        if len(calls) == 2 and tmp_path.name not in str(folder):
            raise KeyboardInterrupt
        return whole(self, request, **kwargs)

    monkeypatch.setattr(DiffusionGenerator, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(config(tmp_path, tiny_model), reference=reference)
    assert not (tmp_path / "benchmark.json").exists()
    assert len(list((tmp_path / "cells" / "drawn").glob("*.npz"))) == 1
    monkeypatch.setattr(DiffusionGenerator, "generate", whole)
    finished = run_benchmark(config(tmp_path, tiny_model), reference=reference)
    assert row(finished, "tiny")["quality"]["names"]["scores"] == row(result, "tiny")["quality"]["names"]["scores"]

    # One more seed: the two others are kept.
    before = len(list((tmp_path / "cells" / "drawn").glob("*.npz")))
    run_benchmark(config(tmp_path, tiny_model, seeds=(0, 1, 2)), reference=reference)
    assert len(list((tmp_path / "cells" / "drawn").glob("*.npz"))) == before + 1
    # Other weights under the same path are another model.
    other = tmp_path / "model"
    shutil.copytree(tiny_model, other)
    run_benchmark(config(tmp_path, other, seeds=(0,)), reference=reference)
    same = len(list((tmp_path / "cells" / "drawn").glob("*.npz")))
    assert same == before + 1  # a copy is the same model
    from safetensors.torch import load_file, save_file

    weights = next((other / "unet").glob("*.safetensors"))
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    run_benchmark(config(tmp_path, other, seeds=(0,)), reference=reference)
    assert len(list((tmp_path / "cells" / "drawn").glob("*.npz"))) > same


def test_the_speed_of_a_real_model_in_its_own_process(tiny_model, reference, tmp_path):
    scenarios = ({"name": "tiny", "model": str(tiny_model)},)
    result = run_benchmark(
        config(tmp_path, tiny_model, scenarios=scenarios, seeds=(0,), repetitions=1, speed_batch_sizes=(1, 2),
               latency_images=3, threads=1),
        reference=reference,
    )  # fmt: skip
    speed = row(result, "tiny")["speed"]
    assert set(speed["throughput"]) == {"1", "2"} and speed["latency"]["count"] == 3 and speed["threads"] == 1
    assert speed["latency"]["p50"] <= speed["latency"]["p95"] <= speed["latency"]["p99"]
    assert speed["first_image"]["value"] > speed["raw"][0]["load_seconds"] > 0
    assert speed["host_bytes"] > 50e6 and (speed["cuda_bytes"] is None or speed["device"] != "cpu")
    assert len(speed["load_average"]) == 2


def test_a_process_that_fails_is_a_reason(tmp_path):
    with pytest.raises(benchmark.GigdiffError, match=r"ModelNotFoundError.*no folder"):
        benchmark._measure_apart({"model": str(tmp_path / "nothing")})


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_opens_offline(run):
    pytest.importorskip("matplotlib", reason="pip install 'gigdiff[eval]'")
    folder, result = run
    (folder / "benchmark.json").write_text(json.dumps(result))  # a run in a test above left one without speeds
    paths = write_reports(read_result(folder / "benchmark.json"), folder)
    page = paths[1].read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page), "nothing is loaded from anywhere"
    assert "<script" not in page
    assert page.count("data:image/png;base64,") == 4 + 2  # two prompts of two rows, and two sheets of closest photos
    for text in (
        "dashed front",
        "not available",
        "control: neighbour",
        "tiny, 1 step",
        "out of memory",
        "How to reproduce",
    ):
        assert text in page, text
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        xml.etree.ElementTree.fromstring(svg)
    assert page.count("<svg") == 3
    markdown = paths[0].read_text(encoding="utf-8")
    assert "| tiny | diffusion |" in markdown and "no model" in markdown
    widths = {
        line.count("|") for line in markdown.split("## Rows")[1].split("##")[0].splitlines() if line.startswith("|")
    }
    assert len(widths) == 1


def test_a_name_is_text_and_not_markup(run):
    folder, result = run
    hostile = copy.deepcopy(result)
    hostile["rows"][2]["name"] = "<b>bold</b>|x"
    assert "<b>bold" not in to_html(hostile, folder)
    assert "\\|x" in to_markdown(hostile)


def test_reports_that_can_not_be_read(run, tmp_path):
    _, result = run
    for content, message in (
        ("not json", "can't be read"), ("[]", "no benchmark report"),
        (json.dumps({**result, "benchmark_version": 99}), "version 99, this gigdiff reads version 1"),
    ):  # fmt: skip
        (tmp_path / "b.json").write_text(content)
        with pytest.raises(InputError, match=message):
            read_result(tmp_path / "b.json")
    with pytest.raises(InputError, match="can't be read"):
        read_result(tmp_path / "missing.json")


# ---- comparing -------------------------------------------------------------------------------------------------------


def changed(result, folder, **values):
    other = copy.deepcopy(result)
    for name, (value, half) in values.items():
        score = row(other, "tiny")["quality"]["names"]["scores"][name]
        score.update(value=value, low=value - half, high=value + half)
    path = folder / f"other-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(other))
    return path


def test_compare_tells_noise_from_change(run, tmp_path, capsys):
    folder, result = run
    base = changed(result, tmp_path, article_type=(0.80, 0.02), frechet_distance=(100.0, 3.0))
    noisy = changed(result, tmp_path, article_type=(0.78, 0.02), frechet_distance=(103.0, 3.0))
    worse = changed(result, tmp_path, article_type=(0.60, 0.02), frechet_distance=(103.0, 3.0))
    better = changed(result, tmp_path, article_type=(0.95, 0.02), frechet_distance=(60.0, 3.0))
    assert regressions(*compare(base, base)) == [] == regressions(*compare(base, noisy))
    assert not any(change.moved for change in compare(base, noisy)[0])
    (line,) = regressions(*compare(base, worse))
    assert "type right (names) 0.8 -> 0.6, 25.0% worse" in line
    assert regressions(*compare(base, worse), limit=0.3) == []
    changes, missing = compare(base, better)
    assert regressions(changes, missing) == [] and to_text(changes, missing).count("better") == 2
    assert main(["compare", str(base), str(noisy)]) == 0
    assert main(["compare", str(base), str(worse)]) == 3
    assert "regression" in capsys.readouterr().err
    assert main(["compare", str(base), str(folder / "nothing.json")]) == 1


def test_compare_refuses_what_can_not_be_compared_and_notes_lost_rows(run, tmp_path):
    _, result = run
    base = changed(result, tmp_path)
    for key, value, message in (("extractor", "dinov2", "another extractor"), ("config", {"count": 9}, "12 and 9")):
        other = {**copy.deepcopy(result), key: {**result["config"], **value} if isinstance(value, dict) else value}
        (tmp_path / "o.json").write_text(json.dumps(other))
        with pytest.raises(InputError, match=message):
            compare(base, tmp_path / "o.json")
    lost = copy.deepcopy(result)
    row(lost, "tiny").update(status="failed", reason="NaN", quality={}, speed=None)
    (tmp_path / "lost.json").write_text(json.dumps(lost))
    assert any("was ok, is failed: NaN" in line for line in regressions(*compare(base, tmp_path / "lost.json")))


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_seed_intervals_are_scipys():
    stats = pytest.importorskip("scipy.stats", reason="pip install 'gigdiff[test]'")
    for n in (2, 3, 5, 10):
        values = list(np.random.default_rng(n).normal(size=n))
        mean, half = seed_interval(values)
        low, high = stats.t.interval(0.95, n - 1, np.mean(values), stats.sem(values))
        assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-3)
    single = Score(0.5, 0.4, 0.6, 10, "95%")
    assert over_seeds([single]) is single
    assert over_seeds([single, single]).interval == "95% over seeds"


def test_pareto_front():
    assert pareto_front([(1, 1)]) == [0]
    assert pareto_front([(1, 3), (2, 2), (1, 2), (3, 1), (2, 2)]) == [0, 1, 3, 4]


@pytest.mark.parametrize("name", ["bench_quick.yaml", "bench_full.yaml"])
def test_the_configs_are_whole(name):
    pytest.importorskip("jsonargparse", reason="pip install 'gigdiff[eval]'")
    read = parse_config(BenchmarkConfig, "", ["--config", str(ROOT / "configs" / name)])
    assert read.rows()[0].name == "mini"
    assert name in (ROOT / "configs" / name).read_text()  # its launch command


def test_bad_configs():
    with pytest.raises(InputError, match='unknown key "guidance": did you mean "guidance_scale"'):
        Scenario.from_dict({"name": "a", "model": "mini", "guidance": 2})
    with pytest.raises(InputError, match="needs a name and a model"):
        Scenario.from_dict({"name": "a"})
    with pytest.raises(InputError, match='no set "long"'):
        Scenario.from_dict({"name": "a", "model": "mini", "prompts": ["long"]})
    with pytest.raises(InputError, match="no scenarios"):
        BenchmarkConfig()
    with pytest.raises(InputError, match="two scenarios are named a"):
        BenchmarkConfig(scenarios=({"name": "a", "model": "mini"},) * 2)
    with pytest.raises(InputError, match="seeds is empty"):
        BenchmarkConfig(scenarios=({"name": "a", "model": "mini"},), seeds=())


def test_the_command_says_what_is_missing(capsys):
    assert main(["bench"]) == 1
    assert "configs/bench_quick.yaml" in capsys.readouterr().err
