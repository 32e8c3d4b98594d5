"""Chromium without a window, driven through its DevTools protocol over a pair of pipes."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--no-first-run",
    "--remote-debugging-pipe",
    "about:blank",
)


def find_chromium() -> str | None:
    named = os.environ.get("INSIGHTTAG_TEST_CHROMIUM")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return named or next((path for name in names if (path := shutil.which(name))), None)


class Browser:
    """One page of one browser.

    Attributes:
        complaints: What the page's console has complained of, refused content included.
        requests: Addresses that were asked for, the page's own included.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def open(self, url: str, *, width: int = 1280, height: int = 900) -> None:
        """Open a page; returns at once."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        self.call("Page.navigate", url=url)

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def scheme(self, name: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": name}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str, timeout_s: float = 20) -> Any:
        """Wait until an expression is true; gives its value."""
        end = time.monotonic() + timeout_s
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"not within {timeout_s} s: {script}"
            time.sleep(0.05)
        return value

    def faults(self, rules: Sequence[str] = ()) -> list[str]:
        """Serious faults of accessibility that axe finds, with the first elements of each.

        By some rules, or by all.
        """
        script = resources.files("axe_core_python").joinpath("axe.min.js").read_text("utf-8")
        self.call("Runtime.evaluate", expression=script)
        only = f"{{runOnly: {json.dumps(rules)}}}" if rules else "{}"
        self.run(f"window.audit = null; axe.run({only}).then((found) => {{ audit = found }}); 0")
        self.until("window.audit !== null", 60)
        return list(
            self.run(
                "window.audit.violations.filter((v) => ['serious', 'critical'].includes(v.impact))"
                ".map((v) => v.id + ': ' + v.nodes.slice(0, 3).map((n) => n.html).join(' '))"
            )
        )

    def choose(self, selector: str, files: Sequence[Path]) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in files])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return dict(answer["result"])
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"].get("exception")))
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif event.get("method") == "Log.entryAdded":
            self.complaints.append(parameters["entry"]["text"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            readable, _, _ = select.select([self._from], [], [], 30)
            more = os.read(self._from, 1 << 20) if readable else b""
            assert more, "the browser does not answer"
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))


@contextlib.contextmanager
def browser(executable: str, profile: Path) -> Iterator[Browser]:
    """A running browser with a profile of its own."""
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    # The protocol is on descriptors 3 and 4: a shell puts ours there.
    script = f'exec "$@" 3<&{their_in} 4>&{their_out}'
    command = ["bash", "-c", script, "bash", executable, f"--user-data-dir={profile}", *_FLAGS]
    process = subprocess.Popen(
        command,
        pass_fds=(their_in, their_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(their_in)
    os.close(their_out)
    made = Browser(our_out, our_in)
    try:
        yield made
    finally:
        with contextlib.suppress(OSError, AssertionError):
            made._session = None
            made.call("Browser.close")
        os.close(our_out)
        os.close(our_in)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
