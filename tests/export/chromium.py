"""The Chromium that `make .browser/ready` unpacks, headless, driven by Playwright."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

UNPACKED = Path(__file__).parents[2] / ".browser" / "unpacked"

FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir>{fonts}</dir>
  <cachedir>{cache}</cachedir>
</fontconfig>
"""


@contextlib.contextmanager
def running_chromium(folder: Path) -> Iterator[Browser]:
    """Start the browser with the fonts and libraries that it came with, and no others.

    Args:
        folder: An empty folder for its font settings.
    """
    assert (UNPACKED / "chromium").exists(), "run make .browser/ready: it brings the browser"
    fonts = FONTS.format(fonts=UNPACKED / "fonts", cache=folder / "cache")
    (folder / "fonts.conf").write_text(fonts)
    libraries = str(UNPACKED / "al2023" / "lib")
    variables = os.environ | {"LD_LIBRARY_PATH": libraries, "FONTCONFIG_PATH": str(folder)}
    arguments = ["--no-sandbox", "--headless=shell"]  # there is no sandbox for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(UNPACKED / "chromium"), args=arguments, env=variables
        )
        yield browser
        browser.close()
