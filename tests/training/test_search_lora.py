"""training/search_lora.py: a study that goes on after a kill, prunes, and ends with flags that train."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def script() -> Any:
    """The script as it is when launched: with training/ first on the path."""
    sys.path.insert(0, str(ROOT / "training"))
    try:
        spec = importlib.util.spec_from_file_location("search_lora", ROOT / "training" / "search_lora.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["search_lora"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def test_flags_of_the_search_and_of_the_run_are_told_apart(script: Any) -> None:
    words = ["--search.trials", "3", "--rank", "4", "--search.ranks=[2, 4]"]
    assert script.split_arguments(words) == (["--trials", "3", "--ranks=[2, 4]"], ["--rank", "4"])


def test_a_study_resumes_prunes_and_keeps_the_best_file(
    script: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Around a stand-in for the run: the loss is least at rank 4 and 1e-3, and falls over the run."""
    import math

    import optuna

    seen: list[tuple[int, float]] = []

    def finetune(config: Any, on_validation: Any) -> dict[str, Any]:
        loss = abs(math.log(config.learning_rate / 1e-3)) + abs(config.rank - 4) + 1
        seen.append((config.rank, config.learning_rate))
        assert config.lora_alpha == config.rank
        (Path(config.output_dir) / "best").mkdir(parents=True)
        for step in (10, 20):
            on_validation(step * config.max_train_steps // 20, loss / step)
        return {"best_validation_loss": loss / 20}

    monkeypatch.setattr(script, "finetune", finetune)
    base = script.LoraConfig(output_dir=str(tmp_path))
    settings = script.SearchConfig(trials=6, ranks=(4, 64), steps=(100,), startup_trials=2)
    first = script.search(settings, base)
    assert first["trials"] == 6 and len(seen) == 6
    # a killed process leaves a trial that runs for ever
    study = optuna.load_study(study_name="lora", storage=f"sqlite:///{tmp_path / 'study.db'}")
    torn = study.ask()
    rate = torn.suggest_float("learning_rate", 1e-4, 3e-3, log=True)
    torn.suggest_categorical("rank", [4, 64])
    torn.suggest_categorical("max_train_steps", [100])
    result = script.search(script.SearchConfig(trials=16, ranks=(4, 64), steps=(100,), startup_trials=2), base)
    assert result["trials"] == 16 and len(seen) == 16
    assert any(given == pytest.approx(rate) for _, given in seen[6:])  # it was run again
    assert result["params"]["rank"] == 4 and result["pruned"] > 0
    assert Path(result["lora"]).is_dir() and len(list(tmp_path.glob("trial-*"))) <= 2
    assert script.search(settings, base)["trials"] == 16 and len(seen) == 16


@pytest.mark.slow
def test_the_real_thing(script: Any, tiny_model: Path, tmp_path: Path, capsys: Any) -> None:
    flags = [
        "--search.trials", "2", "--search.ranks", "[2]", "--search.steps", "[2]", "--pretrained_model_name_or_path",
        str(tiny_model), "--aspect_ratio_buckets", "false", "--output_dir", str(tmp_path / "out"), "--cache_dir",
        str(tmp_path / "cache"), "--validation_steps", "1", "--num_inference_steps", "1", "--max_train_samples", "8",
    ]  # fmt: skip
    script.main(flags)
    out = capsys.readouterr().out
    assert "accelerate launch training/finetune_lora.py --rank 2" in out
