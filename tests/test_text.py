"""The text encoders: MiniLM against sentence-transformers, CLIP and T5 at tiny size, and nothing cut in silence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gigdiff.errors import InputError, ModelMismatchError, ModelNotFoundError
from gigdiff.text import MINILM_SHA256, TextEncoder, find_minilm, load_text_encoder


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return load_text_encoder("minilm")


def test_pooled_vectors_are_those_of_sentence_transformers(minilm: TextEncoder) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["red wool coat", "Turtle Check Men Navy Blue Shirt", "spectacles"]
    expected = SentenceTransformer(str(find_minilm()[0]), device="cpu").encode(texts)
    np.testing.assert_allclose(minilm.encode(texts).pooled.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_meaning_is_in_the_vectors(minilm: TextEncoder) -> None:
    pooled = minilm.encode(["sneakers", "running shoes", "wool scarf"]).pooled
    assert pooled[0] @ pooled[1] > pooled[0] @ pooled[2] + 0.1


def test_shapes_mask_and_zero_padding(minilm: TextEncoder) -> None:
    embedding = minilm.encode(["red coat", ""])
    assert embedding.tokens.shape == (2, 32, 384) and embedding.mask.shape == (2, 32)
    assert embedding.mask.sum(1).tolist() == [4, 2]  # [CLS] red coat [SEP]
    assert embedding.tokens[~embedding.mask].abs().max() == 0
    condition = embedding.condition()
    assert condition.shape == (2, 33, 384)
    assert condition[:, 0].square().mean(-1).tolist() == pytest.approx([1.0, 1.0], rel=1e-4)
    assert embedding.cut == ("", "")


def test_a_text_read_alone_is_the_one_read_with_padding(minilm: TextEncoder) -> None:
    for text in ("", "red wool coat", "word " * 100):
        alone, padded = minilm.encode_alone(text), minilm.encode([text, "a much longer text beside it"])
        assert alone.tokens.shape == (1, 32, 384) and alone.cut == padded.cut[:1]
        assert torch.equal(alone.mask, padded.mask[:1])
        for part in ("tokens", "pooled"):
            torch.testing.assert_close(getattr(alone, part), getattr(padded, part)[:1], rtol=1e-4, atol=1e-5)
        assert not alone.condition()[:, 1:][~alone.mask].any()


def test_long_descriptions_are_condensed_and_what_was_left_out_is_reported(minilm: TextEncoder) -> None:
    text = (
        "This piece was designed by our team in a small studio near the harbour, where every detail is considered with "
        "patience over many months. Delivery takes three days and returns are free of charge within a month. "
        "It is a red wool coat for women with a long belt. Dry clean only, please do not tumble dry."
    )
    embedding = minilm.encode([text])
    kept, left_out = minilm.fit(text)
    assert "red" in kept and "wool" in kept and "coat" in kept
    assert minilm.count(kept) <= 32
    assert "Delivery" in left_out and embedding.cut == (left_out,)
    similar = embedding.pooled @ minilm.encode(["red wool coat for women"]).pooled.T
    assert similar.item() > 0.6


def test_ten_thousand_characters_are_accepted_and_reported(minilm: TextEncoder) -> None:
    embedding = minilm.encode(["blue denim jeans " + "very nice indeed " * 600])
    assert embedding.cut[0] != ""


def test_one_endless_word_is_an_error(minilm: TextEncoder) -> None:
    with pytest.raises(InputError, match="32 tokens"):
        minilm.encode(["x-" * 50])


def test_changed_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gigdiff import text

    folder, _ = find_minilm()
    for file in folder.iterdir():
        if file.is_file() and file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    monkeypatch.setattr(text, "find_minilm", lambda: (tmp_path, "test"))
    with pytest.raises(ModelMismatchError, match=MINILM_SHA256):
        load_text_encoder("minilm", max_length=31)  # another length: past the cache of loaded encoders


def test_clip_and_t5_load_by_the_same_interface(tmp_path: Path) -> None:
    from transformers import (
        BertTokenizerFast,
        CLIPTextConfig,
        CLIPTextModel,
        T5Config,
        T5EncoderModel,
    )

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "wool", "coat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=7, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            eos_token_id=3, bos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    t5 = T5EncoderModel(T5Config(vocab_size=7, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    for name, model in (("clip", clip), ("t5", t5)):
        folder = tmp_path / name
        model.save_pretrained(folder)
        BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=12).save_pretrained(folder)
        encoder = load_text_encoder(str(folder))
        embedding = encoder.encode(["red wool coat", "coat"])
        assert embedding.tokens.shape == (2, 12, 16)
        assert embedding.mask.sum(1).tolist() == [5, 3]
        assert torch.isfinite(embedding.pooled).all() and embedding.pooled.shape == (2, 16)
        assert encoder.fingerprint != load_text_encoder("minilm").fingerprint


def test_unknown_encoders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="minilm"):
        load_text_encoder(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises((ModelMismatchError, ModelNotFoundError)):
        load_text_encoder(str(tmp_path))
