"""The `gigdiff` command: generate, lora, models, doctor, bench, compare, eval, and what cli_pictures.py adds.

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
@click.option("--preset", help="best, balanced or fast, in place of a model and steps.")
@click.option("--negative-prompt", help="What to steer away from; needs a guidance scale above 1.")
@click.option("--steps", "--num-inference-steps", type=int, help="Denoising steps, 1 to 1000. [default: the model's]")
@click.option("--guidance-scale", "--guidance", type=float, help="0 to 100, 1 = off. [default: the model's]")
@click.option(
    "--guidance-reuse",
    type=int,
    default=1,
    show_default=True,
    help="Most steps that share what guidance changes; 8 saves a quarter.",
)
@click.option("--height", type=int, help="Pixels, a multiple of 8. [default: the model's]")
@click.option("--width", type=int, help="Pixels, a multiple of 8. [default: the model's]")
@click.option("--lora", multiple=True, help="LoRA file, folder or hub id; give it again for several at once.")
@click.option("--lora-scale", type=float, multiple=True, help="Strength, one for all or one each. [default: 1.0]")
@click.option(
    "--truncation", type=float, help="0 to 2, for GANs and VAEs; below 1 = more typical. [default: the model's]"
)
@click.option("--scheduler", help="Solver: ddim, euler, dpm++, unipc or lcm. [default: the model's own]")
@saving_options
@click.option("--batch-size", type=int, help="Images drawn at once. [default: by their size]")
@click.option("--block-names", is_flag=True, help="Refuse prompts that name a known brand or celebrity.")
@click.option("--device", help="cpu, cuda, mps. [default: the best there is]")
@click.option(
    "--dtype",
    help="float32, bfloat16 or float16; int8 with --backend openvino; int8 or float8 for other diffusers pipelines. "
    "[default: what suits the device]",
)
@click.option(
    "--backend", default="torch", show_default=True, help="torch, openvino (faster on a CPU) or compile (on a GPU)."
)
@click.option(
    "--offload",
    type=click.Choice(["model", "sequential"]),
    help="Keep parts of a pipeline off the GPU until they are used (CUDA).",
)
@click.option("--vae-tiling", is_flag=True, help="A pipeline decodes in tiles: large pictures in little memory.")
@click.option("--vae-slicing", is_flag=True, help="A pipeline decodes one picture of a batch after another.")
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
    preset: str | None,
    steps: int | None,
    batch_size: int | None,
    device: str | None,
    dtype: str | None,
    backend: str,
    offload: str | None,
    vae_tiling: bool,
    vae_slicing: bool,
    quiet: bool,
    verbose: bool,
    **settings: Any,
) -> None:
    from gigdiff.api import build_request, iter_results, join_results
    from gigdiff.presets import chosen_by

    model, steps = chosen_by(preset, model, steps)
    scales = settings["lora_scale"]
    settings["lora_scale"] = scales if len(scales) > 1 else scales[0] if scales else 1.0
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
    from gigdiff.api import find_generator, load
    from gigdiff.lean_imports import lean_imports
    from gigdiff.pretrained import EMBEDDED

    generator: Any = model
    # Other models' code may want the compiler for more than marks.
    with lean_imports(compiles=backend == "compile" or model not in EMBEDDED):
        if offload or vae_tiling or vae_slicing or dtype or backend != "torch":
            generator = load(
                model, device, dtype, backend=backend, offload=offload, vae_tiling=vae_tiling, vae_slicing=vae_slicing
            )
            device = None  # it is the loaded model's
        else:
            find_generator(model, device)  # iter_results finds it again
    drawn: list[Any] = []
    results = []
    for result in iter_results(
        request,
        model=generator,
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


@cli.group(short_help="Convert, merge, extract and inspect LoRA files.")
def lora() -> None:
    """Convert, merge, extract and inspect LoRA files."""


@lora.command(short_help="Between diffusers' and kohya's format.")
@click.argument("source")
@click.argument("output")
@click.option("--to", "to", help="kohya or diffusers. [default: the other one]")
@click.option(
    "--naming", help="Names of the trunk in a kohya file: diffusers, ldm, flux, sd3. [default: by the family]"
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def convert(source: str, output: str, to: str | None, naming: str | None, overwrite: bool, verbose: bool) -> None:
    """Write LoRA SOURCE as OUTPUT in the other format; kohya to diffusers and back gives the same file again."""
    from gigdiff import lora as files

    if Path(output).exists() and not overwrite:
        raise OutputError(f'"{output}" exists already; pass --overwrite or choose another name.')
    path = files.find_lora(source)
    to = to or ("diffusers" if files.read_lora(path).format == "kohya" else "kohya")
    written = files.convert(path, output, to, naming)
    click.echo(f"{written}  {to}  {written.stat().st_size / 1000:.1f} kB")


@lora.command(short_help="Fold LoRAs into a copy of a model.")
@click.option("-m", "--model", default="mini", show_default=True, help="Embedded model, folder or hub id.")
@click.option("--lora", "loras", multiple=True, required=True, help="LoRA file, folder or hub id; may be repeated.")
@click.option("--lora-scale", "scales", type=float, multiple=True, help="One for all or one each. [default: 1.0]")
@click.option("--dtype", help="float32 or float16. [default: that of the model's files]")
@click.option("-o", "--output", required=True, help="The new model folder.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def merge(
    model: str, loras: tuple[str, ...], scales: tuple[float, ...], dtype: str | None, output: str, verbose: bool
) -> None:
    """Write a model folder with LoRAs folded into its weights; the base model is only read."""
    from gigdiff.generators.request import check_loras
    from gigdiff.lora import merge as fold

    files, strengths = check_loras(loras, scales if len(scales) > 1 else (scales or (1.0,))[0])
    click.echo(f"{fold(model, files, strengths, output, dtype)}")


@lora.command(short_help="What a fine-tuned model has over its base, as a LoRA.")
@click.option("-m", "--model", required=True, help="The fine-tuned model: a name, folder or hub id.")
@click.option("--base", required=True, help="What it was tuned from.")
@click.option("--rank", type=int, default=32, show_default=True, help="The higher, the nearer and the larger.")
@click.option("-o", "--output", required=True, help="The file to write.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def extract(model: str, base: str, rank: int, output: str, verbose: bool) -> None:
    """Write the LoRA of a given rank that is nearest to a fully fine-tuned model."""
    from gigdiff import lora as files

    path, share = files.extract(model, base, output, rank)
    click.echo(f"{path} holds {share:.1%} of the squared difference of {model} and {base}")


@lora.command(short_help="Show what a LoRA file holds.")
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="As JSON, with the whole training config.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def inspect(file: str, as_json: bool, verbose: bool) -> None:
    """Show a LoRA's base model, rank, alpha, layers, strength and how it was trained."""
    import json

    from gigdiff import lora as files

    about = files.inspect(files.find_lora(file))
    if as_json:
        click.echo(json.dumps(about, indent=2))
        return
    base = about["base_model"] + (f" ({about['base_hash']})" if about["base_hash"] else "")
    click.echo(f"{about['path']}  {about['format']}  {about['bytes'] / 1e6:.2f} MB  {about['parameters']:,} parameters")
    click.echo(f"  base model  {base}  {about['family']}".rstrip())
    for part, what in about["parts"].items():
        ranks, alphas = (", ".join(f"{x:g}" for x in what[key]) for key in ("ranks", "alphas"))
        click.echo(f"  {part}  {what['kind']}  rank {ranks}  alpha {alphas}  {what['modules']} layers")
        click.echo(f"    {', '.join(what['targets'])}  mean norm {what['norm']:.3g}")
    for key in ("max_train_steps", "learning_rate", "train_batch_size", "seed", "train_data_dir", "dataset_name"):
        if about["config"].get(key) is not None:
            click.echo(f"  {key}  {about['config'][key]}")


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


@cli.command(short_help="Measure models, as a config says.", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="--config FILE [--KEY VALUE]...")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def bench(arguments: tuple[str, ...], verbose: bool) -> None:
    """Measure the quality and speed of models, for example: gigdiff bench --config configs/bench_quick.yaml

    Every key of the config may be given as an option: --count 200 --output_dir runs/bench/mine. Writes benchmark.json,
    report.md and report.html there. A run that was stopped goes on where it was.
    """
    import json

    from gigdiff.benchmark import BenchmarkConfig, run_benchmark
    from gigdiff.evaluation import write_text
    from gigdiff.fit.config import parse_config
    from gigdiff.report import write_reports

    words = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in arguments]
    if not any(word.split("=")[0] in ("--config", "--scenarios") for word in words):
        raise InputError("no benchmark was given: gigdiff bench --config configs/bench_quick.yaml")
    config = parse_config(BenchmarkConfig, "Measure models.", words)
    result = run_benchmark(config, log=lambda text: click.echo(f"gigdiff: {text}", err=True))
    files = [word.split("=", 1)[1] if "=" in word else words[i + 1] for i, word in enumerate(words)
             if word.split("=")[0] == "--config"]  # fmt: skip
    result["config_file"] = files[-1] if files else None
    folder = Path(config.output_dir)
    write_text(folder / "benchmark.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    for path in [folder / "benchmark.json", *write_reports(result, folder)]:
        click.echo(str(path))
    for row in result["rows"]:
        if row["status"] != "ok":
            click.echo(f"gigdiff: note: {row['name']}: {row['status']}: {row['reason']}", err=True)


@cli.command(short_help="What moved between two benchmark reports.")
@click.argument("before")
@click.argument("after")
@click.option("--limit", type=float, default=0.05, show_default=True, help="Relative worsening that is allowed.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def compare(before: str, after: str, limit: float, verbose: bool) -> int:
    """Show what moved beyond noise between two benchmark.json files.

    The exit status is 3 when a score became worse beyond noise and by more than the limit, or a row was lost.
    """
    from gigdiff.compare import compare as compared
    from gigdiff.compare import regressions, to_text

    changes, missing = compared(before, after)
    click.echo(to_text(changes, missing))
    worse = regressions(changes, missing, limit)
    for line in worse:
        click.echo(f"gigdiff: regression: {line}", err=True)
    return 3 if worse else 0


@cli.command("eval", short_help="Score a folder of pictures made by anything.")
@click.option("--images", required=True, help="Folder of pictures; prompts from metadata.jsonl or the PNGs, if any.")
@click.option("--reference", required=True, help="Real photos: what load_products takes (folder, file, hub id).")
@click.option("--split", default="validation", show_default=True, help="Split of the reference.")
@click.option("--train-split", default="train", show_default=True, help="For the floor; left out where there is none.")
@click.option("--count", type=int, help="Photos to compare with, a fixed choice. [default: as many as pictures]")
@click.option("--copies", type=int, default=0, show_default=True, help="Train photos to search for copies.")
@click.option("--extractor", default="efficientnet-lite0", show_default=True,
              help="efficientnet-lite0, inception-v3, dinov2 or clip; name:path for weights.")  # fmt: skip
@click.option("--clip", help="CLIP weights for the CLIP score: folder or hub id.")
@click.option(
    "--height", type=int, default=80, show_default=True, help="Frame in which pictures and photos are compared."
)
@click.option("--width", type=int, default=64, show_default=True, help="The same.")
@click.option("--fit", is_flag=True, help="Fit pictures of different sizes into the frame.")
@click.option("--cache-dir", default="cache/eval", show_default=True, help="Features of real photos are kept here.")
@click.option("-o", "--output", help="Write the report here as well: a name that ends in .json.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def evaluate(images: str, reference: str, split: str, train_split: str, **options: Any) -> None:
    """Score pictures against real photos, for example: gigdiff eval --images out/ --reference photos/ --split train"""
    _evaluate(images, reference, split, train_split, **options)


def _evaluate(
    images: str,
    reference: str,
    split: str,
    train_split: str,
    *,
    count: int | None,
    copies: int,
    extractor: str,
    clip: str | None,
    height: int,
    width: int,
    fit: bool,
    cache_dir: str,
    output: str | None,
    verbose: bool,
) -> None:
    from gigdiff.image_folder import read_images

    if output is not None and not output.endswith(".json"):
        raise InputError(f'--output "{output}" must end in .json; the table goes beside it as .md')
    folder = read_images(images, (height, width) if fit else None)
    click.echo(f"gigdiff: {len(folder.names)} pictures, {sum(map(bool, folder.prompts))} with a prompt", err=True)

    from gigdiff.data import load_products
    from gigdiff.errors import DataError
    from gigdiff.evaluation import evaluate_images, make_reference, write_report

    photos = load_products(reference, split=split)
    try:
        train = load_products(reference, split=train_split) if train_split != split else None
    except DataError as error:
        click.echo(f"gigdiff: note: no floor of real against real: {' '.join(str(error).split())}", err=True)
        train = None
    wanted = count or min(len(folder.names), len(photos))
    made = make_reference(
        photos, train, count=wanted, height=height, width=width, extractor=extractor, clip=clip, copies=copies,
        cache_dir=cache_dir,
    )  # fmt: skip
    report = evaluate_images(folder.images, made, name=f"pictures in {images}", asked=folder.asked())
    click.echo(report.to_markdown())
    if output is not None:
        path = Path(output)
        click.echo(str(write_report(report, path.parent, path.stem)), err=True)


for command in COMMANDS:
    cli.add_command(command)
