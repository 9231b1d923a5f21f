"""Take the results of lessons that were run into the documents.

    python benchmarks/lesson_pages.py NAME ...

A lesson's table goes into docs/results/lesson-NAME.json, from where `python benchmarks/tables.py` puts it into its page, and
its plot into docs/lessons/NAME.png.
"""

import json
import shutil
import sys
from pathlib import Path

from measure import RESULTS, ROOT, report

from experiments.report import table_rows
from utils.cli import run_cli
from utils.errors import UserError, run_command


def take(names: tuple[str, ...], /, runs: Path = ROOT / "runs" / "lessons"):
    """Writes the table and the plot of each lesson where the documents read them.

    Args:
        names: lessons that were run, such as loss or loss-photographs
        runs: folder with a folder for each
    """
    for name in names:
        folder = runs / name
        if not (folder / "results.json").exists():
            raise UserError(f"{folder}: no results.json is there; python lessons.py {name} writes it")
        result = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        rows = table_rows(result["measures"], result["variants"])
        seeds = [run["seed"] for run in next(iter(result["variants"].values()))]
        columns, note = ["variant", *result["measures"]], "the mean of the seeds and, behind ±, their standard deviation"
        report(result["question"], columns, rows, RESULTS / f"lesson-{name}.json", seeds, note=note)
        shutil.copy(folder / "plot.png", ROOT / "docs" / "lessons" / f"{name}.png")


if __name__ == "__main__":
    run_command(lambda: run_cli(take, "benchmarks/lesson_pages.py", sys.argv[1:]))
