"""Access tokens stand in nothing that is printed or written."""

from __future__ import annotations

import json

import pytest

from vla_jax import launching
from vla_jax.backbones.loading import load_backbone
from vla_jax.errors import UserError
from vla_jax.redaction import redacted
from vla_jax.reporting.page.render import page
from vla_jax.reporting.page.workdir import read_work_directory
from vla_jax.training.metrics import run_record

TOKEN = "hf_" + "aBcD1234" * 4
OTHER = "a-token-of-another-form-0123456789"


@pytest.fixture(autouse=True)
def tokens(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", OTHER)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"Authorization: Bearer {TOKEN}", "Authorization: Bearer ***"),
        (f"token {OTHER}!", "token ***!"),
        ("hf_ZyXw9876ZyXw9876 of somebody else", "*** of somebody else"),
        ("https://user:secret@hub.example/a/b?x=1", "https://***@hub.example/a/b?x=1"),
        ("https://hub.example/a?token=abc&x=1", "https://hub.example/a?token=***&x=1"),
        ("https://s3.example/a?X=1&Signature=abc%2F", "https://s3.example/a?X=1&Signature=***"),
        ("owner/model@main", "owner/model@main"),
        ("mail user@example.org, hf_hub, hf_home", "mail user@example.org, hf_hub, hf_home"),
    ],
)
def test_secrets_are_taken_out_of_texts(text, clean):
    assert redacted(text) == clean


def test_a_token_too_short_to_be_one_hides_nothing(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a")
    assert redacted("a banana") == "a banana"


@pytest.mark.parametrize(
    "name", [f"https://user:{TOKEN}@huggingface.co/owner/model", f"https://huggingface.co/owner/model?token={OTHER}"]
)
def test_a_backbone_by_an_address_is_refused_without_its_token(name):
    with pytest.raises(UserError, match="address on the net") as error:
        load_backbone(name)
    assert TOKEN not in str(error.value)
    assert OTHER not in str(error.value)


def test_what_the_hub_answers_is_told_without_tokens(monkeypatch):
    import huggingface_hub

    def fails(*arguments, **settings):
        raise OSError(f"401 for https://user:{OTHER}@mirror.example/owner/model with Bearer {TOKEN}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(UserError, match=r"401 for https://\*\*\*@mirror\.example") as error:
        load_backbone("owner/model")
    assert TOKEN not in str(error.value)
    assert OTHER not in str(error.value)


def test_a_dry_run_prints_none(capsys):
    with pytest.raises(SystemExit):
        launching.command(
            ["--experiment=adapt", "--dry_run", f"--config.backbone=https://user:{TOKEN}@huggingface.co/owner/model"]
        )
    told = capsys.readouterr()
    assert "address on the net" in told.err
    assert TOKEN not in told.out + told.err


def test_no_record_and_no_page_has_one(tmp_path):
    run_record(tmp_path / "run", {"preset": "default", "backbone": f"https://user:{OTHER}@hub.example/{TOKEN}"})
    assert json.loads((tmp_path / "run" / "config.json").read_text())["backbone"] == "https://***@hub.example/***"
    (tmp_path / "results.jsonl").write_text(json.dumps({"name": "lora", "variant": "LoRA"}) + "\n")
    told = {"backbone": f"https://user:{OTHER}@hub.example/model", "path": f"https://hub.example/?token={TOKEN}"}
    (tmp_path / "config.json").write_text(json.dumps(told))
    written = page(read_work_directory(tmp_path), [])
    assert "https://***@hub.example/model" in written
    (tmp_path / "config.json").unlink()
    written += "".join(path.read_text() for path in tmp_path.rglob("*.json*"))
    assert TOKEN not in written
    assert OTHER not in written
