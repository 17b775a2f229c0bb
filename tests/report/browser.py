"""A headless Chromium that tests drive over the DevTools protocol, through two pipes."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
DEADLINE_S = 90.0


def chromium() -> str | None:
    """Return the path of a Chromium, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a browser.

    Everything that a page complains of is in `complaints`: errors and warnings on its console, exceptions, requests
    that failed.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", commands: int, answers: int) -> None:
        self._process, self._commands, self._answers = process, commands, answers
        self._number, self._session, self._received = 0, "", b""
        self._events: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        self.requested: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + DEADLINE_S
        while True:
            answer = self._receive(end)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])

    def open(self, url: str) -> None:
        """Load a page and wait until it has been drawn."""
        self._events.clear()
        self.send("Page.navigate", url=url)
        end = time.monotonic() + DEADLINE_S
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive(end)
        self.settle()

    def settle(self) -> None:
        """Wait until what was asked for is on the screen."""
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def value(self, expression: str) -> Any:
        """Return what JavaScript evaluates to; a promise is awaited."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until JavaScript evaluates to something true."""
        end = time.monotonic() + DEADLINE_S
        while not self.value(expression):
            assert time.monotonic() < end, f"it never came true: {expression}"
            time.sleep(0.1)

    def resize(self, width: int, height: int, *, is_dark: bool = False) -> None:
        """Show the page in a window of this size, in light or dark colours."""
        colours = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[colours])
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.settle()

    def screenshot(self, path: Path, *, is_whole: bool = True) -> None:
        """Write a PNG of the page, or of what the window shows."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=is_whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path: Path) -> None:
        """Print the page to a PDF of A4."""
        printed = self.send("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)
        path.write_bytes(base64.b64decode(printed["data"]))

    def _receive(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            left = end - time.monotonic()
            assert left > 0, "the browser does not answer"
            assert self._process.poll() is None, "the browser has ended"
            if select.select([self._answers], [], [], min(left, 1.0))[0]:
                self._received += os.read(self._answers, 1 << 20)
        text, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._events.append(message)
            self._hear(message["method"], message["params"])
        return message

    def _hear(self, method: str, told: dict[str, Any]) -> None:
        match method:
            case "Runtime.exceptionThrown":
                details = told["exceptionDetails"]
                self.complaints.append(details.get("exception", {}).get("description") or details["text"])
            case "Runtime.consoleAPICalled" if told["type"] in ("error", "warning", "assert"):
                self.complaints.append(" ".join(str(part.get("value", part)) for part in told["args"]))
            case "Log.entryAdded" if told["entry"]["level"] in ("error", "warning"):
                self.complaints.append(told["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requested.append(told["request"]["url"])


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """Run a browser with a profile of its own; it is gone at the end."""
    path = chromium()
    assert path is not None, "there is no Chromium"
    to_browser, commands = os.pipe()
    answers, from_browser = os.pipe()
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
        *("--remote-debugging-pipe", f"--user-data-dir={profile}"),
    ]

    def place() -> None:  # the browser reads commands from 3 and answers on 4
        os.dup2(os.dup(to_browser), 3)
        os.dup2(os.dup(from_browser), 4)

    process = subprocess.Popen(
        [path, *flags],
        preexec_fn=place,
        pass_fds=(3, 4, to_browser, from_browser),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Browser(process, commands, answers)
    finally:
        os.close(commands)  # at which it ends by itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait(10)
        os.close(answers)
