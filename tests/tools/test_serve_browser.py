"""The search page as its users see it, in headless Chromium."""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lib.retrieval.index import find_pictures
from tests.tools.browser import PHONE, browser, overflow, requested, require_browser, served
from tools.search import main

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]
WAIT = 120
# a screenshot of the page under test is kept where this names a folder
SHOTS = os.environ.get("SCREENSHOTS")


@pytest.fixture(scope="module")
def page(make_checkpoint, tmp_path_factory, scenes_path):
    require_browser()
    for needed in ("gradio", "faiss", "matplotlib"):
        pytest.importorskip(needed)
    root = tmp_path_factory.mktemp("page")
    (root / "secret.txt").write_text("not for you")
    images = scenes_path / "scenes" / "images"
    checkpoint = make_checkpoint("seps", dense_side="none")
    flags = ["--checkpoint", str(checkpoint), "--out", str(root / "index"), "--workers", "0"]
    assert main(["index", str(images), *flags]) == 0
    with served(str(root / "index"), "--example", "a big red star") as address:
        yield address, root, len(find_pictures(images))


@pytest.fixture(scope="module")
def window(page):
    with browser() as driver:
        yield driver


def opened(driver, address):
    driver.get(address)
    until(driver, "#query textarea, #query input")
    return driver


def until(driver, selector, condition=lambda found: found):
    from selenium.webdriver.common.by import By

    deadline = time.time() + WAIT
    while time.time() < deadline:
        found = driver.find_elements(By.CSS_SELECTOR, selector)
        try:
            if found and condition(found):
                return found
        except Exception:  # redrawn meanwhile
            pass
        time.sleep(0.2)
    raise AssertionError(f"{selector} did not appear")


def said(driver, words: str) -> str:
    found = until(driver, "#said", lambda some: words in some[0].text)
    return found[0].text


def search(driver, text: str) -> None:
    (box,) = until(driver, "#query textarea, #query input")[:1]
    # typed by script: a driver's keys leave out characters beyond the basic plane
    driver.execute_script(
        "arguments[0].value = arguments[1];"
        "arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
        box,
        text,
    )
    time.sleep(0.5)
    until(driver, "#search")[0].click()


def test_query_click_and_heat_map(page, window):
    address, _, count = page
    opened(window, address)
    search(window, "a big red star")
    assert f"12 of {count} pictures" in said(window, "a big red star")
    pictures = until(window, "#found img", lambda found: len(found) >= 12)
    loaded = "return [...document.querySelectorAll('#found img')].every(i => i.naturalWidth > 0)"
    until(window, "#found img", lambda found: window.execute_script(loaded))
    pictures[2].click()
    until(window, "#heat img", lambda found: found[0].size["width"] > 100)
    hint = until(window, "#hint textarea, #hint input")[0]
    assert "each word matched" in hint.get_attribute("value")
    lower = "return window.scrollY > 0"  # to the heat map, which lies below the pictures
    until(window, "#heat img", lambda found: window.execute_script(lower))
    assert overflow(window) <= 0
    if SHOTS:
        window.save_screenshot(str(Path(SHOTS) / "search_page.png"))
    foreign = [one for one in requested(window) if not one.startswith((address, "data:", "blob:"))]
    assert [one for one in foreign if not one.startswith("chrome")] == []


def test_an_example_can_be_taken(page, window):
    opened(window, page[0])
    from selenium.webdriver.common.by import By

    for one in window.find_elements(By.XPATH, "//*[text()='a big red star']"):
        if one.is_displayed():
            one.click()
            break
    until(window, "#query textarea, #query input", lambda f: f[0].get_attribute("value") != "")


def test_no_match_and_nothing_asked(page, window):
    opened(window, page[0])
    search(window, "ЖЖЖ")
    assert "knows no word" in said(window, "No match")
    search(window, "   ")
    said(window, "Type what you look for")


def test_html_is_text(page, window):
    opened(window, page[0])
    bad = "<img src=x onerror=\"document.title='taken'\"> a <b>red</b> star"
    search(window, bad)
    assert "<b>red</b>" in said(window, "red")
    assert not window.find_elements("css selector", "#said b, #said img")
    assert window.title != "taken"


def test_five_hundred_letters(page, window):
    opened(window, page[0])
    search(window, ("a big red star above a blue ring " * 20)[:500])
    assert "was cut to its first" in said(window, "cut")
    assert overflow(window) <= 0


def test_two_users_at_once(page):
    def user(text: str) -> str:
        with browser() as driver:
            opened(driver, page[0])
            search(driver, text)
            told = said(driver, text)
            until(driver, "#found img", lambda found: len(found) >= 12)
            return told

    texts = ["a big red star", "a small blue ring"]
    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(user, texts))
    assert all(text in one for text, one in zip(texts, told, strict=True))


def test_a_phone(page):
    with browser(PHONE) as driver:
        opened(driver, page[0])
        search(driver, "a big red star")
        said(driver, "a big red star")
        until(driver, "#found img", lambda found: len(found) >= 12)
        if SHOTS:
            driver.save_screenshot(str(Path(SHOTS) / "search_page_phone.png"))
        assert overflow(driver) <= 0


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file={root}/secret.txt",
        "/file={root}/secret.txt",
        "/gradio_api/file=/etc/passwd",
    ],
)
def test_no_file_outside_is_served(page, path):
    address, root, _ = page
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(address + path.format(root=root), timeout=30)
    assert refused.value.code in (403, 404)


def test_another_name_for_this_machine_is_refused(page):
    request = urllib.request.Request(page[0], headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 400
