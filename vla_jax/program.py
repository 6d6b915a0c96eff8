"""What makes two processes run the same program: configuration, source files, packages."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import vla_jax
from vla_jax.training.metrics import versions

# What processes of one run may differ in: each speaks of its own machine.
_OWN = ("platform", "cores", "commit")


def facts(experiment: ModuleType, config: Any) -> dict[str, str]:
    """What must be the same on every process of a run, by name, as :func:`vla_jax.distributed.agree` compares it.

    Args:
        experiment: the experiment's module; its file counts as the package's files do.
        config: the experiment's configuration, a (nested) dataclass.

    Returns:
        Every field of the configuration, the versions of Python and packages, the kind and number of devices, and a
        digest of every source file.
    """
    found = {f"--{name}": value for name, value in _fields(dataclasses.asdict(config), "config")}
    found |= {name: str(value) for name, value in versions().items() if name not in _OWN}
    package = Path(vla_jax.__file__).parent
    files = {f"vla_jax/{file.relative_to(package).as_posix()}": file for file in sorted(package.rglob("*.py"))}
    if own := getattr(experiment, "__file__", None):
        files[f"experiments/{Path(own).name}"] = Path(own)
    return found | {name: hashlib.sha256(file.read_bytes()).hexdigest()[:12] for name, file in files.items()}


def _fields(content: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _fields(value, f"{name}.{key}")
    else:
        yield name, json.dumps(content, default=str)
