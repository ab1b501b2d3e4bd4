"""Put an embedded upscaler together: the faithful and the sharp network, scores and a model card.

    python training/package_upscaler.py --fidelity runs/upscaler_mini_perceptual/upscaler \
        --sharp runs/upscaler_mini_sharp/upscaler
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

from gigdiff.errors import GigdiffError, InputError
from gigdiff.fit.config import parse_config
from gigdiff.models.saving import save_network
from gigdiff.models.upscaler import deepened, interpolated, load_upscaler_network


@dataclasses.dataclass(frozen=True)
class PackageConfig:
    """What goes into the folder.

    Args:
        fidelity: upscaler folder of the faithful network.
        sharp: upscaler folder of the sharp one, trained on from it.
        sharp_base: where `sharp` was trained on from an earlier faithful network, that one's folder: what sharpening
            changed in each weight is then added to `fidelity` (task arithmetic, Ilharco et al. 2023, arXiv 2212.04089).
        output_dir: the folder to write.
        report: JSON of benchmarks/upscale_quality.py (its last line of stdout, saved), whose scores go onto the card.
        training: how it was trained, in a sentence or two.
    """

    fidelity: str = "runs/upscaler_mini_perceptual/upscaler"
    sharp: str = "runs/upscaler_mini_sharp/upscaler"
    sharp_base: str | None = None
    output_dir: str = "gigdiff/pretrained/mini-upscaler"
    report: str | None = None
    training: str = ""


def model_card(name: str, config: PackageConfig, parameters: int, flops: float, results: dict[str, dict]) -> str:
    """README.md of the folder."""
    rows = "\n".join(
        f"| {kind} | {row['psnr']:.2f} | {row['perceptual']:.4f} | "
        + (f"{row['images_per_second']:.1f} |" if "images_per_second" in row else "|")
        for kind, row in results.items()
    )
    table = f"| | PSNR, dB | perceptual distance | images/s |\n| --- | ---: | ---: | ---: |\n{rows}"
    return f"""---
license: apache-2.0
library_name: gigdiff
pipeline_tag: image-to-image
---

# {name}

Enlarges product photos four times each way: {parameters / 1e6:.2f} M parameters,
{flops / 1e9:.1f} GFLOP for 80 x 64 pixels. `fidelity/` was trained to stay near the photo, `sharp/` on from it with a
discriminator; `gigdiff.upscale(fidelity=)` mixes them.

## Data

10,560 photos of fashion products at 168 x 224 and 225 x 300 and their 60 x 80 catalogue files ("Fashion Product
Images", Kaggle, MIT). The photos are not redistributed here.

## Training

{config.training}

The weights are under Apache-2.0, like the code.

## Scores

{table if results else "Not measured."}

## Limits

It knows fashion products on white. Detail that `sharp/` adds is plausible, not the product's own; lettering and faces
are not to be trusted.
"""


def main(argv: list[str] | None = None) -> None:
    config = parse_config(PackageConfig, __doc__.splitlines()[0], argv)  # type: ignore[union-attr]
    sharp = load_upscaler_network(config.sharp)
    shape = [sharp.config[name] for name in ("channels", "blocks", "scale")]
    faithful = deepened(load_upscaler_network(config.fidelity), *shape)
    interpolated(faithful, load_upscaler_network(config.sharp), 0.5)  # raises where they don't fit
    if config.sharp_base is not None:
        base = deepened(load_upscaler_network(config.sharp_base), *shape)
        parts = zip(sharp.parameters(), base.parameters(), faithful.parameters(), strict=True)
        with torch.no_grad():
            for theirs, before, now in parts:
                theirs += now - before
    results: dict[str, dict] = {}
    if config.report is not None:
        try:
            results = json.loads(Path(config.report).read_text(encoding="utf-8").splitlines()[-1])["results"]
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise InputError(f"--report {config.report} is none of benchmarks/upscale_quality.py: {error!r}") from error
    out = Path(config.output_dir)
    for part, network in (("fidelity", faithful), ("sharp", sharp)):
        save_network(network.half(), out / part)
    parameters = sum(p.numel() for network in (faithful, sharp) for p in network.parameters())
    scores = {
        f"{kind}: {name}": round(row[key], 3)
        for kind, row in results.items()
        for key, name in (("psnr_gain", "dB over bicubic"), ("perceptual_ratio", "perceptual / bicubic"))
        if kind != "bicubic"
    }
    card = {"family": "upscaler", "parameters": parameters, "licence": "Apache-2.0", "scores": scores}
    (out / "gigdiff.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    flops = faithful.flops_per_pixel * 80 * 64
    text = model_card(out.name, config, parameters // 2, flops, results)
    (out / "README.md").write_text(text, encoding="utf-8")
    print(json.dumps({"upscaler": str(out), "parameters": parameters}))


if __name__ == "__main__":
    try:
        main()
    except GigdiffError as error:
        sys.exit(f"error: {error}")
