"""Loading what draws in one pass: the GANs' generators and the VAE, by the class that their config names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gigdiff.errors import ModelMismatchError, ModelNotFoundError
from gigdiff.models.gan import ConvGenerator, StyleGenerator
from gigdiff.models.vae import ConditionalVae

__all__ = ["ONE_PASS", "load_one_pass"]

#: name of the class in config.json -> the class
ONE_PASS: dict[str, Any] = {
    "ConvGenerator": ConvGenerator,
    "StyleGenerator": StyleGenerator,
    "ConditionalVae": ConditionalVae,
}


def load_one_pass(folder: str | Path) -> Any:
    """The generator or VAE that training/train_gan.py or train_vae.py saved in `folder`.

    Raises:
        ModelNotFoundError: there is none. ModelMismatchError: the folder holds another model.
    """
    folder = Path(folder)
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"no generator in {folder}: give a model's generator/ folder") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelMismatchError(f"{folder / 'config.json'} is not a generator's: {error!r}") from error
    if name not in ONE_PASS:
        raise ModelMismatchError(f"{folder} holds a {name}; what draws in one pass is: {', '.join(ONE_PASS)}")
    try:
        return ONE_PASS[name].from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelMismatchError(f"{folder} does not load as a {name}: {str(error)[:300]}") from error
