"""The page in a real browser, through the DevTools protocol: console, network, hover, pin, theme, narrow screens."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from ssl_kit.report.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--disable-dev-shm-usage", "--remote-debugging-port=0", "about:blank",
]  # fmt: skip
# where the first point of the map is, in pixels of the window
FIRST_POINT = """(() => {
  const charts = Bokeh.documents.flatMap((doc) => doc.roots());
  const chart = charts.find((root) => [...root.references()].some((model) => model.name === "map"));
  const view = Bokeh.index.get_by_id(chart.id);
  view.el.scrollIntoView({behavior: "instant", block: "center"});
  const {x, y} = chart.renderers[0].data_source.data;
  const box = view.canvas_view.events_el.getBoundingClientRect();
  return [box.x + view.frame.x_scale.compute(x[0]), box.y + view.frame.y_scale.compute(y[0])];
})()"""
# an image inside a shadow root is one of BokehJS's tooltip: the page itself has none
TOOLTIP = """(() => {
  const inside = (root) => [...root.querySelectorAll("*")].some((node) =>
    (root !== document && node.tagName === "IMG" && node.getBoundingClientRect().width > 0)
    || (node.shadowRoot && inside(node.shadowRoot)));
  return inside(document);
})()"""


class Browser:
    """One page: `call` a DevTools method, `run` JavaScript; `events` is everything the browser reported since."""

    def __init__(self, socket):
        self.socket, self.events, self._sent = socket, [], 0

    async def call(self, method: str, **params) -> dict:
        self._sent += 1
        await self.socket.write_message(json.dumps({"id": self._sent, "method": method, "params": params}))
        while True:
            message = json.loads(await asyncio.wait_for(self.socket.read_message(), 30))
            if message.get("id") == self._sent:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    async def run(self, script: str):
        told = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def until(self, script: str):
        for _ in range(100):
            if value := await self.run(script):
                return value
            await asyncio.sleep(0.1)
        raise AssertionError(f"never came true: {script}")

    async def mouse(self, kind: str, at: list[float]) -> None:
        button = "none" if kind == "mouseMoved" else "left"
        await self.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button=button, clickCount=1)

    async def open(self, path: Path, width: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        await self.call("Page.navigate", url=path.resolve().as_uri())
        await self.until("document.readyState === 'complete'")

    def complaints(self) -> list[str]:
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown" or event["method"] == "Log.entryAdded":
                found.append(json.dumps(params)[:400])
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(params["args"])[:400])
        return found

    def requests(self) -> list[str]:
        urls = [one["params"]["request"]["url"] for one in self.events if one["method"] == "Network.requestWillBeSent"]
        return [url[:200] for url in urls if not url.startswith("data:")]


def browse(folder: Path, visit: Callable[[Browser], Awaitable[None]]) -> None:
    """Starts a browser with an empty profile in `folder`, lets `visit` use one page, and ends it."""
    from tornado.websocket import websocket_connect  # comes with bokeh

    async def session(address: str) -> None:
        with urllib.request.urlopen(f"http://{address}/json") as answer:
            page = next(one for one in json.load(answer) if one["type"] == "page")
        browser = Browser(await websocket_connect(page["webSocketDebuggerUrl"], max_message_size=2**28))
        for domain in ("Page", "Runtime", "Log", "Network"):
            await browser.call(f"{domain}.enable")
        await visit(browser)

    command = [CHROMIUM, f"--user-data-dir={folder / 'profile'}", *FLAGS]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stderr if "DevTools listening on ws://" in line)
            asyncio.run(session(line.split("ws://")[1].split("/")[0]))
        finally:
            process.kill()


def test_the_page_works_and_is_silent(make_run, tmp_path):
    run = make_run(classes=("<img src=x onerror=alert(1)>", "dog"))
    target = run / "report.html"
    write_report([run], target)

    async def visit(browser: Browser) -> None:
        await browser.open(target, 1400)
        await browser.until("window.Bokeh && Bokeh.documents.flatMap((doc) => doc.roots()).length === 4")
        await asyncio.sleep(0.5)
        point = await browser.run(FIRST_POINT)
        await browser.mouse("mouseMoved", [point[0] - 30, point[1]])
        await browser.mouse("mouseMoved", point)
        await browser.until(TOOLTIP)
        await browser.mouse("mousePressed", point)
        await browser.mouse("mouseReleased", point)
        await browser.until("document.querySelectorAll('#pins .card > img').length === 1")
        # the keyboard's way to a pin, and a class name that stays text
        await browser.run("document.querySelector('button[data-class=\"0\"]').click()")
        assert await browser.run("document.querySelector('#pins b').textContent") == "<img src=x onerror=alert(1)>"
        axis = "Bokeh.documents[0].roots()[0].below[0].major_label_text_color"
        await browser.run("document.getElementById('theme').click()")
        light = await browser.run(f"[{axis}, getComputedStyle(document.body).backgroundColor]")
        await browser.run("document.getElementById('theme').click()")
        dark = await browser.run(f"[{axis}, getComputedStyle(document.body).backgroundColor]")
        assert light[0] != dark[0] and light[1] != dark[1]
        assert browser.complaints() == []
        assert browser.requests() == [target.resolve().as_uri()]

    browse(tmp_path, visit)


def test_nothing_scrolls_sideways(make_run, tmp_path):
    run = make_run(info={"name": "n" * 120, "device": "d" * 200, "command": "ssl-kit " + "x" * 300})
    write_report([run], run / "report.html")

    async def visit(browser: Browser) -> None:
        for width in (1400, 390):
            await browser.open(run / "report.html", width)
            await browser.until("window.Bokeh && Bokeh.documents.flatMap((doc) => doc.roots()).length === 4")
            assert await browser.run("document.documentElement.scrollWidth") <= width
        assert browser.complaints() == []

    browse(tmp_path, visit)
