"""The page, driven in headless Chromium as a person would."""

import http.server
import itertools
import json
import re
import resource
import shutil
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import gradio
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image

import app
from embedding import open_model
from search import queries
from search.gallery import find_pictures, open_gallery
from search.queries import embed_captions, files_to_search
from utils.errors import UserError

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
    gallery = open_gallery(model, *files_to_search(run, ""), cache, device, dtype)
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
    wait_for_pictures(page, app.NUM_SHOWN)
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
    wait_for_pictures(page, app.NUM_SHOWN)
    assert page.locator("[role=tabpanel]:visible td:nth-child(2)").count() == queries.NUM_CAPTIONS
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


def ask(address, endpoint, data):
    """What an endpoint of the page's API answers: the last event and its data."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/gradio_api/call/{endpoint}", json.dumps({"data": data}).encode(), headers)
    try:
        event = json.load(urllib.request.urlopen(request, timeout=60))["event_id"]
        answer = urllib.request.urlopen(f"{address}/gradio_api/call/{endpoint}/{event}", timeout=60).read().decode()
    except urllib.error.HTTPError as error:
        return "error", f"{error.code} {error.read().decode()}"
    [*_, kind, said] = [line for line in answer.splitlines() if line]
    return kind.removeprefix("event: "), said.removeprefix("data: ")


def upload(address, content, name="picture.png"):
    """Uploads a file as the page does, and returns the path that gradio gave it."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address}/gradio_api/upload", head + content + b"\r\n--x--\r\n", headers)
    [path] = json.load(urllib.request.urlopen(request, timeout=60))
    return path


def endpoints(address):
    return {name.strip("/") for name in json.load(urllib.request.urlopen(f"{address}/gradio_api/info"))["named_endpoints"]}


META = {"_type": "gradio.FileData"}


def test_an_uploaded_picture_is_answered_over_the_api(address, sample):
    path = upload(address, sorted((sample / "Images").iterdir())[0].read_bytes())
    assert endpoints(address) == {"find", "look", "decide"}
    for payload in ({"path": path}, {"path": path, "meta": META}):
        kind, said = ask(address, "look", [payload])
        assert kind == "complete" and said.count(".png") + said.count(".webp") >= app.NUM_SHOWN
        kind, said = ask(address, "decide", [payload, "a red circle, a blue star"])
        assert kind == "complete" and "a blue star" in said


def test_no_endpoint_reads_a_path_that_was_not_uploaded(address, sample, tmp_path, monkeypatch):
    """A private picture, a text file, what does not exist: absolute, by .., by links, addresses and shares. All alike."""
    folder = Path(app.get_upload_folder())
    private = sorted((sample / "Images").iterdir())[0]
    uploaded = Path(upload(address, private.read_bytes()))
    link = uploaded.with_name("link.png")
    link.symlink_to(private)
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    asked, fetched = [], []

    async def fetch(url, *_, **__):  # gradio itself refuses private addresses only
        fetched.append(url)
        raise OSError("no network")

    monkeypatch.setattr(gradio.processing_utils, "async_ssrf_protected_download", fetch)
    listener.RequestHandlerClass.log_message = lambda handler, *_: asked.append(handler.path)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    paths = [
        str(private), "/etc/passwd", "/etc/not-there", str(tmp_path), "/proc/self/environ", f"{folder}/../../../{private}",
        f"{folder}/nothing.png", str(folder), str(link), f"http://127.0.0.1:{listener.server_port}/x.png", f"file://{private}",
        r"\\\\127.0.0.1\\share\\x.png", "//127.0.0.1/share/x.png", "~/.bashrc", "\0", "x" * 5000, "..", " ",
    ]  # fmt: skip
    for meta in ({}, {"meta": META}, {"meta": META, "url": paths[-9]}, {"url": paths[9], "orig_name": "x.png", "size": 1}):
        answers = {ask(address, "look", [{"path": path} | meta]) for path in paths}
        answers |= {ask(address, "decide", [{"path": path} | meta, "a, b"]) for path in paths}
        assert {kind for kind, _ in answers} == {"error"}
        assert len(answers) <= 2 and not any("passwd" in said or str(tmp_path) in said for _, said in answers), answers
    same = [ask(address, "look", [{"path": path}]) for path in ("/etc/passwd", "/etc/not-there", str(folder / "nothing.png"))]
    assert same[0] == same[1] == same[2]
    assert asked == [] and fetched == []
    for text in ({"path": str(private)}, {"path": str(private), "meta": META}, [1, 2], 5, True):
        assert "passwd" not in ask(address, "find", [text, text])[1]
    listener.shutdown()
    listener.server_close()


def test_a_gigabyte_of_zeros_is_refused_before_it_is_read(address):
    path = Path(upload(address, b"x")).with_name("zeros.png")
    with open(path, "wb") as file:
        file.truncate(2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert ask(address, "look", [{"path": str(path), "meta": META}])[0] == "error"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    zeros = (bytes(2**20) for _ in range(1024))
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": str(2**30)}
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="zeros.png"\r\n\r\n'
    request = urllib.request.Request(f"{address}/gradio_api/upload", itertools.chain([head], zeros), headers)
    with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)):
        urllib.request.urlopen(request, timeout=60)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_what_is_left_out_of_a_request_is_answered_in_words(address):
    assert ask(address, "look", [None])[0] == "complete"
    for endpoint, data in (("find", [None, None]), ("decide", [None, None]), ("decide", [None, "a, b"])):
        kind, said = ask(address, endpoint, data)
        assert kind == "error" and "NoneType" not in said and ("query is empty" in said or "drop a picture" in said)
    assert ask(address, "find", ["a red circle", None])[0] == "complete"


def test_a_picture_that_was_deleted_meanwhile_is_left_out_of_the_answer(run, sample, tmp_path):
    shutil.copytree(sample / "Images", tmp_path / "pictures")
    model, device, dtype = open_model(run, "cpu", "fp32")
    gallery = open_gallery(model, find_pictures(tmp_path / "pictures"), None, tmp_path / "cache", device, dtype)
    page, port = app.build_page("x", model, gallery, [], torch.empty(0, 256), None, device, dtype), free_port()
    app.launch(page, "127.0.0.1", port, wait=False)
    first = ask(f"http://127.0.0.1:{port}", "find", ["a red circle", ""])[1]
    name = re.search(r"\d+\.png", first)[0]
    (tmp_path / "pictures" / name).unlink()
    kind, said = ask(f"http://127.0.0.1:{port}", "find", ["a red circle", ""])
    page.close()
    assert kind == "complete" and name not in said and said.count('"caption"') == app.NUM_SHOWN - 1


def test_uploads_and_results_do_not_pile_up(run, sample, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "CACHE_CHECK", 1)
    monkeypatch.setattr(app, "CACHE_AGE", 1)
    model, device, dtype = open_model(run, "cpu", "fp32")
    gallery = open_gallery(model, *files_to_search(run, ""), tmp_path / "cache", device, dtype)
    page, port = app.build_page("x", model, gallery, [], torch.empty(0, 256), None, device, dtype), free_port()
    folder = Path(app.get_upload_folder())

    def files():
        return {path for path in folder.rglob("*") if path.is_file()}

    before = files()
    app.launch(page, "127.0.0.1", port, wait=False)
    path = upload(f"http://127.0.0.1:{port}", sorted((sample / "Images").iterdir())[1].read_bytes(), "piled.png")
    assert ask(f"http://127.0.0.1:{port}", "look", [{"path": path, "meta": META}])[0] == "complete"
    assert Path(path).exists()
    deadline = time.monotonic() + 30
    while files() - before and time.monotonic() < deadline:
        time.sleep(0.5)
    page.close()
    assert files() - before == set()


def test_a_port_in_use_is_named(run, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port}: cannot be opened"):
            app.serve(run, port=port, cache_dir=tmp_path)
