"""Text: equality with transformers' own padding and truncation, the word tokenizer's files, CLIP's pooling rules."""

from __future__ import annotations

import json
import pickle
import warnings

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vla_jax.data.text import Tokenize, train_word_tokenizer
from vla_jax.errors import UserError

WORDS = ["a", "red", "blue", "circle", "square", "left", "of", "the", "is", "what", "?"]
TEXTS = ["A red circle", "the blue square left of the red circle", "", "what is the zebra?", "a " * 40]


pytestmark = pytest.mark.filterwarnings("ignore:a text of .* tokens is cut")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_word_tokenizer(WORDS, folder, context_length=32)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("length", [3, 6, 32])
def test_equals_the_tokenizer(tokenizer, length):
    expected = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    tokens, mask = Tokenize(tokenizer, length).batch(TEXTS)
    assert tokens.dtype == np.int32
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(tokens, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"].astype(bool))


def test_clip_tokenizer_equals_transformers(tmp_path):
    # A byte-pair tokenizer of CLIP's own class, whose padding token is its end token.
    from transformers import CLIPTokenizer

    pieces = [*"abcdefghijklmnopqrstuvwxyz?"]
    names = [*pieces, *(f"{piece}</w>" for piece in pieces), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    CLIPTokenizer.from_pretrained(tmp_path, model_max_length=77).save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved", local_files_only=True)
    texts = ["a red cat?", "RED", "", "a long text that is cut short"]
    expected = tokenizer(texts, padding="max_length", truncation=True, max_length=8, return_tensors="np")
    tokens, mask = Tokenize(tokenizer, 8).batch(texts)
    np.testing.assert_array_equal(tokens, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"].astype(bool))
    assert tokens[1].tolist() == [names.index(n) for n in ["<|startoftext|>", "red</w>"]] + [tokenizer.eos_token_id] * 6
    assert mask[1].tolist() == [True] * 3 + [False] * 5


def test_settings_in_the_file_do_not_come_first(tokenizer):
    limited = pickle.loads(pickle.dumps(tokenizer))
    limited.backend_tokenizer.enable_truncation(4)
    limited.backend_tokenizer.enable_padding(length=20)
    tokens, _ = Tokenize(limited, 10)("a red circle left of the blue square")
    np.testing.assert_array_equal(tokens, Tokenize(tokenizer, 10)("a red circle left of the blue square")[0])


def test_truncation_keeps_the_end(tokenizer):
    tokenize = Tokenize(tokenizer, 5)
    with pytest.warns(UserWarning, match="of 10 tokens is cut to 5, and others may be: 'a red circle left of the blue"):
        tokens, mask = tokenize("a red circle left of the blue square")
    assert tokenizer.convert_ids_to_tokens(tokens) == ["<|startoftext|>", "a", "red", "circle", "<|endoftext|>"]
    assert mask.all()
    with warnings.catch_warnings(action="error"):
        tokenize("a red circle right of the blue square")  # the first one has been warned of
        Tokenize(tokenizer, 10)("a red circle left of the blue square")


@pytest.mark.parametrize("text", TEXTS)
def test_both_pooling_rules_find_the_end(tokenizer, text):
    tokens, mask = Tokenize(tokenizer, 16)(text)
    first_end = int(np.argmax(tokens == tokenizer.eos_token_id))
    assert tokens.argmax() == first_end == mask.sum() - 1
    assert tokenizer.eos_token_id == len(tokenizer) - 1


def test_round_trip_and_unknown_words(tokenizer):
    tokens, mask = Tokenize(tokenizer, 16)("The RED circle, left of a zebra?")
    # Padding and start and end tokens are special; the comma and the zebra are not in the vocabulary.
    assert tokenizer.decode(tokens[mask][1:-1]) == "the red circle <|unk|> left of a <|unk|> ?"
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "the red circle left of a ?"


def test_vocabulary_is_the_pieces_of_what_was_given(tmp_path):
    tokenizer = train_word_tokenizer(["A Red circle, left.", "red"], tmp_path)
    assert sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get) == [
        *("<|pad|>", "<|unk|>"),
        *(",", ".", "a", "circle", "left", "red"),
        *("<|startoftext|>", "<|endoftext|>"),
    ]
    assert tokenizer.model_max_length == 77


def test_files_are_the_hubs(folder, tokenizer):
    assert {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} <= {p.name for p in folder.iterdir()}
    special = json.loads((folder / "special_tokens_map.json").read_text())
    assert special == {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "unk_token": "<|unk|>",
    }
    for name, token in special.items():
        assert getattr(tokenizer, name) == token
    direct = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    assert direct(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


def test_loads_beside_a_clip_configuration(tmp_path):
    from transformers import CLIPConfig

    train_word_tokenizer(WORDS, tmp_path, context_length=32)
    before = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)(TEXTS)["input_ids"]
    CLIPConfig().save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)(TEXTS)["input_ids"] == before


def test_mistakes_are_named(tokenizer, tmp_path):
    with pytest.raises(UserError, match="at most 32"):
        Tokenize(tokenizer, 33)
    with pytest.raises(UserError, match="at least 3"):
        Tokenize(tokenizer, 2)
    with pytest.raises(UserError, match="at least one word"):
        train_word_tokenizer(["  "], tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenize(object(), 8)
    bare = PreTrainedTokenizerFast(tokenizer_object=_without_post_processor(tokenizer), eos_token="<|endoftext|>")
    with pytest.raises(UserError, match="end token"):
        Tokenize(bare, 8)


def _without_post_processor(tokenizer):
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["post_processor"] = None
    return Tokenizer.from_str(json.dumps(content))


def test_survives_pickling(tokenizer):
    copy = pickle.loads(pickle.dumps(Tokenize(tokenizer, 8)))
    np.testing.assert_array_equal(copy.batch(TEXTS)[0], Tokenize(tokenizer, 8).batch(TEXTS)[0])
