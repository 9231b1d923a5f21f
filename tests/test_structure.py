"""The layout that CONTRIBUTING.md describes: which way imports go, how long functions are, and which words are used."""

import ast
import re
import subprocess

import pytest
from conftest import ROOT

SHARED_SCRIPTS = {"config", "captions", "dataset", "modules", "clip", "embedding"}
COMMANDS = {"main", "evaluate", "inference", "GAN", "app"}
FOLDERS = {"encoders", "loading", "training", "evaluation", "search", "generation", "utils"}
LESSONS = {"lessons", "experiments", "assignment"}  # stand above the commands, and may train and score with them
WORDS = {  # what a course does not use: what to write; [ ] keeps this list from matching itself
    r"held[ ]still": "frozen",
    r"\btowers?\b": "encoder",
    r"learn(t|ed)[ ]by[ ]heart": "overfit",
    r"middle[ ]squares?": "centre crop",
    r"exchanged[ ]captions": "shuffled captions",
    r"\bof[ ]length[ ]1\b": "L2-normalised",
    r"\banew\b": "again",
    r"\bmend(s|ed)?\b": "fix",
    r"\bto[ ]be[ ]had\b": "available",
    r"\bundo(es)?\b": "the inverse of",
    r"the[ ]road\b": "the steps",
}


def listed(*patterns):
    """The files that git tracks, or would."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in names if (ROOT / name).exists()]


def modules():
    """{dotted name: syntax tree} of the project's own code, without tests and benchmarks."""
    paths = [path for path in listed("*.py") if path.relative_to(ROOT).parts[0] not in ("tests", "benchmarks")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in zip(names, paths)}


def imports():
    """{module: the modules of the project that it imports}."""
    trees, found = modules(), {}
    for name, tree in trees.items():
        targets = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                targets |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        found[name] = (targets & trees.keys()) - FOLDERS - {"experiments"}
    return found


def test_folders_import_no_scripts_but_those_that_they_may():
    wrong = {
        f"{name} imports {target}"
        for name, targets in imports().items()
        if name.partition(".")[0] in FOLDERS
        for target in targets
        if target.partition(".")[0] not in FOLDERS | SHARED_SCRIPTS | {"Datasets"}
    }
    assert not wrong


def test_nothing_below_the_lessons_imports_a_command():
    found = {name for name, targets in imports().items() if targets & COMMANDS}
    assert found and {name.partition(".")[0] for name in found} <= LESSONS


def test_imports_go_one_way():
    waiting = imports()
    while ready := [name for name, targets in waiting.items() if not targets & waiting.keys()]:
        for name in ready:
            del waiting[name]
    assert not waiting, "these import each other in a circle, or what does"


def functions():
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{name}.{node.name}", node


def test_a_function_fits_on_a_screen():
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    assert not {name: length for name, length in lengths.items() if length > 60}


def test_a_function_has_at_most_eight_parameters():
    counts = {}
    for name, node in functions():
        parameters = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        counts[name] = len([parameter for parameter in parameters if parameter not in ("self", "cls", "ctx")])
    libraries = {"encoders.text_mixer.__init__", "encoders.cbow.__init__"}  # a Hugging Face configuration has its own signature
    assert not {name: count for name, count in counts.items() if count > 8 and name not in libraries}


def test_every_folder_says_what_is_in_it():
    for folder in FOLDERS | {"experiments"}:
        text = (ROOT / folder / "__init__.py").read_text(encoding="utf-8")
        for path in (ROOT / folder).glob("*.py"):
            assert path.name == "__init__.py" or path.name in text, f"{folder}/__init__.py does not name {path.name}"


@pytest.mark.parametrize("path", listed("*.py", "*.md", "*.ipynb"), ids=lambda path: str(path.relative_to(ROOT)))
def test_words_are_those_of_a_course(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    wrong = [
        f"line {number}: {match[0]!r}, rather {plain!r}"
        for number, line in enumerate(lines, start=1)
        for pattern, plain in WORDS.items()
        for match in [re.search(pattern, line, re.IGNORECASE)]
        if match and "two-tower" not in line
    ]
    assert not wrong
