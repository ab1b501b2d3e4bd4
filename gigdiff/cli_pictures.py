"""Commands for a picture that is there already: edit, upscale, inspect. `gigdiff.cli` adds them to `gigdiff`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gigdiff.errors import InputError

__all__ = ["COMMANDS", "parse_post", "saving_options", "signer_of"]


def saving_options(command: Any) -> Any:
    """Options of every command that writes a picture: enlarging, post-processing, watermark and signature."""
    options = [
        click.option(
            "--upscale/--no-upscale", default=None, help="Enlarge 4x. [default: embedded models' pictures are]"
        ),
        click.option("--upscaler", help="Enlarge by this one: a name, a folder, or a file that spandrel reads."),
        click.option("--fidelity", type=float, help="Of enlarging: 1 = true to the pixels, 0 = sharp. [default: 0.5]"),
        click.option(
            "--post", multiple=True, metavar="STEP", help='Post-processing, as in "pad:ratio=4:5"; again for more.'
        ),
        click.option("--watermark", is_flag=True, help="Put the invisible watermark in."),
        click.option("--sign-cert", help="Sign with this certificate chain (PEM, C2PA)."),
        click.option("--sign-key", help="Its private key (PEM)."),
        click.option("--sign-algorithm", default="es256", show_default=True, help="By the kind of key."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def signer_of(sign_cert: str | None, sign_key: str | None, sign_algorithm: str) -> Any:
    """The Signer that these options ask for, or None."""
    if sign_cert is None and sign_key is None:
        return None
    if sign_cert is None or sign_key is None:
        raise InputError("signing needs both --sign-cert and --sign-key.")
    from gigdiff.signing import Signer

    return Signer(sign_cert, sign_key, sign_algorithm)


def parse_post(texts: tuple[str, ...]) -> list[Any]:
    """The steps of --post, or [] without importing anything."""
    if not texts:
        return []
    from gigdiff.postprocess import parse_steps

    return parse_steps(texts)


@click.command(short_help="Show where a picture comes from; draw it again.")
@click.argument("path")
@click.option("--regenerate", metavar="FILE", help="Draw it again into FILE and compare the pixels.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
@click.option("--overwrite", is_flag=True, help="Replace an existing FILE.")
@click.option("--device", help="cpu, cuda, mps. [default: the best there is]")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def inspect(
    path: str, regenerate: str | None, as_json: bool, overwrite: bool, device: str | None, verbose: bool
) -> None:
    """Show prompt, seed, model, settings, marking, watermark and signature of a picture file.

    With --regenerate it is drawn again from them; of a PNG the pixels are then the same, bit for bit.
    """
    from gigdiff.inspection import inspect_file

    sections = inspect_file(path)
    if as_json:
        import json

        click.echo(json.dumps(sections, ensure_ascii=False, indent=2))
    else:
        for section, rows in sections.items():
            click.echo(section)
            width = max((len(name) for name in rows), default=0)
            for name, text in rows.items():
                click.echo(f"  {name.ljust(width)}  " + text.replace("\n", "\n" + " " * (width + 4)))
            if not rows:
                click.echo("  nothing")
    if regenerate is not None:
        _regenerate(path, regenerate, overwrite, device)


def _regenerate(path: str, target: str, overwrite: bool, device: str | None) -> None:
    import numpy as np
    from PIL import Image

    from gigdiff.images import check_writable
    from gigdiff.inspection import redraw
    from gigdiff.provenance import save

    check_writable(target, overwrite)
    picture, fields = redraw(path, device)
    # The loss of a JPEG or WebP is the same where quality and Pillow's version are.
    again = save(target, picture, picture.info, overwrite=overwrite, watermark="watermark" in fields)
    with Image.open(path) as before, Image.open(again) as after:
        old, new = np.asarray(before.convert("RGB")), np.asarray(after.convert("RGB"))
    if old.shape == new.shape and bool((old == new).all()):
        click.echo(f"{again}  identical: all {old.shape[0] * old.shape[1]:,} pixels are the same")
        return
    if old.shape != new.shape:
        raise InputError(f'"{again}" is {new.shape[:2]} and "{path}" {old.shape[:2]}: it was resized after drawing.')
    differing = int((old != new).any(axis=-1).sum())
    most = int(np.abs(old.astype(int) - new.astype(int)).max())
    click.echo(f"{again}  not identical: {differing:,} pixels differ, by at most {most} of 255")


@click.command(short_help="Edit a picture that is there.")
@click.argument("image")
@click.argument("prompt", required=False)
@click.option("--mask", "mask_image", help="Draw anew where this picture of the same size is white.")
@click.option("--colour", "--color", help='Recolour the product: "navy", "dark red", "#102040".')
@click.option("--reference", "reference_image", help="Take this picture's colours and contrast.")
@click.option("--background", help='Another background: "white", a colour, or a file.')
@click.option("--aspect-ratio", help='Draw what the picture lacks to "square", "4:5", "16:9".')
@click.option("--strength", type=float, help="Above 0, up to 1: how much is drawn anew. [default: by the edit]")
@click.option("--num-resample-steps", type=int, default=3, show_default=True, help="With a mask: more fits in better.")
@click.option("-n", "--num-images-per-prompt", type=int, default=1, show_default=True, help="Pictures to make.")
@click.option("--seed", type=int, help="Seed of the first, the next has seed + 1. [default: drawn and reported]")
@click.option("-o", "--output", help="File, or folder. [default: beside the picture, IMAGE-edited.png]")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@click.option("-m", "--model", default="mini", show_default=True, help="Embedded model, folder or hub id.")
@click.option("--negative-prompt", help="What to steer away from; needs a guidance scale above 1.")
@click.option("--steps", "--num-inference-steps", type=int, help="Denoising steps, 1 to 1000. [default: the model's]")
@click.option("--guidance-scale", "--guidance", type=float, help="0 to 100, 1 = off. [default: the model's]")
@click.option("--device", help="cpu, cuda, mps. [default: the best there is]")
@saving_options
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def edit(image: str, prompt: str | None, **options: Any) -> None:
    """Edit a picture, for example:

    \b
    gigdiff edit coat.jpg "the same coat in navy"
    gigdiff edit coat.jpg "a button" --mask mask.png
    gigdiff edit coat.jpg "red wool coat" --strength 0.5 -n 4
    gigdiff edit coat.jpg --background white --post pad:ratio=4:5
    """
    _edit(image, prompt, **options)


def _edit(
    image: str,
    prompt: str | None,
    *,
    num_images_per_prompt: int,
    seed: int | None,
    output: str | None,
    overwrite: bool,
    steps: int | None,
    upscaler: str | None,
    upscale: bool | None,
    post: tuple[str, ...],
    watermark: bool,
    sign_cert: str | None,
    sign_key: str | None,
    sign_algorithm: str,
    verbose: bool,
    **settings: Any,
) -> None:
    from gigdiff.api import draw_seed
    from gigdiff.editing import edit as edit_picture
    from gigdiff.generators.request import check_integer
    from gigdiff.lean_imports import lean_imports
    from gigdiff.postprocess import postprocess
    from gigdiff.pretrained import EMBEDDED
    from gigdiff.provenance import save

    signer, chosen = signer_of(sign_cert, sign_key, sign_algorithm), parse_post(post)
    count = check_integer("num_images_per_prompt", num_images_per_prompt, 1, 1000)
    first = draw_seed() if seed is None else seed
    paths = _outputs(output, image, "edited", [first + j for j in range(count)], overwrite)
    with lean_imports(compiles=settings["model"] not in EMBEDDED):
        made = edit_picture(
            image,
            prompt,
            num_images_per_prompt=count,
            seed=first,
            num_inference_steps=steps,
            upscale=upscaler if upscaler is not None else upscale,
            **settings,
        )
    notes: dict[str, None] = {}
    for path, picture in zip(paths, made if isinstance(made, list) else [made], strict=True):
        done = postprocess(picture, chosen) if chosen else picture
        save(path, done, done.info, overwrite=overwrite, watermark=watermark, signer=signer)
        by = f"  {done.info['model']}  seed {done.info['seed']}" if "seed" in done.info else ""
        click.echo(f"{path}  {done.height} x {done.width} px, {done.info['edit']}{by}")
        notes |= dict.fromkeys(filter(None, str(done.info.get("notes", "")).splitlines()))
    for note in notes:
        click.echo(f"gigdiff: note: {note}", err=True)


@click.command(short_help="Enlarge pictures.")
@click.argument("images", nargs=-1, required=True)
@click.option("-m", "--model", default="mini-upscaler", show_default=True, help="Name, folder, or a file for spandrel.")
@click.option("--fidelity", type=float, default=0.5, show_default=True, help="1 = true to the pixels, 0 = sharp.")
@click.option("-o", "--output", help="File, or folder. [default: beside each picture, IMAGE-large.png]")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@click.option("--device", help="cpu, cuda, mps. [default: the best there is]")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def upscale(
    images: tuple[str, ...],
    model: str,
    fidelity: float,
    output: str | None,
    overwrite: bool,
    device: str | None,
    verbose: bool,
) -> None:
    """Enlarge pictures four times each way, for example: gigdiff upscale out/*.png --output large/"""
    from gigdiff.generators.request import check_number
    from gigdiff.lean_imports import lean_imports
    from gigdiff.pictures import open_picture
    from gigdiff.pretrained import UPSCALERS
    from gigdiff.provenance import save
    from gigdiff.upscaling import keep_upscaler
    from gigdiff.upscaling import upscale as enlarge

    if output is not None and Path(output).suffix and len(images) > 1:
        raise InputError(f'--output "{output}" is one file for {len(images)} pictures; give a folder.')
    paths = [_outputs(output, image, "large", [0], overwrite)[0] for image in images]
    if len(set(paths)) < len(paths):
        raise InputError("two of the pictures have the same name; give them to separate calls.")
    if model in UPSCALERS:
        open_picture(images[0])  # mistakes are said before the seconds that loading takes
        check_number("fidelity", fidelity, 0, 1, "1 is faithful")
        with lean_imports(compiles=False):
            keep_upscaler(model, fidelity, device)  # `enlarge` finds it again
    for image, path in zip(images, paths, strict=True):
        large = enlarge(image, model=model, fidelity=fidelity, device=device)
        save(path, large, large.info, overwrite=overwrite)  # type: ignore[union-attr, arg-type]
        click.echo(f"{path}  {large.height} x {large.width} px")  # type: ignore[union-attr]


def _outputs(output: str | None, source: str, suffix: str, seeds: list[int], overwrite: bool) -> list[Path]:
    """Where the pictures made from `source` go, each known to be writable."""
    from gigdiff.images import check_writable
    from gigdiff.pictures import SUFFIXES

    stem = f"{Path(source).stem}-{suffix}"
    target = Path(output).expanduser() if output is not None else Path(source).parent
    if target.suffix.lower() in SUFFIXES and not target.is_dir():
        if len(seeds) > 1:
            raise InputError(f'--output "{output}" is one file for {len(seeds)} pictures; give a folder.')
        return [check_writable(target, overwrite)]
    names = [f"{stem}-seed{seed}.png" for seed in seeds] if len(seeds) > 1 else [f"{stem}.png"]
    return [check_writable(target / name, overwrite) for name in names]


COMMANDS: tuple[click.Command, ...] = (edit, upscale, inspect)
