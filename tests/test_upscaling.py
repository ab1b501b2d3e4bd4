from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gigdiff
from gigdiff import api, pretrained, upscaling, xmp
from gigdiff.errors import InputError, ModelMismatchError, ModelNotFoundError
from gigdiff.models.upscaler import ProductUpscaler, deepened
from gigdiff.provenance import XMP_KEYWORD
from gigdiff.upscaling import Upscaler, load_upscaler


def noise(height: int, width: int, count: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def network(seed: int = 0) -> ProductUpscaler:
    torch.manual_seed(seed)
    net = ProductUpscaler(channels=8, blocks=2)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("upscaler")
    network(0).save_pretrained(root / "fidelity")
    network(1).save_pretrained(root / "sharp")
    (root / "gigdiff.json").write_text('{"family": "upscaler", "parameters": 1, "licence": "Apache-2.0", "scores": {}}')
    return root


def wrapped(net: ProductUpscaler, dtype: torch.dtype = torch.float32) -> Upscaler:
    return Upscaler(net, name="x", scale=4, reach=net.reach, device=torch.device("cpu"), dtype=dtype)


def test_before_training_it_is_bicubic_interpolation():
    net = ProductUpscaler(channels=8, blocks=1)
    x = torch.rand(1, 3, 10, 8) * 2 - 1
    with torch.no_grad():
        assert torch.equal(net(x), torch.nn.functional.interpolate(x, scale_factor=4, mode="bicubic"))


def test_the_embedded_size_is_cheap_enough():
    net = ProductUpscaler()
    assert net.flops_per_pixel * 80 * 64 < 10e9
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 16, 16))
    assert counter.get_total_flops() == net.flops_per_pixel * 256


@pytest.mark.parametrize("size", [(50, 40), (33, 70), (16, 16)])
def test_tiles_leave_no_seams(size: tuple[int, int]):
    upscaler = wrapped(network())
    whole, tiled = upscaler(noise(*size, 2), tile=1000).astype(int), upscaler(noise(*size, 2), tile=16).astype(int)
    assert whole.shape == (2, size[0] * 4, size[1] * 4, 3)
    assert np.abs(whole - tiled).max() <= 1 and (whole != tiled).mean() < 1e-3, "equal but for float32 rounding"


def test_the_reach_is_not_too_small():
    """A pixel just outside an output's reach does not matter, one inside does."""
    net, x = network().double(), torch.zeros(1, 3, 41, 41, dtype=torch.float64)
    with torch.no_grad():
        base = net(x)
        x[0, :, 20, 20] = 1
        changed = (net(x) != base).any(dim=1)[0].nonzero() // 4
    assert (changed - 20).abs().max() <= net.reach


def test_pictures_in_pictures_out(folder: Path, tmp_path: Path):
    Image.fromarray(noise(20, 16)[0]).save(tmp_path / "a.png")
    one = gigdiff.upscale(tmp_path / "a.png", model=folder, device="cpu")
    assert one.size == (64, 80) and one.info["edit"] == "upscale" and one.info["fidelity"] == "0.5"
    assert xmp.source_type(one.info[XMP_KEYWORD]) == xmp.COMPOSITE
    many = gigdiff.upscale([noise(20, 16)[0], Image.fromarray(noise(12, 9)[0])], model=folder, device="cpu")
    assert [image.size for image in many] == [(64, 80), (36, 48)] and many[0].tobytes() == one.tobytes()


def test_generate_enlarges(folder: Path, tiny_model: Path):
    plain = gigdiff.generate("red bag", model=tiny_model, seed=1, upscale=False)
    assert plain.size == (64, 80)
    large = gigdiff.generate("red bag", model=tiny_model, seed=1, upscale=str(folder), fidelity=0.2)
    assert large.size == (256, 320) and large.info["upscaler"] == str(folder) and large.info["fidelity"] == "0.2"
    assert "edit" not in large.info and xmp.source_type(large.info[XMP_KEYWORD]) == xmp.GENERATED
    later = gigdiff.upscale(plain, model=folder, fidelity=0.2)
    assert later.tobytes() == large.tobytes() and "edit" not in later.info


def test_the_embedded_upscaler_is_the_default_once_it_is_there(
    folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, painter
):
    monkeypatch.setattr(pretrained, "folder_of", lambda name: tmp_path / name)
    monkeypatch.setattr(upscaling, "folder_of", lambda name: tmp_path / name)
    upscaling.keep_upscaler.cache_clear()
    generator = gigdiff.load(tiny_model)
    assert api.choose_upscaler(None, None, generator) is None
    with pytest.raises(ModelNotFoundError, match="upscale=False"):
        api.choose_upscaler(True, None, generator)
    shutil.copytree(folder, tmp_path / "mini-upscaler")
    assert gigdiff.generate("red bag", model=generator).size == (256, 320)
    assert gigdiff.generate("red bag", model=generator, upscale=False).size == (64, 80)
    assert api.choose_upscaler(None, None, painter) is None, "not for what is not ours"
    upscaling.keep_upscaler.cache_clear()


def test_saved_and_drawn_again(folder: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from gigdiff.cli import main

    for name, extra in (
        ("a.png", ["--upscale", "--upscaler", str(folder)]),
        ("b.jpg", ["--watermark", "--no-upscale"]),
    ):
        made = [
            "generate",
            "red <bag>",
            "--model",
            str(tiny_model),
            "--seed",
            "4",
            "-o",
            str(tmp_path / name),
            "--quiet",
        ]
        assert main([*made, "--post", "pad:ratio=square", *extra]) == 0
        capsys.readouterr()
        assert main(["inspect", str(tmp_path / name), "--regenerate", str(tmp_path / f"again-{name}")]) == 0
        shown = capsys.readouterr().out
        assert "identical: all" in shown and "trainedAlgorithmicMedia" in shown and "red <bag>" in shown
    assert "found (" in shown and "320 x 320" not in shown


def test_mistakes(folder: Path, tmp_path: Path, tiny_model: Path):
    with pytest.raises(InputError, match="fidelity=2"):
        gigdiff.upscale(noise(8, 8)[0], model=folder, fidelity=2)
    with pytest.raises(ModelNotFoundError, match='no upscaler "mini-upscalr"; did you mean "mini-upscaler"'):
        load_upscaler("mini-upscalr")
    with pytest.raises(ModelMismatchError, match=r"only \.safetensors"):
        load_upscaler(tmp_path / "x.pth")
    with pytest.raises(ModelNotFoundError, match="no upscaler file"):
        load_upscaler(tmp_path / "x.safetensors")
    with pytest.raises(ModelNotFoundError, match="train_upscaler"):
        load_upscaler(tmp_path)
    with pytest.raises(ModelMismatchError):
        load_upscaler(tiny_model / "unet")
    with pytest.raises(InputError, match=r"fidelity=0.5 is about upscaling"):
        gigdiff.generate("bag", model=tiny_model, upscale=False, fidelity=0.5)


def test_spandrel_models(tmp_path: Path):
    """A Real-ESRGAN network of tiny size with random weights, as its authors' files are laid out."""
    spandrel = pytest.importorskip("spandrel", reason="spandrel is not installed: pip install 'gigdiff[upscalers]'")
    from safetensors.torch import save_file
    from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

    torch.manual_seed(0)
    save_file(
        {k: v.contiguous() for k, v in RRDBNet(num_filters=8, num_blocks=1, scale=4).state_dict().items()},
        tmp_path / "r.safetensors",
    )
    upscaler = load_upscaler(tmp_path / "r.safetensors", device="cpu")
    assert upscaler.scale == 4 and upscaler(noise(12, 10)).shape == (1, 48, 40, 3) and spandrel
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelMismatchError, match="no upscaler that spandrel knows"):
        load_upscaler(tmp_path / "w.safetensors")


def test_deeper_is_the_same_function_until_it_is_trained():
    torch.manual_seed(0)
    net = ProductUpscaler(channels=8, blocks=1)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.rand(2, 3, 12, 8) * 2 - 1
    deeper = deepened(net, 8, 3, 4)
    assert deeper.config["blocks"] == 3 and torch.equal(deeper(x), net(x))
    torch.nn.init.normal_(deeper.body[2].conv2.weight)
    assert not torch.equal(deeper(x), net(x))
    for shape in ((16, 3, 4), (8, 1, 4), (8, 3, 2)):
        with pytest.raises(ModelMismatchError, match="must be the same"):
            deepened(deeper, *shape)
