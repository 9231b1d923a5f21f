"""Plots: training curves, similarity and confusion matrices, grids of search results."""

import os
import sys
import textwrap
import warnings

import cv2
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from utils.files import PNG_MARK, atomic_write
from utils.fonts import choose_fonts

MAX_LINES = 3  # of a query that is a title; the rest is left out
MAX_NAMES = 60  # with more classes, a confusion matrix has no class names
DARK, GREEN, GREY = "#333333", "#2e8b57", "#999999"


def has_display():
    """True where a window can open."""
    on_screen = sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return on_screen and matplotlib.get_backend().lower() not in ("agg", "svg", "pdf", "ps")


def save(figure, path, show=False):
    """Writes a PNG. show: also open a window, if there is a display."""
    take_literally(figure)
    choose_fonts(figure)
    options = {"format": "png", "metadata": dict([PNG_MARK]), "dpi": 110, "bbox_inches": "tight"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph|Matplotlib currently does not support")  # said once, by `choose_fonts`
        atomic_write(path, lambda temporary: figure.savefig(temporary, **options))
        if show and has_display():
            plt.show()
    plt.close(figure)


def take_literally(figure):
    """Draws a figure's texts as they stand: in names and captions, $ is no formula and a control character is a space."""
    axes = [axis for axes in figure.findobj(Axes) for axis in (axes.xaxis, axes.yaxis)]
    powers = {label for axis in axes if axis.get_scale() == "log" for label in axis.get_ticklabels(which="both")}
    for text in set(figure.findobj(Text)) - powers:
        text.set_parse_math(False)
        text.set_text("".join(c if c.isprintable() or c == "\n" else " " for c in text.get_text()))


def draw_curves(history, path):
    """history: a list of dicts, one per epoch, with the columns of history.csv; older runs have no val_loss."""
    epochs = [row["epoch"] for row in history]
    best = max(history, key=lambda row: row["rsum"])["epoch"]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    left.plot(epochs, [row["loss"] for row in history], color=DARK, label="training loss")
    if any("val_loss" in row for row in history):
        left.plot(epochs, [row.get("val_loss", np.nan) for row in history], color="#d2691e", label="validation loss")
    if np.isfinite(history[0]["chance_loss"]):  # which the losses over single pairs do not have
        left.plot(epochs, [row["chance_loss"] for row in history], "--", color=GREY, label="ln(batch): chance")
    left.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    left.legend(frameon=False)
    middle.plot(epochs, [row["temperature"] for row in history], color=DARK)
    middle.set(xlabel="epoch", ylabel="temperature", ylim=(0, None))
    for direction, style in (("text_to_image", "-"), ("image_to_text", "--")):
        for k, color in zip((1, 10), ("#1f4e9c", "#d2691e")):  # R@5 lies between them
            values = [row[f"{direction}_R@{k}"] for row in history]
            right.plot(epochs, values, style, color=color, label=f"{direction.replace('_', ' ')} R@{k}")
    right.set(xlabel="epoch", ylabel="validation recall (%)", ylim=(0, 101))
    for axes in (left, middle, right):
        axes.axvline(best, color=GREEN, linestyle=":", label=f"best epoch, {best}" if axes is right else None)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    right.legend(frameon=False, fontsize=8)
    save(figure, path)


def tidy(caption):
    """A caption as it is drawn: without the space before the full stop, which could end alone on a line."""
    return caption.strip().removesuffix(" .")


def title_lines(text, width, max_lines=MAX_LINES):
    """A text in lines of some characters, which is cut where there are more lines."""
    return textwrap.fill(text, width, max_lines=max_lines, placeholder=" ...")


def draw_similarity(pictures, captions, similarity, path):
    """The paper's figure of pictures against captions.

    pictures: n (h, w, 3) arrays; captions: their n captions; similarity: (n, n) cosines, one row per caption.
    """
    n = len(pictures)
    figure, axes = plt.subplots(figsize=(1.1 * n + 4.5, 1.0 * n + 1.5))
    axes.imshow(similarity, cmap="viridis", aspect="auto")
    midpoint = (similarity.min() + similarity.max()) / 2
    for row in range(n):
        for column in range(n):
            color = "white" if similarity[row, column] < midpoint else "black"
            axes.text(column, row, f"{similarity[row, column]:.2f}", ha="center", va="center", color=color, fontsize=9)
            if row == column:
                axes.add_patch(Rectangle((row - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=3))
    axes.set_yticks(range(n), [title_lines(tidy(caption), 44) for caption in captions], fontsize=8)
    axes.set_xticks([])
    axes.set_xlabel("pictures; outlined: the caption's own picture; the number: score", labelpad=8)
    axes.set_ylabel("captions")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for column, picture in enumerate(pictures):
        inset = axes.inset_axes([column - 0.48, -1.56, 0.96, 1.0], transform=axes.transData)
        inset.imshow(picture)
        inset.axis("off")
    save(figure, path)


def draw_confusion(names, counts, path):
    """A confusion matrix: names of c classes; counts, (c, c), one row per true class, one column per predicted class."""
    c = len(names)
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # each row sums to 1
    side = min(14, max(4, 0.32 * c))
    figure, axes = plt.subplots(figsize=(side + 2, side + 1.5))
    image = axes.imshow(fractions, cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(image, fraction=0.04, pad=0.02, label="share of the true class's pictures")
    axes.set(xlabel="answer", ylabel="true class")
    if c <= MAX_NAMES:
        axes.set_xticks(range(c), names, rotation=90, fontsize=8)
        axes.set_yticks(range(c), names, fontsize=8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    save(figure, path)


def draw_relevance(relevance, bins, wrong_share, path):
    """What a relevance floor keeps, and a reliability diagram.

    relevance: a `search.relevance.Relevance`. bins: [mean probability, share of right pairs, pairs]. wrong_share: of the floor.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(100 * np.array(relevance.shares), 100 * np.array(relevance.right_above_floor), color=DARK)
    left.axvline(100 * wrong_share, color=GREEN, linestyle=":", label=f"--floor {wrong_share}")
    left.set(xscale="log", xlabel="wrong pictures above the floor (%)", ylabel="right pictures above it (%)", ylim=(0, 101))
    left.legend(frameon=False)
    right.plot([0, 1], [0, 1], "--", color=GREY, label="perfect")
    if bins:
        probabilities, found, counts = np.array(bins).T
        right.scatter(probabilities, found, s=20 + 200 * counts / counts.max(), color=DARK, label="pictures not learned from")
    right.set(xlabel="match probability", ylabel="share that was right", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    right.legend(frameon=False, loc="upper left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_row(axes, pictures, titles, correct=None, fontsize=8):
    """Pictures side by side, each under its title; the correct one, at position `correct`, is framed."""
    for i, axis in enumerate(axes):
        if i >= len(pictures):
            axis.axis("off")
            continue
        axis.imshow(pictures[i])
        axis.set_title(titles[i], fontsize=fontsize, color=GREEN if i == correct else DARK)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(visible=i == correct, color=GREEN, linewidth=3)


def draw_grid(query, pictures, titles, path, show=False):
    """The matches of one query: pictures, (h, w, 3) arrays, best first, in a nearly square grid."""
    columns = int(np.ceil(np.sqrt(len(pictures))))
    rows = int(np.ceil(len(pictures) / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3 * rows + 0.6), squeeze=False, layout="constrained")
    figure.suptitle(title_lines(query, 26 * columns), fontsize=13)
    for row in range(rows):
        chosen = slice(row * columns, (row + 1) * columns)
        draw_row(axes[row], pictures[chosen], titles[chosen])
    save(figure, path, show)


def draw_generated(title, captions, real, generated, path):
    """Generated pictures, each below the real picture of its caption. real, generated: (h, w, 3) arrays, one per caption."""
    columns = min(4, len(captions))
    rows = int(np.ceil(len(captions) / columns))
    figure, axes = plt.subplots(2 * rows, columns, figsize=(2.6 * columns, 5.7 * rows), squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=14)
    titles = [title_lines(tidy(caption), 28, 5) for caption in captions]
    for row in range(rows):
        chosen = slice(row * columns, (row + 1) * columns)
        draw_row(axes[2 * row], real[chosen], titles[chosen], fontsize=10)
        draw_row(axes[2 * row + 1], generated[chosen], [""] * columns)
        axes[2 * row, 0].set_ylabel("real", fontsize=12)
        axes[2 * row + 1, 0].set_ylabel("generated", fontsize=12)
    save(figure, path)


def draw_bars(names, values, deviations, label, path):
    """A horizontal bar per name, with a line of one standard deviation to either side where it is not 0."""
    figure, axes = plt.subplots(figsize=(7, 0.42 * len(names) + 1.1), layout="constrained")
    error = deviations if any(deviations) else None
    axes.barh(range(len(names)), values, color="#8a8a8a", xerr=error, error_kw={"elinewidth": 1.5, "capsize": 3})
    for row, (value, deviation) in enumerate(zip(values, deviations)):
        axes.text(value + deviation, row, f"  {value:.4g}", va="center", fontsize=9, color=DARK)
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 44) for name in names], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_points(names, xs, ys, xlabel, ylabel, path):
    """A named point per (mean, standard deviation) in xs and ys, with lines of one deviation."""
    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for number, (name, (x, dx), (y, dy)) in enumerate(zip(names, xs, ys)):
        axes.errorbar(x, y, xerr=dx or None, yerr=dy or None, fmt="o", color=DARK, markersize=5, elinewidth=1, capsize=2)
        axes.annotate(name, (x, y), xytext=(7, -13 if number % 2 else 5), textcoords="offset points", fontsize=9)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.margins(x=0.25, y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_tradeoff(rows, chosen, path):
    """The kept score against rsum of mixtures of weights. rows: {"share", "rsum", "kept"} each; chosen: one of them."""
    figure, axes = plt.subplots(figsize=(6, 4.4), layout="constrained")
    axes.plot([row["rsum"] for row in rows], [row["kept"] for row in rows], "-o", color=DARK, markersize=4)
    for row, name, place in ((rows[0], "old weights", (-4, -16)), (rows[-1], "new weights", (6, -4))):
        axes.annotate(name, (row["rsum"], row["kept"]), xytext=place, textcoords="offset points", fontsize=9)
    axes.plot(chosen["rsum"], chosen["kept"], "o", color=GREEN, markersize=11, fillstyle="none", markeredgewidth=2)
    label, point = f"chosen: {chosen['share']:.0%} new", (chosen["rsum"], chosen["kept"])
    axes.annotate(label, point, xytext=(10, 4), textcoords="offset points", fontsize=9, color=GREEN)
    axes.set(xlabel="rsum on the new validation images", ylabel="what the model could do before (%)")
    axes.margins(x=0.25, y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_lines(panels, xlabel, ylabel, path):
    """Small panels of the same scale side by side. panels: {title: {line: (xs, ys)}}, two lines at most."""
    columns = min(4, len(panels))
    rows = int(np.ceil(len(panels) / columns))
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.7 * columns, 2.3 * rows), squeeze=False, layout="constrained", sharey=True
    )
    for axis, (title, lines) in zip(axes.flat, panels.items()):
        for (name, (xs, ys)), style in zip(lines.items(), ("-", "--")):
            axis.plot(xs, ys, style, color="black", linewidth=1.4, label=name)
        axis.set_title(textwrap.fill(title, 26), fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel(ylabel)
    for axis in axes[-1]:
        axis.set_xlabel(xlabel)
    axes[0, 0].legend(frameon=False, fontsize=8)
    save(figure, path)


def overlay(picture, heat):
    """A heat map, (s, s) of 0 to 1, over a picture, (h, w, 3) uint8: warm colours where it is high, nearly grey elsewhere."""
    heat = cv2.resize(heat.astype(np.float32), picture.shape[1::-1], interpolation=cv2.INTER_CUBIC).clip(0, 1)[..., None]
    grey = 0.6 * picture.mean(axis=2, keepdims=True) + 0.4 * picture
    warm = 255 * matplotlib.colormaps["inferno"](heat[..., 0])[..., :3]
    return (grey * (1 - 0.6 * heat) + warm * 0.6 * heat).round().astype(np.uint8)


def draw_matches(searches, path):
    """Several queries, one row each. searches: a list of (query, pictures, titles, position of the correct one or None)."""
    columns = max(len(pictures) for _, pictures, _, _ in searches)
    figure = plt.figure(figsize=(1.9 * columns, 2.35 * len(searches) + 0.3), layout="constrained")
    heights = [*[2.35] * len(searches), 0.3]
    *rows, legend = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat
    text = "number: score of caption and picture; green: the picture that the caption was written for"
    legend.text(0.01, 0.5, text, fontsize=9, color=GREEN, va="center")
    for subfigure, (query, pictures, titles, correct) in zip(rows, searches):
        subfigure.suptitle(title_lines(tidy(query), 24 * columns, 1), fontsize=10, x=0.01, ha="left")
        draw_row(subfigure.subplots(1, columns, squeeze=False)[0], pictures, titles, correct)
    save(figure, path)
