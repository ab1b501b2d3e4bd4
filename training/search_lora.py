"""Search rank, learning rate and steps of a LoRA by its held-out loss, with Optuna (pip install 'gigdiff[search]').

    python training/search_lora.py --config configs/lora_mini.yaml --train_data_dir photos/ --output_dir runs/search
    python training/search_lora.py --search.trials 40 --search.ranks "[4, 8, 16]" ...

Every other flag is finetune_lora.py's. Trials that are worse at a validation than half of the earlier ones are pruned
(Optuna's median pruner). The study lies in <output_dir>/study.db: the same command goes on after a kill, and the trial
that was cut off is run again. Ends with the best values as flags of finetune_lora.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from finetune_lora import DEFAULT_CONFIG, finetune  # the script beside this one

from gigdiff.errors import GigdiffError, InputError, MissingDependencyError, NumericalError
from gigdiff.fit.config import parse_config
from gigdiff.fit.lora_config import LoraConfig

PREFIX = "--search."


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """What is searched; flags are --search.<name>.

    Args:
        trials: in all, those of earlier runs of this study included.
        ranks: to choose from; lora_alpha is set to the rank, so that the learning rate means the same for each.
        learning_rate_low: of a log-uniform law.
        learning_rate_high: of a log-uniform law.
        steps: max_train_steps to choose from.
        startup_trials: trials that are never pruned.
        seed: of Optuna's sampler.
        keep_files: keep every trial's folder; otherwise only the best one's LoRA.
    """

    trials: int = 20
    ranks: tuple[int, ...] = (4, 8, 16, 32)
    learning_rate_low: float = 1e-4
    learning_rate_high: float = 3e-3
    steps: tuple[int, ...] = (100, 200, 400)
    startup_trials: int = 5
    seed: int = 0
    keep_files: bool = False


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(flags of the search with the prefix taken off, flags of the run)."""
    ours: list[str] = []
    theirs: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith(PREFIX):
            ours.append("--" + argument.removeprefix(PREFIX))
            if "=" not in argument:
                ours.append(next(rest, ""))
        else:
            theirs.append(argument)
    return ours, theirs


def search(search_config: SearchConfig, base: LoraConfig) -> dict[str, Any]:
    """Run the study to `trials` finished trials.

    Returns:
        params, value (held-out loss), trials, pruned, lora: the best trial's file.

    Raises:
        MissingDependencyError: no Optuna. InputError: nothing to choose from.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingDependencyError("the search needs Optuna: pip install 'gigdiff[search]'") from error
    if not search_config.ranks or not search_config.steps:
        raise InputError("--search.ranks and --search.steps need at least one value each.")
    if not 0 < search_config.learning_rate_low <= search_config.learning_rate_high:
        raise InputError("--search.learning_rate_low must lie above 0 and not above --search.learning_rate_high.")
    out = Path(base.output_dir)
    out.mkdir(parents=True, exist_ok=True)

    def run(trial: optuna.Trial) -> float:
        rank = trial.suggest_categorical("rank", list(search_config.ranks))
        rate = trial.suggest_float(
            "learning_rate", search_config.learning_rate_low, search_config.learning_rate_high, log=True
        )
        steps = trial.suggest_categorical("max_train_steps", list(search_config.steps))
        folder = out / f"trial-{trial.number:04d}"
        config = dataclasses.replace(
            base,
            rank=rank,
            lora_alpha=float(rank),
            learning_rate=rate,
            max_train_steps=steps,
            output_dir=str(folder),
            resume_from_checkpoint=None,
            checkpointing_steps=max(steps, base.checkpointing_steps),
            preview_steps=10 * steps,  # only before and at the end
        )

        def on_validation(step: int, loss: float) -> None:
            # by the share of the run, so that runs of different length are compared at the same stage
            trial.report(loss, step=round(100 * step / steps))
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            result = finetune(config, on_validation)
        except NumericalError as error:  # too high a learning rate is a bad trial, not the end of the search
            print(f"trial {trial.number}: {error}", file=sys.stderr)
            raise optuna.TrialPruned from error
        if result["best_validation_loss"] is None:
            raise InputError("the search needs held-out photos, and all photos are of one product.")
        trial.set_user_attr("lora", str(folder / "best"))
        return result["best_validation_loss"]

    def tidy(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """Trials' checkpoints are of no more use; of the losers nothing is."""
        if search_config.keep_files:
            return
        with contextlib.suppress(ValueError):  # no finished trial yet
            best = study.best_trial.number
            for folder in out.glob("trial-*"):
                if int(folder.name.removeprefix("trial-")) != best:
                    shutil.rmtree(folder, ignore_errors=True)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="lora",
        storage=f"sqlite:///{out / 'study.db'}",
        load_if_exists=True,
        direction="minimize",
        sampler=optuna.samplers.TPESampler(seed=search_config.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=search_config.startup_trials),
    )
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):  # of a killed process
        study.tell(trial.number, state=states.FAIL)
        study.enqueue_trial(trial.params)
    finished = len(study.get_trials(states=(states.COMPLETE, states.PRUNED)))
    print(f"{finished} of {search_config.trials} trials are done", file=sys.stderr)
    if finished < search_config.trials:
        study.optimize(run, n_trials=search_config.trials - finished, callbacks=[tidy])
    if not study.get_trials(states=(states.COMPLETE,)):
        raise NumericalError("no trial came to its end; lower --search.learning_rate_high.")
    best = study.best_trial
    return {
        "params": best.params,
        "value": best.value,
        "trials": len(study.get_trials(states=(states.COMPLETE, states.PRUNED))),
        "pruned": len(study.get_trials(states=(states.PRUNED,))),
        "lora": best.user_attrs["lora"],
    }


def main(argv: list[str] | None = None) -> None:
    ours, theirs = split_arguments(list(sys.argv[1:] if argv is None else argv))
    search_config = parse_config(SearchConfig, "Search a LoRA's rank, learning rate and steps.", ours)
    named = {argument.split("=")[0] for argument in theirs}
    if not named & {"--config", "--pretrained_model_name_or_path", "--help", "-h"}:
        theirs = ["--config", str(DEFAULT_CONFIG), *theirs]
    result = search(search_config, parse_config(LoraConfig, "The runs' flags.", theirs))
    print(json.dumps(result))
    params = result["params"] | {"lora_alpha": result["params"]["rank"]}
    flags = " ".join(f"--{name} {value:g}" for name, value in params.items())
    print(f"train it:  accelerate launch training/finetune_lora.py {flags}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main()
    except GigdiffError as error:
        sys.exit(f"error: {error}")
