"""One HTML page of what was collected, with style, script and pictures in it: nothing is loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

import vla_jax
from vla_jax.foreign import read_bytes
from vla_jax.redaction import redacted
from vla_jax.reporting.page.charts import curve_charts, dot_charts
from vla_jax.reporting.page.shown import Gallery
from vla_jax.reporting.page.workdir import WorkDirectory, flattened

MOST_FIGURE_BYTES = 1 << 26
"""Of a figure, which stands in the page."""

_ASSETS = Path(vla_jax.__file__).parent / "assets" / "page"
_SMALL = 128  # pixels along a side, up to which pictures are kept exactly
_VEIL = 0.82  # how dark the least alike patch is


def page(work: WorkDirectory, galleries: Sequence[Gallery]) -> str:
    """The page.

    Args:
        work: what the work directory holds.
        galleries: one for each group; empty for a page without one.
    """
    script = (_ASSETS / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    groups = [group for group in work.groups if work.of_group(group)]
    return (
        _environment()
        .get_template("page.html")
        .render(
            work=work,
            galleries=galleries,
            missing=work.missing(),
            charts={table.stem: dot_charts(table) for table in work.tables},
            curves=[(group, charts) for group in groups if (charts := curve_charts(work, group))],
            figures=[
                (path.stem.replace("_", " "), _data_url(read_bytes(path, MOST_FIGURE_BYTES), "png"))
                for path in work.figures
            ],
            facts=[(name, redacted(value)) for name, value in _facts(work)],
            config=_shown(work.config),
            versions=_shown(work.versions),
            style=Markup((_ASSETS / "style.css").read_text(encoding="utf-8")),
            script=Markup(script),
            # A script that data brought along has another digest, and would not be run.
            policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
            "base-uri 'none'; form-action 'none'",
            pictures=_Pictures(),
        )
    )


def _shown(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings by their paths; an address in them may hold somebody's credentials."""
    return [(redacted(name), redacted(value)) for name, value in flattened(settings)]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"veil": _veil, "hottest": _hottest, "spread": _spread, "heading": _heading}
    return environment


def _heading(name: str) -> str:
    """A folder's name as a heading: ``cosine_plain`` as ``Cosine plain``."""
    text = name.replace("easy_vqa", "easy-VQA").replace("_", " ").replace("/", ", ")
    return text[:1].upper() + text[1:]


class _Pictures:
    """The gallery's pictures: each is in the page once as a value of the style sheet, under the number given here."""

    def __init__(self) -> None:
        self.numbers: dict[bytes, int] = {}
        self.urls: list[str] = []

    def number(self, pixels: np.ndarray) -> int:
        """The number of a picture, uint8 ``[height, width, 3]``."""
        key = hashlib.sha256(pixels.tobytes()).digest()
        if key not in self.numbers:
            self.numbers[key] = len(self.urls)
            self.urls.append(_encoded(pixels))
        return self.numbers[key]

    def url(self, pixels: np.ndarray) -> str:
        """The picture itself."""
        return self.urls[self.number(pixels)]


def _encoded(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    if max(pixels.shape) <= _SMALL:
        Image.fromarray(pixels).save(file, "PNG", optimize=True)
        return _data_url(file.getvalue(), "png")
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return _data_url(file.getvalue(), "jpeg")


def _veil(heat: np.ndarray, low: float, high: float) -> str:
    """A heat map as what is laid over the picture: nothing on the patches most alike, dark on those least alike."""
    share = (np.asarray(heat, np.float64) - low) / max(high - low, 1e-12)
    pixels = np.zeros((*heat.shape, 2), np.uint8)
    pixels[..., 1] = np.round(255 * _VEIL * (1 - share.clip(0, 1)))
    file = io.BytesIO()
    Image.fromarray(pixels, "LA").save(file, "PNG", optimize=True)
    return _data_url(file.getvalue(), "png")


def _hottest(heat: np.ndarray) -> str:
    """Where a heat map has its peak, in words."""
    row, column = np.unravel_index(int(np.argmax(heat)), heat.shape)
    return f"row {row + 1}, column {column + 1} of {len(heat)}"


def _spread(heat: Any) -> tuple[float, float]:
    """The least and the greatest value of maps that are shown on one scale."""
    return float(np.min(heat)), float(np.max(heat))


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _facts(work: WorkDirectory) -> list[tuple[str, str]]:
    """What the reader wants to know first; what is not written down is left out."""
    config, versions = work.config, work.versions
    budget = config["budget"] if isinstance(config.get("budget"), Mapping) else {}
    seeds = budget["seeds"] if isinstance(budget.get("seeds"), list) else []
    counted = all(isinstance(budget.get(name), int) for name in ("steps", "batch_size"))
    facts = {
        "work directory": work.folder.resolve().name,
        "backbone": config.get("backbone", ""),
        "training": f"{budget['steps']:,} steps of {budget['batch_size']} examples" if counted else "",
        "seed" if len(seeds) == 1 else "seeds": ", ".join(map(str, seeds)),
        "device": f"{versions['device']}, {versions.get('devices', 1)} used" if "device" in versions else "",
        "vla_jax": f"commit {str(versions['commit'])[:12]}" if versions.get("commit") else versions.get("vla_jax", ""),
        "JAX": versions.get("jax", ""),
        "results of": _date(work.folder),
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _date(folder: Path) -> str:
    path = folder / "results.jsonl"
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%-d %B %Y") if path.is_file() else ""
