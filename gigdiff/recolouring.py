"""Another colour for the same product: CIELAB arithmetic on the product's own pixels, so shape and texture stay.

A diffusion model redraws what it recolours; the numbers of a photo do not need it. The product's main colour is found
by clustering, its pixels are moved to the target (lightness by the range that is there, chroma and hue to the
target's), and prints, skin, hair and background are left alone.
"""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

from gigdiff.colour import lab_to_rgb, rgb_to_lab
from gigdiff.errors import InputError, nearest
from gigdiff.foreground import blur, product_mask
from gigdiff.images import to_pil

__all__ = ["asked_colour", "colour_rgb", "main_colour_weights", "match_palette", "recolour", "worn_rgb"]

CLUSTERS = 6
WORN_CHROMA = 0.55


def colour_rgb(name: str) -> tuple[int, int, int]:
    """sRGB of a colour: a base colour of the catalogue, a synonym or shop name of one, or "#rrggbb".

    >>> colour_rgb("navy") == colour_rgb("Navy Blue")
    True
    """
    from gigdiff.data.vocabulary import COLOUR_NAMES, COLOUR_RGB, COLOUR_SYNONYMS

    wanted = re.sub(r"[\s_-]+", " ", str(name).strip().lower()).replace("gray", "grey")
    if re.fullmatch(r"#[0-9a-f]{6}", wanted):
        return int(wanted[1:3], 16), int(wanted[3:5], 16), int(wanted[5:7], 16)
    known = {colour.lower(): colour for colour in COLOUR_RGB}
    known |= {word.lower(): colour for word, colour in COLOUR_NAMES.items() if colour in COLOUR_RGB}
    known |= {
        word.lower(): colour for colour, words in COLOUR_SYNONYMS.items() if colour in COLOUR_RGB for word in words
    }
    if wanted not in known:
        raise InputError(
            f'colour "{name}" is unknown; {nearest(wanted, [c.lower() for c in COLOUR_RGB])}, or "#rrggbb".'
        )
    return COLOUR_RGB[known[wanted]]


def worn_rgb(name: str) -> tuple[int, int, int]:
    """sRGB that goods sold as of colour `name` have: less strong than the colour of that name; "#rrggbb" as it is.

    In the catalogue the middle of the goods called red, orange or yellow has 0.57 to 0.62 of the chroma of the sRGB
    colour of that name, and of the pink, purple and green ones less (medians of CIELAB over 60 photos each). A product
    in the pure colour looks painted, and a classifier no longer knows what it is. Greys and beiges stay as they are.
    """
    if str(name).strip().startswith("#"):
        return colour_rgb(name)
    lab = rgb_to_lab(np.array(colour_rgb(name)))
    lab[1:] *= np.interp(np.hypot(*lab[1:]), [20, 45], [1.0, WORN_CHROMA])
    red, green, blue = (int(v) for v in lab_to_rgb(lab))
    return red, green, blue


def asked_colour(prompt: str) -> str | None:
    """The colour of "the same coat in navy" and "same bag, but in dark red"; None for any other prompt.

    >>> asked_colour("The same coat in navy blue"), asked_colour("a navy coat")
    ('navy blue', None)
    """
    found = re.fullmatch(r"\s*(?:the\s+)?same\b.*\bin\s+(?:an?\s+)?([\w\s#-]+?)\s*[.!]?\s*", prompt, re.IGNORECASE)
    return found[1] if found else None


def recolour(image: Image.Image, rgb: tuple[int, int, int], strength: float = 1.0) -> Image.Image:
    """The picture with the product's main colour replaced; the same size, `.info` kept, background untouched.

    Args:
        image: RGB, a product on a plain background.
        rgb: the target, 0 to 255. strength: 0 to 1, how far to go there.
    """
    pixels = np.asarray(image)
    lab = rgb_to_lab(pixels)
    found = main_colour_weights(lab, product_mask(pixels))
    weight = found * strength
    if not (found > 0.5).any():
        raise InputError("no product was found on the background; recolouring needs a product on a plain background.")
    target = rgb_to_lab(np.array(rgb))
    inside = lab[found > 0.5]
    low, middle, high = np.percentile(inside[:, 0], [3, 50, 97])
    # White goods still have folds, black ones still have lights: keep the middle where its range fits.
    centre = np.clip(target[0], 14, 93)
    # A black's folds span a few units of lightness; on a lighter colour the same light makes a wider range.
    gain = np.interp(middle, [10, 35], [np.interp(centre, [20, 60], [1.0, 1.8]), 1.0])
    up, down = max(high - middle, 1e-3) * gain, max(middle - low, 1e-3) * gain
    # A bright saturated yellow has no lighter yellow above it in sRGB: its shading goes downwards only.
    bright = np.clip((np.hypot(*target[1:]) - 10) / 50, 0, 1) * np.clip((centre - 60) / 20, 0, 1)
    centre -= 3 * bright
    ceiling = (1 - bright) * 99 + bright * (centre + 2)
    away = (lab[..., 0] - middle) * gain
    away *= np.where(away > 0, min(1.0, (ceiling - centre) / up), min(1.0, (centre - 4) / down))
    away = np.minimum(away, ceiling - centre)
    lightness = centre + away
    # Shade keeps the hue and loses chroma, light too, a little.
    chroma = np.clip(lightness / max(centre, 1.0), 0.45, 1.1)[..., None]
    own = np.median(inside[:, 1:], axis=0)
    variation = 0.25 if np.hypot(*target[1:]) > 8 else 0.1
    tint = target[1:] * chroma + variation * (lab[..., 1:] - own)
    moved = np.concatenate([lightness[..., None], tint], axis=-1)
    touched = weight > 0.004
    out = pixels.copy()
    mixed = lab + weight[..., None] * (moved - lab)
    out[touched] = lab_to_rgb(mixed[touched])
    made = to_pil(out)
    made.info.update(image.info)
    return made


def main_colour_weights(lab: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """How much of each pixel is of the product's main colour: float64 (H, W) in 0 to 1.

    Args:
        lab: CIELAB (H, W, 3). mask: the product, (H, W) in 0 to 1.
    """
    core = mask > 0.8
    if core.sum() < 20:
        return np.zeros(mask.shape)
    features = lab * np.array([0.4, 1.0, 1.0])  # shading moves lightness within one colour
    height, width = mask.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    central = np.exp(-((y / 0.7) ** 2) - (x / 0.7) ** 2)
    # What all but is background is its rim or its reflection, unless there is little else.
    ground = np.median(lab[mask < 0.05], axis=0) if (mask < 0.05).any() else np.array([100.0, 0.0, 0.0])
    apart = np.clip(np.linalg.norm(lab - ground, axis=-1) / 12, 0.3, 1)
    points, importance = features[core], (central * apart)[core]
    centres, labels = _cluster(points, importance)
    shares = np.bincount(labels, importance, len(centres)) / importance.sum()
    skin = np.array([_like_skin(centre / np.array([0.4, 1, 1])) for centre in centres])
    # A whole product of skin's colour is a beige product; beside much that is not, it is somebody's arm.
    goods = shares * np.where(skin & (shares[~skin].sum() > 0.42), 0.02, 1.0)
    # One colour's light and shade are several clusters: the greatest family counts, not the greatest cluster.
    kin = np.array([[_same_colour(a, b) for b in centres] for a in centres]) & (goods >= shares * 0.5)
    main = int((kin @ goods + 1e-3 * goods).argmax())
    alike = kin[main].copy()
    alike[main] = True
    distance = np.linalg.norm(features[:, :, None, :] - centres[None, None], axis=-1)
    near = distance[..., alike].min(axis=-1)
    if alike.all():
        weight = np.ones(mask.shape)
    else:
        far = distance[..., ~alike].min(axis=-1)
        weight = np.clip(0.5 + 1.5 * (far - near) / (far + near + 2.0), 0, 1)
    return np.clip(0.5 * weight + 0.5 * blur(weight, 1), 0, 1) * mask


def match_palette(image: Image.Image, reference: Image.Image, strength: float = 1.0) -> Image.Image:
    """Give the product the colours and contrast of the reference's product: the linear map of CIELAB that turns one
    mean and covariance into the other's with the least change (Pitié and Kokaram 2007, "Monge-Kantorovitch").

    Args:
        image, reference: RGB, products on plain backgrounds. strength: 0 to 1.
    """
    pixels, other = np.asarray(image), np.asarray(reference)
    mask, theirs = product_mask(pixels), product_mask(other)
    if not (mask > 0.8).any() or not (theirs > 0.8).any():
        raise InputError("no product was found in the picture or in reference_image; both need a plain background.")
    lab = rgb_to_lab(pixels)
    ours_in, theirs_in = lab[mask > 0.8], rgb_to_lab(other[theirs > 0.8])
    a, b = np.cov(ours_in.T) + 4 * np.eye(3), np.cov(theirs_in.T) + 4 * np.eye(3)
    root, inverse = _power(a, 0.5), _power(a, -0.5)
    change = inverse @ _power(root @ b @ root, 0.5) @ inverse
    moved = (lab - ours_in.mean(axis=0)) @ change.T + theirs_in.mean(axis=0)
    weight = (strength * mask)[..., None]
    touched = weight[..., 0] > 0.004
    out = pixels.copy()
    out[touched] = lab_to_rgb((lab + weight * (moved - lab))[touched])
    made = to_pil(out)
    made.info.update(image.info)
    return made


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 1e-9) ** exponent) @ vectors.T


def _cluster(points: np.ndarray, importance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted k-means from a fixed start (the farthest point next): centres (k, 3) and each point's label."""
    if len(points) > 4000:
        chosen = np.linspace(0, len(points) - 1, 4000).astype(int)
    else:
        chosen = np.arange(len(points))
    sample, weights = points[chosen], importance[chosen]
    centres = [np.average(sample, axis=0, weights=weights)]
    for _ in range(CLUSTERS - 1):
        away = np.min([np.linalg.norm(sample - c, axis=1) for c in centres], axis=0)
        centres.append(sample[int((away * np.sqrt(weights)).argmax())])
    found = np.array(centres)
    for _ in range(12):
        labels = np.linalg.norm(sample[:, None] - found[None], axis=-1).argmin(axis=1)
        for k in range(len(found)):
            if (labels == k).any():
                found[k] = np.average(sample[labels == k], axis=0, weights=weights[labels == k] + 1e-9)
    return found, np.linalg.norm(points[:, None] - found[None], axis=-1).argmin(axis=1)


def _same_colour(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two cluster centres (lightness already shrunk) are light and shade of one colour."""
    chroma_a, chroma_b = np.hypot(*a[1:]), np.hypot(*b[1:])
    if chroma_a < 9:
        return bool(chroma_b < 9 and abs(a[0] - b[0]) < 0.4 * 32)
    turn = np.degrees(np.arctan2(a[2], a[1]) - np.arctan2(b[2], b[1]))
    same_hue = abs((turn + 180) % 360 - 180) < 28
    return bool(same_hue and chroma_b > 0.25 * chroma_a)


def _like_skin(lab: np.ndarray) -> bool:
    hue = np.degrees(np.arctan2(lab[2], lab[1]))
    return bool(30 < lab[0] < 88 and 30 < hue < 78 and 10 < np.hypot(lab[1], lab[2]) < 38)
