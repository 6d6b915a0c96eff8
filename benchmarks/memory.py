"""What a device holds while adapters are trained, by arithmetic: CLIP H/14 and a decoder of 7 B on three machines.

Nothing is compiled: ``scaling.py`` has the compiler's account. ``docs/scaling.md`` says what the terms are.

    python benchmarks/memory.py --write_readme
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # run as a script, from a checkout

from benchmarks.report import Record, append_record, command_line, markdown, started, terminal_table  # noqa: E402
from benchmarks.scaling_report import DOCUMENT, HARDWARE  # noqa: E402
from vla_jax import names  # noqa: E402
from vla_jax.backbones.loading import abstract_backbone  # noqa: E402

OUTPUT = Path(__file__).with_name("memory.jsonl")
FROZEN, TRAINED = 2, 16
"""Bytes for each frozen parameter (bfloat16) and for each trained one (master, gradient and two moments, float32)."""

TPU, GPU = HARDWARE
PLACES = (
    ("v5e-8", TPU, 8, "data"),
    ("v5e-8", TPU, 8, "fsdp"),
    ("v5e-256", TPU, 256, "fsdp"),
    ("8 x H100", GPU, 8, "data"),
)


@dataclass(frozen=True)
class Options:
    """Where the figures go.

    Attributes:
        output: file that they are appended to, a JSON object a line.
        write_readme: whether to fill them into the document.
    """

    output: Path = OUTPUT
    write_readme: bool = False


@dataclass(frozen=True)
class Model:
    """What arithmetic needs of a model.

    Attributes:
        title: with its size.
        parameters: all of them.
        trained: those of LoRA of rank 16 on queries and values.
        activations: bytes that a unit leaves for the backward pass with ``remat=full``: each block's input, bfloat16.
        unit: what a batch is made of.
    """

    title: str
    parameters: int
    trained: int
    activations: int
    unit: str


def clip(preset: str, title: str) -> Model:
    """A CLIP of published shape."""
    backbone = abstract_backbone(f"random:{preset}")
    towers = backbone.config.towers.values()
    parameters = names.count(backbone.params)
    trained = sum(tower.depth * 2 * _lora(tower.width) for tower in towers)
    tokens = {"vision": backbone.config.grid**2 + 1, "text": backbone.config.context_length}
    kept = sum(FROZEN * tower.depth * tower.width * tokens[name] for name, tower in backbone.config.towers.items())
    return Model(f"{title}, {parameters / 1e6:,.0f} M", parameters, trained, kept, "pair")


def decoder() -> Model:
    """LLaMA of 7 B (Touvron et al. 2023): the defaults of transformers' configuration."""
    from transformers import LlamaConfig

    config = LlamaConfig()
    width, depth = config.hidden_size, config.num_hidden_layers
    block = 4 * width**2 + 3 * width * config.intermediate_size + 2 * width
    parameters = 2 * config.vocab_size * width + depth * block + width
    title = f"decoder of {parameters / 1e9:.1f} B ({depth} layers, width {width:,})"
    return Model(title, parameters, depth * 2 * _lora(width), FROZEN * depth * width, "token")


def _lora(width: int, rank: int = 16) -> int:
    return rank * 2 * width


def rows(models: Sequence[Model]) -> list[list[str]]:
    """One row a quantity, one column a model."""
    told = {
        "frozen weights, bfloat16": lambda m: _gigabytes(FROZEN * m.parameters),
        "16 T with LoRA of rank 16 on q and v": lambda m: (
            f"{_gigabytes(TRAINED * m.trained)} ({m.trained / 1e6:.1f} M)"
        ),
        "16 P, full fine-tuning": lambda m: _gigabytes(TRAINED * m.parameters),
        "A with `remat=full`, bfloat16": lambda m: f"{m.activations / 1e6:.2f} MB a {m.unit}",
    }
    found = [[title, *map(tell, models)] for title, tell in told.items()]
    for name, hardware, devices, way in PLACES:
        found.append([f"{name} ({hardware.memory / 1e9:.0f} GB each), LoRA, `{way}`: left for activations"])
        for model in models:
            frozen = FROZEN * model.parameters / (devices if way == "fsdp" else 1)
            found[-1].append(_left(model, hardware.memory - frozen - TRAINED * model.trained))
    name, hardware, devices, _ = PLACES[-1]
    found.append([f"{name}, full fine-tuning, `fsdp`: left"])
    found[-1] += [_left(model, hardware.memory - TRAINED * model.parameters / devices) for model in models]
    return found


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _left(model: Model, count: float) -> str:
    return (
        f"{_gigabytes(count)}, {count / model.activations:,.0f} {model.unit}s" if count > 0 else "none: it does not fit"
    )


def models() -> list[Model]:
    """What the table is of."""
    return [clip("openclip_h_14", "CLIP H/14"), decoder()]


def columns() -> list[str]:
    """Headings of :func:`rows`."""
    return ["of one device", *(model.title for model in models())]


def measure(options: Options) -> list[Record]:
    """Computes everything, appends it to ``options.output`` and returns it."""
    record = started("memory") | {"rows": rows(models())}
    append_record(options.output, record)
    return [record]


def section(records: Sequence[Record]) -> str:
    """The document's section, of the newest run."""
    return markdown(columns(), records[-1]["rows"], 1)


def show(records: Sequence[Record]) -> Table:
    """The table to print."""
    return terminal_table("What one device holds", columns(), records[-1]["rows"])


if __name__ == "__main__":
    command_line("memory", Options, __doc__, measure, show, section, DOCUMENT)
