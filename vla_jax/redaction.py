"""Texts without secrets: what is printed, logged or saved must not hold an access token."""

from __future__ import annotations

import os
import re

HIDDEN = "***"

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
_SHORTEST = 8  # a value of fewer characters is no token, and may be part of any word
_IN_ADDRESS = re.compile(r"(?<=://)[^\s/@]+@")  # user:password@ of an address
_IN_QUERY = re.compile(r"([?&](?:access_|auth_)?(?:token|key|signature|sig)=)[^\s&#'\"]+", re.IGNORECASE)
_OF_THE_HUB = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}")


def redacted(text: str) -> str:
    """A text with hub tokens, those of the environment among them, and the credentials of addresses taken out."""
    for variable in _VARIABLES:
        token = os.environ.get(variable, "").strip()
        if len(token) >= _SHORTEST:
            text = text.replace(token, HIDDEN)
    text = _IN_ADDRESS.sub(f"{HIDDEN}@", text)
    text = _IN_QUERY.sub(rf"\g<1>{HIDDEN}", text)
    return _OF_THE_HUB.sub(HIDDEN, text)
