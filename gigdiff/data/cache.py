"""Latents and text embeddings on disk, keyed by content.

A key is a hash of everything that decides the value: the encoded photo's bytes, the size it is brought to, the
encoder's weights. So an edited photo, another size or another encoder is noticed, and nothing is ever encoded twice.

    <folder>/<kind>-<fingerprint>/shard-<hash>/{keys,starts,values}.npy

A shard is written under a temporary name and renamed; a kill leaves no half shard. Values are memory-mapped.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from gigdiff.errors import OutputError

__all__ = ["ContentStore", "content_key", "fill"]

KEY_BYTES = 16


def content_key(*parts: bytes | str) -> bytes:
    """16 bytes that stand for `parts`; no two different lists of parts collide in practice."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


class ContentStore:
    """Arrays by key. An item is (m, ...) with its own m; all items of a store share dtype and the other dimensions."""

    def __init__(self, folder: str | Path, kind: str, fingerprint: str) -> None:
        self.folder = Path(folder) / f"{kind}-{fingerprint}"
        self._where: dict[bytes, tuple[int, int, int]] = {}
        self._values: list[np.ndarray] = []
        self._read: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Read shards that other processes have written since."""
        for shard in sorted(self.folder.glob("shard-*")):
            if shard.name in self._read:
                continue
            keys = np.load(shard / "keys.npy")
            starts = np.load(shard / "starts.npy")
            self._values.append(np.load(shard / "values.npy", mmap_mode="r"))
            self._read.add(shard.name)
            number = len(self._values) - 1
            for i, key in enumerate(keys):
                self._where.setdefault(key.tobytes(), (number, int(starts[i]), int(starts[i + 1])))

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def __len__(self) -> int:
        return len(self._where)

    def get(self, key: bytes) -> np.ndarray:
        """The item of `key`, a view on the memory-mapped file. Raises KeyError."""
        number, start, stop = self._where[key]
        return self._values[number][start:stop]

    def append(self, keys: Sequence[bytes], items: Sequence[np.ndarray]) -> None:
        """Write one shard. Raises OutputError when the disk is full; earlier shards are untouched."""
        starts = np.cumsum([0, *(len(item) for item in items)])
        name = f"shard-{content_key(*keys).hex()}"
        temporary = self.folder / f".{name}.tmp-{os.getpid()}"
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            np.save(temporary / "keys.npy", np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES))
            np.save(temporary / "starts.npy", starts)
            np.save(temporary / "values.npy", np.concatenate(items))
            if (self.folder / name).exists():
                shutil.rmtree(temporary)
            else:
                temporary.rename(self.folder / name)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OutputError(
                f"could not write to the cache in {self.folder}: {error}. "
                "Free some disk space or give another --cache_dir."
            ) from error
        self.refresh()


def fill(
    store: ContentStore,
    keys: Sequence[bytes],
    encode: Callable[[list[int]], Iterable[np.ndarray]],
    *,
    batch_size: int,
    shard_size: int = 16_384,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Encode what `store` lacks of `keys`; the number encoded.

    `encode` takes positions in `keys` and gives one array (m, ...) for each. Shards are written as they fill, so a kill
    costs at most one.
    """
    first: dict[bytes, int] = {}
    for position, key in enumerate(keys):
        if key not in store:
            first.setdefault(key, position)
    missing = sorted(first.values())
    waiting_keys: list[bytes] = []
    waiting: list[np.ndarray] = []
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        waiting_keys += [keys[i] for i in batch]
        waiting += list(encode(batch))
        if len(waiting) >= shard_size:
            store.append(waiting_keys, waiting)
            waiting_keys, waiting = [], []
        if on_progress is not None:
            on_progress(min(start + batch_size, len(missing)), len(missing))
    if waiting:
        store.append(waiting_keys, waiting)
    return len(missing)
