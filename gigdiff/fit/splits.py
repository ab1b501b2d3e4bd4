"""The train and the held-out products of a run, encoded: the same for every trainer on latents or pixels."""

from __future__ import annotations

from typing import Any, Protocol

from gigdiff.data import load_products
from gigdiff.data.encoded import EncodedProducts
from gigdiff.errors import InputError
from gigdiff.text import TextEncoder

__all__ = ["SplitSettings", "encoded_splits"]


class SplitSettings(Protocol):
    """The keys of a trainer's config that say what it is trained and measured on."""

    @property
    def train_data_dir(self) -> str | None: ...
    @property
    def dataset_name(self) -> str | None: ...
    @property
    def train_split(self) -> str: ...
    @property
    def validation_split(self) -> str: ...
    @property
    def max_train_samples(self) -> int | None: ...
    @property
    def num_validation_images(self) -> int: ...
    @property
    def captions_per_image(self) -> int: ...
    @property
    def cache_dir(self) -> str: ...
    @property
    def seed(self) -> int: ...


def encoded_splits(
    config: SplitSettings,
    vae: Any,
    encoder: TextEncoder,
    accelerator: Any,
    *,
    size: tuple[int, int],
    captions_seed: int | None = None,
    attributes_only: bool = False,
) -> tuple[EncodedProducts, EncodedProducts]:
    """Train and held-out products with their latents (vae None: pixels) and captions, each process encoding its share.

    Args:
        size: (height, width) that photos are fitted into. captions_seed: of the wordings; None = the run's seed.
        attributes_only: condition on the attribute words alone.

    Raises:
        InputError: neither --train_data_dir nor --dataset_name; else what `load_products` raises.
    """
    source = config.train_data_dir or config.dataset_name
    if source is None:
        raise InputError("no training data: give --train_data_dir DIR or --dataset_name ID")
    train, held_out = (
        EncodedProducts(
            load_products(source, split=split, limit=limit),
            vae,
            encoder,
            height=size[0],
            width=size[1],
            captions_per_image=config.captions_per_image,
            cache_dir=config.cache_dir,
            seed=config.seed if captions_seed is None else captions_seed,
            share=(accelerator.process_index, accelerator.num_processes),
            attributes_only=attributes_only,
        )
        for split, limit in (
            (config.train_split, config.max_train_samples),
            (config.validation_split, config.num_validation_images),
        )
    )
    accelerator.wait_for_everyone()
    train.refresh()
    held_out.refresh()
    return train, held_out
