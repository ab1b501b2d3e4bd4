"""Put an embedded model together: a trained UNet, the decoder that goes with it, defaults, scores and a model card.

    python training/package_model.py --unet_run runs/diffusion_mini --vae runs/autoencoder_mini_sharp/autoencoder \
        --reports "[runs/quality/mini/report-names.json, runs/quality/mini/report-short.json]" \
        --output_dir gigdiff/pretrained/mini

A student of distill.py, which draws through its teacher's autoencoder, here as a LoRA on the teacher's UNet:

    python training/package_model.py --unet_run runs/distill_mini_lora --shared_vae mini --unet_of mini --rank 88 \
        --num_inference_steps 4 --guidance_scale 1 --output_dir gigdiff/pretrained/mini-turbo
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch

from gigdiff.errors import GigdiffError, InputError, ModelMismatchError, ModelNotFoundError
from gigdiff.fit.config import parse_config
from gigdiff.generators.diffusion import load_unet, save_folder
from gigdiff.generators.shared_vae import autoencoder_of, latent_space_of, same_encoder
from gigdiff.lora import WEIGHTS_NAME, extract
from gigdiff.models.autoencoder import ProductAutoencoder, load_autoencoder
from gigdiff.pretrained import EMBEDDED, folder_of
from gigdiff.pretrained import card as card_of

#: Scores of a report that go onto the card, and what they are called there.
SCORES = {
    "article_type_ratio": "type / real",
    "colour_group_ratio": "colour / real",
    "frechet_ratio": "Fréchet distance / real",
}


@dataclasses.dataclass(frozen=True)
class PackageConfig:
    """What goes into the folder.

    Args:
        unet_run: run folder of train_diffusion.py or distill.py, with model/.
        shared_vae: embedded model whose autoencoder it draws through, so that the decoder is stored once.
        unet_of: embedded model that the run went on from: the difference is stored, as a LoRA, in place of a UNet.
        rank: of that LoRA.
        lora_scale: of what is stored of the difference, as a LoRA's strength; below 1 lies nearer to `unet_of`.
        truncation: of a model of one step: its UNet is given so much of the noise, for more typical pictures, fewer
            wrong ones and less variety (Brock et al. 2018, arXiv 1809.11096, section 3.1). 1 = as trained.
        vae: autoencoder folder; its encoder must be the one that the UNet was trained with. Default: the run's own.
        output_dir: the model folder to write.
        num_inference_steps: default steps.
        guidance_scale: default guidance.
        guidance_low: lowest sigma at which guidance is applied.
        guidance_high: highest sigma at which guidance is applied; none = no limit.
        reports: reports of benchmarks/quality.py whose scores go onto the card.
        training: how it was trained, in a sentence or two.
        training_cost: the same as a few words for the benchmark's table: photos seen, minutes, processor.
    """

    unet_run: str = "runs/diffusion_mini"
    shared_vae: str | None = None
    unet_of: str | None = None
    rank: int = 32
    lora_scale: float = 1.0
    truncation: float = 1.0
    vae: str | None = None
    output_dir: str = "gigdiff/pretrained/mini"
    num_inference_steps: int = 20
    guidance_scale: float = 2.5
    guidance_low: float = 0.0
    guidance_high: float | None = None
    reports: tuple[str, ...] = ()
    training: str = ""
    training_cost: str = ""


@torch.no_grad()
def scale_difference(unet: Any, base: Any, lora_scale: float) -> None:
    """Put `unet` at `lora_scale` of the way from `base`.

    Raises:
        ModelMismatchError: the two are of other sizes.
    """
    if [p.shape for p in unet.parameters()] != [p.shape for p in base.parameters()]:
        raise ModelMismatchError("--unet_run's UNet has other sizes than that of --unet_of")
    for parameter, first in zip(unet.parameters(), base.parameters(), strict=True):
        parameter.lerp_(first, 1 - lora_scale)


def read_scores(reports: tuple[str, ...]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Scores for gigdiff.json, named "<prompts>: <score>", and the reports themselves."""
    scores, read = {}, []
    for file in reports:
        try:
            report = json.loads(Path(file).read_text(encoding="utf-8"))
            for key, name in SCORES.items():
                scores[f"{report['prompts']}: {name}"] = round(report["scores"][key]["value"], 3)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"--reports {file} is no report of benchmarks/quality.py: {error!r}") from error
        read.append(report)
    return scores, read


def score_table(reports: list[dict[str, Any]]) -> str:
    """The reports' scores as a Markdown table with intervals and counts."""
    lines = ["| prompts | score | value | interval | images |", "| --- | --- | ---: | --- | ---: |"]
    for report in reports:
        for name, score in (report["scores"] | report["controls"]).items():
            interval = (
                "" if score["low"] is None else f"{score['low']:.3f} to {score['high']:.3f} ({score['interval']})"
            )
            lines.append(f"| {report['prompts']} | {name} | {score['value']:.3f} | {interval} | {score['count']} |")
    return "\n".join(lines)


def model_card(
    config: PackageConfig, name: str, channels: int, card: dict[str, Any], solver: str, reports: list[dict[str, Any]]
) -> str:
    """README.md of the model folder."""
    count = reports[0]["settings"].get("count", "1000") if reports else 0
    teacher, parameters = card.get("distilled_from"), card["parameters"]
    defaults = f"{config.num_inference_steps} steps, guidance {config.guidance_scale:g}"
    if teacher is None:
        high = "infinity" if config.guidance_high is None else f"{config.guidance_high:g}"
        defaults += f", applied for sigma from\n  {config.guidance_low:g} to {high}"
        what = "from a description"
    else:
        defaults += (
            f"; {teacher}'s guidance of\n  {card['baked_guidance']:g} is baked in, and negative prompts do nothing"
        )
        what = f"from a description\nin {config.num_inference_steps} steps, distilled from `{teacher}`"
    decoder = "`vae/`: gigdiff's ProductAutoencoder"
    stock = "from_pretrained(folder, text_encoder=None, tokenizer=None)"
    if config.shared_vae is not None:
        decoder = f"The autoencoder is that of `{config.shared_vae}` (stored there)"
        stock = "from_pretrained(folder, vae=load_autoencoder(...), text_encoder=None, tokenizer=None)"
    network, how = "diffusers' UNet2DConditionModel, v-prediction", "reads this folder too"
    if config.unet_of is not None:
        network = f"a LoRA on the UNet of `{config.unet_of}`, folded in when it is loaded"
        lora = f'`load_lora_weights("{name}/unet")`'
        how = f"draws the same by {lora} on `{config.unet_of}`'s folder and this `scheduler/`"
    return f"""---
license: apache-2.0
library_name: gigdiff
pipeline_tag: text-to-image
---

# {name}

A latent diffusion model that draws product photos of 80 x 64 pixels (height x width) {what},
small enough to run on a CPU: {parameters / 1e6:.1f} M parameters, not counting the text encoder
(all-MiniLM-L6-v2, 22.7 M), which is not in this folder.

    import gigdiff
    gigdiff.generate("red wool coat", model="{name}")

- **Parts.** `unet/`: {network}. {decoder}, 8x8
  pixels to {channels} channels. `scheduler/`: {solver}. Stored in float16.
- **Defaults.** {defaults}.
- **Stock diffusers** {how}, with prompt embeddings from gigdiff:
  `StableDiffusionPipeline.{stock}(prompt_embeds=..., ...)`.

## Data

39,813 product photos of 60 x 80 pixels with catalogue attributes: "Fashion Product Images (Small)" (Kaggle,
MIT licence; hub: ashraq/fashion-product-images-small), padded white to 64 x 80. Fashion, accessories and some
cosmetics of one Indian web shop around 2012 to 2016. The photos are not redistributed here.

## Training

{config.training}

The weights are under Apache-2.0, like the code.

## Scores

{count} validation products whose names do not occur in training; what each score means, and the controls to read
it between: docs/evaluation.md.

{score_table(reports) if reports else "Not measured."}

## Limits

- Small pictures; faces, lettering, logos and fine patterns are not to be trusted.
- It knows what the catalogue holds. Rare articles (long tail of 142 types), unusual colours for an article, several
  products in one picture, and materials (seldom named in the data) are weak.
- Models in the photos are of the shop's own choice; it repeats their looks. Do not use it to depict real people.
- Pictures are synthetic: saved files carry the IPTC marking `trainedAlgorithmicMedia`; leave it in.
- Speed and quality were measured on a CPU.
"""


def main(argv: list[str] | None = None) -> None:
    config = parse_config(PackageConfig, __doc__.splitlines()[0], argv)  # type: ignore[union-attr]
    source = Path(config.unet_run) / "model"
    if not (source / "gigdiff.json").is_file():
        raise ModelNotFoundError(
            f"no {source / 'gigdiff.json'}: give --unet_run the output_dir of a finished run of train_diffusion.py or "
            "distill.py"
        )
    if config.shared_vae is not None and config.vae is not None:
        raise InputError("--shared_vae and --vae were both given: the decoder is either another model's or its own")
    if config.lora_scale != 1.0 and config.unet_of is None:
        raise InputError(f"--lora_scale {config.lora_scale:g} is of a LoRA's strength: give --unet_of and --rank too")
    if config.truncation != 1.0 and config.num_inference_steps != 1:
        raise InputError(
            f"--truncation {config.truncation:g} is for a model of one step: with --num_inference_steps "
            f"{config.num_inference_steps} leave it out"
        )
    if config.unet_of is not None:
        if config.unet_of not in EMBEDDED:
            raise InputError(f"--unet_of {config.unet_of} is no embedded model; known: {', '.join(EMBEDDED)}")
        under = card_of(folder_of(config.unet_of)).get("unet_of")
        if under is not None:
            raise InputError(f"--unet_of {config.unet_of} is a LoRA on {under} itself: give --unet_of {under}")
    card = json.loads((source / "gigdiff.json").read_text(encoding="utf-8"))
    unet = load_unet(source / "unet")
    if config.unet_of is not None and config.lora_scale != 1.0:
        scale_difference(unet, load_unet(folder_of(config.unet_of) / "unet"), config.lora_scale)
    # W (t z) = (t W) z: so every sampler, stock diffusers' too, draws the truncated model.
    unet.conv_in.weight.data.mul_(config.truncation)
    vae = own = load_autoencoder(source / "vae")
    if config.vae is not None:
        vae = load_autoencoder(config.vae)
        if not same_encoder(vae, own):
            raise ModelMismatchError(
                f"{config.vae} has another encoder than the autoencoder that {source} was trained with: only a decoder "
                "trained with --decoder_only true --init_from that autoencoder fits"
            )
    own_card = dict(card)
    stored: ProductAutoencoder | None = vae
    if config.shared_vae is not None:
        card |= {"shared_vae": config.shared_vae, "latent_space": latent_space_of(vae)}
        autoencoder_of(source, card)  # which makes sure that it is the one
        stored = None
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(source / "scheduler")
    scores, reports = read_scores(config.reports)
    parameters = sum(p.numel() for m in (unet, vae) for p in m.parameters())
    card |= {
        "parameters": parameters,
        "licence": "Apache-2.0",
        "training_cost": config.training_cost,
        "scores": scores,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "guidance_interval": [config.guidance_low, config.guidance_high],
    }
    if config.truncation != 1.0:
        card["baked_truncation"] = config.truncation
    if config.unet_of is not None:
        card |= {"unet_of": config.unet_of, "lora_scale": config.lora_scale}
        lora = Path(config.output_dir) / "unet" / WEIGHTS_NAME
        with tempfile.TemporaryDirectory() as folder:
            whole = save_folder(Path(folder) / Path(config.output_dir).name, unet, vae, scheduler, own_card, half=False)
            _, share = extract(whole, folder_of(config.unet_of), lora, config.rank)
        out = save_folder(config.output_dir, None, stored, scheduler, card)
        print(f"the LoRA holds {share:.3f} of the squared difference to {config.unet_of}", file=sys.stderr)
    else:
        out = save_folder(config.output_dir, unet, stored, scheduler, card)
    text = model_card(config, out.name, vae.config["latent_channels"], card, type(scheduler).__name__, reports)
    (out / "README.md").write_text(text, encoding="utf-8")
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(json.dumps({"model": str(out), "parameters": parameters, "megabytes": round(size / 1e6, 1)}))


if __name__ == "__main__":
    try:
        main()
    except GigdiffError as error:
        sys.exit(f"error: {error}")
