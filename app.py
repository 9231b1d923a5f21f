"""A web page to search pictures: python app.py [--run RUN] [--images FOLDER], then open http://127.0.0.1:7860 in a browser."""

import sys

from search.options import read_page
from utils.errors import run_command

if __name__ == "__main__":  # first, as what is imported below takes a while to load
    OPTIONS = run_command(read_page, sys.argv[1:])

import socket
from functools import partial

import uvicorn

from search.connections import BoundedProtocol
from search.files import find_pictures
from search.live import LiveGallery
from search.run_data import validation_files
from search.searcher import Searcher
from search.server import build_app
from utils.errors import UserError

LOCAL = ["127.0.0.1", "localhost", "::1", "[::1]"]
ANYWHERE = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # hosts that stand for all addresses, and one that opens


def own_names():
    """The names under which other machines know this one, which a page elsewhere cannot lead here."""
    name = socket.gethostname()
    short = name.partition(".")[0]
    return list(dict.fromkeys([name, socket.getfqdn(), short, f"{short}.local"]))


def network_addresses():
    """The IPv4 address of this machine in its network; none where it has no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect(("192.0.2.1", 9))  # sends nothing, but chooses the address from which that one would be reached
        except OSError:
            return []
        return [asked.getsockname()[0]]


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
        both = host == "::" and socket.has_dualstack_ipv6()  # all addresses of both kinds
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except (OSError, OverflowError):
        raise UserError(f"--host {host} --port {port}: cannot be opened; is the port in use? name another") from None
    what = options.images or f"the validation pictures of {options.run}"
    addresses = [ANYWHERE.get(host, host), *(network_addresses() if host in ANYWHERE else ())]
    port = listening.getsockname()[1]  # also where 0 asks for any
    urls = [f"http://{f'[{name}]' if ':' in name else name}:{port}" for name in addresses]
    elsewhere = f"  (from other machines: {urls[1]})" if urls[1:] else ""
    print(f"{urls[0]}{elsewhere}  searches {what}; Ctrl-C ends it", flush=True)
    live.thread.start()
    own = [] if host in LOCAL else own_names()  # which may wait for a name server
    app = build_app(searcher, live, [*LOCAL, *own, host])
    try:
        uvicorn.Server(uvicorn.Config(app, http=BoundedProtocol, log_level="warning")).run(sockets=[listening])
    finally:
        live.stop()


if __name__ == "__main__":
    run_command(serve, OPTIONS)
