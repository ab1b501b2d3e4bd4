"""The number format is chosen by what the device computes in, never by a guess."""

from __future__ import annotations

import pytest
import torch

from gigdiff import precision
from gigdiff.errors import InputError
from gigdiff.precision import embedded_dtype, training_precision


@pytest.fixture(params=[True, False], ids=["bf16 CPU", "CPU without bf16"])
def has_bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: request.param)
    return bool(request.param)


def test_auto_takes_bfloat16_only_where_the_cpu_has_it(has_bfloat16: bool) -> None:
    assert training_precision("auto") == ("bf16" if has_bfloat16 else "no")
    assert embedded_dtype(torch.device("cpu")) == (torch.bfloat16 if has_bfloat16 else torch.float32)


def test_an_explicit_choice_is_obeyed_and_emulation_is_said(
    has_bfloat16: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training_precision("no") == "no"
    assert capsys.readouterr().err == ""
    assert training_precision("bf16") == "bf16"
    assert ("no bfloat16 instructions" in capsys.readouterr().err) == (not has_bfloat16)


def test_what_cannot_be_is_an_error_that_names_the_flag(has_bfloat16: bool) -> None:
    with pytest.raises(InputError, match="--mixed_precision fp16 needs a GPU"):
        training_precision("fp16")
    with pytest.raises(InputError, match=r"bf61.*bf16"):
        training_precision("bf61")


def test_this_machine_is_not_asked_to_emulate() -> None:
    """Whatever CPU runs this: in the chosen format a product takes at most a few times what float32 takes."""
    import time

    chosen = embedded_dtype(torch.device("cpu"))

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(512, 512, dtype=torch.float32).to(dtype)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - started)
        return min(times)

    assert seconds(chosen) < 5 * seconds(torch.float32)
