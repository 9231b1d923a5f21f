"""Helpers that all other parts use.

cache.py         cached results on disk; a command lists them and deletes what no run uses
cli.py           the command line: flags from comments and docstrings, their help, mistakes in one line
device.py        the device and the precision to compute with
errors.py        errors as clear messages: user mistakes, SIGTERM, out of memory, lost processes
exif.py          when a picture was taken
files.py         atomic writes of files and folders
folders.py       which files of a folder are pictures, or data at all
fonts.py         fonts for plots in any script
formats.py       decode picture files of any format
images.py        read pictures from files, and cache them decoded
lean_imports.py  load timm and transformers without torch's compiler
memory.py        give memory back to the operating system
plots.py         the figures of a run and of a search
processes.py     which of several processes this one is
words.py         the words of a text that say what a picture shows
"""
