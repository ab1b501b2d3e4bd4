"""What the training scripts share: order of data, schedule, averaged weights, checkpoints, log, config."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from gigdiff.errors import InputError, ModelMismatchError, ModelNotFoundError, NumericalError, OutputError
from gigdiff.fit import checkpoint as ck
from gigdiff.fit.config import as_yaml, parse_config
from gigdiff.fit.ema import Ema
from gigdiff.fit.order import positions_of_step, samples_at
from gigdiff.fit.run import JsonLines, StopSignal, check_finite, prefetched
from gigdiff.fit.schedule import learning_rate


def test_each_epoch_sees_every_sample_once_in_its_own_order() -> None:
    stream = samples_at(range(30), 10, seed=3)
    epochs = [stream[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_reads_the_same_global_batches(processes: int) -> None:
    for step in range(5):
        shares = [list(positions_of_step(step, 8 // processes, p, processes)) for p in range(processes)]
        assert [p for share in shares for p in share] == list(range(step * 8, step * 8 + 8))


def test_learning_rate_warms_up_holds_and_decays() -> None:
    rates = [learning_rate(s, peak=1.0, warmup_steps=10, total_steps=100, decay_fraction=0.4) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0
    assert set(rates[10:60]) == {1.0}
    assert all(a > b for a, b in itertools.pairwise(rates[60:]))
    assert rates[80] == pytest.approx(0.505) and rates[-1] < 0.02
    # extendable: before the decay, a longer run is the same run
    longer = [learning_rate(s, peak=1.0, warmup_steps=10, total_steps=200, decay_fraction=0.4) for s in range(60)]
    assert longer == rates[:60]


def test_ema_against_the_recursion_and_applied_to_restores() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema, expected = Ema(model, 0.5), 0.0
    for n in range(8):
        with torch.no_grad():
            model.weight += 1
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1)
    assert ema.shadow["weight"][0, 0].item() == pytest.approx(expected, rel=1e-6)
    with ema.applied_to(model):
        assert model.weight[0, 0].item() == pytest.approx(expected, rel=1e-6)
    assert model.weight[0, 0].item() == 8


def trained(steps: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for step in range(steps):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_optimizer_state_survives_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    trained(3, model, optimizer)
    folder = ck.save_checkpoint(
        tmp_path, 3, {"model": model.state_dict(), "optimizer": ck.optimizer_tensors(optimizer)}, {"note": "x"}
    )
    state, tensors = ck.load_checkpoint(folder)
    assert state == {"note": "x", "step": 3}
    again = torch.nn.Linear(3, 1)
    again.load_state_dict(tensors["model"])
    other = torch.optim.AdamW(again.parameters(), 0.1)
    ck.load_optimizer(other, tensors["optimizer"])
    assert trained(5, again, other) == trained(5, model, optimizer)
    with pytest.raises(ModelMismatchError, match="another model"):
        ck.load_optimizer(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], 0.1), tensors["optimizer"])


def test_moments_of_channels_last_weights_keep_their_layout(tmp_path: Path) -> None:
    """A past bug: fused AdamW read the plain layout of a loaded moment as channels_last, and resumed runs drifted."""

    def new() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model, torch.optim.AdamW(model.parameters(), 0.1, fused=True)

    def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, which: range) -> list[float]:
        losses = []
        for step in which:
            x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))
            loss = model(x.contiguous(memory_format=torch.channels_last)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model, optimizer = new()
    steps(model, optimizer, range(3))
    ck.save_checkpoint(
        tmp_path, 3, {"model": dict(model.state_dict()), "optimizer": ck.optimizer_tensors(optimizer)}, {}
    )
    _, tensors = ck.load_checkpoint(tmp_path / "checkpoint-3")
    again, other = new()
    again.load_state_dict(tensors["model"])
    ck.load_optimizer(other, tensors["optimizer"])
    assert steps(again, other, range(3, 8)) == steps(model, optimizer, range(3, 8))


def save(root: Path, step: int, limit: int | None = None) -> Path:
    return ck.save_checkpoint(root, step, {"model": {"w": torch.full((4,), float(step))}}, {}, limit=limit)


def test_latest_skips_an_incomplete_checkpoint_with_a_warning(tmp_path: Path) -> None:
    assert ck.find_checkpoint("latest", tmp_path) is None
    for step in (5, 10, 20):
        save(tmp_path, step)
    (tmp_path / "checkpoint-20" / "state.json").write_text('{"st')
    with pytest.warns(UserWarning, match="checkpoint-20 is incomplete"):
        assert ck.find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-10"
    with pytest.warns(UserWarning), pytest.raises(ModelNotFoundError, match="checkpoint-5, checkpoint-10"):
        ck.find_checkpoint("checkpoint-7", tmp_path)
    assert ck.find_checkpoint(str(tmp_path / "checkpoint-5"), tmp_path) == tmp_path / "checkpoint-5"
    assert ck.find_checkpoint(None, tmp_path) is None


def test_old_checkpoints_go_only_after_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step, limit=2)

    def full_disk(tensors: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ck, "save_file", full_disk)
        with pytest.raises(OutputError, match="No space left"):
            save(tmp_path, 3, limit=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    save(tmp_path, 3, limit=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    assert ck.load_checkpoint(tmp_path / "checkpoint-3")[1]["model"]["w"].tolist() == [3.0] * 4


def test_a_leftover_of_a_killed_process_is_swept_up_and_never_found(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-2.tmp-999")
    assert ck.find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-1"
    save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match="checkpoint-1"):
        ck.load_checkpoint(folder)


def check_prefetching(workers: int) -> None:
    def loaded(steps: range, load: Callable[[int], Any]) -> list[Any]:
        return list(prefetched(steps, load, workers=workers))

    assert loaded(range(3, 8), lambda s: s * s) == [(s, s * s) for s in range(3, 8)]
    assert loaded(range(0), lambda s: s) == []
    assert loaded(range(1), lambda s: (s, [s])) == [(0, (0, [0]))], "as it was: no tuple became a list"
    with pytest.raises(ZeroDivisionError):
        loaded(range(3), lambda s: 1 // (s - 1))
    processes = {pid for _, pid in loaded(range(4), lambda _: os.getpid())}
    assert len(processes - {os.getpid()}) == workers
    done = []
    for step, pid in prefetched(range(20), lambda _: os.getpid(), workers=workers):
        if pid != os.getpid():
            os.kill(pid, signal.SIGTERM)  # as SLURM sends it to all of a job
        done.append(step)
    assert done == list(range(20)), "the run itself decides when its workers end"


def test_prefetching_keeps_order_and_passes_errors_on() -> None:
    check_prefetching(0)


def test_prefetching_by_processes_does_the_same() -> None:
    """In a process of its own: torch's workers leave a signal handler behind, under which OpenVINO's tests died."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('here', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['here'] = module\n"
        "spec.loader.exec_module(module)\n"
        "module.check_prefetching(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_log_drops_what_a_resumed_run_will_do_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonLines(path)
    for step in range(1, 6):
        log.write(step, {"loss": step / 2})
    path.write_text(path.read_text() + '{"step": 6, "lo')  # killed while writing
    JsonLines(path, resume_step=3).write(4, {"loss": 9})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 1.5}, {"step": 4, "loss": 9},
    ]  # fmt: skip


def test_every_line_of_the_log_is_json_where_a_number_is_not_finite(tmp_path: Path) -> None:
    """float16's first gradient norms are infinite, and strict readers refused the line."""
    log = JsonLines(tmp_path / "log.jsonl")
    log.write(1, {"loss": 0.5, "grad_norm": math.inf, "best": math.nan, "note": "x"})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads(log.path.read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": 0.5, "grad_norm": None, "best": None, "note": "x"}


@pytest.mark.skipif(os.name != "posix", reason="signals to oneself are POSIX")
def test_sigterm_only_asks_to_stop() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        stop = StopSignal().install()
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_stops_the_run(loss: float) -> None:
    check_finite(1.0, 3, 1e-4)
    with pytest.raises(NumericalError, match=r"step 3 .*0\.0001"):
        check_finite(loss, 3, 1e-4)


@dataclasses.dataclass(frozen=True)
class Example:
    """An example.

    Args:
        learning_rate: a number.
        train_data_dir: a folder.
        widths: some integers.
    """

    learning_rate: float = 1e-4
    train_data_dir: str | None = None
    widths: tuple[int, ...] = (1, 2)


def test_config_files_flags_and_their_order(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 0.5\nwidths: [3, 4, 5]\n")
    assert parse_config(Example, "x", []) == Example()
    assert parse_config(Example, "x", ["--config", str(file)]) == Example(0.5, None, (3, 4, 5))
    both = parse_config(Example, "x", ["--config", str(file), "--learning_rate=0.25", "--train_data_dir", "d"])
    assert both == Example(0.25, "d", (3, 4, 5))
    (tmp_path / "again.yaml").write_text(as_yaml(both))
    assert parse_config(Example, "x", [f"--config={tmp_path / 'again.yaml'}"]) == both


def test_unknown_keys_and_flags_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match='did you mean "learning_rate"'):
        parse_config(Example, "x", ["--learning-rat", "1"])
    file = tmp_path / "c.yaml"
    file.write_text("train_data: d\n")
    with pytest.raises(InputError, match=r'c\.yaml.*did you mean "train_data_dir"'):
        parse_config(Example, "x", ["--config", str(file)])
    with pytest.raises(InputError, match="learning_rate"):
        parse_config(Example, "x", ["--learning_rate", "fast"])
    with pytest.raises(InputError, match="can't be read"):
        parse_config(Example, "x", ["--config", str(tmp_path / "none.yaml")])


@pytest.mark.skipif((psutil.cpu_count(logical=False) or 1) < 2, reason="needs two cores")
@pytest.mark.parametrize(
    ("words", "asked", "expected"), [((), None, None), ((), "1", 1), (("--num_cpu_threads_per_process", "1"), None, 1)]
)
def test_accelerate_launch_leaves_no_core_idle_unless_asked_to(tmp_path, words, asked, expected):
    """Accelerate sets OMP_NUM_THREADS=1 for a CPU run: `mini` once trained on one of two cores unnoticed."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, pathlib\nfrom gigdiff.fit.run import start_accelerator\n"
        f"start_accelerator('no', 'none', pathlib.Path({str(tmp_path)!r}))\nprint(torch.get_num_threads())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | (
        {"OMP_NUM_THREADS": asked} if asked else {}
    )
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *words, str(script)],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    assert int(done.stdout) == (expected or psutil.cpu_count(logical=False))


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize(("environment", "kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "33554432"}, False)])
def test_memory_is_kept_from_step_to_step_unless_the_environment_says_otherwise(environment, kept) -> None:
    script = """
import resource, torch
from gigdiff.fit.run import keep_freed_memory
torch.set_num_threads(1)
print(int(keep_freed_memory()))
for _ in range(3):
    torch.empty(48 * 2**20, dtype=torch.uint8).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.empty(48 * 2**20, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    words = [sys.executable, "-c", script]
    run = subprocess.run(words, env=plain | environment, capture_output=True, text=True, check=True)
    done, faults = map(int, run.stdout.split())
    assert bool(done) == kept
    assert (faults < 100) == kept  # of 122,880 pages, or 240 of 2 MB
