"""training/package_one_pass.py: a run becomes a model folder with a card; and the table of the study of losses."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gigdiff
from gigdiff.errors import InputError, ModelMismatchError, ModelNotFoundError
from gigdiff.generators import shared_vae
from gigdiff.generators.one_pass import save_one_pass
from gigdiff.generators.shared_vae import latent_space_of
from gigdiff.models.autoencoder import ProductAutoencoder
from gigdiff.models.gan import StyleGenerator
from gigdiff.models.vae import ConditionalVae

ROOT = Path(__file__).parents[2]
READING = ("conv_in", "encoder", "downs")  # a VAE's parts that read images


def script(folder: str, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


package_model = script("training", "package_model")  # which the next one imports, as it does beside it
package = script("training", "package_one_pass")
study = script("benchmarks", "gan_losses")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as train_gan.py leaves it."""
    torch.manual_seed(0)
    vae = ProductAutoencoder(4, 8, 8, 8, 1, 1)
    card = {
        "family": "gan", "text_encoder": "minilm", "space": "latent", "latent_space": latent_space_of(vae),
        "height": 80, "width": 64, "truncation": 1.0, "parameters": 123_456, "trained_steps": 10, "trained_images": 320,
    }  # fmt: skip
    generator = StyleGenerator(4, 10, 8, 1, (16, 8), (1, 1), 384, 8, 16)
    save_one_pass(tmp_path / "run" / "model", generator, vae, card)
    return tmp_path / "run"


def report(folder: Path, prompts: str) -> Path:
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "count": 1000, "interval": "95%"}
    names = ("article_type_ratio", "colour_group_ratio", "frechet_ratio")
    content = {
        "prompts": prompts, "scores": dict.fromkeys(names, score), "controls": {}, "settings": {"count": 1000},
    }  # fmt: skip
    folder.mkdir(exist_ok=True, parents=True)
    (folder / f"report-{prompts}.json").write_text(json.dumps(content))
    return folder / f"report-{prompts}.json"


def test_a_folder_of_its_own_with_card_and_scores(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "small-gan"
    package.main([
        "--run", str(run), "--output_dir", str(out), "--truncation", "0.7",
        "--reports", json.dumps([str(report(tmp_path, "names"))]),
    ])  # fmt: skip
    about, text = json.loads((out / "gigdiff.json").read_text()), (out / "README.md").read_text()
    assert about["licence"] == "Apache-2.0" and about["scores"]["names: type / real"] == 0.5
    assert "style-based generator" in text and "truncation=0.7" in text and "320 images in 10 steps" in text
    image = gigdiff.generate("red coat", model=str(out), seed=0)
    assert image.info["truncation"] == "0.7"  # type: ignore[union-attr]


def test_a_vae_is_stored_without_what_only_training_needs(run: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = ConditionalVae(4, 10, 8, 1, (16, 8), (1, 1), 2)
    card = json.loads((run / "model" / "gigdiff.json").read_text()) | {"family": "vae"}
    shutil.rmtree(run / "model")
    vae = ProductAutoencoder(4, 8, 8, 8, 1, 1)
    save_one_pass(run / "model", whole, vae, card | {"latent_space": latent_space_of(vae)})
    out = tmp_path / "small-vae"
    package.main(["--run", str(run), "--output_dir", str(out)])
    stored = load_file(out / "generator" / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == {k for k in whole.state_dict() if "posterior" not in k and k.split(".")[0] not in READING}
    about = json.loads((out / "gigdiff.json").read_text())
    assert about["parameters"] < json.loads((run / "model" / "gigdiff.json").read_text())["parameters"]
    a, b = (gigdiff.generate("red coat", model=str(f), seed=0, upscale=False) for f in (out, run / "model"))
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))  # type: ignore[arg-type]


def test_it_shares_an_embedded_models_decoder_if_the_latents_are_the_same(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (package, shared_vae):
        monkeypatch.setattr(module, "folder_of", lambda name: tmp_path / "embedded" / name)
    vae = ProductAutoencoder.from_pretrained(run / "model" / "vae")
    vae.save_pretrained(tmp_path / "embedded" / "mini" / "vae")
    out = tmp_path / "out"
    arguments = ["--run", str(run), "--output_dir", str(out), "--shared_vae", "mini"]
    package.main(arguments)
    assert not (out / "vae").exists()
    drawn = [np.asarray(gigdiff.generate("coat", model=str(f), seed=0)) for f in (out, run / "model")]
    assert np.array_equal(*drawn)
    with torch.no_grad():
        vae.encoder.linear.bias += 0.5  # type: ignore[operator]
    vae.save_pretrained(tmp_path / "embedded" / "mini" / "vae")
    with pytest.raises(ModelMismatchError, match="not trained on the latents of mini"):
        package.main(arguments)


def test_what_does_not_fit_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="give --run the output_dir of a finished run"):
        package.main(["--run", str(tmp_path / "nothing")])
    with pytest.raises(InputError, match="--shared_vae nobody is no embedded model"):
        package.main(["--run", str(run), "--shared_vae", "nobody"])
    with pytest.raises(InputError, match="both given"):
        package.main(["--run", str(run), "--shared_vae", "mini", "--vae", "x"])


def test_the_study_collects_what_is_there_and_says_what_is_not(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "study"
    output.mkdir()
    run.rename(output / "relativistic-seed0")
    run = output / "relativistic-seed0"
    lines = [{"step": 5, "loss": 1.0}, {"step": 10, "diversity": 0.9, "prompt_diversity": 0.4, "collapsed": 0.0,
                                        "images_per_second": 87.25}, {"step": 11}]  # fmt: skip
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report(run / "quality", "names")
    assert study.main(["--collect_only", "--output", str(output), "--configs", "gan_relativistic", "gan_hinge"]) == 0
    text = (output / "study.md").read_text()
    assert "| gan_relativistic | 0 | names | 320 | 87.2 | no | 0.9 | 0.4 | 0.5 | not measured |" in text
    assert "| gan_hinge | 0 | not measured |" in text and "relativistic-seed0/quality/grid.png" in text


def test_a_collapsed_run_is_measured_at_its_best_state(run: Path) -> None:
    (run / "model").rename(run / "best")
    assert study.model_of(run) is None, "unfinished: best/ is on the way to something"
    (run / "log.jsonl").write_text(json.dumps({"step": 9, "diversity": 0.01, "collapsed": 1.0}))
    assert study.model_of(run) == run / "best"
