"""Many searches on the page at once: how long each takes, whether one is lost, and what memory the page takes after thousands.

python benchmarks/page_load.py --run RUN
"""

import json
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measure import ROOT, report

from search.options import newest_run
from search.run_data import read_data
from utils.cli import run_cli
from utils.errors import UserError, run_command

PORT = 7872
CLIENTS, AT_ONCE = 10, 50


def wait_for_page(address):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            status = json.loads(urllib.request.urlopen(f"{address}/api/status").read())
            if not status["working"]:
                return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.2)
    raise UserError("the page did not start")


def resident_megabytes(pid):
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def measure(run: str = "", searches: int = 5000, cache_dir: str = ".cache", json_path: str = ""):
    """Sends searches to the page: 50 at once from 10 clients, again and again.

    Args:
        run: run folder, whose validation pictures are searched with its training captions; empty: the newest in runs/
        searches: how many in all
        cache_dir: folder where embeddings are kept
        json_path: file for the results
    """
    run = run or newest_run()
    captions = list(read_data(run)[0]["caption"].unique())[:searches]
    address = f"http://127.0.0.1:{PORT}"
    command = [sys.executable, str(ROOT / "app.py"), "--run", run, "--cache-dir", cache_dir, "--port", str(PORT)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def search(text):
        started = time.perf_counter()
        try:
            answer = urllib.request.urlopen(f"{address}/api/search?{urllib.parse.urlencode({'q': text, 'floor': 0})}").read()
        except OSError:  # refused, lost, or an error of the server
            return 1000 * (time.perf_counter() - started), 0
        return 1000 * (time.perf_counter() - started), len(json.loads(answer)["matches"])

    try:
        wait_for_page(address)
        milliseconds, memory, lost = [], [], 0
        with ThreadPoolExecutor(CLIENTS) as clients:
            for start in range(0, len(captions), AT_ONCE):
                for taken, found in clients.map(search, captions[start : start + AT_ONCE]):
                    milliseconds.append(taken)
                    lost += found == 0
                memory.append(resident_megabytes(process.pid))
    finally:
        process.terminate()
        process.wait()
    first = milliseconds[:AT_ONCE]
    tenth = len(memory) // 10
    rows = [
        ["first 50 searches at once, ms: median, 95th percentile", spread(first)],
        [f"all {len(milliseconds):,} searches, ms: median, 95th percentile", spread(milliseconds)],
        ["searches without an answer", lost],
        ["MB resident after a tenth of the searches, and after all", f"{memory[tenth]:.0f}, {memory[-1]:.0f}"],
    ]
    report(f"The page, {CLIENTS} clients, {AT_ONCE} searches at once", ["what", "measured"], rows, json_path, [0])


def spread(values):
    return f"{statistics.median(values):.0f}, {statistics.quantiles(values, n=20)[-1]:.0f}"


if __name__ == "__main__":
    run_command(lambda: run_cli(measure, "benchmarks/page_load.py", sys.argv[1:]))
