"""What the tests of published layouts share: small pictures, and files written as the authors write them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_picture(path: Path, shade: int = 0, size: tuple[int, int] = (8, 6)) -> Path:
    """A picture in which red counts columns and green counts rows, tenfold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([10 * columns, 10 * rows, np.full_like(rows, shade)], -1).astype(np.uint8)
    Image.fromarray(pixels).save(path, "PNG")  # whatever the name says: without loss
    return path


def pixels_of(picture: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(picture)) as image:
        return np.asarray(image.convert("RGB"))
