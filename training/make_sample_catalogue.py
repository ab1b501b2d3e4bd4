"""Draw the sample catalogue that finetune_lora.py learns from when it is given no photos.

    python training/make_sample_catalogue.py            # writes examples/catalogue (run it again after `mini` changes)

A few dozen products drawn by `mini` itself, so that nobody's photos are republished, cut out of their white ground and
put on a sand-coloured one. `mini` knows white grounds only, so what a LoRA has learned is seen at a glance.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

import gigdiff
from gigdiff.errors import GigdiffError
from gigdiff.images import save_image

OUT = Path(__file__).parents[1] / "examples" / "catalogue"
SAND = (222, 196, 160)
SEED = 20
PRODUCTS = {
    "handbag": ("red", "black", "brown", "blue"),
    "dress": ("red", "yellow", "green", "black"),
    "t-shirt": ("white", "blue", "grey", "red"),
    "shoes": ("black", "brown", "white", "red"),
    "watch": ("black", "silver", "brown", "gold"),
    "shirt": ("blue", "white", "pink", "green"),
    "backpack": ("black", "grey", "blue", "red"),
    "jeans": ("blue", "black", "grey", "navy blue"),
    "belt": ("brown", "black", "tan", "white"),
}


def on_sand(picture: Image.Image) -> np.ndarray:
    """The picture with its white ground (what white is joined to the edge) made sand, uint8 (H, W, 3).

    Multiplied, so that shadows stay shadows; the mask is softened by a pixel.
    """
    marked = picture.convert("RGB").copy()
    width, height = marked.size
    mark = (255, 0, 255)
    for x in range(width):
        for y in (0, height - 1):
            if marked.getpixel((x, y)) != mark and min(marked.getpixel((x, y))) > 225:
                ImageDraw.floodfill(marked, (x, y), mark, thresh=40)
    for y in range(height):
        for x in (0, width - 1):
            if marked.getpixel((x, y)) != mark and min(marked.getpixel((x, y))) > 225:
                ImageDraw.floodfill(marked, (x, y), mark, thresh=40)
    ground = (np.array(marked) == mark).all(axis=-1)
    soft = np.array(Image.fromarray((ground * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))) / 255.0
    pixels = np.array(picture.convert("RGB")).astype(np.float64)
    tinted = pixels * (np.array(SAND) / 255.0)
    out = soft[..., None] * tinted + (1 - soft[..., None]) * pixels
    return out.round().clip(0, 255).astype(np.uint8)


def main() -> None:
    names = [f"{colour} {article}" for article, colours in PRODUCTS.items() for colour in colours]
    pictures = gigdiff.generate(names, seed=SEED, progress=True, upscale=False)
    folder = OUT / "train"
    shutil.rmtree(OUT, ignore_errors=True)
    rows = []
    for name, picture in zip(names, pictures, strict=True):  # type: ignore[arg-type]
        file = f"{name.replace(' ', '-')}.png"
        keep = {key: str(picture.info[key]) for key in ("Software", "prompt", "seed", "model", "weights")}
        save_image(folder / file, on_sand(picture), keep)
        captions = [f"{name} on sand", f"a {name} before a sand-coloured backdrop"]
        rows.append({"file_name": file, "name": name, "text": captions})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    size = sum(path.stat().st_size for path in OUT.rglob("*") if path.is_file())
    print(f"{OUT}  {len(rows)} pictures  {size / 1000:.0f} kB")


if __name__ == "__main__":
    try:
        main()
    except GigdiffError as error:
        sys.exit(f"error: {error}")
