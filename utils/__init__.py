"""Helpers that all other parts use.

cache.py   cached results on disk; a command lists them and deletes what no run uses
cli.py     the help of the commands, from comments and docstrings
device.py  the device and the precision to compute with
errors.py  errors as clear messages: user mistakes, SIGTERM, out of memory, lost processes
exif.py    when a picture was taken
files.py   atomic writes of files and folders
images.py  read pictures from files, and cache them decoded
plots.py   the figures of a run and of a search
"""
