"""Match probabilities and what is probably not there, on made embeddings and captions whose answers are known."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import inference
from evaluation.relevance import fit_relevance, make_references, sample, write_relevance
from search import relevance
from search.options import read_search
from search.queries import as_queries, judge, probably_nothing
from search.relevance import References, Relevance, load_relevance
from utils.errors import UserError
from utils.words import content_words

NOUNS = [
    f"{first}{second}" for first in ("dog", "cat", "boy", "girl", "car") for second in ("ix", "or", "um", "el", "at", "on")
]
WIDTH = 64


def embed(texts):
    """A text's embedding: the mean of its words' fixed directions."""
    vectors = []
    for text in texts:
        words = sorted(content_words(text)) or ["a"]
        seeds = [int.from_bytes(word.encode()[-4:], "big") for word in words]
        vectors.append(np.mean([np.random.default_rng(seed).normal(size=WIDTH) for seed in seeds], axis=0))
    return normalized(vectors)


def normalized(vectors):
    vectors = np.array(vectors, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def made_pictures(count, seed, noise=0.3):
    """count pictures of two things each, with two captions: (I_v, captions, image_of_text). Early nouns are more common."""
    rng = np.random.default_rng(seed)
    common = 1 / (1 + np.arange(len(NOUNS)))
    things = [rng.choice(NOUNS, 2, replace=False, p=common / common.sum()) for _ in range(count)]
    captions = [caption for one, other in things for caption in (f"A {one} and a {other} .", f"There is a {other} .")]
    I_e = embed([" ".join(pair) for pair in things])
    I_e = normalized(I_e + noise * rng.normal(size=I_e.shape) / WIDTH**0.5)
    return np.pad(I_e, ((0, 0), (0, 1))), captions, np.repeat(np.arange(count), 2)


def searching(folder):
    """What `judge` needs of a `Searcher`."""
    return SimpleNamespace(relevance=load_relevance(folder), embed_texts=embed)


def search(searcher, I_v, text):
    query = as_queries(embed([text]))[0]
    scores = I_v @ query
    best = np.argsort(-scores)[:9]
    return judge([(int(i), float(scores[i])) for i in best], searcher, text, query)


def test_chances_hold_on_pictures_they_were_not_learned_from_and_what_is_not_there_is_said(tmp_path):
    found = write_relevance(tmp_path, *made_pictures(400, 0), embed)
    assert found["images"] == 200 and found["calibration_error"] < 10 and found["nothing_wrongly"] == 0
    assert found["wrong_above_floor"] < 0.5 and found["right_above_floor"] > 20
    I_v, captions, image_of_text = made_pictures(300, 1)
    searcher = searching(tmp_path)
    for noun in NOUNS[:6]:
        matches = search(searcher, I_v, f"a photo of {noun}s")
        shown = [noun in "".join(captions[2 * match.filename : 2 * match.filename + 2]) for match in matches]
        assert not probably_nothing(matches) and abs(np.mean([match.probability for match in matches]) - np.mean(shown)) < 0.3
    for absent in ("elephant", "a spaceship", "a photo of a submarine"):
        assert probably_nothing(search(searcher, I_v, absent)), absent


def test_a_word_that_no_caption_has_counts_as_the_one_that_means_the_same():
    known = np.eye(3, dtype=np.float32)
    near = np.array([[0.9, np.sqrt(1 - 0.9**2), 0]], dtype=np.float32)
    far = np.array([[0.8, 0, 0.6]], dtype=np.float32)
    references = References(np.zeros((2, 4)), known, {"dog": 0.2, "cat": 0.1, "car": 0.001})
    made = {"canine": near, "wolf": far}
    log_shares = references.log_shares({"dog", "car", "canine", "wolf"}, lambda words: np.concatenate([made[w] for w in words]))
    expected = {"dog": 0.2001, "car": 0.0011, "canine": 0.2001, "wolf": 0.0001}
    assert log_shares == pytest.approx({word: np.log(share) for word, share in expected.items()})


def test_statistics_of_a_text_by_hand():
    pictures = np.array([[1, 0, 0], [0, 1, 0], [-1, 0, 0.5]])
    references = References(pictures, np.eye(2), {"dog": 0.0999, "snow": 0.0009})
    found = references.statistics(["dogs in snow", "of the"], np.array([[1.0, 0, 1], [0, 1, 1]]), None)
    low = np.quantile([1, 0, -0.5], 0.16)
    assert found[0] == pytest.approx([0.5 / 3, 0 - low, np.log(0.1 * 0.001) / 2, np.log(2)])
    assert found[1][2:] == pytest.approx([0, 0])  # no word that says what is seen


def test_words_of_one_caption_alone_are_no_references():
    references = make_references(
        np.zeros((1, 3)), ["A dog .", "Dogs .", "A spaceshipp ."], lambda words: np.ones((len(words), 2))
    )
    assert references.shares == {"dog": pytest.approx(2 / 3)} and references.word_embeddings.shape == (1, 2)


def test_many_captions_are_sampled_evenly_over_the_images():
    rows = np.concatenate([np.zeros(60_000, dtype=int), np.repeat(np.arange(1, 500), 4)])  # nearly all are of one image
    I_v, captions, image_of_text = sample(np.arange(500)[:, None], [str(row) for row in rows], rows, np.random.default_rng(0))
    assert np.bincount(image_of_text).tolist().count(4) == 499 and np.bincount(image_of_text).max() == 10
    assert [str(I_v[image, 0]) for image in image_of_text] == captions
    I_v, captions, _ = sample(np.zeros((3000, 2)), ["x"] * 9000, np.repeat(np.arange(3000), 3), np.random.default_rng(0))
    assert len(I_v) == 1000 and len(captions) == 3000


def test_floors_and_probabilities_are_read_off_their_curves(tmp_path):
    references = References(np.zeros((200, 3)), np.zeros((1, 2)), {"dog": 0.5})
    known = Relevance(references, [2.0, 0, 0, 0, 0], [0.1, 0.001], [1.0, 3.0], [0.9, 0.5], [0.0, 2.0], [0.0, 0.5])
    assert known.floor(0.1) == 1 and known.floor(0.01) == pytest.approx(2) and known.floor(1e-9) == 3
    assert known.floor(0) == -np.inf
    found = [("a", 1.6), ("b", 0.6), ("c", 0.2)]  # corrected 3.2, 1.2, 0.4
    searcher = SimpleNamespace(relevance=known, embed_texts=None)
    matches = judge(found, searcher, "dog", np.zeros(3, np.float32), 0.1)
    assert [(match.filename, match.relevant) for match in matches] == [("a", True), ("b", True), ("c", False)]
    assert [match.probability for match in matches] == pytest.approx([0.5, 0.3, 0.1])
    assert [match.is_likely for match in matches] == [True, False, False] and not probably_nothing(matches)
    assert judge(found, searcher, "the two", np.zeros(3, np.float32))[0].probability is None  # says nothing of what is seen
    assert judge(found, searcher)[0].probability is None and not probably_nothing(judge(found, searcher))
    known.save(tmp_path)
    read = load_relevance(tmp_path)
    assert read.floor(0.01) == known.floor(0.01) and read.references.shares == {"dog": 0.5}
    (tmp_path / relevance.JSON_FILE).write_text("{")
    with pytest.raises(UserError, match="damaged .*evaluate.py calibrate"):
        load_relevance(tmp_path)
    (tmp_path / relevance.WORDS_FILE).unlink()  # as an earlier version left it, whose probabilities were of whole captions
    assert load_relevance(tmp_path) is None and load_relevance(tmp_path / "nowhere") is None


def test_no_picture_is_a_match_for_certain():
    references = References(np.zeros((200, 3)), np.zeros((1, 2)), {"dog": 0.5})
    known = Relevance(references, [1.0, 0, 0, 0, 0], [0.1, 0.001], [1.0, 3.0], [0.9, 0.5], [0.0, 2.0], [0.0, 1.0])
    (match,) = judge([("a", 5.0)], SimpleNamespace(relevance=known, embed_texts=None), "dog", np.zeros(3, np.float32))
    assert match.label().strip() == "99.9%" and match.record()["probability"] < 1


@pytest.mark.parametrize("count", [1, 199])
def test_too_few_images_are_named(tmp_path, count):
    with pytest.raises(UserError, match=f"{count} images with captions: match probabilities need 200"):
        write_relevance(tmp_path, *made_pictures(count, 0), embed)
    assert not list(tmp_path.iterdir())


def test_captions_that_teach_nothing_are_named(tmp_path):
    I_v, captions, image_of_text = made_pictures(200, 0)
    with pytest.raises(UserError, match="nearly the same of all images"):
        write_relevance(tmp_path, I_v, ["A dog ."] * len(captions), image_of_text, embed)
    with pytest.raises(UserError, match="captions have no words"):
        write_relevance(tmp_path, I_v, ["of the"] * len(captions), image_of_text, embed)


def test_a_model_that_knows_nothing_still_has_chances(tmp_path):
    I_v, captions, image_of_text = made_pictures(200, 0)
    found = write_relevance(tmp_path, -I_v, captions, image_of_text, embed)
    assert np.isfinite(found["right_above_floor"]) and load_relevance(tmp_path).weights[0] > 0


@pytest.fixture
def judged(run, tmp_path):
    """A run whose own validation images were too few, with chances learned elsewhere, and flags that search it."""
    run = shutil.copytree(run, tmp_path / "run")

    def embed_wide(texts):
        return np.pad(embed(texts), ((0, 0), (0, 256 - WIDTH)))

    I_v, captions, image_of_text = made_pictures(200, 0)
    I_v = np.pad(I_v, ((0, 0), (0, 256 - WIDTH)))
    write_relevance(run, I_v, captions, image_of_text, embed_wide)
    files = ["--output", str(tmp_path / "m.png"), "--json", str(tmp_path / "f")]
    return run, ["--run", str(run), "--cache-dir", str(tmp_path), *files]


def answer_of(judged, *words):
    run, flags = judged
    inference.search(read_search([*words, *flags]))
    return json.loads((run.parent / "f").read_text())


def test_the_best_are_shown_always_and_a_floor_cuts_only_where_it_is_given(judged, capsys):
    learned = json.loads((judged[0] / relevance.JSON_FILE).read_text())
    out_of_reach = learned | {"floors": [floor + 1000 for floor in learned["floors"]]}
    (judged[0] / relevance.JSON_FILE).write_text(json.dumps(out_of_reach))
    strict = answer_of(judged, "a red circle", "--floor", "0.001")
    assert "nothing here is above --floor (best guess below)" in capsys.readouterr().out
    everything = answer_of(judged, "a red circle")
    assert strict["matches"] == [] and len(everything["matches"]) == 9
    assert all(0 <= match["probability"] <= 1 for match in everything["matches"])
    assert strict["best_guess"]["filename"] == everything["matches"][0]["filename"]
    assert strict["best_guess"]["score"] == pytest.approx(everything["matches"][0]["score"], abs=1e-6)
    assert answer_of(judged, "a red circle", "--more", "1", "--n", "3")["matches"] == everything["matches"][3:6]
    differences = answer_of(judged, "a red circle", "--minus", "a blue square")
    assert len(differences["matches"]) == 9 and "probability" not in differences["matches"][0]
    capsys.readouterr()
    assert answer_of(judged, "a red circle", "--minus", "a blue square", "--floor", "0.1") == differences
    assert "--floor: was learned from single texts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("chances", "says"),
    [
        ([0.9, 0.9], "'a star':\n"),
        ([0.3, 0.9], "'a star':\n  less likely:"),
        ([0.01, 0.01], "'a star': probably nothing here; "),
    ],
)
def test_what_is_said_beside_the_grid(judged, capsys, chances, says):
    learned = json.loads((judged[0] / relevance.JSON_FILE).read_text())
    changed = learned | {"weights": [1.0, 0, 0, 0, 0], "scores": [-1.0, 5.0], "probabilities": chances}
    (judged[0] / relevance.JSON_FILE).write_text(json.dumps(changed))
    answer = answer_of(judged, "a star")
    said = capsys.readouterr().out
    assert says in said and len(answer["matches"]) == 9 and answer.get("probably_nothing", False) == ("nothing" in says)
    assert "nothing" not in said or "nothing" in says


def test_calibrate_writes_what_a_search_says(run, sample, tmp_path, evaluate_here, capsys, monkeypatch):
    run = shutil.copytree(run, tmp_path / "run")
    assert not (run / relevance.JSON_FILE).exists()  # its validation images are too few
    monkeypatch.setattr("evaluation.relevance.MIN_IMAGES", 20)
    evaluate_here("calibrate", "--run", run, "--json", tmp_path / "f", "--split", "val")
    assert "match probabilities: on 12 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "f").read_text())["images"] == 12 and (run / "relevance.png").exists()
    shares = json.loads((run / relevance.JSON_FILE).read_text())["words"]
    assert "circle" in shares and 0 < shares["circle"] < 1


def test_an_older_run_is_searched_and_says_how_to_get_chances(run, tmp_path, capsys):
    run = shutil.copytree(run, tmp_path / "run")
    (run / relevance.JSON_FILE).write_text('{"weights": [1, 0, 0]}')
    answer = answer_of((run, ["--run", str(run), "--cache-dir", str(tmp_path), "--output", str(tmp_path / "m.png"),
                              "--json", str(tmp_path / "f")]), "a star")  # fmt: skip
    assert f"python evaluate.py calibrate --run {run} learns them" in capsys.readouterr().out
    assert len(answer["matches"]) == 9 and "probability" not in answer["matches"][0]


def test_weights_by_a_hand_made_table():
    """Two texts: all scores of the second are higher by 1, and so is its mean, so the mean counts as much, negatively."""
    rng = np.random.default_rng(0)
    right = rng.random((200, 50)) < 0.2
    raised = np.arange(200) % 2
    scores = right + 0.4 * rng.normal(size=right.shape) + raised[:, None]
    statistics = np.stack([raised, np.zeros(200), np.zeros(200), np.zeros(200)], axis=1)
    searches = SimpleNamespace(scores=scores, statistics=statistics, right=right, wrong=~right,
                               corrected=lambda w: w[0] * scores + (statistics @ w[1:])[:, None])  # fmt: skip
    learned = fit_relevance(None, [searches])
    assert learned.weights[1] == pytest.approx(-learned.weights[0], rel=0.1)
    chances = learned.probability(searches.corrected(np.array(learned.weights)))
    assert chances.mean() == pytest.approx(right.mean(), abs=0.01)
