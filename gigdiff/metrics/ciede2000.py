"""CIEDE2000, the colour difference that the eye agrees with: 1 is just noticeable, 10 another shade, 50 another hue.

Luo, Cui & Rigg 2001, as written out by Sharma, Wu & Dalal 2005 ("The CIEDE2000 Color-Difference Formula"), whose
equation numbers are given below.
"""

from __future__ import annotations

import numpy as np

__all__ = ["ciede2000"]


def ciede2000(lab1: np.ndarray, lab2: np.ndarray) -> np.ndarray:
    """CIELAB (..., 3) and (..., 3), broadcast against each other -> difference (...), at least 0. Symmetric."""
    l1, a1, b1 = np.moveaxis(np.asarray(lab1, np.float64), -1, 0)
    l2, a2, b2 = np.moveaxis(np.asarray(lab2, np.float64), -1, 0)
    c7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    g = 0.5 * (1 - np.sqrt(c7 / (c7 + 25.0**7)))  # (4)
    a1, a2 = (1 + g) * a1, (1 + g) * a2  # (5)
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)  # (6)
    h1, h2 = np.degrees(np.arctan2(b1, a1)) % 360, np.degrees(np.arctan2(b2, a2)) % 360  # (7)

    grey = c1 * c2 == 0
    dh = (h2 - h1 + 180) % 360 - 180  # (10): the shorter way round
    dh = np.where(grey, 0.0, dh)
    dl, dc = l2 - l1, c2 - c1  # (8), (9)
    dbig = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(dh / 2))  # (11)

    lm, cm = (l1 + l2) / 2, (c1 + c2) / 2  # (12), (13)
    apart = np.abs(h1 - h2) > 180
    total = h1 + h2
    hm = np.where(grey, total, np.where(apart, np.where(total < 360, total + 360, total - 360) / 2, total / 2))  # (14)
    t = (
        1
        - 0.17 * np.cos(np.radians(hm - 30))
        + 0.24 * np.cos(np.radians(2 * hm))
        + 0.32 * np.cos(np.radians(3 * hm + 6))
        - 0.20 * np.cos(np.radians(4 * hm - 63))
    )  # (15)
    rc = 2 * np.sqrt(cm**7 / (cm**7 + 25.0**7))  # (17)
    rt = -np.sin(np.radians(60 * np.exp(-(((hm - 275) / 25) ** 2)))) * rc  # (16), (21)
    sl = 1 + 0.015 * (lm - 50) ** 2 / np.sqrt(20 + (lm - 50) ** 2)  # (18)
    sc, sh = 1 + 0.045 * cm, 1 + 0.015 * cm * t  # (19), (20)
    terms = (dl / sl) ** 2 + (dc / sc) ** 2 + (dbig / sh) ** 2 + rt * (dc / sc) * (dbig / sh)  # (22)
    return np.sqrt(np.clip(terms, 0.0, None))
