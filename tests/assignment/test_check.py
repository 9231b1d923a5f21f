"""The assignment's checker: full points for the project's own code, none for the starter, and what each mistake costs."""

import pytest
from conftest import run_script

from assignment import check, make


@pytest.fixture
def grade(capsys):
    """What `python assignment/check.py FOLDER ...` prints; each task has a process of its own here, too."""

    def printed(folder, **options):
        check.grade(check.Grade(folder, **options))
        return capsys.readouterr().out

    return printed


@pytest.fixture
def solved(tmp_path):
    make.write(tmp_path, solved=True)
    return tmp_path


def lost(folder, task):
    """{check: reason} of what a task loses."""
    return {what: reason for got, points, what, reason in check.check_task(folder, task, 0) if got < points}


TASKS = list(make.TASKS)
MISTAKES = {  # what is done wrong: (task, right text, wrong text, what is lost)
    "the softmax over the wrong axis": (
        "loss", "F.cross_entropy(logits.T, labels)", "F.cross_entropy(logits, labels)", {"both sides as a loop"},
    ),
    "without arange": (
        "loss", "torch.arange(len(logits), device=logits.device)", "torch.zeros(len(logits), dtype=torch.long)",
        {"three by three by hand", "the diagonal is right", "both sides as a loop"},
    ),
    "the sum of both sides": (
        "loss", "(loss_i + loss_t) / 2", "loss_i + loss_t",
        {"uniform logits give chance", "three by three by hand", "both sides as a loop"},
    ),
    "not normalised": (
        "forward", "F.normalize(I_e, dim=1)", "I_e",
        {"embeddings are normalized", "cosines by hand", "the temperature scales"},
    ),
    "the log of the scale": (
        "forward", "self.logit_scale.exp()", "self.logit_scale",
        {"embeddings are normalized", "cosines by hand", "the temperature scales"},
    ),
    "the mean over padding": (
        "pooling", "(hidden * mask).sum(dim=1) / mask.sum(dim=1)", "hidden.mean(dim=1)",
        {"mean of the real tokens", "padding changes nothing"},
    ),
    "the last token, padding or not": (
        "pooling", "attention_mask.sum(dim=1) - 1", "attention_mask.sum(dim=1) * 0 + attention_mask.shape[1] - 1",
        {"the last real token", "padding changes nothing"},
    ),
    "the first token for every encoder": (
        "pooling", 'if self.pooling == "first":', "if True:",
        {"mean of the real tokens", "the last real token"},
    ),
    "ties for the model": (
        "recall", "similarity >= correct.max(axis=1)[:, None]", "similarity > correct.max(axis=1)[:, None]",
        {"ties count against"},
    ),
    "an image's last caption only": (
        "recall", "correct.max(axis=0)", "[correct[np.flatnonzero(image_of_text == i)[-1], i] for i in range(n)]",
        {"uneven captions", "as a loop"},
    ),
    "images drawn with replacement": (
        "sampler", "rng.permutation(self.real)", "rng.integers(self.real, size=self.real)", {"each image once"},
    ),
    "captions drawn with replacement": (
        "sampler", "replace=len(choices) < count", "replace=True", {"captions are the images own"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_the_projects_own_code_gets_all_points(solved, task):
    assert not lost(solved, task)


@pytest.mark.parametrize("task", TASKS)
def test_the_starter_gets_none(tmp_path, task):
    make.write(tmp_path)
    reasons = lost(tmp_path, task)
    assert len(reasons) == len(check.CHECKS[task]) and set(reasons.values()) == {"NotImplementedError: your code"}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_loses_exactly_its_points(solved, mistake):
    task, right, wrong, expected = MISTAKES[mistake]
    path = solved / f"{task}.py"
    text = path.read_text(encoding="utf-8")
    assert right in text
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    assert set(lost(solved, task)) == expected
    assert not any(lost(solved, other) for other in TASKS if other != task)


def test_the_starter_in_the_repository_is_what_make_writes():
    for name in make.TASKS:
        assert (make.STARTER / f"{name}.py").read_text(encoding="utf-8") == make.task_file(name), "run assignment/make.py"


def test_it_grades_whatever_the_files_do(solved, grade, monkeypatch):
    monkeypatch.setattr(check, "TIME_LIMIT", 8)  # seconds; the imports do not count
    (solved / "forward.py").unlink()
    (solved / "pooling.py").write_text("import nothing_of_this_name\n", encoding="utf-8")
    (solved / "recall.py").write_text("import os\n\nos._exit(0)\n", encoding="utf-8")
    (solved / "sampler.py").write_text("while True:\n    pass\n", encoding="utf-8")
    shown = grade(solved)
    assert "loss: 20 of 20" in shown and "20 of 100 points" in shown
    assert "forward: 0 of 20" in shown and "FileNotFoundError" in shown
    assert "pooling: 0 of 20" in shown and "cannot be imported: ModuleNotFoundError" in shown
    assert "recall: 0 of 20" in shown and "ended the process" in shown
    assert "sampler: 0 of 10" in shown and "did not end within" in shown


def test_what_a_student_has_written_is_not_replaced(solved):
    before = (solved / "loss.py").read_text(encoding="utf-8")
    process = run_script("assignment/make.py", solved)
    assert process.returncode == 2 and "loss.py: is there already" in process.stderr and "Traceback" not in process.stderr
    assert (solved / "loss.py").read_text(encoding="utf-8") == before


def test_it_grades_from_the_command_line_in_any_folder(solved, tmp_path):
    process = run_script("assignment/check.py", solved, "--task", "loss", cwd=tmp_path)
    assert (process.returncode, process.stderr) == (0, "") and "loss: 20 of 20" in process.stdout


def test_a_short_run_beats_chance_with_the_projects_code_and_not_with_wrong_labels(solved, grade):
    assert "run: 10 of 10" in grade(solved, task="run", seed=3)
    _, right, wrong, _ = MISTAKES["without arange"]
    text = (solved / "loss.py").read_text(encoding="utf-8")
    (solved / "loss.py").write_text(text.replace(right, wrong), encoding="utf-8")
    shown = grade(solved, task="run")
    assert "run: 0 of 10" in shown and "where chance is" in shown
