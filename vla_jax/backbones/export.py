"""A backbone back in the hub's format, so that transformers loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.convert import config_to_hub, hub_tensors
from vla_jax.backbones.weights import WEIGHTS_NAME, storage_dtype
from vla_jax.errors import UserError


def export_backbone(
    params: Mapping[str, Any],
    config: CLIPConfig,
    folder: str | Path,
    *,
    dtype: Any = None,
    tokenizer: Any = None,
    image_processor: Any = None,
) -> Path:
    """Writes ``config.json``, ``model.safetensors``, the tokenizer and ``preprocessor_config.json``.

    ``transformers.CLIPModel.from_pretrained(folder)`` and :func:`vla_jax.backbones.loading.load_backbone` read the
    folder. Files of the same names are overwritten.

    Args:
        params: the tree below ``backbone/``, of arrays that this process can read whole.
        config: the shape of the backbone.
        folder: where to write; made if it does not exist.
        dtype: dtype of the file: ``float32`` (None), ``bfloat16`` or ``float16``.
        tokenizer: a tokenizer of transformers; None writes none.
        image_processor: an image processor of transformers; None writes CLIP's own settings for the image size.

    Returns:
        The folder.

    Raises:
        UserError: the parameters do not fit the configuration, the folder is a file, the format cannot say the
            configuration, or a weight does not fit into float16.
    """
    storage = storage_dtype(dtype)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot export into {folder}: it is a file; give a folder")
    settings = config_to_hub(config) | {"dtype": storage.name}
    if tokenizer is not None:
        # transformers looks these up in the configuration when it generates or pads; the model itself does not.
        settings["text_config"] |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tensors = {name: _cast(name, tensor, storage) for name, tensor in hub_tensors(params, config)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    # transformers refuses a file that does not say which framework's conventions it follows.
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if image_processor is None:
        from transformers import CLIPImageProcessorPil  # takes seconds

        size = config.image_size
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    image_processor.save_pretrained(folder)
    return folder


def _cast(name: str, tensor: np.ndarray, storage: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # reported below, with the tensor's name
        cast = tensor.astype(storage)
    if not np.isfinite(cast.astype(np.float32)).all():
        raise UserError(f"tensor {name!r} does not fit into {storage.name}, or is not finite; export as float32")
    return cast
