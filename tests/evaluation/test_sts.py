"""Semantic textual similarity: file layouts and correlations."""

import itertools
import json

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

import clip
from Datasets import shapes
from evaluation.sts import correlations, read_pairs
from utils.errors import UserError

PAIRS = [(5.0, "A plane is taking off.", 'An "air" plane, taking off.'), (0.5, "A man plays.", "A dog runs.")]
LAYOUTS = {
    "stsb.csv": "main-captions\tMSRvid\t2012test\t0001\t{0}\t{1}\t{2}",
    "stsb-with-source.csv": "main-captions\tMSRvid\t2012test\t0001\t{0}\t{1}\t{2}\tsource\tlicence",
    "documented.tsv": "main-captions\tMSRvid\t2012test\t{0}\t{1}\t{2}",
    "plain.tsv": "{0}\t{1}\t{2}",
    "header.tsv": "index\tsentence1\tsentence2\tscore\n7\t{1}\t{2}\t{0}",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_with_tabs(tmp_path, name):
    header, _, row = LAYOUTS[name].rpartition("\n")
    lines = [row.format(*pair) for pair in PAIRS]
    (tmp_path / name).write_text("\n".join([*([header] if header else []), *lines]) + "\r\n")
    assert read_pairs(tmp_path / name) == PAIRS


@pytest.mark.parametrize("header", ["", "score,sentence1,sentence2\n"])
def test_layouts_with_commas(tmp_path, header):
    rows = 'A plane is taking off.,"An ""air"" plane, taking off."', "A man plays.,A dog runs."
    (tmp_path / "table.csv").write_text(header + f"5.0,{rows[0]}\n0.5,{rows[1]}\n")
    assert read_pairs(tmp_path / "table.csv") == PAIRS


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "empty"),
        ("1\ta\tb\n\tc\td\n", "row 2: no score in column 1"),
        ("1\ta\tb\n2\tc\n", "row 2: no score in only 2 columns"),
        ("a\tb\n", "row 1: 2 columns and no header"),
        ("sentence1,sentence2,score\na,b,x\n", "row 2: no score in column 3"),
    ],
)
def test_bad_tables_name_the_row(tmp_path, text, expected):
    (tmp_path / "bad.tsv").write_text(text)
    with pytest.raises(UserError, match=expected):
        read_pairs(tmp_path / "bad.tsv")


def test_correlations_by_hand():
    # Ranks of people: 1, 2.5, 2.5, 4; of cosines: 2, 1, 3, 4. Deviations: -1.5, 0, 0, 1.5 and -0.5, -1.5, 0.5, 1.5.
    scores = correlations([0.0, 2.0, 2.0, 5.0], [0.2, 0.1, 0.3, 0.9])
    assert scores["spearman"] == pytest.approx(100 * 3.0 / (4.5 * 5) ** 0.5)
    people, cosines = np.array([-2.25, -0.25, -0.25, 2.75]), np.array([-0.175, -0.275, -0.075, 0.525])
    assert scores["pearson"] == pytest.approx(100 * people @ cosines / (people @ people * (cosines @ cosines)) ** 0.5)
    assert scores["pairs"] == 4
    with pytest.raises(ValueError, match="all scores are the same"):
        correlations([1.0, 1.0], [0.1, 0.2])


def test_the_command_correlates_cosines_with_scores(run, tmp_path, evaluate_here):
    sentences = ["a red circle", "a blue star on sand", "a small green ring", "two shapes", "a large box at the top"]
    rows = [(number / 2, *pair) for number, pair in enumerate(itertools.combinations(sentences, 2))]
    for name, chosen in (("a.tsv", rows), ("b.tsv", rows[1:])):
        (tmp_path / name).write_text("\n".join("\t".join(map(str, row)) for row in chosen))
    files = [tmp_path / "a.tsv", tmp_path / "b.tsv"]
    evaluate_here("sts", "--run", run, "--file", *files, "--precision", "fp32", "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    model, _ = clip.load(str(run), device="cpu")
    expected = []
    for name, chosen in (("a.tsv", rows), ("b.tsv", rows[1:])):
        people, first, second = zip(*chosen)
        with torch.no_grad():
            cosines = F.cosine_similarity(model.encode_text(clip.tokenize(first)), model.encode_text(clip.tokenize(second)))
        row = scores["files"][name]
        expected.append(100 * scipy.stats.spearmanr(people, cosines.numpy()).statistic)
        assert row["pairs"] == len(chosen)
        assert row["spearman"] == pytest.approx(expected[-1], abs=1e-3)
        assert row["pearson"] == pytest.approx(100 * scipy.stats.pearsonr(people, cosines.numpy()).statistic, abs=1e-3)
    assert scores["average"]["spearman"] == pytest.approx(np.mean(expected), abs=1e-3)


def test_drawn_pairs_are_rated_by_what_they_share():
    """Read back from the words: each trait's synonyms name one value, so equal values can be counted."""
    values = {"color": {k: v[0] for k, v in shapes.COLORS.items()}, "shape": shapes.SHAPES, "cell": shapes.PLACES}
    values["size"] = {name: words for name, (words, _) in shapes.SIZES.items()}
    pairs = shapes.rated_pairs(300)

    def read(caption):
        padded = f" {caption} "
        found = {}
        for trait, names in values.items():
            hits = [(len(word), name) for name, words in names.items() for word in words if f" {word} " in padded]
            found[trait] = max(hits)[1]  # "in the middle of the top edge" also has "in the middle"
        return found

    for rating, *captions in pairs:
        first, second = map(read, captions)
        assert rating == 1 + sum(first[trait] == second[trait] for trait in values)
    assert {rating for rating, *_ in pairs} == {1, 2, 3, 4, 5}
    assert pairs[:20] == shapes.rated_pairs(20) != shapes.rated_pairs(20, seed=1)
