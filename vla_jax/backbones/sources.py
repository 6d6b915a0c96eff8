"""Where a backbone's name leads: a folder here, the one inside this package, or a model on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from vla_jax.backbones.clip_config import PRESETS
from vla_jax.backbones.weights import INDEX_NAME, WEIGHTS_NAME, conversion_command
from vla_jax.errors import UserError

TINY = "tiny"
RANDOM = "random:"
_TINY_FOLDER = Path(__file__).resolve().parents[1] / "assets" / "tiny"
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# Configuration, tokenizer, image processor and the weights transformers would read; no pickles, no second copies.
_HUB_FILES = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
)


def find_folder(name: str) -> Path:
    """The folder, in the hub's format, that a backbone's name stands for; a hub name is fetched if need be.

    Raises:
        UserError: there is no such folder or model, or the hub cannot be reached.
    """
    if name == TINY:
        if not (_TINY_FOLDER / "config.json").is_file():
            raise UserError(
                f"the package has no backbone in {_TINY_FOLDER}; install it whole, or make one with "
                "launch.py --experiment=pretrain_tiny"
            )
        return _TINY_FOLDER
    if "://" in name:
        raise UserError(
            f"the backbone {name!r} is an address on the net; give a folder or a hub name (owner/model). For a model "
            "that is not public set HF_TOKEN, which nothing here writes down"
        )
    folder = _existing(name)
    if folder is not None:
        return folder
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"no backbone {name!r}: there is no such folder, and it is no hub name (owner/model); allowed: a folder, a "
            f"hub name, {TINY!r}, or '{RANDOM}<preset>' with a preset of {', '.join(PRESETS)}"
        )
    return _download(match["name"], match["revision"])


def _existing(name: str) -> Path | None:
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, of a user who does not exist, or no path at all
        return None


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES)))
    # Whatever goes wrong on the way (no network, no such model, a gate, a full disk) ends in the same advice.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"backbone {name!r} is no folder here and could not be fetched from the hub ({reason}). Check the name, or "
            f"fetch it on a machine with a network, `hf download {name} --local-dir FOLDER`, and give that folder"
        ) from error
    if not any((folder / file).is_file() for file in (WEIGHTS_NAME, INDEX_NAME)):
        local = Path(name.split("/")[1])
        raise UserError(
            f"{name!r} has no safetensors on the hub{f' at {revision}' if revision else ''}, and pickled weights are "
            "never opened here. Look for a revision that has them (NAME@REVISION), or fetch and convert them once, "
            f"where PyTorch is installed, and give the folder {str(local)!r}:\n"
            f"  hf download {name} --local-dir {local}\n"
            f"  {conversion_command(local, [local / 'pytorch_model.bin'])}"
        )
    return folder
