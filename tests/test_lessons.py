"""Lessons: what is trained, kept and reported, and the mistakes of a command line."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from conftest import run_script

import lessons
from captions import load_captions
from config import PRESETS, SHAPES
from Datasets import shapes
from experiments import materials, measures, report, runner
from experiments.lesson import Learn, Lesson
from utils.errors import UserError

TINY = {"text_width": 16, "text_layers": 1, "text_heads": 1, "batch_size": 32, "epochs": 1, "size": 32}


@pytest.fixture
def lesson(sample, tmp_path, monkeypatch):
    """A lesson of two variants on the small sample, whose trainings run in this process."""
    base = TINY | {"data_dir": str(sample), "cache_dir": str(tmp_path / "cache")}
    variants = {"learned": {}, "fixed at 0.2": {"temperature": 0.2}}
    measured = ("rsum", "last temperature", "twins, percent", "alignment", "uniformity", "STS, Spearman", "seconds in all")
    tiny = Lesson("Must it?", "Perhaps.", variants, measured, minutes=1, base=base, quick={"epochs": 1})
    monkeypatch.setitem(lessons.LESSONS, "tiny", tiny)
    monkeypatch.setattr(measures, "NUM_TWINS", 10)
    trained = []

    def train_all(jobs, workers):
        for job in jobs:
            trained.append((job.variant, job.seed))
            runner.run_job(job)

    monkeypatch.setattr(lessons, "train_all", train_all)
    return trained


@pytest.mark.drawn
def test_a_lesson_trains_each_variant_with_each_seed_once_and_reports(lesson, tmp_path, capsys):
    output = tmp_path / "out"
    lessons.learn(Learn("tiny", seeds=(0, 1), output=str(output), device="cpu"))
    names = ("learned", "fixed at 0.2")
    assert lesson == [(name, seed) for seed in (0, 1) for name in names]
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert list(results["variants"]) == list(names) and (output / "plot.png").stat().st_size > 1000
    fixed = results["variants"]["fixed at 0.2"]
    assert [run["seed"] for run in fixed] == [0, 1]
    assert [run["measured"]["last temperature"] for run in fixed] == pytest.approx([0.2, 0.2])
    table = (output / "table.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out and table.count("\n") == 4 and " ± " in table
    lessons.learn(Learn("tiny", seeds=(0, 1, 2), output=str(output), device="cpu"))
    assert lesson[4:] == [(name, 2) for name in names]  # the others are there already
    lessons.learn(Learn("tiny", seeds=(2,), output=str(output), device="cpu", force=True))
    assert len(lesson) == 8
    changed = replace(lessons.LESSONS["tiny"], base=lessons.LESSONS["tiny"].base | {"weight_decay": 0.5})
    lessons.LESSONS["tiny"] = changed
    lessons.learn(Learn("tiny", seeds=(2,), output=str(output), device="cpu"))
    assert len(lesson) == 10  # with other settings what is there does not count


def test_a_cell_has_mean_and_standard_deviation_by_hand():
    assert report.cell([10.0, 12.0, 14.0]) == "12.0 ± 2.0"
    assert report.cell([0.25]) == "0.250"
    assert report.mean_and_spread([3.0]) == (3.0, 0.0)


@pytest.mark.parametrize("name", lessons.LESSONS)
def test_a_lessons_variants_are_valid_and_differ(name, tmp_path):
    lesson = lessons.LESSONS[name]
    for quick in (False, True):
        jobs = runner.make_jobs(lesson, lesson.preset, {"device": "cpu"}, (0,), tmp_path, quick)
        assert [job.variant for job in jobs] == list(lesson.variants)
        if not quick:
            assert len({job.key for job in jobs}) == len(jobs)
    assert set(lesson.measures) <= set(measures.MEASURES) and lesson.preset in PRESETS


def test_what_is_unknown_or_cannot_be_written_is_a_users_mistake(tmp_path):
    for arguments, message in (
        (["temprature"], "did you mean temperature?"),
        (["order", "--data-dir", "x"], "needs the drawn sample"),
        (["loss", "--preset", "fast"], "are for photographs"),
        (["loss", "--preset", "fst", "--data-dir", tmp_path], "--preset fst: unknown"),
        (["loss", "--seeds", "0", "0"], "--seeds 0 0: name at least one, and each once"),
        (["loss", "--data-dir", tmp_path / "nothing"], "nothing: no such folder"),
        (["loss", "--data-dir", tmp_path, "--weights-dir", tmp_path], "image.safetensors is missing there"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            lessons.read_lesson([*map(str, arguments), "--output", str(tmp_path / "out")])
    (tmp_path / "file").write_text("")
    process = run_script("lessons.py", "loss", "--output", tmp_path / "file" / "out")
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_name_the_lessons_are_listed(capsys):
    with pytest.raises(SystemExit) as ended:
        lessons.read_lesson([])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert all(name in shown and lesson.question in shown for name, lesson in lessons.LESSONS.items())


def test_training_in_a_pool_is_training_here(sample, tmp_path):
    """Two jobs in the pool's processes; their results are files."""
    base = TINY | {"data_dir": str(sample), "cache_dir": str(tmp_path / "cache")}
    lesson = Lesson("?", "!", {"a": {}, "b": {"temperature": 0.2}}, ("rsum",), minutes=1, base=base)
    jobs = runner.make_jobs(lesson, "shapes", {"device": "cpu"}, (0,), tmp_path, quick=False)
    runner.train_all(jobs, 2)
    assert all(job.result()["measured"]["rsum"] > 0 for job in jobs)
    assert all(Path(job.config.run_dir, "model.safetensors").exists() for job in jobs)


def test_what_a_lesson_needs_is_made_once_and_used(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "draw", partial(shapes.draw, train=96, val=24, test=24))
    monkeypatch.setattr(materials, "SHAPES", replace(SHAPES, **TINY))
    variants = {
        "pretrained": {"pretrained": True, "freeze": "both", "epochs": 1},
        "generated": {"generated": 20, "train_images": 64, "batch_size": 16},
        "ten pairs": {"seen_pairs": 10},
    }
    base = TINY | {"data_dir": str(sample), "cache_dir": str(tmp_path / "cache")}
    measured = ("rsum", "unseen pairs, 1 prompt", "seen pairs, 5 prompts")
    lesson = Lesson("?", "!", variants, measured, minutes=1, base=base, quick={"epochs": 1})
    jobs = runner.make_jobs(lesson, "shapes", {"device": "cpu"}, (0,), tmp_path, quick=True)
    runner.prepare(jobs, tmp_path, quick=True)
    pretrained, generated, ten_pairs = jobs
    assert len(list(Path(generated.config.extra_data, "Images").iterdir())) == 20
    table, _, _ = load_captions(ten_pairs.config.data_dir)
    captions = " ".join(table["caption"][table["split"] == "train"])
    assert captions and not any(f"{color} {shape}" in captions for color, shape in shapes.unseen_pairs(10))
    with monkeypatch.context() as second_time:
        second_time.setattr(materials.main, "train", None)  # nothing is made again
        runner.prepare(jobs, tmp_path, quick=True)
    for job in jobs:
        runner.run_job(job)
        assert all(0 <= value <= 600 for value in job.result()["measured"].values())
