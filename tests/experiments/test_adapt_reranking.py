"""Retrieval in two stages, by a fusion adapter's head and by cosines, against judging every pair by itself."""

from __future__ import annotations

import collections
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import adapt
from vla_jax import launching, names
from vla_jax.adapters import Fusion, LoRA, Placement
from vla_jax.backbones.loading import load_backbone
from vla_jax.data.each_caption import EachCaption
from vla_jax.data.image import Preprocess
from vla_jax.data.own import OwnData, load_own
from vla_jax.data.scenes import SceneSource
from vla_jax.data.text import Tokenize
from vla_jax.data_sets import Data
from vla_jax.errors import UserError
from vla_jax.evaluation.exact_ranks import Before
from vla_jax.model import AdaptedModel
from vla_jax.reranking import Rerank, second_stage
from vla_jax.task_kinds import Setup
from vla_jax.tasks.matching import Matching
from vla_jax.tasks.retrieval import Retrieval
from vla_jax.training.checkpoint import load_adapters, save_adapters
from vla_jax.training.checkpoint_metadata import Identity
from vla_jax.variants import Budget

pytestmark = pytest.mark.usefixtures("quick_compilation")

JUDGES = {
    "fusion": (Matching("statements"), Placement(Fusion(rank=4, heads=2), "fusion"), "head"),
    "lora": (Retrieval(), Placement(LoRA(rank=2), "lora", slots=("attn_q", "attn_v")), "cosine"),
}
TOP = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_backbone_folder):
    """40 scenes with one to three captions each, one of them said of two; and two models that judge pairs."""
    folder = tmp_path_factory.mktemp("own")
    scenes, lines = SceneSource("test", "complete", length=40), []
    for number in range(40):
        scene = scenes[number]
        Image.fromarray(scene["image"]).save(folder / f"{number}.png")
        captions = ["the same words of two"] if number % 20 == 7 else []
        captions += list(scene["captions"])[: 1 + number % 3]
        lines += [json.dumps({"image": f"{number}.png", "caption": caption}) for caption in captions]
    (folder / "scenes.jsonl").write_text("\n".join(lines) + "\n")
    backbone = load_backbone(str(small_backbone_folder))
    for name, (task, placement, _) in JUDGES.items():
        model = AdaptedModel(backbone, task, (placement,))
        flat = {path: leaf for path, leaf in names.flatten(model.shapes()).items() if not path.startswith("backbone/")}
        generator = np.random.default_rng(len(name))
        drawn = {
            path: jnp.asarray(0.3 * generator.standard_normal(leaf.shape), jnp.float32) for path, leaf in flat.items()
        }
        identity = Identity(str(small_backbone_folder), backbone.fingerprint, model.description())
        save_adapters(folder / name, names.unflatten(drawn), identity, 1)
    return folder


def config(folder, small_backbone_folder, **changes):
    data = Data(path=str(folder / "scenes.jsonl"), validation_share=0.2, test_share=0.4)
    budget = Budget(steps=2, batch_size=8, log_every=1)
    return adapt.Config(backbone=str(small_backbone_folder), data=data, method="lora", budget=budget, **changes)


def judged(judge, folder, backbone, split):
    """Scores of every caption of a split with every picture, float64 [captions, pictures], all pairs in one batch."""
    task, placement, score = JUDGES[judge]
    model = AdaptedModel(backbone, task, (placement,))
    params = {"backbone": backbone.params} | jax.tree.map(jnp.asarray, load_adapters(folder / judge)[0])
    preprocess, tokenize = Preprocess(backbone.image_processor), Tokenize(backbone.tokenizer, Setup().length(backbone))
    pictures = np.stack([preprocess(split.source[n]["image"], None) for n in range(len(split.source))])
    tokens, mask = map(np.stack, zip(*(tokenize(split[n]["caption"]) for n in range(len(split))), strict=True))
    found = np.empty((len(split), len(pictures)))
    for text in range(len(split)):
        batch = {
            "image": jnp.asarray(pictures),
            "tokens": jnp.broadcast_to(tokens[text], (len(pictures), *tokens[text].shape)),
            "text_mask": jnp.broadcast_to(mask[text], (len(pictures), *mask[text].shape)),
            "route": jnp.zeros(len(pictures), jnp.int32),
            "label": jnp.zeros(len(pictures), jnp.int32),
        }
        if score == "head":
            found[text] = model.predict(params, batch)["score"]
        else:
            output = model.apply(params, batch)
            unit = [
                f / np.linalg.norm(f, axis=-1, keepdims=True) for f in (output.image_features, output.text_features)
            ]
            found[text] = (unit[0] * unit[1]).sum(-1)
    return found


def expected_rows(first, second, owner, ranked_by):
    """Recall at 1 and 5 and mean average precision by sorting: the best few by the second, then the others."""
    rows = []
    for query, scores, better, right in (
        ("picture", first.T, second.T, owner[None] == np.arange(first.shape[1])[:, None]),
        ("caption", first, second, owner[:, None] == np.arange(first.shape[1])[None]),
    ):
        recall, precision = collections.defaultdict(list), []
        for n in range(len(scores)):
            best = np.lexsort((right[n], -scores[n]))  # a tie stands before the right one
            if ranked_by != "features":
                head = best[:TOP]
                best = np.concatenate([head[np.lexsort((right[n][head], -better[n][head]))], best[TOP:]])
            places = np.flatnonzero(right[n][best])
            for k in (1, 5):
                recall[k].append(places[0] < k)
            precision.append(np.mean(np.arange(1, len(places) + 1) / (places + 1)))
        rows.append((query, {k: np.mean(told) for k, told in recall.items()}, np.mean(precision)))
    return rows


@pytest.fixture(scope="module")
def trained(folder, small_backbone_folder, tmp_path_factory):
    """A finished run without a second stage."""
    workdir = tmp_path_factory.mktemp("run")
    adapt.run(config(folder, small_backbone_folder), workdir)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("judge", JUDGES)
def test_the_second_stage_orders_the_best_of_the_first(folder, small_backbone_folder, trained, tmp_path, judge):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    alone = (tmp_path / "retrieval.md").read_text()
    given = config(folder, small_backbone_folder, rerank=Rerank(str(folder / judge), TOP))
    adapt.check(given)
    adapt.run(given, tmp_path)  # a finished run takes a second stage on
    (kept,) = (tmp_path / "runs").glob("lora/learning_rate_*/seed_0/test_captions.npz")
    stored = dict(np.load(kept))
    split = EachCaption(load_own(OwnData(given.data.path, validation_share=0.2, test_share=0.4)).splits["test"])
    start = np.array([int(np.argmax(split.owner == place)) for place in range(len(split.source))])
    images, texts = stored["image_feature"][start].astype(np.float64), stored["text_feature"].astype(np.float64)
    first, backbone = texts @ images.T, load_backbone(str(small_backbone_folder))
    second = judged(judge, folder, backbone, split)
    rows = [json.loads(line) for line in (tmp_path / "retrieval.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "test"]
    name = f"{JUDGES[judge][2]}, of the best {TOP}"
    assert [row["ranked_by"] for row in rows] == ["features"] * 2 + [name] * 2
    for ranked_by, told in (("features", rows[:2]), (name, rows[2:])):
        for row, (query, recall, precision) in zip(
            told, expected_rows(first, second, split.owner, ranked_by), strict=True
        ):
            assert row["query"] == query
            assert {k: row[f"recall_{k}"]["value"] for k in recall} == pytest.approx(recall)
            assert row["mean_average_precision"] == pytest.approx(precision)
    assert [row["mean_average_precision"] for row in rows[2:]] != [row["mean_average_precision"] for row in rows[:2]]
    told = (tmp_path / "retrieval.md").read_text()
    assert name in told
    assert name not in alone


def test_both_directions_are_ordered_by_the_pairs_that_are_asked_for():
    generator = np.random.default_rng(0)
    owner = np.array([0, 0, 1, 2, 2, 3])
    images, texts = (generator.standard_normal((count, 5)).astype(np.float32) for count in (4, 6))
    asked = []

    def scores(captions, pictures):
        asked.append(set(zip(captions.tolist(), pictures.tolist(), strict=True)))
        return (owner[captions] == pictures).astype(float)

    before = Before(np.array([[3, 3], [2, -1], [1, 2], [4, -1]]), np.array([1, 2, 3, 0, 1, 2]))
    found = second_stage(before, images, texts, owner, 10, scores)
    # All candidates are put in order, by a judge that knows.
    np.testing.assert_array_equal(found.image_to_text, [[0, 0], [0, -1], [0, 0], [0, -1]])
    np.testing.assert_array_equal(found.text_to_image, np.zeros(6))
    assert asked == [{(text, image) for text in range(6) for image in range(4)}] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.rerank.top=0"], "re-ranking puts at least 1 candidate in order, got top 0"),
        (["--config.rerank.adapters=nowhere"], "there is no nowhere; give an adapter's file, a checkpoint's folder"),
        (
            ["--config.rerank.adapters=nowhere", "--config.data.name=easy_vqa", "--config.task=vqa"],
            "rerank is a second stage of retrieval, and the task is vqa; leave it out",
        ),
        (["--config.method=fusion"], "or have a trained one of it re-rank with --config.rerank.adapters"),
    ],
)
def test_what_cannot_re_rank_is_refused_before_training(tmp_path, arguments, message):
    given = ["--config.task=retrieval", f"--config.data.data_dir={tmp_path}", *arguments]
    with pytest.raises(UserError, match=message):
        adapt.check(launching.parse_config(adapt, given))


def test_a_model_of_other_weights_is_refused_before_training(folder, small_backbone_folder, tmp_path):
    task, placement, _ = JUDGES["lora"]
    model = AdaptedModel(load_backbone(str(small_backbone_folder)), task, (placement,))
    identity = Identity(str(small_backbone_folder), "0" * 64, model.description())
    save_adapters(tmp_path / "other", load_adapters(folder / "lora")[0], identity, 1)
    given = config(folder, small_backbone_folder, rerank=Rerank(str(tmp_path / "other")))
    with pytest.raises(UserError, match=r"the adapter was trained on .* give the backbone it was trained on"):
        adapt.run(given, tmp_path / "run")
    assert not (tmp_path / "run/runs").exists()
