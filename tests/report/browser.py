"""A real headless Chromium, driven by playwright; tests skip where there is none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Any]:
    """A playwright browser. Its path: $CHROMIUM, else the first of the usual names in PATH."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip("no Chromium here: install Debian's package chromium, or set CHROMIUM to one")
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is missing")
    with sync_api.sync_playwright() as driver:
        # Containers run tests as root, which Chromium's sandbox refuses; the page is our own.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
