"""The documents: links and anchors lead somewhere, tables are those of docs/results, commands and their flags exist."""

import dataclasses
import json
import re
import sys

import pytest
from conftest import ROOT
from run_documents import commands

from config import PRESETS, Config

sys.path.insert(0, str(ROOT / "benchmarks"))
from tables import documents, markdown, render  # noqa: E402 (found after the path is set)

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def slug(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text):
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def test_a_slug_is_githubs():
    assert slug("Several GPUs, several machines") == "several-gpus-several-machines"
    assert slug("`--help` for people") == "--help-for-people"


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in LINK.findall(text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), f"{target} is missing"
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), f"{target}: no such heading"


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert not pages - set(LINK.findall(readme))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
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
    text = "<!-- run with --help -->\n```bash\npython a.py \\\n    --x 1   # why\n```\n"
    text += "```bash\npython b.py\n```\n<!-- run -->\n```bash\nc\n```\n"
    assert commands(text) == ["python a.py --x 1 --help", "c"]


def shown_commands():
    """Each python command in a bash block of a document."""
    for path in documents():
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                yield from re.findall(r"python (\S+\.py)(.*?)(?:$|&&| #)", line)


def test_scripts_presets_and_flags_exist():
    flags = {field.name.replace("_", "-") for field in dataclasses.fields(Config)} | {"help", "help-all"}
    shown = list(shown_commands())
    assert len(shown) > 20
    for script, arguments in shown:
        assert (ROOT / script).exists(), script
        if script == "main.py":
            words = arguments.split()
            assert not words or words[0].startswith("-") or words[0] in PRESETS, arguments
            assert not {word[2:].removeprefix("no-") for word in words if word.startswith("--")} - flags, arguments
