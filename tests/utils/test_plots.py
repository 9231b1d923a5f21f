"""The plots of utils/plots.py: what they name, and histories of older runs."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from utils import plots


def history(epochs, **columns):
    recalls = {f"{direction}_R@{k}": 50.0 for direction in ("text_to_image", "image_to_text") for k in (1, 10)}
    row = {"loss": 1.0, "chance_loss": 3.5, "temperature": 0.07, "rsum": 300.0} | recalls | columns
    return [{"epoch": epoch} | row for epoch in range(1, epochs + 1)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been written."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path, show=False: figures.append(figure))
    yield figures
    plt.close("all")


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_curves_name_the_validation_loss_only_where_a_run_has_it(drawn):
    plots.draw_curves(history(3), "old.png")
    plots.draw_curves(history(2) + history(1, epoch=3, val_loss=1.2), "resumed.png")
    old, resumed = (legend(figure.axes[0]) for figure in drawn)
    assert old == ["training loss", "ln(batch): chance"]
    assert resumed == ["training loss", "validation loss", "ln(batch): chance"]


def test_curves_name_the_first_of_the_best_epochs(drawn):
    rows = history(4)
    rows[1]["rsum"] = rows[2]["rsum"] = 400.0
    plots.draw_curves(rows, "curves.png")
    assert "best epoch, 2" in legend(drawn[0].axes[2])


@pytest.mark.parametrize("caption", ["a dog runs .", " a dog runs . ", "a dog runs"])
def test_a_drawn_caption_has_no_full_stop_of_its_own(caption):
    assert plots.tidy(caption) == "a dog runs"


def test_a_generated_picture_stands_below_the_real_one_of_its_caption(drawn):
    real, generated = ([np.full((2, 2, 3), start + i, dtype=np.uint8) for i in range(5)] for start in (10, 20))
    plots.draw_generated("epoch 1", [f"caption {i} ." for i in range(5)], real, generated, "generated.png")
    shown = [(axes.get_title(), int(axes.images[0].get_array()[0, 0, 0])) for axes in drawn[0].axes if axes.images]
    captions = [f"caption {i}" for i in range(5)]
    expected = [*zip(captions[:4], range(10, 14)), *(("", i) for i in range(20, 24)), (captions[4], 14), ("", 24)]
    assert shown == expected


def test_letters_without_a_font_cost_one_line_and_no_warning(tmp_path, capsys, recwarn):
    for name in ("a", "b"):
        plots.draw_grid(
            "\U00012000\U00012001 \U0001e900", [np.zeros((4, 4, 3), np.uint8)], ["\U00012000"], tmp_path / f"{name}.png"
        )
    assert capsys.readouterr().out.count("no installed font") <= 1
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)] and (tmp_path / "b.png").exists()
