"""Checkpoints that a kill at any moment can't spoil.

A checkpoint is a folder `checkpoint-<step>` of safetensors files and a `state.json`. It is written under a temporary
name, flushed to disk and renamed, so a folder with the final name is always complete; older ones are deleted only after
that. There is no random state in it: all randomness is a function of the step (see gigdiff/rng.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gigdiff.errors import InputError, ModelMismatchError, ModelNotFoundError, OutputError
from gigdiff.fit.ema import Ema

__all__ = [
    "find_checkpoint",
    "load_checkpoint",
    "load_optimizer",
    "optimizer_tensors",
    "restore_training",
    "save_checkpoint",
]

_NAME = re.compile(r"checkpoint-(\d+)")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's state as named tensors: `<parameter index>.<state name>` (pickle-free, unlike torch.save)."""
    tensors = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            # bitsandbytes puts its bytes into a dict of their own, out of FSDP's sight, with one table for all of
            # them, which a safetensors file refuses as shared. It takes them back without the dict.
            inside = value.items() if isinstance(value, dict) else [(name, value)]
            for key, tensor in inside:
                kept = torch.as_tensor(tensor).detach().cpu().contiguous()
                tensors[f"{index}.{key}"] = kept.clone() if isinstance(value, dict) else kept
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put `optimizer_tensors` back; the parameter groups (learning rate, ...) stay as the caller constructed them."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    known = {index for group in groups for index in group["params"]}
    if not set(state) <= known:
        raise ModelMismatchError(
            f"the checkpoint's optimizer has state for {len(state)} parameters, this run trains {len(known)}: "
            "it belongs to another model or another choice of trained parts. Start with another --output_dir."
        )
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # Fused AdamW walks parameter and moments side by side in memory: a channels_last parameter needs moments laid out
    # the same way, and a file has only the plain layout. Without this the moments of convolutions are scrambled.
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems can't sync a folder
        pass
    finally:
        os.close(descriptor)


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    *,
    limit: int | None = None,
    headers: Mapping[str, Mapping[str, str]] | None = None,
) -> Path:
    """Write `checkpoint-<step>` and then delete the oldest beyond `limit`.

    Args:
        output_dir: the run's folder.
        step: optimizer steps done.
        tensors: file stem -> named tensors, one safetensors file each.
        state: JSON-able; `step` is added.
        limit: how many complete checkpoints to keep (None keeps all).
        headers: file stem -> header of its safetensors file, where it needs one.

    Raises:
        OutputError: the disk is full or the folder can't be written. Earlier checkpoints are untouched.
    """
    root = Path(output_dir)
    final, temporary = root / f"checkpoint-{step}", root / f".checkpoint-{step}.tmp-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".checkpoint-*.tmp-*"):  # of a killed process
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        for stem, named in tensors.items():
            file = temporary / f"{stem}.safetensors"
            header = {"metadata": dict(headers[stem])} if headers and stem in headers else {}
            save_file({k: v.detach().cpu().contiguous() for k, v in named.items()}, file, **header)
            _fsync(file)
        file = temporary / "state.json"
        file.write_text(json.dumps({**state, "step": step}, indent=2), encoding="utf-8")
        _fsync(file)
        if final.exists():  # the same step again, after a resume from an earlier one
            shutil.rmtree(final)
        temporary.rename(final)
        if os.name == "posix":
            _fsync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(
            f"could not write {final}: {error}. Earlier checkpoints are untouched; free some disk space or give "
            "another --output_dir, then continue with --resume_from_checkpoint latest."
        ) from error
    if limit is not None:
        for _, old in _complete(root)[: -max(1, limit)]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _complete(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints that have a readable state.json, oldest first."""
    found = []
    for path in root.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        with contextlib.suppress(OSError, ValueError):
            if json.loads((path / "state.json").read_text(encoding="utf-8"))["step"] == int(match[1]):
                found.append((int(match[1]), path))
                continue
        warnings.warn(f"{path} is incomplete and was skipped", stacklevel=3)
    return sorted(found)


def find_checkpoint(resume_from: str | None, output_dir: str | Path) -> Path | None:
    """What `--resume_from_checkpoint` means: None, "latest" (None when there is none yet), or a folder.

    Raises:
        ModelNotFoundError: a named checkpoint that isn't there or isn't complete.
    """
    if resume_from is None:
        return None
    root = Path(output_dir)
    complete = _complete(root)
    if resume_from == "latest":
        return complete[-1][1] if complete else None
    for candidate in (Path(resume_from), root / resume_from):
        if (candidate / "state.json").is_file():
            return candidate
    have = ", ".join(path.name for _, path in complete) or "none"
    raise ModelNotFoundError(
        f"--resume_from_checkpoint {resume_from}: no complete checkpoint there. In {root}: {have}. "
        'Use "latest" for the newest.'
    )


def load_checkpoint(folder: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """(state, file stem -> tensors) of a checkpoint folder.

    Raises:
        InputError: a file in it is damaged.
    """
    folder = Path(folder)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{folder} can't be read: {error}. Name an earlier checkpoint with --resume_from_checkpoint."
        ) from error
    return state, tensors


def restore_training(
    folder: str | Path, name: str, model: torch.nn.Module, ema: Ema, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, dict[str, torch.Tensor]]]:
    """Put a checkpoint's model (stored as `name`), averaged weights and optimizer state back.

    Returns:
        The steps done, and all tensors of the checkpoint for whatever else a script keeps.

    Raises:
        ModelMismatchError: it is of another architecture or another script.
    """
    state, tensors = load_checkpoint(folder)
    try:
        model.load_state_dict(tensors[name])
        ema.load(tensors["ema"], state["ema_updates"])
        load_optimizer(optimizer, tensors["optimizer"])
    except (RuntimeError, KeyError) as error:
        raise ModelMismatchError(
            f"{folder} is of another architecture: {str(error)[:300]} Start with another --output_dir, or with the "
            "settings in the run's config.yaml."
        ) from error
    return state["step"], tensors
