"""Does a LoRA teach a model a product family that it has never seen, and what does that cost the families it knows?

    python benchmarks/lora_family.py --write_data_without data/no_sunglasses --article_type Sunglasses
    accelerate launch training/train_diffusion.py --train_data_dir data/no_sunglasses --output_dir runs/no_sunglasses
    python benchmarks/lora_family.py --base runs/no_sunglasses/model --article_type Sunglasses \
        --config configs/lora_new_family.yaml --output runs/lora_family.json

Takes 100 training photos of one article type, fine-tunes a config of finetune_lora.py on them (class prompts that name
the family left out), and reads the article type off what is drawn, with the shipped probe, before and after: for short
prompts of validation products of the new family, and of all the others. The test is only honest on a base that was
trained without the family; the first command writes the catalogue for that.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "training"))

from finetune_lora import DEFAULT_CONFIG, finetune  # noqa: E402

import gigdiff  # noqa: E402
from gigdiff.data import ProductDataset, load_products  # noqa: E402
from gigdiff.data.captions import short_prompt  # noqa: E402
from gigdiff.data.vocabulary import ARTICLE_SYNONYMS, ARTICLE_WORDS  # noqa: E402
from gigdiff.errors import GigdiffError, InputError, nearest  # noqa: E402
from gigdiff.evaluation import choose_products, default_data_dir, load_images  # noqa: E402
from gigdiff.fit.config import parse_config  # noqa: E402
from gigdiff.fit.lora_config import LoraConfig  # noqa: E402
from gigdiff.generators.request import GenerationRequest  # noqa: E402
from gigdiff.images import contact_sheet, save_image  # noqa: E402
from gigdiff.metrics.probe import bootstrap_interval, load_probe, probe_features  # noqa: E402

COLUMNS = {
    "category": "articleType", "colour": "baseColour", "gender": "gender", "usage": "usage",
    "name": "productDisplayName", "season": "season",
}  # fmt: skip


def names(text: str, article_type: str) -> bool:
    """Whether a text names the article type, in any of the words that captions have for it."""
    words = [article_type, ARTICLE_WORDS.get(article_type, ""), *ARTICLE_SYNONYMS.get(article_type, ())]
    stems = {stem for word in words if word for stem in (word, word.removesuffix("s"), word.removesuffix("es"))}
    return re.search(rf"\b({'|'.join(map(re.escape, sorted(stems)))})(s|es)?\b", text, re.IGNORECASE) is not None


def write_without(data_dir: Path, article_type: str, out: Path) -> None:
    """The catalogue's Parquet files less the type: its photos, and those of others whose name says it."""
    out.mkdir(parents=True, exist_ok=True)
    for file in data_dir.glob("validation*.parquet"):  # for the held-out loss only
        shutil.copyfile(file, out / file.name)
    for file in sorted(data_dir.glob("train*.parquet")):
        table = parquet.read_table(file)
        named = zip(table["articleType"].to_pylist(), table["productDisplayName"].to_pylist(), strict=True)
        keep = [kind != article_type and not names(name or "", article_type) for kind, name in named]
        parquet.write_table(table.filter(pyarrow.array(keep)), out / file.name)
        print(f"{out / file.name}: {sum(keep):,} of {len(keep):,} photos")


def photos_of(data: ProductDataset, article_type: str, known: bool, count: int) -> ProductDataset:
    """A fixed choice of `count` products of the type (known = False), or of all others (True)."""
    records = data.records()
    chosen = [i for i, record in enumerate(records) if (record.product.category != article_type) == known]
    if not chosen:
        types = sorted({record.product.category for record in records if record.product.category})
        raise InputError(f"--article_type {article_type}: {nearest(article_type, types)}")
    part = data.select(chosen)
    return part.select(choose_products(part.records(), min(count, len(part))))


def write_catalogue(photos: ProductDataset, folder: Path) -> Path:
    """The photos as an imagefolder with their attributes, as somebody's own catalogue would be."""
    folder.mkdir(parents=True)
    lines = []
    for i, record in enumerate(photos.records()):
        name = f"{i:04d}.png"
        Image.open(io.BytesIO(photos.image_bytes(i))).convert("RGB").save(folder / name)
        row = {column: getattr(record.product, field) for field, column in COLUMNS.items()}
        lines.append(json.dumps({"file_name": name, "id": record.id, **{k: v for k, v in row.items() if v}}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def accuracy(generator: Any, photos: ProductDataset, lora: str | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Share of drawn pictures whose article type the probe reads as asked for, with its 95% interval, and pictures."""
    products = [record.product for record in photos.records()]
    prompts = [short_prompt(product) for product in products]
    images = []
    for start in range(0, len(prompts), 32):
        part = tuple(prompts[start : start + 32])
        seeds = tuple(range(start, start + len(part)))
        request = GenerationRequest(part, seeds, lora=lora, lora_scale=arguments.lora_scale)
        images += list(generator.generate(request).images)
    return read_types(np.stack(images), products) | {"images": images, "prompts": prompts}


def read_types(images: np.ndarray, products: list[Any]) -> dict[str, Any]:
    probe = load_probe("article_type")
    correct = probe.correct(probe_features(images, [probe]), products)
    correct = correct[~np.isnan(correct)]  # types that the probe doesn't tell apart
    if not len(correct):
        raise InputError(f"the article_type probe knows none of these types; it knows {', '.join(probe.classes)}")
    low, high = bootstrap_interval(correct)
    return {"accuracy": float(correct.mean()), "low": low, "high": high, "count": len(correct)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="mini", help="a model that has never seen the family")
    parser.add_argument("--article_type", required=True)
    parser.add_argument("--write_data_without", type=Path, help="write the catalogue without the type here; no more")
    parser.add_argument("--photos", type=int, default=100)
    parser.add_argument("--count", type=int, default=300, help="pictures of other families, and at most of the new one")
    parser.add_argument("--data_dir", type=Path, default=default_data_dir())
    parser.add_argument("--config", default=str(DEFAULT_CONFIG))
    parser.add_argument("--flag", action="append", default=[], help="name=value for finetune_lora.py, repeatable")
    parser.add_argument("--lora_scale", type=float, default=1.0)
    parser.add_argument("--work_dir", type=Path, help="default: a temporary folder")
    parser.add_argument("--output", help="JSON report; the pictures lie beside it")
    arguments = parser.parse_args()
    if arguments.write_data_without is not None:
        write_without(arguments.data_dir, arguments.article_type, arguments.write_data_without)
        return
    work = arguments.work_dir or Path(tempfile.mkdtemp(prefix="lora-family-"))

    train = load_products(arguments.data_dir, split="train")
    validation = load_products(arguments.data_dir, split="validation")
    new = photos_of(validation, arguments.article_type, False, arguments.count)
    others = photos_of(validation, arguments.article_type, True, arguments.count)
    catalogue = write_catalogue(photos_of(train, arguments.article_type, False, arguments.photos), work / "photos")

    generator = gigdiff.load(arguments.base)
    before = {"new": accuracy(generator, new, None, arguments), "old": accuracy(generator, others, None, arguments)}
    flags = ["--config", arguments.config, "--pretrained_model_name_or_path", arguments.base, "--train_data_dir",
             str(catalogue), "--output_dir", str(work / "run"), "--cache_dir", str(work / "cache")]  # fmt: skip
    flags += ["--validation_prompts", json.dumps(before["new"]["prompts"][:4])]
    for pair in arguments.flag:
        name, _, value = pair.partition("=")
        flags += [f"--{name}", value]
    started = time.monotonic()
    config = parse_config(LoraConfig, "a run", flags)
    kept = tuple(prompt for prompt in config.class_prompts if not names(prompt, arguments.article_type))
    result = finetune(dataclasses.replace(config, class_prompts=kept))
    seconds = time.monotonic() - started
    after = {
        "new": accuracy(generator, new, result["lora"], arguments),
        "old": accuracy(generator, others, result["lora"], arguments),
    }
    pictures, labels = [], []
    for name, part in (("before", before), ("with the LoRA", after)):
        shown = part["new"]["images"][:8] + part["old"]["images"][:8]
        pictures += shown
        labels += [f"{name}: {p}" for p in part["new"]["prompts"][:8] + part["old"]["prompts"][:8]]
        for side in part.values():
            del side["images"], side["prompts"]
    report = {
        "base": arguments.base,
        "article_type": arguments.article_type,
        "photos": len(list(catalogue.glob("*.png"))),
        "seconds_to_train": seconds,
        "before": before,
        "after": after,
        "drop_on_old_families": before["old"]["accuracy"] - after["old"]["accuracy"],
        "real_photos_of_the_new_family": read_types(load_images(new), [r.product for r in new.records()]),
        "run": {k: v for k, v in result.items() if k != "line"},
        "flags": arguments.flag,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.output:
        path = Path(arguments.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        save_image(path.with_suffix(".png"), contact_sheet(pictures, 8, labels, scale=2), overwrite=True)


if __name__ == "__main__":
    try:
        main()
    except GigdiffError as error:
        sys.exit(f"error: {error}")
