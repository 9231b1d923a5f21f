"""Figures that are built, but not drawn: drawing takes half of a small training's time."""

from pathlib import Path

BLANK = bytes.fromhex(  # a PNG of one pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63600000000200"
    "0148afa4710000000049454e44ae426082"
)


def save_blank(figure, path, **options):
    """In the place of `matplotlib.figure.Figure.savefig`."""
    Path(path).write_bytes(BLANK)
