"""The autoencoder: its linear start against PCA, its interface against a stock diffusers pipeline's expectations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gigdiff.models.autoencoder import ProductAutoencoder, visibility
from gigdiff.models.discriminator import PatchDiscriminator, discriminator_loss, generator_loss


def tiny(**changes: object) -> ProductAutoencoder:
    torch.manual_seed(0)
    sizes = {
        "latent_channels": 6, "half_channels": 8, "quarter_channels": 8, "eighth_channels": 8, "encoder_blocks": 1,
        "decoder_blocks": 1,
    }  # fmt: skip
    return ProductAutoencoder(**{**sizes, **changes})  # type: ignore[arg-type]


def smooth_images(count: int = 12) -> torch.Tensor:
    """Random low-frequency pictures (count, 3, 32, 24) in [-1, 1]."""
    coarse = torch.rand(count, 3, 5, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(32, 24), mode="bicubic").clamp(-1, 1)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_it_starts_as_the_best_linear_codec(exponent: float) -> None:
    """Before training, the error is that of keeping the 6 first principal components, by scikit-learn."""
    from sklearn.decomposition import PCA

    model, images = tiny(), smooth_images()
    model.init_linear_from_patches(images, exponent)
    with torch.no_grad():
        rebuilt, raw = model(images)
    patches = torch.nn.functional.pixel_unshuffle(images, 8).permute(0, 2, 3, 1).reshape(-1, 192).double().numpy()
    pca = PCA(6).fit(patches)
    expected = ((pca.inverse_transform(pca.transform(patches)) - patches) ** 2).mean()
    assert ((rebuilt - images) ** 2).mean().item() == pytest.approx(expected, rel=1e-3)
    variances = raw.var((0, 2, 3))
    assert variances.mean().item() == pytest.approx(1.0, rel=0.05)
    if exponent == 1.0:  # whitened
        np.testing.assert_allclose(variances.numpy(), np.ones(6), rtol=0.05)


def test_encode_gives_unit_variance_and_decode_undoes_it() -> None:
    model, images = tiny(), smooth_images()
    model.init_linear_from_patches(images)
    with torch.no_grad():
        raw = model.encoder(images)
        model.set_latent_statistics(raw.mean((0, 2, 3)), raw.std((0, 2, 3)))
        latents = model.encode(images).latent_dist.mode()  # type: ignore[union-attr]
        assert latents.shape == (12, 6, 4, 3)
        assert latents.mean((0, 2, 3)).abs().max() < 1e-4
        torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(6), rtol=1e-3, atol=0)
        torch.testing.assert_close(model.decode(latents).sample, model(images)[0], rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]


def test_visibility_is_each_channels_share_in_the_pixels() -> None:
    """An untrained decoder is linear: the pixels' change is the length of a channel's column."""
    model, images = tiny(), smooth_images()
    model.init_linear_from_patches(images, exponent=1.0)
    scales = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0])
    model.set_latent_statistics(torch.zeros(6), scales)
    columns = model.decoder.linear.weight[:, :, 0, 0].square().sum(0) * scales**2
    found = visibility(model, torch.randn(3, 6, 4, 3))
    assert found.shape == (1, 6, 1, 1) and found.square().mean().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(found.flatten(), (columns / columns.mean()).sqrt().detach(), rtol=1e-3, atol=1e-4)


def test_save_and_load_keep_every_bit_including_the_statistics(tmp_path: Path) -> None:
    model = tiny()
    model.set_latent_statistics(torch.arange(6.0), torch.arange(6.0) + 1)
    model.save_pretrained(tmp_path)
    again = ProductAutoencoder.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.config == model.config or again.config["latent_channels"] == 6


def test_every_parameter_learns_after_a_few_steps() -> None:
    """Zero branches don't stay dead: the output layer moves first, then the blocks from their ends."""
    model, images = tiny(), smooth_images()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (model(images)[0] - images).square().mean().backward()
        optimizer.step()
    dead = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not dead


def test_discriminator_losses_fall_the_right_way() -> None:
    torch.manual_seed(0)
    net, real = PatchDiscriminator(8), smooth_images()
    fake = torch.rand_like(real) * 2 - 1
    noise = torch.randn_like(real)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    assert net(real).shape == (12, 1, 4, 3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = discriminator_loss(net, real, fake, noise, gamma=0.01)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        # It tells them apart, so the generator's loss is high for the fakes and low with the roles swapped.
        assert generator_loss(net, real, fake) > 2 * generator_loss(net, fake, real)


def test_the_gradient_penalty_tends_to_r1_plus_r2() -> None:
    """For a linear discriminator the penalty's expectation is gamma / 2 of its squared gradient, on each side."""

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.randn(3 * 32 * 24, generator=torch.Generator().manual_seed(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.flatten(1) @ self.w)[:, None]

    net = Linear()
    real = smooth_images(12).repeat(200, 1, 1, 1)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(4))
    with_penalty = discriminator_loss(net, real, real, noise, gamma=2.0, noise_std=0.1)
    without = discriminator_loss(net, real, real, noise, gamma=0.0, noise_std=0.1)
    expected = 2.0 / 2 * 2 * net.w.square().sum().item()
    assert (with_penalty - without).item() == pytest.approx(expected, rel=0.05)
