"""The perceptual loss and the discriminator on the same features: the formula's numbers, what each must prefer."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from gigdiff.metrics.efficientnet import VARIANTS, load_efficientnet
from gigdiff.models.discriminator import FeatureDiscriminator, discriminator_loss, generator_loss
from gigdiff.models.perceptual import feature_losses, perceptual_loss

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


def test_pooled_loss_is_the_relative_error_of_the_whole_features():
    net, real, fake = load_efficientnet("lite2"), pictures(0), pictures(1).requires_grad_()
    a, b = (
        net.features(((F.interpolate(x, scale_factor=2, mode="bilinear") + 1) * 127.5 - 127) / 128)[0]
        for x in (real, fake)
    )
    expected = (((a - b) ** 2).sum(1) / (a**2).sum(1)).mean()
    alike, loss = feature_losses(net, real, fake, (2, 1))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert alike.item() == pytest.approx(perceptual_loss(net, real, fake, (2, 1)).item(), rel=1e-4)
    assert [value.item() for value in feature_losses(net, real, real, (2,))] == [0, 0]
    loss.backward()
    assert fake.grad is not None and fake.grad.abs().max() > 0


def test_a_size_is_the_distance_of_the_enlarged_pictures():
    net, pair = load_efficientnet("lite2"), (pictures(0), pictures(1))
    twice = [F.interpolate(x, size=(128, 128), mode="bilinear") for x in pair]
    assert perceptual_loss(net, *pair, (2,)).item() == pytest.approx(
        perceptual_loss(net, *twice, (1,)).item(), rel=1e-4
    )


def test_a_feature_discriminator_learns_sharp_from_soft_and_leaves_its_network_alone():
    torch.manual_seed(0)
    net = load_efficientnet("lite2")
    before = net.stem.weight.clone()
    critic = FeatureDiscriminator(net, size=2, width=16)
    assert critic(pictures(0)).shape == (2, 1, 8, 8)  # 64 pixels, enlarged to 128, in patches of 16
    assert not any(name.startswith("_frozen") or "stem" in name for name in critic.state_dict())
    noise = 0.2 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    real, soft = (pictures(0) + noise).clamp(-1, 1), pictures(0)
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)
    first = discriminator_loss(critic, real, soft, noise, gamma=0.01).item()
    for _ in range(15):
        loss = discriminator_loss(critic, real, soft, noise, gamma=0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    assert torch.equal(net.stem.weight, before)
    with torch.no_grad():  # the generator's loss wants what looks real
        assert generator_loss(critic, real, real) < generator_loss(critic, real, soft)
    fake = soft.clone().requires_grad_()
    generator_loss(critic, real, fake).backward()
    assert fake.grad is not None and fake.grad.abs().max() > 0


def test_without_stages_mixed_up_each_head_fits_its_map():
    net = load_efficientnet("lite2")
    assert net.channels((0, 1, 2, 4)) == [m.shape[1] for i, m in enumerate(net.maps(pictures(0), 5)) if i != 3]
