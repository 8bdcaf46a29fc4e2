# SPDX-License-Identifier: Apache-2.0
"""The page of `xgdn serve` in headless Chromium; skipped with a reason where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

import xgdn
from live_server import KEY, PROMPT, SLOTS, TOKENIZER, TOKENS, engine, live, single

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


@pytest.fixture(scope="module")
def page() -> Iterator[sync_api.Page]:
    """Fails the test that made the page complain or ask for something elsewhere."""
    with live(engine()) as url, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        it = browser.new_page()
        requested: list[str] = []
        failures: list[str] = []
        it.on("request", lambda request: requested.append(request.url))
        it.on("pageerror", lambda error: failures.append(str(error)))
        it.goto(url)
        yield it
        browser.close()
        assert failures == []
        assert all(address.startswith((url, "data:")) for address in requested), requested


def test_the_page_shows_the_engine(page: sync_api.Page) -> None:
    sync_api.expect(page.locator("#model")).to_have_text("tiny")
    sync_api.expect(page.locator("#slots")).to_have_text(f"0 / {SLOTS}")
    sync_api.expect(page.locator("#rate")).to_have_text("0.0")


def test_a_wrong_key_is_said(page: sync_api.Page) -> None:
    page.fill("#key", "wrong")
    page.click("#send")
    sync_api.expect(page.locator("#error")).to_contain_text("API key")


def test_a_typed_prompt_gives_its_text(page: sync_api.Page) -> None:
    page.fill("#key", KEY)
    page.fill("#prompt", PROMPT)
    page.fill("#max_tokens", "24")
    page.click("#send")
    sync_api.expect(page.locator("#send")).to_be_enabled()
    sync_api.expect(page.locator("#error")).to_be_empty()
    (result,) = single().generate([TOKENIZER.encode(PROMPT).ids], max_new_tokens=24)
    ends_with_text = result.finish_reason == xgdn.FinishReason.LENGTH
    assert page.inner_text("#output") == TOKENIZER.decode(result.tokens if ends_with_text else result.tokens[:-1])


def test_stop_ends_the_request(page: sync_api.Page) -> None:
    page.fill("#key", KEY)
    page.fill("#temperature", "1.5")  # too hot to come to an end
    page.fill("#max_tokens", str(TOKENS - 50))
    page.click("#send")
    sync_api.expect(page.locator("#slots")).to_have_text(f"1 / {SLOTS}")
    sync_api.expect(page.locator("#output")).not_to_be_empty()
    page.click("#stop")
    sync_api.expect(page.locator("#slots")).to_have_text(f"0 / {SLOTS}")
    sync_api.expect(page.locator("#error")).to_be_empty()
