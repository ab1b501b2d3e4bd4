"""A run's surroundings: prefetching, the JSONL log, and stopping politely."""

from __future__ import annotations

import ctypes
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, ProjectConfiguration
from torch.utils.data import DataLoader, Dataset

from gigdiff.errors import InputError, NumericalError

__all__ = [
    "JsonLines",
    "StopSignal",
    "check_finite",
    "compiles",
    "keep_freed_memory",
    "prefetched",
    "records_graphs",
    "start_accelerator",
    "start_cpu_processes",
    "threads_left_idle",
]

Item = TypeVar("Item")


def prefetched(
    steps: range, load: Callable[[int], Item], ahead: int = 2, workers: int = 0
) -> Iterator[tuple[int, Item]]:
    """(step, load(step)) in order, with `ahead` of them being loaded while the model works.

    Args:
        load: a function of the step alone, on the CPU.
        ahead: how many, of each worker.
        workers: processes that load; 0: a thread, which is enough where a step takes long.

    Raises:
        InputError: workers on a system that can't fork. What `load` raises.
    """
    if workers:
        if "fork" not in multiprocessing.get_all_start_methods():
            raise InputError(f"--dataloader_num_workers {workers}: this system can't fork; leave it out")
        # An identity for `collate_fn`: torch's own makes lists of tuples.
        yield from DataLoader(
            _Loaded(steps, load),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=ahead,
            collate_fn=lambda item: item,
            worker_init_fn=_outlive_sigterm,
            multiprocessing_context="fork",
        )
        return
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = [(step, pool.submit(load, step)) for step in steps[:ahead]]
        for following in [*steps[ahead:], *[None] * ahead]:
            if not waiting:
                return
            step, future = waiting.pop(0)
            if following is not None:
                waiting.append((following, pool.submit(load, following)))
            yield step, future.result()


def _outlive_sigterm(_worker: int) -> None:
    """SLURM sends SIGTERM to every process of a job: the run still has to save, and then stops its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Loaded(Dataset[tuple[int, Item]]):
    """(step, load(step)) of every step, for torch's DataLoader."""

    def __init__(self, steps: range, load: Callable[[int], Item]) -> None:
        self.steps, self.load = steps, load

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> tuple[int, Item]:
        return self.steps[index], self.load(self.steps[index])


class JsonLines:
    """A log of one JSON object a line, each with its `step`; lines past the step a run resumes from are dropped."""

    def __init__(self, path: str | Path, resume_step: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if self.path.exists() and resume_step > 0:
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= resume_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError):  # a line cut short by a kill
                    continue
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self.path)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append {"step": step, **values}, flushed at once.

        JSON has no infinity and no NaN (float16 searches its scale by infinite gradients): they are null.
        """
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}, allow_nan=False) + "\n")


class StopSignal:
    """After `install`, SIGTERM and the first Ctrl-C only set `requested`: the loop saves a checkpoint and ends."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handle)
            signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:  # a second Ctrl-C means now
            raise KeyboardInterrupt
        self.requested = True


def start_accelerator(mixed_precision: str, report_to: str, out: Path, **options: Any) -> Accelerator:
    """The run's Accelerator, with a tracker's files (`report_to`, or "none") in `out`; on a CPU it takes all cores and
    keeps the memory that it has had, see `keep_freed_memory`.

    Args:
        options: more of Accelerator's own.
    """
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        log_with=None if report_to == "none" else report_to,
        project_config=ProjectConfiguration(str(out)),
        **options,
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    threads = threads_left_idle() if accelerator.device.type == "cpu" else 0
    if threads and accelerator.num_processes == 1:
        torch.set_num_threads(threads)
        print(f"{threads} threads (accelerate launch had left one; OMP_NUM_THREADS=N changes it)", file=sys.stderr)
    return accelerator


def compiles(accelerator: Accelerator) -> bool:
    """Whether Accelerate was asked to compile networks: that goes before what a script would do to them."""
    return bool(accelerator.state.dynamo_plugin.backend != DynamoBackend.NO)


def records_graphs(asked: bool, accelerator: Accelerator) -> bool:
    """Whether networks' passes are recorded as CUDA graphs: where `asked` for, on one GPU, and not compiled."""
    one_gpu = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    return asked and one_gpu and not compiles(accelerator)


def keep_freed_memory() -> bool:
    """Let the next step have what this one frees, if the C library is glibc. The process never shrinks then.

    By itself glibc maps a tensor of 32 MB and more anew each time and gives it back when it is freed; the kernel clears
    its pages one by one meanwhile, which can take longer than the arithmetic on them (docs/training.md). What the
    environment says of glibc's allocator goes first.

    Returns:
        Whether it was done.
    """
    chosen = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(n.startswith("MALLOC_") for n in os.environ)
    if chosen or sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    return library.mallopt(mmap_threshold, 2**30) == 1 and library.mallopt(trim_threshold, 2**31 - 1) == 1


def threads_left_idle() -> int:
    """How many threads this process should have, where `accelerate launch` gave it one that nobody asked for; else 0.

    Accelerate (1.15) sets OMP_NUM_THREADS=1 for a process on a CPU unless --num_processes is given; training then takes
    twice as long on two cores. A number in the launcher's own environment or command line is left alone.
    """
    if os.environ.get("OMP_NUM_THREADS") != "1" or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return 0
    import psutil  # accelerate needs it too

    try:
        launcher = psutil.Process(os.getppid())
        words, asked = " ".join(launcher.cmdline()), launcher.environ().get("OMP_NUM_THREADS")
    except psutil.Error:
        return 0
    if "accelerate" not in words or asked or re.search(r"--num[_-]cpu[_-]threads", words):
        return 0
    cores = psutil.cpu_count(logical=False) or 1
    return cores if cores > 1 else 0


def check_finite(value: float, step: int, learning_rate: float, gradient: bool = False) -> None:
    """Stop before a NaN reaches the weights.

    Args:
        value: the loss or, with `gradient`, the norm of its gradient.

    Raises:
        NumericalError: naming step and learning rate.
    """
    if not math.isfinite(value):
        what = "norm of the gradient" if gradient else "loss"
        kernel = " If the loss was fine, it may be the kernel: --attention math." if gradient else ""
        raise NumericalError(
            f"the {what} is {value} at step {step} (learning rate {learning_rate:g}). The last checkpoint is "
            f"untouched: continue from it with --resume_from_checkpoint latest and a lower --learning_rate.{kernel}"
        )


def start_cpu_processes(script: str, arguments: Sequence[str]) -> None:
    """Make `accelerate launch --cpu --num_processes N` start N processes; a script calls it before anything else.

    Accelerate (1.15) starts one there, without a word, and so trains with a batch N times smaller. What it leaves
    behind is a MASTER_ADDR without a WORLD_SIZE; then this process becomes torch's launcher of N. Otherwise nothing
    happens.

    Raises:
        InputError: it was so started, and N can't be told.
    """
    if "MASTER_ADDR" not in os.environ or "WORLD_SIZE" in os.environ or os.environ.get("ACCELERATE_USE_CPU") != "True":
        return
    import psutil  # accelerate needs it too

    words = " ".join(psutil.Process(os.getppid()).cmdline())
    match = re.search(r"--num[_-]processes[= ](\d+)", words)
    if match is None:
        raise InputError(
            "accelerate launch --cpu starts a single process here. Give --num_processes 1, or start several with: "
            f"ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node N {script}"
        )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", match[1]]
    os.execv(sys.executable, [*launcher, script, *arguments])
