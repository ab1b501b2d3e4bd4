from __future__ import annotations

import urllib.error
import urllib.request

import pytest

import gigdiff
from gigdiff import doctor
from gigdiff.cli import main


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """Decides what the hub answers; no test asks the real one."""
    from huggingface_hub import constants

    def answer(outcome: Exception | None, offline: bool = False) -> dict[str, str]:
        def urlopen(request: object, timeout: float) -> object:
            assert timeout <= 5 and not offline
            if outcome:
                raise outcome
            return open(__file__)

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return dict(doctor._hub())

    return answer


def test_hub(hub):
    assert hub(None)["reachable"].startswith("yes")
    assert hub(urllib.error.HTTPError("u", 403, "m", {}, None))["reachable"].startswith("yes")  # type: ignore[arg-type]
    assert "no, " in hub(urllib.error.URLError("no route"))["reachable"]
    assert "embedded models and local folders work" in hub(TimeoutError("timed out"))["reachable"]
    assert hub(None, offline=True)["reachable"].startswith("not asked: HF_HUB_OFFLINE")


def test_everything_is_reported(hub, capsys):
    hub(None, offline=True)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "gigdiff",
        gigdiff.__version__,
        "torch",
        "device",
        "dtype",
        "attention",
        "sdpa_flash",
        "sliced",
        "text encoder",
        "mini",
        "hub",
    ):
        assert word in shown


def test_one_broken_part_does_not_hide_the_others(hub, monkeypatch):
    hub(None, offline=True)

    def broken() -> doctor.Rows:
        raise ImportError("libcudart.so:\n not found")

    monkeypatch.setattr(doctor, "_device", broken)
    found = doctor.findings()
    assert found["device"] == [("failed", "ImportError: libcudart.so: not found")]
    assert dict(found["versions"])["gigdiff"] == gigdiff.__version__


def test_missing_packages_come_with_the_command(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    found = dict(doctor._versions())
    assert 'pip install "gigdiff[cuda]"' in found["xformers"] and found["torch"].startswith("MISSING")
