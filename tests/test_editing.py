"""gigdiff.edit: every kind of edit through the real classes at tiny size, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gigdiff
from gigdiff import xmp
from gigdiff.errors import CapabilityError, DataError, InputError
from gigdiff.generators.diffusion import DiffusionGenerator, PipelineGenerator
from gigdiff.generators.request import EditStart, GenerationRequest
from gigdiff.provenance import XMP_KEYWORD, read, save


def photo(height: int = 120, width: int = 90, colour: tuple[int, int, int] = (180, 40, 45)) -> Image.Image:
    """A shaded box with a white print, on white."""
    y, x = np.mgrid[:height, :width]
    pixels = np.full((height, width, 3), 255.0)
    inside = (slice(height // 6, -height // 6), slice(width // 5, -width // 5))
    shade = 0.8 + 0.2 * np.sin(x / 9) * np.cos(y / 11)
    pixels[inside] = np.array(colour) * shade[inside][..., None]
    pixels[height // 2 : height // 2 + 8, width // 3 : width // 2] = 250
    return Image.fromarray(pixels.astype(np.uint8))


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> DiffusionGenerator:
    return DiffusionGenerator.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline: Path) -> PipelineGenerator:
    return PipelineGenerator.from_pretrained(tiny_pipeline)


def hole(height: int = 120, width: int = 90) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[40:80, 30:60] = True
    return mask


class TestInpainting:
    def test_pixels_outside_the_mask_are_the_picture_s_own(self, model: DiffusionGenerator):
        picture, mask = photo(), hole()
        out = gigdiff.edit(picture, "blue bag", mask_image=mask, model=model, num_images_per_prompt=2, seed=3)
        assert len(out) == 2
        for image in out:
            assert image.size == picture.size
            assert (array(image)[~mask] == array(picture)[~mask]).all()
            assert (array(image)[mask] != array(picture)[mask]).mean() > 0.5
        assert (array(out[0])[mask] != array(out[1])[mask]).any()
        again = gigdiff.edit(picture, "blue bag", mask_image=mask, model=model, seed=3)
        assert (array(again) == array(out[0])).all()
        assert again.info["edit"] == "inpaint" and again.info["seed"] == "3"

    @pytest.mark.parametrize("size", [(80, 64), (97, 61), (33, 200)])
    def test_at_any_size(self, model: DiffusionGenerator, size: tuple[int, int]):
        mask = np.zeros(size, bool)
        mask[size[0] // 2 :, : size[1] // 2] = True
        picture = photo(*size)
        out = gigdiff.edit(picture, "bag", mask_image=Image.fromarray(mask), model=model, num_inference_steps=2)
        assert (array(out)[~mask] == array(picture)[~mask]).all() and (array(out)[mask] != array(picture)[mask]).any()

    def test_a_mask_of_one_pixel_changes_it_alone(self, model: DiffusionGenerator):
        mask = np.zeros((120, 90), bool)
        mask[60, 45] = True
        out = gigdiff.edit(photo(), "bag", mask_image=mask, model=model, num_inference_steps=2)
        assert (array(out) != array(photo())).any(axis=-1).sum() <= 1

    def test_resampling_changes_the_drawing(self, model: DiffusionGenerator):
        args = {"mask_image": hole(), "model": model, "seed": 1}
        once, thrice = (gigdiff.edit(photo(), "bag", num_resample_steps=n, **args) for n in (1, 3))
        assert (array(once) != array(thrice)).any() and (array(once)[~hole()] == array(thrice)[~hole()]).all()

    def test_through_diffusers_pipelines(self, pipeline: PipelineGenerator):
        out = gigdiff.edit(photo(), "blue bag", mask_image=hole(), model=pipeline, seed=3, num_inference_steps=4)
        assert (array(out)[~hole()] == array(photo())[~hole()]).all()
        assert (array(out)[hole()] != array(photo())[hole()]).any()


class TestLoop:
    """The sampling loop from a start, below the pasting."""

    def start(self, strength: float, mask: np.ndarray | None = None, count: int = 1) -> EditStart:
        frame = np.asarray(photo(80, 64))
        return EditStart(np.repeat(frame[None], count, 0), strength, mask)

    def test_less_strength_stays_nearer(self, model: DiffusionGenerator):
        request = GenerationRequest(("bag",), (1,), num_inference_steps=10)
        rebuilt = model.reconstruct(self.start(1).images).astype(int)
        apart = [
            np.abs(model.edit(request, self.start(s)).images.astype(int) - rebuilt).mean() for s in (0.1, 0.5, 1.0)
        ]
        assert apart[0] < apart[1] < apart[2]

    @pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
    def test_every_scheduler_starts_in_the_middle_and_keeps_what_is_masked(self, model: DiffusionGenerator, name: str):
        import diffusers

        scheduler = getattr(diffusers, name).from_config(model.scheduler.config)
        other = DiffusionGenerator(model.unet, model.vae, scheduler, model.text_encoder, name=name)
        request = GenerationRequest(("bag",), (1,), num_inference_steps=6, guidance_scale=1.0)
        mask = np.zeros((80, 64), bool)
        mask[:40] = True
        start = EditStart(self.start(0.7).images, 0.7, mask, num_resample_steps=2)
        out = other.edit(request, start).images.astype(int)
        rebuilt = other.reconstruct(start.images).astype(int)
        # The decoder looks a few positions around, so only what is far from the mask is exact.
        assert np.abs(out - rebuilt)[:, 72:].max() <= 2 and (out != rebuilt)[:, :32].any()

    def test_an_image_is_the_same_alone_and_in_a_batch(self, model: DiffusionGenerator):
        request = GenerationRequest(("bag", "coat", "hat"), (1, 2, 3), num_inference_steps=4)
        mask = np.zeros((80, 64), bool)
        mask[16:48, 16:48] = True
        whole = model.edit(request, EditStart(self.start(1, count=3).images, 1.0, mask, 2)).images
        alone = model.edit(request.part(1, 2), EditStart(self.start(1).images, 1.0, mask, 2)).images
        assert np.array_equal(whole[1], alone[0])


class TestImageToImage:
    def test_variations_image_to_image_and_fields(self, model: DiffusionGenerator, tmp_path: Path):
        several = gigdiff.edit(photo(), num_images_per_prompt=3, model=model, seed=5)
        assert len({image.tobytes() for image in several}) == 3 and several[0].info["edit"] == "variations"
        one = gigdiff.edit(photo(), "a green bag", strength=0.5, model=model, seed=5, upscale=False)
        assert one.size == (64, 80) and one.info["strength"] == "0.5" and one.info["prompt"] == "a green bag"
        fields = read(save(tmp_path / "a.jpg", one, one.info))
        assert xmp.source_type(fields[XMP_KEYWORD]) == xmp.COMPOSITE and len(fields["source_image"]) == 16

    def test_the_picture_s_own_prompt_is_used(self, model: DiffusionGenerator):
        drawn = gigdiff.generate("red bag", model=model, seed=1)
        assert gigdiff.edit(drawn, model=model).info["prompt"] == "red bag"

    def test_through_diffusers_pipelines(self, pipeline: PipelineGenerator):
        out = gigdiff.edit(photo(), "blue bag", strength=0.5, model=pipeline, seed=3, num_inference_steps=4)
        assert out.info["edit"] == "image-to-image" and array(out).std() > 0

    def test_outpainting(self, model: DiffusionGenerator):
        out = gigdiff.edit(photo(), "bag", aspect_ratio="16:9", model=model)
        assert out.size == (213, 120)
        assert (array(out)[:, 61:151] == array(photo())).all() and out.info["edit"] == "outpaint to 16:9"
        with pytest.raises(InputError, match="already"):
            gigdiff.edit(photo(90, 90), "bag", aspect_ratio="square", model=model)

    def test_a_recoloured_picture_can_be_drawn_over(self, model: DiffusionGenerator):
        assert gigdiff.edit(photo(), "bag", colour="navy", strength=0.3, model=model).info["edit"] == "recolour to navy"


class TestRefusals:
    def test_masks(self, model: DiffusionGenerator):
        for mask, words in (
            (hole(90, 120), "must be the same"),
            (hole() & False, "all black"),
            (hole() | True, "all white"),
        ):
            with pytest.raises(InputError, match=words):
                gigdiff.edit(photo(), "bag", mask_image=mask, model=model)

    def test_arguments(self, model: DiffusionGenerator, tmp_path: Path):
        cases = [
            ({"strength": 0}, "strength=0"),
            ({"strength": 1.5}, "out of range"),
            ({"num_resample_steps": 0, "mask_image": hole()}, "num_resample_steps=0"),
            ({"colour": "red", "background": "white"}, "colour and background"),
            ({"colour": "red", "num_images_per_prompt": 2}, "all are alike"),
            ({"aspect_ratio": "4x5"}, '"4x5" is none'),
        ]
        for arguments, words in cases:
            with pytest.raises(InputError, match=words):
                gigdiff.edit(photo(), "bag", model=model, **arguments)
        with pytest.raises(DataError, match="no file"):
            gigdiff.edit(tmp_path / "a.png", "bag", model=model)

    def test_a_model_that_cannot(self, painter):
        with pytest.raises(CapabilityError, match=r"painter can't edit.*image_to_image.*mini"):
            gigdiff.edit(photo(), "bag", model=painter)
        with pytest.raises(CapabilityError, match="inpaint"):
            gigdiff.edit(photo(), "bag", mask_image=hole(), model=painter)

    def test_a_pipeline_without_such_a_pipeline(self, pipeline: PipelineGenerator, monkeypatch: pytest.MonkeyPatch):
        import diffusers

        def none(*_: object, **__: object) -> None:
            raise ValueError("AutoPipeline can't find a pipeline linked to it")

        monkeypatch.setattr(diffusers.AutoPipelineForInpainting, "from_pipe", none)
        with pytest.raises(CapabilityError, match="no inpainting pipeline"):
            gigdiff.edit(photo(), "bag", mask_image=hole(), model=pipeline)

    def test_what_was_converted_is_noted(self, model: DiffusionGenerator):
        layered = photo().convert("RGBA")
        layered.putalpha(128)
        assert "transparent" in gigdiff.edit(layered, "bag", model=model).info["notes"]
        assert "CMYK" in gigdiff.edit(photo().convert("CMYK"), colour="navy").info["notes"]


def test_nothing_here_leaves_the_generator_changed(model: DiffusionGenerator):
    request = GenerationRequest(("bag",), (1,))
    before = model.generate(request).images
    gigdiff.edit(photo(), "coat", mask_image=hole(), model=model)
    assert np.array_equal(model.generate(request).images, before)
