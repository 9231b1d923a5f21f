"""The page: driven in headless Chromium as a person would, and asked as a stranger would."""

import json
import resource
import shutil
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import uvicorn
from conftest import ROOT, wait_until
from PIL import Image

import app
from search import queries, server, update
from search.files import find_pictures
from search.live import LiveGallery
from search.options import Page
from search.searcher import Searcher
from utils.errors import UserError

SCREENSHOTS = ROOT / "screenshots"  # kept after the tests, to be looked at
WAIT = 30_000  # ms
WIDTHS = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 800}}


@contextmanager
def served(run, folder, cache):
    """The address of a page that searches a folder, and its LiveGallery."""
    searcher = Searcher(run, "cpu", "fp32", cache)
    live = LiveGallery(searcher, partial(find_pictures, folder), str(folder), num_workers=1)
    listening = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(server.build_app(searcher, live, app.LOCAL), log_level="warning"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    live.thread.start()
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}", live
    live.stop()
    running.should_exit = True
    thread.join(10)
    live.thread.join(10)


@pytest.fixture(scope="module")
def pictures(sample, tmp_path_factory):
    """The sample's pictures in two folders, one of them as a smaller copy, and a file outside."""
    folder = tmp_path_factory.mktemp("gallery") / "pictures"
    shutil.copytree(sample / "Images", folder / "drawn")
    (folder / "more").mkdir()
    copied = Image.open(folder / "drawn" / "00003.png").convert("RGB")
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2021:06:30 12:00:00"
    copied.save(folder / "more" / "copy of 3.jpg", exif=exif, quality=92)
    Image.new("RGB", (64, 64)).save(folder.parent / "outside.png")
    return folder


@pytest.fixture(scope="module")
def site(run, pictures, tmp_path_factory):
    with served(run, pictures, tmp_path_factory.mktemp("cache")) as (address, live):
        wait_until(lambda: not live.working and live.captions[1] is not None)
        yield address


def get(address, path, method="GET", body=None, host=None):
    """(status, contents) of an answer."""
    request = urllib.request.Request(address + path, body, {"Host": host} if host else {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def ask(address, path, **parameters):
    """(status, value) of an answer in JSON."""
    status, contents = get(address, f"{path}?{urllib.parse.urlencode(parameters)}")
    return status, json.loads(contents)


# ---- in the browser ----------------------------------------------------------------------------------------------


@pytest.fixture(params=WIDTHS)
def page(request, browser, site):
    SCREENSHOTS.mkdir(exist_ok=True)
    opened = browser.new_page(viewport=WIDTHS[request.param], color_scheme="dark" if request.param == "phone" else "light")
    opened.set_default_timeout(WAIT)
    asked, problems = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if "Content Security" in message.text else None)
    opened.goto(site)
    opened.name = request.param
    yield opened
    assert not problems
    assert all(url.startswith((site, "data:", "blob:")) for url in asked), "the page asked the network for something"
    opened.close()


def until(page, expression):
    """Waits for a JavaScript expression. Not page.wait_for_function, which the page's security policy refuses."""
    wait_until(lambda: page.evaluate(expression), WAIT / 1000)


def look(page, name):
    seen = "i.offsetParent && i.getBoundingClientRect().top < innerHeight"
    until(page, f"[...document.images].filter(i => {seen}).every(i => i.complete)")
    page.screenshot(path=SCREENSHOTS / f"{name}-{page.name}.png")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"


def find(page, text):
    page.get_by_label("What the pictures show").fill(text)
    page.get_by_role("button", name="Search", exact=True).first.click()


def test_words_find_pictures_and_scrolling_finds_more(page):
    find(page, "a red circle")
    page.locator("#grid .tile").first.wait_for()
    look(page, "words")
    page.locator("#grid .tile").last.scroll_into_view_if_needed()
    page.locator("#grid .tile").nth(server.NUM_SHOWN).wait_for()  # came by scrolling
    assert page.locator("#grid .tile img").first.get_attribute("alt").endswith(".png")
    assert "q=a+red+circle" in page.url and "a red circle" in page.title()
    find(page, "a dog " * 2000)
    page.get_by_text("the query has 11,999 characters").wait_for()


def test_a_link_holds_the_query_and_its_filters(page, site):
    page.goto(f"{site}/?q=a+star&folder=more/*&after=2021-06-30&before=2021-07")
    page.get_by_role("button", name="copy of 3.jpg").wait_for()
    assert page.get_by_label("folder").is_visible() and page.locator("#grid .tile").count() == 1
    page.get_by_label("before").fill("2021-13")
    page.get_by_label("before").press("Enter")
    page.get_by_text("before 2021-13: no date").wait_for()
    page.go_back()
    page.get_by_role("button", name="copy of 3.jpg").wait_for()


def test_a_picture_opens_large_and_finds_others_like_it(page, site):
    page.goto(f"{site}/?q=a+star&folder=more/*")
    page.get_by_role("button", name="copy of 3.jpg").click()
    page.get_by_text("2021-06-30 12:00:00").wait_for()
    assert page.locator("#captions li").count() == queries.NUM_CAPTIONS
    look(page, "viewer")
    page.get_by_role("button", name="Heat map").click()
    until(page, "document.getElementById('large').complete && document.getElementById('large').naturalWidth == 320")
    page.get_by_label("folder").evaluate("field => field.value = ''")
    page.keyboard.press("m")
    page.get_by_role("button", name="00003.png").wait_for()
    assert "like=" in page.url and not page.get_by_role("dialog").is_visible()
    first = page.locator("#grid .tile").nth(0)
    assert {first.get_attribute("title"), page.locator("#grid .tile").nth(1).get_attribute("title")} == {
        "drawn/00003.png",
        "more/copy of 3.jpg",
    }
    page.get_by_text("like copy of 3.jpg").wait_for()  # and stays part of the query when words are added
    find(page, "a red triangle")
    page.locator("#grid .tile").first.wait_for()
    assert "like=" in page.url and "q=a+red+triangle" in page.url
    page.reload()
    page.get_by_text("like copy of 3.jpg").wait_for()
    page.get_by_role("button", name="Remove").click()
    page.locator("#given").wait_for(state="hidden")
    assert "like=" not in page.url


def test_it_is_driven_by_keys(page):
    page.keyboard.press("Escape")
    find(page, "a star")
    page.locator("#grid .tile").nth(1).wait_for()
    page.get_by_label("What the pictures show").press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for()
    second = page.locator("#large").get_attribute("src")
    page.keyboard.press("ArrowLeft")
    until(page, f"document.getElementById('large').getAttribute('src') != '{second}'")
    page.keyboard.press("Escape")
    until(page, "document.activeElement.className == 'tile'")  # which was open
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q"


def test_what_is_less_likely_and_what_is_probably_not_there_is_said(page, site):
    found = ask(site, "/api/search", q="a star")[1]
    assert not found["nothing"] and all(match["likely"] for match in found["matches"])  # this run has no match probabilities
    found["matches"] = [match | {"likely": i < 2} for i, match in enumerate(found["matches"])]
    page.route("**/api/search?*", lambda route: route.fulfill(json=found | {"more": False}))
    find(page, "a star")
    page.get_by_text("less likely").wait_for()
    names = page.locator("#grid > *").evaluate_all("tiles => tiles.map((tile) => tile.className)")
    assert names == ["tile", "tile", "divider", *["tile"] * (len(found["matches"]) - 2)]
    look(page, "less-likely")
    found |= {"nothing": True, "matches": [match | {"likely": False} for match in found["matches"]]}
    find(page, "an elephant")
    page.get_by_text("Probably nothing here; the best of").wait_for()
    assert page.locator(".divider").count() == 0


def test_a_picture_from_outside_has_captions_classes_and_look_alikes(page, pictures):
    page.locator("#file").set_input_files(pictures / "drawn" / "00007.png")
    page.locator("#given-captions li").nth(queries.NUM_CAPTIONS - 1).wait_for()
    assert page.locator("#grid .tile").first.get_attribute("title") == "drawn/00007.png"
    page.get_by_label("Classes, with commas between them").fill("a red circle, a blue star")
    page.get_by_role("button", name="Which is it?").click()
    page.locator("#answers li").nth(1).wait_for()
    look(page, "picture")
    shares = [float(text.split("%")[0]) for text in page.locator("#answers li").all_inner_texts()]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    find(page, "a blue star")  # and in one query with words
    page.locator("#grid .tile").first.wait_for()
    page.get_by_role("button", name="Remove").click()
    page.locator("#given").wait_for(state="hidden")


def test_uploads_that_are_no_pictures_or_too_large_are_refused_in_words(page, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    page.locator("#file").set_input_files(tmp_path / "text.jpg")
    page.get_by_text("text.jpg: empty, truncated or not a picture").wait_for()
    (tmp_path / "large.bmp").write_bytes(bytes(server.MAX_UPLOAD + 1000))
    page.locator("#file").set_input_files(tmp_path / "large.bmp")
    page.get_by_text("the picture has more than 20 MB").wait_for()


def test_tabs_show_duplicates_a_map_and_the_run(page):
    page.get_by_role("tab", name="Duplicates").click()
    page.get_by_role("button", name="copy of 3.jpg").wait_for()
    assert page.locator(".group").count() == 1 and page.locator(".group .tile").count() == 2
    look(page, "duplicates")
    page.get_by_role("tab", name="Map").click()
    page.frame_locator("#map iframe").locator("canvas").wait_for()
    look(page, "map")
    page.get_by_role("tab", name="The run").click()
    page.get_by_alt_text("curves.png").wait_for()


# ---- as it grows -------------------------------------------------------------------------------------------------


def test_results_appear_while_embedding_and_follow_the_folder(run, sample, tmp_path, monkeypatch):
    monkeypatch.setattr(update, "SHOW_EVERY", 5)
    monkeypatch.setattr("search.live.QUIET", 100)
    monkeypatch.setattr("search.live.LOOK_EVERY", 200)
    monkeypatch.setattr("search.live.WORK_PER_LOOK", 0)
    names = sorted(path.name for path in (sample / "Images").iterdir())[:21]
    (tmp_path / "pictures").mkdir()
    for name in names[:20]:
        shutil.copy(sample / "Images" / name, tmp_path / "pictures")
    embedded, go_on = update.embedded, threading.Event()

    def halting(*arguments):
        for count, picture in enumerate(embedded(*arguments), start=1):
            yield picture
            if count == 10:
                assert go_on.wait(60)

    monkeypatch.setattr(update, "embedded", halting)
    with served(run, tmp_path / "pictures", tmp_path / "cache") as (address, live):
        wait_until(lambda: live.gallery and len(live.gallery.paths) == 10)
        status = ask(address, "/api/status")[1]
        assert (status["pictures"], status["total"], status["working"]) == (10, 20, True)
        assert len(ask(address, "/api/search", q="a star")[1]["matches"]) == 10
        go_on.set()
        wait_until(lambda: len(live.gallery.paths) == 20 and live.captions[1] is not None)
        shutil.copy(sample / "Images" / names[20], tmp_path / "pictures")
        wait_until(lambda: len(live.gallery.paths) == 21)
        (tmp_path / "pictures" / names[0]).unlink()
        wait_until(lambda: len(live.gallery.paths) == 20)
        shutil.rmtree(tmp_path / "pictures")
        wait_until(lambda: live.problem)
        status, answer = ask(address, "/api/search", q="a star")
        assert status in (200, 400) and "Traceback" not in str(answer)


# ---- from outside ------------------------------------------------------------------------------------------------


def test_nothing_outside_the_gallery_is_reached(site, run, pictures):
    outside = str(pictures.parent / "outside.png")
    for path in ("/etc/passwd", outside, str(run / "config.json"), str(ROOT / "README.md"), "../../etc/passwd"):
        for route in ("/picture/", "/api/picture/", "/heat/", "/static/", "/static/..%2f", "/run/", "/run/..%2f"):
            status, contents = get(site, route + urllib.parse.quote(path, safe=""))
            assert status in (400, 404, 405) and b"root:" not in contents, route + path
    key = ask(site, "/api/search", q="a star")[1]["matches"][0]["key"]
    assert get(site, f"/picture/{key}")[0] == 200
    generation = key.partition("-")[0]
    for other in (
        "0",
        f"{generation}-999999999",
        f"{generation}--1",
        f"{generation}-1e3",
        f"{generation}-{'9' * 30}",
        "00000000-0",
    ):
        assert get(site, f"/picture/{other}")[0] in (400, 404)
    asked_elsewhere = urllib.request.Request(f"{site}/picture/{key}", headers={"Sec-Fetch-Site": "cross-site"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(asked_elsewhere)
    for parameters in ({"like": outside}, {"like": "999999"}, {"upload": outside}, {"q": "a star", "page": "-1"}):
        status, answer = ask(site, "/api/search", **parameters)
        assert status == 400 and "Traceback" not in answer["error"]
    assert get(site, "/", host="evil.example")[0] == 400  # a page elsewhere that a name server sends here
    assert "default-src 'self'" in urllib.request.urlopen(site).headers["Content-Security-Policy"]


def test_what_is_left_out_of_a_request_is_answered_in_words(site):
    for path, parameters in (("search", {}), ("search", {"minus": "a"}), ("classify", {}), ("classify", {"names": "a,b"})):
        status, answer = ask(site, f"/api/{path}", **parameters)
        assert status == 400 and "NoneType" not in answer["error"] and len(answer["error"]) > 20
    assert get(site, "/api/upload?name=a.png", "POST", b"")[0] == 400


def test_a_gigabyte_is_refused_before_it_is_read(site):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    zeros = (bytes(2**20) for _ in range(1024))
    request = urllib.request.Request(f"{site}/api/upload?name=a.png", zeros, {"Content-Length": str(2**30)})
    with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)):
        urllib.request.urlopen(request, timeout=60)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_many_clients_at_once_lose_no_search_and_uploads_do_not_pile_up(site, pictures, monkeypatch):
    asked = [f"a {color} {shape}" for color in ("red", "blue", "green", "yellow", "white") for shape in ("star", "ring")]
    with ThreadPoolExecutor(10) as clients:
        answers = list(clients.map(lambda text: ask(site, "/api/search", q=text), asked * 5))
    assert all(status == 200 and len(answer["matches"]) == server.NUM_SHOWN for status, answer in answers)
    assert all(answers[i] == answers[i + 10] for i in range(10))  # and each got its own
    monkeypatch.setattr(server, "NUM_UPLOADS", 2)
    contents = (pictures / "drawn" / "00001.png").read_bytes()
    keys = [json.loads(get(site, "/api/upload?name=a.png", "POST", contents)[1])["upload"] for _ in range(3)]
    assert [ask(site, "/api/search", upload=key)[0] for key in keys] == [400, 200, 200]


def test_a_port_in_use_is_named(run, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port}: cannot be opened"):
            app.serve(Page(str(run), port=port, cache_dir=str(tmp_path)))
