"""The page in a real browser: chromium, where it is installed with its driver.

CHATGOT_SCREENSHOTS=FOLDER keeps pictures of it, in light and dark, at 1280 and 390 pixels.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.inference.conftest import Server

pytest.importorskip("selenium")
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    DRIVER is None or shutil.which("chromium") is None, reason="chromium and chromedriver are not installed"
)
PATIENCE = 60


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", f"user-data-dir={profile}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    driver.set_window_size(1280, 900)
    yield driver
    driver.quit()


class Page:
    """What a user sees and does."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        driver.get("about:blank")
        driver.get(url)
        self.until(lambda _: self("model").text)

    def __call__(self, name: str):
        return self.driver.find_element(By.ID, name)

    def until(self, condition) -> Any:
        return WebDriverWait(self.driver, PATIENCE, 0.05).until(condition)

    @property
    def text(self) -> str:
        return self("text").get_property("value")  # pyright: ignore[reportReturnType]

    def set(self, name: str, value: str) -> None:
        self(name).clear()
        self(name).send_keys(value)

    def reply(self) -> str:
        """Continue, and wait for the end: what was added."""
        before = self.text
        self("go").click()
        self.until(lambda _: self("stop").is_enabled() or self.text != before)
        self.until(lambda _: self("go").is_enabled())
        assert self("error").text == ""
        return self.text[len(before) :]

    def look_at(self, token: int) -> str:
        """The alternatives that the mouse finds on a token."""

        def found(_: webdriver.Chrome) -> bool:
            part = self.driver.find_element(By.CSS_SELECTOR, f'#behind [data-token="{token}"]')
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", part)
            box, field = part.rect, self("text").rect
            middle = (field["x"] + field["width"] / 2, field["y"] + field["height"] / 2)
            x, y = box["x"] + box["width"] / 2 - middle[0], box["y"] + box["height"] / 2 - middle[1]
            ActionChains(self.driver).move_to_element_with_offset(self("text"), int(x), int(y)).perform()
            return self("tip").is_displayed()

        # When copies are found, after the reply, the marks are drawn again.
        WebDriverWait(self.driver, PATIENCE, 0.05, (StaleElementReferenceException,)).until(found)
        return self("tip").text


@pytest.fixture
def page(browser: webdriver.Chrome, server: Server) -> Page:
    return Page(browser, server.url)


def requested(driver: webdriver.Chrome) -> set[str]:
    """Hosts that the browser has asked for the page, by its own log."""
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    sent = (one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent")
    return {url.split("/")[2] for url in sent if url.startswith("http")}


def test_a_text_is_continued_edited_and_taken_back(page: Page, server: Server) -> None:
    page("text").send_keys("The night")
    page.set("max_tokens", "30")
    first = page.reply()
    assert "The night" + first == server.model.continuations("The night", 30, temperature=0.8)[0]
    assert "30 tokens" in page("status").text
    page("back").click()
    assert page.text == "The night"
    page.set("seed", "7")
    other = page.reply()
    assert other != first
    page("back").click()
    page.set("seed", "0")
    page.set("top_k", "1")
    greedy = page.reply()
    assert "The night" + greedy == server.model.continuations("The night", 30, temperature=0.0)[0]
    page("text").send_keys(" The wolf")
    page("text").send_keys(Keys.CONTROL, Keys.ENTER)
    page.until(lambda _: page("go").is_enabled() and not page.text.endswith("wolf"))
    assert page.text.startswith("The night" + greedy + " The wolf")
    assert requested(page.driver) == {server.url.removeprefix("http://")}
    assert [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_reply_streams_and_is_stopped(page: Page) -> None:
    page("text").send_keys("The night")
    page.set("max_tokens", "4096")
    page("go").click()
    seen = page.until(lambda _: len(page.text) > 30 and page.text)
    page.until(lambda _: len(page.text) > len(seen))  # it grows
    page("stop").click()
    page.until(lambda _: page("go").is_enabled())
    assert page("status").text.startswith("stopped")
    assert 30 < len(page.text) < 4000


def test_a_reply_that_comes_faster_than_it_can_be_drawn_leaves_the_page_its_buttons(page: Page) -> None:
    """4,000 tokens at once, as a browser sees them on a busy machine: drawn a few times, not once for each."""
    page("text").send_keys("The night")
    page.driver.execute_script(
        """
        const logprobs = {tokens: ["ab"], text_offset: [0], token_logprobs: [-1], top_logprobs: [{ab: -1}]};
        const piece = i => ({choices: [{text: "ab", logprobs: {...logprobs, text_offset: [2 * i]}}]});
        const body = Array.from({length: 4000}, (_, i) => `data: ${JSON.stringify(piece(i))}\n\n`).join("");
        const asked = window.fetch;
        window.fetch = (path, ...rest) => path === "v1/completions" ? new Response(body) : asked(path, ...rest);
        window.drawn = 0;
        new MutationObserver(() => window.drawn++).observe(document.getElementById("behind"), {childList: true});
        """
    )
    page("go").click()
    page.until(lambda _: page("status").text.endswith("a second"))
    assert "4000 tokens" in page("status").text
    assert page.text == "The night" + 4000 * "ab"
    assert len(page.driver.find_elements(By.CSS_SELECTOR, "#behind .drawn")) == 4000
    assert page.driver.execute_script("return window.drawn") < 100


def test_alternatives_are_shown_under_the_mouse_and_at_the_caret(page: Page) -> None:
    page("text").send_keys("The night")
    page.set("max_tokens", "20")
    reply = page.reply()
    shown = page.look_at(4)
    chosen = page("tip").find_element(By.CLASS_NAME, "chosen").text
    assert chosen.startswith({" ": "␣", "\n": "⏎"}.get(reply[4], reply[4]))
    assert 8 <= shown.count("%") <= 9
    page("text").send_keys(Keys.ESCAPE)
    assert not page("tip").is_displayed()
    page("text").send_keys(Keys.ARROW_LEFT * 3)
    page.until(lambda _: page("tip").is_displayed())
    assert page("tip").find_element(By.CLASS_NAME, "chosen").text.startswith(reply[16].replace(" ", "␣"))
    page("text").send_keys("x")  # what was drawn before the edit stays marked, what follows does not
    assert len(page.driver.find_elements(By.CLASS_NAME, "drawn")) == 17


def test_what_stands_in_the_training_text_is_marked_with_its_place(page: Page, server: Server) -> None:
    line = next(one for one in server.text.split("\n") if len(one) > 50)
    page("text").send_keys(f"No. {line[:45]}")
    page.set("max_tokens", "1")
    page.reply()
    page.until(lambda _: page.driver.find_elements(By.CSS_SELECTOR, "#copies li"))
    (item,) = page.driver.find_elements(By.CSS_SELECTOR, "#copies li")
    assert line[:45] in item.text
    assert f"stands in text.txt:{server.text[: server.text.index(line)].count(chr(10)) + 1}, " in item.text
    marks = "".join(
        str(part.get_property("textContent")) for part in page.driver.find_elements(By.CLASS_NAME, "copied")
    )
    assert line[:45] in marks
    page("text").send_keys(Keys.HOME, "w", Keys.END)
    assert page.driver.find_elements(By.CLASS_NAME, "copied") == []
    page.set("max_tokens", "20")
    page.driver.execute_script("arguments[0].value = 'w'; arguments[0].oninput()", page("text"))
    page.reply()
    page.until(lambda _: page("copies_none").is_displayed())


def test_a_refusal_is_shown(page: Page) -> None:
    page("text").send_keys("Ω")
    page("go").click()
    page.until(lambda _: "U+03A9" in page("error").text)
    assert page.text == "Ω"
    assert page("go").is_enabled()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window(page: Page, width: int, scheme: str) -> None:
    driver = page.driver
    feature = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 800}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page("text").send_keys("The night")
    page.set("max_tokens", "300")
    page.reply()
    page.look_at(40)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    text, behind = page("text").rect, page("behind").rect
    assert text == behind  # the marks stand where the letters do
    assert driver.execute_script("return document.getElementById('text').scrollHeight") <= text["height"] + 1
    if folder := os.environ.get("CHATGOT_SCREENSHOTS"):
        driver.save_screenshot(str(Path(folder) / f"page-{width}-{scheme}.png"))
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
