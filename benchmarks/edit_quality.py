"""Do edits do what was asked: recolouring read by the probes, and inpainting's untouched pixels.

    python benchmarks/edit_quality.py --count 400 --inpaint 100

Recolouring: validation photos, each to another colour group drawn by its index, by `gigdiff.edit(photo, colour=...)`.
A probe reads the article type before and after (goal: at most 5 points lost) and the colour group after (goal: 0.85
of what it reads right off real photos of their own colours). Inpainting: photos and random masks through --model; every
pixel outside the mask must be the photo's own (goal: all). Writes sheets; JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import gigdiff
from gigdiff.data import load_products
from gigdiff.data.vocabulary import COLOUR_GROUPS, colour_group
from gigdiff.errors import GigdiffError, InputError
from gigdiff.images import contact_sheet, fit_image, save_image, to_pil
from gigdiff.metrics.probe import bootstrap_interval, load_probe, probe_features
from gigdiff.rng import derive_seed

#: Group -> the colour that is asked for. Metals are finishes, which no change of colour gives.
TARGETS = {
    "beige": "Beige", "black": "Black", "blue": "Navy Blue", "brown": "Brown", "green": "Green", "grey": "Grey",
    "orange": "Orange", "pink": "Pink", "purple": "Purple", "red": "Red", "teal": "Teal", "white": "White",
    "yellow": "Yellow",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="../shared/data/fashion-products")
    parser.add_argument("--count", type=int, default=400, help="photos to recolour")
    parser.add_argument("--inpaint", type=int, default=100, help="photos to inpaint; 0 = none")
    parser.add_argument(
        "--num_inference_steps", type=int, default=4, help="of inpainting: the pixels kept need no more"
    )
    parser.add_argument("--model", default="mini")
    parser.add_argument("--output", type=Path, default=Path("runs/edit_quality"))
    args = parser.parse_args()
    try:
        print(json.dumps(recolouring(args) | (inpainting(args) if args.inpaint else {})))
    except GigdiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def recolouring(args: argparse.Namespace) -> dict[str, object]:
    data = load_products(args.data_dir, split="validation")
    groups = sorted(set(TARGETS) & set(COLOUR_GROUPS))
    records = data.records()
    order = np.random.default_rng(0).permutation(len(records))
    photos, made, wanted, types, failed = [], [], [], [], 0
    for i in order:
        group = colour_group(records[i].product.colour)
        if len(photos) == args.count:
            break
        if group is None or records[i].product.category is None:
            continue
        others = [one for one in groups if one != group]
        target = others[derive_seed(0, "recolour", int(i)) % len(others)]
        photo = fit_image(data[int(i)].image, 80, 64)  # type: ignore[arg-type]
        try:
            out = np.asarray(gigdiff.edit(photo, colour=TARGETS[target]))
        except InputError:  # white goods on white: nothing was found; counted as not recoloured
            out, failed = photo, failed + 1
        photos.append(photo)
        made.append(out)
        wanted.append((group, target))
        types.append(records[i].product)
    before, after = np.stack(photos), np.stack(made)
    probes = [load_probe("article_type"), load_probe("colour_group")]
    of_before, of_after = (probe_features(images, probes) for images in (before, after))
    type_before, type_after = (probes[0].correct(f, types) for f in (of_before, of_after))
    own = np.array([float(a == w[0]) for a, w in zip(probes[1].predict(of_before), wanted, strict=True)])
    read = probes[1].predict(of_after)
    reached = np.array([float(a == w[1]) for a, w in zip(read, wanted, strict=True)])
    result = {
        "photos": len(photos),
        "no_product_found": failed,
        "type_before": float(np.nanmean(type_before)),
        "type_after": float(np.nanmean(type_after)),
        "type_points_lost": float(100 * (np.nanmean(type_before) - np.nanmean(type_after))),
        "colour_on_real": float(own.mean()),
        "colour_after": float(reached.mean()),
        "colour_over_real": float(reached.mean() / own.mean()),
        "colour_interval": bootstrap_interval(reached),
        "by_target": {
            g: round(float(np.mean([r for r, w in zip(reached, wanted, strict=True) if w[1] == g])), 3)
            for g in groups if any(w[1] == g for w in wanted)
        },
    }  # fmt: skip
    rows = [
        x
        for start in range(0, min(48, len(photos)), 12)
        for x in (*photos[start : start + 12], *made[start : start + 12])
    ]
    labels = [
        x
        for start in range(0, min(48, len(photos)), 12)
        for x in (*(w[0] for w in wanted[start : start + 12]), *(f"{w[1]}?" for w in wanted[start : start + 12]))
    ]
    save_image(args.output / "recolour.png", contact_sheet(rows, 12, labels, scale=2), overwrite=True)
    print(
        f"recolouring {len(photos)} photos: type {result['type_before']:.3f} -> {result['type_after']:.3f} (goal: 5 "
        f"points lost at most), colour {result['colour_after']:.3f}, {result['colour_over_real']:.2f} of real (0.85)",
        file=sys.stderr,
    )
    return {"recolour": result}


def inpainting(args: argparse.Namespace) -> dict[str, object]:
    data = load_products(args.data_dir, split="validation", limit=args.inpaint)
    model = gigdiff.load(args.model)
    identical, changed, shown = 0, 0, []
    for i in range(len(data)):
        random = np.random.default_rng(derive_seed(0, "inpaint", i))
        photo: Image.Image = data[i].image  # type: ignore[assignment]
        photo = photo.convert("RGB")
        mask = np.zeros((photo.height, photo.width), bool)
        top, left = random.integers(0, photo.height // 2), random.integers(0, photo.width // 2)
        mask[top : top + random.integers(4, photo.height // 2), left : left + random.integers(4, photo.width // 2)] = (
            True
        )
        prompt = str(data[i].product.to_prompt())
        out = gigdiff.edit(
            photo, prompt, mask_image=mask, model=model, seed=i, num_inference_steps=args.num_inference_steps
        )
        old, new = np.asarray(photo), np.asarray(out)
        identical += int((old[~mask] == new[~mask]).all())
        changed += int((old[mask] != new[mask]).any())
        if len(shown) < 24:
            hidden = np.where(mask[..., None], np.uint8(128), old)
            shown += [fit_image(to_pil(x), 80, 64) for x in (old, hidden, new)]
    save_image(args.output / "inpaint.png", contact_sheet(shown, 12, scale=2), overwrite=True)
    print(f"inpainting: outside the mask identical in {identical} of {len(data)}", file=sys.stderr)
    return {"inpaint": {"photos": len(data), "identical_outside": identical, "changed_inside": changed}}


if __name__ == "__main__":
    sys.exit(main())
