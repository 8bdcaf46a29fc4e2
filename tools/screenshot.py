# SPDX-License-Identifier: Apache-2.0
"""Takes docs/figures/page.png: the page of `xgdn serve` after ten minutes of load on the example's small model.

    python tools/screenshot.py docs/figures/page.png

A desktop in the light and a phone in the dark, side by side. Needs what the tests of the page need, and Pillow.
"""

import argparse
import io
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, expect, sync_playwright

CHECKPOINT = Path(__file__).parents[1] / "examples/tiny_model/checkpoint"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"  # the model continues Python and its docs
OPTIONS = ("--max-batch-size", "8", "--max-cached-tokens", "16384", "--prefix-cache-slots", "8", "--dtype", "float32")
NUM_CLIENTS = 14
WIDTHS = {"light": 1280, "dark": 360}
HEIGHT = 1000
QUESTION = 'class Path:\n    """A path of the file system."""\n\n    def exists(self):'


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of the small model with a chat template."""
    for file in CHECKPOINT.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    program = [sys.executable, "-m", "xgdn", "serve", str(folder), "--model-name", "tiny", "--port", "0", "--json"]
    with subprocess.Popen(
        [*program, *OPTIONS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["address"]
        finally:
            process.terminate()


class Client:
    """Asks again and again, more often at some times than at others, until it is told to stop."""

    def __init__(self, url: str, seed: int) -> None:
        self._url = url
        self._draw = random.Random(seed)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        text = (CHECKPOINT / "held_out.txt").read_text()
        begin = time.monotonic()
        with httpx.Client(base_url=self._url, timeout=60) as http:
            while not self._is_over.wait(self._draw.expovariate(1) * self._pause(time.monotonic() - begin)):
                start = 2000 * self._draw.randrange(4)  # some prompts begin alike
                prompt = text[start : start + self._draw.choice([300, 1200, 1200, 3000])]
                body = {
                    "model": "tiny",
                    "prompt": prompt,
                    "max_tokens": self._draw.randrange(20, 250),
                    "temperature": 0.8,
                }
                http.post("/v1/completions", json=body | {"n": self._draw.choice([1, 1, 1, 2]), "ignore_eos": True})

    def _pause(self, seconds: float) -> float:
        """The mean pause at this time, in seconds: little to do at the beginning, then waves."""
        return 3 + 10 * (1 + math.cos(2 * math.pi * seconds / 200)) ** 2


def photograph(browser: Browser, url: str, scheme: str) -> bytes:
    viewport = {"width": WIDTHS[scheme], "height": HEIGHT}
    with browser.new_page(viewport=viewport, color_scheme=scheme) as page:
        page.goto(url)
        expect(page.locator("#state")).to_have_text("serving")
        page.locator("#settings > summary").click()
        page.fill("#max_tokens", "60")
        page.locator("#settings > summary").click()
        page.fill("#prompt", QUESTION)
        page.click("#send")
        expect(page.locator(".note")).to_be_visible(timeout=60_000)
        expect(page.locator("#requests tbody tr").nth(1)).to_be_visible(timeout=60_000)
        if scheme == "dark":
            page.locator("#engine").evaluate("it => it.scrollIntoView()")
        return page.screenshot()


def beside(pictures: Sequence[bytes]) -> Image.Image:
    both = Image.new("RGB", (sum(WIDTHS.values()), HEIGHT))
    for i, picture in enumerate(pictures):
        both.paste(Image.open(io.BytesIO(picture)), (sum([*WIDTHS.values()][:i]), 0))
    return both.quantize(256, dither=Image.Dither.NONE)  # half the bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=10.2, help="duration of the load before the picture")
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as url:
        clients = [Client(url, seed) for seed in range(NUM_CLIENTS)]
        try:
            time.sleep(60 * args.minutes)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                beside([photograph(browser, url, scheme) for scheme in WIDTHS]).save(args.out, optimize=True)
                browser.close()
        finally:
            for client in clients:
                client.stop()


if __name__ == "__main__":
    main()
