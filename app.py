"""A web page to search pictures: python app.py [--run RUN] [--images FOLDER], then open http://127.0.0.1:7860 in a browser."""

import sys

from search.options import read_page
from utils.errors import run_command

if __name__ == "__main__":  # first, as what is imported below takes a while to load
    OPTIONS = run_command(read_page, sys.argv[1:])

import socket
from functools import partial

import uvicorn

from search.files import find_pictures
from search.live import LiveGallery
from search.run_data import validation_files
from search.searcher import Searcher
from search.server import build_app
from utils.errors import UserError

MAX_CONNECTIONS = 200  # at once
LOCAL = ["127.0.0.1", "localhost", "::1", "[::1]"]


def serve(options):
    """What `python app.py` does. options: a `search.options.Page`."""
    host, port = options.host, options.port
    searcher = Searcher(options.run, options.device, options.precision, options.cache_dir, options.views)
    files = find_pictures(options.images) if options.images else validation_files(options.run)
    next(iter(files))  # a mistake is named before the page opens
    list_files = partial(find_pictures, options.images) if options.images else lambda: files  # a run's own do not change
    folder = "" if options.images.endswith(".tar") else options.images
    live = LiveGallery(searcher, list_files, folder, options.num_workers)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError):
        raise UserError(f"--host {host} --port {port}: cannot be opened; is the port in use? name another") from None
    what = options.images or f"the validation pictures of {options.run}"
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}  searches {what}; Ctrl-C ends it", flush=True)
    live.thread.start()
    app = build_app(searcher, live, LOCAL if host in LOCAL else ["*"])
    try:
        uvicorn.Server(uvicorn.Config(app, log_level="warning", limit_concurrency=MAX_CONNECTIONS)).run(sockets=[listening])
    finally:
        live.stop()


if __name__ == "__main__":
    run_command(serve, OPTIONS)
