# SPDX-License-Identifier: Apache-2.0
"""The page of `xgdn serve` in headless Chromium; skipped with a reason where there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import xgdn
import xgdn.server.history
from live_server import (
    GOOD,
    IGNORE_EOS,
    KEY,
    PROMPT,
    SLOTS,
    TEMPLATE,
    continuation,
    engine,
    live,
    live_stepped,
    metrics,
    post,
    single,
    stats,
    tokens_of,
    wait_until,
    with_template,
)
from scripted_engine import live_scripted
from tool_templates import HERMES

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")

expect = sync_api.expect
Page = sync_api.Page

CHATS = "**/v1/chat/completions"
MAX_TOKENS = 24
# What the policy forbids is told to the page, which writes it where Python reads it. And the page asks more often.
PREPARE = """
addEventListener('securitypolicyviolation', (it) => console.error('CSP: ' + it.effectiveDirective), true);
const later = window.setTimeout;
window.setTimeout = (work, milliseconds) => later(work, milliseconds / 5);
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        it = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield it
        it.close()


@contextmanager
def opened(browser: sync_api.Browser, url: str, key: str | None = KEY, **options: Any) -> Iterator[Page]:
    """The page, with a key in its storage. It may neither complain nor ask for something elsewhere."""
    with browser.new_context(**options) as context, context.new_page() as page:
        requested: list[str] = []
        failures: list[str] = []
        page.on("request", lambda request: requested.append(request.url))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("console", lambda message: failures.append(message.text) if message.type == "error" else None)
        page.add_init_script(PREPARE)
        if key is not None:
            page.add_init_script(
                f"sessionStorage.getItem('xgdn.api_key') ?? sessionStorage.setItem('xgdn.api_key', '{key}')"
            )
        page.goto(url)
        yield page
        answers = "Failed to load resource: the server responded"  # an error status, which tests ask for
        failures = [failure for failure in failures if not failure.startswith(answers)]
        assert not failures, "\n".join(failures)
        assert all(address.startswith(url) for address in requested), requested


@pytest.fixture(scope="module")
def chat_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a chat template that shows what it gets, and samples that are soon over."""
    folder = with_template(tmp_path_factory.mktemp("page"))
    thinking = "{%- if enable_thinking is defined %}# thinking: {{ enable_thinking }}{% endif %}"
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").write_text(TEMPLATE + thinking)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xgdn.server.metrics.History", partial(xgdn.server.history.History, seconds=0.2))
        with live(engine(), folder) as url:
            yield url


@pytest.fixture
def page(browser: sync_api.Browser, chat_url: str) -> Iterator[Page]:
    with opened(browser, chat_url) as it:
        expect(it.locator("#model")).to_have_text("tiny")
        it.locator("#settings").evaluate("it => it.open = true")
        it.fill("#temperature", "0")
        it.fill("#max_tokens", str(MAX_TOKENS))
        yield it


def say(page: Page, text: str) -> None:
    page.fill("#prompt", text)
    page.click("#send")


def answer(page: Page, text: str) -> str:
    """What the model says to it."""
    say(page, text)
    expect(page.locator(".message").last.locator(".note")).to_be_visible()
    expect(page.locator("#error")).to_be_empty()
    return str(page.locator(".message .text").last.text_content())


def reply(prompt: str) -> str:
    """What the engine itself goes on with, without a special token at the end."""
    ids = tokens_of(prompt)
    (result,) = single().generate([ids], max_new_tokens=MAX_TOKENS)
    is_cut = result.finish_reason == xgdn.FinishReason.LENGTH
    return continuation(ids, list(result.tokens if is_cut else result.tokens[:-1]))


def test_the_key_is_asked_for_and_kept_in_the_tab(browser: sync_api.Browser, chat_url: str) -> None:
    with opened(browser, chat_url, key=None) as page:
        expect(page.locator("#state")).to_have_text("an API key is needed")
        expect(page.get_by_label("API key of this server")).to_be_focused()
        expect(page.locator("#key_error")).to_be_empty()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key_error")).to_contain_text("API key")
        expect(page.locator("#running")).to_have_text("-")
        say(page, PROMPT)
        expect(page.locator("#error")).to_contain_text("API key")
        expect(page.locator("#prompt")).to_have_value(PROMPT)
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#state")).to_have_text("serving")
        expect(page.locator("#key_form")).to_be_hidden()
        expect(page.locator("#slots")).to_have_text(f"0 / {SLOTS}")
        page.reload()
        expect(page.locator("#state")).to_have_text("serving")
        expect(page.locator("#key_form")).to_be_hidden()
        assert page.evaluate("localStorage.length") == 0


def test_a_server_without_a_key_asks_for_none(browser: sync_api.Browser) -> None:
    with live(engine(), api_keys=[]) as url, opened(browser, url, key=None) as page:
        expect(page.locator("#state")).to_have_text("serving")
        expect(page.locator("#key_form")).to_be_hidden()
        expect(page.locator("#change_key")).to_be_hidden()


def test_two_turns_go_through_the_template(page: Page) -> None:
    expect(page.locator("#no_template")).to_be_hidden()
    page.fill("#system", "Be brief.")
    page.select_option("#thinking", "false")
    first_prompt = f"# system: Be brief.\n# user: {PROMPT}\n# assistant:"
    first = reply(first_prompt + "# thinking: False")
    assert answer(page, PROMPT) == first
    page.select_option("#thinking", "")
    second = reply(f"{first_prompt.removesuffix('# assistant:')}# assistant: {first}\n# user: return\n# assistant:")
    assert answer(page, "return") == second
    assert [it.inner_text() for it in page.locator(".message h3").all()] == ["You", "tiny"] * 2

    page.click("#new_chat")
    expect(page.locator(".message")).to_have_count(0)
    page.fill("#system", "")
    assert answer(page, "return") == reply("# user: return\n# assistant:")


def test_without_a_template_the_text_is_continued(browser: sync_api.Browser) -> None:
    with live(engine()) as url, opened(browser, url) as page:
        expect(page.locator("#no_template")).to_be_visible()
        page.locator("#settings > summary").click()
        expect(page.locator("#system")).to_be_hidden()
        page.fill("#temperature", "0")
        page.fill("#max_tokens", str(MAX_TOKENS))
        first = reply(PROMPT)
        assert answer(page, PROMPT) == first
        second = reply(f"{PROMPT}{first}\n\nclass A")
        assert answer(page, "\n\nclass A") == second


def test_the_keyboard_sends_and_stops(browser: sync_api.Browser) -> None:
    with live_stepped() as (stepped, url), opened(browser, url) as page:
        expect(page.locator("#model")).to_have_text("tiny")
        page.focus("#prompt")
        page.keyboard.type("def")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("a")
        assert page.input_value("#prompt") == "def\na"
        page.keyboard.press("Enter")
        stepped.allow(20)
        expect(page.locator("#slots")).to_have_text(f"1 / {SLOTS}")
        expect(page.locator(".message .text").last).not_to_be_empty()
        page.keyboard.press("Escape")
        wait_until(lambda: metrics(url).get("xgdn_finished_total cancelled") == 1)
        stepped.open()
        expect(page.locator("#slots")).to_have_text(f"0 / {SLOTS}")
        expect(page.locator(".note")).to_have_text("stopped")
        expect(page.locator("#error")).to_be_empty()
        expect(page.locator("#send")).to_be_enabled()


def test_stop_and_a_new_chat_end_the_request(browser: sync_api.Browser) -> None:
    with live_stepped() as (stepped, url), opened(browser, url) as page:
        expect(page.locator("#model")).to_have_text("tiny")
        for i, button in enumerate(("#stop", "#new_chat")):
            say(page, PROMPT)
            wait_until(lambda: stats(url)["num_requests"] == 1)
            page.click(button)
            wait_until(lambda i=i: metrics(url).get("xgdn_finished_total cancelled") == i + 1)  # type: ignore[misc]
            stepped.allow(1)
            wait_until(lambda: stats(url)["num_requests"] == 0)
            expect(page.locator("#stop")).to_be_disabled()
            expect(page.locator("#error")).to_be_empty()
        expect(page.locator(".message")).to_have_count(0)


def test_an_error_in_a_stream_is_shown(browser: sync_api.Browser) -> None:
    with live_stepped() as (stepped, url), opened(browser, url) as page:
        expect(page.locator("#model")).to_have_text("tiny")
        say(page, PROMPT)
        stepped.allow(5)
        expect(page.locator(".message .text").last).not_to_be_empty()
        stepped.failures = 1
        stepped.open()
        expect(page.locator("#error")).to_contain_text("the step broke")
        expect(page.locator(".message.failed")).to_have_count(2)
        expect(page.locator("#prompt")).to_have_value(PROMPT)


def test_a_refusal_is_shown(page: Page) -> None:
    page.fill("#max_tokens", "5000")
    say(page, PROMPT)
    expect(page.locator("#error")).to_contain_text("maximum context length")


def events(*deltas: dict[str, Any], end: str = "data: [DONE]\n\n") -> str:
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    return ": keep-alive\n\n" + "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end


def give(page: Page, body: str) -> None:
    page.route(CHATS, lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body))


def test_reasoning_and_calls_are_shown_as_text(page: Page) -> None:
    html = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    called = [{"name": "weather", "arguments": '{"city"'}, {"arguments": ': "<b>Köln</b>"}'}]
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"reasoning_content": "Let me "}, {"reasoning_content": html}, {"content": html}, {"content": " done"}]
    deltas += [{"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": it}]} for it in called]
    give(page, events(*deltas))
    assert answer(page, PROMPT) == f"{html} done"
    reasoning = page.locator(".reasoning div")
    expect(reasoning).to_be_hidden()
    page.get_by_text("Reasoning").click()
    expect(reasoning).to_be_visible()
    assert reasoning.inner_text() == f"Let me {html}"
    assert page.locator(".call figcaption").inner_text() == "Tool call: weather"
    assert page.locator(".call pre").inner_text() == '{"city": "<b>Köln</b>"}'
    assert page.locator("#messages img, #messages script, #messages b").count() == 0


def test_a_thought_of_the_model_is_folded(browser: sync_api.Browser, tmp_path: Path) -> None:
    with live_scripted(tmp_path, HERMES) as (scripted, url), opened(browser, url) as page:
        expect(page.locator("#model")).to_have_text("tiny")
        page.locator("#settings > summary").click()
        page.select_option("#thinking", "true")
        scripted.replies = ["Hm.\n</think>\n\nHello"]
        assert answer(page, PROMPT) == "Hello"
        assert scripted.prompts[-1].endswith("<think>\n")
        assert page.locator(".reasoning div").text_content() == "Hm."
        expect(page.locator(".reasoning div")).to_be_hidden()


def test_a_stream_that_breaks_off_is_no_answer(page: Page) -> None:
    give(page, events({"content": "half"}, end=""))
    say(page, PROMPT)
    expect(page.locator("#error")).to_have_text("The connection ended before the answer did.")


def test_a_stopped_engine_is_shown(browser: sync_api.Browser) -> None:
    with live_stepped() as (stepped, url), opened(browser, url) as page:
        stepped.open()
        expect(page.locator("#state")).to_have_text("serving")
        expect(page.locator("#stopped")).to_be_empty()
        stepped.device_error = "npu:0 broke"
        assert post(url, GOOD).status_code == 500
        expect(page.locator("#stopped")).to_contain_text("npu:0 broke")
        expect(page.locator("#state")).to_have_text("stopped")


def test_requests_of_others_are_shown_without_their_text(browser: sync_api.Browser) -> None:
    prompt = tokens_of("def secret(self):\n" * 12)
    with (
        ThreadPoolExecutor(1) as clients,
        live_stepped() as (stepped, url),
        opened(browser, url) as page,
    ):
        expect(page.locator("#requests tbody")).to_have_text("none")
        asked = clients.submit(post, url, GOOD | IGNORE_EOS | {"prompt": prompt, "n": 2, "max_tokens": 5})
        row = page.locator("#requests tbody tr")
        expect(row).to_have_attribute("data-state", "waiting")
        stepped.allow(1)
        expect(row).to_contain_text(f"prefill 64 of {len(prompt)}")
        assert row.locator("progress").evaluate("it => it.value / it.max") == 64 / len(prompt)
        stepped.allow(1 + len(prompt) // 64)
        expect(row).to_contain_text("decoding")
        request_id, state, num_prompt, num_tokens, choices, _ = row.locator("td").all_inner_texts()
        assert (state, num_prompt, choices) == ("decoding", str(len(prompt)), "2")
        assert int(request_id) == stats(url)["requests"][0]["id"]
        assert int(num_tokens) == stats(url)["requests"][0]["generated_tokens"] > 0
        assert "secret" not in page.content()
        stepped.open()
        assert asked.result().status_code == 200
        expect(page.locator("#requests tbody")).to_have_text("none")


def test_a_long_queue_is_cut(page: Page) -> None:
    page.route("**/stats", lambda route: route.fulfill(json={**route.fetch().json(), "num_requests": 1070}))
    expect(page.locator("#more_requests")).to_have_text("1,070 younger ones are not shown.")


def shown(page: Page) -> dict[str, dict[str, Any]]:
    """By chart: the time at its cursor and the values there, as numbers and as text."""
    figures: dict[str, dict[str, Any]] = page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll("figure.card")].map((it) => [it.dataset.chart, {
            time: Number(it.dataset.time),
            values: [...it.querySelectorAll("data")].map((value) => value.value === "" ? null : Number(value.value)),
            readout: it.querySelector(".readout").innerText.split(/\\s*\\n\\s*/),
            text: it.querySelector("svg").getAttribute("aria-valuetext"),
            curves: it.querySelectorAll(".curve").length,
        }]))"""
    )
    return figures


def series_of(chart: str) -> list[str]:
    stem = chart.removesuffix("_p50")
    return [f"{stem}_p50", f"{stem}_p95"] if stem != chart else [chart]


def test_the_charts_show_the_history(page: Page, chat_url: str) -> None:
    answer(page, PROMPT)
    begin = stats(chat_url)["time"]
    expect(page.locator("figure.card")).to_have_count(9)
    wait_until(lambda: stats(chat_url, f"/stats/history?since={begin}")["samples"] != [])
    page.wait_for_function("(begin) => document.querySelector('figure.card').dataset.time > begin", arg=begin)
    samples = stats(chat_url, "/stats/history")["samples"]
    by_time = {sample["time"]: sample for sample in samples}
    # The latest one with tokens.
    busy = max(sample["time"] for sample in samples if sample["generated_tokens_per_second"] > 0)

    charts = page.locator("figure.card svg")
    charts.first.focus()
    page.keyboard.press("ArrowLeft")
    for _ in range(2 * len(samples)):  # a sample that comes meanwhile moves the others
        time = shown(page)["generated_tokens_per_second"]["time"]
        if time == busy:
            break
        page.keyboard.press("ArrowLeft" if time > busy else "ArrowRight")
    at_cursor = shown(page)
    assert len(at_cursor) == 9
    for chart, figure in at_cursor.items():
        assert figure["time"] == busy, chart
        assert figure["values"] == [by_time[busy][name] for name in series_of(chart)], chart
        assert figure["curves"] >= 1
        for part in figure["readout"]:
            assert part in figure["text"]
    rate = by_time[busy]["generated_tokens_per_second"]
    assert at_cursor["generated_tokens_per_second"]["readout"] == [f"{rate:,.0f}/s"]
    assert at_cursor["requests_running"]["readout"] == ["1"]
    milliseconds = 1e3 * by_time[busy]["inter_token_p95"]
    (said,) = [it for it in at_cursor["inter_token_p50"]["readout"] if it.startswith("p95")]
    assert float(said.split()[1]) == pytest.approx(milliseconds, rel=0.01)
    assert said.endswith(" ms")

    page.keyboard.press("Home")
    assert shown(page)["slots_used"]["time"] == samples[0]["time"]
    page.keyboard.press("ArrowRight")
    assert shown(page)["slots_used"]["time"] == samples[1]["time"]
    page.keyboard.press("Escape")
    assert all(figure["time"] > begin for figure in shown(page).values())
    box = charts.nth(4).bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 50, box["y"] + 40)  # left of all samples: the oldest is the nearest
    assert {figure["time"] for figure in shown(page).values()} == {samples[0]["time"]}
    page.mouse.move(0, 0)
    assert all(figure["time"] > begin for figure in shown(page).values())


def test_axes_have_units(page: Page) -> None:
    answer(page, PROMPT)
    page.wait_for_function("document.querySelectorAll('figure.card text').length >= 54")
    labels = {
        it.get_attribute("data-chart"): it.locator("text").all_text_contents()
        for it in page.locator("figure.card").all()
    }
    for texts in labels.values():
        assert texts[3:6] == ["-1 min", "-0.5 min", "now"]
    assert all(text.endswith("/s") for text in labels["generated_tokens_per_second"][:3])
    assert all(text.endswith("s") for text in labels["time_to_first_token_p50"][:3])
    assert labels["cached_prefix_share"][:3] == ["0%", "50%", "100%"]
    assert labels["slots_used"][:3] == ["0", f"{SLOTS // 2}", f"{SLOTS}"]


CONTRASTS = """() => {
    const channels = (text) => text.match(/[\\d.]+/g).map(Number);
    const luminance = (text) => {
        const linear = (it) => it <= 0.04045 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = channels(text).map((it) => linear(it / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (it) => {
        const colour = getComputedStyle(it).backgroundColor;
        return channels(colour)[3] === 0 ? ground(it.parentElement) : colour;
    };
    const contrast = (it, property) => {
        const [low, high] = [luminance(getComputedStyle(it)[property]), luminance(ground(it))].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    };
    const texts = "h1, h2, p, dt, dd, label, button:enabled, .text, .note, th, td, .readout *, summary, #state";
    const seen = [...document.querySelectorAll(texts)].filter((it) => it.checkVisibility());
    const labels = [...document.querySelectorAll("figure.card text")];
    return {
        ground: luminance(ground(document.body)),
        lowest: Math.min(...seen.map((it) => contrast(it, "color")), ...labels.map((it) => contrast(it, "fill"))),
    };
}"""


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "dark")])
def test_it_fits_a_phone_and_the_dark(browser: sync_api.Browser, chat_url: str, width: int, scheme: Any) -> None:
    options = {"color_scheme": scheme, "viewport": {"width": width, "height": 740}}
    with opened(browser, chat_url, **options) as page:
        expect(page.locator("#model")).to_have_text("tiny")
        page.locator("#settings > summary").click()
        give(page, events({"content": "long" * 200}, {"reasoning_content": "deep" * 200}))
        answer(page, "word" * 200)
        page.get_by_text("Reasoning").click()
        page.wait_for_function("document.querySelectorAll('figure.card text').length >= 54")
        page.click("#change_key")
        wide = """() => [...document.querySelectorAll("body *")]
            .filter((it) => it.getBoundingClientRect().right > innerWidth + 0.5 && !it.closest(".scrolls"))
            .map((it) => it.outerHTML)"""
        assert page.evaluate(wide) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#messages").evaluate("it => it.scrollWidth - it.clientWidth") == 0
        contrasts = page.evaluate(CONTRASTS)
        assert (contrasts["ground"] < 0.05) == (scheme == "dark")
        assert contrasts["lowest"] >= 4.5


def test_everything_has_a_name_and_a_place_in_the_order(page: Page) -> None:
    names = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, [tabindex]")].map((it) =>
            it.getAttribute("aria-label") || it.labels?.[0]?.textContent || it.textContent.trim())"""
    )
    assert len(names) >= 20
    assert all(names), names
    page.focus("#new_chat")
    visited = []
    for _ in range(19):
        page.keyboard.press("Tab")
        visited.append(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label')"))
    assert visited[:3] == ["messages", "prompt", "send"]
    assert {"temperature", "top_p", "max_tokens", "thinking", "system", "KV blocks, the last ten minutes"} <= set(
        visited
    )


def test_the_policy_holds_and_its_violations_are_seen(browser: sync_api.Browser, chat_url: str) -> None:
    attempts = {
        "script-src-elem": "document.head.append(Object.assign(document.createElement('script'), {textContent: '1'}))",
        "img-src": "document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:1/a.png'}))",
        "connect-src": "fetch('http://127.0.0.1:1/').catch(() => 0)",
        "style-src-attr": "document.body.setAttribute('style', 'color: red')",
    }

    def violate() -> None:
        with opened(browser, chat_url) as page:
            for directive, attempt in attempts.items():
                with page.expect_console_message(lambda it, directive=directive: it.text == f"CSP: {directive}"):
                    page.evaluate(attempt)

    with pytest.raises(AssertionError) as caught:
        violate()
    assert all(f"CSP: {directive}" in str(caught.value) for directive in attempts)
