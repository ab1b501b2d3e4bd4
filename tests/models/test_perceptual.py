"""The perceptual loss: numbers of the formula, and what it must prefer."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from gigdiff.metrics.efficientnet import VARIANTS, load_efficientnet
from gigdiff.models.perceptual import perceptual_loss

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(VARIANTS["lite2"].package) is None, reason="pip install 'gigdiff[train]'"
)


def pictures(seed: int) -> torch.Tensor:
    """Two smooth pictures (2, 3, 64, 64) in [-1, 1]."""
    coarse = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, scale_factor=8, mode="bicubic").clamp(-1, 1)


def test_equals_the_formula_position_by_position():
    net, real, fake = load_efficientnet("lite2"), pictures(0), pictures(1)
    terms = []
    for pair in ((real, fake), (F.avg_pool2d(real, 2), F.avg_pool2d(fake, 2))):
        # Whole features of pixels in [0, 255], by the network's own normalisation, one picture at a time.
        maps = [[net.features((((x[None] + 1) * 127.5) - 127) / 128)[1] for x in images] for images in pair]
        for stage in (0, 1, 2, 4):
            # |a / |a| - b / |b||^2 = 2 - 2 cos(a, b) at every position
            cosines = [F.cosine_similarity(a[stage], b[stage], dim=1).mean() for a, b in zip(*maps, strict=True)]
            terms.append(2 - 2 * torch.stack(cosines).mean())
    assert perceptual_loss(net, real, fake, (1, 0.5)).item() == pytest.approx(
        torch.stack(terms).mean().item(), rel=1e-3
    )


def test_equal_is_zero_nearer_is_less_and_only_the_fake_moves():
    net, real = load_efficientnet("lite2"), pictures(0).requires_grad_()
    assert perceptual_loss(net, real, real, (1,)).item() == 0
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(2))
    near, far = (perceptual_loss(net, real, real.detach() + s * noise, (1,)).item() for s in (0.02, 0.2))
    assert 0 < near < far
    fake = pictures(1).requires_grad_()
    perceptual_loss(net, real, fake, (1, 2)).backward()
    assert real.grad is None and fake.grad is not None and fake.grad.abs().max() > 0
    assert all(p.grad is None for p in net.parameters())


def test_a_size_is_the_distance_of_the_enlarged_pictures():
    net, pair = load_efficientnet("lite2"), (pictures(0), pictures(1))
    twice = [F.interpolate(x, size=(128, 128), mode="bilinear") for x in pair]
    assert perceptual_loss(net, *pair, (2,)).item() == pytest.approx(
        perceptual_loss(net, *twice, (1,)).item(), rel=1e-4
    )
