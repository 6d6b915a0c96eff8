"""What is compared, how it is chosen, and that finished work is never done twice."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from small_model import CONFIG, LENGTH, backbone, batch

from vla_jax import comparison as module
from vla_jax import names
from vla_jax.adapters import Fusion, LoRA, Placement
from vla_jax.backbones.transformer import Compute
from vla_jax.comparison import Comparison
from vla_jax.data.cached import ArraySource, as_rows
from vla_jax.data.image import UnreadablePicture
from vla_jax.errors import UserError
from vla_jax.flop import batch_flop
from vla_jax.tasks.matching import Matching
from vla_jax.training.checkpoint import load_adapters
from vla_jax.training.compilations import compiled
from vla_jax.training.metrics import read_records
from vla_jax.training.optimizer import OptimizerConfig
from vla_jax.training.sharding import MeshConfig, make_mesh
from vla_jax.variants import Budget, Probe, TaskData, Variant

pytestmark = pytest.mark.usefixtures("quick_compilation")

BUDGET = Budget(
    steps=6,
    selection_share=0.5,
    batch_size=8,
    seeds=(0, 1),
    optimizer=OptimizerConfig(warmup_steps=1),
    checkpoint_every=2,
    log_every=1,
)
LINEAR = Variant("linear", "linear head alone", rules="linear_probe", learning_rates=(0.0, 0.3))
FUSED = Variant("fused", "fused", placements=(Placement(Fusion(rank=4, heads=2), layers="last 1"),))
SIZES = {"train": 40, "validation": 21, "test": 19}


def _source(count: int, seed: int) -> ArraySource:
    """Rows whose label says whether the picture is bright, which a linear head finds out."""
    rows = batch(count, seed)
    del rows["valid"]
    rows["image"] = 0.1 * rows["image"] + np.where(rows["label"], 1.0, -1.0)[:, None, None, None].astype(np.float32)
    return ArraySource(rows)


DATA = TaskData(
    Matching("bright"),
    {split: _source(count, seed) for seed, (split, count) in enumerate(SIZES.items())},
    as_rows,
    probes={"probe": Probe(_source(13, 9))},
)


def _comparison(folder, **changes) -> Comparison:
    parts = {"data": DATA, "budget": BUDGET, "mesh": make_mesh(MeshConfig()), "compute": Compute()} | changes
    return Comparison(backbone(), folder=folder, **parts)


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("trained although it was done")

    monkeypatch.setattr(module, "fit", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def outcome(folder):
    return _comparison(folder).run(LINEAR)


def _run(folder, rate, seed):
    return folder / "linear" / f"learning_rate_{rate:g}" / f"seed_{seed}"


def test_the_rate_with_the_best_validation_accuracy_is_kept_and_only_that_has_further_seeds(folder, outcome):
    found = {
        rate: json.loads((_run(folder, rate, 0) / "result_3.json").read_text())["validation"]
        for rate in LINEAR.learning_rates
    }
    assert outcome.validation == found
    assert outcome.learning_rate == max(found, key=found.get)
    assert found[0.3] > found[0.0]  # a rate of zero leaves the head where it is
    for rate in LINEAR.learning_rates:
        assert _run(folder, rate, 1).exists() == (rate == outcome.learning_rate)


def test_a_variant_may_be_looked_at_later_than_the_others(tmp_path):
    patient = dataclasses.replace(LINEAR, name="patient", selection_share=1.0)
    assert (BUDGET.selection_steps(LINEAR), BUDGET.selection_steps(patient)) == (3, 6)
    chosen = _comparison(tmp_path).run(patient)
    at_the_end = {}
    for rate in patient.learning_rates:
        results = sorted(path.name for path in (tmp_path / "patient" / f"learning_rate_{rate:g}" / "seed_0").glob("r*"))
        assert results == ["result_6.json"]
        path = tmp_path / "patient" / f"learning_rate_{rate:g}" / "seed_0" / "result_6.json"
        at_the_end[rate] = json.loads(path.read_text())["validation"]
    assert chosen.validation == at_the_end
    assert chosen.validated == max(at_the_end.values())


def test_only_chosen_runs_look_at_test_data(folder, outcome):
    for rate in LINEAR.learning_rates:
        for seed in BUDGET.seeds:
            for name in ("test", "probe"):
                assert (_run(folder, rate, seed) / f"{name}.npz").exists() == (rate == outcome.learning_rate)


def test_predictions_are_those_of_the_trained_head_in_the_sources_order(folder, outcome):
    model = _comparison(folder).model(LINEAR)
    for name, source in (("test", DATA.splits["test"]), ("probe", DATA.probes["probe"].source)):
        found = outcome.predictions[name]
        count = len(source)
        assert {field: array.shape for field, array in found.items()} == dict.fromkeys(
            ("index", "score", "correct"), (2, count)
        )
        for seed in BUDGET.seeds:
            np.testing.assert_array_equal(found["index"][seed], np.arange(count))
            trained, _ = load_adapters(_run(folder, outcome.learning_rate, seed) / "adapters")
            params = names.merge({"backbone": backbone().params}, trained)
            expected = jax.jit(model.predict)(params, source.arrays)
            np.testing.assert_allclose(found["score"][seed], expected["score"], rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(found["correct"][seed], expected["correct"])
    assert not np.array_equal(*outcome.predictions["test"]["score"])  # the seeds differ


def test_an_outcome_says_what_was_trained_and_what_it_cost(folder, outcome):
    assert outcome.table.trained == 4 * CONFIG.projection + 1
    assert outcome.seconds_per_step > 0
    assert outcome.step_bytes > 4 * 3 * outcome.table.trained
    saved = _run(folder, outcome.learning_rate, 0) / "adapters"
    assert outcome.adapter_bytes == sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
    records = read_records(_run(folder, outcome.learning_rate, 0) / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 7))  # chosen after three, it went on
    assert not list(folder.rglob("checkpoints"))  # they served to go on from
    (rejected,) = set(LINEAR.learning_rates) - {outcome.learning_rate}
    assert [record["step"] for record in read_records(_run(folder, rejected, 0) / "metrics.jsonl")] == [1, 2, 3]


def test_a_head_beside_adapters_may_learn_at_a_rate_of_its_own(tmp_path):
    budget = dataclasses.replace(BUDGET, steps=3, seeds=(0,), head_rate=0.05)
    given = _comparison(tmp_path, budget=budget)
    fused = dataclasses.replace(FUSED, learning_rates=(0.001,))
    linear = dataclasses.replace(LINEAR, learning_rates=(0.3,))
    peaks = {}
    for variant in (fused, linear):
        given.run(variant)
        path = tmp_path / variant.name / f"learning_rate_{variant.learning_rates[0]:g}" / "seed_0" / "metrics.jsonl"
        record = read_records(path)[0]  # the one step of warm-up: 0 of the peak, then all of it
        second = read_records(path)[1]
        assert record["train/learning_rate"] == 0
        peaks[variant.name] = {name: second[name] for name in second if name.startswith("train/learning_rate")}
    assert peaks["fused"] == pytest.approx({"train/learning_rate": 0.001, "train/learning_rate/head": 0.05})
    assert peaks["linear"] == pytest.approx({"train/learning_rate": 0.3})


def test_a_finished_variant_is_read(folder, outcome, no_training):
    again = _comparison(folder).run(LINEAR)
    assert (again.validation, again.validated) == (outcome.validation, outcome.validated)
    assert (again.learning_rate, again.adapter_bytes) == (outcome.learning_rate, outcome.adapter_bytes)
    for name, fields in outcome.predictions.items():
        for field, array in fields.items():
            np.testing.assert_array_equal(again.predictions[name][field], array)


def test_other_settings_in_the_same_folder_are_refused(folder, outcome, no_training):
    for changes, message in (
        ({"budget": dataclasses.replace(BUDGET, steps=7)}, "steps was 6 and is now 7.*another --workdir"),
        ({"budget": dataclasses.replace(BUDGET, optimizer=OptimizerConfig())}, "optimizer was .*'warmup_steps': 1"),
        ({"data": dataclasses.replace(DATA, probes={})}, "examples was"),
        ({"compute": Compute("bfloat16")}, "dtype was float32 and is now bfloat16"),
    ):
        with pytest.raises(UserError, match=message):
            _comparison(folder, **changes).run(LINEAR)
    with pytest.raises(UserError, match="model was"):
        _comparison(folder).run(dataclasses.replace(LINEAR, rules="layer_norm"))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_from_its_checkpoint_to_the_same_end(tmp_path, monkeypatch):
    budget = dataclasses.replace(BUDGET, seeds=(3,))
    variant = dataclasses.replace(LINEAR, learning_rates=(0.1,))
    whole = _comparison(tmp_path / "whole", budget=budget).run(variant)

    fit, taken = module.fit, []

    class Killed(BaseException):
        """Stands for a process that dies: no handler runs."""

    def dies(state, frozen, step, batches, steps, **arguments):
        def counting(*given):
            if len(taken) == 5:
                raise Killed
            taken.append(0)
            return step(*given)

        return fit(state, frozen, counting, batches, steps, **arguments)

    monkeypatch.setattr(module, "fit", dies)
    with pytest.raises(Killed):
        _comparison(tmp_path / "cut", budget=budget).run(variant)
    monkeypatch.setattr(module, "fit", fit)
    # And once more when all steps are taken, but the result is not written.
    measure = module._VariantRun._measure

    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module._VariantRun, "_measure", stops)
    with pytest.raises(KeyboardInterrupt):
        _comparison(tmp_path / "cut", budget=budget).run(variant)
    monkeypatch.setattr(module._VariantRun, "_measure", measure)
    resumed = _comparison(tmp_path / "cut", budget=budget).run(variant)
    assert resumed.seconds_per_step > 0
    records = [
        [(r["step"], r["train/loss"]) for r in read_records(next((tmp_path / name).rglob("metrics.jsonl")))]
        for name in ("whole", "cut")
    ]
    assert records[0] == records[1]
    assert resumed.validation == whole.validation
    np.testing.assert_array_equal(resumed.predictions["test"]["score"], whole.predictions["test"]["score"])


def test_all_runs_of_a_variant_share_one_compiled_step(tmp_path):
    before = compiled()
    comparison = _comparison(tmp_path, budget=dataclasses.replace(BUDGET, profile="2:3"))
    comparison.run(FUSED)
    made = compiled() - before
    # Two rates and two seeds; predictions of the task for validation, test and probe, with and without streams.
    assert made["jit(train_step)"] == 1
    assert made["jit(eval_step)"] == 2
    profiles = [path.relative_to(tmp_path).parts[:3] for path in tmp_path.rglob("*.xplane.pb")]
    assert profiles == [("fused", f"learning_rate_{FUSED.learning_rates[0]:g}", "seed_0")]
    logged = read_records(next(tmp_path.rglob("metrics.jsonl")))[-1]
    flop = batch_flop(comparison.model(FUSED), comparison.table(FUSED), batch(BUDGET.batch_size))
    assert 0 < logged["flop_per_second"] * logged["seconds_per_step"] < flop  # less: the frozen blocks are not run


def test_streams_are_computed_once_for_variants_that_start_alike_and_not_at_all_for_a_trained_backbone(tmp_path):
    comparison = _comparison(tmp_path, data=dataclasses.replace(DATA, splits={"test": DATA.splits["test"]}))
    found = {}
    for variant in (
        LINEAR,
        FUSED,
        dataclasses.replace(FUSED, name="other", placements=(Placement(Fusion(rank=2, mix="none"), layers="last 1"),)),
        Variant("lora", "lora", placements=(Placement(LoRA(rank=2), slots=("attn_q",)),)),
        Variant("full", "full", rules="full"),
        Variant("image", "image", rules="linear_probe", modalities=("image",)),
        Variant("text", "text", rules="linear_probe", modalities=("text",)),
    ):
        found[variant.name] = comparison.sources(comparison.model(variant), comparison.table(variant))
    assert found["fused"][0] is found["other"][0]
    for field, tokens in (("image_stream", 5), ("text_stream", LENGTH)):
        assert np.asarray(found["fused"][0]["test"].arrays[field]).shape == (SIZES["test"], tokens, CONFIG.text.width)
    np.testing.assert_array_equal(found["fused"][0]["test"].arrays["position"], np.arange(SIZES["test"]))
    # After the last block, whether a joint or a head stands there; and before the first.
    outputs = jax.jit(comparison.model(LINEAR).prefix)({"backbone": backbone().params}, DATA.splits["test"].arrays)
    for name in ("linear", "fused"):
        streams = found[name][0]["test"].arrays
        for field in ("image_stream", "text_stream"):
            np.testing.assert_allclose(streams[field], outputs[field], rtol=1e-4, atol=1e-5)
    assert not np.allclose(
        np.asarray(found["lora"][0]["test"].arrays["image_stream"]), outputs["image_stream"], rtol=1e-2
    )
    for name in ("full", "text"):
        assert found[name] == (comparison.data.splits, as_rows)
    # What is shown pictures alone has no texts to compute.
    pictures = found["image"][0]["test"].arrays
    np.testing.assert_allclose(pictures["image_stream"], outputs["image_stream"], rtol=1e-4, atol=1e-5)
    assert "text_stream" not in pictures


@dataclasses.dataclass(frozen=True)
class Torn:
    """Rows as they are, of which every tenth cannot be read."""

    def __call__(self, example, generator=None):
        if int(example["place"]) % 10 == 0:
            raise UnreadablePicture("is torn")
        return {name: array for name, array in example.items() if name != "place"}


TORN = dataclasses.replace(
    DATA,
    splits={
        split: ArraySource(dict(source.arrays) | {"place": np.arange(len(source), dtype=np.int32)})
        for split, source in DATA.splits.items()
    },
    transform=Torn(),
    probes={},
)


@pytest.mark.parametrize("variant", [LINEAR, dataclasses.replace(LINEAR, name="full", rules="full")])
def test_the_budget_says_how_many_pictures_may_be_torn_whether_streams_are_computed_once_or_not(tmp_path, variant):
    variant = dataclasses.replace(variant, learning_rates=(0.1,))
    with pytest.raises(UserError, match=r"of .* pictures cannot be decoded.*at most 1.00% may be.*raise max_bad_share"):
        _comparison(tmp_path / "a", data=TORN).run(variant)
    budget = dataclasses.replace(BUDGET, max_bad_share=0.2, seeds=(0,))
    found = _comparison(tmp_path / "b", data=TORN, budget=budget).run(variant)
    assert not set(found.predictions["test"]["index"][0]) & {0, 10}
    assert len(found.predictions["test"]["index"][0]) == SIZES["test"] - 2


def test_the_budgets_workers_read_what_is_not_computed_once(tmp_path, monkeypatch):
    asked = []
    pipeline = module.Pipeline

    def noted(*arguments, **settings):
        asked.append((settings["training"], settings["workers"]))
        return pipeline(*arguments, **settings | {"workers": 0})

    monkeypatch.setattr(module, "Pipeline", noted)
    budget = dataclasses.replace(BUDGET, workers=2, seeds=(0,), steps=2)
    raw = dataclasses.replace(DATA, transform=Raw())
    full = Variant("full", "full", rules="full", learning_rates=(0.1,))
    _comparison(tmp_path, data=raw, budget=budget).run(full)
    assert set(asked) == {(True, 2), (False, 2)}
    asked.clear()
    _comparison(tmp_path, data=raw, budget=budget).run(dataclasses.replace(LINEAR, learning_rates=(0.1,)))
    assert (True, 0) in asked  # streams are arrays, and need no processes


@dataclasses.dataclass(frozen=True)
class Raw:
    """Rows as they are, made anew each time as far as anyone can tell."""

    def __call__(self, example, generator=None):
        return dict(example)


def test_seeds_train_on_the_examples_drawn_for_them_and_share_what_is_compiled(tmp_path, monkeypatch):
    seen, compiled = [], []
    pipeline, make = module.Pipeline, module.make_train_step

    def watched(source, *given, training, **arguments):
        if training:
            drawn = np.bincount([source[place]["position"] for place in range(len(source))])
            assert len(set(drawn[drawn > 0].tolist())) == 1  # in a pass each stands as often as the others
            seen.append(np.flatnonzero(drawn).tolist())
        return pipeline(source, *given, training=training, **arguments)

    monkeypatch.setattr(module, "Pipeline", watched)
    monkeypatch.setattr(module, "make_train_step", lambda *given, **named: compiled.append(0) or make(*given, **named))
    whole = _comparison(tmp_path, budget=dataclasses.replace(BUDGET, steps=2))
    linear = dataclasses.replace(LINEAR, learning_rates=(0.3,))
    draws = ({0: np.array([5, 3]), 1: np.array([7, 39, 0])}, {0: np.arange(9), 1: np.arange(10, 30)})
    outcomes = [whole.drawing(drawn, tmp_path / str(n)).run(linear) for n, drawn in enumerate(draws)]
    assert seen == [[3, 5], [0, 7, 39], list(range(9)), list(range(10, 30))]
    assert len(compiled) == 1
    assert not np.array_equal(outcomes[0].predictions["test"]["score"], outcomes[1].predictions["test"]["score"])
    # A finished run is that of its examples.
    again = whole.drawing(draws[0], tmp_path / "0")
    np.testing.assert_array_equal(
        again.run(linear).predictions["test"]["score"], outcomes[0].predictions["test"]["score"]
    )
    with pytest.raises(UserError, match=r"drawn was \[3, 5\] and is now \[3, 6\]"):
        whole.drawing({0: np.array([6, 3]), 1: np.array([7])}, tmp_path / "0").run(linear)
    with pytest.raises(UserError, match="no training examples are drawn for seed 1"):
        whole.drawing({0: np.array([1]), 1: np.array([], int)}, tmp_path)
    for seed in BUDGET.seeds:
        trained, _ = load_adapters(tmp_path / "1" / "linear" / "learning_rate_0.3" / f"seed_{seed}" / "adapters")
        found = again.parameters(outcomes[0], seed)["heads"]["bright"]["classifier"]["kernel"]
        own, _ = load_adapters(tmp_path / "0" / "linear" / "learning_rate_0.3" / f"seed_{seed}" / "adapters")
        np.testing.assert_array_equal(found, own["heads"]["bright"]["classifier"]["kernel"])
        assert not np.array_equal(found, trained["heads"]["bright"]["classifier"]["kernel"])


def test_examples_are_drawn_of_raw_data_as_of_computed_streams(tmp_path, monkeypatch):
    seen = []
    pipeline = module.Pipeline

    def watched(source, *given, training, **arguments):
        if training:
            seen.append([source[place]["tokens"].tolist() for place in range(2)])
        return pipeline(source, *given, training=training, **arguments)

    monkeypatch.setattr(module, "Pipeline", watched)
    texts = Variant("texts", "texts", rules="linear_probe", modalities=("text",), learning_rates=(1e-3,))
    whole = _comparison(tmp_path, budget=dataclasses.replace(BUDGET, steps=1, seeds=(4,), optimizer=OptimizerConfig()))
    whole.drawing({4: np.array([2, 11])}, tmp_path).run(texts)
    assert seen == [DATA.splits["train"].arrays["tokens"][[2, 11]].tolist()]


def test_rates_are_chosen_on_the_validation_examples_that_are_drawn(tmp_path):
    probed = dataclasses.replace(DATA, probes={"looked": Probe(DATA.splits["validation"])})
    whole = _comparison(tmp_path, data=probed, budget=dataclasses.replace(BUDGET, steps=2, seeds=(0, 1, 2)))
    chosen = np.array([3, 4, 11])
    linear = dataclasses.replace(LINEAR, learning_rates=(0.3,))
    for modalities in (("image", "text"), ("text",)):  # of computed streams as of raw data
        folder = tmp_path / modalities[0]
        shown = dataclasses.replace(linear, modalities=modalities)
        outcome = whole.drawing({7: np.array([1, 2])}, folder, chosen).run(shown)
        correct = outcome.predictions["looked"]["correct"]
        assert correct.shape == (1, SIZES["validation"])  # of the drawing's seed alone
        assert outcome.validated == pytest.approx(correct[0, chosen].mean())
        with pytest.raises(UserError, match=r"validated was \[3, 4, 11\] and is now \[3, 4\]"):
            whole.drawing({7: np.array([1, 2])}, folder, chosen[:2]).run(shown)
    for drawn, validation in (({}, None), ({7: chosen}, chosen[:0])):
        with pytest.raises(UserError, match="needs a seed at least, and validation examples"):
            whole.drawing(drawn, tmp_path, validation)


def test_settings_that_make_no_comparison_are_refused():
    with pytest.raises(UserError, match="variant 'a' has no learning rate"):
        Variant("a", "a", learning_rates=())
    with pytest.raises(UserError, match="at least one seed"):
        Budget(seeds=())
    with pytest.raises(UserError, match="seeds name one twice: 0, 1, 0"):
        Budget(seeds=(0, 1, 0))
    with pytest.raises(UserError, match="at least 1"):
        Budget(steps=0)
    with pytest.raises(UserError, match=r"workers -1 is negative; allowed: 0 .* or more"):
        Budget(workers=-1)
    with pytest.raises(UserError, match=r"max_bad_share 1 is not a share"):
        Budget(max_bad_share=1)
    with pytest.raises(UserError, match=r"selection_share .* got 0"):
        Budget(selection_share=0)
    with pytest.raises(UserError, match=r"selection_share .* got 1.5"):
        dataclasses.replace(LINEAR, selection_share=1.5)
