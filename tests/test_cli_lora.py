"""gigdiff lora convert | merge | inspect, and several --lora of `generate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gigdiff import lora
from gigdiff.cli import main
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
