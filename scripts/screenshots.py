"""`make screenshots`: the pictures of the page and of a report in the README, taken with Chromium.

Trains on drawn shapes, as `make demo` does, so they can be taken again offline. Needs chromium and chromedriver.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from markdown_it import MarkdownIt
from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service as Driver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from benchmarks.service import Service

PROJECT = Path(__file__).parents[1]
IMAGES = PROJECT / "docs" / "images"
SHOWN = ("star", "hexagon")  # a clear one, and one that the model is not sure of
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-prefers-reduced-motion")
WIDTH, PAGE_HEIGHT, REPORT_HEIGHT = 1080, 1335, 1265  # CSS pixels: to the end of the last card, and of a table
SCALE = 1.5  # device pixels per CSS pixel: sharp where a README shows them at two thirds
COLOURS = 256

# What a code host does to the report, in short.
REPORT_HTML = """<!doctype html><meta charset="utf-8"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; margin: 0; padding: 32px 40px; }}
h1, h2 {{ line-height: 1.25; margin: 20px 0 12px; padding-bottom: 8px; border-bottom: 1px solid #d1d9e0; }}
h1 {{ margin-top: 0; }}
table {{ border-collapse: collapse; }}
th, td {{ border: 1px solid #d1d9e0; padding: 5px 13px; }}
pre {{ background: #f6f8fa; border-radius: 6px; padding: 12px; white-space: pre-wrap; font-size: 85%; }}
img {{ width: 49%; }}
</style>{body}"""


def main() -> None:
    """Write docs/images/page.png and docs/images/report.png."""
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            sys.exit(f"error: {program} is needed (Debian: apt install chromium chromium-driver)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_training(
            "train", "--dataset", "shapes", "--epochs", "8", "--batch-size", "32", "--run", f"{folder}/run",
            "--models-dir", f"{folder}/models",
        )  # fmt: skip
        run_training("samples", "--dataset", "shapes", f"{folder}/pictures")
        with Service(folder / "models", folder / "log") as service, open_browser(PAGE_HEIGHT) as browser:
            pictures = [folder / "pictures" / f"{shape}-1.png" for shape in SHOWN]
            save(take_page(browser, service.url, pictures), "page.png")
        report = MarkdownIt("commonmark").enable("table").render((folder / "run" / "report.md").read_text())
        (folder / "run" / "report.html").write_text(REPORT_HTML.format(body=report))
        with open_browser(REPORT_HEIGHT) as browser:
            browser.get(f"file://{folder}/run/report.html")
            save(browser.get_screenshot_as_png(), "report.png")


def run_training(*arguments: str) -> None:
    """Run a command of the training package."""
    subprocess.run([sys.executable, "-m", "training", *arguments], cwd=PROJECT, check=True)


@contextmanager
def open_browser(height: int) -> Iterator[Chrome]:
    """Open a browser without a window, whose viewport has this height."""
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = Chrome(options=options, service=Driver(str(shutil.which("chromedriver"))))
        size = {"width": WIDTH, "height": height, "deviceScaleFactor": SCALE, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            yield browser
        finally:
            browser.quit()


def take_page(browser: Chrome, url: str, pictures: list[Path]) -> bytes:
    """Classify the pictures on the page, and return a screenshot of its results."""
    browser.get(url + "/")
    browser.find_element(By.ID, "file-choice").send_keys("\n".join(map(str, pictures)))
    WebDriverWait(browser, 30).until(
        lambda _: len(browser.find_elements(By.CSS_SELECTOR, '.card[data-state="classified"]')) == len(pictures)
    )
    return browser.get_screenshot_as_png()


def save(png: bytes, name: str) -> None:
    """Write a screenshot with few colours, which makes it a third as large."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    path = IMAGES / name
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    click.echo(f"{path.relative_to(PROJECT)}  {image.width}x{image.height}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
