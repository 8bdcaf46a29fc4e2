# SPDX-License-Identifier: Apache-2.0
"""The page of `xgdn serve` in headless Chromium; skipped with a reason where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

import xgdn
from live_server import (
    GOOD,
    KEY,
    PROMPT,
    SLOTS,
    TOKENIZER,
    engine,
    live,
    live_stepped,
    metrics,
    post,
    single,
    wait_until,
)

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        it = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield it
        it.close()


@pytest.fixture(scope="module")
def page(browser: sync_api.Browser) -> Iterator[sync_api.Page]:
    """Fails the test that made the page complain or ask for something elsewhere."""
    with live(engine()) as url:
        it = browser.new_page()
        requested: list[str] = []
        failures: list[str] = []
        it.on("request", lambda request: requested.append(request.url))
        it.on("pageerror", lambda error: failures.append(str(error)))
        it.goto(url)
        yield it
        it.close()
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


def test_stop_ends_the_request(browser: sync_api.Browser) -> None:
    with live_stepped() as (stepped, url), browser.new_page() as page:
        page.goto(url)
        page.fill("#key", KEY)
        page.fill("#prompt", PROMPT)
        page.click("#send")
        stepped.allow(20)
        sync_api.expect(page.locator("#slots")).to_have_text(f"1 / {SLOTS}")
        sync_api.expect(page.locator("#output")).not_to_be_empty()
        page.click("#stop")
        wait_until(lambda: metrics(url).get("xgdn_finished_total cancelled") == 1)
        stepped.open()
        sync_api.expect(page.locator("#slots")).to_have_text(f"0 / {SLOTS}")
        sync_api.expect(page.locator("#error")).to_be_empty()


def test_a_stopped_engine_is_shown(browser: sync_api.Browser) -> None:
    with live_stepped() as (stepped, url), browser.new_page() as page:
        stepped.open()
        page.goto(url)
        sync_api.expect(page.locator("#model")).to_have_text("tiny")
        sync_api.expect(page.locator("#stopped")).to_be_empty()
        stepped.device_error = "npu:0 broke"
        assert post(url, GOOD).status_code == 500
        sync_api.expect(page.locator("#stopped")).to_contain_text("npu:0 broke")
