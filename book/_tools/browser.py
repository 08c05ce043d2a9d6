"""Where the browser is that looks at the pages and prints them."""

from __future__ import annotations

import os
import shutil


def find_chromium() -> str | None:
    """Return the Chromium to use: what ``CHROMIUM`` says, else the first that is installed, else None."""
    installed = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    return os.environ.get("CHROMIUM") or next(filter(None, installed), None)
