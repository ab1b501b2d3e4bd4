"""Starting from a narrower model: the same function at first, and something to learn from in the new channels."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from gigdiff.errors import ModelMismatchError
from gigdiff.models.autoencoder import ProductAutoencoder
from gigdiff.models.widen import copy_leading


def unet(channels: int, width: int = 16) -> UNet2DConditionModel:
    torch.manual_seed(channels)
    return UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(width, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2, norm_num_groups=8,
    ).eval()  # fmt: skip


def autoencoder(channels: int) -> ProductAutoencoder:
    torch.manual_seed(channels)
    return ProductAutoencoder(channels, 8, 8, 8, 1, 1)


def test_a_unet_with_more_channels_predicts_the_same_for_the_old_ones() -> None:
    narrow, wide = unet(4), unet(6)
    copy_leading(narrow, wide)
    z, t, text = torch.randn(2, 6, 8, 8), torch.tensor([10, 500]), torch.randn(2, 3, 8)
    with torch.no_grad():
        expected, got = narrow(z[:, :4], t, text).sample, wide(z, t, text).sample
    torch.testing.assert_close(got[:, :4], expected)
    assert expected.abs().max() > 0.01 and got[:, 4:].abs().max() == 0


def test_an_autoencoder_with_more_channels_rebuilds_the_same_and_can_use_them() -> None:
    images = torch.rand(4, 3, 32, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    narrow, wide = autoencoder(4), autoencoder(6)
    with torch.no_grad():
        for p in narrow.parameters():
            p.add_(0.05 * torch.randn(p.shape))  # a trained one: its branches are not zero
    narrow.set_latent_statistics(torch.arange(4.0), torch.arange(4.0) + 1)
    wide.init_linear_from_patches(images)
    wide.start_from(narrow)
    (before, raw), (after, wider) = narrow(images), wide(images)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(wider[:, :4], raw)
    assert wider[:, 4:].std() > 0.05
    assert torch.equal(wide.latents_std[:, :4], narrow.latents_std)
    (after - images).square().mean().backward()
    assert wide.decoder.conv_in.weight.grad[:, 4:].abs().max() > 0  # type: ignore[index]


def test_narrower_or_other_models_are_refused() -> None:
    with pytest.raises(ModelMismatchError, match="only wider"):
        copy_leading(unet(6), unet(4))
    with pytest.raises(ModelMismatchError, match="other layers"):
        copy_leading(autoencoder(4), unet(4))
