"""A headless Chromium, driven through its DevTools protocol: what the page's tests and its screenshot need of it."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--remote-debugging-port=0", "--disable-gpu", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--mute-audio",
)  # fmt: skip
KEYS = {"Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
        "ArrowDown": 40, "Tab": 9}  # fmt: skip


def find_chromium() -> str | None:
    """The path of an installed Chromium."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@contextmanager
def running_chromium(
    program: str, *, width: int = 1280, height: int = 900, dark: bool = False
) -> Iterator[Chromium]:
    """A browser process with one empty page, until the block ends."""
    # Chromium's sandbox refuses to run as root, which is what containers and CI are.
    rights = ("--no-sandbox",) if os.geteuid() == 0 else ()
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="kvpage-browser-", ignore_cleanup_errors=True))
        log = stack.enter_context(open(Path(folder) / "log", "w+", encoding="utf-8", errors="replace"))
        process = subprocess.Popen(
            [program, *FLAGS, *rights, f"--user-data-dir={folder}", "about:blank"],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        stack.callback(_end, process)
        address = _listening(process, Path(log.name))
        socket = stack.enter_context(connect(address, max_size=64 * 2**20, compression=None, proxy=None))
        browser = Chromium(socket)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.command("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.command("Emulation.setEmulatedMedia", features=[scheme])
        try:
            yield browser
        finally:
            with suppress(ConnectionClosed):
                browser.command("Browser.close")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Where the browser was not told to close, its whole group is ended: Debian's program is a script around it."""
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _listening(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        text = log.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"DevTools listening on (ws://\S+)\n", text):
            return found.group(1)
        time.sleep(0.02)
    raise RuntimeError(f"Chromium does not listen:\n{log.read_text(encoding='utf-8', errors='replace')}")


class Chromium:
    """One page of a running browser.

    Attributes:
        problems: errors and warnings of the console, exceptions, violations of the content security policy.
        addresses: what the page asked for, in order.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self.problems: list[str] = []
        self.addresses: list[str] = []
        self._numbers = itertools.count(1)
        self._socket, self._session = socket, ""
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.command(f"{domain}.enable")

    # ---- the protocol -----------------------------------------------------------------------------------

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its result; events that come meanwhile are noted."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while True:
            answer = json.loads(self._socket.recv(timeout=30))
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            if "method" in answer:
                self._note(answer["method"], answer["params"])

    def _note(self, event: str, values: dict[str, Any]) -> None:
        if event == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(part.get("value", "")) for part in values["args"]))
        elif event == "Runtime.exceptionThrown":
            details = values["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{values['entry']['text']} {values['entry'].get('url', '')}")
        elif event == "Audits.issueAdded" and "contentSecurityPolicy" in json.dumps(values):
            self.problems.append(json.dumps(values["issue"]))
        elif event == "Network.requestWillBeSent":
            self.addresses.append(values["request"]["url"])

    # ---- what a person does -----------------------------------------------------------------------------

    def open(self, address: str) -> None:
        """Load a page and wait for it."""
        self.command("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; promises are awaited."""
        answer = self.command(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 20.0) -> Any:
        """Until ``expression`` is truthy; its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds} s: {expression}; problems: {self.problems}")
            time.sleep(0.02)
        return value

    def text(self, selector: str) -> str:
        """What an element shows."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))

    def click(self, selector: str) -> None:
        """A click in the middle of an element, with the mouse."""
        box = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.command(
                "Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1
            )

    def point_at(self, selector: str, x: float, y: float) -> None:
        """The mouse, ``x`` and ``y`` pixels inside an element."""
        corner = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'nearest'}});"
            " const b = e.getBoundingClientRect(); return [b.x, b.y]; })()"
        )
        self.command("Input.dispatchMouseEvent", type="mouseMoved", x=corner[0] + x, y=corner[1] + y)

    def type(self, text: str) -> None:
        """Text into whatever has the focus."""
        self.command("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """One key."""
        values = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self.command("Input.dispatchKeyEvent", type="keyDown", **values, **text)
        self.command("Input.dispatchKeyEvent", type="keyUp", **values)

    def screenshot(self, path: Path) -> None:
        """What is seen, as PNG."""
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))
