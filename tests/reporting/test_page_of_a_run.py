"""The page of a real, if small, experiment: its gallery, its HTML, and what a browser makes of it."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import re
import shutil
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from opened_page import opened
from PIL import Image

from experiments import fusion_ablation
from vla_jax import names, report_command
from vla_jax.adapters import Fusion, Placement
from vla_jax.backbones.loading import load_backbone
from vla_jax.data.image import Preprocess
from vla_jax.data.text import Tokenize
from vla_jax.model import AdaptedModel
from vla_jax.reporting import fusion_report
from vla_jax.reporting.page.gallery import make_galleries
from vla_jax.reporting.page.render import page
from vla_jax.reporting.page.shown import Answer, Example, Gallery, Judgement, Quadruple, Shelf
from vla_jax.reporting.page.workdir import read_work_directory
from vla_jax.reporting.table import MINUS
from vla_jax.tasks.matching import Matching
from vla_jax.training.checkpoint import load_adapters, save_adapters
from vla_jax.training.checkpoint_metadata import Identity
from vla_jax.training.metrics import run_record
from vla_jax.variants import Budget

pytestmark = pytest.mark.usefixtures("quick_compilation")

HOSTILE = """</style></script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">"'{{ 7 * 7 }}"""


TITLES = {"linear": "linear head alone", "gate": "gated fusion", "text_only": "text only (control)"}
FUSION = Placement(Fusion(rank=4, heads=2, mix="gate"))


@pytest.fixture(scope="module")
def config(small_backbone_folder, tmp_path_factory):
    return fusion_ablation.Config(
        backbone=str(small_backbone_folder),
        tasks=("statements",),
        variants=("linear",),
        head_rates=(1e-2,),
        budget=Budget(steps=2, batch_size=8, log_every=1),
        train=24,
        validation=10,
        test=30,
        quadruples=3,
        data_dir=str(tmp_path_factory.mktemp("data")),
    )


@pytest.fixture(scope="module")
def backbone(config):
    return load_backbone(config.backbone)


@pytest.fixture(scope="module")
def workdir(config, backbone, tmp_path_factory):
    """A run of one variant, beside which two others are laid as they would lie: training them takes too long."""
    folder = tmp_path_factory.mktemp("run")
    run_record(folder, config)
    (row,) = fusion_ablation.run(config, folder)
    more = [
        row | {"name": name, "variant": TITLES[name], "trained": row["trained"] * 7} for name in ("gate", "text_only")
    ]
    more[1] |= {"trained": 5, "group": "control"}
    fusion_report.write([row, *more], config.tasks, "tiny", folder)
    (linear,) = (folder / "runs/statements/linear").glob("*/seed_0")
    generator = np.random.default_rng(0)
    for name in ("gate", "text_only"):
        copy = folder / "runs/statements" / name / linear.relative_to(linear.parents[1])
        shutil.copytree(linear, copy)
        for predicted in ("test", "quadruples"):
            found = dict(np.load(copy / f"{predicted}.npz"))
            label = (found["score"] > 0) == found["correct"]
            found["score"] = generator.normal(size=label.shape).astype(np.float32)
            np.savez(copy / f"{predicted}.npz", **found | {"correct": (found["score"] > 0) == label})
    settings = json.loads((copy / "settings.json").read_text())
    settings["model"]["modalities"] = ["text"]
    (copy / "settings.json").write_text(json.dumps(settings))
    model = AdaptedModel(backbone, Matching("statements"), (FUSION,))
    flat = {name: shape for name, shape in names.flatten(model.shapes()).items() if not name.startswith("backbone/")}
    drawn = {name: 0.3 * generator.standard_normal(shape.shape, np.float32) for name, shape in flat.items()}
    identity = Identity("small", backbone.fingerprint, model.description() | {"rules": "adapters"})
    save_adapters(
        folder / "runs/statements/gate" / linear.relative_to(linear.parents[1]) / "adapters",
        names.unflatten(drawn),
        identity,
        2,
    )
    return folder


@pytest.fixture(scope="module")
def gallery(workdir):
    (only,) = make_galleries(read_work_directory(workdir), 4, None, lambda text: None)
    return only


@pytest.fixture(scope="module")
def written(workdir, tmp_path_factory):
    """The page as the command writes it."""
    path = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    with pytest.raises(SystemExit) as ended:
        report_command.main([str(workdir), "--out", str(path), "--examples=4"])
    assert ended.value.code == 0
    return path


def _stored(workdir, variant, name):
    (path,) = (workdir / "runs/statements" / variant).glob(f"learning_rate_*/seed_0/{name}.npz")
    return dict(np.load(path))


def test_the_gallery_says_what_the_runs_predicted(workdir, gallery):
    assert gallery.problems == ()
    stored = {title: _stored(workdir, name, "test") for name, title in TITLES.items()}
    shown = [example for shelf in gallery.examples for example in shelf.shown]
    assert len(shown) == 4
    assert sum(shelf.count for shelf in gallery.examples) == 30
    for example in shown:
        frozen, *answers = example.answers
        assert (frozen.title, frozen.right, frozen.said) == ("frozen backbone", None, "")
        assert [answer.title for answer in answers] == list(stored)
        for answer in answers:
            score = stored[answer.title]["score"][example.place]
            assert answer.right == stored[answer.title]["correct"][example.place]
            assert answer.right == (answer.said == example.truth)
            assert float(answer.score.replace(MINUS, "-")) == pytest.approx(score, abs=0.005)


def test_quadruples_are_judged_by_the_four_scores_shown(workdir, gallery):
    assert sum(shelf.count for shelf in gallery.quadruples) == 3
    stored = {title: _stored(workdir, name, "quadruples")["score"] for name, title in TITLES.items()}
    for shelf in gallery.quadruples:
        for quadruple in shelf.shown:
            assert sorted(quadruple.captions[0].split()) == sorted(quadruple.captions[1].split())
            for judgement in quadruple.judgements[1:]:
                s = judgement.scores
                given = stored[judgement.title][4 * quadruple.place :][:4].reshape(2, 2)
                if judgement.title == TITLES["text_only"]:  # what it does not see does not tell pictures apart
                    given = np.repeat(given[:, :1], 2, axis=1)
                np.testing.assert_allclose(s, given, atol=1e-6)
                text = s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
                image = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]
                assert judgement.right == {"text": text, "image": image, "group": text and image}


def test_heat_maps_are_cosines_of_adapted_patches_with_the_adapted_text(backbone, workdir, gallery):
    trained, _ = load_adapters(workdir / "runs/statements/gate/learning_rate_0.01/seed_0/adapters")
    whole = names.merge({"backbone": backbone.params}, trained)
    preprocess, tokenize = Preprocess(backbone.image_processor), Tokenize(backbone.tokenizer, 20)
    models = {
        "frozen backbone": (AdaptedModel(backbone, Matching()), {"backbone": backbone.params}),
        "gated fusion": (AdaptedModel(backbone, Matching("statements"), (FUSION,)), whole),
    }
    example = gallery.examples[0].shown[0]
    # The picture as it is shown is the picture as the model sees it, to the last of 256 levels.
    tokens, mask = tokenize(example.text)
    batch = {"image": preprocess(example.pictures[0])[None], "tokens": tokens[None], "text_mask": mask[None]}
    shown = {answer.title: answer for answer in example.answers}
    for title, (model, params) in models.items():
        output = jax.jit(model.apply)(params, batch)
        patches, text = np.asarray(output.patch_features[0]), np.asarray(output.text_features[0])
        cosines = patches @ text / np.linalg.norm(patches, axis=-1) / np.linalg.norm(text)
        (heat,) = shown[title].heat
        np.testing.assert_allclose(heat, cosines.reshape(4, 4), atol=1e-4)
    np.testing.assert_array_equal(shown["linear head alone"].heat, shown["frozen backbone"].heat)
    assert not np.allclose(shown["gated fusion"].heat, shown["frozen backbone"].heat, atol=1e-4)
    assert shown["text only (control)"].heat == ()


def test_what_is_gone_is_said_and_the_rest_is_shown(workdir, tmp_path):
    """Adapters that were deleted, scores of other quadruples, and data that are not there."""
    shutil.copytree(workdir, tmp_path / "copy", ignore=shutil.ignore_patterns("compiled"))
    run = tmp_path / "copy/runs/statements/gate/learning_rate_0.01/seed_0"
    shutil.rmtree(run / "adapters")
    scores = dict(np.load(run / "quadruples.npz"))
    np.savez(run / "quadruples.npz", **{name: values[:8] for name, values in scores.items()})
    work = read_work_directory(tmp_path / "copy")
    (found,) = make_galleries(work, 1, None, lambda text: None)
    assert len(found.problems) == 2
    assert found.problems[0] == "gated fusion scored other quadruples than there are now."
    assert found.problems[1].startswith("gated fusion has no heat maps: there is no folder")
    assert [one.title for one in found.quadruples[0].shown[0].judgements[1:]] == [
        "linear head alone",
        "text only (control)",
    ]
    lost = dataclasses.replace(work, config=dict(work.config) | {"backbone": str(tmp_path / "nowhere")})
    (found,) = make_galleries(lost, 1, None, lambda text: None)
    assert found.problems[0].startswith("No examples of statements are shown: no backbone")
    assert "No examples of statements are shown" in page(lost, [found])
    for changes, message in (
        (
            {"config": work.config | {"test": 20}},
            "the test split had 30 examples when they were tested, and has 20",
        ),
        ({"config": work.config | {"data_dir": "/dev/null/a"}}, "No examples of statements are shown: "),
    ):
        (found,) = make_galleries(dataclasses.replace(work, **changes), 1, None, lambda text: None)
        assert message in found.problems[0]


class _Parts(HTMLParser):
    """Elements with their attributes, and the text outside style and script."""

    def __init__(self, content):
        super().__init__()
        self.elements, self.text, self._open = [], [], []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        if not {"style", "script"} & set(self._open):
            self.text.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_needs_nothing_but_itself(written):
    content = written.read_text()
    parts = _Parts(content)
    assert not re.search(r"https?:", content)
    for tag, attributes in parts.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href"):
            if name in attributes:
                assert attributes[name].startswith(("data:image/", "data:,", "#")), (tag, attributes[name][:80])
    assert len(parts.of("h1")) == len(parts.of("script")) == 1
    assert all(attributes.get("alt", "").strip() for attributes in parts.of("img"))
    targets = {attributes["id"] for _, attributes in parts.elements if "id" in attributes}
    assert {attributes["href"][1:] for attributes in parts.of("a")} == targets
    assert targets == {"results", "figures", "curves", "gallery", "configuration"}


def test_boxes_and_veils_are_drawn_where_they_are(workdir):
    picture, heat = np.full((8, 8, 3), 200, np.uint8), np.array([[0.25, 0.0], [0.5, 1.0]])
    answer = Answer("lora", "", "IoU 0.30", False, (heat,), (0.25, 0.5, 0.75, 1.0))
    example = Example(3, "", (picture,), "the cup", "", (0.0, 0.125, 0.5, 0.625), (answer,))
    content = page(read_work_directory(workdir), [Gallery("", "grounding", 0, (), (Shelf("wrong", 1, 9, (example,)),))])
    parts = _Parts(content)
    boxes = [(a["class"], *(float(a[n]) for n in ("x", "y", "width", "height"))) for a in parts.of("rect")]
    assert boxes == [
        ("truth", 0.0, 0.125, 0.5, 0.5),  # on the picture itself
        ("truth", 0.0, 0.125, 0.5, 0.5),
        ("said", 0.25, 0.5, 0.5, 0.5),
    ]
    drawn = [each for each in parts.of("img") if each["alt"].startswith(("The picture", "Heat map"))]
    shown, veil = (Image.open(io.BytesIO(base64.b64decode(each["src"].partition(",")[2]))) for each in drawn)
    np.testing.assert_array_equal(shown, picture)
    alpha = np.asarray(veil)[..., 1] / 255
    assert not np.asarray(veil)[..., 0].any()  # black
    assert alpha[1, 1] == 0  # most alike: as it is
    np.testing.assert_allclose(alpha / alpha[0, 1], 1 - heat, atol=0.01)
    assert drawn[1]["alt"].startswith("Heat map of lora: most alike at row 2, column 2 of 2; cosines from 0.00")
    assert 'id="gallery"' not in page(read_work_directory(workdir), [])


def _hostile(workdir):
    """A work directory and a gallery in which every text tries to be more than text."""
    work = read_work_directory(workdir)
    (table,) = work.tables
    table = dataclasses.replace(
        table,
        title=HOSTILE,
        headings=(HOSTILE, *table.headings[1:]),
        rows=tuple((dataclasses.replace(row[0], text=HOSTILE), *row[1:]) for row in table.rows),
    )
    work = dataclasses.replace(
        work,
        tables=(table,),
        titles=dict.fromkeys(work.titles, HOSTILE),
        config=dict(work.config) | {HOSTILE: HOSTILE, "backbone": HOSTILE},
        runs=tuple(dataclasses.replace(run, group=HOSTILE) for run in work.runs),
    )
    picture, heat = np.zeros((8, 8, 3), np.uint8), np.zeros((2, 2))
    example = Example(
        0, HOSTILE, (picture,), HOSTILE, HOSTILE, None, (Answer(HOSTILE, HOSTILE, HOSTILE, True, (heat,)),)
    )
    judgement = Judgement(HOSTILE, np.zeros((2, 2)), {"text": False}, np.zeros((2, 2, 2, 2)))
    four = Quadruple(0, HOSTILE, (picture, picture), (HOSTILE, HOSTILE), (judgement,))
    gallery = Gallery(
        HOSTILE, "matching", 0, (Shelf(HOSTILE, 1, 1, (four,)),), (Shelf(HOSTILE, 1, 1, (example,)),), (HOSTILE,)
    )
    return page(work, [gallery])


def test_texts_of_the_data_stay_texts(workdir, gallery):
    content = _hostile(workdir)
    parts, plain = _Parts(content), _Parts(page(read_work_directory(workdir), [gallery]))
    assert {tag for tag, _ in parts.elements} == {tag for tag, _ in plain.elements}
    assert len(parts.of("script")) == 1
    assert not [name for _, attributes in parts.elements for name in attributes if name.startswith("on")]
    assert html.escape("<script>window.hacked = 1</script>") in content
    assert "".join(parts.text).count("window.hacked = 1</script>") >= 20  # the title, rows, captions, settings, ...
    assert "{{ 7 * 7 }}" in "".join(parts.text)


def test_its_parts_are_there_in_a_browser(browser, written):
    with opened(browser, written) as tab:
        pictures = tab.locator("img")
        assert pictures.count() > 20
        assert all(pictures.evaluate_all("all => all.map(each => each.complete && each.naturalWidth > 0)"))
        maps = tab.locator(".map").evaluate_all("all => all.map(each => getComputedStyle(each).backgroundImage)")
        assert maps
        assert all(each.startswith('url("data:image/png') for each in maps)
        rows = tab.locator("#results tbody tr")
        assert rows.locator("th").all_inner_texts() == list(TITLES.values())
        assert tab.locator("#curves .view:visible polyline").count() == 3
        assert tab.locator("#gallery .card").count() == 4 + 3
        assert tab.locator("#gallery .four").count() == 3 * 4
        assert tab.locator("#configuration .settings").first.is_hidden()
        tab.locator("#configuration summary").first.click()
        assert tab.get_by_text("budget.optimizer.warmup_share").is_visible()


def test_a_heading_sorts_its_column_down_up_and_back(browser, written):
    with opened(browser, written) as tab:
        names_now = lambda: tab.locator("#results tbody th").all_inner_texts()  # noqa: E731
        before, heading = names_now(), tab.locator("#results thead th").nth(1)
        cells = tab.locator("#results tbody tr td:nth-child(2)").all_inner_texts()
        trained = {name: int(text.replace(",", "")) for name, text in zip(before, cells, strict=True)}
        assert len(set(trained.values())) == 3
        for order, expected in (
            ("descending", sorted(before, key=trained.get, reverse=True)),
            ("ascending", sorted(before, key=trained.get)),
            (None, before),
        ):
            heading.locator("button").click()
            assert heading.get_attribute("aria-sort") == order
            assert names_now() == expected
        tab.locator("#results thead button").first.click()
        assert names_now() == sorted(before, key=str.lower)


def test_charts_are_chosen_curves_switched_off_and_values_read(browser, written, workdir):
    with opened(browser, written) as tab:
        figure = tab.locator("#curves .chart").first
        figure.locator("select").select_option("accuracy")
        view = figure.locator(".view:visible")
        assert view.locator("svg[role=img]").get_attribute("aria-label").startswith("accuracy against steps")
        button = view.locator(".legend button", has_text="gated fusion")
        button.click()
        assert button.get_attribute("aria-pressed") == "false"
        assert view.locator("polyline:visible").count() == 2
        view.locator(".plot svg").scroll_into_view_if_needed()
        plot = view.locator(".plot svg").bounding_box()
        tab.mouse.move(plot["x"] + 0.8 * plot["width"], plot["y"] + plot["height"] / 2)
        logged = (workdir / "runs/statements/linear/learning_rate_0.01/seed_0/metrics.jsonl").read_text().splitlines()
        accuracy = json.loads(logged[1])["train/accuracy"]
        assert view.locator(".tip").inner_text() in [
            f"{TITLES[n]}, step 2: {accuracy:g}" for n in ("linear", "text_only")
        ]
        dots = tab.locator("#results .chart").first
        dots.locator("select").select_option(index=1)
        assert dots.locator(".view:visible li").count() > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways_and_with_contrast(browser, written, scheme):
    with opened(browser, written, width=390, scheme=scheme) as tab:
        tab.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        table = tab.locator("#results .scroll").first
        assert table.evaluate("each => each.scrollWidth > each.clientWidth")  # it scrolls in its own box
        paper, colors = tab.evaluate(
            """() => {
                const color = (each, name) => getComputedStyle(each)[name].match(/[\\d.]+/g).slice(0, 3).map(Number);
                const all = document.querySelectorAll("p, dt, dd, th, td, h1, h2, h5, figcaption, a, .note, .mark");
                return [color(document.body, "backgroundColor"), [...all].map((each) => color(each, "color"))];
            }"""
        )
        assert (_luminance(paper) < 0.05) == (scheme == "dark")
        for color in {tuple(color) for color in colors}:
            light, dark = sorted((_luminance(color), _luminance(paper)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, color  # WCAG 2.2, 1.4.3


def _luminance(color):
    """Relative luminance of sRGB levels (WCAG 2.2)."""
    levels = [level / 255 for level in color]
    linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_hostile_texts_do_nothing_in_a_browser(browser, workdir, tmp_path):
    path = tmp_path / "hostile.html"
    path.write_text(_hostile(workdir))
    with opened(browser, path) as tab:
        assert tab.title() == HOSTILE
        assert tab.evaluate("window.hacked") is None
        assert tab.locator("#gallery .card").count() == 2
