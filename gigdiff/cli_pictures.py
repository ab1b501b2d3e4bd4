"""Commands for a picture that is there already: edit, upscale, inspect. `gigdiff.cli` adds them to `gigdiff`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gigdiff.errors import InputError

__all__ = ["COMMANDS", "saving_options", "signer_of"]


def saving_options(command: Any) -> Any:
    """Options of every command that writes a picture: watermark and signature."""
    for option in reversed(
        [
            click.option("--watermark", is_flag=True, help="Put the invisible watermark in."),
            click.option("--sign-cert", help="Sign with this certificate chain (PEM, C2PA)."),
            click.option("--sign-key", help="Its private key (PEM)."),
            click.option("--sign-algorithm", default="es256", show_default=True, help="By the kind of key."),
        ]
    ):
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
    from gigdiff.provenance import metadata, save

    check_writable(target, overwrite)
    result, fields = redraw(path, device)
    again = save(
        target, result.images[0], metadata(result, 0), overwrite=overwrite, watermark="watermark" in fields
    )  # the size of a JPEG's or WebP's loss is the same where quality and version are
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


COMMANDS: tuple[click.Command, ...] = (inspect,)


def output_path(output: str | None, source: str, suffix: str) -> Path:
    """Where an edited picture goes: what was asked for, or beside the source under its name with `suffix`."""
    if output is not None:
        return Path(output).expanduser()
    path = Path(source)
    return path.with_name(f"{path.stem}-{suffix}.png")
