"""A backbone that experiments run on in no time, and a browser for their pages."""

from __future__ import annotations

import shutil

import pytest
from word_clip import export_word_clip

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def small_backbone_folder(tmp_path_factory):
    """A small random backbone that knows the words of the scenes."""
    return export_word_clip(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def browser():
    """A headless browser that is installed; Playwright only drives it."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=flags)
        yield started
        started.close()
