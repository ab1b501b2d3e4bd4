from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import gigdiff
from gigdiff import api
from gigdiff.errors import CapabilityError, InputError, ModelNotFoundError


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


class TestShapeOfTheAnswer:
    def test_one_prompt_gives_one_image(self, painter):
        image = gigdiff.generate("red wool coat", model=painter, seed=0)
        assert isinstance(image, Image.Image) and image.mode == "RGB" and image.size == (64, 80)

    def test_several_give_a_flat_prompt_major_list(self, painter):
        images = gigdiff.generate(["coat", "bag"], model=painter, num_images_per_prompt=3, seed=7)
        assert [(i.info["prompt"], i.info["seed"]) for i in images] == [
            ("coat", "7"), ("coat", "8"), ("coat", "9"), ("bag", "7"), ("bag", "8"), ("bag", "9")
        ]  # fmt: skip

    def test_a_list_of_one_stays_a_list(self, painter):
        assert len(gigdiff.generate(["coat"], model=painter)) == 1
        assert len(gigdiff.generate("coat", model=painter, num_images_per_prompt=2)) == 2

    def test_result_object(self, painter):
        result = gigdiff.generate(["coat", "bag"], model=painter, num_images_per_prompt=2, seed=1, return_result=True)
        assert isinstance(result, gigdiff.GenerationResult)
        assert result.images.shape == (4, 80, 64, 3) and result.images.dtype == np.uint8
        assert result.request.prompts == ("coat", "coat", "bag", "bag") and result.request.seeds == (1, 2, 1, 2)
        assert (result.request.num_inference_steps, result.request.guidance_scale) == (4, 2.0), "resolved"
        assert result.seconds > 0 and result.model == "painter"

    def test_settings_reach_the_generator(self, painter):
        gigdiff.generate(
            "coat",
            model=painter,
            height=96,
            width=72,
            num_inference_steps=2,
            guidance_scale=3,
            negative_prompt="blurry",
        )
        (asked,) = painter.batches
        assert (asked.height, asked.width, asked.num_inference_steps, asked.guidance_scale) == (96, 72, 2, 3.0)
        assert asked.negative_prompts == ("blurry",)

    def test_negative_prompts_one_each(self, painter):
        gigdiff.generate(["a", "b"], negative_prompt=["x", "y"], num_images_per_prompt=2, model=painter)
        assert painter.batches[0].negative_prompts == ("x", "x", "y", "y")
        with pytest.raises(InputError, match="1 negative prompts for 2 prompts"):
            gigdiff.generate(["a", "b"], negative_prompt=["x"], model=painter)


class TestProduct:
    def test_a_product_is_drawn_by_its_prompt(self, painter):
        product = gigdiff.Product(category="Jackets", colour="Red", material="wool", gender="Women")
        image = gigdiff.generate(product, model=painter, seed=3)
        same = gigdiff.generate(product.to_prompt(), model=painter, seed=3)
        np.testing.assert_array_equal(pixels(image), pixels(same))
        assert "red" in image.info["prompt"]

    def test_mixed_list(self, painter):
        assert len(gigdiff.generate([gigdiff.Product(category="Jackets"), "black bag"], model=painter)) == 2

    def test_an_empty_product_is_an_error(self, painter):
        with pytest.raises(InputError, match="this Product has nothing in it; give at least one of"):
            gigdiff.generate(gigdiff.Product(), model=painter)


class TestSeeds:
    @pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 100])
    def test_alone_or_in_any_batch(self, painter, batch_size):
        prompts = ["red wool coat", "black leather handbag", "red wool coat"]
        many = gigdiff.generate(prompts, model=painter, num_images_per_prompt=3, seed=7, batch_size=batch_size)
        for i, image in enumerate(many):
            alone = gigdiff.generate(prompts[i // 3], model=painter, seed=7 + i % 3)
            np.testing.assert_array_equal(pixels(image), pixels(alone))

    def test_batch_size_is_kept_to(self, painter):
        gigdiff.generate("coat", model=painter, num_images_per_prompt=7, batch_size=3)
        assert [len(batch) for batch in painter.batches] == [3, 3, 1]

    def test_large_images_go_in_small_batches(self, painter):
        gigdiff.generate("coat", model=painter, num_images_per_prompt=3, height=1024, width=1024, num_inference_steps=1)
        assert [len(batch) for batch in painter.batches] == [1, 1, 1]

    def test_a_seed_is_drawn_and_reported(self, painter):
        first = gigdiff.generate("coat", model=painter)
        second = gigdiff.generate("coat", model=painter)
        assert first.info["seed"] != second.info["seed"]
        again = gigdiff.generate("coat", model=painter, seed=int(first.info["seed"]))
        np.testing.assert_array_equal(pixels(first), pixels(again))
        assert (pixels(first) != pixels(second)).any()

    def test_the_callers_random_state_is_left_alone(self, painter):
        np.random.seed(0)
        expected = np.random.rand()
        np.random.seed(0)
        gigdiff.generate("coat", model=painter)
        assert np.random.rand() == expected


class TestNotes:
    def test_what_was_cut_is_told_in_the_result_and_in_the_image(self, painter):
        long = "a warm red coat with wooden buttons. " * 280
        assert len(long) > 10_000
        result = gigdiff.generate([long, "bag", long], model=painter, batch_size=1, return_result=True)
        assert len(result.notes) == 1 and "cut" in result.notes[0]
        assert "cut" in gigdiff.generate(long, model=painter).info["notes"]


class TestProgress:
    def test_bar_on_stderr_only_when_asked(self, painter, capsys):
        gigdiff.generate("coat", model=painter, num_images_per_prompt=3, batch_size=2, progress=True)
        shown = capsys.readouterr()
        assert shown.out == "" and "3.0/3 images" in shown.err
        gigdiff.generate("coat", model=painter)
        assert capsys.readouterr().err == ""


BAD = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": "  "}, "prompt is empty"),
    ({"prompt": []}, "empty list"),
    ({"prompt": ["coat", ""]}, "prompt is empty"),
    ({"prompt": None}, r"None \(NoneType\)"),
    ({"prompt": 42}, r"42 \(int\)"),
    ({"prompt": ["coat", 42]}, r"42 \(int\)"),
    ({"prompt": {"a": 1}}, r"\(dict\)"),
    ({"prompt": "x" * 30_000}, "30,000 characters; at most 20,000"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 is out of range; allowed are 1 to"),
    ({"num_images_per_prompt": 2.0}, "whole number"),
    ({"num_inference_steps": 0}, "allowed are 1 to 1000"),
    ({"num_inference_steps": 2000}, "allowed are 1 to 1000"),
    ({"height": 81}, "multiple of 8"),
    ({"width": 63}, "multiple of 8"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": "seven"}, "whole number"),
    ({"seed": 2**63 - 1, "num_images_per_prompt": 2}, "out of range"),
    ({"negative_prompt": 3}, "negative_prompt is 3"),
    ({"negative_prompt": "blurry", "guidance_scale": 1.0}, "guidance_scale above 1"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"model": 3}, "what gigdiff.load returned"),
    ({"lora": 5}, "lora is 5"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(painter, arguments, message):
    with pytest.raises(InputError, match=message):
        gigdiff.generate(**{"prompt": "red wool coat", "model": painter, **arguments})
    assert not painter.batches, "nothing was drawn"


@pytest.mark.parametrize(("arguments", "message"), [bad for bad in BAD if bad[0].keys() & {"prompt", "seed", "height"}])
def test_bad_input_is_told_before_a_model_is_loaded(monkeypatch, arguments, message):
    monkeypatch.setattr(api, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=message):
        gigdiff.generate(**{"prompt": "red wool coat", **arguments})


def test_unknown_model_names_the_nearest():
    with pytest.raises(ModelNotFoundError, match='there is no model "mimi"; did you mean "mini"'):
        gigdiff.generate("coat", model="mimi")


def test_a_device_for_a_loaded_model_is_refused(painter):
    with pytest.raises(InputError, match=r"gigdiff\.load\(device=\)"):
        gigdiff.generate("coat", model=painter, device="cpu")


def test_missing_control(turbo):
    with pytest.raises(CapabilityError, match="has no guidance"):
        gigdiff.generate("coat", model=turbo, guidance_scale=4.0)
    with pytest.raises(CapabilityError, match="can't load LoRA"):
        gigdiff.generate("coat", model=turbo, lora="x.safetensors")
