"""Pages as a parser and as a real browser see them: elements and scripts, and a headless Chromium that opens them from disk."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text of its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.content = path.read_text(encoding="utf-8")
        self.feed(self.content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem != "style":
            (self.scripts if self.cdata_elem == "script" else self.text).append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> dict:
        return json.loads(next(script for script in self.scripts if script.startswith("{")))


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A headless Chromium with a fresh profile. Where there is none the test is skipped, unless MMALIGN_REQUIRE_BROWSER is set."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        if os.environ.get("MMALIGN_REQUIRE_BROWSER"):
            pytest.fail("MMALIGN_REQUIRE_BROWSER is set, but chromium or chromedriver is not on the PATH")
        pytest.skip("needs chromium and chromedriver on the PATH (apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra [test]")
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
        for flag in [*flags, "disable-component-update", "disable-sync", f"user-data-dir={profile}", "window-size=1280,900"]:
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        session = webdriver.Chrome(options=options, service=Service(driver))
        yield session
        session.quit()


class Visitor:
    """Drives one page: what is visible, and clicks; `close` asserts that the console stayed free of messages."""

    def __init__(self, browser, path: Path, fragment: str = "") -> None:
        self.browser = browser
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get(path.resolve().as_uri() + fragment)

    def run(self, code: str, *arguments: object):
        return self.browser.execute_script(code, *arguments)

    def click(self, selector: str) -> None:
        self.run("document.querySelector(arguments[0]).click()", selector)

    def choose(self, identifier: str, value: str) -> None:
        code = "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))"
        self.run(code, identifier, value)

    @property
    def cards(self) -> list[str]:
        return self.run("return [...document.querySelectorAll('.card')].map(card => card.title)")

    @property
    def count(self) -> str:
        return self.run("return document.getElementById('count').textContent")

    @property
    def enlarged(self) -> str | None:
        return self.run("const d = document.querySelector('dialog'); return d.open ? d.textContent : null")

    def all_images_load(self) -> bool:
        code = """const done = arguments[arguments.length - 1];
        const images = [...document.images].slice(0, 12);
        images.forEach(image => { image.loading = 'eager'; });
        Promise.all(images.map(image => image.decode())).then(() => done(images.length > 0), () => done(false));"""
        return self.browser.execute_async_script(code)

    def assert_quiet(self) -> None:
        assert self.browser.get_log("browser") == []
