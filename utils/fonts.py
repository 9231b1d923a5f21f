"""Fonts for plots: an installed one that has the letters of a figure's texts, where the usual one lacks them."""

import functools

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text


@functools.cache
def letters_of(path):
    """The code points that a font file has; none for one that cannot be read."""
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@functools.cache
def say_once(line):
    print(line, flush=True)


def choose_fonts(figure):
    """Gives the texts of a figure a second font, which has what the usual one lacks. Says once where there is none."""
    usual = letters_of(font_manager.findfont("DejaVu Sans"))
    texts = figure.findobj(Text)
    lacking = {ord(c) for text in texts for c in text.get_text() if c.isprintable()} - usual
    if not lacking:
        return
    fonts = font_manager.fontManager.ttflist
    count, name = max(((len(lacking & letters_of(font.fname)), font.name) for font in fonts), default=(0, ""))
    if count < len(lacking):
        say_once("plots: no installed font has all letters of these texts, and boxes stand for some; install one, such as Noto")
    for text in texts if count else ():
        text.set_fontfamily([*matplotlib.rcParams["font.sans-serif"][:1], name])
