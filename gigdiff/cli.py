"""The `gigdiff` command: generate, models, doctor, and what cli_pictures.py adds.

Results go to stdout, the progress bar and errors to stderr. A mistake is one line and exit status 1 (2 for an unknown
option), with a traceback only under --verbose. torch is imported when a picture is drawn, not for `--help`.
"""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import gigdiff
from gigdiff.cli_pictures import COMMANDS, parse_post, saving_options, signer_of
from gigdiff.errors import GigdiffError, InputError, OutputError

__all__ = ["main"]

# Names that Windows keeps for devices, whatever the suffix.
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}

# --num_inference_steps (the spelling of Python and of the diffusers scripts) is --num-inference-steps.
SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "max_content_width": 110,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status; nothing is raised."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = cli.main(args=words, prog_name="gigdiff", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except (click.Abort, KeyboardInterrupt):
        click.echo("gigdiff: interrupted", err=True)
        return 130
    except BrokenPipeError:  # `gigdiff models | head`: nobody reads on, and Python's flush at exit must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if "--verbose" in words:
            traceback.print_exc()
        if isinstance(error, click.ClickException):
            text, status = error.format_message(), error.exit_code
        elif isinstance(error, GigdiffError):
            text, status = str(error), 1
        else:
            text = f"unexpected {type(error).__name__}: {error} (run again with --verbose for the traceback)"
            status = 1
        click.echo("gigdiff: error: " + " ".join(text.split()), err=True)
        return status


@click.group(context_settings=SETTINGS)
@click.version_option(gigdiff.__version__, prog_name="gigdiff")
def cli() -> None:
    """A product description becomes a product photo."""


@cli.command(short_help="Draw product photos.")
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@click.option("-n", "--num-images-per-prompt", type=int, default=1, show_default=True, help="Images of each prompt.")
@click.option("--seed", type=int, help="Seed of the first image, the next has seed + 1. [default: drawn and reported]")
@click.option("-o", "--output", default="out", show_default=True, help="Folder, or a file for a single image.")
@click.option("--format", "file_format", type=click.Choice(["png", "jpg", "webp"]), default="png", show_default=True)
@click.option("--grid", is_flag=True, help="Also write a contact sheet.")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@click.option("-m", "--model", default="mini", show_default=True, help="Embedded model, folder or hub id.")
@click.option("--negative-prompt", help="What to steer away from; needs a guidance scale above 1.")
@click.option("--steps", "--num-inference-steps", type=int, help="Denoising steps, 1 to 1000. [default: the model's]")
@click.option("--guidance-scale", "--guidance", type=float, help="0 to 100, 1 = off. [default: the model's]")
@click.option("--height", type=int, help="Pixels, a multiple of 8. [default: the model's]")
@click.option("--width", type=int, help="Pixels, a multiple of 8. [default: the model's]")
@click.option("--lora", help="LoRA file or hub id.")
@click.option("--lora-scale", type=float, default=1.0, show_default=True, help="Strength of the LoRA.")
@saving_options
@click.option("--batch-size", type=int, help="Images drawn at once. [default: by their size]")
@click.option("--block-names", is_flag=True, help="Refuse prompts that name a known brand or celebrity.")
@click.option("--device", help="cpu, cuda, mps. [default: the best there is]")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def generate(prompts: tuple[str, ...], **options: Any) -> None:
    """Draw product photos, for example: gigdiff generate "red wool coat" -n 8 --seed 7 --output out/ --grid

    Files are named after the prompt: out/red-wool-coat.png; with -n above 1 each also carries its seed:
    out/red-wool-coat-seed7.png. Existing files are never replaced without --overwrite.
    """
    if not prompts:
        raise InputError('no prompt was given; describe a product: gigdiff generate "red wool coat"')
    _generate(prompts, **options)


def _generate(
    prompts: tuple[str, ...],
    *,
    num_images_per_prompt: int,
    seed: int | None,
    output: str,
    grid: bool,
    overwrite: bool,
    file_format: str,
    upscale: bool | None,
    upscaler: str | None,
    fidelity: float | None,
    post: tuple[str, ...],
    block_names: bool,
    watermark: bool,
    sign_cert: str | None,
    sign_key: str | None,
    sign_algorithm: str,
    model: str,
    steps: int | None,
    batch_size: int | None,
    device: str | None,
    quiet: bool,
    verbose: bool,
    **settings: Any,
) -> None:
    from gigdiff.api import build_request, iter_results, join_results

    signer, steps_after, safety = signer_of(sign_cert, sign_key, sign_algorithm), parse_post(post), None
    if block_names:
        from gigdiff.safety import BRANDS, CELEBRITIES, Safety, blocklist

        safety = Safety((blocklist(BRANDS, "brand"), blocklist(CELEBRITIES, "celebrity")))
        safety.check_prompts(prompts)  # before a model is loaded

    request = build_request(
        list(prompts),
        num_images_per_prompt=num_images_per_prompt,
        seed=seed,
        num_inference_steps=steps,
        **settings,
    )

    from gigdiff.images import check_writable, contact_sheet, save_image
    from gigdiff.postprocess import postprocess
    from gigdiff.provenance import save, sheet_metadata

    # Before any time is spent: can every file be written?
    paths = _file_names(output, request.prompts, request.seeds, num_images_per_prompt, file_format)
    sheet = paths[0].with_name(f"{_slug(prompts[0])}-grid.png" if len(set(prompts)) == 1 else "grid.png")
    for path in [*paths, sheet] if grid else paths:
        check_writable(path, overwrite)

    if not quiet:
        click.echo(f"gigdiff: loading {model}", err=True)
    drawn: list[Any] = []
    results = []
    for result in iter_results(
        request,
        model=model,
        batch_size=batch_size,
        device=device,
        progress=not quiet,
        upscale=upscale if upscaler is None else upscaler,
        fidelity=fidelity,
        safety=safety,
    ):
        results.append(result)
        for i, picture in enumerate(result.pictures()):
            if steps_after:
                picture = postprocess(picture, steps_after)
            target = paths[len(drawn)]
            path = save(target, picture, picture.info, overwrite=overwrite, watermark=watermark, signer=signer)
            drawn.append(picture)
            _report(path, picture, result.seconds / len(result.images), result.model, f"seed {result.request.seeds[i]}")
    for note in dict.fromkeys(note for result in results for note in result.notes):
        click.echo(f"gigdiff: note: {' '.join(note.split())}", err=True)
    if grid:
        whole = join_results(results)
        columns = num_images_per_prompt if 1 < num_images_per_prompt <= 8 else 8
        labels = [f"{seed} {prompt}" for prompt, seed in zip(request.prompts, request.seeds, strict=True)]
        picture = contact_sheet(drawn, columns, labels)
        save_image(sheet, picture, sheet_metadata(whole), overwrite)
        _report(sheet, picture, whole.seconds, whole.model, f"{len(drawn)} images")


def _report(path: Path, picture: Any, seconds: float, model: str, last: str) -> None:
    """One line on stdout: path, size, seconds, model."""
    size = f"{picture.height} x {picture.width} px, {path.stat().st_size / 1000:.1f} kB"
    click.echo(f"{path}  {size}  {seconds:.2f} s  {model}  {last}")


def _file_names(
    output: str, prompts: Sequence[str], seeds: Sequence[int], n: int, file_format: str = "png"
) -> list[Path]:
    """A path for each image; no two alike, even for prompts that differ in punctuation only."""
    folder = Path(output).expanduser()
    if folder.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and not folder.is_dir():
        if len(prompts) > 1:
            raise InputError(f'--output "{output}" is one file for {len(prompts)} images; give a folder.')
        return [folder]
    if folder.exists() and not folder.is_dir():
        raise OutputError(f'--output "{output}" is a file; give a folder, or a name that ends in .png, .jpg or .webp.')
    names: dict[str, None] = {}
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        stem = _slug(prompt) + (f"-seed{seed}" if n > 1 else "")
        names[stem if stem not in names else f"{stem}-{i + 1}"] = None
    return [folder / f"{name}.{file_format}" for name in names]


def _slug(prompt: str) -> str:
    """A file name for a prompt, on every system: letters and digits of any script, hyphens, at most 60 characters.

    >>> _slug("Red wool coat, 50% off!")
    'red-wool-coat-50-off'
    """
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", prompt).lower())
    slug = "-".join(words)[:60].strip("-") or "image"
    while len(slug.encode()) > 180:  # file systems count bytes, up to 255 with what is added
        slug = slug[:-1]
    return f"{slug}-image" if slug in RESERVED else slug


@cli.command(short_help="List the embedded models.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def models(verbose: bool) -> None:
    """List the embedded models: size on disk, parameters, measured scores, licence."""
    from gigdiff.pretrained import EMBEDDED, UPSCALERS, card, folder_of, size_on_disk

    rows = [("name", "what", "on disk", "parameters", "licence", "scores")]
    upscalers = {name: what for name, what in UPSCALERS.items() if card(folder_of(name))}
    for name, what in (EMBEDDED | upscalers).items():
        folder = folder_of(name)
        about = card(folder)
        if not about:
            rows.append((name, what, "-", "-", "-", f"missing: no {folder / 'gigdiff.json'}"))
            continue
        count = about.get("parameters")
        scores = about.get("scores") or {}
        rows.append(
            (
                name,
                what,
                f"{size_on_disk(folder) / 1e6:.1f} MB",
                f"{count / 1e6:.1f} M" if isinstance(count, int | float) else "-",
                str(about.get("licence") or "-"),
                ", ".join(f"{key} {_number(value)}" for key, value in scores.items()) or "-",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@cli.command(short_help="Show what is installed and usable.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def doctor(verbose: bool) -> None:
    """Show versions, device, dtype, attention backends and why each is or isn't usable, and whether the hub answers."""
    from gigdiff.doctor import findings

    start = time.perf_counter()
    for section, rows in findings().items():
        click.echo(section)
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            click.echo(f"  {name.ljust(width)}  {value}")
    click.echo(f"looked around in {time.perf_counter() - start:.1f} s")


for command in COMMANDS:
    cli.add_command(command)
