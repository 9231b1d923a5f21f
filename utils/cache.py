"""What lies in the cache folder and which runs use it: python -m utils.cache [--delete].

Decoded pictures, features of frozen encoders and embeddings are kept there, because computing them takes longer than reading
them. All of it can be computed again. Each run folder names in its cache.txt what it used.
"""

import shutil
import sys
from collections import defaultdict
from pathlib import Path

from config import parse_flags
from storage import UserError, remove_unfinished, run_command

USES = "cache.txt"  # of a run folder


def note_use(run_dir, path):
    """Adds a file or folder of the cache to those that a run uses. A run folder that may not be written stays as it is."""
    uses = Path(run_dir) / USES
    try:
        if path.stem not in (uses.read_text(encoding="utf-8").split() if uses.exists() else []):
            with open(uses, "a", encoding="utf-8") as file:
                file.write(f"{path.stem}\n")
    except OSError:
        return


def bytes_in(path):
    """The size of a file, or of all files in a folder and those below it."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def cache_line(cache_dir):
    """A line that says how large the cache folder is."""
    size = bytes_in(Path(cache_dir)) / 1e9
    return f"{cache_dir} holds {size:.1f} GB for later runs; python -m utils.cache shows what no run uses"


def cache(cache_dir: str = ".cache", runs: tuple[str, ...] = ("runs",), delete: bool = False):
    """Lists what is in the cache folder, and deletes what no run uses.

    Args:
        cache_dir: the cache folder
        runs: folders to look for runs in, with their subfolders
        delete: delete what none of these runs uses
    """
    folder = Path(cache_dir)
    if not folder.is_dir():
        raise UserError(f"--cache-dir {cache_dir}: no such folder")
    remove_unfinished(folder)
    users = defaultdict(list)
    for uses in sorted(path for name in runs for path in Path(name).rglob(USES)):
        for stem in uses.read_text(encoding="utf-8").split():
            users[stem].append(str(uses.parent))
    unused = 0
    for path in sorted(folder.iterdir()):
        if path.suffix == ".tmp":  # being written
            continue
        size, used_by = bytes_in(path), users.get(path.stem)
        print(f"{size / 1e9:8.2f} GB  {path.name}  {', '.join(used_by) if used_by else 'used by no run'}")
        if not used_by:
            unused += size
            if delete and path.is_dir():
                shutil.rmtree(path)
            elif delete:
                path.unlink()
    places = ", ".join(runs)
    if delete:
        print(f"deleted {unused / 1e9:.2f} GB that no run in {places} used")
    else:
        print(f"{unused / 1e9:.2f} GB are used by no run in {places}; --delete deletes them")


if __name__ == "__main__":
    run_command(lambda: parse_flags(cache, "python -m utils.cache", None, sys.argv[1:]))
