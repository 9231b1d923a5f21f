"""What a lesson writes: results.json, table.md and plot.png."""

import statistics

from utils.files import atomic_write, write_json
from utils.plots import draw_bars, draw_lines, draw_points

LOSS_LINES = {"training": "loss", "validation": "val_loss"}  # name in the plot: column of history.csv


def mean_and_spread(values):
    """(mean, standard deviation); the deviation is 0 for one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def cell(values):
    """Values of the seeds as a cell of the table: the mean and, with several seeds, the standard deviation."""
    mean, deviation = mean_and_spread(values)
    digits = 1 if abs(mean) >= 10 else 3
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")


def table_rows(measures, results):
    """The rows of a lesson's table. measures: names; results: {variant: a list with what was measured, per seed}."""
    return [[name, *(cell([run["measured"][m] for run in runs]) for m in measures)] for name, runs in results.items()]


def markdown(measures, results):
    """The table of a lesson. measures, results: as for `table_rows`."""
    rows = [["variant", *measures], ["---"] * (1 + len(measures)), *table_rows(measures, results)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def write_report(name, lesson, jobs, output):
    """Writes the three files into the folder output, and prints the table."""
    results = {}
    for job in jobs:
        results.setdefault(job.variant, []).append(job.result() | {"seed": job.seed})
    table = markdown(lesson.measures, results)
    facts = {"lesson": name, "question": lesson.question, "hypothesis": lesson.hypothesis, "measures": list(lesson.measures)}
    write_json(output / "results.json", facts | {"variants": results})
    atomic_write(output / "table.md", lambda path: path.write_text(table, encoding="utf-8"))
    draw(lesson, results, output / "plot.png")
    print(f"\n{lesson.question}\n\n{table}\nin {output}: results.json, table.md, plot.png")


def draw(lesson, results, path):
    """Draws the first measure of a lesson, or its first two, or the losses of each epoch (of the first seed)."""
    if lesson.plot == "losses":
        panels = {}
        for variant, runs in results.items():
            history = runs[0]["history"]
            panels[variant] = {name: (history["epoch"], history[key]) for name, key in LOSS_LINES.items()}
        return draw_lines(panels, "epoch", "loss", path)
    spreads = [
        [mean_and_spread([run["measured"][name] for run in runs]) for runs in results.values()] for name in lesson.measures[:2]
    ]
    if lesson.plot == "points":
        return draw_points(list(results), spreads[1], spreads[0], lesson.measures[1], lesson.measures[0], path)
    draw_bars(list(results), *zip(*spreads[0]), lesson.measures[0], path)
