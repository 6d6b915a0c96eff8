"""Pretrains ``tiny``, the small CLIP that comes with the package, on generated scenes.

    python launch.py --experiment=pretrain_tiny --workdir=runs/tiny

Question: can a plain CLIP become useful on a CPU within the hour? Plain contrastive learning cannot: after 40,000 pairs
it knows colours and no shapes. So the annotations, which are exact, supervise both towers densely
(:mod:`vla_jax.tasks.scene_supervision`), half of the pairs have their hard twin in the batch, the image tower learns
alone first, and short texts come before long ones.

Cost: 33 minutes of training steps on two CPU cores, 512,000 pictures and 282,000 texts. What came out, on test scenes:
shape and colour of a single object 100 %, recall at 1 of 256 full descriptions 98 % both ways; group scores of
quadruples 90 % where two objects exchange places, 88 % where relations are exchanged and 49 % where attributes are
(chance 17 %).

What the log shows (``training_log.jsonl`` beside the weights): patch tokens know the shapes after 300 steps; the joint
feature puts 91 % of the pairs in order after 700 and tells four fifths of the colours by cell after 1,400. The text
tower learns relations in ``words`` and bindings of attributes last of all: their group score on validation scenes is
9 % after ``words`` and 47 % after ``bindings``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from transformers import AutoTokenizer, CLIPImageProcessorPil

from vla_jax import distributed, names
from vla_jax.backbones.clip import CLIP
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.export import export_backbone
from vla_jax.backbones.loading import load_backbone
from vla_jax.backbones.transformer import Compute, TowerConfig
from vla_jax.data.batches import Batches
from vla_jax.data.image import Preprocess
from vla_jax.data.pipeline import Pipeline
from vla_jax.data.scenes import SWAPS, CaptionWeights, SceneConfig
from vla_jax.data.scenes.vocabulary import WORDS
from vla_jax.data.text import Tokenize, train_word_tokenizer
from vla_jax.errors import UserError
from vla_jax.evaluation.scene_zero_shot import ZeroShot, clip_encoders, zero_shot
from vla_jax.reporting import tiny_card
from vla_jax.tasks.scene_pretraining import DenseWeights, PairRow, ScenePairs, make_loss
from vla_jax.tasks.scene_supervision import SceneHeads
from vla_jax.training.checkpoint import Checkpointer, load_adapters
from vla_jax.training.checkpoint_metadata import Identity
from vla_jax.training.metrics import JsonLines, read_records, run_record
from vla_jax.training.optimizer import OptimizerConfig, make_optimizer
from vla_jax.training.presets import preset
from vla_jax.training.sharding import MeshConfig, batch_sharding, check_batch, make_mesh, place
from vla_jax.training.step import TrainState, init_state, make_train_step, step_shardings
from vla_jax.training.table import ParameterTable, ResolvedTable, Rule
from vla_jax.training.trainer import fit

CONTEXT_LENGTH = 48
_MEAN, _STD = (0.9, 0.9, 0.9), (0.25, 0.25, 0.25)  # of pictures that are mostly light background


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the training with its own data and learning rate.

    Attributes:
        name: of its folder.
        steps: number of steps.
        texts: whether the text tower is trained; else the image tower learns alone from the annotations.
        max_objects: most objects in a scene.
        text_length: tokens per text; must hold the longest text about so many objects.
        learning_rate: its peak.
        final_share: learning rate at the phase's end, as a share of the peak.
        images: whether the image tower is trained; else it is frozen, which lets many more texts pass.
        captions: how often each kind of caption is drawn for scenes without a twin.
        twin_swaps: what twins have exchanged.
        twin_pair_share: share of twins whose captions tell of the two exchanged objects alone.
    """

    name: str
    steps: int
    texts: bool
    max_objects: int
    text_length: int
    learning_rate: float
    final_share: float
    images: bool = True
    captions: CaptionWeights = dataclasses.field(default_factory=CaptionWeights)
    twin_swaps: tuple[str, ...] = SWAPS
    twin_pair_share: float = 0.5

    def __post_init__(self) -> None:
        if not (self.images or self.texts):
            raise UserError(f"phase {self.name!r} trains neither tower; set images or texts")
        if self.steps < 1:
            raise UserError(f"phase {self.name!r} has {self.steps} steps; allowed: 1 or more")
        if not 3 <= self.text_length <= CONTEXT_LENGTH:
            raise UserError(
                f"phase {self.name!r} has texts of {self.text_length} tokens; allowed: 3 to {CONTEXT_LENGTH}"
            )


@dataclasses.dataclass(frozen=True)
class PretrainTinyConfig:
    """The whole experiment.

    Attributes:
        preset: which of :data:`PRESETS` this is, before single fields were set.
        phases: what is trained, one after the other.
        pairs: pairs of picture-text pairs in a batch; two twins, or two independent scenes.
        twin_share: share of pairs that are twins.
        image_size: side of the pictures; 24 times 3, so that the cells of the grid fall together with patches.
        patch_size: side of a patch.
        width: width of both towers.
        vision_depth: blocks of the image tower.
        text_depth: blocks of the text tower.
        heads: attention heads of both towers.
        projection: width of the joint space.
        dense: weights of the losses from annotations beside the contrastive loss.
        weight_decay: of AdamW.
        seed: of parameters and data.
        log_every: steps between logged ones.
        evaluate_every: steps between evaluations on validation scenes, in phases with texts.
        checkpoint_every: steps between checkpoints.
        evaluated: pictures of a single object, and quadruples of each tag, in the final evaluation on test scenes.
        candidates: descriptions in the retrieval of every evaluation.
        mesh: the mesh.
    """

    preset: str = "default"
    phases: tuple[Phase, ...] = (
        Phase(
            name="image",
            steps=1800,
            texts=False,
            max_objects=5,
            text_length=CONTEXT_LENGTH,
            learning_rate=2e-3,
            final_share=0.1,
        ),
        Phase(
            name="words",
            steps=1200,
            texts=True,
            images=False,
            max_objects=2,
            text_length=27,
            learning_rate=2e-3,
            final_share=0.3,
            captions=CaptionWeights(full=0.2, short=0.15, relation=0.4, count=0.2, question=0.05),
            twin_pair_share=0.6,
        ),
        Phase(
            name="bindings",
            steps=500,
            texts=True,
            images=False,
            max_objects=2,
            text_length=27,
            learning_rate=2e-3,
            final_share=0.3,
            captions=CaptionWeights(full=0.35, short=0.3, relation=0.2, count=0.1, question=0.05),
            twin_swaps=("shape", "color", "size", "texture"),
            twin_pair_share=0.6,
        ),
        Phase(
            name="long",
            steps=500,
            texts=True,
            max_objects=5,
            text_length=CONTEXT_LENGTH,
            learning_rate=1e-3,
            final_share=0.0,
            captions=CaptionWeights(full=0.3, short=0.2, relation=0.25, count=0.15, question=0.1),
        ),
    )
    pairs: int = 64
    twin_share: float = 0.5
    image_size: int = 72
    patch_size: int = 12
    width: int = 128
    vision_depth: int = 4
    text_depth: int = 3
    heads: int = 2
    projection: int = 128
    dense: DenseWeights = dataclasses.field(default_factory=DenseWeights)
    weight_decay: float = 0.05
    seed: int = 0
    log_every: int = 25
    evaluate_every: int = 200
    checkpoint_every: int = 200
    evaluated: int = 1000
    candidates: int = 256
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


PRESETS = {
    "default": PretrainTinyConfig(),
    "smoke": PretrainTinyConfig(
        preset="smoke",
        phases=(
            Phase("image", 2, False, 5, CONTEXT_LENGTH, 1e-3, 0.1),
            Phase("both", 2, True, 2, 27, 1e-3, 0.0),
            Phase("words", 2, True, 2, 27, 1e-3, 0.0, images=False),
        ),
        pairs=8,
        width=16,
        vision_depth=1,
        text_depth=1,
        projection=8,
        log_every=1,
        evaluated=4,
        candidates=4,
    ),
}
CONFIG = PRESETS["default"]


def clip_config(config: PretrainTinyConfig, vocabulary_size: int) -> CLIPConfig:
    """The shape of ``tiny``, for a tokenizer of :func:`train_word_tokenizer`."""
    return CLIPConfig(
        vision=TowerConfig(config.width, config.vision_depth, config.heads, 4 * config.width),
        text=TowerConfig(config.width, config.text_depth, config.heads, 4 * config.width),
        image_size=config.image_size,
        patch_size=config.patch_size,
        vocabulary_size=vocabulary_size,
        context_length=CONTEXT_LENGTH,
        projection=config.projection,
        eos_token_id=vocabulary_size - 1,
    )


def check(config: PretrainTinyConfig) -> Any:
    """Refuses what cannot be run, before anything is compiled; returns the last phase's table for ``--dry_run``."""
    phase_names = [phase.name for phase in config.phases]
    if not phase_names or len(set(phase_names)) < len(phase_names):
        raise UserError(f"the phases are called {phase_names}; give at least one, each with a name of its own")
    if distributed.several():
        raise UserError("pretrain_tiny runs in one process, on any number of devices; leave --distributed out")
    check_batch(config.pairs, make_mesh(config.mesh))
    clip = CLIP(clip_config(config, len(WORDS) + 4))  # four special tokens
    params = jax.eval_shape(lambda: _init(config, clip))
    return _table(config.phases[-1], params).summary()


def run(config: PretrainTinyConfig, workdir: str | Path) -> ZeroShot:
    """Pretrains, measures on test scenes, and exports to ``workdir/tiny``; goes on from where it stopped.

    Returns:
        The zero-shot numbers of the exported backbone on test scenes.
    """
    workdir = Path(workdir)
    run_record(workdir, config)
    train_word_tokenizer(WORDS, workdir / "tokenizer", context_length=CONTEXT_LENGTH)
    tokenizer = AutoTokenizer.from_pretrained(workdir / "tokenizer")
    size = config.image_size
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=_MEAN, image_std=_STD
    )
    preprocess = Preprocess(processor)
    clip = CLIP(clip_config(config, len(tokenizer)), Compute(unroll=max(config.vision_depth, config.text_depth)))
    params = _init(config, clip)
    encoders = clip_encoders(clip, preprocess, Tokenize(tokenizer, CONTEXT_LENGTH))
    for index, phase in enumerate(config.phases):
        row = PairRow(preprocess, Tokenize(tokenizer, phase.text_length))
        params = _train(config, index, clip, params, row, encoders, workdir / phase.name)

    folder = export_backbone(
        params["backbone"],
        clip.config,
        workdir / "tiny",
        dtype="float16",
        tokenizer=tokenizer,
        image_processor=processor,
    )
    # As they were made: saved once more, they name a class that older readers of the hub's format do not know.
    shutil.copytree(workdir / "tokenizer", folder, dirs_exist_ok=True)
    (folder / "model.safetensors").chmod(0o644)  # package data is for everybody
    # What was written is measured, not what was trained.
    found = zero_shot(
        *encoders(load_backbone(str(folder)).params),
        image_size=size,
        split="test",
        classes=config.evaluated,
        candidates=config.candidates,
        quadruples=config.evaluated,
    )
    records = _write_log(config, workdir, folder)
    (folder / "zero_shot.json").write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n")
    hours = sum(record.get("seconds_per_step", 0) * config.log_every for record in records) / 3600
    card = tiny_card.card(
        dataclasses.asdict(config), clip.config, found, parameters=names.count(params["backbone"]), hours=hours
    )
    (folder / "CARD.md").write_text(card)
    print(json.dumps(found.summary() | found.gates(), indent=2))
    return found


def _init(config: PretrainTinyConfig, clip: CLIP) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(config.seed))
    shape = clip.config
    image = jnp.zeros((1, shape.image_size, shape.image_size, 3))
    backbone = jax.jit(clip.init)(keys[0], image, jnp.zeros((1, shape.context_length), jnp.int32))["params"]
    tokens, features = jnp.zeros((1, shape.grid**2, config.width)), jnp.ones((1, config.projection))
    return {"backbone": backbone, "heads": {"scenes": SceneHeads().init(keys[1], tokens, features)["params"]}}


def _table(phase: Phase, params: names.Tree) -> ResolvedTable:
    rules = () if phase.texts else (Rule(r"backbone/(text/.*|logit_scale)", train=False),)
    rules += () if phase.images else (Rule(r"backbone/vision/.*", train=False),)
    return ParameterTable(rules + preset("full")).resolve(params)


def _train(
    config: PretrainTinyConfig,
    index: int,
    clip: CLIP,
    params: names.Tree,
    row: PairRow,
    encoders: Callable[[Any], tuple[Any, Any]],
    folder: Path,
) -> dict[str, Any]:
    """One phase, or what it left behind if it is done; returns all parameters."""
    phase = config.phases[index]
    mesh = make_mesh(config.mesh)
    check_batch(config.pairs, mesh)
    table = _table(phase, params)
    trainable, frozen = table.split(params)
    # Later phases may still be changed; those up to this one may not.
    until_here = dataclasses.replace(config, phases=config.phases[: index + 1])
    described = json.dumps({k: v for k, v in dataclasses.asdict(until_here).items() if k != "preset"}, sort_keys=True)
    identity = Identity("from scratch", hashlib.sha256(described.encode()).hexdigest(), {"phase": phase.name})
    if (folder / "checkpoints" / str(phase.steps)).is_dir():
        done, _ = load_adapters(folder / "checkpoints", step=phase.steps, identity=identity, expected=trainable)
        return names.merge(done, frozen)
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=phase.learning_rate,
            warmup_share=0.08,
            final_share=phase.final_share,
            weight_decay=config.weight_decay,
            b2=0.98,
        ),
        table,
        trainable,
        phase.steps,
    )
    loss_function = make_loss(clip, texts=phase.texts, weights=config.dense)
    shardings = step_shardings(table, trainable, optimizer, mesh)
    state = init_state(trainable, optimizer, shardings)
    frozen = place(frozen, shardings.frozen)
    train_step = make_train_step(loss_function, optimizer, seed=config.seed, shardings=shardings)
    scenes = SceneConfig(
        seed=config.seed + index,
        image_size=config.image_size,
        max_objects=phase.max_objects,
        caption_weights=phase.captions,
        twin_swaps=phase.twin_swaps,
        twin_pair_share=phase.twin_pair_share,
    )
    pipeline = Pipeline(
        ScenePairs(scenes, config.twin_share), row, batch_size=config.pairs, training=True, seed=config.seed
    )

    def on_validation(state: TrainState) -> dict[str, float]:
        backbone = names.merge(state.trainable, frozen)["backbone"]
        measured = zero_shot(
            *encoders(backbone),
            image_size=config.image_size,
            split="validation",
            classes=min(256, config.evaluated),
            candidates=config.candidates,
            quadruples=min(100, config.evaluated),
        )
        return measured.summary()

    batches = Batches(iter(pipeline), batch_sharding(mesh))
    with Checkpointer(folder / "checkpoints", identity, every=config.checkpoint_every, keep=1) as checkpointer:
        fitted = fit(
            state,
            frozen,
            train_step,
            batches,
            phase.steps,
            checkpointer=checkpointer,
            evaluations={"validation": on_validation} if phase.texts else None,
            evaluate_every=config.evaluate_every,
            log_every=config.log_every,
            writers=[JsonLines(folder / "metrics.jsonl")],
            description=phase.name,
        )
    batches.close()
    return names.merge(fitted.state.trainable, frozen)


def _write_log(config: PretrainTinyConfig, workdir: Path, folder: Path) -> list[dict[str, Any]]:
    """The logs of all phases in one file beside the weights, and the configuration they came from."""
    records = [
        {"phase": phase.name} | record
        for phase in config.phases
        for record in read_records(workdir / phase.name / "metrics.jsonl")
    ]
    (folder / "training_log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shutil.copy(workdir / "config.json", folder / "pretraining.json")
    return records
