"""What a ``preprocessor_config.json`` says of pictures, checked: the processor itself takes anything for anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vla_jax.backbones.weights import read_json
from vla_jax.errors import UserError
from vla_jax.foreign import shown

MOST_PIXELS_A_SIDE = 1 << 13
"""That pictures are resized to or cropped to."""


def read_picture_settings(path: Path) -> dict[str, Any]:
    """The settings that make pixels; whatever else the file says is left out.

    Raises:
        UserError: it cannot be read, or a setting has a value that it cannot have.
    """
    kept = {name: value for name, value in read_json(path).items() if name in _SETTINGS and value is not None}
    for name, value in kept.items():
        holds, allowed = _SETTINGS[name]
        if not holds(value):
            raise UserError(f"{path}: {name} is {shown(value)}; allowed: {allowed}")
    return kept


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def _is_edge(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_PIXELS_A_SIDE


def _is_size(value: Any) -> bool:
    keys = ({"shortest_edge"}, {"height", "width"})
    return _is_edge(value) or (isinstance(value, dict) and set(value) in keys and all(map(_is_edge, value.values())))


def _is_three(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


_FLAG = (lambda value: isinstance(value, bool), "true and false")
_SIZE = (_is_size, f"pixels from 1 to {MOST_PIXELS_A_SIDE}, as a number, shortest_edge, or height and width")
_SETTINGS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), _FLAG),
    **dict.fromkeys(("use_square_size", "default_to_square"), _FLAG),
    **dict.fromkeys(("size", "crop_size"), _SIZE),
    **dict.fromkeys(("image_mean", "image_std"), (_is_three, "three numbers")),
    "resample": (lambda value: _is_number(value) and value in range(6), "0 to 5"),
    "rescale_factor": (_is_number, "a number"),
}
