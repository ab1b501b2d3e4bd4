"""The pictures that a LoRA's run draws on its way, by the code that gigdiff.generate uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from gigdiff.fit.lora_config import LoraConfig
from gigdiff.generators.request import GenerationRequest
from gigdiff.images import contact_sheet, save_image
from gigdiff.provenance import metadata

__all__ = ["drawing_settings", "preview"]


def preview(generator: Any, config: LoraConfig, prompts: Sequence[str], out: Path, step: int) -> None:
    """Draw each prompt with seeds 0, 1, ..., one by one, by the same code as gigdiff.generate; then the grid."""
    for k, prompt in enumerate(prompts):
        for seed in range(config.num_validation_images):
            request = GenerationRequest(
                (prompt,),
                (seed,),
                height=config.resolution,
                width=config.resolution,
                **drawing_settings(config),
            )
            result = generator.generate(request)
            about = metadata(result, 0) | {"lora": f"{config.output_dir} at step {step}"}
            save_image(preview_path(out, step, k, seed), result.images[0], about, overwrite=True)
    grid(out, prompts, config.num_validation_images)


def drawing_settings(config: LoraConfig) -> dict[str, Any]:
    """How previews are drawn: a LoRA for few steps in 4 of them, without guidance, by the solver made for it."""
    settings: dict[str, Any] = {
        "num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale
    }  # fmt: skip
    if config.objective == "consistency":
        few = {"num_inference_steps": 4, "guidance_scale": 1.0}
        settings = {name: few[name] if value is None else value for name, value in settings.items()}
        settings["scheduler"] = "lcm"
    return settings


def preview_path(out: Path, step: int, prompt: int, seed: int) -> Path:
    return out / "previews" / f"step-{step:06d}" / f"prompt-{prompt}-seed-{seed}.png"


def grid(out: Path, prompts: Sequence[str], seeds: int) -> None:
    """previews/grid.png: a row for each prompt and seed, a column for each previewed step; the first is before."""
    steps = sorted(int(path.name.removeprefix("step-")) for path in (out / "previews").glob("step-*"))
    pictures, labels = [], []
    for k, prompt in enumerate(prompts):
        for seed in range(seeds):
            for step in steps:
                path = preview_path(out, step, k, seed)
                if path.is_file():
                    pictures.append(Image.open(path).convert("RGB"))
                    labels.append(f"{'before' if step == 0 else step}: {prompt}")
    scale = max(1, 128 // pictures[0].height)
    about = {"prompt": "\n".join(prompts), "seed": ", ".join(map(str, range(seeds)))}
    sheet = contact_sheet(pictures, len(steps), labels=labels, scale=scale)
    save_image(out / "previews" / "grid.png", sheet, about, overwrite=True)
