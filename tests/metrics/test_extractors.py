"""Inception, DINOv2 and CLIP: the real classes with random weights, small where a size can be chosen.

Inception's network is held against torch-fidelity's own where that package is found (it is not among the test
requirements, because it needs torchvision; put it on the path with: pip install --no-deps --target DIR torch-fidelity).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import torch

from gigdiff.errors import InputError, ModelMismatchError, ModelNotFoundError
from gigdiff.metrics.alignment import clip_score
from gigdiff.metrics.features import FeatureExtractor, load_extractor
from gigdiff.metrics.inception import BATCH_NORM_EPS, InceptionV3, fold, load_inception, resize_tensorflow1


def pictures(n=3, height=80, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


# ---- Inception -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw_inception():
    """torch-fidelity's state dict with random weights of a size that keeps activations alive."""
    generator = torch.Generator().manual_seed(0)
    net = InceptionV3()
    raw = {"fc.weight": net.fc.weight.detach(), "fc.bias": net.fc.bias.detach()}
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            weight = torch.randn(module.weight.shape, generator=generator)
            out = len(weight)
            raw[f"{name}.conv.weight"] = weight * (2.0 / weight[0].numel()) ** 0.5
            raw[f"{name}.bn.weight"] = torch.rand(out, generator=generator) + 0.5
            raw[f"{name}.bn.bias"] = torch.randn(out, generator=generator) * 0.1
            raw[f"{name}.bn.running_mean"] = torch.randn(out, generator=generator) * 0.1
            raw[f"{name}.bn.running_var"] = torch.rand(out, generator=generator) + 0.5
            raw[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    return raw


@pytest.fixture(scope="module")
def inception(raw_inception, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(raw_inception, path)
    return load_extractor(f"inception-v3:{path}")


def test_inception_follows_the_protocol(inception):
    assert isinstance(inception, FeatureExtractor)
    images = pictures(3)
    together = inception(images)
    assert together.shape == (3, 2048) and together.dtype == np.float32
    np.testing.assert_allclose(inception(images[1:2])[0], together[1], rtol=1e-3, atol=1e-4)
    assert inception.name.startswith("inception-v3-") and "not antialiased" in inception.resize


def test_inception_in_bfloat16_is_named_and_close(inception, raw_inception, tmp_path):
    torch.save(raw_inception, tmp_path / "weights.pth")
    half = load_inception(tmp_path / "weights.pth", dtype=torch.bfloat16)
    assert half.name == inception.name + "-bf16"
    full, fast = inception(pictures(2)), half(pictures(2))
    assert np.linalg.norm(fast - full) / np.linalg.norm(full) < 0.05


def test_inception_is_torch_fidelitys(raw_inception, inception, monkeypatch):
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("torch-fidelity is not on the path")
    package = types.ModuleType("torch_fidelity")  # its __init__ imports torchvision, its Inception does not need it
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: raw_inception)
    theirs = module.FeatureExtractorInceptionV3("theirs", ["2048"])
    for size in ((80, 64), (299, 299), (400, 310)):
        images = pictures(2, *size)
        with torch.inference_mode():
            wanted = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))[0].numpy()
        np.testing.assert_allclose(inception(images), wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


def test_folding_a_batch_norm_changes_nothing(raw_inception):
    net = InceptionV3()
    net.load_state_dict(fold(net, raw_inception))
    x = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    name = "Conv2d_1a_3x3"
    norm = [raw_inception[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    plain = torch.nn.functional.conv2d(x, raw_inception[f"{name}.conv.weight"], stride=2)
    wanted = torch.nn.functional.batch_norm(plain, *norm, eps=BATCH_NORM_EPS)
    torch.testing.assert_close(net.get_submodule(name)(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(299, 299), (7, 11), (160, 20)])
def test_the_resize_is_tensorflow_ones(size):
    """Its definition, pixel by pixel: no half-pixel shift, edges repeated."""
    image = pictures(1, 10, 8).astype(np.float64)[0, :, :, 0]
    wanted = np.empty(size)
    for y in range(size[0]):
        for x in range(size[1]):
            at_y, at_x = y * 10 / size[0], x * 8 / size[1]
            y0, x0 = int(at_y), int(at_x)
            y1, x1 = min(y0 + 1, 9), min(x0 + 1, 7)
            top = image[y0, x0] + (image[y0, x1] - image[y0, x0]) * (at_x - x0)
            low = image[y1, x0] + (image[y1, x1] - image[y1, x0]) * (at_x - x0)
            wanted[y, x] = top + (low - top) * (at_y - y0)
    ours = resize_tensorflow1(torch.from_numpy(image).float()[None, None], *size)[0, 0]
    np.testing.assert_allclose(ours.numpy(), wanted, atol=2e-3)


def test_inceptions_bad_weights(tmp_path, monkeypatch):
    with pytest.raises(ModelNotFoundError, match=r"no file .*missing\.pth.*torch-fidelity"):
        load_extractor(f"inception-v3:{tmp_path}/missing.pth")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ModelMismatchError, match="torch-fidelity's InceptionV3"):
        load_inception(tmp_path / "other.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ModelNotFoundError, match=r"no route to host.*--extractor"):
        load_inception()


# ---- DINOv2 and CLIP -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vision") / "tiny-dino"
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vision") / "tiny-clip"
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    text = {
        "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1,
        "max_position_embeddings": 20,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["dinov2", "clip"])
def test_transformers_extractors_follow_the_protocol(family, dino_folder, clip_folder):
    folder, dim, side = {"dinov2": (dino_folder, 16, 56), "clip": (clip_folder, 12, 32)}[family]
    extractor = load_extractor(f"{family}:{folder}")
    assert isinstance(extractor, FeatureExtractor)
    images = pictures(5)
    together = extractor(images)
    assert together.shape == (5, dim) == (5, extractor.dim) and together.dtype == np.float32
    np.testing.assert_allclose(extractor(images[3:4])[0], together[3], rtol=1e-3, atol=1e-4)
    assert extractor.name.startswith(f"{family}-tiny-") and extractor.name.endswith(f"-{side}")
    assert f"{side} x {side}" in extractor.resize
    wide = np.pad(images, ((0, 0), (0, 0), (8, 8), (0, 0)), constant_values=255)  # the padding that it adds itself
    np.testing.assert_allclose(extractor(wide), together, rtol=1e-4, atol=1e-5)


def test_other_weights_have_another_name(dino_folder, tmp_path):
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(dino_folder)
    model.layernorm.weight.data += 0.01
    model.save_pretrained(tmp_path / "tiny-dino")
    assert load_extractor(f"dinov2:{tmp_path}/tiny-dino").name != load_extractor(f"dinov2:{dino_folder}").name


def test_clip_score_is_clips_own_cosine_and_torchmetrics(clip_folder):
    clip = load_extractor(f"clip:{clip_folder}")
    images, prompts = pictures(4, 32, 32), ["red coat", "a blue bag", "hat", "white shoes for men and women"]
    ours = clip_score(clip, images, prompts)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255.0 - mean) / std
    tokens = clip.tokenizer(prompts, padding=True, truncation=True, max_length=20, return_tensors="pt")
    with torch.inference_mode():
        output = clip.model(**tokens, pixel_values=pixels)
    cosine = (output.logits_per_image / clip.model.logit_scale.exp()).diagonal().numpy()
    np.testing.assert_allclose(ours, 100 * np.maximum(cosine, 0), rtol=1e-4, atol=1e-4)

    functional = pytest.importorskip("torchmetrics.functional.multimodal", reason="pip install 'gigdiff[test]'")

    class Model:  # torchmetrics 1.9 expects the plain tensors that transformers gave before version 5
        config = clip.model.config

        def to(self, device):
            return self

        def get_image_features(self, pixels):
            return clip.model.get_image_features(pixels).pooler_output

        def get_text_features(self, ids, mask):
            return clip.model.get_text_features(ids, mask).pooler_output

    class Processor:
        def __call__(self, text=None, images=None, **kwargs):
            found = {} if images is None else {"pixel_values": (torch.stack(list(images)) / 255.0 - mean) / std}
            return found | ({} if text is None else dict(clip.tokenizer(text, padding=True, return_tensors="pt")))

    keep = [1, 2]  # those within the model's length
    theirs = functional.clip_score(
        torch.from_numpy(images[keep]).permute(0, 3, 1, 2), [prompts[i] for i in keep],
        model_name_or_path=lambda: (Model(), Processor()),
    )  # fmt: skip
    assert ours[keep].mean() == pytest.approx(float(theirs), rel=1e-4, abs=1e-3)


def test_bad_sources(dino_folder, clip_folder, tmp_path):
    with pytest.raises(ModelNotFoundError, match='--extractor "dinov2:'):
        load_extractor(f"dinov2:{tmp_path}/nothing")
    with pytest.raises((ModelMismatchError, ModelNotFoundError), match="dinov2"):
        load_extractor(f"clip:{dino_folder}")
    with pytest.raises(InputError, match="2 images and 1 prompts"):
        clip_score(load_extractor(f"clip:{clip_folder}"), pictures(2, 32, 32), ["hat"])
