"""Solvers by name: they meet where they solve one equation, keep the model's schedule, and refuse what they can't."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import gigdiff
from gigdiff.errors import CapabilityError, InputError
from gigdiff.generators.request import Capabilities, GenerationRequest, GenerationResult, validate
from gigdiff.inspection import redraw
from gigdiff.provenance import metadata, save
from gigdiff.schedulers import SCHEDULERS, build_scheduler, possible_schedulers


@pytest.fixture(scope="module")
def tiny(tiny_model: Path):
    generator = gigdiff.load(tiny_model, device="cpu", dtype="float32")
    # "trailing" begins at the last timestep whatever the number of steps: then only the solvers differ.
    generator.scheduler = diffusers.DDIMScheduler.from_config(generator.scheduler.config, timestep_spacing="trailing")
    return generator


def latents(generator, scheduler: str | None, steps: int) -> torch.Tensor:
    request = GenerationRequest(
        ("red wool coat",), (3,), num_inference_steps=steps, guidance_scale=1.0, scheduler=scheduler
    )
    return generator._denoise(validate(request, generator.capabilities), None)[0]


# Root mean square distance to DDIM's 200 steps, as a share of how far sampling moved the noise. Euler is the same one
# in other coordinates (seen: 0.00005). Those of second order were 0.036 and 0.032 off in 50 steps, DDIM in 50 0.063;
# extrapolated from DDIM's 50 and 200 steps, its 200 are themselves 0.021 off.
@pytest.mark.parametrize(
    ("name", "steps", "tolerance"), [("euler", 200, 0.001), ("dpm++", 200, 0.03), ("unipc", 200, 0.03)]
)
def test_solvers_of_one_equation_meet_at_many_steps(tiny, exact: torch.Tensor, name: str, steps: int, tolerance: float):
    drawn = latents(tiny, name, steps)
    noise = torch.randn(drawn.shape[1:], generator=torch.Generator().manual_seed(3))
    moved = float((exact - noise).square().mean().sqrt())
    assert moved > 0.1
    assert float((drawn - exact).square().mean().sqrt()) / moved < tolerance
    assert not torch.equal(drawn, exact)


@pytest.fixture(scope="module")
def exact(tiny) -> torch.Tensor:
    return latents(tiny, "ddim", 200)


def test_lcm_takes_one_step_to_the_clean_picture(tiny):
    scheduler = build_scheduler("lcm", tiny.scheduler, 1)
    scheduler.set_timesteps(1)
    [t] = scheduler.timesteps
    z, v = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    a = float(scheduler.alphas_cumprod[t])
    clean = scheduler.step(v, t, z, return_dict=False)[0]
    torch.testing.assert_close(clean, a**0.5 * z - (1 - a) ** 0.5 * v, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(latents(tiny, "lcm", 4)).all()
    with pytest.raises(
        InputError, match=r"num_inference_steps=51 is too many for scheduler=\"lcm\", which takes 1 to 50"
    ):
        latents(tiny, "lcm", 51)


OWN = {
    "dpm": diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        timestep_spacing="trailing", algorithm_type="sde-dpmsolver++", solver_order=3,
    ),
    "ddim": diffusers.DDIMScheduler(
        beta_start=0.0009, beta_schedule="scaled_linear", prediction_type="sample", rescale_betas_zero_snr=True,
        clip_sample=False, steps_offset=1,  # and DDIM's own default of spacing, "leading"
    ),
    "pndm": diffusers.PNDMScheduler(beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True),
    "euler ancestral": diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing"),
}  # fmt: skip
KEPT = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing", "steps_offset")


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_noise_schedule_stays_the_model_s_own(name: str, own: str):
    before = dict(OWN[own].config)
    built = build_scheduler(name, OWN[own], 10)
    assert type(built).__name__ == SCHEDULERS[name]
    for key in KEPT:
        assert built.config[key] == before[key], key
    assert dict(OWN[own].config) == before
    if name in ("ddim", "lcm"):  # their default of DDIM would clip latents as if they were pixels
        assert built.config.clip_sample == before.get("clip_sample", False)
    if name == "dpm++":
        assert (built.config.algorithm_type, built.config.solver_order) == ("dpmsolver++", 2)
    if own != "ddim":  # rescaled to zero SNR, whose first beta differs by class
        torch.testing.assert_close(built.alphas_cumprod, OWN[own].alphas_cumprod)


def test_unknown_names_are_told_before_a_model_is_loaded():
    with pytest.raises(InputError, match='did you mean "unipc"'):
        gigdiff.generate("red wool coat", model="no such model", scheduler="unipcm")
    for wrong in (3, "", ["ddim"]):
        with pytest.raises(InputError, match="Known: ddim, dpm"):
            GenerationRequest(("red",), (1,), scheduler=wrong)  # type: ignore[arg-type]


def test_models_without_a_choice_say_why(turbo):
    request = GenerationRequest(("red",), (1,), scheduler="ddim")
    with pytest.raises(CapabilityError, match="draws in one pass; leave it out"):
        turbo.generate(request)
    can = Capabilities(default_size=(64, 64), default_steps=4)
    with pytest.raises(CapabilityError, match="its own solver alone"):
        validate(request, can)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    for own in (flow, diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), diffusers.EDMEulerScheduler()):
        assert possible_schedulers(own) == ()
    with pytest.raises(CapabilityError, match="FlowMatchEulerDiscreteScheduler"):
        build_scheduler("ddim", flow, 4)


def test_flow_matching_pipelines_refuse(tiny_flux: Path):
    flux = gigdiff.load(tiny_flux, device="cpu")
    with pytest.raises(CapabilityError, match=r"flow matching.*leave it out"):
        gigdiff.generate("red", model=flux, scheduler="euler", num_inference_steps=1, height=32, width=32, seed=1)


def test_a_pipeline_draws_with_the_solver_and_gets_its_own_back(tiny_pipeline: Path):
    loaded = gigdiff.load(tiny_pipeline, device="cpu")
    own, asked = loaded.pipeline.scheduler, {"model": loaded, "seed": 1, "num_inference_steps": 3}

    def pixels(**more) -> np.ndarray:
        return np.asarray(gigdiff.generate("red", height=16, width=16, **asked, **more))

    stock, other = pixels(), pixels(scheduler="unipc")
    assert not np.array_equal(stock, other)
    assert loaded.pipeline.scheduler is own
    assert np.array_equal(pixels(), stock) and np.array_equal(pixels(scheduler="unipc"), other)
    assert np.array_equal(pixels(scheduler="ddim"), stock), "this one's own solver is DDIM"


def test_the_solver_is_in_the_file_and_draws_the_picture_again(tiny_model: Path, tmp_path: Path):
    # LCM, which draws noise on the way. The tiny model's own DDIM is Euler's method in other words: their pictures
    # differ by rounding at most, and on some CPUs not at all.
    drawn = gigdiff.generate(
        "red wool coat", model=str(tiny_model), seed=5, num_inference_steps=3, scheduler="lcm", upscale=False
    )
    other = gigdiff.generate("red wool coat", model=str(tiny_model), seed=5, num_inference_steps=3, upscale=False)
    assert drawn.info["scheduler"] == "lcm" and "scheduler" not in other.info
    assert not np.array_equal(np.asarray(drawn), np.asarray(other))
    path = save(tmp_path / "coat.png", drawn, drawn.info)
    again, fields = redraw(path)
    assert fields["scheduler"] == "lcm"
    assert np.array_equal(np.asarray(again), np.asarray(drawn))


def test_metadata_of_a_request():
    request = GenerationRequest(("red",), (1,), scheduler="dpm++")
    result = GenerationResult(np.zeros((1, 8, 8, 3), np.uint8), request, "mini", 1.0)
    assert metadata(result, 0)["scheduler"] == "dpm++"
