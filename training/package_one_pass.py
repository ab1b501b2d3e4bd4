"""Put an embedded GAN or VAE together: a trained generator, the decoder it draws through, scores and a model card.

    python training/package_one_pass.py --run runs/gan_mini --shared_vae mini \
        --reports "[runs/quality/mini-gan/report-names.json, runs/quality/mini-gan/report-short.json]" \
        --output_dir gigdiff/pretrained/mini-gan
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from package_model import read_scores, score_table  # beside this file

from gigdiff.errors import GigdiffError, InputError, ModelMismatchError, ModelNotFoundError
from gigdiff.fit.config import parse_config
from gigdiff.generators.one_pass import save_one_pass
from gigdiff.generators.shared_vae import latent_space_of, same_encoder
from gigdiff.models.autoencoder import load_autoencoder
from gigdiff.models.one_pass import load_one_pass
from gigdiff.models.vae import ConditionalVae, drawing_half
from gigdiff.pretrained import EMBEDDED, folder_of

WHAT = {
    "StyleGenerator": "a GAN with a style-based generator (mapping network, modulated convolutions, layer noise)",
    "ConvGenerator": "a GAN with a convolutional generator",
    "ConditionalVae": "a conditional variational autoencoder, a ladder of variables with a prior learned from text",
}


@dataclasses.dataclass(frozen=True)
class PackageOnePassConfig:
    """What goes into the folder.

    Args:
        run: run folder of train_gan.py or train_vae.py.
        state: "model", the run's end, or "best", its best measured state (GAN).
        shared_vae: embedded model whose autoencoder it draws through, so that the decoder is stored once.
        vae: autoencoder folder to store with it in place of the run's; its encoder must be the one trained with.
        output_dir: the model folder to write.
        truncation: default truncation; none = the run's.
        reports: reports of benchmarks/quality.py whose scores go onto the card.
        training: how it was trained, in a sentence or two.
        training_cost: the same as a few words for the benchmark's table: photos seen, minutes, processor.
    """

    run: str = "runs/gan_mini"
    state: str = "model"
    shared_vae: str | None = None
    vae: str | None = None
    output_dir: str = "gigdiff/pretrained/mini-gan"
    truncation: float | None = None
    reports: tuple[str, ...] = ()
    training: str = ""
    training_cost: str = ""


def model_card(config: PackageOnePassConfig, name: str, card: dict[str, Any], kind: str, reports: list) -> str:
    """README.md of the model folder."""
    count = reports[0]["settings"].get("count", "1000") if reports else 0
    through = "on pixels" if card["space"] == "pixel" else "in the latent space of an autoencoder"
    if config.shared_vae:
        through += f", whose decoder is that of `{config.shared_vae}` (stored there)"
    return f"""---
license: apache-2.0
library_name: gigdiff
pipeline_tag: text-to-image
---

# {name}

{WHAT[kind][0].upper()}{WHAT[kind][1:]}: draws product photos of {card["height"]} x {card["width"]} pixels (height x
width) from a description in one pass, {through}. {card["parameters"] / 1e6:.1f} M parameters with its autoencoder, not
counting the text encoder (all-MiniLM-L6-v2, 22.7 M). It is a baseline, there to be compared with the diffusion
model on the same data, text encoder and decoder.

    import gigdiff
    gigdiff.generate("red wool coat", model="{name}", truncation={card["truncation"]:g})

- **Controls.** `truncation` (default {card["truncation"]:g}): below 1, images nearer to the most typical one of their
  prompt: fewer failures, less variety. Guidance, steps and negative prompts have no meaning here and are refused.
- **Parts.** `generator/`: {kind}. Stored in float16.

## Data

39,813 product photos of 60 x 80 pixels with catalogue attributes: "Fashion Product Images (Small)" (Kaggle,
MIT licence; hub: ashraq/fashion-product-images-small), padded white to 64 x 80. Fashion, accessories and some
cosmetics of one Indian web shop around 2012 to 2016. The photos are not redistributed here.

## Training

{config.training or f"{card.get('trained_images', 0):,} images in {card.get('trained_steps', 0):,} steps."}

The weights are under Apache-2.0, like the code.

## Scores

{count} validation products whose names do not occur in training; what each score means, and the controls to read
it between: docs/evaluation.md.

{score_table(reports) if reports else "Not measured."}

## Limits

- Small pictures; faces, lettering, logos and fine patterns are not to be trusted.
- It knows what the catalogue holds; rare articles, unusual colours for an article and several products in one picture
  are weak.
- Models in the photos are of the shop's own choice; it repeats their looks. Do not use it to depict real people.
- Pictures are synthetic: saved files carry the IPTC marking `trainedAlgorithmicMedia`; leave it in.
- Speed and quality were measured on a CPU.
"""


def main(argv: list[str] | None = None) -> None:
    config = parse_config(PackageOnePassConfig, __doc__.splitlines()[0], argv)  # type: ignore[union-attr]
    source = Path(config.run) / config.state
    if not (source / "gigdiff.json").is_file():
        raise ModelNotFoundError(
            f"no {source / 'gigdiff.json'}: give --run the output_dir of a finished run of train_gan.py or train_vae.py"
            " (and --state best for the best state of a run that collapsed)"
        )
    if config.shared_vae is not None and config.vae is not None:
        raise InputError("--shared_vae and --vae were both given: the decoder is either another model's or its own")
    card = json.loads((source / "gigdiff.json").read_text(encoding="utf-8"))
    model = load_one_pass(source / "generator")
    if isinstance(model, ConditionalVae):
        whole, model = model, drawing_half(model)
        card["parameters"] -= whole.num_parameters() - model.num_parameters()
    vae = None if card["space"] == "pixel" else load_autoencoder(source / "vae")
    stored = vae
    if vae is not None and config.vae is not None:
        stored = load_autoencoder(config.vae)
        if not same_encoder(stored, vae):
            raise ModelMismatchError(
                f"{config.vae} has another encoder than the autoencoder that {source} was trained with: only a decoder "
                "trained with --decoder_only true --init_from that autoencoder fits"
            )
    if config.shared_vae is not None:
        if config.shared_vae not in EMBEDDED:
            raise InputError(f"--shared_vae {config.shared_vae} is no embedded model; known: {', '.join(EMBEDDED)}")
        theirs = load_autoencoder(folder_of(config.shared_vae) / "vae")
        if vae is None or latent_space_of(theirs) != latent_space_of(vae):
            raise ModelMismatchError(
                f"{source} was not trained on the latents of {config.shared_vae}'s autoencoder: leave --shared_vae out"
            )
        stored = None
        card["shared_vae"] = config.shared_vae
    scores, reports = read_scores(config.reports)
    if config.truncation is not None:
        card["truncation"] = config.truncation
    card |= {"licence": "Apache-2.0", "training_cost": config.training_cost, "scores": scores}
    out = save_one_pass(config.output_dir, model, stored, card)
    text = model_card(config, out.name, card, type(model).__name__, reports)
    (out / "README.md").write_text(text, encoding="utf-8")
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(json.dumps({"model": str(out), "parameters": card["parameters"], "megabytes": round(size / 1e6, 1)}))


if __name__ == "__main__":
    try:
        main()
    except GigdiffError as error:
        sys.exit(f"error: {error}")
