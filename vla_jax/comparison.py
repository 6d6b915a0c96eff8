"""Compares variants of a model on one task, alike in everything but what is compared: steps, data, selection, seeds.

Each variant is trained with every learning rate of its grid on the first seed, for a share of the steps of the one
schedule; the best on validation data goes on to the end, and is trained again on the other seeds. Test data are looked
at once, by the chosen runs. Every run has a folder of its own: a finished one is read, an unfinished one goes on from
its checkpoint.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from vla_jax import distributed, names
from vla_jax.backbones.loading import Backbone
from vla_jax.backbones.transformer import Compute
from vla_jax.data.batches import Batches
from vla_jax.data.cached import Chosen, as_rows, evaluate
from vla_jax.data.pipeline import Pipeline
from vla_jax.data.stages import Source, Transform
from vla_jax.errors import UserError
from vla_jax.flop import batch_flop, device_peak
from vla_jax.frozen_streams import frozen_streams
from vla_jax.model import ENCODED_TEXTS, AdaptedModel, Task
from vla_jax.reporting.table import write_atomically
from vla_jax.tasks.classification import PictureFeatures
from vla_jax.training.checkpoint import Checkpointer, load_adapters, save_adapters
from vla_jax.training.checkpoint_metadata import Identity
from vla_jax.training.metrics import JsonLines, TensorBoard, read_records
from vla_jax.training.optimizer import GroupConfig, make_optimizer
from vla_jax.training.presets import GROUPS, preset
from vla_jax.training.profile import Profiler, Span
from vla_jax.training.sharding import place
from vla_jax.training.step import Step, TrainState, init_state, make_eval_step, make_train_step, step_shardings
from vla_jax.training.table import ParameterTable, ResolvedTable, Rule
from vla_jax.training.trainer import fit
from vla_jax.variants import Budget, Outcome, TaskData, Variant

_PASS = 512  # training examples of a pass over drawn ones, at least
_HEAD = Rule(r"heads/.*", group="head")


class Comparison:
    """Variants of one backbone on one task."""

    def __init__(
        self,
        backbone: Backbone,
        data: TaskData,
        budget: Budget,
        compute: Compute,
        mesh: jax.sharding.Mesh,
        folder: Path,
    ):
        """Sets up a comparison; nothing is computed yet.

        Args:
            backbone: the backbone.
            data: the task and its data.
            budget: what every variant gets.
            compute: how the backbone is run.
            mesh: where.
            folder: where runs are kept.
        """
        self.backbone, self.data, self.budget, self.compute = backbone, data, budget, compute
        self.mesh, self.folder = mesh, folder
        self._drawn: Mapping[int, np.ndarray] | None = None
        self._validated: np.ndarray | None = None
        self._streams: dict[tuple[Any, ...], Mapping[str, Source]] = {}
        self._programs: dict[Variant, _Programs] = {}

    def drawing(
        self, drawn: Mapping[int, np.ndarray], folder: Path, validation: np.ndarray | None = None
    ) -> Comparison:
        """The same comparison, in which each seed trains on examples of its own.

        What is computed of the data and compiled for the last variant is shared with it, so that it costs little to go
        through many draws of examples with one variant before the next.

        Args:
            drawn: by seed, places in the training split; these seeds stand in place of the budget's.
            folder: where its runs are kept.
            validation: places in the validation split that learning rates are chosen on; all of it if None.

        Raises:
            UserError: if there is no seed, or a choice without examples.
        """
        if empty := [seed for seed, places in drawn.items() if not len(places)]:
            raise UserError(f"no training examples are drawn for seed {empty[0]}; every seed needs some")
        if not drawn or (validation is not None and not len(validation)):
            raise UserError("a drawing needs a seed at least, and validation examples where they are chosen")
        other = copy.copy(self)
        other.budget = dataclasses.replace(self.budget, seeds=tuple(drawn))
        other._drawn, other._validated, other.folder = drawn, validation, folder
        return other

    def model(self, variant: Variant) -> AdaptedModel:
        """The variant's model."""
        return AdaptedModel(
            self.backbone,
            self.data.task,
            variant.placements,
            self.compute,
            variant.modalities,
            robust_drop=variant.robust_drop,
        )

    def table(self, variant: Variant) -> ResolvedTable:
        """The variant's parameter table; computes nothing."""
        own = (_HEAD,) if self._own_head_rate(variant) else ()
        return ParameterTable((*own, *preset(variant.rules))).resolve(self.model(variant).shapes())

    def groups(self, variant: Variant) -> tuple[GroupConfig, ...]:
        """The optimiser groups that the variant's table names, beside those of the budget."""
        own = (GroupConfig(_HEAD.group, learning_rate=self.budget.head_rate),) if self._own_head_rate(variant) else ()
        return (*own, *GROUPS.get(variant.rules, ()))

    def _own_head_rate(self, variant: Variant) -> bool:
        """Whether the head learns at a rate of its own; where nothing else is trained, its rate is the searched one."""
        return self.budget.head_rate is not None and variant.rules != "linear_probe"

    def run(self, variant: Variant) -> Outcome:
        """Trains and tests a variant, or reads what is finished of it."""
        return _VariantRun(self, variant).outcome()

    def parameters(self, outcome: Outcome, seed: int | None = None) -> names.Tree:
        """A finished variant's whole tree, of its first seed or of another one."""
        run = _VariantRun(self, outcome.variant)
        trained = outcome.trained if seed is None else run._trained(outcome.learning_rate, seed)
        return names.merge(trained, run._frozen)

    def stored_blocks(self, model: AdaptedModel, table: ResolvedTable) -> Mapping[str, int] | None:
        """By tower, how many of its first blocks no trained weight touches: each example goes through them once.

        None where examples are not kept at all, because what comes before the blocks is touched.
        """
        touched = any(row.train and row.name.startswith("backbone/") for row in table.rows)
        if touched or model.plan.inserts_tokens or "image" not in model.modalities:
            return None
        return model.plan.first_layers()

    def reading(self, transform: Transform) -> dict[str, Any]:
        """What a pipeline is told of reading; arrays that are there already need no processes to be read by."""
        workers = 0 if transform is as_rows else self.budget.workers
        return {"workers": workers, "max_bad_share": self.budget.max_bad_share}

    def sources(self, model: AdaptedModel, table: ResolvedTable) -> tuple[Mapping[str, Source], Transform]:
        """The data as a variant's model takes them: with the part that no trained weight touches already computed."""
        stored = self.stored_blocks(model, table)
        if stored is None:
            return self.data.splits, self.data.transform
        at = (*model.modalities, *sorted(stored.items()))
        if at not in self._streams:
            # Streams are large, and variants that need the same ones usually stand together: the last ones are kept.
            self._streams.clear()
            reading = self.reading(self.data.transform)
            self._streams[at] = frozen_streams(model, self.data, self.budget.batch_size, self.mesh, **reading)
        return self._streams[at], as_rows


@dataclasses.dataclass
class _Programs:
    """What is compiled for a variant, for all of its runs.

    Attributes:
        train: the training step, its memory in bytes and what it computes, in FLOP.
        evaluations: by task, the predictions; of the trained task at None.
    """

    train: tuple[Step, int, float] | None = None
    evaluations: dict[Task | None, Step] = dataclasses.field(default_factory=dict)


class _VariantRun:
    """One variant's runs, and the compiled programs that all of them share."""

    def __init__(self, comparison: Comparison, variant: Variant):
        self.comparison, self.variant, self.budget = comparison, variant, comparison.budget
        self.model, self.table = comparison.model(variant), comparison.table(variant)
        backbone = comparison.backbone
        described = self.model.description() | {"rules": variant.rules}
        if variant.robust_drop:
            described |= {"robust_drop": variant.robust_drop}
        self.identity = Identity(backbone.name, backbone.fingerprint, described)
        trainable, _ = self.table.split(self.model.shapes())
        if variant not in comparison._programs:  # those of one variant at a time are kept, as streams are
            comparison._programs.clear()
        self._programs = comparison._programs.setdefault(variant, _Programs())
        self.shardings = step_shardings(self.table, trainable, self._optimizer(1.0, trainable), comparison.mesh)
        self._encoded_as = self.model.encoded_as([row.name for row in self.table.rows if row.train])
        if self._encoded_as is not None:
            encoded = {ENCODED_TEXTS: {self._encoded_as: self.shardings.replicated}}
            self.shardings = dataclasses.replace(self.shardings, frozen=self.shardings.frozen | encoded)

    def outcome(self) -> Outcome:
        """Chooses the learning rate, trains on every seed, tests; what is finished is read."""
        rates, seeds = self.variant.learning_rates, self.budget.seeds
        look = self.budget.selection_steps(self.variant) if len(rates) > 1 else self.budget.steps
        validation = {rate: self._run(rate, seeds[0], look)["validation"] for rate in rates}
        best = max(validation, key=validation.get)
        results = [self._run(best, seed, self.budget.steps) for seed in seeds]
        for rate in rates:  # those that were not chosen do not go on
            distributed.remove_folder(self._folder(rate, seeds[0]) / "checkpoints")
        return Outcome(
            variant=self.variant,
            table=self.table,
            learning_rate=best,
            validation=validation,
            validated=results[0]["validation"],
            predictions={name: self._predictions(best, name) for name in ("test", *self._probes())},
            seconds_per_step=float(np.mean([result["seconds_per_step"] for result in results])),
            step_bytes=results[0]["step_bytes"],
            stored_blocks=sum((self.comparison.stored_blocks(self.model, self.table) or {}).values()),
            adapter_bytes=results[0]["adapter_bytes"],
            trained=self._trained(best, seeds[0]),
        )

    def _probes(self) -> list[str]:
        """The probes that say something about this model."""
        probes = self.comparison.data.probes
        return [name for name, probe in probes.items() if probe.pairs or not self.model.plan.needs_pairs]

    def _folder(self, rate: float, seed: int) -> Path:
        return self.comparison.folder / self.variant.name / f"learning_rate_{rate:g}" / f"seed_{seed}"

    def _run(self, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """Trains for so many steps of the schedule and measures on validation data, or reads the finished result."""
        folder = self._folder(rate, seed)
        self._check_settings(folder / "settings.json", seed)
        finished = folder / f"result_{steps}.json"
        if (result := distributed.read(finished)) is not None:
            return json.loads(result)
        trainable, _ = self.table.split(self.model.init(jax.random.key(seed)))
        sources, transform = self._sources
        train = self._drawn(sources["train"], seed)
        if hasattr(self.model.task, "from_examples"):
            trainable = self._from_examples(trainable, train, transform)
        state = init_state(trainable, self._optimizer(rate, trainable), self.shardings)
        reading = self.comparison.reading(transform)
        pipeline = Pipeline(train, transform, self.budget.batch_size, training=True, seed=seed, **reading)
        batches = Batches(iter(pipeline), self.shardings.batch)
        try:
            program, step_bytes, flop = self._train_program(state, batches)
            with Checkpointer(
                folder / "checkpoints",
                self.identity,
                every=self.budget.checkpoint_every,
                wait=self.budget.checkpoint_wait,
            ) as saver:
                fitted = fit(
                    state,
                    self._given,
                    dataclasses.replace(program, constants=(np.uint32(seed),)),
                    batches,
                    steps,
                    checkpointer=saver,
                    log_every=self.budget.log_every,
                    writers=(JsonLines(folder / "metrics.jsonl"), TensorBoard(folder / "tensorboard")),
                    skipped=JsonLines(folder / "skipped.jsonl"),
                    tolerance=self.budget.tolerance,
                    flop=flop,
                    peak=device_peak(),
                    profiler=Profiler(self._profiled(rate, seed), folder / "profile"),
                    description=f"{self.variant.title}, {rate:g}, seed {seed}",
                )
        finally:
            batches.close()
        result = {
            "validation": float(self._measure(fitted.state.trainable, "validation")["correct"].mean()),
            "seconds_per_step": fitted.seconds_per_step or _logged_seconds(folder / "metrics.jsonl"),
            "step_bytes": step_bytes,
        }
        if steps == self.budget.steps:
            save_adapters(folder / "adapters", fitted.state.trainable, self.identity, steps)
            saved = [file.stat().st_size for file in (folder / "adapters").rglob("*") if file.is_file()]
            result["adapter_bytes"] = sum(saved)
        write_atomically(finished, json.dumps(result, indent=1))
        if steps == self.budget.steps:
            # The checkpoints served to go on from; the adapters alone are kept.
            distributed.remove_folder(folder / "checkpoints")
        return result

    def _from_examples(self, trainable: names.Tree, train: Source, transform: Transform) -> names.Tree:
        """The same with the head that the training pictures give, as the model sees them before it is trained."""
        reading = self.comparison.reading(transform)
        pipeline = Pipeline(train, transform, self.budget.batch_size, training=False, **reading)
        program = self._evaluation_program(PictureFeatures())
        batches = self.shardings.batch
        found = evaluate(pipeline, lambda b: program(trainable, self._given, b), batches, description="first head")
        task = self.model.task
        head = task.from_examples(found["features"], found["label"])
        return {**trainable, "heads": {**trainable["heads"], task.name: head}}

    def _profiled(self, rate: float, seed: int) -> Span | None:
        """The steps of a run that are profiled: one run says what all of a variant would."""
        first = (rate, seed) == (self.variant.learning_rates[0], self.budget.seeds[0])
        return Span.parse(self.budget.profile) if first else None

    def _drawn(self, source: Source, seed: int) -> Source:
        """What a seed trains on of the training split."""
        drawn = self.comparison._drawn
        if drawn is None:
            return source
        places = _standing(source, drawn[seed])
        # A few examples stand several times in a pass: Grain shuffles three in 10 ms each, and hundreds in 0.1 ms each.
        return Chosen(source, np.tile(places, -(-_PASS // max(len(places), 1))))

    def _check_settings(self, path: Path, seed: int) -> None:
        """Refuses a folder whose run had other settings: its numbers would be taken for those of this comparison."""
        data, budget = self.comparison.data, self.budget
        settings = {
            "backbone": self.identity.fingerprint,
            "model": self.identity.adapters,
            "steps": budget.steps,
            "selection_steps": budget.selection_steps(self.variant),
            "batch_size": budget.batch_size,
            "workers": budget.workers if self.comparison.stored_blocks(self.model, self.table) is None else 0,
            "optimizer": dataclasses.asdict(dataclasses.replace(budget.optimizer, learning_rate=0.0)),
            "head_rate": budget.head_rate,
            "dtype": self.comparison.compute.dtype,
            "storage": str(jax.tree.leaves(self.comparison.backbone.params)[0].dtype),
            "examples": {name: len(source) for name, source in data.splits.items()}
            | {name: len(probe.source) for name, probe in data.probes.items()},
        }
        if self.comparison._drawn is not None:
            settings["drawn"] = np.sort(self.comparison._drawn[seed]).tolist()
        if self.comparison._validated is not None:
            settings["validated"] = np.sort(self.comparison._validated).tolist()
        settings = json.loads(json.dumps(settings))
        if (found := distributed.read(path)) is None:
            write_atomically(path, json.dumps(settings, indent=1))
            return
        stored = json.loads(found)
        if changed := [name for name, value in settings.items() if stored.get(name, value) != value]:
            shown = "; ".join(f"{name} was {stored[name]} and is now {settings[name]}" for name in changed)
            raise UserError(
                f"the run in {path.parent} had other settings: {shown}. Choose another --workdir, the old settings, or "
                "delete that folder"
            )

    def _predictions(self, rate: float, name: str) -> dict[str, np.ndarray]:
        """Predictions of the chosen runs, ``[seeds, examples]``; made once and kept."""
        by_seed = []
        for seed in self.budget.seeds:
            path = self._folder(rate, seed) / f"{name}.npz"
            if (content := distributed.read(path)) is None:
                made = io.BytesIO()
                np.savez_compressed(made, **self._measure(self._trained(rate, seed), name))
                content = made.getvalue()
                write_atomically(path, content)
            with np.load(io.BytesIO(content)) as stored:
                by_seed.append(dict(stored))
        return {field: np.stack([found[field] for found in by_seed]) for field in by_seed[0]}

    def _trained(self, rate: float, seed: int) -> names.Tree:
        """A finished run's trained parameters."""
        folder = self._folder(rate, seed) / "adapters"
        return load_adapters(folder, identity=self.identity, shardings=self.shardings.state.trainable)[0]

    def _measure(self, trainable: names.Tree, name: str) -> dict[str, np.ndarray]:
        """Predictions for a split or a probe, with ``index``, their places in its source."""
        data = self.comparison.data
        task = None
        if name in data.probes:
            probe = data.probes[name]
            source, transform, task = probe.source, probe.transform or data.transform, probe.task
        else:
            sources, transform = self._sources
            source = sources[name]
            chosen = self.comparison._validated
            if name == "validation" and chosen is not None:
                source = Chosen(source, _standing(source, chosen))
        reading = self.comparison.reading(transform)
        pipeline = Pipeline(source, transform, self.budget.batch_size, training=False, **reading)
        keep = ("position",) if "position" in getattr(source, "arrays", ()) else ()  # computed streams know theirs
        program = self._evaluation_program(task)
        found = evaluate(pipeline, lambda b: program(trainable, self._given, b), self.shardings.batch, keep=keep)
        found["index"] = found.pop("position", found["index"])
        return (task or data.task).finish(found)

    def _optimizer(self, rate: float, trainable: names.Tree) -> optax.GradientTransformation:
        groups = (*self.budget.optimizer.groups, *self.comparison.groups(self.variant))
        config = dataclasses.replace(self.budget.optimizer, learning_rate=rate, groups=groups)
        return make_optimizer(config, self.table, trainable, self.budget.steps)

    @functools.cached_property
    def _sources(self) -> tuple[Mapping[str, Source], Transform]:
        return self.comparison.sources(self.model, self.table)

    @functools.cached_property
    def _frozen(self) -> names.Tree:
        _, frozen = self.table.split(self.model.init(jax.random.key(0)))
        return place(frozen, {name: tree for name, tree in self.shardings.frozen.items() if name != ENCODED_TEXTS})

    @functools.cached_property
    def _given(self) -> names.Tree:
        """What a step is given beside what it trains: the frozen leaves, and what of them is the same in every step."""
        if self._encoded_as is None:
            return self._frozen
        encode = jax.jit(functools.partial(self.model.encoded_texts, kind=self._encoded_as))
        whole = place(self.comparison.backbone.params, self.shardings.replicated)
        encoded = {ENCODED_TEXTS: encode({"backbone": whole})}
        return self._frozen | place(encoded, {ENCODED_TEXTS: self.shardings.frozen[ENCODED_TEXTS]})

    def _evaluation_program(self, task: Task | None) -> Step:
        """The compiled predictions of the trained task, or of another one."""
        evaluations = self._programs.evaluations
        if task not in evaluations:
            predict = functools.partial(self.model.predict, task=task)
            evaluations[task] = make_eval_step(predict, shardings=self.shardings)
        return evaluations[task]

    def _train_program(self, state: TrainState, batches: Batches) -> tuple[Step, int, float]:
        """The compiled training step, its memory in bytes and its FLOP; every rate and every seed is an argument."""
        if self._programs.train is None:
            optimizer = self._optimizer(1.0, state.trainable)
            step = make_train_step(self.model.loss, optimizer, seed=0, shardings=self.shardings)
            start = batches.state()
            batch = next(batches)
            compiled = step.lower(state, self._given, batch).compile()
            batches.restore(start)
            memory = compiled.memory_analysis()
            used = int(memory.argument_size_in_bytes + memory.temp_size_in_bytes)
            flop = batch_flop(self.model, self.table, batch)
            self._programs.train = dataclasses.replace(step, program=compiled), used, flop
        return self._programs.train


def _standing(source: Source, places: np.ndarray) -> np.ndarray:
    """Where the examples at these places of a split stand in what is computed of it, which knows their places."""
    arrays = getattr(source, "arrays", {})
    return np.flatnonzero(np.isin(arrays["position"], places)) if "position" in arrays else places


def _logged_seconds(path: Path) -> float:
    """The last logged time of a step: of a run that was stopped after its last step, or whose only step was timed."""
    for record in reversed(read_records(path)):
        if seconds := record.get("seconds_per_step", record.get("first_step_seconds")):
            return seconds
    return math.nan
