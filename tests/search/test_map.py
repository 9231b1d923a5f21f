"""The map of a picture collection: layout, groups and their names, the page and the PNG."""

import base64
import html.parser
import json
import os
import re

import cv2
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from search import map as picture_map
from search.map import (
    draw,
    group,
    lay_out,
    make_map,
    map_pictures,
    name_groups,
    page,
    sheets,
    tidy,
    to_cells,
    typical_first,
    visible,
)
from utils.errors import UserError

HOSTILE = "</script><b onload=x> '&\"{{data}}#?% é日.png"  # in a folder with the name <
SCREENSHOTS = ROOT / "screenshots"  # kept after the tests, to be looked at
HUES = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def normalised(rows):
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def clusters(size, width=16):
    """Two clusters of embeddings, (2 size, width), around two axes."""
    noise = np.random.default_rng(0).normal(0, 0.05, (2 * size, width))
    noise[:size, 0] += 1
    noise[size:, 1] += 1
    return normalised(noise)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 red pictures and 40 blue ones, each with a grey of its own in the middle; one has a hostile name."""
    made = tmp_path_factory.mktemp("pictures")
    (made / HOSTILE).parent.mkdir()
    for i in range(80):
        picture = np.empty((48, 64, 3), dtype=np.uint8)
        picture[:] = HUES["red" if i < 40 else "blue"]
        picture[12:36, 16:48] = 3 * i
        Image.fromarray(picture).save(made / (HOSTILE if i == 7 else f"{i:03d}.png"))
    return made


@pytest.fixture(scope="module")
def paths(folder):
    return [str(folder / (HOSTILE if i == 7 else f"{i:03d}.png")) for i in range(80)]


@pytest.fixture(scope="module")
def written(paths, tmp_path_factory):
    """(the path of a map's page, its `PictureMap`)."""
    output = tmp_path_factory.mktemp("map") / "map.html"
    captions = ["a red picture .", "a blue picture .", "nothing"]
    vectors = np.eye(16, dtype=np.float32)[:3]
    return output, make_map(clusters(40).astype(np.float16), paths, captions, vectors, output, 2)


def test_clusters_lie_apart_and_the_layout_repeats():
    embeddings = clusters(40)
    points = lay_out(embeddings)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + 10 * np.eye(80)
    assert ((distances.argmin(axis=1) < 40) == (np.arange(80) < 40)).all()
    assert np.linalg.norm(points[:40].mean(axis=0) - points[40:].mean(axis=0)) > 0.3
    assert points.min() >= 0 and points.max() <= 1 and np.allclose(np.ptp(points, axis=0).max(), 1)
    assert np.array_equal(points, lay_out(embeddings))
    labels, _ = group(points, embeddings, [], np.empty((0, 16)))
    assert len(set(labels[:40])) + len(set(labels[40:])) == len(set(labels))  # no group has pictures of both


@pytest.mark.parametrize("count", [1, 2, 5, 11])
@pytest.mark.parametrize("same", [False, True], ids=["different", "identical"])
def test_few_or_identical_pictures_are_laid_out(count, same):
    embeddings = normalised(np.ones((count, 3)) if same else np.eye(16)[:count] + 0.1)
    points = lay_out(embeddings)
    assert points.shape == (count, 2) and np.isfinite(points).all() and points.min() >= 0 and points.max() <= 1
    assert len(set(map(tuple, to_cells(points).tolist()))) == count
    labels, names = group(points, embeddings, ["a picture"], embeddings[:1])
    assert labels.shape == (count,) and names.count("A picture") == 1 and len(names) == labels.max() + 1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_map_of_few_pictures_is_written(count, paths, tmp_path):
    make_map(clusters(40)[:count], paths[:count], [], np.empty((0, 16)), tmp_path / "map.html", 1)
    with Image.open(tmp_path / "map.png") as image:
        assert (np.asarray(image) == HUES["red"]).all(axis=2).sum() > 10_000 * count  # pixels
    assert len(set(data_of(tmp_path / "map.html")["files"])) == count


def test_names_by_hand():
    """Middles are (1, 0, .5) and (0, 1, .5), their mean (.5, .5, .5): what sets them apart is (.5, -.5, 0) and its negative."""
    embeddings = np.array([[1, 0, 0.5], [1, 0, 0.5], [0, 1, 0.5]])
    labels = np.array([0, 0, 1])
    captions = ["nothing special", "a dog .", "A DOG", "two dogs", "a cat , black ."]
    vectors = np.array([[0, 0, 1], [1, 0, 0], [1, 0, 0], [0.8, 0, 0.6], [0, 0.9, 0]])
    assert name_groups(labels, embeddings, captions, vectors) == ["A dog", "A cat, black"]
    assert name_groups(labels, embeddings, captions[:3], vectors[:3]) == ["A dog", "Nothing special"]
    assert name_groups(labels, embeddings, captions[1:3], vectors[1:3]) == ["A dog", ""]  # the same words are one name
    assert name_groups(labels, embeddings, [], np.empty((0, 3))) == ["", ""]
    assert name_groups(labels * 0, embeddings, captions, vectors) == ["Two dogs"]  # the middle is (2, 1, 1.5) / 3


def test_two_groups_that_want_the_same_name_share_out_the_best_two():
    """Scores of the caption both prefer: 1 and .9; of the other: 0 and .8. The sum is largest with 1 and .8."""
    embeddings = np.array([[1, 0, 0], [0.9, 0.8, 0], [-1.9, -0.8, 0]])  # their mean is 0
    names = name_groups(np.arange(3), embeddings, ["both", "other", "third"], np.eye(3))
    assert names == ["Both", "Other", "Third"]


def test_a_short_caption_is_preferred_to_a_nearer_long_one():
    long = " ".join(["word"] * (picture_map.MAX_WORDS + 1))
    embeddings, vectors = np.array([[1.0, 0]]), np.array([[1, 0], [0.6, 0.8]])
    assert name_groups(np.array([0]), embeddings, [long, "short"], vectors) == ["Short"]
    assert name_groups(np.array([0]), embeddings, [long], vectors[:1]) == [long.capitalize()]
    two = np.array([[1.0, 0], [0, 1]])  # one short caption is not enough for two groups
    assert name_groups(np.array([0, 1]), two, [long, "short"], np.eye(2)) == [long.capitalize(), "Short"]


@pytest.mark.parametrize(
    "caption, name", [("a dog 's ball , wet .", "A dog's ball, wet"), (" A  man\n! ", "A man!"), (".", ""), ("", "")]
)
def test_a_caption_is_tidied(caption, name):
    assert tidy(caption) == name


def test_cells_by_hand():
    """Four points want the same corner of a 3 x 3 grid: the first has it, the others the nearest free cells."""
    points = np.array([[0, 0], [0, 0], [0, 0], [0.05, 0.1]])
    cells = to_cells(points)
    first = cells[0]
    offsets = np.abs(cells[1:] - first)
    assert offsets.sum(axis=1).tolist() == [1, 1, 1] and len(set(map(tuple, cells.tolist()))) == 4
    many = np.random.default_rng(0).random((400, 2))
    moved = to_cells(many)
    assert len(set(map(tuple, moved.tolist()))) == 400
    side = np.ceil(np.sqrt(picture_map.CELLS_PER_PICTURE * 400))
    assert np.median(np.abs(moved - many * side).max(axis=1)) < 1.5  # cells


def test_a_square_shows_its_first_picture_and_keeps_it_when_zoomed_in():
    cells = np.array([[5, 5], [0, 1], [1, 1], [4, 4], [0, 0]])
    assert visible(cells, 0)[1].tolist() == [4, 1, 2, 3, 0]
    squares, positions = visible(cells, 1)
    assert squares.tolist() == [[0, 0], [2, 2]] and positions.tolist() == [1, 0]
    assert set(visible(cells, 3)[1]) < set(positions.tolist()) == {0, 1}


def test_the_most_typical_come_first():
    """Middles are (1, .1) and (0, 1)."""
    embeddings = np.array([[1, 0.2], [0, 1], [1, 0]])
    assert typical_first(np.array([0, 1, 0]), embeddings).tolist() == [0, 1, 2]


def test_thumbnails_are_where_the_page_looks_for_them(monkeypatch):
    monkeypatch.setattr(picture_map, "SHEET", 64)
    thumbnails = np.repeat(np.arange(0, 250, 50, dtype=np.uint8), 32 * 32 * 3).reshape(5, 32, 32, 3)
    addresses = sheets(thumbnails)
    decoded = [cv2.imdecode(np.frombuffer(base64.b64decode(a.partition(",")[2]), np.uint8), 1) for a in addresses]
    assert [sheet.shape for sheet in decoded] == [(64, 64, 3), (32, 64, 3)]
    middles = [decoded[0][16, 16], decoded[0][16, 48], decoded[0][48, 16], decoded[0][48, 48], decoded[1][16, 16]]
    assert np.abs(np.array(middles).mean(axis=1) - thumbnails[:, 0, 0, 0]).max() <= 3


def data_of(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


class Checker(html.parser.HTMLParser):
    """Fails where tags are not closed in order, and collects what they are and where they point to."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.addresses = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data", "poster")]
        if tag not in ("meta", "img", "link", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_complete_and_asks_no_network(written, paths):
    output, pictures = written
    text = output.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert not checker.open and not checker.addresses
    assert checker.tags.count("script") == 2 and not {"b", "i", "link", "iframe"} & set(checker.tags)
    assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r"file:///|data:[\w/;,+=]+", "", text))
    data = data_of(output)
    assert sorted(data["files"]) == sorted(path[len(os.path.dirname(paths[0])) + 1 :] for path in paths)
    assert [data["start"] + rest for rest in data["addresses"]] == [picture_map.file_address(p) for p in pictures.paths]
    assert len(data["cells"]) == len(data["labels"]) == 80
    for path, label in zip(pictures.paths, data["labels"]):
        assert data["names"][label] == ("A red picture" if path in paths[:40] else "A blue picture")


def test_addresses_can_be_those_of_a_page(written):
    text = page(written[1], lambda path: "/picture?n=" + str(len(path)))
    assert '"start":"/picture?n=' in text and "file:" not in text


def test_what_cannot_be_decoded_is_left_out_with_a_line(paths, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    some = [paths[0], str(broken), paths[50]]
    pictures = map_pictures(clusters(40)[[0, 1, 50]], some, [], np.empty((0, 16)), 2)
    assert sorted(pictures.paths) == sorted([paths[0], paths[50]])
    assert "left out" in capsys.readouterr().out
    for path, thumbnail in zip(pictures.paths, pictures.thumbnails):
        assert tuple(thumbnail[2, 2]) == HUES["red" if path == paths[0] else "blue"]
    with pytest.raises(UserError, match="none of the 1 pictures can be decoded"):
        map_pictures(clusters(40)[:1], [str(broken)], [], np.empty((0, 16)), 2)


def test_mistakes_are_named_before_anything_is_written(paths, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="must end in .html"):
        make_map(clusters(40), paths, [], np.empty((0, 16)), tmp_path / "map.png", 1)
    monkeypatch.setattr(picture_map, "MAX_PICTURES", 79)
    with pytest.raises(UserError, match="80 pictures, at most 79 fit"):
        make_map(clusters(40), paths, [], np.empty((0, 16)), tmp_path / "map.html", 1)
    assert not list(tmp_path.iterdir())


def test_the_png_shows_each_picture_in_the_place_of_its_cell(written):
    """The pictures are few, so that each is seen: the middle of a tile is its grey, and near the corner is its colour."""
    _, pictures = written
    image = np.asarray(draw(pictures)).astype(int)
    assert max(image.shape) <= picture_map.PNG_SIDE
    step = min(256, (picture_map.PNG_SIDE - 2 * picture_map.PNG_MARGIN) // (pictures.cells.max() + 1))
    hidden = 0  # under a name
    for (column, row), thumbnail in zip(pictures.cells, pictures.thumbnails):
        left, top = picture_map.PNG_MARGIN + step * np.array([column, row])
        shown = image[top + step // 2, left + step // 2], image[top + step // 8, left + step // 8]
        hidden += np.abs(np.array(shown) - [thumbnail[128, 128], thumbnail[32, 32]]).max() > 8
    assert hidden < len(pictures.paths) / 4


# ---- the page in a browser ----


@pytest.fixture
def opened(browser, written):
    """A function that opens the map: it fails where the page has errors or asks for anything but files and data."""
    pages = []

    def open_now(**options):
        tab = browser.new_page(**({"viewport": {"width": 1200, "height": 800}} | options))
        wrong = []
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url))
        tab.goto(written[0].as_uri())
        tab.wait_for_function("sheets.every(sheet => sheet.complete) && !waiting")
        pages.append((tab, wrong))
        return tab

    yield open_now
    for tab, wrong in pages:
        assert not wrong
        tab.close()


def place_of(tab, i):
    """Where in the window picture i is: x and y of the middle of its cell."""
    box = tab.locator("#map").bounding_box()
    x, y = tab.evaluate("i => toScreen(cells[i][0] + .5, cells[i][1] + .5)", i)
    return box["x"] + x, box["y"] + y


def grid_at(tab, place):
    """Column and row of the grid at a place in the window."""
    box = tab.locator("#map").bounding_box()
    return tab.evaluate("([x, y]) => toGrid(x, y)", [place[0] - box["x"], place[1] - box["y"]])


def test_pointing_shows_the_picture_larger_and_zooming_keeps_it_in_place(opened, written):
    _, pictures = written
    tab = opened()
    hostile = next(i for i, path in enumerate(pictures.paths) if path.endswith(HOSTILE))
    place = [round(value) for value in place_of(tab, hostile)]
    before = grid_at(tab, place)
    tab.mouse.move(*place)
    for _ in range(8):
        tab.mouse.wheel(0, -240)
    tab.wait_for_function("levelNow() === 0")
    assert grid_at(tab, place) == pytest.approx(before, abs=0.1)  # what the mouse is on stays there, within a pixel
    assert tab.locator("#preview .file").inner_text() == HOSTILE
    assert tab.locator("#preview img").get_attribute("alt") == HOSTILE
    tab.wait_for_function("document.querySelector('#preview img').naturalWidth === 64")  # of the file, not of the thumbnail
    assert tab.locator("#preview .group").inner_text() == "group: A red picture"
    SCREENSHOTS.mkdir(exist_ok=True)
    tab.screenshot(path=SCREENSHOTS / "map.png")
    tab.mouse.click(*place)
    dialog = tab.get_by_role("dialog")
    assert dialog.get_by_role("link").get_attribute("href") == picture_map.file_address(pictures.paths[hostile])
    tab.keyboard.press("Escape")
    assert not dialog.is_visible()
    tab.get_by_role("button", name="Show all").click()
    assert tab.evaluate("view.x") == pytest.approx(tab.evaluate("columns / 2"), abs=1)


def test_a_picture_that_is_gone_is_shown_as_its_thumbnail(opened, written, tmp_path):
    tab = opened()
    tab.evaluate("data.start = 'file:///not/there/'")
    tab.mouse.move(*place_of(tab, 0))
    tab.locator("#preview").wait_for()
    tab.wait_for_function("document.querySelector('#preview img').complete")
    side = written[1].thumbnails.shape[1]
    assert tab.evaluate("document.querySelector('#preview img').naturalWidth") == side
    shown = tab.evaluate(
        """() => { const c = document.createElement('canvas'); const x = c.getContext('2d');
        x.drawImage(document.querySelector('#preview img'), 0, 0); return [...x.getImageData(4, 4, 1, 1).data].slice(0, 3) }"""
    )
    assert np.abs(np.array(shown) - written[1].thumbnails[0, 4, 4]).max() < 25  # a JPEG


def test_keys_zoom_move_and_show_all(opened):
    tab = opened(color_scheme="dark")
    tab.locator("#map").focus()
    before = tab.evaluate("({...view})")
    for key, changed in (("+", "scale"), ("ArrowRight", "x"), ("ArrowDown", "y")):
        tab.keyboard.press(key)
        assert tab.evaluate(f"view.{changed}") > before[changed]
    assert tab.locator("#preview .file").inner_text() in tab.get_by_role("status").text_content()
    tab.keyboard.press("Enter")
    tab.get_by_role("dialog").wait_for()
    tab.keyboard.press("Escape")
    tab.keyboard.press("0")
    assert tab.evaluate("({...view})") == pytest.approx(before)


def test_two_fingers_zoom_and_a_tap_opens_on_a_phone(opened):
    tab = opened(viewport={"width": 400, "height": 800}, has_touch=True, is_mobile=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    before = tab.evaluate("view.scale")
    session = tab.context.new_cdp_session(tab)

    def touch(kind, *points):
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]})

    touch("touchStart", (180, 400), (220, 400))
    for apart in (40, 60, 80):
        touch("touchMove", (200 - apart, 400), (200 + apart, 400))
    touch("touchEnd")
    assert tab.evaluate("view.scale") == pytest.approx(4 * before, rel=0.05) or tab.evaluate("view.scale === LARGEST")
    assert not tab.get_by_role("dialog").is_visible()
    tab.get_by_role("button", name="Show all").tap()
    tab.touchscreen.tap(*place_of(tab, 0))
    tab.get_by_role("dialog").wait_for()


def test_a_group_is_found_by_its_name(opened):
    tab = opened()
    tab.get_by_role("button", name="A blue picture").click()
    middle = tab.evaluate("[view.x, view.y]")
    label = tab.evaluate("names.indexOf('A blue picture')")
    assert np.abs(np.subtract(middle, tab.evaluate(f"groups[{label}].middle"))).max() < 3
