"""A headless Chromium, spoken to over its pipe: what a page does where it is shown."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-extensions", "--disable-background-networking", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip


def found() -> str | None:
    """The Chromium on this machine, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of one browser.

    Attributes:
        complaints: errors and warnings of the console, exceptions, and what the page's policy or
            a missing file kept from loading.
    """

    def __init__(self, program: str) -> None:
        self.complaints: list[str] = []
        self._ids = itertools.count(1)
        self._session: str | None = None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        reads, self._to = os.pipe()
        self._from, writes = os.pipe()
        self._rest = b""
        # Chromium takes its commands from descriptor 3 and answers on 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "-", program, *FLAGS,
             f"--user-data-dir={self._profile.name}"],
            pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(reads)
        os.close(writes)
        [page] = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        of = {"targetId": page["targetId"], "flatten": True}
        self._session = self.call("Target.attachToTarget", **of)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its result."""
        number = next(self._ids)
        said = {"id": number, "method": method, "params": params}
        if self._session:
            said["sessionId"] = self._session
        os.write(self._to, json.dumps(said).encode() + b"\0")
        while (answer := self._read()).get("id") != number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._from, 1 << 16)
            assert more, "Chromium ended"
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)

    def _note(self, event: dict[str, Any]) -> None:
        of, params = event.get("method"), event.get("params", {})
        loud = (
            of == "Runtime.exceptionThrown"
            or (of == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"))
            or (of == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"))
        )
        if loud:
            self.complaints.append(json.dumps(params))

    def show(self, page: Path, width: int, theme: str) -> None:
        """Load a page at a width in CSS pixels, `light` or `dark`."""
        scheme = [{"name": "prefers-color-scheme", "value": theme}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1,
            mobile=width < 600,
        )  # fmt: skip
        self.call("Page.navigate", url=page.as_uri())
        loaded = "document.readyState === 'complete' ? done() : addEventListener('load', done)"
        drawn = "requestAnimationFrame(() => setTimeout(done, 50))"
        for step in (loaded, drawn):
            self.run(f"new Promise((done) => {{ {step} }})")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        got = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def screenshot(self, *, whole: bool = False) -> bytes:
        """A PNG of what is seen, or of the whole page."""
        more = {"captureBeyondViewport": True} if whole else {}
        return base64.b64decode(self.call("Page.captureScreenshot", **more)["data"])
