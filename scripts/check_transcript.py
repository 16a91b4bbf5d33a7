#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Opens a page of `transcribe --report` in headless Chromium, points at all its words, and checks what it shows.

Needs selenium, chromium and chromedriver: scripts/check_report.sh gets them and runs this.
"""

import json

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from check_report import IS_PICTURE, check, check_quiet, run

# The seconds of the sound that are lit: [begin, end] for each picture with a visible stretch, from the places in the window.
READ_LIT = """
const {seconds_of_picture, duration} = JSON.parse(document.getElementById("data").textContent);
return [...document.querySelectorAll(".picture")].flatMap((picture, i) => {
  const stretch = picture.querySelector(".stretch");
  if (stretch.hidden) return [];
  const begin = i * seconds_of_picture, seconds = Math.min(seconds_of_picture, duration - begin);
  const whole = picture.querySelector("img").getBoundingClientRect(), lit = stretch.getBoundingClientRect();
  const place = x => begin + seconds * (x - whole.left) / whole.width;
  return [[place(lit.left), place(lit.right)]];
});
"""
READ_DURATION = """
const [done, sound] = [arguments[0], document.getElementById("sound")];
if (sound.readyState > 0) done(sound.duration);
sound.onloadedmetadata = () => done(sound.duration);
sound.onerror = () => done(null);
"""
WITHIN = 0.1  # seconds: pixels are 0.03 s


def check_lit(browser, word, when):
    lit = browser.execute_script(READ_LIT)
    if word is None or word["start"] == word["end"]:
        check(not lit, f"{when}, a stretch of the sound is lit")
        return
    check(lit, f"{when}, nothing is lit")
    begin, end = lit[0][0], lit[-1][1]
    check(abs(begin - word["start"]) < WITHIN and abs(end - word["end"]) < WITHIN, f"{when}, {begin:.2f} to {end:.2f} s is lit")


def check_page(browser, page):
    """Returns the number of words that were checked."""
    browser.get(page)
    data = json.loads(browser.find_element(By.ID, "data").get_attribute("textContent"))
    check(browser.title == data["title"], "it does not have the title of its data")
    pictures = browser.find_elements(By.TAG_NAME, "img")
    check(len(pictures) == len(data["pictures"]), f"it shows {len(pictures)} of {len(data['pictures'])} pictures")
    for picture in pictures:
        check(browser.execute_script(IS_PICTURE, picture), "a picture does not decode")
    duration = browser.execute_async_script(READ_DURATION)
    check(duration is not None and abs(duration - data["duration"]) < WITHIN, f"the sound lasts {duration} s for the browser")

    words = [word for segment in data["segments"] for word in segment["words"]]
    buttons = browser.find_elements(By.CSS_SELECTOR, "#text button")
    check(words and len(buttons) == len(words), f"{len(buttons)} of {len(words)} words can be pointed at")
    check_lit(browser, None, "before anything is pointed at")
    mouse = ActionChains(browser, duration=0)
    for word, button in zip(words, buttons):
        check(button.get_attribute("textContent") == word["word"], f"a button says \"{button.text}\" for \"{word['word']}\"")
        mouse.scroll_to_element(button).move_to_element(button).perform()
        check_lit(browser, word, f"when the mouse points at \"{word['word']}\"")
    mouse.move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    check_lit(browser, None, "when the mouse has left the words")
    browser.execute_script("arguments[0].focus()", buttons[0])
    for word in words:
        check_lit(browser, word, f"when \"{word['word']}\" has the focus")
        ActionChains(browser).send_keys(Keys.TAB).perform()
    last = buttons[-1]
    ActionChains(browser, duration=0).scroll_to_element(last).click(last).perform()
    place = browser.execute_script("return document.getElementById('sound').currentTime")
    check(place >= words[-1]["start"] - WITHIN, f"a click on the last word plays from {place} s")
    check_quiet(browser, page)
    return f"{len(words)} words pointed at"


if __name__ == "__main__":
    run("transcript", "scripts/check_transcript.py speech.html --screenshot speech.png", check_page)
