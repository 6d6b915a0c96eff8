"""JSON of any form where files say something: accepted or refused, and nothing else. What fails is made as small as can
be, which mutated files are not."""

from __future__ import annotations

import contextlib
import json

import pytest
from hostile_models import CONFIG, PLACEMENTS, small_adapter
from hostile_mutations import NUMBERS, TEXTS

from vla_jax import patterns
from vla_jax.adapters import place
from vla_jax.backbones.convert import config_from_hub, config_to_hub
from vla_jax.data.own.rows import Flaw, RowReader
from vla_jax.data.own.settings import TASKS, Columns, OwnData
from vla_jax.errors import UserError
from vla_jax.exchange.described import planned
from vla_jax.exchange.peft_config import READ, read_config
from vla_jax.exchange.peft_names import Modules, targeted
from vla_jax.training.checkpoint_metadata import Metadata

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = hypothesis.strategies

LEAVES = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    *(st.sampled_from(NUMBERS), st.sampled_from(TEXTS)),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def altered(draw, valid):
    """A valid value of which a few entries, anywhere within, are something else or are not there."""
    content = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        holder, depth = content, draw(st.integers(0, 4))
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = holder[key]
            if depth == 0 or not isinstance(inner, dict | list):
                if draw(st.booleans()):
                    holder[key] = draw(VALUES)
                else:
                    del holder[key]
                break
            holder, depth = inner, depth - 1
    return content


def settled(strategy):
    """Runs a test with a hundred values, the same each time, and writes no file."""
    settings = hypothesis.settings(
        max_examples=100,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    return lambda test: settings(hypothesis.given(strategy)(test))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Patterns that take too long are found out sooner."""
    monkeypatch.setattr(patterns, "SECONDS", 0.05)


def refused_or(accepted, call):
    """The result of a call if it is accepted."""
    try:
        found = call()
    except UserError as error:
        str(error).encode()
        return
    assert isinstance(found, accepted)


@settled(altered(place(PLACEMENTS, CONFIG.towers).describe()))
def test_placements(described):
    refused_or(tuple, lambda: planned(described, CONFIG.towers))


@settled(altered(config_to_hub(CONFIG)))
def test_configurations(settings):
    refused_or(type(CONFIG), lambda: config_from_hub(settings))


LORA = {
    **dict.fromkeys(READ["LORA"]),
    **{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 1}, "lora_alpha": 8},
    **{"exclude_modules": ["k_proj"], "modules_to_save": ["head"], "layers_to_transform": [0], "lora_dropout": 0.1},
    **{"layers_pattern": "layers", "init_lora_weights": True},
}


@settled(altered(LORA))
def test_settings_of_peft(tmp_path_factory, settings):
    path = tmp_path_factory.getbasetemp() / "adapter_config.json"
    path.write_text(json.dumps(settings))
    modules = Modules.of(CONFIG.towers)

    def read():
        with patterns.limited():
            return targeted(modules.names, read_config(path), modules.places)

    refused_or(list, read)


def told():
    leaves = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in small_adapter().leaves.items()}
    content = {"backbone": "tiny", "fingerprint": "ab", "adapters": dict(small_adapter().adapters), "step": 3}
    return content | {"version": "1", "leaves": leaves, "optimizer": {"0/count": [[], "int32"]}}


@settled(altered(told()))
def test_metadata(content):
    if isinstance(content, dict):
        with contextlib.suppress(ValueError):  # as it documents
            assert Metadata.from_json(content).step >= 0


ROW = {"id": 1, "image": "0.png", "text": "a", "label": 1, "split": "train", "caption": "a", "captions": ["a", "b"]}
ROW |= {"question": "q", "answer": "a", "answers": ["a", 2], "phrase": "it", "box": [0, 1, 2.5, 3]}


@settled(st.tuples(st.sampled_from(sorted(TASKS)), altered(ROW)))
def test_rows(tmp_path_factory, given):
    task, row = given
    columns = {name: name for name in vars(Columns())}
    fields, flaws = RowReader(task, columns, OwnData("rows.jsonl"), tmp_path_factory.getbasetemp()).read(row)
    assert all(isinstance(flaw, Flaw) and flaw.message for flaw in flaws)
    if not flaws:
        assert fields["image_id"] == row["image"]
