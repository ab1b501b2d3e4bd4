"""Packed layers: the same bits as torch's own, whatever happens to the weights."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from gigdiff import packing
from gigdiff.packing import _PACKED, pack, unpacked
from gigdiff.precision import cpu_has_bfloat16

pytestmark = pytest.mark.skipif(not cpu_has_bfloat16(), reason="this CPU does not compute in bfloat16")


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=24, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    return unet.eval().to(memory_format=torch.channels_last)


def draw(unet: nn.Module, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    z = torch.randn(rows, 4, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    text = torch.randn(rows, 5, 24, generator=generator)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return unet(z, torch.tensor(300), encoder_hidden_states=text).sample


def packed_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if module in _PACKED]


def test_same_bits_in_every_batch_and_after_every_change_of_weights():
    plain = tiny_unet()
    packed = copy.deepcopy(plain)
    pack(packed)
    for rows in (1, 2, 5, 16):
        assert torch.equal(draw(packed, rows), draw(plain, rows))
    assert len(packed_layers(packed)) > 40 and not packed_layers(plain)
    before = draw(packed, 2)
    with torch.no_grad():
        for unet in (plain, packed):
            unet.conv_in.weight.mul_(1.5)  # in place, as an average or load_state_dict does it
            inner = unet.mid_block.resnets[0].conv1.weight
            inner.data = inner.data * 0.5  # as peft does
    assert torch.equal(draw(packed, 2), draw(plain, 2)) and not torch.equal(draw(packed, 2), before)
    assert torch.equal(draw(copy.deepcopy(packed), 2), draw(plain, 2))
    assert packed.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("amx", [True, None], ids=["as with AMX", "this CPU"])
@pytest.mark.parametrize("places", [20, 80])
@pytest.mark.parametrize("numbers", [256, 512, 768, 1024])
def test_long_sums_are_the_same_bits_in_every_batch(
    numbers: int, places: int, amx: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AMX the sums of a feed-forward network's second layer were split by the batch: other bits, now and then."""
    if amx is not None:
        monkeypatch.setattr(packing, "cpu_has_amx", lambda: amx)
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(numbers, 192)), torch.randn(32, places, numbers)
    plain = copy.deepcopy(layer)
    pack(layer)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        alone = torch.cat([layer(row) for row in x.split(1)])
        for rows in (2, 3, 4, 8, 32):
            assert torch.equal(layer(x[:rows]), alone[:rows])
        torch.testing.assert_close(alone, plain(x), rtol=2e-2, atol=2e-2)
        another = copy.deepcopy(plain)
        pack(another)
        for other in (x[0], x[:2], x[0]):  # rows first, then sequences: they are packed in different ways
            torch.testing.assert_close(another(other), plain(other), rtol=2e-2, atol=2e-2)


def test_an_unpacked_copy_has_torchs_layers_and_the_same_weights():
    packed = tiny_unet()
    pack(packed)
    plain = unpacked(packed)
    assert torch.equal(draw(packed, 2), draw(plain, 2)) and packed_layers(packed) and not packed_layers(plain)
    assert plain.conv_in.weight is packed.conv_in.weight
    with torch.no_grad():
        packed.conv_in.weight.mul_(1.5)
    assert torch.equal(draw(packed, 2), draw(plain, 2))


def test_a_lora_on_packed_layers_is_that_on_plain_ones():
    plain = tiny_unet()
    packed = copy.deepcopy(plain)
    pack(packed)
    base = draw(packed, 2)
    for unet in (plain, packed):
        torch.manual_seed(1)
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    assert torch.equal(draw(packed, 2), draw(plain, 2)) and not torch.equal(draw(packed, 2), base)


def test_training_and_float32_go_their_own_way():
    unet = tiny_unet()
    pack(unet)
    z, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    with torch.no_grad():
        assert unet(z, torch.tensor(3), encoder_hidden_states=text).sample.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        unet(z, torch.tensor(3), encoder_hidden_states=text).sample.float().square().mean().backward()
    assert not packed_layers(unet)
    assert all(parameter.grad is not None for parameter in unet.parameters())


def test_a_1_x_1_convolution_is_laid_out_for_every_batch():
    """oneDNN's layout for a convolution may fit batches of one and no others: with the wrong one it took 50 times as
    long. A linear layer's is the same for both, and gives the same bits."""
    torch.manual_seed(0)
    plain = nn.Conv2d(192, 192, 1).to(memory_format=torch.channels_last)
    after_two, after_one = copy.deepcopy(plain), copy.deepcopy(plain)
    x = torch.randn(2, 192, 10, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for layer, first in ((after_two, x), (after_one, x[:1])):
            pack(layer)
            layer(first)
            assert _PACKED[layer][1].dim() == 2
            for given in (x, x.contiguous(memory_format=torch.channels_last), x[:1]):
                drawn = layer(given)
                assert torch.equal(drawn, plain(given)) and drawn.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("fused", [True, False])
def test_weights_that_an_optimizer_changed_are_packed_anew(fused: bool) -> None:
    """A fused optimizer changes them without counting their versions up: a network went on drawing with its first."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(16, 16), nn.Unflatten(1, (16, 1, 1)), nn.Conv2d(16, 8, 3, padding=1))
    pack(layer)
    optimizer, x = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused), torch.randn(4, 16)

    def drawn(model: nn.Module) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(x)

    before = drawn(layer)
    layer(x).square().mean().backward()
    optimizer.step()
    after = drawn(layer)
    assert not torch.equal(after, before) and torch.equal(after, drawn(copy.deepcopy(layer)))
