"""training/package_model.py: parts become a model folder with a card; parts of different models are refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gigdiff
from gigdiff.errors import InputError, ModelMismatchError, ModelNotFoundError
from gigdiff.generators import diffusion
from gigdiff.models.autoencoder import ProductAutoencoder

_spec = importlib.util.spec_from_file_location(
    "package_model", Path(__file__).parents[2] / "training" / "package_model.py"
)
assert _spec and _spec.loader
package_model = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = package_model  # dataclasses look their module up
_spec.loader.exec_module(package_model)


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Path:
    """A run folder as train_diffusion.py leaves it."""
    shutil.copytree(tiny_model, tmp_path / "run" / "model")
    return tmp_path / "run"


@pytest.fixture
def unet_file(run: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The weights of the run's UNet, where every embedded model is the tiny one that the run went on from."""
    for module in (package_model, diffusion):
        monkeypatch.setattr(module, "folder_of", lambda name: tiny_model)
    torch.manual_seed(0)
    return run / "model" / "unet" / "diffusion_pytorch_model.safetensors"


def report(folder: Path, prompts: str) -> Path:
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "count": 1000, "interval": "95%"}
    names = ("article_type_ratio", "colour_group_ratio", "frechet_ratio")
    content = {
        "prompts": prompts, "scores": dict.fromkeys(names, score), "controls": {"real_article_type": score},
        "settings": {"count": 1000},
    }  # fmt: skip
    file = folder / f"report-{prompts}.json"
    file.write_text(json.dumps(content))
    return file


def test_a_folder_with_card_scores_and_another_decoder(run: Path, tmp_path: Path) -> None:
    sharp = ProductAutoencoder.from_pretrained(run / "model" / "vae")
    with torch.no_grad():
        sharp.decoder.linear.bias += 0.5  # type: ignore[operator]
    sharp.save_pretrained(tmp_path / "sharp")
    reports = [str(report(tmp_path, prompts)) for prompts in ("names", "short")]
    out = tmp_path / "out"
    package_model.main([
        "--unet_run", str(run), "--vae", str(tmp_path / "sharp"), "--output_dir", str(out), "--guidance_scale", "3",
        "--num_inference_steps", "4", "--guidance_high", "10", "--reports", json.dumps(reports),
    ])  # fmt: skip
    card = json.loads((out / "gigdiff.json").read_text())
    assert card["scores"]["names: type / real"] == 0.5 and len(card["scores"]) == 6
    assert card["guidance_interval"] == [0.0, 10.0]
    text = (out / "README.md").read_text()
    assert "| names | article_type_ratio | 0.500 | 0.400 to 0.600 (95%) | 1000 |" in text
    model = gigdiff.load(str(out))
    assert model.capabilities.default_steps == 4 and model.capabilities.default_guidance == 3
    arguments = {"seed": 0, "num_inference_steps": 2, "guidance_scale": 1.0}
    before = gigdiff.generate("red coat", model=str(run / "model"), **arguments)  # type: ignore[call-overload]
    after = gigdiff.generate("red coat", model=model, **arguments)  # type: ignore[call-overload]
    assert np.asarray(after).mean() > np.asarray(before).mean() + 10  # the brighter decoder is the one in use


def test_another_encoder_is_refused(run: Path, tmp_path: Path) -> None:
    other = ProductAutoencoder.from_pretrained(run / "model" / "vae")
    with torch.no_grad():
        other.encoder.linear.bias += 0.5  # type: ignore[operator]
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelMismatchError, match="another encoder"):
        package_model.main(
            ["--unet_run", str(run), "--vae", str(tmp_path / "other"), "--output_dir", str(tmp_path / "o")]
        )
    assert not (tmp_path / "o").exists()


def test_a_run_that_went_on_from_an_embedded_model_is_stored_as_a_lora_on_it(
    run: Path, unet_file: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(unet_file)
    for name, tensor in tensors.items():  # by something of rank one, as fine-tuning might
        if name.endswith(("to_q.weight", "conv1.weight")):
            flat = tensor.flatten(1)
            change = torch.outer(torch.randn(flat.shape[0]), torch.randn(flat.shape[1])) / flat.shape[1] ** 0.5
            tensors[name] = tensor + change.view(tensor.shape).to(tensor)
    save_file(tensors, unet_file, metadata={"format": "pt"})
    out, asked = tmp_path / "out", {"seed": 0, "num_inference_steps": 2}
    package_model.main(["--unet_run", str(run), "--unet_of", "mini", "--rank", "1", "--output_dir", str(out)])
    assert [path.name for path in (out / "unet").iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert "a LoRA on the UNet of `mini`" in (out / "README.md").read_text()

    def drawn(folder: Path) -> np.ndarray:
        model = gigdiff.load(str(folder), device="cpu", dtype="float32")
        return np.asarray(gigdiff.generate("red coat", model=model, upscale=False, **asked)).astype(int)  # type: ignore[call-overload]

    assert abs(drawn(out) - drawn(run / "model")).max() <= 3
    assert abs(drawn(out) - drawn(tiny_model)).max() > 20
    with (
        monkeypatch.context() as patched,
        pytest.raises(InputError, match="is a LoRA on mini itself: give --unet_of mini"),
    ):
        patched.setattr(package_model, "folder_of", lambda name: out)
        package_model.main(["--unet_run", str(run), "--unet_of", "mini-turbo", "--output_dir", str(tmp_path / "o")])
    with pytest.raises(InputError, match="--unet_of nobody is no embedded model"):
        package_model.main(["--unet_run", str(run), "--unet_of", "nobody", "--output_dir", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()


def test_a_lora_at_part_of_its_strength_with_part_of_the_noise(
    run: Path, unet_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The stored UNet lies so far from the base's, and says of noise what the unscaled one says of less noise."""
    tensors = {k: v + 0.1 * torch.randn_like(v) if v.ndim > 1 else v for k, v in load_file(unet_file).items()}
    save_file(tensors, unet_file, metadata={"format": "pt"})
    drawn = {}
    for scale, truncation in ((1.0, 1.0), (0.25, 1.0), (0.25, 0.5)):
        out = tmp_path / f"{scale}-{truncation}"
        flags = ["--rank", "1000", "--lora_scale", str(scale), "--truncation", str(truncation)]
        steps = ["--num_inference_steps", "1", "--unet_of", "mini", "--output_dir", str(out)]
        package_model.main(["--unet_run", str(run), *flags, *steps])
        drawn[scale, truncation] = gigdiff.load(str(out), device="cpu", dtype="float32").unet  # type: ignore[attr-defined]
        card = json.loads((out / "gigdiff.json").read_text())
        assert card["lora_scale"] == scale and card.get("baked_truncation", 1.0) == truncation
    base = dict(gigdiff.load(str(tiny_model), device="cpu", dtype="float32").unet.named_parameters())  # type: ignore[attr-defined]
    whole, quarter = (dict(drawn[scale, 1.0].named_parameters()) for scale in (1.0, 0.25))
    for name, first in base.items():
        torch.testing.assert_close(quarter[name] - first, (whole[name] - first) / 4, rtol=0.02, atol=2e-3)
    unet = drawn[0.25, 1.0]
    z, t = torch.randn(2, unet.config.in_channels, 4, 4), torch.tensor([999, 999])
    text = torch.randn(2, 5, unet.config.cross_attention_dim)
    with torch.no_grad():
        half, plain = (drawn[0.25, t_](x, t, text).sample for t_, x in ((0.5, z), (1.0, z / 2)))
        assert (plain - unet(z, t, text).sample).abs().mean() > 0.02
    torch.testing.assert_close(half, plain, rtol=0.05, atol=5e-3)
    for flags, words in (
        (["--lora_scale", "0.5"], "give --unet_of and --rank too"),
        (["--truncation", "0.5", "--num_inference_steps", "4"], "is for a model of one step"),
    ):
        with pytest.raises(InputError, match=words):
            package_model.main(["--unet_run", str(run), *flags, "--output_dir", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()


def test_a_file_that_is_no_report_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match=r"x\.json is no report"):
        package_model.main(["--unet_run", str(run), "--reports", f"[{tmp_path / 'x.json'}]"])


def test_a_run_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"finished run of train_diffusion\.py"):
        package_model.main(["--unet_run", str(tmp_path), "--output_dir", str(tmp_path / "out")])
