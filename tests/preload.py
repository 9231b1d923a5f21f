"""What the forked processes of tests share: the imports that take seconds, and figures that are built but not drawn."""

import gc

import matplotlib.figure
import sklearn.isotonic
import sklearn.linear_model  # noqa: F401  a training loads these at its end

import main  # noqa: F401
from tests.figures import save_blank

matplotlib.figure.Figure.savefig = save_blank
gc.freeze()  # so that a process does not copy what it shares with the others to look through it
