"""gigdiff lora convert | merge | extract | inspect, and several --lora of `generate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gigdiff
from gigdiff import lora
from gigdiff.cli import main
from gigdiff.errors import ModelMismatchError
from gigdiff.generators import diffusion
from gigdiff.generators.diffusion import DiffusionGenerator
from gigdiff.provenance import read


@pytest.fixture(scope="module")
def files(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    made = []
    for i in range(2):
        unet = DiffusionGenerator.from_pretrained(tiny_model).unet
        for p in lora.add_adapter(unet, lora.LoraSettings(rank=2, lora_alpha=1), "made").values():
            torch.nn.init.normal_(p, std=0.3)
        about = {"base_model": "tiny", "family": "mini", "config": {"learning_rate": 0.1}}
        header = lora.lora_header(lora.adapter_configs({"unet": unet}, "made"), about)
        made.append(lora.save_lora(folder / f"{i}.safetensors", lora.lora_tensors({"unet": unet}, "made"), header))
    return made


def test_convert_there_and_back(files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kohya, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    assert main(["lora", "convert", str(files[0]), str(kohya)]) == 0
    assert str(kohya) in capsys.readouterr().out
    assert all(key.startswith("lora_unet_") for key in load_file(kohya))
    assert main(["lora", "convert", str(kohya), str(back)]) == 0
    one, two = load_file(files[0]), load_file(back)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert main(["lora", "convert", str(kohya), str(back)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["lora", "convert", str(kohya), str(back), "--overwrite", "--to", "koya"]) == 1
    assert 'did you mean "kohya"' in capsys.readouterr().err


def test_inspect_says_what_people_ask(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lora", "inspect", str(files[0])]) == 0
    out = capsys.readouterr().out
    assert "rank 2  alpha 1" in out and "base model  tiny" in out and "learning_rate  0.1" in out and "to_q" in out
    assert main(["lora", "inspect", str(files[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"]["unet"]["ranks"] == [2]
    assert main(["lora", "inspect", "nowhere.safetensors"]) == 1
    assert "no such file" in capsys.readouterr().err


def test_merge_and_draw(
    files: list[Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "merged"
    words = ["lora", "merge", "-m", str(tiny_model), "--lora", str(files[0]), "--lora_scale", "0.5", "-o", str(merged)]
    assert main(words) == 0
    assert str(merged) in capsys.readouterr().out
    assert json.loads((merged / "gigdiff.json").read_text())["merged_scales"] == [0.5]
    out = tmp_path / "coat.png"
    words = ["generate", "coat", "-m", str(tiny_model), "--seed", "1", "--steps", "1", "-o", str(out), "--quiet"]
    assert (
        main([*words, "--lora", str(files[0]), "--lora", str(files[1]), "--lora_scale", "1", "--lora_scale", "0.5"])
        == 0
    )
    assert read(out)["lora"] == f"{files[0]} at 1\n{files[1]} at 0.5"


def drawn(model: Path, **more: str) -> np.ndarray:
    generator = gigdiff.load(str(model), device="cpu", dtype="float32")
    return np.asarray(gigdiff.generate("red coat", model=generator, seed=2, upscale=False, **more)).astype(int)  # type: ignore[arg-type]


def test_what_was_merged_is_extracted_again(
    files: list[Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged, file = tmp_path / "merged", tmp_path / "extracted.safetensors"
    lora.merge(str(tiny_model), [str(files[0])], [1.0], merged, dtype="float32")
    assert main(["lora", "extract", "-m", str(merged), "--base", str(tiny_model), "--rank", "2", "-o", str(file)]) == 0
    assert "holds 100.0%" in capsys.readouterr().out
    found = lora.read_lora(file)
    assert set(found.modules("unet")) == set(lora.read_lora(files[0]).modules("unet"))
    assert abs(drawn(tiny_model, lora=str(file)) - drawn(merged)).max() <= 1
    assert abs(drawn(tiny_model) - drawn(merged)).max() > 20, "the LoRA does something"
    _, share = lora.extract(merged, tiny_model, tmp_path / "less.safetensors", 1)
    assert 0.3 < share < 0.99
    with pytest.raises(ModelMismatchError, match="nothing to extract"):
        lora.extract(tiny_model, tiny_model, tmp_path / "none.safetensors", 1)
    with pytest.raises(ModelMismatchError, match="mini-gan is no diffusion model"):
        lora.extract("mini-gan", tiny_model, tmp_path / "none.safetensors", 1)
    assert main(["lora", "extract", "-m", str(merged), "--base", str(tiny_model), "--rank", "0", "-o", str(file)]) == 1
    assert "--rank 0" in capsys.readouterr().err


def test_a_model_may_be_a_lora_on_another_ones_unet(
    files: list[Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, merged, folder = (tmp_path / name for name in ("mini", "merged", "folder"))
    shutil.copytree(tiny_model, base)
    monkeypatch.setattr(diffusion, "folder_of", lambda name: tmp_path / name)
    lora.merge(str(base), [str(files[0])], [1.0], merged, dtype="float32")
    shutil.copytree(base, folder)
    shutil.rmtree(folder / "unet")
    (folder / "gigdiff.json").write_text(
        json.dumps(json.loads((base / "gigdiff.json").read_text()) | {"unet_of": "mini"})
    )
    lora.extract(merged, base, folder / "unet" / lora.WEIGHTS_NAME, 2)
    assert abs(drawn(folder) - drawn(merged)).max() <= 1

    tensors = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    lora.save_lora(base / "unet" / "diffusion_pytorch_model.safetensors", {k: v + 1 for k, v in tensors.items()}, {})
    lora.base_hash.cache_clear()
    with pytest.raises(ModelMismatchError, match=r'a LoRA on other weights .* than those of "mini"'):
        drawn(folder)
    lora.base_hash.cache_clear()
