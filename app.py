"""A web page to search pictures: python app.py [--run RUN] [--images FOLDER], then open http://127.0.0.1:7860 in a browser."""

import socket
import sys
from functools import partial
from pathlib import Path
from typing import Literal

import uvicorn

from config import is_model_name, load_run, run_cli, run_names
from search.files import find_pictures
from search.live import LiveGallery
from search.queries import newest_run
from search.run_data import validation_files
from search.searcher import Searcher
from search.server import build_app
from utils.errors import UserError, run_command
from utils.images import Views

MAX_CONNECTIONS = 200  # at once
EXAMPLES = ("python app.py", "python app.py --run runs/shapes --images ~/Pictures")
LOCAL = ["127.0.0.1", "localhost", "::1", "[::1]"]


def serve(
    run: str = "",
    images: str = "",
    views: Views = 1,
    host: str = "127.0.0.1",
    port: int = 7860,
    cache_dir: str = ".cache",
    num_workers: int = 4,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
):
    """Serves a page to search pictures by words and pictures, to look at them, and to find duplicates.

    Args:
        run: run folder, or name of a pretrained model; several, with commas: an ensemble; empty: the newest in runs/
        images: folder to search, with its subfolders, which is watched for changes; empty: the run's own validation pictures
        views: crops of each picture to embed and average: better matches, for as many times the time
        host: address to listen on; 0.0.0.0 lets everyone in the network see the pictures, without a password
        port: port to listen on
        cache_dir: folder where embeddings are cached
        num_workers: threads that decode pictures
        device: auto, cpu, cuda, cuda:1, mps
        precision: of matrix products; auto: bf16 or fp16 where native, else fp32
    """
    run = run or newest_run()
    searcher = Searcher(run, device, precision, cache_dir, views)
    files = find_pictures(images) if images else validation_files(run)
    next(iter(files))  # a mistake is named before the page opens
    for name in run_names(run):
        if Path(name).is_dir() or "/" not in name.removeprefix("runs/") and not is_model_name(name):  # else it may be a hub's
            load_run(name)
    list_files = partial(find_pictures, images) if images else lambda: files  # a run's own pictures do not change
    live = LiveGallery(searcher, list_files, "" if images.endswith(".tar") else images, num_workers)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError):
        raise UserError(f"--host {host} --port {port}: cannot be opened; is the port in use? name another") from None
    what = images or f"the validation pictures of {run}"
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}  searches {what}; Ctrl-C ends it", flush=True)
    live.thread.start()
    app = build_app(searcher, live, LOCAL if host in LOCAL else ["*"])
    try:
        uvicorn.Server(uvicorn.Config(app, log_level="warning", limit_concurrency=MAX_CONNECTIONS)).run(sockets=[listening])
    finally:
        live.stop()


if __name__ == "__main__":
    run_command(lambda: run_cli(serve, "app.py", sys.argv[1:], EXAMPLES))
