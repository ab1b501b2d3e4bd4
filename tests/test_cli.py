from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gigdiff import api, cli
from gigdiff.cli import main
from gigdiff.errors import NumericalError
from gigdiff.provenance import XMP_KEYWORD, read


@pytest.fixture
def drawn_by(monkeypatch: pytest.MonkeyPatch, painter):
    """The command with `mini` replaced by the test painter; test_end_to_end.py runs it with real models."""
    monkeypatch.setattr(api, "_keep", lambda name, device: painter)
    return painter


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestGenerate:
    def test_one_prompt(self, drawn_by, tmp_path, capsys):
        assert main(["generate", "Red wool coat!", "--seed", "7", "-o", str(tmp_path)]) == 0
        assert files(tmp_path) == ["red-wool-coat.png"]
        shown = capsys.readouterr()
        (line,) = shown.out.splitlines()
        for part in (str(tmp_path / "red-wool-coat.png"), "80 x 64 px", " s  ", "painter", "seed 7"):
            assert part in line
        fields = read(tmp_path / "red-wool-coat.png")
        assert (fields["prompt"], fields["seed"], fields["model"]) == ("Red wool coat!", "7", "painter")
        assert "trainedAlgorithmicMedia" in fields[XMP_KEYWORD]

    def test_many_and_a_grid(self, drawn_by, tmp_path, capsys):
        assert main(["generate", "red wool coat", "-n", "8", "--seed", "7", "--output", str(tmp_path), "--grid"]) == 0
        assert files(tmp_path) == sorted(
            [f"red-wool-coat-seed{seed}.png" for seed in range(7, 15)] + ["red-wool-coat-grid.png"]
        )
        assert len(capsys.readouterr().out.splitlines()) == 9
        with Image.open(tmp_path / "red-wool-coat-grid.png") as sheet:
            assert sheet.width > 8 * 64
        assert read(tmp_path / "red-wool-coat-grid.png")["seed"].split() == [str(seed) for seed in range(7, 15)]

    def test_same_pixels_as_the_api(self, drawn_by, tmp_path):
        main(["generate", "coat", "bag", "-n", "2", "--seed", "3", "-o", str(tmp_path), "--batch-size", "3"])
        expected = api.generate(["coat", "bag"], model=drawn_by, num_images_per_prompt=2, seed=3)
        names = ["coat-seed3", "coat-seed4", "bag-seed3", "bag-seed4"]
        for name, image in zip(names, expected, strict=True):
            with Image.open(tmp_path / f"{name}.png") as saved:
                np.testing.assert_array_equal(np.asarray(saved), np.asarray(image))

    def test_prompts_that_differ_in_punctuation_get_their_own_files(self, drawn_by, tmp_path):
        assert main(["generate", "coat", "coat!", "Coat", "-o", str(tmp_path), "--grid"]) == 0
        assert files(tmp_path) == ["coat-2.png", "coat-3.png", "coat.png", "grid.png"]

    @pytest.mark.parametrize("spelling", ["--num_inference_steps", "--num-inference-steps", "--steps"])
    def test_spellings(self, drawn_by, tmp_path, spelling):
        assert main([
            "generate", "coat", "-o", str(tmp_path), spelling, "3", "--guidance_scale", "4",
            "--negative_prompt", "dark", "--height", "96", "--width=72",
        ]) == 0  # fmt: skip
        (asked,) = drawn_by.batches
        assert (asked.num_inference_steps, asked.guidance_scale, asked.height, asked.width) == (3, 4.0, 96, 72)
        assert asked.negative_prompts == ("dark",)

    def test_a_single_file(self, drawn_by, tmp_path):
        assert main(["generate", "coat", "-o", str(tmp_path / "mine.png")]) == 0
        assert files(tmp_path) == ["mine.png"]

    def test_a_drawn_seed_is_reported(self, drawn_by, tmp_path, capsys):
        assert main(["generate", "coat", "-o", str(tmp_path)]) == 0
        assert f"seed {read(tmp_path / 'coat.png')['seed']}" in capsys.readouterr().out

    def test_progress_on_stderr_unless_quiet(self, drawn_by, tmp_path, capsys):
        main(["generate", "coat", "-o", str(tmp_path)])
        assert "1.0/1 images" in capsys.readouterr().err
        main(["generate", "coat", "-o", str(tmp_path), "--overwrite", "--quiet"])
        assert capsys.readouterr().err == ""

    def test_what_was_cut_is_told(self, drawn_by, tmp_path, capsys):
        assert main(["generate", "warm red coat " * 800, "-o", str(tmp_path)]) == 0
        assert "gigdiff: note: " in capsys.readouterr().err
        assert len(files(tmp_path)[0]) < 80

    @pytest.mark.parametrize(
        ("prompt", "name"),
        [
            ("毛呢大衣", "毛呢大衣"),
            ("пальто, красное", "пальто-красное"),
            ("a/b\\c:../..", "a-b-c"),
            ("!!!", "image"),
            ("CON", "con-image"),
            ("лісовий" * 60, None),
            ("snow_white coat", "snow-white-coat"),
        ],
    )
    def test_file_names(self, drawn_by, tmp_path, prompt, name):
        assert main(["generate", prompt, "-o", str(tmp_path)]) == 0
        (made,) = files(tmp_path)
        assert made == f"{name}.png" if name else len(made.encode()) < 200


BAD = [
    (["generate"], "no prompt was given"),
    (["generate", ""], "prompt is empty"),
    (["generate", "coat", " "], "prompt is empty"),
    (["generate", "x" * 30_000], "30,000 characters; at most 20,000"),
    (["generate", "coat", "-n", "0"], "num_images_per_prompt=0 is out of range"),
    (["generate", "coat", "-n", "two"], "'two' is not a valid integer"),
    (["generate", "coat", "--steps", "0"], "allowed are 1 to 1000"),
    (["generate", "coat", "--num_inference_steps", "2000"], "allowed are 1 to 1000"),
    (["generate", "coat", "--height", "81"], "not a multiple of 8"),
    (["generate", "coat", "--width", "100000"], "allowed are 8 to 4096"),
    (["generate", "coat", "--seed", "-1"], "seed=-1"),
    (["generate", "coat", "--guidance-scale", "nan"], "guidance_scale=nan"),
    (["generate", "coat", "--guidance-scale", "1", "--negative-prompt", "x"], "guidance_scale above 1"),
    (["generate", "coat", "--model", "mimi"], 'did you mean "mini"'),
    (["generate", "coat", "--model", ""], "model is empty"),
    (["generate", "coat", "--device", "gpu"], "usable here: "),
    (["generate", "coat", "--batch-size", "0"], "batch_size=0"),
    (["generate", "coat", "--nosuch"], "--nosuch"),
    (["generate", "coat", "bag", "--output", "one.png"], "one file for 2 images"),
    (["generate", "coat", "--output", "a\0b"], "can't make the folder"),
    (["nosuch"], "No such command"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_and_a_status(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "--device" in arguments:  # it is looked at once the model's files are known to be there
        from gigdiff.generators import loading

        monkeypatch.setattr(loading, "check_folder", lambda folder, name: {})
    assert main([*arguments, *(["--quiet"] if arguments[0] == "generate" else [])]) in (1, 2)
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("gigdiff: error: ") and message in line and "Traceback" not in line
    assert not list(tmp_path.rglob("*.png"))


class TestFilesAreSafe:
    def test_existing_files_stay_and_nothing_is_drawn(self, drawn_by, tmp_path, capsys):
        (tmp_path / "coat-seed8.png").write_bytes(b"precious")
        assert main(["generate", "coat", "-n", "3", "--seed", "7", "-o", str(tmp_path)]) == 1
        assert 'coat-seed8.png" exists already; pass --overwrite' in capsys.readouterr().err
        assert (tmp_path / "coat-seed8.png").read_bytes() == b"precious"
        assert files(tmp_path) == ["coat-seed8.png"] and not drawn_by.batches, "told before any time is spent"

    def test_an_existing_sheet_counts_too(self, drawn_by, tmp_path):
        (tmp_path / "coat-grid.png").write_bytes(b"precious")
        assert main(["generate", "coat", "-o", str(tmp_path), "--grid"]) == 1
        assert not drawn_by.batches

    def test_overwrite(self, drawn_by, tmp_path):
        (tmp_path / "coat.png").write_bytes(b"old")
        assert main(["generate", "coat", "-o", str(tmp_path), "--overwrite"]) == 0
        assert read(tmp_path / "coat.png")["prompt"] == "coat"

    def test_output_that_is_a_file(self, drawn_by, tmp_path, capsys):
        (tmp_path / "out").write_text("x")
        assert main(["generate", "coat", "-o", str(tmp_path / "out")]) == 1
        assert main(["generate", "coat", "-o", str(tmp_path / "out" / "deeper")]) == 1
        assert capsys.readouterr().err.count("gigdiff: error: ") == 2 and not drawn_by.batches

    def test_finished_batches_are_kept_when_a_later_one_fails(self, drawn_by, tmp_path, monkeypatch, capsys):
        draw = drawn_by.generate

        def fails_later(request, **more):
            if drawn_by.batches:
                raise NumericalError("image 0 of 1 came out with NaN")
            return draw(request, **more)

        monkeypatch.setattr(drawn_by, "generate", fails_later)
        assert main(["generate", "coat", "-n", "2", "--seed", "7", "--batch-size", "1", "-o", str(tmp_path)]) == 1
        assert files(tmp_path) == ["coat-seed7.png"]
        assert "NaN" in capsys.readouterr().err


class TestErrors:
    def test_unexpected_errors_are_one_line_too(self, drawn_by, tmp_path, monkeypatch, capsys):
        def broken(*_, **__):
            raise ZeroDivisionError("by\nzero")

        monkeypatch.setattr(drawn_by, "generate", broken)
        assert main(["generate", "coat", "-o", str(tmp_path), "--quiet"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "unexpected ZeroDivisionError: by zero" in line and "--verbose" in line
        assert main(["generate", "coat", "-o", str(tmp_path), "--quiet", "--verbose"]) == 1
        assert "Traceback" in capsys.readouterr().err

    def test_verbose_shows_the_traceback_of_our_own_errors(self, capsys):
        assert main(["generate", "", "--verbose"]) == 1
        assert "Traceback" in capsys.readouterr().err

    def test_interrupt(self, drawn_by, tmp_path, monkeypatch, capsys):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(drawn_by, "generate", interrupted)
        assert main(["generate", "coat", "-o", str(tmp_path), "--quiet"]) == 130
        assert capsys.readouterr().err.strip() == "gigdiff: interrupted"

    def test_exit_status_of_the_real_command(self):
        done = subprocess.run(
            [sys.executable, "-m", "gigdiff", "generate", "coat", "--model", "mimi", "-o", "/nowhere.png"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 1 and "mini" in done.stderr and "Traceback" not in done.stderr


class TestModels:
    def test_table(self, tmp_path, monkeypatch, capsys):
        from gigdiff import pretrained

        (tmp_path / "mini" / "unet").mkdir(parents=True)
        (tmp_path / "mini" / "unet" / "x.safetensors").write_bytes(b"0" * 2_000_000)
        about = {"parameters": 12_345_678, "licence": "Apache-2.0", "scores": {"type": 0.91234, "products": 1000}}
        (tmp_path / "mini" / "gigdiff.json").write_text(json.dumps(about))
        monkeypatch.setattr(pretrained, "folder_of", lambda name: tmp_path / name)
        assert main(["models"]) == 0
        shown = capsys.readouterr().out
        for part in ("mini", "2.0 MB", "12.3 M", "Apache-2.0", "type 0.912", "products 1000"):
            assert part in shown

    def test_a_missing_model_is_said_to_be_missing(self, tmp_path, monkeypatch, capsys):
        from gigdiff import pretrained

        monkeypatch.setattr(pretrained, "folder_of", lambda name: tmp_path / name)
        assert main(["models"]) == 0
        assert "missing: no " in capsys.readouterr().out


def test_slug_doctest():
    import doctest

    assert doctest.testmod(cli).failed == 0
