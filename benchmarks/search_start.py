"""How long whole commands take: a query, a file of queries, the page's start and a help, with warm and with cold files.

    python benchmarks/search_start.py --run RUN

The gallery is the run's own validation pictures, embedded before. Each command is a new process. Cold: the files of Python's
packages, of the run and of the cache are dropped from the operating system's memory before (Linux, as root).
"""

import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from measure import ROOT, report, spread

from search.options import newest_run
from utils.cli import run_cli
from utils.errors import UserError, run_command

NUM_LINES = 1000  # in the file of queries
PORT = 7871


def drop_files():
    """Drops all files from the operating system's memory; False where that is not allowed."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def run_once(command):
    """Seconds of a whole command. Raises UserError where it fails."""
    started = time.perf_counter()
    process = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if process.returncode:
        raise UserError(process.stderr.strip().split("\n")[-1])
    return time.perf_counter() - started


def start_page(command):
    """Seconds until the page answers a search."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command, "--port", str(PORT)], stdout=subprocess.DEVNULL)
    try:
        while time.perf_counter() - started < 120:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/api/search?q=a+dog").read()
                return time.perf_counter() - started
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.02)
    finally:
        process.terminate()
        process.wait()
    raise UserError("the page did not answer")


def measure(run: str = "", rounds: int = 5, cache_dir: str = ".cache", json_path: str = ""):
    """Times whole commands.

    Args:
        run: run folder; empty: the newest in runs/
        rounds: of each command, in turns
        cache_dir: folder where embeddings are kept
        json_path: file for the results
    """
    run = run or newest_run()
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "queries.txt"
        lines.write_text("".join(f"{number} dogs run on the beach\n" for number in range(NUM_LINES)))
        flags = ["--run", run, "--cache-dir", cache_dir, "--output", f"{folder}/matches.png"]
        search = str(ROOT / "inference.py")
        page = [str(ROOT / "app.py"), "--run", run, "--cache-dir", cache_dir]
        commands = {
            'python inference.py "a dog"': (run_once, [search, "a dog", *flags]),
            f"the same with --query-file, {NUM_LINES:,} lines": (run_once, [search, "--query-file", str(lines), *flags]),
            "python app.py, until it answers a search": (start_page, page),
            "python evaluate.py --help": (run_once, [str(ROOT / "evaluate.py"), "--help"]),
        }
        for clock, command in commands.values():  # embeds what is new, keeps the text encoder, compiles
            clock(command)
        seconds = {(name, kind): [] for name in commands for kind in ("warm", "cold")}
        for _ in range(rounds):
            for name, (clock, command) in commands.items():
                seconds[name, "warm"].append(clock(command))
                if drop_files():
                    seconds[name, "cold"].append(clock(command))

    def cell(values):
        return spread(values, 2) if values else "not allowed"

    rows = [[name, cell(seconds[name, "warm"]), cell(seconds[name, "cold"])] for name in commands]
    header = ["whole process, seconds", "warm files: median (smallest to largest)", "cold files"]
    report("Commands that search", header, rows, json_path, [0])


if __name__ == "__main__":
    run_command(lambda: run_cli(measure, "benchmarks/search_start.py", sys.argv[1:]))
