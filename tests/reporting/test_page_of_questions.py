"""The page of a run that answers questions: what is asked, what the annotators say, what the model says, and where."""

from __future__ import annotations

import json

import numpy as np
import pytest
from opened_page import opened
from PIL import Image

from experiments import adapt
from vla_jax import report_command
from vla_jax.data_sets import Data
from vla_jax.training.metrics import run_record
from vla_jax.variants import Budget

pytestmark = pytest.mark.usefixtures("quick_compilation")

QUESTION = "what color is the square?"


@pytest.fixture(scope="module")
def workdir(small_backbone_folder, tmp_path_factory):
    """LoRA after two steps, on squares of two colours; which one is asked for."""
    folder = tmp_path_factory.mktemp("squares")
    rows = []
    for number in range(40):
        pixels = np.full((32, 32, 3), 240, np.uint8)
        pixels[8:24, 8:24] = ((200, 20, 20), (20, 20, 200))[number % 2]
        Image.fromarray(pixels).save(folder / f"{number}.png")
        answer = ("red", "blue")[number % 2]
        rows.append({"image": f"{number}.png", "question": QUESTION, "answers": [answer] * 3 + ["gray"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = adapt.Config(
        backbone=str(small_backbone_folder),
        data=Data(path=str(folder / "rows.jsonl"), validation_share=0.2, test_share=0.3),
        method="lora",
        budget=Budget(steps=2, batch_size=8, log_every=1),
    )
    workdir = tmp_path_factory.mktemp("run")
    run_record(workdir, config)
    adapt.run(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def predicted(workdir):
    return [json.loads(line) for line in (workdir / "predictions_test.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_question_stands_with_its_answers_and_maps_in_a_browser(browser, workdir, predicted, tmp_path):
    path = tmp_path / "report.html"
    with pytest.raises(SystemExit) as ended:
        report_command.main([str(workdir), "--out", str(path), "--examples=4"])
    assert ended.value.code == 0
    with opened(browser, path) as tab:
        cards = tab.locator("#gallery .card")
        assert cards.count() == 4
        fared = set()
        for card in cards.all():
            place = int(card.locator("h5").inner_text().split()[1])
            line = predicted[place]
            assert card.locator(".said .text").inner_text() == QUESTION
            truth = max(set(line["example"]["answers"]), key=line["example"]["answers"].count)
            assert card.locator(".said .answer").inner_text().startswith(f"answer {truth}")
            frozen, trained = card.locator(".tile").all()
            assert frozen.locator(".verdict").count() == 0
            verdict = trained.locator(".verdict")
            assert line["predicted"] in verdict.inner_text()
            assert verdict.locator(".mark.good").count() == int(line["correct"])
            fared.add(line["correct"])
            for tile in (frozen, trained):
                assert tile.locator(".map img").get_attribute("src").startswith("data:image/png")
        counted = tab.locator("#gallery .shelf h4").all_inner_texts()
        assert len(counted) == len({line["correct"] for line in predicted}) == len(fared)
