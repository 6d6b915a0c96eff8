"""Text into token ids with their mask, and a word-level tokenizer made from a list of words."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from vla_jax.errors import UserError

PAD, UNKNOWN, START, END = "<|pad|>", "<|unk|>", "<|startoftext|>", "<|endoftext|>"


class Tokenize:
    """Turns texts into ids of a fixed length, with start and end tokens and a mask, padded on the right.

    Equal to the tokenizer's own ``padding="max_length", truncation=True``. It keeps only the Rust tokenizer, so worker
    processes start without importing transformers.
    """

    def __init__(self, tokenizer: Any, length: int):
        """Takes what is needed of the tokenizer.

        Args:
            tokenizer: a fast tokenizer of transformers, as ``AutoTokenizer.from_pretrained(folder)`` gives it.
            length: tokens per text, start and end included; a longer text loses its last words, never its end token,
                at which CLIP pools. The first such text is warned of.

        Raises:
            UserError: if ``length`` is longer than the tokenizer's context or shorter than 3, or if the tokenizer is
                not a fast one or adds no end token.
        """
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(f"the tokenizer {name!r} has no tokenizer.json; save a fast tokenizer into its folder")
        if length < 3:
            raise UserError(f"text length {length} leaves no room for a word between start and end token; at least 3")
        if length > tokenizer.model_max_length:
            raise UserError(
                f"text length {length} is longer than the context of the tokenizer {name!r}; at most "
                f"{tokenizer.model_max_length}"
            )
        self.length = length
        self._warned = False
        # A copy: truncation and padding set in tokenizer.json would otherwise come first.
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._end = tokenizer.eos_token_id
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self._end
        if self._end is None or self._tokenizer.encode("a").ids[-1] != self._end:
            raise UserError(
                f"the tokenizer {name!r} does not end a text with its end token {tokenizer.eos_token!r}; give it a "
                "post-processor that adds start and end tokens"
            )

    def __call__(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokenises one text.

        Args:
            text: any text; words outside the vocabulary become the unknown token.

        Returns:
            ``tokens`` int32 ``[length]`` and ``text_mask`` bool ``[length]``, false on padding.
        """
        ids = self._tokenizer.encode(text).ids
        if len(ids) > self.length:
            if not self._warned:
                self._warned = True  # once is enough to be looked into; thousands would hide everything else
                warnings.warn(
                    f"a text of {len(ids)} tokens is cut to {self.length}, and others may be: {text!r}; give a longer "
                    "text length",
                    stacklevel=2,
                )
            ids = [*ids[: self.length - 1], self._end]
        tokens = np.full(self.length, self._pad, np.int32)
        tokens[: len(ids)] = ids
        return tokens, np.arange(self.length) < len(ids)

    def batch(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenises texts: ``tokens`` int32 ``[texts, length]`` and ``text_mask`` bool ``[texts, length]``."""
        tokenised = [self(text) for text in texts]
        tokens = np.stack([tokens for tokens, _ in tokenised]) if tokenised else np.zeros((0, self.length), np.int32)
        masks = np.stack([mask for _, mask in tokenised]) if tokenised else np.zeros((0, self.length), bool)
        return tokens, masks


def train_word_tokenizer(words: Iterable[str], folder: str | Path, *, context_length: int = 77) -> Any:
    """Makes a tokenizer that knows whole words, and writes it in the hub's format.

    Texts are lower-cased and split at white space and around punctuation. The padding token has id 0, the unknown token
    id 1, words follow in alphabetical order, then the start token; the end token has the largest id, so that pooling at
    the first end token and pooling at the largest id (CLIP's two rules) find the same place.

    Args:
        words: words, phrases or whole texts; the vocabulary is the set of their pieces.
        folder: receives ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``.
        context_length: the tokens per text that the tokenizer's model takes.

    Returns:
        The tokenizer of transformers, as ``AutoTokenizer.from_pretrained(folder)`` loads it.

    Raises:
        UserError: if there is no word.
    """
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.Lowercase()
    pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    pieces = {
        piece for word in words for piece, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(str(word)))
    }
    if not pieces:
        raise UserError("a word tokenizer needs at least one word; given none")
    names = [PAD, UNKNOWN, *sorted(pieces), START, END]
    vocabulary = {name: index for index, name in enumerate(names)}

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(START, vocabulary[START]), (END, vocabulary[END])],
    )
    special = {"bos_token": START, "eos_token": END, "unk_token": UNKNOWN, "pad_token": PAD}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context_length, **special)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    # transformers 5 names the class as only it knows it and leaves out the map; older readers want both.
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2, sort_keys=True) + "\n")
    return PreTrainedTokenizerFast.from_pretrained(folder)
