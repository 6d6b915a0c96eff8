import dataclasses
import json

import pytest

from experiments.pretrain_tiny import CONFIG, PRESETS, Phase, check, run
from vla_jax import distributed
from vla_jax.backbones.clip import CLIP
from vla_jax.backbones.loading import load_backbone
from vla_jax.backbones.transformer import Compute
from vla_jax.data.image import Preprocess
from vla_jax.data.pipeline import TransformExample
from vla_jax.data.scenes import SceneConfig
from vla_jax.data.scenes.source import SceneSource
from vla_jax.data.scenes.vocabulary import WORDS, split_words
from vla_jax.data.text import Tokenize
from vla_jax.errors import UserError
from vla_jax.evaluation.scene_zero_shot import clip_encoders, zero_shot
from vla_jax.evaluation.statistics import accuracy
from vla_jax.evaluation.untrained import untrained
from vla_jax.task_data import examples_of, of_kinds, task
from vla_jax.tasks.scene_pretraining import ScenePairs
from vla_jax.training.sharding import MeshConfig, make_mesh
from vla_jax.variants import TaskData


def test_every_word_of_tasks_occurs_in_pretraining():
    for phase in CONFIG.phases:
        if phase.texts:
            scenes = SceneConfig(seed=CONFIG.seed, image_size=32, caption_weights=phase.captions)
            pairs = ScenePairs(scenes, CONFIG.twin_share)
            seen = {w for index in range(2000) for example in pairs[index] for w in split_words(example["caption"])}
            assert set(WORDS) - seen == set()


def test_twins_make_up_their_share_and_have_other_captions():
    pairs = ScenePairs(SceneConfig(image_size=32), 0.5)
    drawn = [pairs[index] for index in range(100)]
    twins = [pair for pair in drawn if "swapped" in pair[0]]
    assert 48 <= len(twins) <= 52
    assert all(one["caption"] != other["caption"] and one["scene"] != other["scene"] for one, other in twins)


def test_the_check_counts_every_parameter_and_refuses_what_cannot_be_run(monkeypatch):
    width, tower = 128, lambda depth: depth * (12 * 128**2 + 13 * 128)
    vision = 12 * 12 * 3 * width + width + 37 * width + 4 * width + tower(4) + width * 128
    text = (len(WORDS) + 4) * width + 48 * width + 2 * width + tower(3) + width * 128
    heads = (width + 1) * 26 + (128 + 1) * (9 * 26 + 112 + 2 * 16 + 16 * 6)
    assert f"{vision + text + 1 + heads:,}" in check(CONFIG).caption
    with pytest.raises(UserError, match="a name of its own"):
        check(dataclasses.replace(CONFIG, phases=CONFIG.phases[:1] * 2))
    with pytest.raises(UserError, match="neither tower"):
        Phase("none", 1, False, 5, 48, 1e-3, 0.0, images=False)
    monkeypatch.setattr(distributed, "several", lambda: True)
    with pytest.raises(UserError, match="in one process"):
        check(CONFIG)


@pytest.mark.slow
def test_a_few_steps_end_in_a_loadable_backbone_and_going_on_changes_nothing(tmp_path):
    found = run(PRESETS["smoke"], tmp_path)
    folder = tmp_path / "tiny"
    backbone = load_backbone(str(folder))
    assert (backbone.config.image_size, backbone.config.patch_size) == (CONFIG.image_size, CONFIG.patch_size)
    assert set(backbone.tokenizer.tokenize("is there a red circle ?")) == {"is", "there", "a", "red", "circle", "?"}
    assert "shape of a single object" in (folder / "CARD.md").read_text()
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    steps = [(record["phase"], record["step"]) for record in log]
    assert steps == [(phase, step) for phase in ("image", "both", "words") for step in (1, 2)]
    assert "validation/shape" in log[-1]

    assert run(PRESETS["smoke"], tmp_path) == found
    assert load_backbone(str(folder)).fingerprint == backbone.fingerprint


@pytest.mark.slow
def test_the_shipped_backbone_passes_its_gates_and_leaves_room_for_adapters():
    backbone = load_backbone("tiny")
    clip = CLIP(backbone.config)
    encoders = clip_encoders(clip, Preprocess(backbone.image_processor), Tokenize(backbone.tokenizer, 48))
    size = backbone.config.image_size
    found = zero_shot(
        *encoders(backbone.params), image_size=size, split="test", classes=256, candidates=256, quadruples=200
    )
    assert all(found.gates().values()), found
    assert all(interval.high < 1 for interval in found.group.values()), found
    # What adapters are for: whether a relation or a count is true cannot be read off the cosine.
    config = SceneConfig(seed=1000, image_size=size)
    splits = {split: SceneSource(split, "statements", config, 600) for split in ("validation", "test")}
    read = TransformExample(Preprocess(backbone.image_processor), Tokenize(backbone.tokenizer, 20), label_key="label")
    statements = TaskData(task("statements"), splits, read)
    told = untrained("statements", statements, backbone, Compute(), make_mesh(MeshConfig()), 64)
    for kind, chosen in of_kinds("statements", examples_of(statements, told["index"])).items():
        assert accuracy(told["correct"][chosen]).high < 0.95, kind
    assert sum(file.stat().st_size for file in backbone.folder.iterdir()) <= 12 * 2**20
