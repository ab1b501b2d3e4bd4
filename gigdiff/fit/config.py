"""One frozen dataclass a script; YAML and command line map onto it one to one, through jsonargparse."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from gigdiff.errors import InputError, MissingDependencyError, nearest

__all__ = ["as_yaml", "parse_config"]

Config = TypeVar("Config")


def _field_names(config_class: type, prefix: str = "") -> list[str]:
    return [prefix + f.name for f in dataclasses.fields(config_class)]


def parse_config(config_class: type[Config], description: str, argv: Sequence[str] | None = None) -> Config:
    """Parse `--config FILE.yaml` and `--field value` overrides (later ones win) into `config_class`.

    Raises:
        InputError: an unknown key (the nearest known one is named), a value of the wrong type, an unreadable file.
        SystemExit: for --help and --print_config.
    """
    try:
        from jsonargparse import ArgumentError, ArgumentParser
    except ImportError as error:
        raise MissingDependencyError("training needs jsonargparse: pip install 'gigdiff[train]'") from error

    import yaml

    arguments = list(sys.argv[1:] if argv is None else argv)
    known = _field_names(config_class)
    for i, argument in enumerate(arguments):
        name, has_value, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name not in {*known, "config", "help", "print_config"}:
            raise InputError(f"unknown flag {argument.split('=')[0]}: {nearest(name, known)}")
        if name == "config" and argument.startswith("--"):
            path = Path(value if has_value else (arguments[i + 1] if i + 1 < len(arguments) else ""))
            try:
                keys = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            except (OSError, yaml.YAMLError) as error:
                raise InputError(f"--config {path} can't be read: {error}") from error
            for key in keys:
                if key not in known:
                    raise InputError(f'{path}: unknown key "{key}": {nearest(str(key), known)}')
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file, see configs/")
    parser.add_class_arguments(config_class, as_group=True)
    try:
        namespace = parser.parse_args(arguments)
    except ArgumentError as error:
        raise InputError(f"{' '.join(str(error).split())} See --help.") from error
    values: dict[str, Any] = {name: namespace[name] for name in known}
    return config_class(**values)


def as_yaml(config: Any) -> str:
    """The resolved config as YAML that `--config` reads back."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
