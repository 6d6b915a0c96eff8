"""Methods put together by name: what is placed, what is counted, what is trained, and what has no meaning."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from word_clip import export_word_clip

from experiments import adapt, method_comparison
from vla_jax import composed_methods, launching, names
from vla_jax.adapters import Average, Parallel, Placement, Stack, place
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.catalogue import Entry, entry, fits, variant
from vla_jax.composed_methods import composed
from vla_jax.data_sets import Data
from vla_jax.errors import UserError
from vla_jax.training.checkpoint import load_adapters
from vla_jax.variants import Budget

B_16 = CLIPConfig.preset("vit_b_16")


def _placed(name):
    return place(entry(name).placements(B_16), B_16.towers)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("lora+pfeiffer", "LoRA + Pfeiffer"),
        ("coop+vpt_deep+lora", "CoOp + VPT deep + LoRA"),
        ("stack:pfeiffer:parallel", "stack of Pfeiffer, parallel"),
        ("parallel:lora:rslora", "parallel of LoRA, rsLoRA"),
        ("average:phm:compacter", "average of PHM, Compacter"),
        ("lora+stack:pfeiffer:parallel", "LoRA + stack of Pfeiffer, parallel"),
    ],
)
def test_together_methods_have_what_each_has(name, title):
    alone = [part for part in name.replace("+", ":").split(":") if part not in ("stack", "average")]
    alone = alone[1:] if name.startswith("parallel:") else alone
    assert fits(name, B_16) is None
    assert _placed(name).parameter_count() == sum(_placed(part).parameter_count() for part in alone)
    found = variant(name, B_16, (1e-3,))
    assert (found.name, found.title, found.group, found.rules) == (name, title, "composition", "adapters")


def test_the_examples_of_the_docstring_fit():
    examples = [line.split()[0] for line in composed_methods.__doc__.splitlines() if line.startswith("    ")]
    assert len(examples) == 5
    for name in examples:
        assert fits(name, B_16) is None, name


@pytest.mark.parametrize(("kind", "composite"), [("stack", Stack), ("parallel", Parallel), ("average", Average)])
def test_a_composition_is_one_placement_where_its_members_are(kind, composite):
    (pfeiffer,), (parallel,) = (entry(name).placements(B_16) for name in ("pfeiffer", "parallel"))
    (found,) = entry(f"{kind}:pfeiffer:parallel").placements(B_16)
    children = (("pfeiffer", pfeiffer.method), ("parallel", parallel.method))
    assert found == Placement(composite(children), kind, slots=("mlp_out",))


def test_placements_of_one_name_are_told_apart():
    assert [p.name for p in entry("rslora+lora+dora").placements(B_16)] == ["rslora", "lora", "dora"]
    found = entry("stack:pfeiffer:parallel+stack:lora:dora").placements(B_16)
    assert [p.name for p in found] == ["stack", "stack_2"]


@pytest.mark.parametrize(
    ("name", "pace"),
    [
        ("lora+pfeiffer", "adapters"),
        ("coop+vpt_deep", "light"),
        ("coop+lora", "adapters"),
        ("prefix+hyperformer", "full"),
    ],
)
def test_the_learning_rates_are_those_that_all_would_have(name, pace):
    assert entry(name).pace == pace


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora+pfiffer", "unknown method 'pfiffer'; did you mean 'pfeiffer'"),
        ("lora+", "unknown method ''"),
        ("lora+lora", "names a method twice"),
        ("stak:lora:dora", r"unknown composition 'stak'; did you mean 'stack'.*METHOD\+METHOD"),
        ("fuse:lora:dora", "unknown composition 'fuse'"),
        ("stack:lora", "at least two different methods, as in stack:pfeiffer:parallel"),
        ("stack:lora:lora", "at least two different methods"),
        ("stack:lora:pfeiffer", r"lora sits in attn_q, attn_v and pfeiffer in mlp_out.*write lora\+pfeiffer"),
        ("stack:stack:lora", "unknown method 'stack'"),
        ("lora+bitfit", "bitfit trains by the rules 'bitfit'"),
        ("lora+adapter_drop", "adapter_drop drops layers in training"),
        ("stack:mma:uniadapter", r"mma and uniadapter are placed otherwise .*write mma\+uniadapter"),
    ],
)
def test_what_cannot_be_put_together_is_said(name, message):
    with pytest.raises(UserError, match=message):
        entry(name).placements(B_16)


def test_methods_of_several_placements_are_put_beside_others_alone():
    (one,) = entry("lora").placements(B_16)
    several = Entry("several", "low rank", lambda config: (one, dataclasses.replace(one, name="other")))
    found = {"several": several, "lora": entry("lora")}
    with pytest.raises(
        UserError, match=r"several has several placements, which stack cannot take; write METHOD\+METHOD"
    ):
        composed("stack:lora:several", found.__getitem__).placements(B_16)
    assert [p.name for p in composed("lora+several", found.__getitem__).placements(B_16)] == ["lora", "lora_2", "other"]


def test_where_a_composition_has_no_meaning_is_said_with_the_reason():
    assert "has no meaning at slot" in str(fits("parallel:coop:cocoop", B_16))


def test_they_are_given_on_the_command_line():
    chosen = launching.parse_config(
        method_comparison, ["--config.methods=linear,lora+pfeiffer,stack:pfeiffer:parallel"]
    )
    assert chosen.methods == ("linear", "lora+pfeiffer", "stack:pfeiffer:parallel")
    with pytest.raises(UserError, match="unknown method 'pfiffer'"):
        launching.parse_config(adapt, ["--config.method=lora+pfiffer"])


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_they_train_and_their_adapters_are_kept(tmp_path):
    generator = np.random.default_rng(0)
    rows = []
    for number in range(40):
        pixels = generator.integers(0, 30, (32, 32, 3)) + [(200, 0, 0), (0, 0, 200)][number % 2]
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "label": ("red", "blue")[number % 2]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = "lora+stack:pfeiffer:parallel"
    config = adapt.Config(
        backbone=str(export_word_clip(tmp_path / "backbone")),
        data=Data(path=str(tmp_path / "rows.jsonl"), validation_share=0.2, test_share=0.2),
        method=name,
        budget=Budget(steps=2, batch_size=8, log_every=1),
    )
    (row, _) = adapt.run(config, tmp_path / "run")
    assert row["method"] == name
    (folder,) = (tmp_path / "run" / "runs" / name).glob("learning_rate_*/seed_0/adapters")
    kept = [path.split("/") for path in names.flatten(load_adapters(folder)[0]) if path.startswith("adapters/")]
    assert {path[1] for path in kept} == {"lora", "stack"}
    assert {path[4] for path in kept if path[1] == "stack"} == {"pfeiffer", "parallel"}
