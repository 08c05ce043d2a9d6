"""Draw the picture that goes with a shared link, ``book/_static/social.png``, from the ladder of the front page.

Run it after a change of ``book/_static/ladder.svg``. Needs a Chromium (Debian: ``apt install chromium``) and Playwright
(``make web-test`` installs it).
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import yaml

from repository import ROOT

STATIC = ROOT / "book" / "_static"
TARGET = STATIC / "social.png"
WIDTH, HEIGHT = 1200, 630  # what Facebook, LinkedIn, Slack and X ask for

PAGE = """<!DOCTYPE html>
<meta charset="utf-8">
<style>
  body {{ margin: 0; width: {width}px; height: {height}px; display: grid; grid-template-columns: 1fr 500px;
          background: #fff; color: #1b1b1b; font-family: "DejaVu Sans", system-ui, sans-serif; }}
  div {{ padding: 0 20px 0 64px; align-self: center; }}
  h1 {{ font-size: 62px; line-height: 1.12; margin: 0 0 28px; letter-spacing: -1px; }}
  p {{ font-size: 29px; line-height: 1.4; margin: 0; color: #444; }}
  b {{ color: #0072b2; font-weight: 600; }}
  #ladder {{ height: {height}px !important; width: auto !important; margin: 0 auto !important; }}
</style>
<div><h1>{title}</h1><p>{text}</p></div>{ladder}
"""
TEXT = "A tutorial book that runs in Jupyter, and the package <b>policyopt</b>, which computes every figure in it."


def page() -> str:
    """Return the picture as a page of HTML."""
    title = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["title"]
    ladder = (STATIC / "ladder.svg").read_text(encoding="utf-8")
    return PAGE.format(
        width=WIDTH, height=HEIGHT, title=title.replace(", ", ",<br>"), text=TEXT, ladder=ladder
    )


def draw(target: Path) -> None:
    """Write the picture to ``target``.

    Raises
    ------
    FileNotFoundError
        If there is no browser.
    """
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        raise FileNotFoundError("no browser: install chromium, or say where it is with CHROMIUM=…")
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        window = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        window.set_content(page())
        window.screenshot(path=target)
        chromium.close()


if __name__ == "__main__":
    draw(TARGET)
    sys.exit(print(f"{TARGET}: {TARGET.stat().st_size / 1000:.0f} kB"))
