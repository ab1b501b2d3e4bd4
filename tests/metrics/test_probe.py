"""Probes: the fit, the file, what is refused, and that those shipped are small and whole."""

import numpy as np
import pytest

from gigdiff.errors import InputError, ModelNotFoundError, NumericalError
from gigdiff.metrics.probe import PROBES, TARGETS, Probe, bootstrap_interval, fit_probe, load_probe, target_of
from gigdiff.products import Product


def clusters(n=600, d=12, k=3, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(k, d)) * 3
    y = rng.integers(0, k, n)
    return (centres[y] + rng.normal(size=(n, d)) + 5).astype(np.float32), [f"class {i}" for i in y]


@pytest.mark.parametrize("hidden", [0, 16])
def test_learns_what_is_there(hidden):
    x, y = clusters()
    probe = fit_probe("article_type", {"a": x[:, :4], "b": x[:, 4:]}, y, hidden=hidden, epochs=40, learning_rate=0.03)
    other, wanted = clusters(seed=1)
    features = {"b": other[:, 4:], "a": other[:, :4]}  # the probe's own order counts, not the mapping's
    assert np.mean(np.array(probe.predict(features)) == wanted) > 0.97
    np.testing.assert_allclose(np.exp(probe.scores(features)).sum(axis=1), 1, rtol=1e-4)


def test_agrees_with_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model", reason="pip install 'gigdiff[eval]'")
    x, y = clusters(900)
    x = x + np.random.default_rng(3).normal(size=x.shape).astype(np.float32) * 2  # so that it isn't all easy
    theirs = linear.LogisticRegression(max_iter=2000).fit(x[:600], y[:600]).predict(x[600:])
    probe = fit_probe("gender", {"a": x[:600]}, y[:600], dropout=0.0, epochs=60, learning_rate=0.03)
    assert np.mean(theirs == np.array(probe.predict({"a": x[600:]}))) > 0.96


def test_same_seed_same_probe_and_a_round_trip_through_files(tmp_path):
    x, y = clusters(200)
    one, two = (fit_probe("gender", {"a": x}, y, hidden=8, epochs=2) for _ in range(2))
    for (weight, bias), (weight2, bias2) in zip(one.layers, two.layers, strict=True):
        np.testing.assert_array_equal(weight, weight2)
        np.testing.assert_array_equal(bias, bias2)
    one.save(tmp_path)
    loaded = load_probe("gender", tmp_path)
    assert (loaded.name, loaded.classes, loaded.inputs) == (one.name, one.classes, one.inputs)
    np.testing.assert_allclose(loaded.scores({"a": x}), one.scores({"a": x}), atol=0.02)  # files are in half precision
    loaded.save(tmp_path)
    load_probe.cache_clear()
    np.testing.assert_array_equal(load_probe("gender", tmp_path).scores({"a": x}), loaded.scores({"a": x}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gender.json", "gender.safetensors"]


def test_rare_classes_and_unknown_targets_are_left_out():
    x, y = clusters(300)
    targets = ["rare" if i < 5 else None if i < 10 else target for i, target in enumerate(y)]
    probe = fit_probe("article_type", {"a": x}, targets, min_count=20)
    assert probe.classes == ("class 0", "class 1", "class 2")
    assert probe.details["images"] == 290
    products = [Product(category="rare"), Product(), Product(category=probe.predict({"a": x[10:11]})[0])]
    got = probe.correct({"a": np.repeat(x[10:11], 3, axis=0)}, products)
    np.testing.assert_array_equal(got, [np.nan, np.nan, 1.0])


def test_targets():
    coat = Product(category="Jackets", colour="Navy Blue", gender="Women")
    assert [target_of(name, coat) for name in TARGETS] == ["Jackets", "blue", "Women"]
    assert target_of("colour_group", Product(colour="Multi")) is None


def test_bootstrap_interval():
    values = np.array([1.0] * 80 + [0.0] * 20 + [np.nan] * 7)
    low, high = bootstrap_interval(values)
    # the normal approximation: 0.8 +- 1.96 sqrt(0.8 * 0.2 / 100)
    assert low == pytest.approx(0.8 - 0.0784, abs=0.015) and high == pytest.approx(0.8 + 0.0784, abs=0.015)
    assert bootstrap_interval(values) == (low, high)
    assert np.isnan(bootstrap_interval(np.array([np.nan]))).all()


def test_bad_input(tmp_path):
    x, y = clusters(60)
    probe = fit_probe("gender", {"a": x}, y, min_count=2, epochs=1)
    with pytest.raises(InputError, match="reads a; given: b"):
        probe.predict({"b": x})
    with pytest.raises(InputError, match="reads 12 features, 5"):
        probe.predict({"a": x[:, :5]})
    with pytest.raises(NumericalError, match="NaN"):
        probe.predict({"a": x * np.nan})
    with pytest.raises(InputError, match="60 images and 1 products"):
        probe.correct({"a": x}, [Product()])
    with pytest.raises(InputError, match="at least 2 classes"):
        fit_probe("gender", {"a": x}, ["same"] * 60)
    with pytest.raises(InputError, match='did you mean "gender"'):
        load_probe("genders")
    with pytest.raises(ModelNotFoundError, match="fit_probes"):
        load_probe("gender", tmp_path / "nothing")


def test_shipped_probes_are_small_and_whole():
    assert sum(path.stat().st_size for path in PROBES.iterdir()) < 3_000_000
    for name in TARGETS:
        probe = load_probe(name)
        assert isinstance(probe, Probe) and probe.name == name
        assert probe.layers[-1][0].shape[0] == len(probe.classes) == len(set(probe.classes))
        assert all(np.isfinite(weight).all() and np.isfinite(bias).all() for weight, bias in probe.layers)
    assert len(load_probe("article_type").classes) >= 80
    assert load_probe("article_type").details["validation_accuracy"] >= 0.80
    assert load_probe("colour_group").details["validation_accuracy"] >= 0.70
