"""Generators and discriminator: modulation against a naive reference, shapes, independence of the batch, text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gigdiff.errors import CapabilityError, InputError, ModelMismatchError, ModelNotFoundError
from gigdiff.models.conditioning import TextSummary, TokenAttention, blur_condition, split_condition
from gigdiff.models.gan import ConvGenerator, ModulatedConv, StyleGenerator
from gigdiff.models.one_pass import load_one_pass
from gigdiff.models.text_discriminator import TextDiscriminator
from gigdiff.models.vae import ConditionalVae, LadderBlock, calibrated_nll, drawing_half

SIZES = {"channels": 4, "widths": (16, 8), "blocks": (1, 1), "text_dim": 12}
PIXELS = {**SIZES, "channels": 3, "height": 32, "width": 16, "fold": 4}
FAMILIES = {"style": StyleGenerator, "conv": ConvGenerator, "vae": ConditionalVae}


def build(family: str, **changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = SIZES | ({"latent_dim": 2} if family == "vae" else {"noise_dim": 8, "style_dim": 16})
    return FAMILIES[family](**{**sizes, **changes})


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """With what starts at zero moved away from it, as after some training."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def draw(model: torch.nn.Module, noise: torch.Tensor, condition: torch.Tensor, *args: float) -> torch.Tensor:
    with torch.no_grad():
        out = model(noise, condition, *args)
    return out.mean if isinstance(model, ConditionalVae) else out


def conditions(count: int, length: int = 6) -> torch.Tensor:
    condition = torch.randn(count, 1 + length, 12, generator=torch.Generator().manual_seed(1))
    condition[:, 4:] = 0  # padding
    return condition


def test_modulated_convolution_equals_one_convolution_an_image() -> None:
    """The naive form: for each image its own weights, scaled, brought to unit length, and used."""
    torch.manual_seed(0)
    layer = ModulatedConv(5, 7, 6)
    with torch.no_grad():
        layer.bias.normal_()
    x, style = torch.randn(3, 5, 4, 6), torch.randn(3, 6)
    expected = []
    for image, one in zip(x, style, strict=True):
        scale = layer.affine.weight @ one + layer.affine.bias
        weights = layer.weight.clone()
        for i in range(5):
            weights[:, i] = weights[:, i] * scale[i]
        for o in range(7):
            weights[o] = weights[o] / (weights[o] ** 2).sum().sqrt()
        expected.append(F.conv2d(image[None], weights, layer.bias, padding=1)[0])
    torch.testing.assert_close(layer(x, style), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_demodulation_gives_unit_variance_whatever_the_style() -> None:
    torch.manual_seed(0)
    layer = ModulatedConv(16, 16, 8)
    x = torch.randn(8, 16, 32, 32)
    for strength in (0.1, 1.0, 30.0):
        inside = layer(x, strength * torch.randn(8, 8))[..., 1:-1, 1:-1]
        assert inside.std().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("sizes", [{}, {"channels": 3, "height": 32, "width": 16, "fold": 4}, {"channels": 7}])
def test_what_is_drawn_has_the_size_asked_for_and_depends_on_noise_and_text(family: str, sizes: dict) -> None:
    model = stirred(build(family, **sizes))
    noise, condition = torch.randn(2, model.noise_size), conditions(2)  # type: ignore[arg-type]
    out = draw(model, noise, condition)
    config = model.config
    assert out.shape == (2, config["channels"], config["height"], config["width"])  # type: ignore[index]
    assert not torch.allclose(out, draw(model, torch.randn_like(noise), condition))
    assert not torch.allclose(out, draw(model, noise, conditions(2) + 1))
    other_tokens = condition.clone()
    other_tokens[:, 2] *= -1  # the pooled vector stays
    assert not torch.allclose(out, draw(model, noise, other_tokens))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_padding_says_nothing(family: str) -> None:
    model = stirred(build(family))
    noise, condition = torch.randn(2, model.noise_size), conditions(2)  # type: ignore[arg-type]
    torch.testing.assert_close(draw(model, noise, condition), draw(model, noise, condition[:, :4]))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_truncation_zero_draws_one_picture_a_prompt_and_one_changes_nothing(family: str) -> None:
    model = stirred(build(family))
    condition = conditions(1).expand(4, -1, -1)
    noise = torch.randn(4, model.noise_size)  # type: ignore[arg-type]
    if family == "style":  # what the layers' own noise adds is not the style's
        noise[:, 8:] = 0
    assert torch.equal(draw(model, noise, condition, 1.0), draw(model, noise, condition))
    spreads = [draw(model, noise, condition, psi).var(0).mean().item() for psi in (0.0, 0.5, 1.0)]
    assert spreads[0] < 1e-9 < spreads[1] < spreads[2]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_parameter_learns_after_a_few_steps(family: str) -> None:
    model = build(family)
    condition, images = conditions(4), torch.randn(4, 4, 10, 8)
    noise = torch.randn(4, model.noise_size)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    for _ in range(5):
        optimizer.zero_grad()
        if isinstance(model, ConditionalVae):
            out = model(noise, condition, images=images)
            loss = (calibrated_nll(images, out.mean) + out.kl.mean()) / 320
        else:
            loss = (model(noise, condition) - images).square().mean()
        loss.backward()
        optimizer.step()
    dead = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not dead


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_save_and_load_keep_every_bit(family: str, tmp_path: Path) -> None:
    model = stirred(build(family))
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = load_one_pass(tmp_path)
    assert type(again) is FAMILIES[family]
    noise, condition = torch.randn(2, model.noise_size), conditions(2)  # type: ignore[arg-type]
    assert torch.equal(draw(again, noise, condition, 0.7), draw(model, noise, condition, 0.7))


def test_folders_that_hold_no_generator(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no generator in"):
        load_one_pass(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ModelMismatchError, match="UNet2DConditionModel"):
        load_one_pass(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"height": 9}, "9 x 8 can't be folded by 1 and halved 1 times"), ({"blocks": (1,)}, "one of each a level")],
)
def test_sizes_that_do_not_fit(changes: dict, message: str) -> None:
    for family in FAMILIES:
        with pytest.raises(InputError, match=message):
            build(family, **changes)


def test_the_discriminator_scores_groups_and_mismatched_texts() -> None:
    torch.manual_seed(0)
    net = TextDiscriminator(**SIZES, embed_dim=8)
    images, condition = torch.randn(6, 4, 10, 8), conditions(3)
    with torch.no_grad():
        both = net(images, condition)
        first, second = net(images[:3], condition), net(images[3:], condition)
        rolled = net(images[:3], condition.roll(1, 0))
    assert both.scores.shape == (2, 3) and both.similarity.shape == (3, 3)
    torch.testing.assert_close(both.scores, torch.cat([first.scores, second.scores]))
    torch.testing.assert_close(both.mismatched, rolled.scores[0])
    torch.testing.assert_close(both.similarity.diag(), first.similarity.diag())


def test_the_discriminator_takes_pixels() -> None:
    net = TextDiscriminator(**PIXELS, embed_dim=8)
    assert net(torch.randn(2, 3, 32, 16), conditions(2)).scores.shape == (1, 2)


def test_attention_ignores_padding_and_starts_at_zero() -> None:
    torch.manual_seed(0)
    attention, summary = TokenAttention(8, 12), TextSummary(12, 16)
    x, condition = torch.randn(2, 8, 5, 4), conditions(2)
    assert torch.equal(attention(x, condition), x)
    with torch.no_grad():
        attention.out.weight.normal_()
    torch.testing.assert_close(attention(x, condition), attention(x, condition[:, :4]))
    torch.testing.assert_close(summary(condition), summary(condition[:, :4]))
    _, _, mask = split_condition(condition)
    assert mask.sum(1).tolist() == [3, 3]


def test_blurred_conditions_keep_padding_and_have_the_noise_asked_for() -> None:
    condition = conditions(200)
    blurred = blur_condition(condition, torch.randn(condition.shape), 0.5)
    assert torch.equal(blurred[:, 4:], condition[:, 4:])
    change = (blurred - condition)[:, :4].square().mean() / condition[:, :4].square().mean()
    assert change.item() == pytest.approx(0.25, rel=0.1)


def test_kl_of_a_rung_is_that_of_torch_distributions() -> None:
    """And the posterior draws what its mean and standard deviation say."""
    torch.manual_seed(0)
    rung = LadderBlock(8, 3)
    with torch.no_grad():
        for head in (rung.prior[-1], rung.posterior[-1]):
            head.weight.normal_(std=0.1)  # type: ignore[operator, union-attr]
            head.bias.normal_(std=0.5)  # type: ignore[operator, union-attr]
    x, features, noise = torch.randn(2, 8, 5, 4), torch.randn(2, 8, 5, 4), torch.zeros(2, 3, 5, 4)
    with torch.no_grad():
        _, kl = rung(x, noise, features)
        mean, log_std = rung.prior(x).chunk(2, 1)
        shift, log_ratio = rung.posterior(torch.cat([x, features], 1)).chunk(2, 1)
    prior = torch.distributions.Normal(mean, log_std.exp())
    posterior = torch.distributions.Normal(mean + log_std.exp() * shift, log_std.exp() * log_ratio.exp())
    expected = torch.distributions.kl_divergence(posterior, prior).flatten(1).sum(1)
    torch.testing.assert_close(kl, expected, rtol=1e-4, atol=1e-4)


def test_the_vae_pays_nothing_for_what_it_does_not_know_and_learns_to_rebuild() -> None:
    model = build("vae")
    condition, images = conditions(4), torch.randn(4, 4, 10, 8)
    noise = torch.randn(4, model.noise_size)  # type: ignore[arg-type]
    assert model(noise, condition, images=images).kl.abs().max() == 0  # the posterior starts as the prior
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        out = model(torch.randn_like(noise), condition, images=images)
        loss = (calibrated_nll(images, out.mean) + out.kl.mean()) / 320
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_calibrated_likelihood_is_the_gaussians_at_its_best_standard_deviation() -> None:
    torch.manual_seed(0)
    x, mean = torch.randn(8, 3, 5, 4), torch.randn(8, 3, 5, 4)
    std = (x - mean).square().mean((0, 2, 3), keepdim=True).sqrt()
    expected = -torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1).mean()
    constant = 60 * (1 + math.log(2 * math.pi)) / 2
    torch.testing.assert_close(calibrated_nll(x, mean) + constant, expected, rtol=1e-4, atol=1e-3)
    for worse in (0.9, 1.1):
        assert -torch.distributions.Normal(mean, worse * std).log_prob(x).flatten(1).sum(1).mean() > expected


@pytest.mark.parametrize("family", ["style", "conv"])
def test_neighbours_belong_together_before_any_training(family: str) -> None:
    """Positions next to each other correlate; with space folded out of channels they were at -0.2 and -0.05."""
    generator = build(family, widths=(64, 48))
    x = draw(generator, torch.randn(64, generator.noise_size), torch.randn(64, 5, 12))  # type: ignore[arg-type]
    x = x - x.mean((0, 2, 3), keepdim=True)
    assert (x[..., 1:] * x[..., :-1]).mean() > 0.3 * x.square().mean()


class TestDiffusionFeatures:
    """What a frozen UNet sees, against hooks in diffusers' own forward pass."""

    @staticmethod
    def build():
        from diffusers import DDIMScheduler, UNet2DConditionModel

        from gigdiff.diffusion import log_sigmas
        from gigdiff.models.diffusion_features import DiffusionFeatures

        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
            cross_attention_dim=12, attention_head_dim=4, norm_num_groups=8, addition_embed_type="text",
            addition_embed_type_num_heads=4,
        )  # fmt: skip
        table = log_sigmas(DDIMScheduler(beta_schedule="scaled_linear").alphas_cumprod)
        return DiffusionFeatures(unet, torch.randn(1, 5, 12), table, channels=24), unet, table

    def test_they_are_those_of_the_whole_network_mixed(self) -> None:
        features, unet, table = self.build()
        latents, noise, t = torch.randn(3, 4, 10, 8), torch.randn(3, 4, 10, 8), torch.tensor([100, 500, 800])
        level, seen = table[t], []
        down = [block.attentions[0] for block in unet.down_blocks]
        for place in (*down, unet.mid_block, unet.up_blocks[0]):
            place.register_forward_hook(lambda *a: seen.append(a[2] if torch.is_tensor(a[2]) else a[2][0]))
        with torch.no_grad():
            found = features(latents, noise, level)
            seen.clear()
            sigma = level.exp().view(-1, 1, 1, 1)
            z = (latents + sigma * noise) / (1 + sigma**2).sqrt()
            unet(z, t, features.empty.expand(3, -1, -1))
        assert found.shape == (3, 24, 10, 8) and len(seen) == 4
        expected = torch.zeros(3, 24, 10, 8)
        first = 0
        for one in seen:
            one = one / one.square().mean(1, keepdim=True).sqrt()
            one = one.repeat_interleave(10 // one.shape[2], 2).repeat_interleave(8 // one.shape[3], 3)
            expected += torch.einsum("oc,nchw->nohw", features.mix[:, first : first + one.shape[1], 0, 0], one)
            first += one.shape[1]
        assert first == features.mix.shape[1]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

    def test_gradients_reach_the_latents_and_no_weight(self) -> None:
        features, unet, _ = self.build()
        latents = torch.randn(2, 4, 10, 8, requires_grad=True)
        features(latents, torch.randn(2, 4, 10, 8), torch.tensor([-1.0, 99.0])).square().sum().backward()
        assert latents.grad is not None and latents.grad[0].abs().min() > 0
        assert latents.grad[1].abs().max() < 0.1 * latents.grad[0].abs().max(), "the schedule's own end, almost noise"
        assert all(p.grad is None for p in unet.parameters())


def test_the_discriminator_judges_every_patch() -> None:
    """A changed position changes the patches' score as one of all positions, whatever the whole's vector says."""
    net = stirred(TextDiscriminator(4, widths=(16, 8), blocks=(1, 1), text_dim=12, embed_dim=16))
    torch.nn.init.zeros_(net.realism.weight)
    torch.nn.init.zeros_(net.match.weight)
    torch.nn.init.zeros_(net.match.bias)
    images, condition = torch.randn(2, 4, 10, 8), conditions(2)
    with torch.no_grad():
        scores = net(images, condition).scores[0]
        fine = [net.patches[0](net.levels[0](net.conv_in(images))).mean((1, 2, 3))]
        h = net.levels[0](net.conv_in(images))
        coarse = net.levels[1](net.downs[0](F.pixel_unshuffle(h, 2)))
        expected = fine[0] + net.patches[1](coarse).mean((1, 2, 3)) + net.realism.bias
    torch.testing.assert_close(scores, expected)


def test_the_drawing_half_draws_the_same_and_reads_no_image() -> None:
    torch.manual_seed(0)
    whole = ConditionalVae(channels=4, height=4, width=4, widths=(16, 8), blocks=(1, 2), latent_dim=2, text_dim=6)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(0, 0.1)
    half = drawing_half(whole)
    noise, condition, images = torch.randn(2, whole.noise_size), torch.randn(2, 3, 6), torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(half(noise, condition, 0.7).mean, whole(noise, condition, 0.7).mean, rtol=0, atol=0)
    assert {name.split(".")[0] for name in whole.state_dict()} - {name.split(".")[0] for name in half.state_dict()} == {
        "conv_in", "encoder", "downs",
    }  # fmt: skip
    assert not any("posterior" in name for name in half.state_dict())
    whole(noise, condition, images=images)
    with pytest.raises(CapabilityError, match="drawing half"):
        half(noise, condition, images=images)
