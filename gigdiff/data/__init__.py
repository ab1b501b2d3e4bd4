"""Any product dataset -> ProductRecord; splits grouped by product; captions; augmentation.

The names below are imported on first use, so that `gigdiff.products`, which reads the vocabulary, doesn't pay for
`datasets` and pyarrow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gigdiff.data.augment import Augmentation as Augmentation
    from gigdiff.data.captions import compose_captions as compose_captions
    from gigdiff.data.captions import short_prompt as short_prompt
    from gigdiff.data.loading import ProductDataset as ProductDataset
    from gigdiff.data.loading import StreamingProducts as StreamingProducts
    from gigdiff.data.loading import load_products as load_products
    from gigdiff.data.records import BadImage as BadImage
    from gigdiff.data.records import ProductRecord as ProductRecord
    from gigdiff.data.splits import LeakageReport as LeakageReport
    from gigdiff.data.splits import leakage_report as leakage_report
    from gigdiff.data.splits import split_by_group as split_by_group
    from gigdiff.data.vocabulary import colour_group as colour_group

# Not `augment`: the module of that name would hide the function; use `from gigdiff.data.augment import augment`.
_HOME = {
    "BadImage": "gigdiff.data.records",
    "LeakageReport": "gigdiff.data.splits",
    "ProductDataset": "gigdiff.data.loading",
    "ProductRecord": "gigdiff.data.records",
    "StreamingProducts": "gigdiff.data.loading",
    "Augmentation": "gigdiff.data.augment",
    "colour_group": "gigdiff.data.vocabulary",
    "compose_captions": "gigdiff.data.captions",
    "leakage_report": "gigdiff.data.splits",
    "load_products": "gigdiff.data.loading",
    "short_prompt": "gigdiff.data.captions",
    "split_by_group": "gigdiff.data.splits",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
