from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gigdiff.errors import CapabilityError, GigdiffError, InputError
from gigdiff.generators.request import Capabilities, GenerationRequest, ImageGenerator, validate

PLAIN = Capabilities(default_size=(80, 64), default_steps=20, default_guidance=2.5, guidance=True, negative_prompt=True)
TURBO = Capabilities(default_size=(80, 64), default_steps=1, max_steps=4, sizes=((80, 64), (160, 128)))


def request(**changes: object) -> GenerationRequest:
    return GenerationRequest(**{"prompts": ("red wool coat",), "seeds": (7,), **changes})


def test_defaults_are_filled_in():
    done = validate(request(), PLAIN)
    assert (done.height, done.width, done.num_inference_steps, done.guidance_scale) == (80, 64, 20, 2.5)
    asked = validate(request(height=96, num_inference_steps=3, guidance_scale=0), PLAIN)
    assert (asked.height, asked.width, asked.num_inference_steps, asked.guidance_scale) == (96, 64, 3, 0.0)


def test_frozen_and_normalised():
    made = GenerationRequest(["a", "b"], [np.int64(1), 2], negative_prompts=["", "x"])
    assert made.prompts == ("a", "b") and made.seeds == (1, 2) and type(made.seeds[0]) is int
    assert hash(made) == hash(GenerationRequest(("a", "b"), (1, 2), ("", "x")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.height = 8  # type: ignore[misc]


def test_part_keeps_prompts_seeds_and_negatives_together():
    whole = request(prompts=("a", "b", "c"), seeds=(1, 2, 3), negative_prompts=("x", "", "z"), height=80)
    part = whole.part(1, 3)
    assert (part.prompts, part.seeds, part.negative_prompts, part.height) == (("b", "c"), (2, 3), ("", "z"), 80)
    assert len(whole) == 3 and len(part) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "at least one"),
        ({"prompts": "red wool coat"}, "tuple"),
        ({"seeds": None}, "tuple"),
        ({"prompts": ("",)}, "empty"),
        ({"prompts": (" \n\t",)}, "empty"),
        ({"prompts": (None,)}, r"None \(NoneType\); it must be text"),
        ({"prompts": (b"coat",)}, "must be text"),
        ({"prompts": ("x" * 20_001,)}, "20,001 characters; at most 20,000"),
        ({"negative_prompts": ("a", "b")}, "2 negative_prompts for 1 prompts"),
        ({"negative_prompts": (3,)}, "negative_prompt is 3"),
        ({"seeds": (1, 2)}, "2 seeds for 1 prompts"),
        ({"seeds": (-1,)}, "seed=-1 is out of range; allowed are 0 to"),
        ({"seeds": (2**63,)}, "out of range"),
        ({"seeds": (1.5,)}, "whole number"),
        ({"seeds": (True,)}, "whole number"),
        ({"seeds": ("7",)}, "whole number"),
        ({"height": 81}, "not a multiple of 8.*try 80 or 88"),
        ({"width": 4}, "width=4 is out of range; allowed are 8 to 4096"),
        ({"width": 0}, "out of range"),
        ({"height": -80}, "out of range"),
        ({"height": 8192}, "out of range"),
        ({"height": 80.0}, "whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 is out of range; allowed are 1 to 1000"),
        ({"num_inference_steps": 2000}, "num_inference_steps=2000 is out of range; allowed are 1 to 1000"),
        ({"num_inference_steps": 20.0}, "whole number"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
        ({"guidance_scale": -1}, "guidance_scale=-1 is out of range; allowed are 0 to 100"),
        ({"guidance_scale": "high"}, "must be a number"),
        ({"guidance_reuse": 0}, "guidance_reuse=0 is out of range; allowed are 1 to 1000"),
        ({"guidance_reuse": None}, "guidance_reuse is None"),
        ({"negative_prompts": ("blurry",), "guidance_scale": 1.0}, "guidance_scale above 1"),
        ({"lora": ""}, "path or hub id"),
        ({"lora_scale": float("nan")}, "lora_scale"),
    ],
)
def test_what_no_model_could_do(changes: dict, message: str):
    with pytest.raises(InputError, match=message) as caught:
        request(**changes)
    assert isinstance(caught.value, GigdiffError) and isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_ten_thousand_characters_are_taken():
    assert len(request(prompts=("warm red coat. " * 667,)).prompts[0]) > 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 96}, r"can't draw 96 x 64 .*; it draws 80 x 64, 160 x 128"),
        ({"num_inference_steps": 5}, "it takes 1 to 4; leave it out for 1"),
        ({"guidance_scale": 3.0}, "has no guidance"),
        ({"guidance_reuse": 3}, "guidance_reuse=3 was given, but turbo can't"),
        ({"negative_prompts": ("blurry",)}, "negative_prompt was given, but turbo has none"),
        ({"lora": "x.safetensors"}, "can't load LoRA"),
    ],
)
def test_what_this_model_cannot_do(changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        validate(request(**changes), TURBO, "turbo")


def test_controls_that_are_off_are_accepted():
    validate(request(guidance_scale=1.0, negative_prompts=("",), height=160, width=128), TURBO)


def test_missing_control_is_a_capability_error():
    with pytest.raises(CapabilityError):
        validate(request(guidance_scale=3.0), TURBO)


def test_size_range_and_multiple_of_a_model():
    can = dataclasses.replace(PLAIN, size_multiple=16, size_range=(64, 128))
    for size in (72, 48, 144):
        with pytest.raises(InputError, match=r"multiples of 16 from 64 to 128.*80 x 64"):
            validate(request(height=size), can)


def test_negative_prompt_needs_a_model_that_guides_by_default():
    unguided = dataclasses.replace(PLAIN, default_guidance=1.0)
    with pytest.raises(InputError, match="set guidance_scale above 1"):
        validate(request(negative_prompts=("blurry",)), unguided)
    validate(request(negative_prompts=("blurry",), guidance_scale=2.0), unguided)


def test_guidance_reuse_needs_guidance():
    can = dataclasses.replace(PLAIN, guidance_reuse=True)
    assert validate(request(guidance_reuse=3), can).guidance_reuse == 3
    with pytest.raises(InputError, match="guidance_reuse does nothing without guidance"):
        validate(request(guidance_reuse=3, guidance_scale=1.0), can)


def test_the_test_generators_meet_the_protocol(painter):
    assert isinstance(painter, ImageGenerator)
    assert not isinstance("mini", ImageGenerator)
