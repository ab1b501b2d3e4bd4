"""The benchmark: every model family on the same held-out prompts, seeds and resize, in one report.

    config -> scenarios -> cells (drawn images, scores, speed) -> rows -> benchmark.json, report.md, report.html

A cell is one piece of work that is kept on disk under a hash of all that decides it: the scenario's settings, the
model's weights, the prompts, the photos, the code. So a run that was killed goes on at the cell where it stopped, and
after a change only the cells that it touches are made again. Images and scores are separate cells: another metric
draws nothing anew. A scenario that fails, or whose model is not there, is a row with its reason, and is tried again
next time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gigdiff
from gigdiff.data.cache import content_key
from gigdiff.errors import CapabilityError, GigdiffError, InputError, ModelNotFoundError, nearest
from gigdiff.evaluation import (
    Drawn,
    Reference,
    Score,
    asked_for,
    default_data_dir,
    draw,
    evaluate_drawn,
    git_commit,
    make_reference,
    plain,
    reconstruction_scores,
    versions,
    write_text,
)
from gigdiff.generators.request import ImageGenerator
from gigdiff.images import contact_sheet, save_image
from gigdiff.metrics.diversity import pairwise_diversity
from gigdiff.metrics.probe import bootstrap_interval
from gigdiff.pretrained import card, size_on_disk
from gigdiff.products import Product
from gigdiff.prompt_sets import PHOTO_SETS, PROMPT_SETS, Asked
from gigdiff.provenance import weights_hash
from gigdiff.speed import load_average

__all__ = [
    "BENCHMARK_VERSION",
    "GRID_PROMPTS",
    "BenchmarkConfig",
    "Scenario",
    "over_seeds",
    "pareto_front",
    "run_benchmark",
    "seed_interval",
    "slug",
    "summarise_speed",
]

BENCHMARK_VERSION = 1
GRID_PROMPTS = (
    "red wool coat", "yellow summer dress", "brown leather belt", "black leather handbag", "crimson pullover",
    "white sneakers", "spectacles", "blue jeans", "navy blue polo t-shirt", "gold earrings", "pink nail polish",
    "silver watch for men", "green checked shirt", "purple kurta", "beige high heels", "orange backpack",
)  # fmt: skip
# The source that images depend on, and what scores depend on besides.
DRAWING_CODE = ("generators", "models", "diffusion.py", "text.py", "attention.py", "images.py", "rng.py", "products.py")
SCORING_CODE = ("metrics", "evaluation.py", "reference.py", "prompt_sets.py", "data/captions.py", "data/vocabulary.py")
# Two-sided 95% quantiles of Student's t with 1, 2, ... degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Scenario:
    """One row of the report: a model and how it is asked.

    Args:
        name: of the row, once a report. family: "diffusion", "GAN", "VAE", "LoRA", ... for the reader.
        model: embedded name, folder or hub id, as gigdiff.load takes it.
        num_inference_steps, guidance_scale, guidance_reuse, lora, lora_scale, device, dtype, attention: as in gigdiff;
        None = the model's. prompts, seeds: instead of the report's own.
        training_cost: in words; by default what the model's card says.
    """

    name: str
    model: str
    family: str = ""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_reuse: int = 1
    lora: str | None = None
    lora_scale: float = 1.0
    device: str | None = None
    dtype: str | None = None
    attention: str = "auto"
    prompts: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    training_cost: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scenario:
        """Raises InputError for a key that is none of the above, or without name and model."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise InputError(f'scenario {values.get("name", "?")}: unknown key "{key}": {nearest(str(key), known)}')
        if not values.get("name") or not values.get("model"):
            raise InputError(f"a scenario needs a name and a model; given: {dict(values)}")
        lists = {key: tuple(values[key]) for key in ("prompts", "seeds") if values.get(key) is not None}
        _check_prompts(lists.get("prompts", ()))
        return cls(**{**values, **lists})

    def request(self) -> dict[str, Any]:
        """What of it goes into a GenerationRequest."""
        request = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        request |= {"guidance_reuse": self.guidance_reuse} if self.guidance_reuse > 1 else {}
        return request | ({"lora": self.lora, "lora_scale": self.lora_scale} if self.lora else {})


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured.

    Args:
        scenarios: the rows; keys as in Scenario.
        output_dir: where the report and its cells go.
        data_dir: products with a train and a validation split, as load_products takes them. Default: the shared folder.
        count: validation products, a fixed choice.
        seeds: image seeds; three or more give an interval over seeds.
        prompts: sets of gigdiff.prompt_sets: names, short, wordings, recombined.
        copies: train photos searched for copies; none = all.
        extractor: of all distances, see gigdiff.metrics.features.load_extractor.
        clip: folder or hub id of CLIP weights for the CLIP score; none = no CLIP score.
        batch_size: images drawn at once for quality.
        speed_batch_sizes: for throughput.
        latency_images: images a repetition at batch 1.
        repetitions: speed measurements of each scenario, in turns with the others; 0 = no speed.
        threads: torch's; none = torch's default.
        grid_prompts: prompts of the side-by-side grid and of the diversity.
        grid_seeds: seeds of each.
        cache_dir: features of real photos.
        title: of the report.
    """

    scenarios: tuple[dict[str, Any], ...] = ()
    output_dir: str = "runs/bench"
    data_dir: str | None = None
    count: int = 1000
    seeds: tuple[int, ...] = (0, 1, 2)
    prompts: tuple[str, ...] = ("names",)
    copies: int | None = None
    extractor: str = "efficientnet-lite0"
    clip: str | None = None
    batch_size: int = 32
    speed_batch_sizes: tuple[int, ...] = (1, 4, 16)
    latency_images: int = 10
    repetitions: int = 3
    threads: int | None = None
    grid_prompts: tuple[str, ...] = GRID_PROMPTS
    grid_seeds: tuple[int, ...] = (0, 1, 2, 3)
    cache_dir: str = "cache/eval"
    title: str = "gigdiff benchmark"

    def __post_init__(self) -> None:
        _check_prompts(self.prompts)
        if not self.scenarios:
            raise InputError("the benchmark has no scenarios; see configs/bench_quick.yaml")
        names = [scenario.name for scenario in self.rows()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"two scenarios are named {', '.join(twice)}; rows are told apart by their names")
        if not self.seeds:
            raise InputError("seeds is empty; give at least one, three for an interval")

    def rows(self) -> list[Scenario]:
        """The scenarios, checked."""
        return [Scenario.from_dict(values) for values in self.scenarios]


def _check_prompts(prompts: Sequence[str]) -> None:
    for name in prompts:
        if name not in PROMPT_SETS:
            raise InputError(f'prompts: there is no set "{name}"; {nearest(name, PROMPT_SETS)}')


def run_benchmark(
    config: BenchmarkConfig, *, log: Callable[[str], None] = lambda text: None, reference: Reference | None = None
) -> dict[str, Any]:
    """Measures all scenarios and writes <output_dir>/benchmark.json; the result as plain JSON types.

    Args:
        log: told what is going on, a line at a time.
        reference: instead of one made from config.data_dir.
    """
    began, load_before = time.time(), load_average()
    output = Path(config.output_dir)
    if config.threads is not None:
        import torch

        torch.set_num_threads(config.threads)
    reference = reference or _reference(config, log)
    bench = _Bench(config, reference, output, log)
    scenarios = config.rows()
    rows = [bench.quality(scenario) for scenario in scenarios]
    bench.unload()
    if config.repetitions > 0:
        bench.speed(scenarios, rows)
    result = plain({
        "benchmark_version": BENCHMARK_VERSION,
        "title": config.title,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "seconds": time.time() - began,
        "cells": bench.counts,
        "config": dataclasses.asdict(config),
        "extractor": reference.extractor.name,
        "resize": reference.extractor.resize,
        "data": reference.source,
        "height": reference.size[0],
        "width": reference.size[1],
        "environment": environment(load_before),
        "rows": rows,
    })  # fmt: skip
    write_text(output / "benchmark.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def _reference(config: BenchmarkConfig, log: Callable[[str], None]) -> Reference:
    from gigdiff.data import load_products

    source = config.data_dir or str(default_data_dir())
    log(f"real photos of {source}; their features are kept in {config.cache_dir}")
    return make_reference(
        load_products(source, split="validation"),
        load_products(source, split="train"),
        count=config.count,
        extractor=config.extractor,
        clip=config.clip,
        copies=config.copies,
        cache_dir=config.cache_dir,
        on_progress=lambda done, total: log(f"features of train photos: {done}/{total}"),
    )


class _Bench:
    """One run: where its cells are, and the model that is loaded just now."""

    def __init__(self, config: BenchmarkConfig, reference: Reference, output: Path, log: Callable[[str], None]) -> None:
        self.config, self.reference, self.output, self.log = config, reference, output, log
        self.counts = {"made": 0, "kept": 0}
        self._loaded: tuple[Scenario, ImageGenerator] | None = None
        self._drawing = {"code": _code(DRAWING_CODE), "versions": _libraries(), "size": reference.size}
        # What scores depend on besides the images: the photos on the other side, and the code.
        self._scoring = {
            "code": _code(SCORING_CODE),
            "extractor": reference.extractor.name,
            "clip": reference.clip.name if reference.clip else None,
            "photos": content_key(reference.images.tobytes(), *reference.ids).hex(),
            "floors": reference.floors,
            "train": content_key(reference.train.features.tobytes()).hex() if reference.train else None,
        }

    # ---- quality

    def quality(self, scenario: Scenario) -> dict[str, Any]:
        """The scenario's row, speed still missing."""
        self.log(f"{scenario.name}: quality")
        row: dict[str, Any] = {
            "name": scenario.name, "family": scenario.family, "model": scenario.model, "status": "ok", "reason": "",
            "settings": scenario.request(), "training_cost": scenario.training_cost, "quality": {}, "speed": None,
        }  # fmt: skip
        try:
            folder = _folder(scenario)
            row |= _size(folder, scenario)
            identity = self._identity(scenario, folder)
            for prompts in scenario.prompts or self.config.prompts:
                row["quality"][prompts] = self._prompt_set(scenario, identity, prompts)
            row["diversity"] = dataclasses.asdict(self._grid(scenario, identity, row))
        except Exception as error:
            row |= _why_not(error)
            self.log(f"{scenario.name}: {row['status']}: {row['reason']}")
        return row

    def _identity(self, scenario: Scenario, folder: Path) -> dict[str, Any]:
        """All that a drawn image depends on, but for its prompt and seed."""
        lora = Path(scenario.lora).expanduser() if scenario.lora else None
        return {
            **self._drawing,
            "weights": weights_hash(folder),
            # The card holds defaults (steps, guidance) that an image depends on as well.
            "card": {k: v for k, v in card(folder).items() if k not in ("scores", "parameters", "licence")},
            "request": scenario.request(),
            "lora": weights_hash(lora if lora.is_dir() else lora.parent) if lora and lora.exists() else scenario.lora,
            "placement": [scenario.device, scenario.dtype, scenario.attention],
        }

    def _prompt_set(self, scenario: Scenario, identity: dict[str, Any], prompts: str) -> dict[str, Any]:
        """Scores over all seeds, with the first seed's confusions and copies."""
        asked = asked_for(self.reference, prompts)
        seeds = scenario.seeds or self.config.seeds
        reports = []
        for seed in seeds:
            drawn = self._drawn(scenario, identity, asked, seed, f"{prompts}, seed {seed}")
            reports.append(self._scored(scenario, drawn, asked, prompts, seed))
        first = reports[0]
        scores = {
            name: dataclasses.asdict(over_seeds([Score(**report["scores"][name]) for report in reports]))
            for name in first["scores"]
            if name != "images_per_second" and all(name in report["scores"] for report in reports)
        }
        controls = dict(first["controls"])
        if prompts in PHOTO_SETS:
            controls |= self._reconstructed(scenario, identity)
        if first["closest"] and self.reference.train is not None:
            self._copies_sheet(scenario, identity, asked, prompts, seeds[0], first["closest"])
        kept = ("breakdown", "confusion", "real_confusion", "closest", "notes", "settings")
        return {
            "count": len(asked),
            "seeds": list(seeds),
            "scores": scores,
            "per_seed": [{name: score["value"] for name, score in report["scores"].items()} for report in reports],
            "controls": controls,
            **{name: first[name] for name in kept},
        }

    def _drawn(
        self, scenario: Scenario, identity: dict[str, Any], asked: Sequence[Asked], seed: int, what: str
    ) -> Drawn:
        """The images of `asked`, drawn or read back."""
        key = _key(identity, [(one.id, one.prompt) for one in asked], seed, self.config.batch_size)
        path = self._cell("drawn", scenario, key, ".npz")
        if path.is_file():
            self.counts["kept"] += 1
            with np.load(path, allow_pickle=False) as stored:
                return Drawn(images=stored["images"], **json.loads(str(stored["about"])))
        began = told = time.perf_counter()

        def progress(done: int, total: int) -> None:
            nonlocal told
            now = time.perf_counter()
            if done == total or now - told > 10:
                told = now
                self.log(f"{scenario.name}: {what}: {done}/{total}, {done / (now - began):.1f} images/s")

        drawn = draw(
            self._generator(scenario),
            asked,
            self.reference.size,
            **scenario.request(),
            batch_size=self.config.batch_size,
            seed=seed,
            on_progress=progress,
        )
        about = {k: v for k, v in dataclasses.asdict(drawn).items() if k != "images"}
        temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            np.savez_compressed(temporary, images=drawn.images, about=json.dumps(about))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self.counts["made"] += 1
        return drawn

    def _scored(
        self, scenario: Scenario, drawn: Drawn, asked: Sequence[Asked], prompts: str, seed: int
    ) -> dict[str, Any]:
        wanted = [(one.id, one.prompt, dataclasses.astuple(one.product)) for one in asked]
        key = _key(self._scoring, drawn.images.tobytes(), wanted, prompts)

        def score() -> dict[str, Any]:
            self.log(f"{scenario.name}: scoring {prompts}, seed {seed}")
            return evaluate_drawn(drawn, asked, self.reference, prompts=prompts).to_dict()

        return self._json("scores", scenario, key, score)

    def _reconstructed(self, scenario: Scenario, identity: dict[str, Any]) -> dict[str, Any]:
        """The real photos through the model's autoencoder, where it has one: the same for all of its settings."""
        same = {k: v for k, v in identity.items() if k not in ("request", "lora")}

        def score() -> dict[str, Any]:
            reconstruct = getattr(self._generator(scenario), "reconstruct", None)
            if not callable(reconstruct):
                return {}
            self.log(f"{scenario.name}: reconstructions")
            scores = reconstruction_scores(reconstruct, self.reference, self.config.batch_size)
            return plain({name: dataclasses.asdict(value) for name, value in scores.items()})

        return self._json("reconstructed", None, _key(self._scoring, same), score)

    # ---- pictures

    def _grid(self, scenario: Scenario, identity: dict[str, Any], row: dict[str, Any]) -> Score:
        """Draws the grid's prompts with every grid seed, keeps a strip for each prompt, and measures their variety."""
        prompts, seeds = self.config.grid_prompts, self.config.grid_seeds
        asked = [Asked(f"grid {prompt}", prompt, Product()) for prompt in prompts]
        images = [self._drawn(scenario, identity, asked, seed, f"grid, seed {seed}").images for seed in seeds]
        row["grid"] = {}
        for i, prompt in enumerate(prompts):
            name = f"pictures/{slug(scenario.name)}/{i:02d}-{slug(prompt)}.png"
            strip = contact_sheet([of_seed[i] for of_seed in images], len(seeds), gap=1)
            save_image(self.output / name, strip, overwrite=True)
            row["grid"][prompt] = name
        if len(seeds) < 2:
            return Score(float("nan"), None, None, 0)
        features = np.stack([self.reference.extractor(of_seed) for of_seed in images], axis=1)
        values = pairwise_diversity(features)
        return Score(float(values.mean()), *bootstrap_interval(values), len(prompts) * len(seeds), "95%")

    def _copies_sheet(
        self,
        scenario: Scenario,
        identity: dict[str, Any],
        asked: Sequence[Asked],
        prompts: str,
        seed: int,
        closest: list[dict[str, Any]],
    ) -> None:
        """The drawn images nearest to a train photo, each above that photo."""
        assert self.reference.train is not None
        drawn = self._drawn(scenario, identity, asked, seed, prompts)
        photos = self.reference.train.photos([pair["train_row"] for pair in closest])
        images, labels, columns = [], [], 8
        for start in range(0, len(closest) - len(closest) % columns or len(closest), columns):
            part = closest[start : start + columns]
            images += [drawn.images[pair["index"]] for pair in part] + list(photos[start : start + len(part)])
            labels += [f"drawn, {pair['ratio']:.2f}" for pair in part] + [f"train {pair['train_id']}" for pair in part]
        path = self.output / "pictures" / slug(scenario.name) / f"closest-{prompts}.png"
        save_image(path, contact_sheet(images, min(columns, len(closest)), labels), overwrite=True)

    # ---- speed

    def speed(self, scenarios: Sequence[Scenario], rows: list[dict[str, Any]]) -> None:
        """Repetition after repetition, all scenarios in turn, each in a process of its own."""
        found: dict[str, list[dict[str, Any]]] = {}
        for repetition in range(self.config.repetitions):
            for scenario, row in zip(scenarios, rows, strict=True):
                if row["status"] != "ok":
                    continue
                try:
                    found.setdefault(scenario.name, []).append(self._one_speed(scenario, repetition))
                except GigdiffError as error:
                    row["speed"] = {"reason": str(error)}
                    self.log(f"{scenario.name}: speed failed: {error}")
        for row in rows:
            if row["name"] in found:
                row["speed"] = summarise_speed(found[row["name"]])

    def _one_speed(self, scenario: Scenario, repetition: int) -> dict[str, Any]:
        settings = {
            "model": scenario.model,
            "batch_sizes": list(self.config.speed_batch_sizes),
            "latency_images": self.config.latency_images,
            "threads": self.config.threads,
            "device": scenario.device,
            "dtype": scenario.dtype,
            "attention": scenario.attention,
            **scenario.request(),
        }
        identity = self._identity(scenario, _folder(scenario))
        machine = [platform.machine(), _processor(), os.cpu_count()]

        def measure() -> dict[str, Any]:
            self.log(f"{scenario.name}: speed, repetition {repetition + 1} of {self.config.repetitions}")
            return _measure_apart(settings)

        return self._json("speed", scenario, _key(identity, settings, machine, repetition), measure)

    # ---- cells and the loaded model

    def _generator(self, scenario: Scenario) -> ImageGenerator:
        """The scenario's model; the last one stays loaded, because its other settings often come next."""
        placed = (scenario.model, scenario.device, scenario.dtype, scenario.attention)
        if self._loaded is not None:
            last = self._loaded[0]
            if placed == (last.model, last.device, last.dtype, last.attention):
                return self._loaded[1]
        self.unload()
        self.log(f"{scenario.name}: loading {scenario.model}")
        generator = gigdiff.load(scenario.model, scenario.device, scenario.dtype, scenario.attention)
        self._loaded = (scenario, generator)
        return generator

    def unload(self) -> None:
        """Lets go of the loaded model, before another is loaded or another process needs the memory."""
        self._loaded = None

    def _cell(self, kind: str, scenario: Scenario | None, key: str, suffix: str) -> Path:
        label = f"{slug(scenario.name)}-" if scenario else ""
        return self.output / "cells" / kind / f"{label}{key}{suffix}"

    def _json(
        self, kind: str, scenario: Scenario | None, key: str, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """A cell of JSON: read back, or made and kept."""
        path = self._cell(kind, scenario, key, ".json")
        if path.is_file():
            self.counts["kept"] += 1
            return json.loads(path.read_text(encoding="utf-8"))
        made = make()
        write_text(path, json.dumps(made, allow_nan=False))
        self.counts["made"] += 1
        return made


# ---- parts ----------------------------------------------------------------------------------------------------------


def _folder(scenario: Scenario) -> Path:
    from gigdiff.generators.loading import check_folder, resolve

    folder, name = resolve(scenario.model)
    check_folder(folder, name)
    return folder


def _size(folder: Path, scenario: Scenario) -> dict[str, Any]:
    """Parameters and bytes on disk, the LoRA's with them; training cost from the card where the config gives none."""
    files = sorted(folder.rglob("*.safetensors"))
    disk = size_on_disk(folder)
    lora = Path(scenario.lora).expanduser() if scenario.lora else None
    if lora is not None and lora.exists():
        files += [lora] if lora.is_file() else sorted(lora.rglob("*.safetensors"))
        disk += lora.stat().st_size if lora.is_file() else size_on_disk(lora)
    cost = scenario.training_cost or str(card(folder).get("training_cost") or "")
    return {"parameters": sum(map(_parameters, files)), "bytes_on_disk": disk, "training_cost": cost}


def _parameters(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(file, framework="np") as tensors:
        return sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118


def _measure_apart(settings: dict[str, Any]) -> dict[str, Any]:
    """gigdiff.speed in a process of its own. Raises GigdiffError with its reason when it fails."""
    command = [sys.executable, "-m", "gigdiff.speed", json.dumps({**settings, "started": time.time()})]
    path = os.pathsep.join(filter(None, [str(Path(gigdiff.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    lines = done.stdout.strip().splitlines()
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise GigdiffError(f"the process ended with status {done.returncode}: {last[:300]}") from error
    if "error" in found:
        raise GigdiffError(f"{found['error']}: {found['reason']}")
    return found


def summarise_speed(repetitions: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over repetitions with their range, percentiles of all latencies, greatest peaks; the raw data beside."""
    latencies = [seconds for one in repetitions for seconds in one["latencies"]]
    batches = {size: [one["throughput"][size] for one in repetitions if size in one["throughput"]] for one in
               repetitions for size in one["throughput"]}  # fmt: skip
    cuda = [one["cuda_bytes"] for one in repetitions if one["cuda_bytes"] is not None]
    host = [one["host_bytes"] for one in repetitions if one["host_bytes"] is not None]
    throughput = {size: _range(values, len(values)) for size, values in batches.items()}
    best = max(throughput, key=lambda size: throughput[size]["value"])
    return {
        "throughput": throughput,
        "best": throughput[best] | {"batch_size": int(best)},
        "latency": {
            **{f"p{p}": float(np.percentile(latencies, p)) for p in (50, 95, 99)},
            "count": len(latencies),
        },
        "first_image": _range([one["first_image_seconds"] for one in repetitions], len(repetitions)),
        "host_bytes": max(host) if host else None,
        "cuda_bytes": max(cuda) if cuda else None,
        "device": repetitions[0]["device"],
        "threads": repetitions[0]["threads"],
        "load_average": [average for one in repetitions for average in one["load_average"]],
        "failed": {size: why for one in repetitions for size, why in one["failed"].items()},
        "raw": repetitions,
    }


def _range(values: list[float], count: int) -> dict[str, Any]:
    return {
        "value": statistics.median(values), "low": min(values), "high": max(values), "count": count, "interval": "range"
    }  # fmt: skip


def over_seeds(scores: Sequence[Score]) -> Score:
    """The mean over seeds with Student's 95% interval of it; of one seed its own score and interval."""
    if len(scores) == 1:
        return scores[0]
    mean, half = seed_interval([score.value for score in scores])
    return Score(mean, mean - half, mean + half, sum(score.count for score in scores), "95% over seeds")


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of Student's 95% interval of it: t s / sqrt(n), s with n - 1; n at least 2.

    >>> seed_interval([1.0, 2.0, 3.0])
    (2.0, 2.4843382191557147)
    """
    n = len(values)
    t = T95[n - 2] if n - 2 < len(T95) else 1.96
    return statistics.fmean(values), t * statistics.stdev(values) / n**0.5


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other is at least as good as in both, and better in one; larger is better.

    >>> pareto_front([(1, 3), (2, 2), (1, 2), (3, 1)])
    [0, 1, 3]
    """
    return [
        i
        for i, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)
    ]  # fmt: skip


def environment(load_before: float | None) -> dict[str, Any]:
    """Where it ran: versions, commit, processor, threads, load."""
    import torch

    return {
        "versions": versions(),
        "git_commit": git_commit(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": [load_before, load_average()],
    }


def _processor() -> str:
    """The processor's name; platform.processor() is empty on many Linux systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _why_not(error: Exception) -> dict[str, str]:
    """Status and reason of a row that could not be measured."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModelNotFoundError):
        return {"status": "not available", "reason": reason}
    if isinstance(error, CapabilityError | InputError):
        return {"status": "not applicable", "reason": reason}
    if isinstance(error, GigdiffError):
        return {"status": "failed", "reason": reason}
    return {"status": "failed", "reason": f"{type(error).__name__}: {reason}", "traceback": traceback.format_exc()}


def _libraries() -> dict[str, str]:
    """Versions that pixels can depend on."""
    return {name: version for name, version in versions().items() if name in ("torch", "diffusers", "transformers")}


def _code(parts: Sequence[str]) -> str:
    """A hash of source files of this package."""
    root = Path(gigdiff.__file__).parent
    files = sorted(
        file for part in parts for file in ([root / part] if (root / part).is_file() else (root / part).rglob("*.py"))
    )
    return content_key(*(item for file in files for item in (file.name, file.read_bytes()))).hex()


def _key(*parts: Any) -> str:
    """24 hex digits of JSON-like parts and bytes."""
    encoded = [part if isinstance(part, bytes) else json.dumps(plain(part), sort_keys=True) for part in parts]
    return content_key(*encoded).hex()[:24]


def slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())[:60] or "row"
