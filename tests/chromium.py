"""A real browser for tests: Chromium without a window, spoken to by its DevTools protocol."""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium, which this test looks at pages with: apt-get install chromium"
)
_PATIENCE_S = 100.0


class Tab:
    """A page in the browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._calls = 0
        self.complaints: list[str] = []  # errors of scripts, and what a Content-Security-Policy held back
        self.requested: list[str] = []  # URLs

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol."""
        self._calls += 1
        await self._socket.send_json({"id": self._calls, "method": method, "params": params})
        while True:
            answer = await self._socket.receive_json(timeout=_PATIENCE_S)
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"])[:2000])
        elif method == "Log.entryAdded" and params["entry"]["source"] in ("security", "javascript"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])

    async def open(self, url: str) -> None:
        """Go to a page."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def run(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        answer = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, condition: str) -> Any:
        """Wait until an expression is true; its value."""
        end = time.monotonic() + _PATIENCE_S
        while not (value := await self.run(condition)):
            shown = "" if time.monotonic() < end else await self.run("document.body.innerText")
            assert time.monotonic() < end, f"never true: {condition}; the page shows:\n{shown}"
            await asyncio.sleep(0.05)
        return value

    async def type(self, text: str) -> None:
        """Type into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key: Tab, Enter, Escape, an arrow or a space; modifiers: 2 is Ctrl, 8 is Shift."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowRight": 39}
        same = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": codes[key]}
        text = {"Enter": "\r", " ": " "}.get(key, "")
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, modifiers=modifiers, **same)
        await self.call("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **same)

    async def choose_file(self, selector: str, path: Path) -> None:
        """Choose a file in a file input."""
        root = await self.call("DOM.getDocument")
        node = await self.call("DOM.querySelector", nodeId=root["root"]["nodeId"], selector=selector)
        await self.call("DOM.setFileInputFiles", nodeId=node["nodeId"], files=[str(path)])

    async def resize(self, width: int, height: int, *, scheme: str = "light") -> None:
        """Be a screen of some size and colour scheme; narrow ones are phones."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def picture(self, path: Path) -> None:
        """Write what the whole page looks like as PNG."""
        answer = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))


class BlockingTab:
    """A page whose methods (of :class:`Tab`) wait for their end, for tests without a loop of their own."""

    def __init__(self, tab: Tab, loop: asyncio.AbstractEventLoop) -> None:
        self._tab, self._loop = tab, loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._tab, name)
        if not asyncio.iscoroutinefunction(value):
            return value
        return lambda *args, **kwargs: self._loop.run_until_complete(value(*args, **kwargs))


@contextmanager
def blocking_chromium() -> Iterator[BlockingTab]:
    """An empty page in a browser of its own; the test is skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium, which this test looks at pages with: apt-get install chromium")
    loop = asyncio.new_event_loop()
    browser = chromium()
    try:
        yield BlockingTab(loop.run_until_complete(browser.__aenter__()), loop)
    finally:
        loop.run_until_complete(browser.__aexit__(None, None, None))
        loop.close()


@asynccontextmanager
async def chromium() -> AsyncIterator[Tab]:
    """An empty page in a browser of its own."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--remote-debugging-port=0", "--remote-allow-origins=*",
             f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            async with aiohttp.ClientSession() as session:
                url = await _page(session, Path(profile) / "DevToolsActivePort", process)
                async with session.ws_connect(url, max_msg_size=0) as socket:
                    yield Tab(socket)
        finally:
            process.terminate()
            process.wait(30)


async def _page(session: aiohttp.ClientSession, port_file: Path, process: subprocess.Popen[bytes]) -> str:
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        assert process.poll() is None, "Chromium ended at once"
        if port_file.exists() and (port := port_file.read_text().partition("\n")[0]):
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                for target in await answer.json():
                    if target["type"] == "page":
                        return str(target["webSocketDebuggerUrl"])
        await asyncio.sleep(0.1)
    raise AssertionError("Chromium did not start")
