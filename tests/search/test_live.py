"""What follows a folder, and what the page's server bears."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from conftest import ROOT, wait_until

from search import connections, gallery, live, run_data, server
from search.files import find_pictures
from search.live import LiveGallery
from search.searcher import Searcher
from search.server import KnownHostsOnly
from utils.errors import UserError


@pytest.fixture
def folder(sample, tmp_path):
    """Four pictures."""
    (tmp_path / "pictures").mkdir()
    for path in sorted((sample / "Images").iterdir())[:4]:
        shutil.copy(path, tmp_path / "pictures")
    return tmp_path / "pictures"


@pytest.fixture
def follower(run, folder, tmp_path, monkeypatch):
    for name, value in (("QUIET", 100), ("LOOK_EVERY", 100), ("RETRY", 0.2)):
        monkeypatch.setattr(live, name, value)
    following = LiveGallery(Searcher(run, "cpu", "fp32", tmp_path / "cache"), partial(find_pictures, folder), str(folder), 1)
    yield following
    following.stop()
    if following.thread.ident:
        following.thread.join(20)
    if following.captions_thread.ident:
        following.captions_thread.join(20)


def num_pictures(following):
    return len(following.gallery.paths) if following.gallery else 0


@pytest.mark.parametrize(
    "error", [RuntimeError("Sizes of tensors must match"), MemoryError(), KeyError("x"), OSError(28, "full")]
)
def test_the_follower_survives_what_embedding_throws_and_says_it(follower, folder, monkeypatch, error):
    update = gallery.update

    def fail(*_):
        raise error

    monkeypatch.setattr(gallery, "update", fail)
    follower.thread.start()
    wait_until(lambda: follower.problem)
    assert "could not be embedded" in follower.problem and "\n" not in follower.problem
    monkeypatch.setattr(gallery, "update", update)
    wait_until(lambda: num_pictures(follower) == 4 and not follower.problem)
    assert follower.thread.is_alive()


def test_the_follower_survives_what_listing_and_watching_throw(follower, folder, monkeypatch):
    import watchfiles

    watch, list_files, broken = watchfiles.watch, follower.list_files, threading.Event()
    broken.set()

    def failing_watch(*arguments, **options):
        if broken.is_set():
            raise OSError("no watches left")
        return watch(*arguments, **options)

    def failing_list():
        if broken.is_set():
            raise ValueError("listed wrongly")
        return list_files()

    monkeypatch.setattr(watchfiles, "watch", failing_watch)
    follower.list_files = failing_list
    follower.thread.start()
    wait_until(lambda: "no watches left" in follower.problem)
    broken.clear()
    wait_until(lambda: num_pictures(follower) == 4 and not follower.problem)


def test_a_folder_that_goes_and_comes_is_followed_again(follower, folder, tmp_path):
    follower.thread.start()
    wait_until(lambda: num_pictures(follower) == 4)
    folder.rename(tmp_path / "elsewhere")
    wait_until(lambda: "no such folder" in follower.problem and num_pictures(follower) == 0)
    (tmp_path / "elsewhere").rename(folder)
    wait_until(lambda: num_pictures(follower) == 4 and not follower.problem)


def test_a_folder_that_goes_before_it_is_watched_is_noticed(follower, folder, tmp_path, monkeypatch):
    update = follower.update

    def update_and_lose():
        update()
        if folder.exists():
            folder.rename(tmp_path / "elsewhere")

    monkeypatch.setattr(follower, "update", update_and_lose)
    follower.thread.start()
    wait_until(lambda: "no such folder" in follower.problem and num_pictures(follower) == 0)


def test_a_folder_that_is_replaced_at_once_is_followed(follower, folder, sample, tmp_path):
    follower.thread.start()
    wait_until(lambda: num_pictures(follower) == 4)
    time.sleep(0.5)  # it is watched by now
    shutil.copytree(folder, tmp_path / "other")
    folder.rename(tmp_path / "elsewhere")
    (tmp_path / "other").rename(folder)
    time.sleep(1)
    shutil.copy(sorted((sample / "Images").iterdir())[9], folder)
    wait_until(lambda: num_pictures(follower) == 5)


def test_deleted_pictures_are_not_counted(follower, folder):
    follower.thread.start()
    wait_until(lambda: num_pictures(follower) == 4)
    for path in folder.iterdir():
        path.unlink()
    wait_until(lambda: follower.problem)
    assert "no pictures there" in follower.problem and num_pictures(follower) == follower.total == 0


def test_a_search_of_an_emptied_folder_says_so_and_embeds_nothing_again(run, folder, tmp_path, search_here, capsys):
    """It may be a drive that is not mounted for a moment."""
    flags = ["a ring", "--run", run, "--images", folder, "--cache-dir", tmp_path / "cache", "--output", ""]
    search_here(*flags)
    folder.rename(tmp_path / "drive")
    folder.mkdir()
    with pytest.raises(UserError, match="no pictures there"):
        search_here(*flags)
    folder.rmdir()
    (tmp_path / "drive").rename(folder)
    capsys.readouterr()
    search_here(*flags)
    assert "embedding" not in capsys.readouterr().out


def test_pictures_are_followed_while_captions_are_embedded(follower, folder, sample, monkeypatch):
    go_on, embed = threading.Event(), follower.searcher.embed_captions
    monkeypatch.setattr(run_data, "CAPTIONS_PER_STEP", 100)
    steps = []

    def slow(captions):
        steps.append(len(captions))
        if len(steps) == 2:
            assert go_on.wait(60)
        return embed(captions)

    monkeypatch.setattr(follower.searcher, "embed_captions", slow)
    follower.thread.start()
    wait_until(lambda: len(steps) == 2)
    assert follower.notes() == [
        f"100 of {len(set(run_data.read_data(follower.searcher.run)[0]['caption'])):,} captions embedded"
    ]
    shutil.copy(sorted((sample / "Images").iterdir())[5], folder)
    wait_until(lambda: num_pictures(follower) == 5)
    go_on.set()
    wait_until(lambda: follower.captions[1] is not None)
    assert max(steps) <= 100 and len(follower.captions[0]) == len(follower.captions[1]) == sum(steps)
    assert follower.notes() == []


def test_captions_that_fail_are_said_and_files_that_cannot_be_read_are_counted(follower, folder, monkeypatch):
    def fail(_):
        raise RuntimeError("no memory\nat all")

    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    monkeypatch.setattr(follower.searcher, "embed_captions", fail)
    follower.thread.start()
    wait_until(lambda: len(follower.notes()) == 2)
    assert follower.notes() == ["1 cannot be read", "no captions for pictures: no memory"]
    assert num_pictures(follower) == 4


def test_the_names_of_this_machine_and_addresses_are_answered_and_no_others():
    hosts = KnownHostsOnly(None, ["localhost", "box", "box.local"])
    known = (
        "localhost",
        "LOCALHOST:7860",
        "box.local.:80",
        "192.168.1.5:7860",
        "127.0.0.1",
        "[::1]:7860",
        "[fe80::1]",
        "0.0.0.0",
    )
    assert all(map(hosts.is_known, known))
    others = "evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example", "", ":80", "box.", "1.2.3"
    assert [host for host in others if hosts.is_known(host)] == ["box."]


# ---- as a process ------------------------------------------------------------------------------------------------


@pytest.fixture
def page(run, folder, tmp_path):
    """The address of a page that listens on all addresses, and what it prints."""
    flags = ["--run", run, "--images", folder, "--cache-dir", tmp_path / "cache", "--host", "0.0.0.0", "--port", "0"]
    command = [sys.executable, ROOT / "app.py", *flags, "--num-workers", "1", "--device", "cpu"]
    with open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    line = process.stdout.readline()
    while line and "http://" not in line:
        line = process.stdout.readline()
    address = line.split()[0]
    ready = {"pictures": 4, "working": False, "notes": []}
    wait_until(lambda: ready.items() <= status(address).items(), 100)
    yield address, process, tmp_path / "errors"
    process.terminate()
    process.wait(30)
    process.stdout.close()


def status(address):
    try:
        return json.loads(urllib.request.urlopen(f"{address}/api/status", timeout=30).read())
    except urllib.error.URLError:
        return {}


def upload(address, contents):
    request = urllib.request.Request(f"{address}/api/upload?name=a.png", contents, method="POST")
    try:
        return urllib.request.urlopen(request, timeout=200).status, ""
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]


def resident_bytes(process):
    with open(f"/proc/{process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_printed_address_opens_and_stalled_requests_and_other_names_do_not_block_it(page, folder):
    address, process, errors = page
    assert "0.0.0.0" not in address
    port = int(address.rpartition(":")[2])
    request = urllib.request.Request(f"{address}/api/status", headers={"Host": f"evil.example:{port}"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    stalled = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections.MAX_CONNECTIONS + 20)]
    for number, connection in enumerate(stalled):
        head = b"POST /api/upload?name=a.png HTTP/1.1\r\nHost: localhost\r\n"
        try:
            connection.sendall(head + (b"Content-Length: 9999\r\n\r\nab" if number % 2 else b""))
        except OSError:  # the oldest were closed
            continue
    started = time.monotonic()
    assert status(address)["pictures"] == 4 and time.monotonic() - started < 5
    for connection in stalled:
        connection.close()
    contents = next(folder.iterdir()).read_bytes()
    with ThreadPoolExecutor(60) as clients:
        answers = list(clients.map(lambda _: upload(address, contents), range(60)))
    assert {code for code, _ in answers} <= {200, 503} and sum(code == 200 for code, _ in answers) >= 30
    assert "Traceback" not in errors.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_uploads_leave_little_memory_behind(page, tmp_path):
    import cv2
    import numpy as np

    address, process, errors = page
    small = cv2.imencode(".png", np.zeros((64, 64, 3), np.uint8))[1].tobytes()
    assert upload(address, small)[0] == 200
    before = resident_bytes(process)
    large = cv2.imencode(".png", np.zeros((7000, 7000, 3), np.uint8))[1].tobytes()  # 147 MB decoded
    padded = large + bytes(server.MAX_UPLOAD - len(large) - 1000)
    with ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda _: upload(address, padded), range(6)))
    assert {code for code, _ in answers} == {200}
    assert resident_bytes(process) - before < 400_000_000  # torch, the texts and the server keep some
    assert "Traceback" not in errors.read_text()


def test_uploads_beyond_those_that_wait_are_answered_in_one_line():
    page = server.Page(None, None)
    page.num_waiting = server.MAX_WAITING
    with pytest.raises(server.HTTPException) as raised:
        asyncio.run(page.upload(None))
    assert raised.value.status_code == 503 and "\n" not in raised.value.detail
