"""The page in a headless Chromium: what a person does there, and that the browser has nothing to complain of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

pytest.importorskip("websockets", reason="the extra 'browser' is not installed")
from chromium import Chromium, find_chromium, running_chromium
from page_server import KEY, Served

PROGRAM = find_chromium()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        PROGRAM is None, reason="Chromium is not installed: apt-get install chromium-headless-shell"
    ),
]
LIVE = "document.querySelector('#connection').textContent === 'live'"
ANSWER = "document.querySelector('.turn:last-child p').textContent"
USED = "Number(document.querySelector('#count-used').textContent)"


@pytest.fixture
def browser() -> Iterator[Chromium]:
    """After the test nothing may have been complained of, and nothing been fetched from elsewhere."""
    assert PROGRAM is not None
    with running_chromium(PROGRAM) as browser:
        yield browser
        browser.evaluate("1")  # whatever the browser had to say until now is read
        assert browser.problems == []
        hosts = {re.sub(r"^(\w+://[^/]*).*", r"\1", address) for address in browser.addresses}
        assert len(hosts) == 1, hosts


def choose(browser: Chromium, selector: str, value: str) -> None:
    browser.evaluate(f"void (document.querySelector({selector!r}).value = {value!r})")


def fake_stream(browser: Chromium, *deltas: str) -> None:
    """The next answer is made of these."""
    events = [{"choices": [{"index": 0, "delta": {"content": delta}}]} for delta in deltas]
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    browser.evaluate(
        "(() => { const real = window.fetch; window.fetch = (path, options) => path.startsWith('v1/')"
        f" ? Promise.resolve(new Response({json.dumps(text)})) : real(path, options); }})()"
    )


def test_a_stream_grows_takes_blocks_and_gives_them_back_when_it_is_stopped(
    browser: Chromium, guarded: Served
) -> None:
    browser.open(guarded.address)
    browser.wait_for("!document.querySelector('#key-form').hidden")
    browser.click("#key")
    browser.type(KEY)
    browser.press("Enter")
    browser.wait_for(LIVE)
    assert browser.evaluate(USED) == 0
    choose(browser, "#mode", "completion")
    choose(browser, "#temperature", "0")
    choose(browser, "#max-tokens", "400")
    browser.click("#prompt")
    browser.type("The block pool hands out blocks, and the prefix index finds them again.")
    browser.press("Enter")

    length = browser.wait_for(f"document.querySelector('.turn.live') && {ANSWER}.length")
    browser.wait_for(f"{ANSWER}.length > {length + 20}")
    browser.wait_for(f"{USED} > 2")
    assert browser.text("#running") == "1"
    browser.point_at("#maps canvas", 5, 5)
    held = browser.wait_for(
        "document.querySelector('#block-details').textContent.match(/Block 1: used.*/)?.[0]"
    )
    assert re.search(r"1 reference, 16 of 16 tokens.*; \S+ \(choice 0\)", held)
    assert "running" in browser.text("#sequences")
    browser.wait_for("Number(document.querySelector('#rate').textContent) > 0")

    browser.click("#stop")
    browser.wait_for(f"{USED} === 0")
    browser.wait_for("document.querySelector('#running').textContent === '0'")
    browser.wait_for("document.querySelector('#usage').textContent.startsWith('stopped')")
    browser.point_at("#maps canvas", 6, 6)
    browser.wait_for("/Block 1: (free|cached)$/.test(document.querySelector('#block-details').textContent)")
    counts = [int(browser.text(f"#count-{state}")) for state in ("cached", "free")]
    assert sum(counts) == 200
    assert counts[0] > 0, "full blocks of the prompt stay findable"
    assert guarded.engine.stats().used_blocks == 0


def test_a_conversation_goes_on_until_a_new_one_is_begun(browser: Chromium, unguarded: Served) -> None:
    browser.open(unguarded.address)
    choose(browser, "#max-tokens", "8")
    for turns in (2, 4):
        browser.click("#prompt")
        browser.type("Grüße aus Köln, naïve café. " * 4)
        browser.click("#send")
        browser.wait_for(
            f"document.querySelectorAll('.turn').length === {turns} && !document.querySelector('.turn.live')"
        )
        assert "prompt tokens" in browser.text("#usage")
    assert "from cached blocks" in browser.text("#usage")
    browser.click("#clear")
    assert browser.evaluate("document.querySelectorAll('.turn').length") == 0


def test_what_a_model_writes_is_shown_as_text_and_never_run(browser: Chromium, unguarded: Served) -> None:
    text = "<img src=x onerror='window.hit=1'><script>window.hit=1</script>"
    browser.open(unguarded.address)
    fake_stream(browser, text[:20], text[20:])
    browser.click("#prompt")
    browser.type("<b id=bold>hello</b>")
    browser.press("Enter")
    browser.wait_for(f"{ANSWER} === {json.dumps(text)}")
    assert browser.evaluate("document.querySelector('#transcript img, #transcript script, #bold')") is None
    assert browser.evaluate("window.hit") is None


def test_every_control_has_a_name_for_those_who_do_not_see_it(browser: Chromium, unguarded: Served) -> None:
    browser.open(unguarded.address)
    browser.wait_for(LIVE)
    nodes = browser.command("Accessibility.getFullAXTree")["nodes"]
    named = {
        "button",
        "textbox",
        "combobox",
        "spinbutton",
        "application",
        "image",
        "log",
        "DisclosureTriangle",
    }
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in named
    ]
    assert {"button", "textbox", "spinbutton", "application"} <= {role for role, _ in found}
    assert [role for role, name in found if not name.strip()] == []


def test_blocks_are_reached_with_the_keyboard(browser: Chromium, unguarded: Served) -> None:
    browser.open(unguarded.address)
    browser.wait_for(LIVE)
    browser.evaluate("document.querySelector('#maps canvas').focus()")
    assert browser.text("#block-details").startswith("Block 1: ")
    browser.press("ArrowRight")
    assert browser.text("#block-details").startswith("Block 2: ")
    browser.press("End")
    assert browser.text("#block-details").startswith("Block 200: ")


def test_the_plan_says_why(browser: Chromium, unguarded: Served) -> None:
    browser.open(unguarded.address)
    browser.click("#plan summary")
    browser.wait_for("document.querySelectorAll('#plan tbody tr').length")
    assert "num_kv_blocks=200 given" in browser.text("#plan tbody")


def test_the_policy_is_kept_and_a_breach_is_noticed(browser: Chromium, unguarded: Served) -> None:
    browser.open(unguarded.address)
    browser.wait_for(LIVE)
    assert browser.problems == []
    browser.evaluate("document.body.setAttribute('style', 'color: red')")
    browser.wait_for("getComputedStyle(document.body).color !== 'rgb(255, 0, 0)'")
    assert any("Content Security Policy" in problem for problem in browser.problems)
    browser.problems.clear()
