"""Takes the picture of the page that the documentation shows.

PYTHONPATH=tests python tests/browser/take_screenshot.py docs/server/page.png
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path

from chromium import find_chromium, running_chromium
from page_server import Brake, serving

from kvpage import AsyncEngine, SamplingParams

ENDED = ("What is a block table?", "What is a KV cache?", "What is preemption?", "What is chunked prefill?")
MEANWHILE = (
    "A block table is a list of block numbers, one list per sequence. Entry i says which physical block holds the "
    "tokens from i * block_size on. Sequences can share blocks by listing the same number",
    "Continuous batching lets a request join the batch at any step and leave it as soon as it ends, so that",
)
SHORT = SamplingParams(max_tokens=40, temperature=0.0)
LONG = SamplingParams(max_tokens=400, ignore_eos=True, n=3, seed=2)
LIVE = "document.querySelector('#connection').textContent === 'live'"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="the PNG to write")
    parser.add_argument("--dark", action="store_true", help="the dark colours")
    arguments = parser.parse_args()
    program = find_chromium()
    if program is None:
        parser.error("Chromium is not installed: apt-get install chromium-headless-shell")
    with contextlib.closing(AsyncEngine("demo", num_kv_blocks=396)) as engine:
        engine._worker.core.listeners.add(Brake(0.03))
        with serving(engine, "demo") as served, running_chromium(program, dark=arguments.dark) as browser:
            browser.open(served.address)
            browser.wait_for(LIVE)
            ended = [engine.chat([{"role": "user", "content": question}], SHORT) for question in ENDED]
            while not all(handle.done for handle in ended):
                time.sleep(0.05)
            for text in MEANWHILE:
                engine.generate(text, LONG)
            browser.click("#prompt")
            browser.type("What is paged attention?")
            browser.press("Enter")
            browser.wait_for("document.querySelector('.turn') && !document.querySelector('.turn.live')")
            browser.click("#prompt")
            browser.type("What is copy on write?")
            browser.press("Enter")
            browser.wait_for("(document.querySelector('.turn.live p')?.textContent.length ?? 0) > 60")
            browser.wait_for("Number(document.querySelector('#count-shared').textContent) > 0")
            browser.evaluate("window.scrollTo(0, 0)")
            browser.screenshot(arguments.path)


if __name__ == "__main__":
    main()
