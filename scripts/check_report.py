#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Opens a report of the example programs in headless Chromium, points at all its words, and checks what it shows.

Needs selenium, chromium and chromedriver: scripts/check_report.sh gets them and runs this.
"""

import argparse
import base64
import contextlib
import json
import os
import pathlib
import shutil
import sys

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.pointer_input import PointerInput
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

IS_PICTURE = "return arguments[0].decode().then(() => arguments[0].naturalWidth > 0, () => false)"

# The opacity of each pixel of a canvas, 0 to 255, row by row; null if the canvas is hidden.
READ_OVERLAY = """
const canvas = arguments[0];
if (canvas.hidden) return null;
const {width, height} = canvas;
const context = new OffscreenCanvas(width, height).getContext("2d");
context.drawImage(canvas, 0, 0);
const opacity = context.getImageData(0, 0, width, height).data.filter((_, i) => i % 4 === 3);
return Array.from({length: height}, (_, y) => [...opacity.slice(y * width, (y + 1) * width)]);
"""

# The places of the picture and of its overlay, in pixels of the window.
READ_PLACES = """
return [...arguments[0].querySelectorAll("img, canvas")].map(element => {
  const {x, y, width, height} = element.getBoundingClientRect();
  return [x, y, width, height].map(Math.round);
});
"""


class Failure(Exception):
    """A defect of the page, in one line."""


def check(ok, message):
    if not ok:
        raise Failure(message)


@contextlib.contextmanager
def open_browser():
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    check(binary and driver, "chromium or chromedriver is missing; scripts/check_report.sh gets them")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.add_argument("--headless=new")
    options.add_argument("--window-size=1000,900")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # root may not start Chromium with one
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


class Example:
    """An example of the report: its data, and its place on the page."""

    def __init__(self, browser, number, data, article):
        self.browser = browser
        self.name = f"example {number} ({data['title']})"
        self.data = data
        self.article = article
        self.words = [word for word in data["words"] if word["map"] is not None]
        self.buttons = article.find_elements(By.TAG_NAME, "button")
        check(len(self.buttons) == len(self.words), f"{self.name}: not every word with a map can be pointed at")

    def check_picture(self):
        picture = self.article.find_element(By.TAG_NAME, "img")
        check(self.browser.execute_script(IS_PICTURE, picture), f"{self.name}: the picture does not decode")
        if self.data["map"] is not None:
            of_picture, of_map = self.browser.execute_script(READ_PLACES, self.article)
            check(of_picture == of_map, f"{self.name}: the map does not lie on the picture")

    def check_shows(self, wanted, when):
        """Checks that `wanted`, a map or None, is drawn over the picture, each weight as strong as its share of the largest."""
        shown = self.browser.execute_script(READ_OVERLAY, self.article.find_element(By.TAG_NAME, "canvas"))
        message = f"{self.name}: {when}, another map is shown"
        check((shown is None) == (wanted is None), message)
        if wanted is None:
            return
        check([len(row) for row in shown] == [len(row) for row in wanted], message)
        most = max(map(max, wanted)) or 1
        for shown_row, wanted_row in zip(shown, wanted):
            for opacity, weight in zip(shown_row, wanted_row):
                check(abs(opacity / 255 - weight / most) < 0.01, message)

    def check_pointing(self):
        mouse = ActionChains(self.browser, duration=0)
        for word, button in zip(self.words, self.buttons):
            mouse.scroll_to_element(button).move_to_element(button).perform()
            self.check_shows(word["map"], f"when the mouse points at \"{word['text']}\"")
        mouse.move_to_element(self.article.find_element(By.TAG_NAME, "h3")).perform()
        self.check_shows(self.data["map"], "when the mouse has left the words")

    def check_touch(self):
        finger = ActionBuilder(self.browser, mouse=PointerInput("touch", "finger"), duration=0)
        word, button = self.words[-1], self.buttons[-1]
        finger.pointer_action.move_to(button).pointer_down().pointer_up()
        finger.perform()
        self.check_shows(word["map"], f"after a tap on \"{word['text']}\"")

    def check_keyboard(self):
        """Goes through the words by the tab key, from the first one."""
        self.browser.execute_script("arguments[0].focus()", self.buttons[0])
        for word in self.words:
            self.check_shows(word["map"], f"when \"{word['text']}\" has the focus")
            ActionChains(self.browser).send_keys(Keys.TAB).perform()
        self.check_shows(self.data["map"], "when the focus has left the words")


def check_quiet(browser, page):
    """Checks that the console is empty and that the page made no network request."""
    for entry in browser.get_log("browser"):
        raise Failure(f"the console says: {entry['message']}")
    for entry in browser.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        if event["method"] == "Network.requestWillBeSent":
            url = event["params"]["request"]["url"]
            check(url == page or url.startswith("data:"), f"it asks for {url}")


def check_page(browser, page):
    """Returns what was checked, in words."""
    browser.get(page)
    data = json.loads(browser.find_element(By.ID, "data").get_attribute("textContent"))
    check(browser.title == data["title"], "it does not have the title of its data")

    articles = browser.find_elements(By.TAG_NAME, "article")
    check(len(articles) == len(data["examples"]), f"it shows {len(articles)} of {len(data['examples'])} examples")
    wrong = ["wrong" in article.find_element(By.TAG_NAME, "h3").text for article in articles]
    check(wrong == sorted(wrong, reverse=True), "right answers come before wrong ones")
    examples = [Example(browser, i + 1, *pair) for i, pair in enumerate(zip(data["examples"], articles))]
    for example in examples:
        example.check_picture()
        example.check_shows(example.data["map"], "before anything is pointed at")
        example.check_pointing()
    with_words = [example for example in examples if example.words]
    check(with_words, "no word has a map")
    with_words[0].check_keyboard()
    with_words[0].check_touch()
    check_quiet(browser, page)
    return f"{len(examples)} examples, {sum(len(example.words) for example in examples)} words pointed at"


def save_screenshot(browser, path):
    """Checks the whole page as it is when it is opened."""
    browser.refresh()
    picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    pathlib.Path(path).write_bytes(base64.b64decode(picture["data"]))


def run(kind, example, check_page):
    """The program that checks one page; `check_page` returns what it has checked, in words."""
    parser = argparse.ArgumentParser(
        description=f"Points at all words of a {kind} in headless Chromium and checks what it shows.",
        epilog=f"example: {example}",
    )
    parser.add_argument("page", type=pathlib.Path, metavar="PAGE.html")
    parser.add_argument("--screenshot", metavar="FILE.png", help="where to draw the page")
    arguments = parser.parse_args()
    try:
        check(arguments.page.is_file(), "there is no such file")
        with open_browser() as browser:
            checked = check_page(browser, arguments.page.resolve().as_uri())
            if arguments.screenshot:
                save_screenshot(browser, arguments.screenshot)
    except Failure as failure:
        sys.exit(f"{arguments.page}: {failure}")
    except (OSError, WebDriverException) as error:
        sys.exit(f"{arguments.page}: {str(error).splitlines()[0]}")
    print(f"{arguments.page}: {checked}")


if __name__ == "__main__":
    run("report", "scripts/check_report.py vqa.html --screenshot vqa.png", check_page)
