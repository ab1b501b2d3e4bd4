"""A dataset as the trainers want it: latents or pixels, and caption embeddings, encoded once and kept in the cache."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from gigdiff.data.buckets import fit_to, nearest_bucket, photo_size
from gigdiff.data.cache import ContentStore, content_key, fill
from gigdiff.data.captions import compose_captions, short_prompt
from gigdiff.data.loading import ProductDataset
from gigdiff.data.records import ProductRecord
from gigdiff.images import fit_image, to_model
from gigdiff.precision import cpu_has_bfloat16
from gigdiff.text import TextEncoder

__all__ = ["EncodedBuckets", "EncodedProducts", "captions_of", "model_fingerprint"]


def model_fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits of a model's weights and config, wherever it lies: what a cache of its outputs depends on."""
    config = {name: value for name, value in dict(getattr(model, "config", {})).items() if not name.startswith("_")}
    parts: list[bytes | str] = [type(model).__name__, repr(sorted(config.items(), key=str))]
    for name, tensor in sorted(model.state_dict().items()):
        parts += [name, tensor.detach().float().cpu().contiguous().numpy().tobytes()]
    return content_key(*parts).hex()[:16]


def _encodes_in_bfloat16(device: torch.device) -> bool:
    """On a CPU that computes in it encoding takes half the time; `mini`'s latents move by 0.4% of their spread."""
    return device.type == "cpu" and cpu_has_bfloat16()


def _bar(what: str, total: int) -> Any:
    return tqdm(total=total, desc=what, file=sys.stderr, mininterval=5, disable=total == 0)


class EncodedProducts:
    """Latents of every photo and embeddings of `captions_per_image` captions of each.

    Args:
        dataset: the products.
        vae: a trained autoencoder with `encode`; None where pixels are trained on, and `pixels` read instead.
        text_encoder: the encoder of captions; "" (for prompt dropout) is always encoded too.
        height, width: what photos are fitted into, pixels.
        captions_per_image: how many wordings of each product; epoch e uses wording e mod this.
        cache_dir: where encodings are kept.
        seed: of the wordings.
        share: (process, processes): this process encodes only its share; call `refresh` after all are done.
        attributes_only: the one wording is the attribute words (`captions.short_prompt`: "navy shirt for men").
    """

    def __init__(
        self,
        dataset: ProductDataset,
        vae: Any,
        text_encoder: TextEncoder,
        *,
        height: int,
        width: int,
        captions_per_image: int,
        cache_dir: str | Path,
        seed: int,
        share: tuple[int, int] = (0, 1),
        attributes_only: bool = False,
    ) -> None:
        self.dataset = dataset
        self.height, self.width = height, width
        self.captions_per_image = 1 if attributes_only else captions_per_image
        self._texts = ContentStore(cache_dir, "texts", text_encoder.fingerprint)
        if attributes_only:
            wordings = [[short_prompt(record.product)] for record in dataset.records()]
        else:
            wordings = [compose_captions(record, captions_per_image, seed=seed) for record in dataset.records()]
        self.captions = [caption for one in wordings for caption in one]
        self._caption_keys = [content_key(caption) for caption in self.captions]
        self._empty_key = content_key("")
        self.cut: dict[str, str] = {}
        self._latents: ContentStore | None = None
        if vae is not None:
            fast = _encodes_in_bfloat16(next(vae.parameters()).device)
            precision = "bfloat16" if fast else "float32"
            fingerprint = content_key(model_fingerprint(vae), f"{height}x{width}", precision).hex()[:16]
            self._latents = ContentStore(cache_dir, "latents", fingerprint)
            self._image_keys = [content_key(dataset.image_bytes(i)) for i in range(len(dataset))]
            self._fill_latents(self._latents, vae, share)
        self._fill_texts(text_encoder, share)

    def __len__(self) -> int:
        return len(self.dataset)

    def refresh(self) -> None:
        """Read what other processes have encoded."""
        if self._latents is not None:
            self._latents.refresh()
        self._texts.refresh()

    @torch.no_grad()
    def _fill_latents(self, store: ContentStore, vae: Any, share: tuple[int, int]) -> None:
        mine = range(share[0], len(self.dataset), share[1])
        device = next(vae.parameters()).device

        def encode(chosen: list[int]) -> list[np.ndarray]:
            with torch.autocast("cpu", torch.bfloat16, enabled=_encodes_in_bfloat16(device)):
                latents = vae.encode(self.pixels([mine[i] for i in chosen]).to(device)).latent_dist.mode()
            return list(latents.float().cpu().numpy().astype(np.float16)[:, None])

        keys = [self._image_keys[i] for i in mine]
        with _bar("encoding photos", len({key for key in keys if key not in store})) as bar:
            fill(store, keys, encode, batch_size=64, on_progress=lambda done, _: bar.update(done - bar.n))

    @torch.no_grad()
    def _fill_texts(self, encoder: TextEncoder, share: tuple[int, int]) -> None:
        # Sorted by length, so that a batch is padded little; "" first, so that every process has it.
        texts = sorted(dict.fromkeys(self.captions), key=len)[share[0] :: share[1]]
        texts = ["", *texts]

        def encode(chosen: list[int]) -> list[np.ndarray]:
            batch = [texts[i] for i in chosen]
            longest = min(encoder.max_length, max(encoder.count(text) for text in batch))
            with torch.autocast("cpu", torch.bfloat16, enabled=_encodes_in_bfloat16(encoder.device)):
                embedding = encoder.encode(batch, pad_to=longest)
            self.cut |= {text: cut for text, cut in zip(batch, embedding.cut, strict=True) if cut}
            rows = torch.cat([embedding.pooled.unsqueeze(1), embedding.tokens], 1).cpu().numpy().astype(np.float16)
            return [row[: 1 + int(count)] for row, count in zip(rows, embedding.mask.sum(1), strict=True)]

        keys = [content_key(text) for text in texts]
        with _bar("encoding captions", sum(key not in self._texts for key in keys)) as bar:
            fill(self._texts, keys, encode, batch_size=128, on_progress=lambda done, _: bar.update(done - bar.n))

    def pixels(self, indices: Sequence[int]) -> torch.Tensor:
        """The photos themselves, float32 (len(indices), 3, height, width) in [-1, 1]."""
        fitted = [fit_image(self.dataset[i].image, self.height, self.width) for i in indices]  # type: ignore[arg-type]
        return to_model(np.stack(fitted))

    def latents(self, indices: Sequence[int]) -> torch.Tensor:
        """float32 (len(indices), C, height/8, width/8). Needs the autoencoder to have been given."""
        assert self._latents is not None, "made without an autoencoder"
        stacked = np.concatenate([self._latents.get(self._image_keys[i]) for i in indices])
        return torch.from_numpy(stacked.astype(np.float32))

    def caption(self, index: int, wording: int) -> str:
        """Wording `wording` (taken modulo captions_per_image) of product `index`."""
        return self.captions[index * self.captions_per_image + wording % self.captions_per_image]

    def conditions(self, choices: Sequence[tuple[int, int] | None], length: int) -> torch.Tensor:
        """float32 (len(choices), 1 + length, D), as `TextEmbedding.condition` gives: pooled, tokens, zeros.

        A choice is (index, wording), or None for the empty prompt.
        """
        items = [
            self._texts.get(
                self._empty_key
                if choice is None
                else self._caption_keys[choice[0] * self.captions_per_image + choice[1] % self.captions_per_image]
            )
            for choice in choices
        ]
        dim = items[0].shape[-1]
        out = np.zeros((len(items), 1 + length, dim), np.float32)
        for row, item in zip(out, items, strict=True):
            row[: len(item)] = item
            row[0] *= dim**0.5
        return torch.from_numpy(out)


def captions_of(record: ProductRecord, count: int, seed: int) -> list[str]:
    """A record's own captions as they are, else `count` composed ones.

    Raises:
        DataError: it has neither captions nor attributes.
    """
    return list(record.captions) or compose_captions(record, count, seed=seed)


class EncodedBuckets:
    """Latents of photos in aspect-ratio buckets, and embeddings of their captions, for fine-tuning.

    Photos and captions are encoded one by one, so that what is cached doesn't depend on its neighbours in a batch
    (float32 kernels do), on the number of processes, or on where an earlier run was killed.

    Args:
        dataset: the products.
        captions: of each product, at least one.
        buckets: (height, width) to choose from, see gigdiff.data.buckets.
        image_fit: "pad" or "crop", see `fit_to`.
        encode_pixels: float (1, 3, H, W) in [-1, 1] -> latents (1, C, h, w).
        encode_text: a text -> named tensors (1, ...); None where text is not cached.
        image_fingerprint, text_fingerprint: of the encoders.
        dtype: numpy's name of what is stored, "float16" or "float32".
        cache_dir: where.
        flip: encode the mirror image as well.
        share: (process, processes): this process encodes only its share; call `refresh` after all are done.
    """

    def __init__(
        self,
        dataset: ProductDataset,
        captions: Sequence[Sequence[str]],
        *,
        buckets: Sequence[tuple[int, int]],
        image_fit: Literal["pad", "crop"],
        encode_pixels: Callable[[torch.Tensor], torch.Tensor],
        encode_text: Callable[[str], Mapping[str, torch.Tensor]] | None,
        image_fingerprint: str,
        text_fingerprint: str,
        dtype: str,
        cache_dir: str | Path,
        flip: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.dataset, self.captions = dataset, [list(one) for one in captions]
        self._fit: Literal["pad", "crop"] = image_fit
        self._dtype, self._cache = np.dtype(dtype), Path(cache_dir)
        self._image_keys = []
        self.sizes: list[tuple[int, int]] = []  # of the photos
        for i in range(len(dataset)):
            data = dataset.image_bytes(i)
            self._image_keys.append(content_key(data))
            self.sizes.append(photo_size(data))
        self.bucket_of = [nearest_bucket(size, buckets) for size in self.sizes]
        self._latents = {
            (bucket, mirrored): ContentStore(
                cache_dir,
                "latents",
                content_key(
                    image_fingerprint, f"{bucket[0]}x{bucket[1]}", image_fit, str(mirrored), self._dtype.name
                ).hex()[:16],
            )
            for bucket in sorted(set(self.bucket_of))
            for mirrored in ((False, True) if flip else (False,))
        }
        self._text_fingerprint = content_key(text_fingerprint, self._dtype.name).hex()[:16]
        self._texts: dict[str, ContentStore] = {}
        self._fill_latents(encode_pixels, share)
        if encode_text is not None:
            self._fill_texts(encode_text, share)

    def __len__(self) -> int:
        return len(self.dataset)

    def fingerprint(self) -> str:
        """Changes when a photo or a caption does."""
        return content_key(*self._image_keys, *(text for one in self.captions for text in one)).hex()[:16]

    def refresh(self) -> None:
        """Read what other processes have encoded."""
        for store in (*self._latents.values(), *self._texts.values()):
            store.refresh()

    def _fill_latents(self, encode: Callable[[torch.Tensor], torch.Tensor], share: tuple[int, int]) -> None:
        mine = range(share[0], len(self.dataset), share[1])
        plans = {
            (bucket, mirrored): [i for i in mine if self.bucket_of[i] == bucket] for bucket, mirrored in self._latents
        }
        missing = sum(self._image_keys[i] not in self._latents[key] for key, chosen in plans.items() for i in chosen)
        with _bar("encoding photos", missing) as bar:
            for (bucket, mirrored), chosen in plans.items():

                def one(places: list[int], plan: Any = (chosen, bucket, mirrored)) -> list[np.ndarray]:
                    chosen, bucket, mirrored = plan
                    photo = fit_to(self.dataset[chosen[places[0]]].image, bucket, self._fit)  # type: ignore[arg-type]
                    photo = photo[:, ::-1] if mirrored else photo
                    bar.update()
                    return [encode(to_model(photo[None])).float().cpu().numpy().astype(self._dtype)]

                keys = [self._image_keys[i] for i in chosen]
                fill(self._latents[bucket, mirrored], keys, one, batch_size=1, shard_size=512)

    @torch.no_grad()
    def _fill_texts(self, encode: Callable[[str], Mapping[str, torch.Tensor]], share: tuple[int, int]) -> None:
        texts = sorted({text for one in self.captions for text in one})[share[0] :: share[1]]
        texts = ["", *texts]
        names = list(encode(""))  # which tensors this encoder gives
        self._texts = {name: ContentStore(self._cache, f"texts-{name}", self._text_fingerprint) for name in names}
        keys = [content_key(text) for text in texts]
        pending = [i for i, key in enumerate(keys) if any(key not in store for store in self._texts.values())]
        made: dict[int, Mapping[str, torch.Tensor]] = {}
        with _bar("encoding captions", len(pending)) as bar:
            for start in range(0, len(pending), 512):
                chosen = pending[start : start + 512]
                for i in chosen:
                    made[i] = {k: v.float().cpu() for k, v in encode(texts[i]).items()}
                    bar.update()
                for name, store in self._texts.items():

                    def one(places: list[int], name: str = name, chosen: list[int] = chosen) -> list[np.ndarray]:
                        value = made[chosen[places[0]]][name].numpy().astype(self._dtype)
                        # (1, L, D) is kept as (L, D), a pooled vector as (1, P)
                        return [value[0] if value.ndim == 3 else value]

                    fill(store, [keys[i] for i in chosen], one, batch_size=1)
                made.clear()

    def latents(self, indices: Sequence[int], mirrored: Sequence[bool] | None = None) -> torch.Tensor:
        """float32 (len(indices), C, h, w); all of one bucket."""
        flags = mirrored or [False] * len(indices)
        items = [
            self._latents[self.bucket_of[i], flag].get(self._image_keys[i])
            for i, flag in zip(indices, flags, strict=True)
        ]
        return torch.from_numpy(np.concatenate(items).astype(np.float32))

    def conditions(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The named tensors of `encode_text` for `texts`, float32 (len(texts), ...)."""
        out = {}
        for name, store in self._texts.items():
            items = np.stack([store.get(content_key(text)) for text in texts]).astype(np.float32)
            out[name] = torch.from_numpy(items[:, 0] if items.shape[1] == 1 and name.startswith("pooled") else items)
        return out

    def size_ids(self, indices: Sequence[int]) -> torch.Tensor:
        """SDXL's "time_ids" float32 (len(indices), 6): photo's height and width, nothing cut off, bucket's size."""
        rows = [(*self.sizes[i], 0, 0, *self.bucket_of[i]) for i in indices]
        return torch.tensor(rows, dtype=torch.float32)
