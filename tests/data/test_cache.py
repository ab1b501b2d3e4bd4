"""The content-keyed cache: nothing encoded twice, nothing stale, nothing lost in a kill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gigdiff.data.cache import ContentStore, content_key, fill
from gigdiff.errors import OutputError


def encode_into(store: ContentStore, texts: list[str], calls: list[str]) -> int:
    def encode(chosen: list[int]) -> list[np.ndarray]:
        calls.extend(texts[i] for i in chosen)
        return [np.full((len(texts[i]), 2), len(texts[i]), np.float16) for i in chosen]

    return fill(store, [content_key(t) for t in texts], encode, batch_size=2, shard_size=3)


def test_items_of_any_length_come_back_and_nothing_is_encoded_twice(tmp_path: Path) -> None:
    calls: list[str] = []
    store = ContentStore(tmp_path, "texts", "abc")
    assert encode_into(store, ["a", "bbb", "cc", "a", "dddd"], calls) == 4
    assert sorted(calls) == ["a", "bbb", "cc", "dddd"]
    again = ContentStore(tmp_path, "texts", "abc")
    assert len(again) == 4
    assert again.get(content_key("bbb")).tolist() == [[3.0, 3.0]] * 3
    calls.clear()
    assert encode_into(again, ["bbb", "edited", "a"], calls) == 1 and calls == ["edited"]


def test_another_encoder_has_another_store(tmp_path: Path) -> None:
    encode_into(ContentStore(tmp_path, "texts", "abc"), ["a"], [])
    assert len(ContentStore(tmp_path, "texts", "abd")) == 0 == len(ContentStore(tmp_path, "latents", "abc"))


def test_keys_keep_their_parts_apart() -> None:
    assert content_key("ab", "c") != content_key("a", "bc") != content_key("abc")
    assert content_key(b"ab") == content_key("ab")


def test_a_half_written_shard_is_not_seen(tmp_path: Path) -> None:
    store = ContentStore(tmp_path, "texts", "abc")
    encode_into(store, ["a", "bb"], [])
    half = store.folder / ".shard-feed.tmp-1"
    half.mkdir()
    (half / "keys.npy").write_bytes(b"\x93NUMPY")
    assert len(ContentStore(tmp_path, "texts", "abc")) == 2


def test_two_processes_share_one_store(tmp_path: Path) -> None:
    one, two = (ContentStore(tmp_path, "texts", "abc") for _ in range(2))
    encode_into(one, ["a"], [])
    encode_into(two, ["bb"], [])
    one.refresh()
    assert content_key("bb") in one and content_key("a") in two and len(one) == 2


def test_a_full_disk_is_reported_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ContentStore(tmp_path, "texts", "abc")
    encode_into(store, ["a"], [])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OutputError, match="--cache_dir"):
            encode_into(store, ["bb"], [])
    assert len(ContentStore(tmp_path, "texts", "abc")) == 1
    assert [p.name for p in store.folder.glob(".*")] == []
