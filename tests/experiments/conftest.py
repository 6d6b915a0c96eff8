"""A backbone that experiments run on in no time."""

from __future__ import annotations

import pytest
from word_clip import export_word_clip


@pytest.fixture(scope="session")
def small_backbone_folder(tmp_path_factory):
    """A small random backbone that knows the words of the scenes."""
    return export_word_clip(tmp_path_factory.mktemp("backbone"))
