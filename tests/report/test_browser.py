"""The page in a real browser, through the DevTools protocol: console, network, hover, pin, theme, narrow screens."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fabricated import Page

from ssl_kit.core.locking import lock
from ssl_kit.report import page
from ssl_kit.report.page import strip_html, write_report

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


class Reloaded(Exception):
    """The page was loaded anew before it could answer."""


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
                if "navigated" in message.get("error", {}).get("message", ""):
                    raise Reloaded
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    async def run(self, script: str):
        told = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def until(self, script: str):
        for _ in range(600):  # a minute: beside other work a page takes its time
            with suppress(Reloaded):
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


# every chart of the page is drawn, where it has some
READY = """document.querySelectorAll("[data-root-id]").length
  === (window.Bokeh?.documents ?? []).flatMap((doc) => doc.roots()).length"""
FAULTS = (Path(__file__).parent / "faults.js").read_text(encoding="utf-8")
SMALL = {"name": "resnet18_small", "args": {"channels": [4, 4, 8, 8]}}
PATCHES = {"name": "vit_tiny_patch16_224", "args": {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}}
METHODS = {
    "simclr.SimCLR": {"encoder": SMALL},
    "mae.MAE": {"encoder": PATCHES, "decoder_depth": 1, "decoder_width": 16, "decoder_heads": 2},
    "vae.VAE": {"encoder": SMALL, "dims": [4]},
}


async def sound(browser: Browser, page: Path) -> None:
    """Nothing is wrong with a page, on a desk and on a phone, in light and in dark, and nothing left it."""
    chosen = "document.getElementById('theme').dataset.theme"
    for width in (1400, 390):
        await browser.open(page, width)
        await browser.until(READY)
        backgrounds = []
        for theme in ("light", "dark"):
            while await browser.run(chosen) != theme:
                await browser.run("document.getElementById('theme').click()")
            assert await browser.run(FAULTS) == [], (page.name, width, theme)
            backgrounds.append(await browser.run("getComputedStyle(document.body).backgroundColor"))
        assert backgrounds[0] != backgrounds[1]
    assert browser.complaints() == []
    assert set(browser.requests()) == {page.resolve().as_uri()}


@pytest.fixture(scope="module")
def real_runs(labelled_folder, tmp_path_factory) -> dict[str, Path]:
    """A run of each method, as small as can be, evaluated."""
    import ssl_kit

    runs = {}
    for name, arguments in METHODS.items():
        run = tmp_path_factory.mktemp("runs") / name.rpartition(".")[2]
        method = {"class_path": f"ssl_kit.methods.{name}", "init_args": arguments}
        options = {"image_size": 16, "epochs": 1, "batch_size": 32, "limit": 64, "seed": 0}
        ssl_kit.pretrain(str(labelled_folder), method=method, run=str(run), **options)
        ssl_kit.evaluate(str(run), str(labelled_folder), only="knn,linear,details,looks", limit=120)
        runs[name] = run
    return runs


def test_reports_of_real_runs_and_the_search_page_are_sound(real_runs, tmp_path):
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    strip_html(tmp_path / "search.html", "What is similar", [("a.jpg", image), ("b.jpg", None)],
               [[("c.jpg", 0.9, image), ("d.jpg", -0.1, None)], []])  # fmt: skip
    words = {"simclr.SimCLR": "What makes it similar to its neighbour", "mae.MAE": "Attention of the class token",
             "vae.VAE": "Images and their reconstructions"}  # fmt: skip
    for name, run in real_runs.items():
        page = Page((run / "report.html").read_text(encoding="utf-8"))
        assert words[name] in page.words and "8 images, one per column" in page.words

    async def visit(browser: Browser) -> None:
        for run in real_runs.values():
            await sound(browser, run / "report.html")
            browser.events.clear()
        await sound(browser, tmp_path / "search.html")

    browse(tmp_path, visit)


def test_a_page_with_everything_is_sound_and_so_is_one_of_several_runs(make_run, tmp_path):
    classes = tuple(f"class {place}" for place in range(40))
    long = {"name": "n" * 120, "device": "d" * 200, "command": "ssl-kit " + "x" * 300}  # and nothing scrolls sideways
    everything = make_run("everything", classes=classes, info=long)
    write_report([everything], everything / "report.html")
    write_report([make_run("one"), make_run("other")], tmp_path / "both.html")

    async def visit(browser: Browser) -> None:
        await sound(browser, everything / "report.html")
        await browser.open(everything / "report.html", 1400)
        matrix = await browser.run("""(() => {
          const region = document.querySelector(".matrix").parentElement;
          return [region.querySelectorAll("tbody td").length, region.scrollWidth - region.clientWidth];
        })()""")
        assert matrix == [40 * 40, 0]  # on a desk 40 classes are seen at once
        browser.events.clear()
        await sound(browser, tmp_path / "both.html")

    browse(tmp_path, visit)


def test_the_page_works_and_is_silent(make_run, tmp_path):
    run = make_run(classes=("<img src=x onerror=alert(1)>", "dog"))
    target = run / "report.html"
    write_report([run], target)

    async def visit(browser: Browser) -> None:
        await browser.open(target, 1400)
        await browser.until(READY)
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
        axis = "Bokeh.documents[0].roots().find((root) => root.below?.length).below[0].major_label_text_color"
        await browser.run("document.getElementById('theme').click()")
        light = await browser.run(f"[{axis}, getComputedStyle(document.body).backgroundColor]")
        await browser.run("document.getElementById('theme').click()")
        dark = await browser.run(f"[{axis}, getComputedStyle(document.body).backgroundColor]")
        assert light[0] != dark[0] and light[1] != dark[1]
        assert browser.complaints() == []
        assert browser.requests() == [target.resolve().as_uri()]

    browse(tmp_path, visit)


def test_pictures_open_large_by_mouse_and_by_keyboard(make_run, tmp_path):
    target = (run := make_run()) / "report.html"
    write_report([run], target)

    async def press(browser: Browser, key: str) -> None:
        codes = {"Enter": 13, "Escape": 27, "ArrowRight": 39}
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            told = text if kind == "keyDown" else {}
            await browser.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=codes[key], **told)

    async def visit(browser: Browser) -> None:
        shown = "document.querySelector('dialog[open] img')"
        for width in (1400, 390):
            await browser.open(target, width)
            await browser.until(READY)
            await browser.run("document.querySelector('.strip .query img').scrollIntoView({behavior: 'instant'})")
            at = await browser.run(
                "(({x, y}) => [x + 9, y + 9])(document.querySelector('.strip .query img').getBoundingClientRect())"
            )
            await browser.mouse("mousePressed", at)
            await browser.mouse("mouseReleased", at)
            await browser.until(f"{shown}?.src === document.querySelector('.strip .query img').src")
            sizes = await browser.run(f"[{shown}.getBoundingClientRect().width, {shown}.naturalWidth]")
            assert 250 < sizes[0] < width and sizes[1] == 8  # pixels of the window
            await press(browser, "ArrowRight")
            assert await browser.run(f"{shown}.alt === document.querySelector('.strip ol img').alt")
            await press(browser, "Escape")
            # "close", which moves the focus, comes a task after the dialog is gone
            await browser.until("document.activeElement === document.querySelector('.strip ol img')")
            assert await browser.run(f"{shown} === null")
            await press(browser, "Enter")
            await browser.until(f"{shown} !== null")
            await press(browser, "Escape")
            await browser.until(f"{shown} === null")
            assert await browser.run(FAULTS) == []
        assert browser.complaints() == []

    browse(tmp_path, visit)


def test_a_page_that_is_written_no_more_says_how_to_go_on(make_run, tmp_path):
    run = make_run(info={"status": "running"})
    target = run / "report.html"
    with lock(run):
        write_report([run], target)

    async def visit(browser: Browser) -> None:
        old = target.with_name("old.html")
        old.write_text(re.sub(r'data-written="\d+"', f'data-written="{time.time() - 1_200:.0f}"', target.read_text()))
        for place, said in ((target, ""), (old, "Nothing new for 20 min")):
            await browser.open(place, 1400)
            await browser.until(READY)
            assert (await browser.run("document.getElementById('stale').innerText")).startswith(said)
            assert await browser.run("document.getElementById('stale').hidden") == (not said)
        assert await browser.run(FAULTS) == [] and browser.complaints() == []

    browse(tmp_path, visit)


def test_a_page_looks_again_where_it_was_scrolled_to_until_its_run_ends(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_RELOAD", 3)  # a busy machine draws the page in two
    run = make_run(info={"status": "running"})
    target = run / "report.html"
    with lock(run):
        write_report([run], target)

    async def visit(browser: Browser) -> None:
        await browser.open(target, 1400)
        await browser.until(READY)
        await browser.until("scrollTo({top: 900, behavior: 'instant'}) || (window.before = true)")
        info = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(info | {"status": "finished"}))
        write_report([run], target)
        await browser.until("document.readyState === 'complete' && !document.body.dataset.reload")
        await browser.until(READY)
        await browser.until("scrollY === 900 && !window.before")
        await browser.run("window.before = true")
        await asyncio.sleep(3.5)
        assert await browser.run("window.before")  # it is the same page still
        assert browser.complaints() == []

    browse(tmp_path, visit)
