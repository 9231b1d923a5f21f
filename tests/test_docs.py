"""The documents: links and anchors lead somewhere, tables are those of docs/results, commands and their flags exist."""

import dataclasses
import json
import re
import shlex
import sys

import pytest
from conftest import ROOT
from run_documents import command_lines, commands
from test_structure import listed

from config import PRESETS, Config

sys.path.insert(0, str(ROOT / "benchmarks"))
from tables import documents, markdown, render  # noqa: E402 (found after the path is set)

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
IMAGE_IN_HTML = re.compile(r"""<(?:img|a)\s[^>]*?(?:src|href)="([^"]+)\"""")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def slug(heading):
    """GitHub's anchor of a heading: lower case, without punctuation and links, each space a hyphen."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text):
    """The anchors of a document's headings. A heading that occurs again ends in -1, -2, ..."""
    found = {}
    for heading in re.findall(r"^#{1,6} (.*)$", FENCED.sub("", text), re.MULTILINE):
        found.setdefault(slug(heading), []).append(heading)
    return {f"{name}-{number}" if number else name for name, same in found.items() for number in range(len(same))}


def links(text):
    """The relative links and images of a document."""
    text = FENCED.sub("", text)
    targets = LINK.findall(text) + IMAGE_IN_HTML.findall(text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def faults_of_links(path, text, tracked):
    """What is wrong with the links of a document. tracked: the files that git tracks, or would."""
    faults = []
    for target in links(text):
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        if not (linked in tracked or any(linked in other.parents for other in tracked)):
            faults.append(f"{target} is missing")
        elif anchor and anchor not in anchors(text if linked == path else linked.read_text(encoding="utf-8")):
            faults.append(f"{target}: no such heading")
    return faults


def test_a_slug_is_githubs():
    assert slug("Several GPUs, several machines") == "several-gpus-several-machines"
    assert slug("`--help` for people") == "--help-for-people"
    assert slug("What's in `runs/`? (a list)") == "whats-in-runs-a-list"
    assert slug("See [the runs](runs.md) & more") == "see-the-runs--more"


def test_anchors_are_those_of_headings_outside_of_code():
    text = "# One\n## Two words\n```bash\n# a comment\n```\n## One\n#### One\n#no heading\n"
    assert anchors(text) == {"one", "two-words", "one-1", "one-2"}


def test_a_link_that_leads_nowhere_is_found():
    text = "# One\n[a](README.md) [b](#one) ![c](gone.png) [d](README.md#gone) [e](#two) [f](https://g.org/h) [i](docs)\n"
    text += '<img width="9" src="lost.png">\n```\n[j](in-code.md)\n```\n'
    faults = faults_of_links(ROOT / "CONTRIBUTING.md", text, set(listed()))
    assert faults == [
        "gone.png is missing",
        "README.md#gone: no such heading",
        "#two: no such heading",
        "lost.png is missing",
    ]


def test_a_link_to_a_file_that_git_ignores_is_found():
    tracked = set(listed())
    assert faults_of_links(ROOT / "README.md", "[a](LICENSE)", tracked) == []
    assert faults_of_links(ROOT / "README.md", "[a](LICENSE)", tracked - {ROOT / "LICENSE"}) == ["LICENSE is missing"]
    assert faults_of_links(ROOT / "README.md", "[a](.git/HEAD)", tracked) == [".git/HEAD is missing"]


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert not faults_of_links(path, path.read_text(encoding="utf-8"), set(listed()))


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert not pages - {target.partition("#")[0] for target in links(readme)}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_those_of_the_results(path):
    text = path.read_text(encoding="utf-8")
    assert render(text) == text, "run python benchmarks/tables.py"


def test_every_result_is_a_table_of_a_document():
    texts = "".join(path.read_text(encoding="utf-8") for path in documents())
    assert not {path.stem for path in (ROOT / "docs/results").glob("*.json") if f"<!-- table {path.stem} -->" not in texts}


def test_a_result_becomes_a_table():
    facts = {"commit": "abc", "date": "2026-01-02", "processor": "P", "seeds": "0", "note": ""}
    table = markdown({"columns": ["a", "b"], "rows": [["1", "2"]], **facts})
    assert table == "| a | b |\n| --- | --- |\n| 1 | 2 |\n\n<sub>Commit abc; 2026-01-02; P; seeds: 0.</sub>"


def test_gains_are_in_the_order_of_their_size():
    result = json.loads((ROOT / "docs/results/gains.json").read_text(encoding="utf-8"))
    points = [float(row[3]) for row in result["rows"]]
    assert points == sorted(points, reverse=True)
    assert points == [round(float(after) - float(before), 1) for _, before, after, *_ in result["rows"]]


def test_commands_are_taken_from_marked_blocks():
    text = "<!-- run with --help -->\n```bash\npython a.py \\\n    --x 1   # why\ncp a b\n```\n"
    text += "```bash\npython b.py\n```\n<!-- run -->\n\n```bash\npython d.py\n```\n<!-- run -->\n```bash\nc\n```\n"
    text += "<!-- run with --epochs 1 -->\n```bash\n# first\n\npython e.py \"a # b\" '# c' --no#d # e\n```\n"
    assert commands(text) == ["python a.py --x 1 --help", "cp a b", "c", "python e.py \"a # b\" '# c' --no#d --epochs 1"]


def python_commands(text):
    """(script, words after it) of each python command in the bash blocks of a document, without `...`, && and what follows."""
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for line in command_lines(block):
            for script, arguments in re.findall(r"(?:\bpython3? |\btorchrun .*?)(\S+\.py)\b([^&;|]*)", line):
                yield script, [word for word in shlex.split(arguments) if word != "..."]


def faults_of_command(script, words):
    """What is wrong with a python command: a missing script, an unknown preset or flag of main.py."""
    if not (ROOT / script).is_file():
        return [f"{script} is missing"]
    if script != "main.py":
        return []
    flags = {field.name.replace("_", "-") for field in dataclasses.fields(Config)} | {"help", "help-all"}
    faults = [f"{words[0]}: no such preset"] if words and not words[0].startswith("-") and words[0] not in PRESETS else []
    shown = [word[2:].partition("=")[0].replace("_", "-") for word in words if word.startswith("--")]
    return faults + [f"--{flag}: no such flag" for flag in shown if not {flag, flag.removeprefix("no-")} & flags]


def test_a_command_that_does_not_exist_is_found():
    text = "```bash\npython gone.py --x && python main.py lost --batch-size 8 --lr=1 \\\n  --no-hflip # --y\n"
    text += "torchrun --nproc-per-node 2 main.py best --z 1\npython main.py --wet-run\n```\n```\npython other.py\n```\n"
    shown = list(python_commands(text))
    assert [script for script, _ in shown] == ["gone.py", "main.py", "main.py", "main.py"]
    assert [fault for command in shown for fault in faults_of_command(*command)] == [
        "gone.py is missing",
        "lost: no such preset",
        "--lr: no such flag",
        "--z: no such flag",
        "--wet-run: no such flag",
    ]


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_presets_and_flags_exist(path):
    shown = python_commands(path.read_text(encoding="utf-8"))
    assert not [fault for command in shown for fault in faults_of_command(*command)]


def test_the_documents_show_commands():
    shown = [command for path in documents() for command in python_commands(path.read_text(encoding="utf-8"))]
    assert len(shown) > 20
