"""Solvers by name: another way through the same noise schedule, for every model that has one.

    ddim    DDIM (Song et al. 2020, arXiv 2010.02502), first order, no noise added
    euler   Euler's method on the probability flow (Karras et al. 2022, arXiv 2206.00364), first order
    dpm++   DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095), second order
    unipc   UniPC (Zhao et al. 2023, arXiv 2302.04867), second order, predictor and corrector
    lcm     multistep consistency sampling (Luo et al. 2023, arXiv 2310.04378), for models distilled for it

The first four solve one equation and meet at many steps. "lcm" jumps to the clean picture and noises it again each
step, for 1 to 8 steps: with a model that was not distilled for it pictures become smooth, and more steps don't mend it.

Nothing here imports torch or diffusers before a solver is built.
"""

from __future__ import annotations

from typing import Any

from gigdiff.errors import CapabilityError, InputError, nearest

__all__ = ["SCHEDULERS", "build_scheduler", "check_scheduler", "possible_schedulers"]

SCHEDULERS: dict[str, str] = {  # name -> diffusers' class
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
# What makes the solver the one of that name, whatever the model's own one is set to.
SOLVER: dict[str, dict[str, Any]] = {
    "ddim": {},
    "euler": {},
    "dpm++": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "unipc": {"solver_order": 2},
    "lcm": {},
}


def check_scheduler(name: object) -> None:
    """Raises InputError unless `name` is None or a key of SCHEDULERS; names the nearest that is."""
    if name is not None and (not isinstance(name, str) or name not in SCHEDULERS):
        raise InputError(f"scheduler={name!r} is unknown; {nearest(str(name), SCHEDULERS)}.")


def possible_schedulers(own: Any) -> tuple[str, ...]:
    """The names that can stand in for a model's own diffusers scheduler; () where none of them can.

    A model trained for flow matching (SD3, FLUX) predicts a velocity between picture and noise, not along the noise
    schedule that these solvers step through.
    """
    config = own.config
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return () if flow or "beta_schedule" not in config else tuple(SCHEDULERS)


def build_scheduler(name: str, own: Any, num_inference_steps: int) -> Any:
    """The solver of that name with the model's own noise schedule, prediction type, time steps' spacing and clipping.

    Args:
        name: a key of SCHEDULERS.
        own: the model's diffusers scheduler; it is only read.
        num_inference_steps: how many steps are going to be asked of it.

    Raises:
        InputError: no such name, or more steps than "lcm" can do. CapabilityError: not with this model.
    """
    import diffusers

    check_scheduler(name)
    if name not in possible_schedulers(own):
        raise CapabilityError(
            f'scheduler="{name}" does not fit a {type(own).__name__}, which is of another kind than the noise schedule '
            "of the named solvers: leave scheduler out."
        )
    # Made explicit, all of them: from_config would put the new class's default (of the spacing, say) where the model's
    # config relied on the old class's. What a class has not at all is told here if its default would change pictures.
    config = {key: value for key, value in own.config.items() if not key.startswith("_")}
    config = {"clip_sample": False, **config, **SOLVER[name]}
    scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(config)
    most = scheduler.config.get("original_inference_steps")
    if most is not None and num_inference_steps > most:
        raise InputError(
            f'num_inference_steps={num_inference_steps} is too many for scheduler="{name}", which takes 1 to {most} '
            "(and is made for 1 to 8)."
        )
    return scheduler
