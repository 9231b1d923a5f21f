"""Texts that are not the project's own: queries, file names and captions with any character, printed and drawn."""

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from PIL import Image

import clip
import inference
from search.options import read_search
from search.queries import read_queries
from utils import plots
from utils.errors import UserError
from utils.folders import printable

NAMES = ("cost $5 or $x_{$.png", "line\nbreak.png", "bell\x07\x1b[31mred.png", "\u5c71.png", "n" * 200 + ".png")


@pytest.fixture(scope="module")
def named(sample, tmp_path_factory):
    """Five pictures with such names."""
    folder = tmp_path_factory.mktemp("named")
    for path, name in zip(sorted((sample / "Images").iterdir()), NAMES):
        (folder / name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def search_named(run, named, tmp_path, search_here):
    def search(*more, json_file=tmp_path / "found.json"):
        flags = ["--run", run, "--images", named, "--cache-dir", tmp_path / "cache", "--output", tmp_path / "m.png"]
        search_here(*flags, "--json", json_file, *more)
        return json.loads(json_file.read_text())

    return search


@pytest.mark.drawn
def test_a_dollar_in_a_query_and_in_names_is_drawn_as_it_stands(search_named, named, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = search_named("a $5 ring $x_{$")
    assert Image.open(tmp_path / "m.png").width > 300 and len(found["matches"]) == 5
    lines = capsys.readouterr().out.splitlines()
    folder = str(named.resolve())
    shown = {line.partition(folder)[2] for line in lines if folder in line and "/" in line.partition(folder)[2]}
    expected = {"/cost $5 or $x_{$.png", "/line\\nbreak.png", "/bell\\x07\\x1b[31mred.png", "/\u5c71.png", f"/{NAMES[4]}"}
    assert expected <= shown
    found = search_named("--image", named / NAMES[0])
    assert len(found["matches"]) == 5
    search_named("--duplicates")
    assert Image.open(tmp_path / "m.png").width > 100


def test_all_plots_take_texts_literally(tmp_path):
    odd = ["$x_{$ one", "two $5"]
    picture = np.zeros((20, 20, 3), np.uint8)
    plots.draw_confusion(odd, np.eye(2), tmp_path / "confusion.png")
    plots.draw_similarity([picture] * 2, odd, np.eye(2), tmp_path / "similarity.png")
    plots.draw_bars(odd, [1, 2], [0, 0], odd[0], tmp_path / "bars.png")
    plots.draw_points(odd, [(1, 0), (2, 0)], [(1, 0), (2, 0)], odd[0], odd[1], tmp_path / "points.png")
    plots.draw_lines({odd[0]: {odd[0]: ([1, 2], [1, 2])}}, odd[0], odd[1], tmp_path / "lines.png")
    plots.draw_matches([(odd[0], [picture], [odd[1]], None)], tmp_path / "matches.png")
    plots.draw_generated(odd[0], odd, [picture] * 2, [picture] * 2, tmp_path / "generated.png")
    plots.draw_grid("\udce9 $", [picture], ["\udce9"], tmp_path / "grid.png")
    assert len(list(tmp_path.glob("*.png"))) == 8


def test_powers_of_ten_on_an_axis_stay_formulas(tmp_path):
    figure, axes = plots.plt.subplots()
    axes.plot([1, 1000], [1, 2])
    axes.set_xscale("log")
    plots.take_literally(figure)
    assert all(label.get_parse_math() for label in axes.get_xticklabels())
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())
    plots.plt.close(figure)


def test_a_long_query_leaves_room_for_the_pictures(tmp_path):
    picture, sizes = np.zeros((20, 20, 3), np.uint8), []
    for query in ("a dog", "a dog on a beach " * 60, "x" * 1000):
        plots.draw_grid(query, [picture] * 9, ["1.png"] * 9, tmp_path / "grid.png")
        sizes.append(Image.open(tmp_path / "grid.png").size)
    assert all(abs(width - sizes[0][0]) < 60 and abs(height - sizes[0][1]) < 60 for width, height in sizes)


def test_results_are_kept_where_they_cannot_be_drawn(search_named, monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("no such glyph\nand more")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(UserError, match=r"not drawn \(no such glyph\); the results above are complete"):
        search_named("a ring")
    assert "$5" in capsys.readouterr().out


def test_results_are_in_the_json_file_where_they_cannot_be_drawn(search_named, monkeypatch, tmp_path):
    monkeypatch.setattr(inference, "draw_matches", lambda *_: 1 / 0)
    for more in (("a ring",), ("--image", str(tmp_path / "p.png"))):
        Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
        (tmp_path / "found.json").unlink(missing_ok=True)
        with pytest.raises(UserError, match="not drawn"):
            search_named(*more)
        assert len(json.loads((tmp_path / "found.json").read_text())["matches"]) == 5


def test_more_past_the_end_says_so_and_draws_nothing(search_named, named, tmp_path, capsys):
    for query in (("a ring",), ("--image", named / NAMES[0]), ("--similar-to", named / NAMES[0])):
        assert search_named(*query, "--more", "7")["matches"] == []
        assert "no more pictures" in capsys.readouterr().out
    assert not (tmp_path / "m.png").exists()


def test_an_empty_output_draws_nothing(search_named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(search_named("a ring", "--output", "")["matches"]) == 5
    assert "drawn" not in capsys.readouterr().out and not list(tmp_path.glob("*.png"))


def test_find_matches_wants_one_match_at_least_and_unicode(run):
    model, names = clip.load(run, device="cpu")[0], ["a.png", "b.png"]
    for n in (0, -1):
        with pytest.raises(UserError, match=f"n={n}; must be at least 1"):
            inference.find_matches(model, np.eye(2, 256), "a ring", names, n=n)
    with pytest.raises(UserError, match="is not UTF-8"):
        inference.find_matches(model, np.eye(2, 256), "caf\udce9", names)


def test_texts_of_the_command_line_that_are_no_utf8_are_read_or_refused(run, capsys):
    options = read_search(["caf\udce9 au lait", "--minus", "gar\udce7on", "--folder", "\udcc9t\udce9/*", "--run", str(run)])
    assert (options.query, options.minus, options.folder) == (("caf\u00e9 au lait",), ("gar\u00e7on",), "\u00c9t\u00e9/*")
    assert "read in cp1252" in capsys.readouterr().out
    with pytest.raises(UserError, match="query .*is not UTF-8"):
        read_search(["\udc81\udc8d", "--run", str(run)])


def test_a_process_answers_bytes_that_are_no_text_in_one_line(run, tmp_path):
    command = [sys.executable, ROOT / "inference.py", b"\x81\x8d", "--run", run, "--cache-dir", tmp_path]
    done = subprocess.run(list(map(os.fsencode, command)), capture_output=True, cwd=ROOT, timeout=200)
    assert done.returncode == 2 and b"Traceback" not in done.stderr and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp1252"])
def test_a_query_file_is_one_query_a_line_in_the_encodings_of_spreadsheets(tmp_path, encoding):
    (tmp_path / "q.txt").write_bytes("un caf\u00e9\r\na dog\x0cand a cat\r\n\r\na ring\r\n".encode(encoding))
    assert read_queries(tmp_path / "q.txt") == ["un caf\u00e9", "a dog\x0cand a cat", "a ring"]


def test_a_query_file_is_not_split_at_other_separators(tmp_path):
    (tmp_path / "q.txt").write_text("a\u2028b\nc\x0bd\ne\x85f\n", encoding="utf-8")
    assert read_queries(tmp_path / "q.txt") == ["a\u2028b", "c\x0bd", "e\x85f"]


def test_names_are_one_line_and_keep_their_letters():
    assert printable("a\nb\r\t\x1b\u2028c") == "a\\nb\\r\\t\\x1b\\u2028c"
    assert printable("\u5c71 \u00e9\u00a0\u200d\U0001f469") == "\u5c71 \u00e9\u00a0\u200d\U0001f469"


def test_words_beside_image_are_answered_with_the_flag_that_takes_both(run):
    with pytest.raises(UserError, match='"a ring" --similar-to p.png'):
        read_search(["a ring", "--image", "p.png", "--run", str(run)])


def test_sums_and_differences_show_the_best_whatever_the_floor(run, sample, tmp_path, search_here, capsys):
    flags = ["--run", run, "--cache-dir", tmp_path, "--output", "", "--json", tmp_path / "found.json"]
    for floor in ([], ["--floor", "0.0001"]):
        for query in (["a red circle", "--minus", "a blue square"], ["a red circle", "a ring", "--weights", "1", "0.1"]):
            search_here(*query, *flags, *floor)
            found = json.loads((tmp_path / "found.json").read_text())
            assert len(found["matches"]) == 9 and "best_guess" not in found
        assert ("none is left out" in capsys.readouterr().out) == bool(floor)
