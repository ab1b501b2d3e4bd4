"""finetune_lora.py against diffusers' train_text_to_image_lora.py on one tiny SD-layout model: speed, memory, loss.

    python benchmarks/lora_vs_diffusers.py --peer train_text_to_image_lora.py --output runs/lora_vs_diffusers.json

The peer's script is fetched from github.com/huggingface/diffusers (examples/text_to_image); it is not part of this
project. Both get the same model, photos, captions, size, batch, steps, rank and learning rate, each in a process of its
own. Three comparisons (`--comparisons`): each script's own default precision (the peer's is float32, ours the one that
the device computes in), both in float32, both in bfloat16.

`--rounds` times, one way after the other trains for `--steps` steps in a process of its own. The time of a step is
taken by a hook that torch calls after every optimizer step, so start-up, encoding (ours fills its cache in the first
round), previews and saving are left out, and so are the first `--warmup` steps. A round's speed is that of its median
step, in images a second after caching; the rounds' median and range are reported. Peak memory is that of the first
round's process: resident (ru_maxrss), on a GPU torch's peak allocation. The held-out loss of each way's LoRA is
measured by one function here.

The model has Stable Diffusion's layout and random weights; `--width` is its first level's, 320 in Stable Diffusion 1.5.
What a step is made of depends on width and resolution: convolutions cost the square of the width, attention the width
times the square of the places. In multiplications, of 1.5 at 512 x 512 the attention products are 16% of the UNet's
and encoding a photo costs 1.39 passes of the UNet; the default 128 at 256 x 256 has 11% and 1.26, 32 at 512 x 512 has
65% and 1.10, 32 at 128 x 128 13% and 2.05 (torch.utils.flop_counter). Stable Diffusion's own size, 7 and 19 seconds a
step:

    python benchmarks/lora_vs_diffusers.py --peer ... --width 320 --resolution 512 --train_batch_size 1 \
        --steps 6 --warmup 2 --levels 0 --comparisons defaults --rounds 2

Where torchvision isn't installed, the peer is lent a stand-in of its five transforms, written with Pillow and torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "training"))

# name -> (our way, the peer's), each of a script and a precision
COMPARISONS = {
    "defaults": (("ours", "auto"), ("peer", "no")),
    "float32": (("ours", "no"), ("peer", "no")),
    "bfloat16": (("ours", "bf16"), ("peer", "bf16")),
}

STAND_IN = """
import enum, random
import numpy, torch
from PIL import Image

class InterpolationMode(enum.Enum):
    NEAREST = 0
    BILINEAR = 2
    BICUBIC = 3
    LANCZOS = 1

class Compose:
    def __init__(self, steps): self.steps = steps
    def __call__(self, x):
        for step in self.steps: x = step(x)
        return x

class Resize:
    def __init__(self, size, interpolation): self.size, self.how = size, interpolation.value
    def __call__(self, x):
        scale = self.size / min(x.size)
        return x.resize((round(x.width * scale), round(x.height * scale)), self.how)

class CenterCrop:
    def __init__(self, size): self.size = size
    def __call__(self, x):
        left, top = (x.width - self.size) // 2, (x.height - self.size) // 2
        return x.crop((left, top, left + self.size, top + self.size))

class RandomCrop(CenterCrop):
    def __call__(self, x):
        left, top = random.randint(0, x.width - self.size), random.randint(0, x.height - self.size)
        return x.crop((left, top, left + self.size, top + self.size))

class RandomHorizontalFlip:
    def __call__(self, x): return x.transpose(Image.FLIP_LEFT_RIGHT) if random.random() < 0.5 else x

class Lambda:
    def __init__(self, f): self.f = f
    def __call__(self, x): return self.f(x)

class ToTensor:
    def __call__(self, x): return torch.from_numpy(numpy.asarray(x, numpy.float32) / 255).permute(2, 0, 1).contiguous()

class Normalize:
    def __init__(self, mean, std): self.mean, self.std = mean[0], std[0]
    def __call__(self, x): return (x - self.mean) / self.std
"""


# Runs a script with a hook on optimizer steps, as `python -c LAUNCH folder report warmup device script flags...`.
# `folder` holds the stand-in or is "": the libraries look for torchvision first and don't find it, then the peer's
# script does.
LAUNCH = """
import json, runpy, sys, time
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

lent, report, warmup, device = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
sys.argv = sys.argv[5:]
if lent:
    import diffusers, peft, transformers
    from transformers.utils import is_torchvision_available
    is_torchvision_available()
    from transformers import CLIPTextModel, CLIPTokenizer
    from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel, AutoencoderKL
    sys.path.insert(0, lent)
ends = []

def count(*_):
    if device == "cuda":
        torch.cuda.synchronize()
    ends.append(time.perf_counter())

register_optimizer_step_post_hook(count)
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
memory = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
steps = [after - before for before, after in zip(ends[warmup - 1 :], ends[warmup:])]
with open(report, "w") as file:
    json.dump({"steps": steps, "memory": memory}, file)
"""


def build_model(folder: Path, width: int) -> Path:
    """A StableDiffusionPipeline folder: SD's four levels, depth and block types at `width` / 320 of its widths.

    Eight heads a level, as Stable Diffusion 1.5 has, or fewer so that each is 32 wide or more. At a tenth of the widths
    eight would be 4 wide, a size that no attention kernel is made for: nine tenths of a step were exponentials.
    """
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words = folder.parent / "words"
    words.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (words / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(words, model_max_length=77)
    # 2.4 and 0.4 times the UNet's width in Stable Diffusion; rounded to heads of a multiple of 8 and to norm groups.
    words_width, vae_width = 12 * 8 * math.ceil(2.4 * width / 12 / 8), 16 * max(1, round(0.4 * width / 16))
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary), hidden_size=words_width, intermediate_size=4 * words_width,
            num_hidden_layers=12, num_attention_heads=12,
            bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=tuple(width * k for k in (1, 2, 4, 4)), cross_attention_dim=words_width,
        attention_head_dim=tuple(min(8, width // 32 * k) for k in (1, 2, 4, 4)), norm_num_groups=16,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=tuple(vae_width * k for k in (1, 2, 4, 4)), layers_per_block=2, norm_num_groups=16,
        sample_size=128,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def copy_photos(source: Path, folder: Path, held_out: int) -> tuple[Path, Path]:
    """(training photos, held-out photos) as imagefolders with one caption each, which both scripts read alike."""
    import shutil

    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    for name, chosen in (("train", rows[:-held_out]), ("held", rows[-held_out:])):
        into = folder / name
        into.mkdir(parents=True)
        lines = []
        for row in chosen:
            shutil.copy(source / row["file_name"], into)
            text = row["text"] if isinstance(row["text"], str) else row["text"][0]
            lines.append(json.dumps({"file_name": row["file_name"], "text": text, "name": row.get("name", text)}))
        (into / "metadata.jsonl").write_text("\n".join(lines))
    return folder / "train", folder / "held"


def timed(words: list[str], environment: dict[str, str], report: Path, device: str) -> tuple[float, float]:
    """(median seconds of a step, peak memory in MB) of a process that LAUNCH watches."""
    process = subprocess.Popen(words, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: {words[7]} failed:\n{errors.decode()[-3000:]}")
    seen = json.loads(report.read_text())
    return statistics.median(seen["steps"]), seen["memory"] if device == "cuda" else usage.ru_maxrss / 1024


def held_out_loss(model: Path, lora: Path | None, photos: Path, arguments: argparse.Namespace) -> float:
    """Mean squared error on the held-out photos at fixed noises and noise levels, without guidance dropout."""
    import torch

    import gigdiff
    from gigdiff.data import load_products
    from gigdiff.fit.families import family_of, noised
    from gigdiff.fit.lora_data import encode_photos, held_out_batches

    generator: Any = gigdiff.load(model, device=arguments.device, dtype="float32")
    config = dataclasses.replace(run_config(model, photos, photos.parent / "measured", arguments), train_batch_size=8)
    dataset = load_products(str(photos))
    captions = [list(record.captions) for record in dataset.records()]
    family = family_of(generator)
    data = encode_photos(generator, family, config, dataset, captions, (0, 1))
    if lora is not None:
        generator.pipeline.load_lora_weights(str(lora))
    total = count = 0.0
    with torch.no_grad():
        for batch in held_out_batches(data, family, config, levels=arguments.levels):
            batch = batch.to(torch.device(arguments.device))
            n = noised(family, generator.pipeline.scheduler, batch.latents, batch.noise, batch.u, None)
            predicted = family.predict(generator.pipeline.unet, n.z, n.timesteps, batch.condition)
            total += float((predicted - n.target).square().mean()) * len(batch.latents)
            count += len(batch.latents)
    return total / count


def run_config(model: Path, photos: Path, out: Path, arguments: argparse.Namespace, precision: str = "no") -> Any:
    from gigdiff.fit.lora_config import LoraConfig

    return LoraConfig(
        pretrained_model_name_or_path=str(model), train_data_dir=str(photos), output_dir=str(out),
        cache_dir=str(out.parent / "cache"), resolution=arguments.resolution, aspect_ratio_buckets=False,
        image_fit="crop", validation_fraction=0.0, caption_dropout=0.0, rank=arguments.rank, use_ema=False,
        init_lora_weights="gaussian",
        train_batch_size=arguments.train_batch_size, learning_rate=arguments.learning_rate, lr_warmup_steps=0,
        lr_decay_fraction=0.0, adam_beta2=0.999, checkpointing_steps=10**6, validation_steps=10**6,
        validation_prompts=("red bag",), num_validation_images=1, num_inference_steps=1, seed=arguments.seed,
        mixed_precision=precision,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="diffusers' train_text_to_image_lora.py")
    parser.add_argument("--photos", default=str(ROOT / "examples" / "catalogue" / "train"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warmup", type=int, default=4, help="steps that are not timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="channels of the first level, a multiple of 32")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--levels", type=int, default=32, help="noise levels of the held-out loss; 0: not measured")
    parser.add_argument("--comparisons", nargs="+", choices=list(COMPARISONS), default=list(COMPARISONS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", help="JSON report")
    arguments = parser.parse_args()
    if not 0 < arguments.warmup < arguments.steps:
        parser.error(f"--warmup {arguments.warmup}: from 1 to --steps - 1 ({arguments.steps - 1})")
    from gigdiff.fit.config import as_yaml

    peer = Path(arguments.peer)
    work = Path(tempfile.mkdtemp(prefix="lora-vs-"))
    model = build_model(work / "model", arguments.width)
    train, held = copy_photos(Path(arguments.photos), work / "photos", 6)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["ACCELERATE_USE_CPU"] = str(arguments.device == "cpu").lower()
    lent = ""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        lent = str(work / "lent")
        (work / "lent" / "torchvision").mkdir(parents=True)
        (work / "lent" / "torchvision" / "__init__.py").write_text("")
        (work / "lent" / "torchvision" / "transforms.py").write_text(STAND_IN)

    def launched(script: Path, lent: str, *flags: str) -> list[str]:
        watch = [lent, str(work / "seen.json"), str(arguments.warmup), arguments.device]
        return [sys.executable, "-c", LAUNCH, *watch, str(script), *flags]

    def peer_words(steps: int, precision: str) -> list[str]:
        flags = {
            "pretrained_model_name_or_path": model, "train_data_dir": train, "caption_column": "text",
            "resolution": arguments.resolution, "train_batch_size": arguments.train_batch_size,
            "max_train_steps": steps, "learning_rate": arguments.learning_rate, "lr_scheduler": "constant",
            "lr_warmup_steps": 0, "rank": arguments.rank, "seed": arguments.seed, "mixed_precision": precision,
            "checkpointing_steps": 10**6, "output_dir": work / f"peer-{precision}-{steps}",
            "cache_dir": work / "peer-cache",
        }  # fmt: skip
        pairs = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return launched(peer, lent, *pairs, "--center_crop")

    def our_words(steps: int, precision: str) -> list[str]:
        out = work / f"ours-{precision}-{steps}"
        config = dataclasses.replace(run_config(model, train, out, arguments, precision), max_train_steps=steps)
        file = out.with_suffix(".yaml")
        file.write_text(as_yaml(config))
        return launched(ROOT / "training" / "finetune_lora.py", "", "--config", str(file))

    if arguments.device == "cuda":  # "auto" is bf16 on any GPU of today: not twice
        COMPARISONS["defaults"] = (("ours", "bf16"), ("peer", "no"))
    words = {"ours": our_words, "peer": peer_words}
    ways = list(dict.fromkeys(way for name in arguments.comparisons for way in COMPARISONS[name]))
    memory, rates = {}, {way: [] for way in ways}  # type: ignore[var-annotated]

    for count in range(arguments.rounds):
        for way in ways:
            words_of_way = words[way[0]](arguments.steps, way[1])
            seconds, peak = timed(words_of_way, environment, work / "seen.json", arguments.device)
            memory.setdefault(way, peak)
            rates[way].append(arguments.train_batch_size / seconds)
            print(f"round {count + 1}, {way[0]} {way[1]}: {seconds:.3f} s a step, {peak:.0f} MB", file=sys.stderr)
    results = {
        f"{name} {precision}": {
            "images_per_second": statistics.median(rates[name, precision]),
            "range": [min(rates[name, precision]), max(rates[name, precision])],
            "peak_memory_mb": memory[name, precision],
            **(
                {"held_out_loss": held_out_loss(model, work / f"{name}-{precision}-{arguments.steps}", held, arguments)}
                if arguments.levels
                else {}
            ),
        }
        for name, precision in ways
    }
    ratios = {}
    for what in arguments.comparisons:
        ours, theirs = COMPARISONS[what]
        each = [a / b for a, b in zip(rates[ours], rates[theirs], strict=True)]
        ratios[what] = {
            "speed": statistics.median(each), "speed_range": [min(each), max(each)],
            "memory": memory[ours] / memory[theirs],
        }  # fmt: skip
    import diffusers
    import torch

    report = {
        **results,
        **({"held_out_loss_of_the_base": held_out_loss(model, None, held, arguments)} if arguments.levels else {}),
        "ratios": ratios,
        "settings": {k: v for k, v in vars(arguments).items() if k != "output"},
        "peer_sha256": hashlib.sha256(peer.read_bytes()).hexdigest(),
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor(),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.output:
        path = Path(arguments.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


if __name__ == "__main__":
    main()
