"""``adapter_config.json``: which of its fields are read, which tell only where it comes from, which are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vla_jax.backbones.weights import read_json
from vla_jax.errors import UserError
from vla_jax.foreign import printable, shown

CONFIG_NAME = "adapter_config.json"

MOST_CONFIG_BYTES = 1 << 20
"""Of the file; one that names each map of a large model has some hundred thousand."""

MOST_ENTRIES = 4096
"""Of a list or table in it; every one is compared with every module."""

MOST_RANK = 1 << 16
"""No map of a CLIP is as wide."""

# Where a checkpoint comes from and how peft is to run it; nothing of that changes what it computes.
PROVENANCE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)
_TARGETS = frozenset({"target_modules", "exclude_modules", "modules_to_save"})

READ: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "LORA": _TARGETS
        | {
            "alpha_pattern",
            "init_lora_weights",
            "layers_pattern",
            "layers_to_transform",
            "lora_alpha",
            "lora_dropout",
            "r",
            "rank_pattern",
            "use_dora",
            "use_rslora",
        },
        "IA3": _TARGETS | {"feedforward_modules"},
        "LN_TUNING": _TARGETS,
    }
)
"""By peft's type, the fields that say what the adapter is."""

# How training started, which init_lora_weights answers for, and details of what must be off anyway.
IGNORED: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "LORA": frozenset({"corda_config", "eva_config", "lora_ga_config", "megatron_core", "qalora_group_size"}),
        "IA3": frozenset({"init_ia3_weights"}),
        "LN_TUNING": frozenset(),
    }
)

# The others rewrite the backbone's own weights when peft loads the checkpoint, or train another thing than A and B.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")
_PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "ADAPTION_PROMPT")


def read_config(path: Path) -> dict[str, Any]:
    """The settings in ``adapter_config.json`` that say what the adapter is, checked one by one.

    Raises:
        UserError: a method or a field that is not supported; the message names field, value and what is.
    """
    settings = read_json(path, MOST_CONFIG_BYTES)
    kind = settings.get("peft_type")
    if not isinstance(kind, str):
        raise UserError(f"{path}: peft_type {shown(kind)} is not supported; supported: {', '.join(READ)}")
    if kind in _PROMPTS:
        raise UserError(
            f"{path}: peft_type {kind!r} cannot be used with CLIP: peft hands the model embeddings instead of token "
            "ids, or a decoder's cached keys, and transformers' CLIPModel takes neither. Supported: " + ", ".join(READ)
        )
    if kind not in READ:
        raise UserError(f"{path}: peft_type {kind!r} is not supported; supported: {', '.join(READ)}")
    for field, value in settings.items():
        if field in PROVENANCE | READ[kind] | IGNORED[kind]:
            continue
        if value not in (None, False, "none") and value != [] and value != {}:
            raise UserError(
                f"{path}: {field} = {shown(value)} is not supported, since it changes what the adapter computes; "
                f"supported: {field} off (false, null, 'none' or empty)"
            )
    for field, (holds, allowed) in _RULES[kind].items():
        if field in settings and not holds(settings[field]):
            raise UserError(f"{path}: {field} = {shown(settings[field])} is not supported; supported: {allowed}")
    return settings


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_RANK


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and printable(value, lines=True)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST_ENTRIES and all(map(_is_text, value))


def _is_layers(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= MOST_ENTRIES and all(map(_is_index, value))
    return value is None or _is_index(value)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_table_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def is_table(value: Any) -> bool:
        return isinstance(value, dict) and len(value) <= MOST_ENTRIES and all(map(holds, value.values()))

    return lambda value: value is None or is_table(value)


def _optional_targets(value: Any) -> bool:
    return value is None or _is_text(value) or _is_texts(value)


Rule = tuple[Callable[[Any], bool], str]
_TARGET_RULES: dict[str, Rule] = {
    "target_modules": (_optional_targets, "a list of module names, or a regular expression"),
    "exclude_modules": (_optional_targets, "null, a list of module names, or a regular expression"),
    "modules_to_save": (lambda value: value is None or _is_texts(value), "null, or a list of module names"),
}
_RULES: dict[str, dict[str, Rule]] = {
    "LORA": _TARGET_RULES
    | {
        "r": (_is_count, "a whole number from 1"),
        "lora_alpha": (_is_number, "a number"),
        "lora_dropout": (_is_share, "a number from 0, below 1"),
        "use_dora": (_is_flag, "true or false"),
        "use_rslora": (_is_flag, "true or false"),
        "rank_pattern": (_is_table_of(_is_count), "patterns with whole numbers from 1"),
        "alpha_pattern": (_is_table_of(_is_number), "patterns with numbers"),
        "layers_to_transform": (_is_layers, "null, a layer or a list of layers"),
        "layers_pattern": (_optional_targets, "null, a pattern or a list of patterns"),
        "init_lora_weights": (
            lambda value: value in _STARTS,
            "true, false, 'gaussian', 'orthogonal' and 'eva', which leave the backbone's weights as they are. For the "
            "others give save_pretrained of peft path_initial_model_for_weight_conversion, which makes plain LoRA",
        ),
    },
    "IA3": _TARGET_RULES
    | {
        "feedforward_modules": (_optional_targets, "a list of module names, or a regular expression"),
    },
    "LN_TUNING": _TARGET_RULES,
}
