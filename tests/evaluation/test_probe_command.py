"""The command that puts published probes to saved models: its scores against the models themselves, controls beside."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from published_layout import write_json
from word_clip import export_word_clip

from vla_jax import names
from vla_jax.adapters import Fusion, LoRA, Placement
from vla_jax.backbones.loading import load_backbone
from vla_jax.data.image import Preprocess
from vla_jax.data.scenes import SceneSource
from vla_jax.data.text import Tokenize
from vla_jax.evaluation import sugarcrepe, valse, winoground
from vla_jax.evaluation.probe.__main__ import main
from vla_jax.evaluation.winoground.score_files import read_scores
from vla_jax.model import AdaptedModel
from vla_jax.tasks.matching import Matching
from vla_jax.tasks.retrieval import Retrieval
from vla_jax.training.checkpoint import save_adapters
from vla_jax.training.checkpoint_metadata import Identity

pytestmark = pytest.mark.usefixtures("quick_compilation")

COUNT = 6
MODELS = {
    "lora": (Retrieval(), Placement(LoRA(rank=2), "lora", slots=("attn_q", "attn_v"))),
    "fusion": (Matching("statements"), Placement(Fusion(rank=4, heads=2), "fusion")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, two models trained on it, and all four probes in their published layouts."""
    folder = tmp_path_factory.mktemp("probes")
    source = SceneSource("test", "quadruples", length=COUNT)
    lines = []
    for example in map(source.__getitem__, range(COUNT)):
        for number in (0, 1):
            path = folder / "winoground/images" / f"ex_{example['id']}_img_{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(example[f"image_{number}"]).save(path)
        tags = {name: example[name] for name in ("tag", "secondary_tag", "num_main_preds", "collapsed_tag")}
        captions = {f"caption_{number}": example[f"caption_{number}"] for number in (0, 1)}
        images = {f"image_{number}": f"ex_{example['id']}_img_{number}" for number in (0, 1)}
        lines.append(json.dumps({"id": example["id"]} | captions | images | tags))
    (folder / "winoground/examples.jsonl").write_text("\n".join(lines) + "\n")

    def entry(number):
        example = source[number % COUNT]
        return example["image_0"], example["caption_0"], example["caption_1"]

    def picture(path, pixels):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, "PNG")

    crepe, relations, foils = {}, [], {}
    for number in range(COUNT):
        pixels, true, false = entry(number)
        name = f"{number:012d}.png"
        for place in ("val2017", "aro/images", "valse/coco2017"):
            picture(folder / place / name, pixels)
        crepe[str(number)] = {"filename": name, "caption": true, "negative_caption": false}
        box = {"bbox_x": 0, "bbox_y": 0, "bbox_w": 40, "bbox_h": 64}
        texts = {"true_caption": true, "false_caption": false, "relation_name": ("left of", "above")[number % 2]}
        relations.append({"image_path": name} | texts | box)
        votes = {"caption": 3 if number else 1, "foil": 0, "other": 0}
        foils[f"a{number}"] = {
            "dataset": "coco2017", "image_file": name, "caption": true, "foil": false, "mturk": votes,
        }  # fmt: skip
    for category in sugarcrepe.CATEGORIES:
        write_json(folder / f"crepe/{category}.json", crepe)
    write_json(folder / "aro/visual_genome_relation.json", relations)
    for instrument in valse.INSTRUMENTS:
        write_json(folder / f"valse_annotations/{instrument}.json", foils)

    backbone = load_backbone(str(export_word_clip(folder / "clip")))
    for name, (task, placement) in MODELS.items():
        model = AdaptedModel(backbone, task, (placement,))
        flat = {path: leaf for path, leaf in names.flatten(model.shapes()).items() if not path.startswith("backbone/")}
        generator = np.random.default_rng(len(name))
        drawn = {path: 0.3 * generator.standard_normal(leaf.shape, np.float32) for path, leaf in flat.items()}
        identity = Identity(str(folder / "clip/small"), backbone.fingerprint, model.description())
        save_adapters(folder / name, jax.tree.map(jnp.asarray, names.unflatten(drawn)), identity, 1)
        np.savez(folder / f"{name}.npz", **drawn)
    return folder


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(str(folder / "clip/small"))


def _given(probe, folder):
    return {
        "winoground": ["winoground", f"--data={folder / 'winoground'}"],
        "sugarcrepe": ["sugarcrepe", f"--data={folder / 'crepe'}", f"--images={folder / 'val2017'}"],
        "aro_relation": ["aro_relation", f"--data={folder / 'aro'}"],
        "valse": ["valse", f"--data={folder / 'valse_annotations'}", f"--images={folder / 'valse'}"],
    }[probe] + ["--batch-size=8"]


def _expected(backbone, name, folder, picture, caption):
    """The score of one pair, by the model itself."""
    preprocess, tokenize = Preprocess(backbone.image_processor), Tokenize(backbone.tokenizer, 24)
    tokens, mask = tokenize(caption)
    batch = {"image": preprocess(picture), "tokens": tokens, "text_mask": mask}
    batch = {name: jnp.asarray(array)[None] for name, array in (batch | {"label": 0, "route": 0}).items()}
    if name == "backbone":
        model, params = AdaptedModel(backbone, Matching()), {"backbone": backbone.params}
    else:
        task, placement = MODELS[name]
        model = AdaptedModel(backbone, task, (placement,))
        params = names.merge({"backbone": backbone.params}, names.unflatten(dict(np.load(folder / f"{name}.npz"))))
    if name == "fusion":
        return float(model.predict(params, batch)["score"][0])
    output = model.apply(params, batch)
    image, text = np.asarray(output.image_features[0]), np.asarray(output.text_features[0])
    return float(image @ text / np.linalg.norm(image) / np.linalg.norm(text))


def test_winoground_by_head_by_cosine_and_by_the_backbone(folder, backbone, tmp_path, capsys):
    models = [f"--adapters={folder / name}" for name in ("fusion", "lora")]
    assert main([*_given("winoground", folder), *models, f"--out={tmp_path / 'out'}", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    first, second = f"{folder / 'fusion'} (head)", f"{folder / 'lora'} (cosine)"
    assert list(told["models"]) == [first, second, "backbone (cosine)"]
    assert list(told["controls"]) == ["constant scorer", "text only", "image only"]
    kept = json.loads((tmp_path / "out/results.json").read_text())
    files = {name: tmp_path / "out" / file for file, name in kept["scores"].items()}
    source = winoground.Winoground(folder / "winoground")
    for called, name in ((first, "fusion"), (second, "lora"), ("backbone (cosine)", "backbone")):
        scores = read_scores(files[called], source.identifiers)
        example = source[2]
        expected = [
            [_expected(backbone, name, folder, example[f"image_{i}"], example[f"caption_{c}"]) for i in (0, 1)]
            for c in (0, 1)
        ]
        np.testing.assert_allclose(scores[2], expected, atol=2e-5)
        outcome = winoground.outcomes(scores)
        assert told["models"][called]["all"]["group"]["value"] == pytest.approx(outcome.group.mean())
    # What does not see the picture cannot prefer one, and what does not see the caption likewise.
    assert told["controls"]["text only"]["all"]["image"]["value"] == 0
    assert told["controls"]["image only"]["all"]["text"]["value"] == 0
    assert [(pair["a"], pair["b"]) for pair in told["comparisons"]] == [(first, second), (first, "backbone (cosine)")]
    assert "p_value" in told["comparisons"][0]["group"]


@pytest.mark.parametrize(("probe", "right"), [("sugarcrepe", 0), ("aro_relation", 1), ("valse", 0)])
def test_a_picture_with_two_captions(probe, right, folder, backbone, tmp_path, capsys):
    assert main([*_given(probe, folder), f"--adapters={folder / 'lora'}", f"--out={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "all examples" in printed
    told = json.loads((tmp_path / "results.json").read_text())
    (file,) = (file for file, name in told["scores"].items() if name.endswith("(cosine)") and "lora" in name)
    rows = [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]
    scores = np.array([row["scores"] for row in rows])
    (whole,) = (row for row in told["rows"] if row["group"] == "all examples" and "lora" in row["scorer"])
    assert whole["examples"] == len(rows) == told["examples"]
    assert whole["accuracy"]["value"] == pytest.approx((scores[:, right] > scores[:, 1 - right]).mean())
    by_scorer = {row["scorer"]: row for row in told["rows"] if row["group"] == "all examples"}
    assert set(by_scorer) == {f"{folder / 'lora'} (cosine)", "backbone (cosine)", "constant", "text only", "image only"}
    assert (by_scorer["constant"]["accuracy"]["value"], by_scorer["constant"]["ties"]) == (0, 1)
    assert (by_scorer["image only"]["accuracy"]["value"], by_scorer["image only"]["ties"]) == (0, 1)
    assert by_scorer["backbone (cosine)"]["difference"] is not None
    if probe == "sugarcrepe":
        example = SceneSource("test", "quadruples", length=COUNT)[3]
        pairs = [_expected(backbone, "lora", folder, example["image_0"], example[f"caption_{c}"]) for c in (0, 1)]
        np.testing.assert_allclose(scores[3], pairs, atol=2e-5)
    if probe == "valse":
        assert len(rows) == 11 * (COUNT - 1)  # one of each instrument is not valid


def test_the_backbone_alone_needs_no_adapters(folder, capsys):
    assert main([*_given("sugarcrepe", folder), f"--backbone={folder / 'clip/small'}", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["scorer"] for row in told["rows"]} == {"backbone (cosine)", "constant", "text only", "image only"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["winogrand", "--data=x"], "unknown probe 'winogrand'; did you mean 'winoground'"),
        (["winoground", "--data=x"], "nothing to score: give --adapters, or --backbone"),
        (["winoground", "--data=x", "--backbone=tiny", "--batch-size=0"], "--batch-size must be at least 1, got 0"),
        (["winoground", "--data=x", "--adapters=a", "--adapters=a"], "names one path twice"),
        (["winoground", "--data=not_here", "--backbone=tiny"], "not_here/examples.jsonl"),
    ],
)
def test_what_cannot_be_scored_is_one_line_and_status_two(arguments, message, capsys):
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert message in told.err


def test_a_box_outside_of_its_picture_is_named_before_anything_is_scored(folder, tmp_path, capsys):
    entries = json.loads((folder / "aro/visual_genome_relation.json").read_text())
    entries[4] |= {"bbox_x": 64}
    write_json(tmp_path / "visual_genome_relation.json", entries)
    (tmp_path / "images").symlink_to(folder / "aro/images")
    assert main(["aro_relation", f"--data={tmp_path}", "--backbone=nowhere"]) == 2  # the backbone is not looked for yet
    assert "example 4: the box (64, 0, 104, 64) lies outside of" in capsys.readouterr().err


def test_models_of_different_backbones_are_scored_apart(folder, tmp_path, capsys):
    task, placement = MODELS["lora"]
    other = load_backbone("tiny")
    model = AdaptedModel(other, task, (placement,))
    trained = {name: tree for name, tree in model.init(jax.random.key(0)).items() if name != "backbone"}
    save_adapters(tmp_path / "other", trained, Identity("tiny", other.fingerprint, model.description()), 1)
    given = [*_given("winoground", folder), f"--adapters={folder / 'lora'}", f"--adapters={tmp_path / 'other'}"]
    assert main(given) == 2
    assert "was trained on another backbone than" in capsys.readouterr().err
