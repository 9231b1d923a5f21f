"""requirements.txt has what the commands import, bounded, and constraints.txt a version of each that fits."""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OPTIONAL = {"pillow_heif", "rawpy"}  # imported where they are needed; a line says how to install them


def read(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]


def imported():
    """The names of all packages that a user's code imports: no tests, no benchmarks."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    paths = [ROOT / name for name in listed if not name.startswith(("tests/", "benchmarks/"))]
    own = {path.name.removesuffix(".py") for path in ROOT.iterdir()}
    names = set()
    for path in paths or [path for path in ROOT.rglob("*.py") if "tests" not in path.parts]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.partition(".")[0])
    return names - own - set(sys.stdlib_module_names) - OPTIONAL


@pytest.mark.parametrize("package", sorted(imported()))
def test_what_is_imported_is_installed(package):
    required = {canonicalize_name(requirement.name) for requirement in read("requirements.txt")}
    assert required & set(map(canonicalize_name, packages_distributions()[package]))


def test_each_requirement_is_bounded_and_has_a_version_that_passed():
    passed = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in read("constraints.txt")}
    for requirement in read("requirements.txt"):
        operators = {part.operator for part in requirement.specifier}
        assert operators & {"<", "=="}, f"{requirement} has no upper bound"
        assert requirement.specifier.contains(passed[canonicalize_name(requirement.name)]), requirement
