"""Differentiable augmentation and its adaptive strength; the watch for collapse."""

from __future__ import annotations

import math

import pytest
import torch

from gigdiff.fit.augmentation import DRAWS, AdaptiveStrength, augment
from gigdiff.fit.collapse import CollapseWatch, Variety, coarse_frechet, measure_variety, overfitting_ratio
from gigdiff.models.gan import StyleGenerator

NOTHING = {"shift": 0.0, "cutout": 0.0, "flip": False}


def draws(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, DRAWS, generator=torch.Generator().manual_seed(seed))


def pictures(count: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, 16, 8, generator=torch.Generator().manual_seed(1))


class TestAugment:
    def test_probability_zero_changes_nothing(self):
        images = pictures()
        assert augment(images, draws(64), 0.0, shift=0.2, cutout=0.5, flip=True) is images

    def test_a_shift_moves_by_whole_places_and_repeats_the_edge(self):
        images, chosen = pictures(1), draws(1)
        chosen[0, :3] = torch.tensor([0.0, 0.999, 0.0])  # shifted: two rows up, one column right
        moved = augment(images, chosen, 0.5, **{**NOTHING, "shift": 0.125})
        expected = torch.cat([images[:, :, 2:], images[:, :, -1:], images[:, :, -1:]], 2)
        expected = torch.cat([expected[..., :1], expected[..., :-1]], 3)
        assert torch.equal(moved, expected)

    def test_cutout_blanks_a_stretch_of_that_size(self):
        chosen = draws(1)
        chosen[0, 3:6] = torch.tensor([0.0, 0.5, 0.5])
        cut = augment(torch.ones(1, 1, 16, 8), chosen, 0.5, **{**NOTHING, "cutout": 0.5})
        assert (cut == 0).sum() == 8 * 4 and (cut[0, 0, 4:12, 2:6] == 0).all()

    def test_half_of_what_is_chosen_is_mirrored(self):
        images = pictures(2000)
        flipped = augment(images, draws(2000), 0.8, **{**NOTHING, "flip": True})
        mirrored = (flipped == images.flip(3)).flatten(1).all(1)
        assert ((flipped == images).flatten(1).all(1) | mirrored).all()
        assert mirrored.float().mean().item() == pytest.approx(0.4, abs=0.04)

    def test_each_transform_is_used_as_often_as_asked_for(self):
        images = pictures(2000)
        moved = augment(images, draws(2000), 0.3, **{**NOTHING, "shift": 0.25})
        share = (moved != images).flatten(1).any(1).float().mean().item()
        assert share == pytest.approx(0.3 * (1 - 1 / 9 / 5), abs=0.04)  # of 9 x 5 shifts one is none

    def test_the_same_alone_and_in_a_batch_and_gradients_pass(self):
        images, chosen = pictures().requires_grad_(), draws(64)
        arguments = {"shift": 0.2, "cutout": 0.3, "flip": True}
        together = augment(images, chosen, 0.8, **arguments)
        assert torch.equal(together[7:8], augment(images[7:8], chosen[7:8], 0.8, **arguments))
        together.sum().backward()
        assert images.grad is not None and images.grad.sum() == pytest.approx((together != 0).sum().item(), rel=1e-4)


class TestAdaptiveStrength:
    def test_it_grows_while_the_discriminator_is_sure_and_falls_when_it_is_not(self):
        strength = AdaptiveStrength(target=0.6, images_to_full=1000)
        for _ in range(100):
            strength.see(1.0, 20)
        sure = strength.probability
        assert sure == pytest.approx(0.8)  # it stops where transforms would leak
        for _ in range(100):
            strength.see(0.0, 20)
        assert strength.probability == 0.0

    def test_its_state_is_kept_to_the_last_bit(self):
        strength, again = (AdaptiveStrength(0.6, 777) for _ in range(2))
        for i in range(50):
            strength.see(math.sin(i) * 0.2 + 0.7, 13)
        again.load(strength.tensors())
        assert (again.probability, again.overfitting) == (strength.probability, strength.overfitting)


class TestVariety:
    def test_photos_against_photos_and_one_picture_for_all(self):
        reals, others = pictures(400)[:200], pictures(400)[200:]
        variety = measure_variety(others, reals.view(20, 10, *reals.shape[1:]), reals)
        assert variety.diversity == pytest.approx(1.0, abs=0.05)
        assert variety.prompt_diversity == pytest.approx(1.0, abs=0.05)
        one = reals.mean(0, keepdim=True).expand(200, -1, -1, -1)
        collapsed = measure_variety(one, one.reshape(20, 10, *reals.shape[1:]), reals)
        assert collapsed.diversity == pytest.approx(0, abs=1e-9) == collapsed.prompt_diversity
        assert variety.distance < collapsed.distance == pytest.approx(1.0, rel=0.01)

    def test_the_distance_sees_a_shift_of_the_mean(self):
        reals = pictures(200)
        expected = 240 / 240  # features are averages; every one moves by one
        moved = coarse_frechet(reals + 1, reals) * reals.var(0).sum().item()
        assert coarse_frechet(reals, reals) < 1e-6 and moved > expected

    def test_overfitting_ratio(self):
        on_train, on_fakes = torch.tensor([3.0, 5.0]), torch.tensor([-1.0, 1.0])
        assert overfitting_ratio(on_train, torch.tensor([4.0]), on_fakes) == 0
        assert overfitting_ratio(on_train, torch.tensor([0.0]), on_fakes) == 1
        assert overfitting_ratio(on_train, on_train, on_train) == 0


class TestWatch:
    def test_a_collapsed_generator_trips_it_and_a_varied_one_does_not(self):
        """Real networks: one that has learned to ignore noise and text, and one that has not."""
        torch.manual_seed(0)
        varied = StyleGenerator(4, 10, 8, 1, (16, 8), (1, 1), 12, 8, 16)
        with torch.no_grad():
            for p in varied.parameters():
                p.add_(0.2 * torch.randn(p.shape))
            for block in (b for level in varied.levels for b in level):  # type: ignore[union-attr]
                block.noise_strength.fill_(3.0)
                block.gain.fill_(1.0)
        collapsed = StyleGenerator(4, 10, 8, 1, (16, 8), (1, 1), 12, 8, 16)
        collapsed.load_state_dict(varied.state_dict())
        with torch.no_grad():
            for block in (b for level in collapsed.levels for b in level):  # type: ignore[union-attr]
                block.gain.zero_()
            for attention in collapsed.attentions:
                attention.out.weight.zero_()  # type: ignore[union-attr, operator]
        noise, condition = torch.randn(80, varied.noise_size), torch.randn(80, 5, 12)
        with torch.no_grad():
            reals = varied(torch.randn_like(noise), torch.randn_like(condition))
            found = []
            for net in (varied, collapsed):
                same = net(noise, condition[:10].repeat_interleave(8, 0)).unflatten(0, (10, 8))
                found.append(measure_variety(net(noise, condition), same, reals))
        watch = CollapseWatch(0.3, 0.02, patience=2)
        assert watch.see(100, found[0]) and not watch.collapsed
        assert not watch.see(200, found[1]) and not watch.collapsed, "one bad measurement may be chance"
        assert not watch.see(300, found[1]) and watch.collapsed
        text = watch.message(300, found[1])
        assert "collapsed at step 300" in text and "best state is of step 100" in text and "--penalty_weight" in text
        assert not watch.see(400, found[0]) and not watch.collapsed, "it recovered"

    def test_grace_best_and_state(self):
        watch = CollapseWatch(0.3, 0.02, patience=1, grace_steps=50)
        watch.see(50, Variety(0.0, 0.0, 2.0))
        assert not watch.collapsed and watch.best_step == 0
        assert watch.see(60, Variety(0.9, 0.5, 1.0)) and not watch.see(70, Variety(0.9, 0.5, 1.5))
        watch.see(80, Variety(0.9, 0.01, 0.5))
        assert watch.collapsed and watch.best_step == 60, "noise without effect within a prompt is collapse too"
        again = CollapseWatch(0.3, 0.02, patience=1)
        again.load(watch.tensors())
        assert (again.best_distance, again.best_step, again.collapsed) == (1.0, 60, True)
