"""A page in a window of a browser."""

from __future__ import annotations

import contextlib
from pathlib import Path


@contextlib.contextmanager
def opened(browser, path: Path, *, width: int = 1200, scheme: str = "light"):
    """The page in a window; on leaving, that it complained of nothing and asked for nothing is checked."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    complaints, asked = [], []
    tab = context.new_page()
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", lambda dialog: complaints.append(dialog.message))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    yield tab
    assert complaints == []
    assert [url[:80] for url in asked if not url.startswith("data:")] == [path.as_uri()[:80]]
    context.close()
