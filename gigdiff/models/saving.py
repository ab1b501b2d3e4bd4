"""Networks as folders that say nothing of the machine they were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["save_network"]


def save_network(network: Any, folder: str | Path) -> None:
    """diffusers' `save_pretrained` as safetensors, without the path that the network was once loaded from."""
    network.save_pretrained(folder, safe_serialization=True)
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.pop("_name_or_path", None) is not None:
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
