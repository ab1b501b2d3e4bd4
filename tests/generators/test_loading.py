"""Everything about loading that can be told before weights are read; the rest is in test_end_to_end.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gigdiff.errors import InputError, ModelMismatchError, ModelNotFoundError
from gigdiff.generators import loading
from gigdiff.generators.loading import check_folder, load, pick_device, pick_dtype, resolve


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline folder with all its files, of no architecture that exists."""
    folder = tmp_path / "model"
    index = {
        "_class_name": "SomePipeline",
        "_diffusers_version": "0.42.1",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    for part in ("unet", "vae", "scheduler"):
        (folder / part).mkdir(parents=True)
    for part in ("unet", "vae"):
        save_file({"w": torch.zeros(2)}, folder / part / "diffusion_pytorch_model.safetensors")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


class TestNames:
    @pytest.mark.parametrize("name", ["mimi", "minni", "Mini"])
    def test_nearest_match(self, name):
        with pytest.raises(ModelNotFoundError, match='did you mean "mini"') as caught:
            load(name)
        assert isinstance(caught.value, FileNotFoundError)

    def test_far_off_names_get_the_whole_list(self):
        with pytest.raises(ModelNotFoundError, match=r"Known: .*mini"):
            load("zzzzzz")

    @pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/no/such/folder", "a/b/c", "x" * 5000, "a\0b"])
    def test_paths_that_are_not_there(self, name):
        with pytest.raises(ModelNotFoundError, match="there is no"):
            load(name)

    @pytest.mark.parametrize("name", ["", "  ", None, 3])
    def test_not_a_name(self, name):
        with pytest.raises(InputError, match="model is"):
            load(name)

    def test_a_single_file_checkpoint(self, tmp_path):
        (tmp_path / "v1-5.safetensors").write_bytes(b"x")
        with pytest.raises(ModelMismatchError, match="from_single_file"):
            load(tmp_path / "v1-5.safetensors")

    def test_hub_id_offline_and_not_cached(self, offline):
        with pytest.raises(ModelNotFoundError, match=r"(?s)gigdiff-tests/nothing.*HF_HUB_OFFLINE is set.*mini"):
            load("gigdiff-tests/nothing")

    def test_an_embedded_name_wins_over_a_folder_of_that_name(self, tmp_path, monkeypatch):
        (tmp_path / "mini").mkdir()
        monkeypatch.chdir(tmp_path)
        assert resolve("mini")[0] != Path("mini")
        assert resolve("./mini") == (Path("mini"), "./mini")


class TestFolders:
    def test_a_whole_folder_passes(self, folder):
        assert check_folder(folder, "x")["_class_name"] == "SomePipeline"

    def test_missing_weights_are_named_with_the_remedy(self, folder):
        (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(
            ModelNotFoundError, match=r"missing the weights of its vae, .*vae.*safetensors: copy or save"
        ):
            load(folder)

    def test_missing_weights_of_an_embedded_model(self, folder, monkeypatch):
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        monkeypatch.setattr(loading, "folder_of", lambda name: folder)
        with pytest.raises(ModelNotFoundError, match=r"\"mini\" is missing the weights of its unet.*reinstall gigdiff"):
            load("mini")

    def test_missing_scheduler(self, folder):
        (folder / "scheduler").rmdir()
        with pytest.raises(ModelNotFoundError, match="missing its scheduler"):
            load(folder)

    def test_empty_folder(self, tmp_path):
        with pytest.raises(ModelNotFoundError, match=r"missing .*model_index\.json"):
            load(tmp_path)

    def test_git_lfs_pointer(self, folder):
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
        (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(pointer)
        with pytest.raises(ModelNotFoundError, match="git lfs pull"):
            load(folder)

    def test_pickled_weights_are_not_loaded(self, folder):
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
        with pytest.raises(ModelMismatchError, match="only safetensors are read"):
            load(folder)

    def test_code_in_the_folder_is_not_run(self, folder):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "Evil"]}))
        with pytest.raises(ModelMismatchError, match="does not run"):
            load(folder)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", "3"])
    def test_broken_index(self, folder, text):
        (folder / "model_index.json").write_text(text)
        with pytest.raises(ModelMismatchError, match="not a diffusers model index"):
            load(folder)

    def test_a_lora_is_recognised(self, tmp_path):
        save_file({"w": torch.zeros(2)}, tmp_path / "pytorch_lora_weights.safetensors")
        with pytest.raises(ModelMismatchError, match=r"a LoRA.*--lora"):
            load(tmp_path)

    def test_a_single_component_is_recognised(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
        with pytest.raises(ModelMismatchError, match="a single AutoencoderKL"):
            load(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"architectures": ["CLIPModel"]}))
        with pytest.raises(ModelMismatchError, match="a single CLIPModel"):
            load(tmp_path)

    def test_a_run_folder_points_to_the_model_in_it(self, folder):
        with pytest.raises(ModelMismatchError, match=r"holds a model in .*model"):
            load(folder.parent)


class TestDevice:
    def test_default_is_usable(self):
        torch.zeros(1, device=pick_device())

    @pytest.mark.parametrize("device", ["gpu", "", 3.5, "cpu:x"])
    def test_unknown(self, device):
        with pytest.raises(InputError, match=r"usable here: .*cpu"):
            pick_device(device)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_not_here(self):
        with pytest.raises(InputError, match=r"device='cuda' is not usable here; usable are: .*cpu"):
            pick_device("cuda")

    def test_dtypes(self):
        cpu = torch.device("cpu")
        assert pick_dtype(None, cpu) is torch.float32
        assert pick_dtype("bfloat16", cpu) is pick_dtype(torch.bfloat16, cpu) is torch.bfloat16
        with pytest.raises(InputError, match='did you mean "float16"'):
            pick_dtype("fp16", cpu)

    def test_attention(self):
        with pytest.raises(InputError, match='did you mean "sdpa"'):
            load("mini", attention="spda")


def test_what_can_be_compiled():
    with pytest.raises(
        InputError, match='backend="compile" is for diffusion models, and "mini-gan" is of family "gan"'
    ):
        load("mini-gan", backend="compile")
    with pytest.raises(InputError, match="did you mean"):
        load("mini", backend="compiled")
