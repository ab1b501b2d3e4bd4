"""train_gan.py and train_vae.py as users launch them: exact resume, every loss, the watch, text that matters."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gigdiff
from gigdiff.errors import GigdiffError, InputError, ModelMismatchError
from gigdiff.models.autoencoder import ProductAutoencoder

# Helpers beside this file; with pytest's importlib mode, conftest is no importable module.
_spec = importlib.util.spec_from_file_location("training_helpers", Path(__file__).with_name("conftest.py"))
assert _spec and _spec.loader
helpers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helpers)
ROOT, command, environment, logged, run = (
    helpers.ROOT, helpers.command, helpers.environment, helpers.logged, helpers.run,
)  # fmt: skip

SHARED = (
    "--train_batch_size", "4", "--captions_per_image", "2", "--report_to", "none", "--lr_warmup_steps", "2",
    "--mixed_precision", "no", "--validation_prompts", "[red handbag, blue watch]", "--preview_steps", "1000",
    "--discriminator_widths", "[16, 8]", "--discriminator_blocks", "[1, 1]", "--penalty_interval", "2",
)  # fmt: skip
GAN = (
    *SHARED, "--generator_widths", "[16, 8]", "--generator_blocks", "[1, 1]", "--noise_dim", "8", "--style_dim", "16",
)  # fmt: skip
VAE = (*SHARED, "--widths", "[16, 8]", "--blocks", "[1, 1]", "--latent_dim", "2")
KEYS = (
    "loss", "grad_norm", "discriminator_loss", "discriminator_grad_norm", "penalty", "contrast_real", "r_t", "r_v",
    "augment_probability", "diversity", "prompt_diversity", "distance", "validation_loss", "adversarial_loss",
    "correction",
)  # fmt: skip


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory, catalogue: Path) -> Path:
    """An untrained autoencoder that codes the catalogue's patches linearly, latents of unit variance."""
    from gigdiff.data import load_products
    from gigdiff.images import fit_image, to_model

    torch.manual_seed(0)
    vae = ProductAutoencoder(4, 8, 8, 8, 1, 1)
    pixels = np.stack([fit_image(r.image, 80, 64) for r in load_products(str(catalogue))])  # type: ignore[arg-type]
    vae.init_linear_from_patches(to_model(pixels))
    with torch.no_grad():
        raw = vae.encoder(to_model(pixels))
    vae.set_latent_statistics(raw.mean((0, 2, 3)), raw.std((0, 2, 3)))
    folder = tmp_path_factory.mktemp("autoencoder")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def flags(catalogue: Path, autoencoder: Path, cache: Path, out: Path, steps: int) -> list[str]:
    return [
        "--train_data_dir", str(catalogue), "--vae_name_or_path", str(autoencoder), "--cache_dir", str(cache),
        "--output_dir", str(out), "--max_train_steps", str(steps), "--validation_steps", "10",
        "--checkpointing_steps", "5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "sizes", "parts"),
    [
        (
            "train_gan.py",
            (*GAN, "--augment_images", "40", "--augment_target", "0.05", "--collapse_grace_steps", "1000"),
            ("generator", "ema", "optimizer", "discriminator", "discriminator_optimizer", "augmentation", "watch"),
        ),
        (
            "train_vae.py",
            (*VAE, "--adversarial_weight", "0.1"),
            ("model", "ema", "optimizer", "discriminator", "discriminator_optimizer"),
        ),
    ],
    ids=["gan", "vae-gan"],
)
def test_kill_nine_and_resume_gives_the_uninterrupted_run_bit_for_bit(
    script: str, sizes: tuple, parts: tuple, catalogue: Path, autoencoder: Path, cache: Path, tmp_path: Path
) -> None:
    """Losses, norms, augmentation, measurements and all weights and moments; then the saved model draws."""
    whole, killed, steps = tmp_path / "whole", tmp_path / "killed", 20
    run(script, *flags(catalogue, autoencoder, cache, whole, steps), *sizes, launch=True)
    helpers.killed_and_resumed(script, *flags(catalogue, autoencoder, cache, killed, steps), *sizes, out=killed)
    assert logged(killed, KEYS) == logged(whole, KEYS)
    assert [line["step"] for line in logged(whole)] == list(range(1, steps + 1))
    assert helpers.same_checkpoints(whole / f"checkpoint-{steps}", killed / f"checkpoint-{steps}", parts)
    if script == "train_gan.py":
        assert logged(whole, KEYS)[-1]["augment_probability"] > 0, "it was really augmented"
    image = gigdiff.generate("red handbag", model=str(whole / "model"), seed=1, upscale=False)
    assert image.size == (64, 80) and image.info["truncation"] == "1"  # type: ignore[union-attr]


@pytest.fixture
def main() -> Iterator[Callable[..., None]]:
    """Runs a script's main in this process, for what needs no process of its own: starting one takes longer."""
    from accelerate.state import AcceleratorState

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(script: str, *arguments: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        load_script(script).main(list(arguments))

    yield call
    AcceleratorState._reset_state(reset_partial_state=True)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "training" / name)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "choices",
    [
        ("--loss", "wgan_gp", "--penalty_weight", "10"),
        ("--loss", "hinge", "--penalty_method", "exact", "--generator", "conv"),
        ("--loss", "non_saturating", "--augment", "fixed", "--condition_on", "attributes", "--text_noise", "0"),
        (
            "--space", "pixel", "--augment_flip", "true", "--augment", "fixed", "--mixed_precision", "bf16",
            "--generator_widths", "[16, 8, 8]", "--generator_blocks", "[1, 1, 1]",
            "--discriminator_widths", "[16, 8, 8]", "--discriminator_blocks", "[1, 1, 1]",
        ),
    ],
    ids=["wgan_gp", "hinge", "non_saturating", "pixel"],
)  # fmt: skip
def test_every_loss_and_both_spaces_run(
    main: Callable[..., None], choices: tuple, catalogue: Path, autoencoder: Path, cache: Path, tmp_path: Path
) -> None:
    main("train_gan.py", *flags(catalogue, autoencoder, cache, tmp_path, 6), *GAN, *choices)
    log = logged(tmp_path, KEYS)
    assert len(log) == 6 and all(np.isfinite(line["loss"]) for line in log)
    assert [("penalty" in line) for line in log] == [True, False] * 3, "lazily"
    images = gigdiff.generate(["red handbag", "blue watch"], model=str(tmp_path / "model"), seed=1, upscale=False)
    assert images[0].size == (64, 80)  # type: ignore[index]


def test_a_diffusion_model_sees_for_the_discriminator_and_corrects_the_generator(
    main: Callable[..., None], catalogue: Path, tiny_model: Path, cache: Path, tmp_path: Path
) -> None:
    """Resumed from the middle it goes on bit for bit; the frozen UNet is not part of the checkpoint."""
    seeing = ("--discriminator", "diffusion", "--discriminator_model", str(tiny_model))
    choices = (*GAN, *seeing, "--distillation_weight", "1", "--distillation_model", str(tiny_model))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    main("train_gan.py", *flags(catalogue, tiny_model / "vae", cache, whole, 10), *choices)
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoint-10", "model"))
    again = [*flags(catalogue, tiny_model / "vae", cache, resumed, 10), *choices]
    main("train_gan.py", *again, "--resume_from_checkpoint", "latest")
    assert logged(whole, KEYS) == logged(resumed, KEYS) and logged(whole, KEYS)[-1]["correction"] > 0
    named = ("generator", "ema", "optimizer", "discriminator", "discriminator_optimizer")
    assert helpers.same_checkpoints(whole / "checkpoint-10", resumed / "checkpoint-10", named)
    kept = load_file(whole / "checkpoint-10" / "discriminator.safetensors")
    assert kept["conv_in.weight"].shape[1] == 4 + 256 and not any("down_blocks" in name for name in kept)
    image = gigdiff.generate("red handbag", model=str(whole / "model"), seed=1, upscale=False)
    assert image.size == (64, 80)  # type: ignore[union-attr]


def test_a_helping_model_on_other_latents_is_refused(
    main: Callable[..., None], catalogue: Path, autoencoder: Path, tiny_model: Path, cache: Path, tmp_path: Path
) -> None:
    for choices in (
        ("--discriminator", "diffusion", "--discriminator_model", str(tiny_model)),
        ("--distillation_weight", "1", "--distillation_model", str(tiny_model)),
    ):
        with pytest.raises(ModelMismatchError, match=f"{choices[-2]} .* draws other latents than --vae_name_or_path"):
            main("train_gan.py", *flags(catalogue, autoencoder, cache, tmp_path, 5), *GAN, *choices)


def test_the_vae_runs_on_pixels(
    main: Callable[..., None], catalogue: Path, cache: Path, autoencoder: Path, tmp_path: Path
) -> None:
    sizes = (*VAE, "--space", "pixel", "--widths", "[16, 8, 8]", "--blocks", "[1, 1, 1]")
    main("train_vae.py", *flags(catalogue, autoencoder, cache, tmp_path, 4), *sizes, "--mixed_precision", "bf16")
    assert np.isfinite(logged(tmp_path)[-1]["validation_loss"])
    image = gigdiff.generate("red handbag", model=str(tmp_path / "model"), seed=1, upscale=False)
    assert image.size == (64, 80)  # type: ignore[union-attr]


def test_a_checkpoint_of_another_discriminator_is_refused(
    main: Callable[..., None], catalogue: Path, autoencoder: Path, cache: Path, tmp_path: Path
) -> None:
    first = [*flags(catalogue, autoencoder, cache, tmp_path, 5), *GAN]
    main("train_gan.py", *first)
    with pytest.raises(ModelMismatchError, match="another discriminator"):
        main("train_gan.py", *first, "--discriminator_widths", "[8, 8]", "--resume_from_checkpoint", "latest")


def test_a_run_that_collapses_says_so(
    main: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
    catalogue: Path,
    autoencoder: Path,
    cache: Path,
    tmp_path: Path,
) -> None:
    """A generator that does not learn never gets any variety; the run ends when told to."""
    main(
        "train_gan.py", *flags(catalogue, autoencoder, cache, tmp_path, 40), *GAN, "--learning_rate", "0",
        "--collapse_grace_steps", "0", "--stop_on_collapse", "true",
    )  # fmt: skip
    said = capfd.readouterr().err
    assert "collapsed at step 20" in said and "collapsed and stopped at step 20" in said
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["collapsed"] == 1.0
    assert (tmp_path / "checkpoint-20").is_dir() and not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train_gan.py", [], "--train_data_dir"),
        ("train_gan.py", ["--los", "hinge"], 'did you mean "loss"'),
        (
            "train_gan.py",
            ["--train_data_dir", "x", "--augment_flip", "true"],
            "--augment_flip true needs --space pixel",
        ),
        ("train_gan.py", ["--train_data_dir", "x", "--mismatch_weight", "1"], "--mismatch_weight is 1"),
        (
            "train_gan.py",
            ["--train_data_dir", "x", "--discriminator", "diffusion", "--space", "pixel"],
            "--discriminator diffusion needs --space latent",
        ),
        (
            "train_gan.py",
            ["--train_data_dir", "x", "--distillation_weight", "1", "--space", "pixel"],
            "--distillation_weight needs --space latent",
        ),
        ("train_gan.py", ["--train_data_dir", "x", "--vae_name_or_path", "nowhere"], "no autoencoder in nowhere"),
        ("train_vae.py", ["--train_data_dir", "x", "--width", "60"], "--width=60 is not a multiple of 8"),
    ],
)
def test_bad_flags_say_what_is_wrong_in_one_line(
    main: Callable[..., None], script: str, arguments: list[str], message: str
) -> None:
    with pytest.raises(GigdiffError) as caught:
        main(script, *arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_starts_from_a_smaller_generator_of_another(
    main: Callable[..., None], catalogue: Path, autoencoder: Path, cache: Path, tmp_path: Path
) -> None:
    """A block more draws what was drawn before; what else differs is refused."""
    from gigdiff.models.gan import StyleGenerator

    small, large = tmp_path / "small", tmp_path / "large"
    main("train_gan.py", *flags(catalogue, autoencoder, cache, small, 5), *GAN)
    script, shape = sys.modules["train_gan"], (4, 10, 8, 1, (16, 8))
    before, after = (StyleGenerator(*shape, blocks, noise_dim=8, style_dim=16) for blocks in ((1, 1), (1, 2)))
    before.load_state_dict(before.state_dict() | load_file(small / "checkpoint-5" / "ema.safetensors"))

    class Critic:
        critic = torch.nn.Linear(1, 1)

    with pytest.raises(ModelMismatchError, match="of other networks"):
        script.start_from(str(small), after, Critic())
    more = ("--init_from", str(small), "--generator_blocks", "[1, 2]", "--learning_rate", "0")
    main("train_gan.py", *flags(catalogue, autoencoder, cache, large, 5), *GAN, *more)
    after.load_state_dict(after.state_dict() | load_file(large / "checkpoint-5" / "ema.safetensors"))
    noise, condition = torch.randn(2, after.noise_size), torch.randn(2, 5, 384)
    with torch.no_grad():
        assert torch.equal(after(noise, condition), before(noise[:, : before.noise_size], condition))
    model = ("--init_from", str(small / "model"), *more[2:])  # its generator alone, stored in half precision
    main("train_gan.py", *flags(catalogue, autoencoder, cache, tmp_path / "model", 5), *GAN, *model)
    loaded = load_file(tmp_path / "model" / "checkpoint-5" / "ema.safetensors")
    stored = load_file(small / "checkpoint-5" / "ema.safetensors")
    assert all(torch.equal(loaded[name], stored[name].half().float()) for name in stored)
    kept, start = (load_file(run / "checkpoint-5" / "discriminator.safetensors") for run in (large, small))
    assert not torch.equal(kept["embed.weight"], start["embed.weight"]), "the discriminator went on learning"
    with pytest.raises(ModelMismatchError, match="--init_from"):
        wider = ("--init_from", str(small), "--generator_widths", "[24, 8]")
        main("train_gan.py", *flags(catalogue, autoencoder, cache, tmp_path / "wider", 5), *GAN, *wider)
    with pytest.raises(InputError, match="no checkpoint there"):
        script.start_from(str(tmp_path / "nowhere"), after, Critic())


def test_a_wasserstein_critic_stays_bounded_by_default() -> None:
    """Mismatched texts are fakes that WGAN-GP's penalty has to reach too, and every step: taken every fourth step, and
    between photos and drawings only, scores went beyond 10^14 in 400 steps of configs/gan_wgan_gp.yaml."""
    from accelerate import Accelerator

    from gigdiff.fit.adversary import Adversary, AdversarySettings, View

    script = load_script("train_gan.py")
    view, accelerator = View(torch.ones(1, 4, 1, 1), None), Accelerator(cpu=True)
    torch.manual_seed(0)
    config = script.GanConfig(
        loss="wgan_gp", penalty_weight=10.0, discriminator_widths=(16, 16), discriminator_blocks=(1, 1), augment="none"
    )
    settings = AdversarySettings.of(config)
    assert settings.penalty_interval == 1
    assert AdversarySettings.of(dataclasses.replace(config, loss="hinge")).penalty_interval == 4
    adversary = Adversary(settings, view, size=(4, 4), fold=1, text_dim=12, accelerator=accelerator)
    adversary.prepare()
    texts, photos, fakes = torch.randn(16, 5, 12), torch.randn(16, 4, 4, 4), torch.randn(16, 4, 4, 4)
    greatest = 0.0
    for step in range(200):
        chances = adversary.chances(range(16 * step, 16 * (step + 1)), step, (4, 4, 4), texts)
        looks = adversary.look(photos, fakes, chances)
        greatest = max(greatest, abs(adversary.learn(looks, texts, chances, step, 3e-4)["discriminator_loss"]))
    print(greatest)
    assert greatest < 30


def test_both_players_learn_what_texts_mean() -> None:
    """Four kinds of coloured noise, each with its own text, and 200 steps of the scripts' adversary at toy size.

    Afterwards a swapped text or image lowers the discriminator's score, and what is drawn is nearest to its text's
    kind.
    """
    from accelerate import Accelerator

    from gigdiff.fit.adversary import Adversary, AdversarySettings, View
    from gigdiff.models.gan import StyleGenerator

    torch.manual_seed(0)
    texts, kinds = torch.randn(4, 5, 12), torch.randn(4, 4, 1, 1)
    generator = StyleGenerator(4, 4, 4, 1, (16, 16), (1, 1), 12, 8, 16)
    settings = AdversarySettings(
        seed=0, discriminator_widths=(16, 16), discriminator_blocks=(1, 1), discriminator_learning_rate=2e-3,
        penalty_weight=0.1, penalty_interval=4, penalty_noise=0.2, mismatch_weight=0.5, contrastive_weight=0.25,
        penalty_method="exact",
    )  # fmt: skip
    view, accelerator = View(torch.ones(1, 4, 1, 1), None), Accelerator(cpu=True)
    adversary = Adversary(settings, view, size=(4, 4), fold=1, text_dim=12, accelerator=accelerator)
    adversary.prepare()
    optimizer, net = torch.optim.Adam(generator.parameters(), 2e-3, betas=(0.0, 0.99)), adversary.critic

    def photos(which: torch.Tensor) -> torch.Tensor:
        return kinds[which] + 0.3 * torch.randn(len(which), 4, 4, 4)

    for step in range(200):
        which = torch.randint(0, 4, (16,))
        condition = texts[which]
        fakes = generator(torch.randn(16, generator.noise_size), condition)
        chances = adversary.chances(range(16 * step, 16 * (step + 1)), step, (4, 4, 4), condition)
        assert torch.equal(chances.same, which[:, None] == which[None])
        looks = adversary.look(photos(which), fakes, chances)
        values = adversary.learn(looks, condition, chances, step, 2e-3)
        assert ("penalty" in values) == (step % 4 == 0)
        loss, _ = adversary.judge(looks, condition, chances)
        optimizer.zero_grad()
        before = [p.grad for p in net.parameters()]
        loss.backward()
        assert all(p.grad is grad for p, grad in zip(net.parameters(), before, strict=True)), "it only judges"
        optimizer.step()

    which, other = torch.arange(4).repeat(8), (torch.arange(4).repeat(8) + 1) % 4
    with torch.no_grad():
        right = net(photos(which), texts[which]).scores[0]
        swapped_text = net(photos(which), texts[other]).scores[0]
        swapped_image = net(photos(other), texts[which]).scores[0]
        drawn = generator(torch.randn(32, generator.noise_size), texts[which]).mean((2, 3), keepdim=True)
    assert (right > swapped_text).float().mean() > 0.9 and (right > swapped_image).float().mean() > 0.9
    nearest = (drawn[:, None] - kinds[None]).square().flatten(2).sum(2).argmin(1)
    assert (nearest == which).float().mean() > 0.9
