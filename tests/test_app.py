"""The page, driven in headless Chromium as a person would."""

import shutil
import socket
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image

import app
import inference
from embedding import open_model
from gallery import open_gallery
from inference import embed_captions, files_to_search
from storage import UserError

SCREENSHOTS = ROOT / "screenshots"  # kept after the tests, to be looked at
WAIT = 30_000  # ms


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(run, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    model, device, dtype = open_model(run, "cpu", "fp32")
    gallery = open_gallery(model, files_to_search(run, ""), None, cache, device, dtype)
    captions = embed_captions(model, run, cache, device, dtype)
    history = pd.read_csv(run / "history.csv")
    page, port = app.build_page("runs/shapes", model, gallery, *captions, history, device, dtype), free_port()
    app.launch(page, "127.0.0.1", port, wait=False)
    yield f"http://127.0.0.1:{port}"
    page.close()


@pytest.fixture(scope="module")
def browser():
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address):
    SCREENSHOTS.mkdir(exist_ok=True)
    opened = browser.new_page(viewport={"width": 1200, "height": 1000})
    opened.set_default_timeout(WAIT)
    asked = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(address)
    opened.get_by_role("tab", name="Words").wait_for()
    yield opened
    assert all(url.startswith((address, "data:", "blob:")) for url in asked), "the page asked the network for something"
    opened.close()


def pictures(page):
    return page.locator("[role=tabpanel]:visible .grid-wrap img")


def wait_for_pictures(page, count):
    pictures(page).nth(count - 1).wait_for()
    assert pictures(page).count() == count
    page.wait_for_function("[...document.querySelectorAll('.grid-wrap img')].every(picture => picture.complete)")


def test_words_find_pictures(page):
    page.get_by_label("Pictures that show").fill("a red circle")
    page.get_by_role("button", name="Search").click()
    wait_for_pictures(page, app.SHOWN)
    page.screenshot(path=SCREENSHOTS / "words.png")
    page.get_by_label("Pictures that show").fill("a dog " * 2000)
    page.get_by_role("button", name="Search").click()
    page.get_by_text("the query has 12,000 characters").wait_for()
    page.get_by_label("Pictures that show").fill(" ")
    page.get_by_role("button", name="Search").click()
    page.get_by_text("the query is empty").wait_for()


def drop(page, path):
    page.locator("[role=tabpanel]:visible input[type=file][accept^=image]").set_input_files(path)


def test_a_picture_finds_its_captions_and_its_like(page, sample):
    page.get_by_role("tab", name="A picture").click()
    drop(page, sorted((sample / "Images").iterdir())[0])
    wait_for_pictures(page, app.SHOWN)
    assert page.locator("[role=tabpanel]:visible td:nth-child(2)").count() == inference.SHOWN_CAPTIONS
    page.screenshot(path=SCREENSHOTS / "picture.png")


def test_classes_are_shown_as_bars(page, sample):
    page.get_by_role("tab", name="Classes").click()
    drop(page, sorted((sample / "Images").iterdir())[0])
    page.locator("[role=tabpanel]:visible img").wait_for()
    page.get_by_label("Classes, with commas between them").fill("a red circle, a blue star")
    page.get_by_role("button", name="Which is it?").click()
    page.get_by_role("tabpanel").get_by_text("a blue star", exact=True).wait_for()
    page.screenshot(path=SCREENSHOTS / "classes.png")


def test_uploads_that_are_no_pictures_or_too_large_are_refused_in_words(page, tmp_path):
    page.get_by_role("tab", name="A picture").click()
    (tmp_path / "text.jpg").write_text("no picture")
    drop(page, tmp_path / "text.jpg")
    page.get_by_text("empty, truncated, too large or not a picture").wait_for()
    page.reload()
    page.get_by_role("tab", name="A picture").click()
    noise = np.random.default_rng(0).integers(256, size=(3000, 3000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.bmp")  # 27 MB
    drop(page, tmp_path / "large.bmp")
    page.get_by_text("exceed the maximum allowed size of 20").first.wait_for()
    assert pictures(page).count() == 0


def test_no_path_from_outside_reaches_the_disk(address, run):
    for path in ("/etc/passwd", str(run / "config.json"), str(ROOT / "README.md"), "../../etc/passwd"):
        for route in ("/gradio_api/file=", "/file="):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(address + route + urllib.parse.quote(path))
            assert refused.value.code in (403, 404)


def test_a_port_in_use_is_named(run, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port}: cannot be opened"):
            app.serve(run, port=port, cache_dir=tmp_path)
