"""What goes wrong around a run: nothing that was trained is lost, and one line says what happened.

`python -m pytest tests/test_faults.py --long` tries the random ones ten times as often.
"""

import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import flags_for_small

import dataset
import main
from config import Config, parse_config
from training import checkpoint, distributed, steps
from training.checkpoint import load_latest, lock_run_dir, write_checkpoint
from utils import images
from utils.errors import UserError, run_command, to_user_error

EPOCHS = 3  # of 3 steps each
STEPS = []  # taken in a process that `act_at_step` prepared


def be_main(arguments, errors, prepare, *values):
    """The whole life of a process of `python main.py ARGUMENTS`, whose messages go to a file; prepare(*values) comes first."""
    torch.set_num_threads(1)
    sys.argv = ["main.py", *arguments]
    with open(os.devnull, "w") as sys.stdout, open(errors, "w", buffering=1) as sys.stderr:
        if prepare:
            prepare(*values)
        try:
            run_command(lambda: main.main(*parse_config(arguments)))
        except (Exception, KeyboardInterrupt):  # a process of multiprocessing would not pass it on to the hook
            sys.excepthook(*sys.exc_info())


@pytest.fixture
def start(forked, small_flags, tmp_path):
    """start(run name, *flags, prepare=, values=, data_dir=) -> a started process and the file of its messages."""

    def start(name, *flags, prepare=None, values=(), **options):
        errors = tmp_path / f"{name.replace('/', '-')}.txt"
        arguments = [*small_flags(name, **{"epochs": EPOCHS} | options), *flags]
        return forked(be_main, arguments, errors, prepare, *values), errors

    return start


@pytest.fixture
def ended(start):
    """Starts such a process, waits for its end, and returns (exit status, its messages)."""

    def ended(*arguments, **options):
        process, errors = start(*arguments, **options)
        process.join(100)
        return process.exitcode, errors.read_text()

    return ended


@pytest.fixture(scope="module")
def whole(forked, sample, tmp_path_factory):
    """What an uninterrupted run leaves."""
    folder = tmp_path_factory.mktemp("whole")
    process = forked(be_main, flags_for_small(sample, folder, epochs=EPOCHS), folder / "messages.txt", None)
    process.join()
    assert process.exitcode == 0
    return outcome(folder / "run")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 24 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def outcome(run_dir):
    """All that a run's end is known by: weights, optimizer and history, but for the seconds."""
    saved = torch.load(run_dir / "last.pt", weights_only=True)
    best = (run_dir / "model.safetensors").read_bytes()
    history = pd.read_csv(run_dir / "history.csv").drop(columns="seconds")
    return saved["model"], saved["optimizer"]["state"], history.to_numpy().tolist(), best


def assert_same(a, b):
    torch.testing.assert_close(a[:2], b[:2], atol=0, rtol=0)
    assert a[2:] == b[2:]


def one_line(messages):
    return messages.startswith("error: ") and messages.count("\n") == 1


# ---- killed ------------------------------------------------------------------------------------------------------


def test_kill_9_at_random_moments_loses_nothing(start, whole, tmp_path, times):
    """Eight kills; whenever a run got through, its outcome is the uninterrupted one's, and another begins."""
    rng, started = np.random.default_rng(), time.monotonic()
    start("timed")[0].join()
    seconds = time.monotonic() - started
    kills, run = 0, 0
    while kills < times(8, 200):
        process, errors = start(f"killed-{run}", "--resume", "auto", "--save-every", "1")
        process.join(rng.uniform(0, seconds))
        process.kill()
        process.join()
        if process.exitcode == 0:
            assert_same(outcome(tmp_path / f"killed-{run}"), whole)
            run += 1
        else:
            assert process.exitcode == -signal.SIGKILL, errors.read_text()
            kills += 1
    process, errors = start(f"killed-{run}", "--resume", "auto")
    process.join()
    assert process.exitcode == 0, errors.read_text()
    assert_same(outcome(tmp_path / f"killed-{run}"), whole)
    assert not list((tmp_path / f"killed-{run}").glob("*.tmp"))


def die_half_way(count):
    """This process is killed while it writes its `count`-th checkpoint."""
    save, calls = torch.save, []

    def half(state, file):
        calls.append(file)
        if len(calls) == count:
            file.write(b"half a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    torch.save = half


def die_between_the_renames(count):
    """This process is killed when its `count`-th checkpoint has moved aside and the next is not yet in its place."""
    replace, calls = os.replace, []

    def once(source, target):
        replace(source, target)
        calls.append(target.name)
        if calls.count(checkpoint.PREVIOUS) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = once


@pytest.mark.parametrize("prepare", [die_half_way, die_between_the_renames])
def test_kill_9_while_a_checkpoint_is_written_loses_nothing(ended, whole, tmp_path, prepare):
    assert ended("run", "--save-every", "2", prepare=prepare, values=[3])[0] == -signal.SIGKILL
    assert ended("run", "--resume")[0] == 0
    assert_same(outcome(tmp_path / "run"), whole)
    assert not list((tmp_path / "run").glob("*.tmp"))


def act_at_step(number, act, *values):
    """This process calls act(*values) while it takes a step."""
    loss = steps.loss_over_captions

    def acting(logits):
        STEPS.append(None)
        if len(STEPS) == number:
            act(*values)
        return loss(logits)

    steps.loss_over_captions = acting


def terminate_oneself():
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_leaves_a_checkpoint_of_the_step_and_status_143(ended, whole, tmp_path):
    status, messages = ended("run", prepare=act_at_step, values=[5, terminate_oneself])
    assert status == 143 and messages.startswith("terminated; continue with --resume --run-dir") and messages.count("\n") == 1
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (len(saved["history"]), len(saved["losses"])) == (1, 2)  # the fifth step is the second of the second epoch
    assert ended("run", "--resume")[0] == 0
    assert_same(outcome(tmp_path / "run"), whole)


def die_in_a_crop():
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    multiprocessing.set_start_method("fork", force=True)  # of the workers, who then have this, too
    dataset.CLIPDataset.random_crop = die


def test_a_worker_that_is_killed_ends_the_run_in_one_line(ended, whole, tmp_path):
    status, messages = ended("run", "--num-workers", "2", prepare=die_in_a_crop)
    assert status == 2 and one_line(messages) and "was killed" in messages and "--num-workers" in messages
    assert ended("run", "--resume")[0] == 0
    assert_same(outcome(tmp_path / "run"), whole)


def be_a_rank(rank, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


def die_in_a_step(number):
    """This process is killed when the gradients are about to be summed."""
    all_reduce_gradients = distributed.all_reduce_gradients

    def dying(parameters):
        STEPS.append(None)
        if len(STEPS) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        all_reduce_gradients(parameters)

    distributed.all_reduce_gradients = dying


def be_a_mortal_rank(rank, port):
    be_a_rank(rank, port)
    if rank == 1:
        die_in_a_step(5)


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("flags", [(), ("--shard-optimizer", "--save-every", "2")], ids=["whole", "sharded"])
def test_a_dead_process_ends_the_others_and_all_go_on_together(start, tmp_path, flags):
    """Two processes as torchrun starts them; it would start them again with the same command, too."""

    def both(name, prepare):
        port = free_port()
        started = [start(name, "--resume", "auto", *flags, prepare=prepare, values=[rank, port]) for rank in range(2)]
        for process, _ in started:
            process.join(60)
        return [process.exitcode for process, _ in started]

    assert both("whole", be_a_rank) == [0, 0]
    assert both("run", be_a_mortal_rank) == [2, -signal.SIGKILL]
    assert both("run", be_a_rank) == [0, 0]
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


# ---- disks -------------------------------------------------------------------------------------------------------


def fill_disk(disk):
    with open(disk / "filler", "wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - 4096))


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_full_disk_ends_the_run_in_one_line_and_the_checkpoint_before_stays(ended, whole, small_disk, step):
    status, messages = ended("disk/run", prepare=act_at_step, values=[step, fill_disk, small_disk])
    assert status == 2 and one_line(messages) and "No space left on device" in messages
    (small_disk / "filler").unlink()
    assert ended("disk/run", "--resume")[0] == 0
    assert_same(outcome(small_disk / "run"), whole)


def test_a_read_only_run_folder_is_refused_in_one_line(ended, small_disk):
    assert ended("disk/run")[0] == 0
    before = sorted((path.name, path.stat().st_mtime_ns) for path in small_disk.rglob("*"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for flags in ([], ["--resume", "--epochs", "9"]):
        status, messages = ended("disk/run", *flags)
        assert status == 2 and one_line(messages) and "--run-dir" in messages and "Read-only file system" in messages
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in small_disk.rglob("*"))


@pytest.mark.parametrize("harm", [os.unlink, lambda path: os.truncate(path, 100)], ids=["deleted", "truncated"])
def test_a_picture_that_goes_while_training_stops_nothing(small_flags, sample, tmp_path, monkeypatch, harm):
    """The pictures were decoded before; a resume then names the one that is not what it was."""
    shutil.copytree(sample, tmp_path / "data")
    epochs = []

    def harmful(*arguments, train_epoch=main.train_epoch):
        epochs.append(None)
        if len(epochs) == 2:
            harm(tmp_path / "data" / "Images" / "00007.png")
        return train_epoch(*arguments)

    monkeypatch.setattr(main, "train_epoch", harmful)
    main.train(main.parse_config(small_flags(data_dir=tmp_path / "data"), "shapes")[0])
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 2
    with pytest.raises(UserError, match=r"00007\.png"):
        main.train(main.parse_config(small_flags(data_dir=tmp_path / "data", resume="yes"), "shapes")[0])
    with pytest.raises(UserError, match="captions or pictures have changed"):  # never silently on other data
        main.train(main.parse_config([*small_flags(data_dir=tmp_path / "data", resume="yes"), "--skip-bad"], "shapes")[0])


def test_a_picture_that_goes_while_it_is_decoded_is_named(small_flags, sample, tmp_path, monkeypatch):
    shutil.copytree(sample, tmp_path / "data")

    def harmful(paths, *arguments, read_images=images.read_images):
        paths[9].unlink()
        return read_images(paths, *arguments)

    monkeypatch.setattr(images, "read_images", harmful)
    with pytest.raises(UserError, match=r"\.png.*No such file.*--skip-bad"):
        main.train(main.parse_config(small_flags(data_dir=tmp_path / "data"), "shapes")[0])
    assert not (tmp_path / "run").exists()


# ---- checkpoints and folders -------------------------------------------------------------------------------------


def test_two_runs_in_one_folder_are_refused(ended, tmp_path):
    with lock_run_dir(tmp_path / "run"):
        for flags in ([], ["--resume", "auto"]):
            status, messages = ended("run", *flags)
            assert status == 2 and one_line(messages) and "another run is training there" in messages
    assert not (tmp_path / "run").exists()
    assert ended("run")[0] == 0


def test_a_checkpoint_with_any_byte_flipped_is_refused_and_the_one_before_offered(tmp_path, times):
    for value in (1.0, 2.0):
        write_checkpoint(tmp_path, {"weight": torch.full((50,), value)})
    good = (tmp_path / "last.pt").read_bytes()
    rng = np.random.default_rng(0)
    for position in [0, len(good) - 1, *rng.integers(len(good), size=times(300, 3000))]:
        bad = bytearray(good)
        bad[position] ^= 1 << rng.integers(8)
        (tmp_path / "last.pt").write_bytes(bad)
        with pytest.raises(UserError, match=r"last\.pt: damaged.*previous\.pt is the one before: rename it"):
            load_latest(tmp_path, dict)
        assert load_latest(tmp_path, dict, use_previous=True)["weight"][0] == 1
    for size in (0, 1, checkpoint.DIGEST_SIZE - 1, len(good) - 1):
        (tmp_path / "last.pt").write_bytes(good[:size])
        with pytest.raises(UserError, match="damaged"):
            load_latest(tmp_path, dict)


def test_after_a_flipped_byte_the_checkpoint_before_goes_on_to_the_same_end(ended, whole, tmp_path):
    assert ended("run", prepare=act_at_step, values=[8, terminate_oneself])[0] == 143
    run = tmp_path / "run"
    with open(run / "last.pt", "r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    status, messages = ended("run", "--resume")
    assert status == 2 and one_line(messages) and "rename it to last.pt" in messages
    os.replace(run / "previous.pt", run / "last.pt")
    assert ended("run", "--resume")[0] == 0
    assert_same(outcome(run), whole)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_not_executed(tmp_path):
    pickle.loads(pickle.dumps(Malicious(tmp_path / "done")))
    (tmp_path / "done").rmdir()  # it would work
    for content in (pickle.dumps(Malicious(tmp_path / "done")), None):
        if content:
            (tmp_path / "last.pt").write_bytes(content)
        else:
            write_checkpoint(tmp_path, {"weight": Malicious(tmp_path / "done")})  # with the right checksum, too
        with pytest.raises(UserError, match=r"last\.pt: damaged"):
            load_latest(tmp_path, dict)
    assert not (tmp_path / "done").exists()


def test_a_resume_within_an_epoch_keeps_its_batch_size(ended):
    assert ended("run", prepare=act_at_step, values=[5, terminate_oneself])[0] == 143
    status, messages = ended("run", "--resume", "--batch-size", "16")
    assert status == 2 and one_line(messages) and "--batch-size 16" in messages


# ---- memory and numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size, micro_batch_size, fewer", [(128, 0, 64), (128, 32, 16), (99, 0, 33)])
def test_exhausted_memory_names_the_flag_to_lower(batch_size, micro_batch_size, fewer):
    config, flag = Config(batch_size=batch_size, micro_batch_size=micro_batch_size), f"--micro-batch-size {fewer}"
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        assert str(to_user_error(error, config)).endswith(flag)
    other = RuntimeError("a shape does not fit")
    assert to_user_error(other, config) is other


def test_weights_that_are_not_finite_are_not_saved(ended, tmp_path):
    """The loss of the fifth step is no number, which nobody looks at before the epoch's last."""
    status, messages = ended("run", "--save-every", "1", prepare=act_at_step, values=[4, poison])
    assert status == 2 and one_line(messages) and f"{tmp_path / 'run'}: " in messages and "is not finite" in messages
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["model"].values())


def poison():
    """The next loss of this process is not a number."""
    steps.loss_over_captions = lambda logits: logits.sum() * float("nan")


def test_the_deterministic_flag_changes_nothing_on_a_cpu(ended, whole, tmp_path):
    assert ended("run", "--deterministic")[0] == 0
    assert_same(outcome(tmp_path / "run"), whole)


@pytest.mark.parametrize("lines", [1, 100_000], ids=["met at the end", "met on the way"])
def test_output_that_nobody_reads_ends_a_command_without_a_word(lines):
    reader, writer = os.pipe()
    os.close(reader)
    command = f"from utils.errors import run_command; run_command(lambda: [print('line') for _ in range({lines})])"
    with os.fdopen(writer, "w") as output:
        ended = subprocess.run([sys.executable, "-c", command], stdout=output, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (1, "")
