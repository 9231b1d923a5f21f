"""What lies in the cache folder: what dead processes left, and what no run uses any more."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

import main
from config import parse_config
from utils import files as storage
from utils.cache import Cache, bytes_in, cache, cache_line, note_use
from utils.errors import UserError
from utils.files import atomic_write, remove_leftovers, temporary_path


def pid_of_a_dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_goes_when_the_next_begins_and_what_is_being_written_stays(tmp_path):
    dead = f"{storage.HOST}-{pid_of_a_dead_process()}"
    (tmp_path / f"activations-1.npy.{dead}.tmp").write_bytes(b"half")
    (tmp_path / "heads" / f"images-1.{dead}.tmp").mkdir(parents=True)
    (tmp_path / "heads" / f"images-1.{dead}.tmp" / "pixels.bin").write_bytes(b"half")
    kept = [temporary_path(tmp_path / "mine"), tmp_path / f"theirs.another-{os.getpid()}.tmp", tmp_path / "old.tmp"]
    for path in kept:
        path.write_bytes(b"")
    os.utime(kept[2], (0, 0))  # of a program that names no process, long ago
    remove_leftovers(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
    assert list((tmp_path / "heads").iterdir()) == []


def test_a_training_clears_the_cache_of_what_a_killed_one_left(small_flags, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"activations-1.npy.{storage.HOST}-{pid_of_a_dead_process()}.tmp").write_bytes(b"half")
    main.train(parse_config(small_flags(epochs=1), "shapes")[0])
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_only_what_no_run_uses_is_deleted(small_flags, tmp_path, capsys):
    for name, size in (("runs/a", 80), ("runs/b", 64)):
        main.train(parse_config(small_flags(name, epochs=1, size=size, freeze="both"), "shapes")[0])
    entries = set(os.listdir(tmp_path / "cache"))
    # of each size the pictures and the features of two splits; the captions' features of two splits; the files' digests
    assert len(entries) == 9
    os.rename(tmp_path / "runs" / "a", tmp_path / "runs" / "renamed")
    capsys.readouterr()
    (tmp_path / "cache" / "images-of-nobody").mkdir()
    (tmp_path / "cache" / "images-of-nobody" / "pixels.bin").write_bytes(bytes(5_000_000))
    cache(Cache(str(tmp_path / "cache"), (str(tmp_path / "runs"),)))
    said = capsys.readouterr().out
    assert "images-of-nobody  used by no run" in said and "0.01 GB are used by no run" in said and "renamed" in said
    cache(Cache(str(tmp_path / "cache"), (str(tmp_path / "runs"),), delete=True))
    assert set(os.listdir(tmp_path / "cache")) == entries
    cache(Cache(str(tmp_path / "cache"), (str(tmp_path / "runs" / "b"),), delete=True))
    assert len(os.listdir(tmp_path / "cache")) == 6
    with pytest.raises(UserError, match="--cache-dir .*nowhere"):
        cache(Cache(str(tmp_path / "nowhere")))


def test_a_use_is_noted_once_and_the_size_is_said(tmp_path):
    for _ in range(2):
        note_use(tmp_path, tmp_path / "gallery-1.sqlite")
    note_use(tmp_path, tmp_path / "images-1")
    assert (tmp_path / "cache.txt").read_text() == "gallery-1\nimages-1\n"
    note_use(tmp_path / "nowhere", tmp_path / "images-1")  # a folder that cannot be written is left alone
    (tmp_path / "large").write_bytes(bytes(10**8))
    assert bytes_in(tmp_path / "large") == 10**8
    assert "holds 0.1 GB" in cache_line(tmp_path)


def test_on_windows_a_file_that_another_program_holds_is_waited_for(tmp_path, monkeypatch):
    replace, calls = os.replace, []

    def held(source, target):
        calls.append(None)
        if len(calls) < 3:
            raise PermissionError(13, "The process cannot access the file", str(target))
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", held)
    monkeypatch.setattr(storage.os, "name", "nt")
    storage.replace(str(make(tmp_path / "new")), str(tmp_path / "old"))
    assert len(calls) == 3 and os.path.exists(tmp_path / "old")
    calls.clear()
    monkeypatch.setattr(storage, "REPLACE_TIMEOUT", 0)
    with pytest.raises(PermissionError):
        storage.replace(str(make(tmp_path / "new")), str(tmp_path / "old"))
    calls.clear()
    monkeypatch.setattr(storage.os, "name", "posix")  # where it means what it says
    with pytest.raises(UserError, match="cannot be written"):
        atomic_write(tmp_path / "file", lambda path: path.write_text("x"))
    assert len(calls) == 1


def make(path):
    path.write_text("x")
    return path


def test_what_an_output_cannot_show_is_replaced():
    command = "from utils.errors import run_command; run_command(lambda: print('日本.png'))"
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, timeout=60)
    assert (process.returncode, process.stdout.strip()) == (0, b"??.png"), process.stderr
