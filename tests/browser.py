"""A headless Chromium, driven by its own DevTools protocol over a pipe: no package needed.

with Browser(profile_folder) as browser:
    page = browser.open(path)          # waits until it has loaded
    page.errors, page.requests         # what the console said, what was asked of the network
    browser.evaluate("document.title")
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60.0  # seconds, for any one answer


def find_chromium() -> str | None:
    """The browser of this machine, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Page:
    """What happened while a page was open.

    Attributes:
        errors: uncaught exceptions, errors and warnings of the console, and failed loads, as text.
        requests: every URL that was asked for, the page's own first.
    """

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


class Browser:
    """One browser with one tab. A context manager; leaving it ends the process.

    Args:
        folder: a new folder for its settings and caches.
    """

    def __init__(self, folder: Path) -> None:
        program = find_chromium()
        assert program is not None, f"none of {', '.join(NAMES)} is installed"
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        flags = [
            "--headless=new",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
            "--no-sandbox",  # which a container's root cannot have
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND",  # whatever a page asks for outside, nobody hears of it
            "--no-first-run",
            "--window-size=1200,900",
        ]
        # The protocol is spoken on descriptors 3 and 4 of the browser.
        redirect = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", redirect, program, *flags],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._last, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []
        self._page = Page()

    def __enter__(self) -> Browser:
        try:
            target = self._call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self._call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open(self, path: Path) -> Page:
        """Opens a file; returns once it has loaded and the browser has nothing left to do."""
        self._page = page = Page()
        self._events.clear()
        self._call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._note(self._receive()))
        self.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
        return page

    def evaluate(self, code: str) -> Any:
        """The value of JavaScript code in the page, a promise's once it is kept."""
        done = self._call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": arguments}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._events.append(self._note(answer))

    def _receive(self) -> dict[str, Any]:
        """The next message."""
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser said nothing for {PATIENCE:.0f} s"
            piece = os.read(self._in, 1 << 16)
            assert piece, "the browser ended"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> dict[str, Any]:
        """Writes down what an event says about the page."""
        page, values = self._page, event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                page.errors.append(str(values["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if values["type"] in ("error", "warning", "assert"):
                page.errors.append(str(values["args"]))
            case "Log.entryAdded" if values["entry"]["level"] in ("error", "warning"):
                page.errors.append(str(values["entry"]))
            case "Network.loadingFailed":
                page.errors.append(str(values))
            case "Network.requestWillBeSent":
                page.requests.append(values["request"]["url"])
        return event
