"""Draw the figures of the documents that need no run: the architecture, what helped, and recall beside published results.

    python benchmarks/figures.py

The charts read the JSON files in docs/results/. Each figure has a light background of its own, so that it is readable on a dark
page too.
"""

import json
import textwrap

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle
from measure import RESULTS, ROOT

from utils.errors import run_command
from utils.plots import DARK, GREEN, GREY, save

BLUE, ORANGE, PALE = "#1f4e9c", "#d2691e", "#eef2f7"
NUM_PAIRS = 4  # in the drawn similarity matrix


def read(name):
    """The columns of a result as {column: list of cells}."""
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return dict(zip(result["columns"], zip(*result["rows"])))


def box(axes, x, y, text, color, width=2.8, height=0.9):
    """A box with its left edge at x and its middle at y."""
    style = {"boxstyle": "round,pad=0,rounding_size=0.12", "linewidth": 1.6}
    axes.add_patch(FancyBboxPatch((x, y - height / 2), width, height, edgecolor=color, facecolor="white", **style))
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=12, color=DARK)


def arrow(axes, start, end):
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": DARK, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0})


def draw_matrix(axes, x, y, side):
    """The similarity matrix with its lower left corner at (x, y): a row per picture, its diagonal outlined."""
    cell = side / NUM_PAIRS
    for row in range(NUM_PAIRS):
        for column in range(NUM_PAIRS):
            corner = (x + column * cell, y + side - (row + 1) * cell)
            right = row == column
            colors = {"facecolor": "#cfe8d8" if right else "white", "edgecolor": GREEN if right else GREY}
            axes.add_patch(Rectangle(corner, cell, cell, linewidth=2.2 if right else 0.8, zorder=2 if right else 1, **colors))
            label = rf"$I_{row + 1}\cdot T_{column + 1}$"
            axes.text(corner[0] + cell / 2, corner[1] + cell / 2, label, ha="center", va="center", fontsize=10, zorder=3)


def draw_architecture(path):
    """The two encoders, their projection heads, the similarity matrix and the loss, with the letters of the CLIP paper."""
    figure, axes = plt.subplots(figsize=(10.6, 4.3), facecolor=PALE)
    axes.set(xlim=(0, 16.6), ylim=(-0.1, 5.9))
    axes.axis("off")
    for y, kind, letter, color in ((4.4, "picture", "I", BLUE), (1.6, "text", "T", ORANGE)):
        box(axes, 0.2, y, "n captions" if kind == "text" else "n pictures", GREY, width=2.1)
        name = "text encoder" if kind == "text" else "image encoder"
        box(axes, 2.9, y, name, color)
        box(axes, 6.9, y, "projection head", color)
        for start, end in ((2.3, 2.9), (5.7, 6.9), (9.7, 10.3)):
            arrow(axes, (start, y), (end, y))
        width = "d_t" if kind == "text" else "d_i"
        axes.text(6.25, y + 0.28, rf"${letter}_f$", ha="center", fontsize=12, color=DARK)
        axes.text(6.25, y - 0.62, rf"$[n, {width}]$", ha="center", fontsize=10, color=DARK)
        axes.text(10.7, y, rf"${letter}_e$", ha="center", va="center", fontsize=14, color=color)
        axes.text(10.7, y - 0.62, r"$[n, d_e]$", ha="center", fontsize=10, color=DARK)
    arrow(axes, (11.1, 4.2), (11.75, 3.7))
    arrow(axes, (11.1, 1.8), (11.75, 2.3))
    draw_matrix(axes, 11.9, 1.2, 3.6)
    axes.text(13.7, 5.5, "cosine similarity / temperature", ha="center", fontsize=12, color=DARK)
    axes.text(13.7, 5.0, "a row per picture, a column per caption", ha="center", fontsize=10, color=DARK)
    axes.text(13.7, 0.62, "loss: cross-entropy over rows and columns,", ha="center", fontsize=11, color=DARK)
    axes.text(13.7, 0.15, "true pairs on the diagonal", ha="center", fontsize=11, color=GREEN)
    save(figure, path)


def draw_gains(path):
    """What helped on Flickr8k: a bar per change, in the order of its gain in rsum."""
    gains = read("gains")
    rows = sorted(((float(cell), what) for cell, what in zip(gains["points"], gains["what"])), reverse=True)
    points, names = zip(*rows)
    figure, axes = plt.subplots(figsize=(8, 4.6))
    axes.barh(range(len(points)), points, color=BLUE)
    for row, value in enumerate(points):
        axes.text(value + 0.4, row, f"{value:.1f}", va="center", fontsize=10, color=DARK)
    axes.set_yticks(range(len(points)), [textwrap.fill(name, 40) for name in names], fontsize=10)
    axes.invert_yaxis()
    axes.set(xlabel="points of rsum gained, on the development images", xlim=(0, max(points) + 3))
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_recall(path):
    """rsum of each system on Flickr8k, published and ours; its label says on which images it was scored, pale: development."""
    recall = read("recall")
    rows = [row for row in zip(recall["model"], recall["1,000 images"], recall["rsum"], recall["minutes"]) if row[2]]
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for position, (model, images, rsum, minutes) in enumerate(rows):
        value, ours = float(rsum.split()[0]), "`" in model  # without "± 0.7"
        axes.barh(position, value, color=BLUE if ours else GREY, alpha=0.55 if images == "development" else 1)
        label = f"{rsum}, {images}" + (f", {minutes} minutes" if minutes else "")
        axes.text(value + 4, position, label, va="center", fontsize=9, color=DARK)
    names = [textwrap.fill(model.replace("*", "").replace("`", ""), 34) for model, *_ in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=10)
    axes.invert_yaxis()
    axes.set(xlabel="rsum: the sum of the six recalls, at most 600; blue: this project", xlim=(0, 600))
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_peers(path):
    """rsum against the time since the start of the program: this project and what a user would take instead."""
    curves = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))["curves"]
    figure, axes = plt.subplots(figsize=(8, 4.6))
    colors = {"this project": BLUE, "open_clip": ORANGE, "sentence-transformers": GREEN, "plain loop": GREY}
    for name, curve in curves.items():
        seconds, rsums = zip(*curve)
        style = "--" if any(word in name for word in ("locked", "frozen", "`linear`")) else "-"
        color, marker = colors[name.split(",")[0]], "." if len(curve) < 20 else ""
        label = name.replace("`", "").replace("image encoder ", "")  # fits beside the curves
        axes.plot([s / 60 for s in seconds], rsums, style, color=color, marker=marker, label=label)
    model, published = next(pair for pair in zip(*(read("recall")[column] for column in ("model", "rsum"))) if "NAA" in pair[0])
    axes.axhline(float(published), color=DARK, linewidth=0.8, linestyle=":")
    text = f"{model.partition(',')[2].strip()} (test images, other encoders): {published}"
    axes.text(0.05, float(published) + 4, text, fontsize=9, color=DARK)
    axes.set(xlabel="minutes since the start of the program", ylabel="rsum, development images", ylim=(0, 400), xlim=(0, None))
    axes.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1.05, 0.62), ncols=2, columnspacing=1)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def main():
    draw_architecture(ROOT / "docs" / "architecture.png")
    draw_gains(ROOT / "docs" / "gains.png")
    draw_recall(ROOT / "docs" / "recall.png")
    draw_peers(ROOT / "docs" / "peers.png")


if __name__ == "__main__":
    run_command(main)
