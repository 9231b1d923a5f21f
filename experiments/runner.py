"""The trainings that a lesson asks for, and the processes that run them."""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

import main
from config import PRESETS, Config, resolve_defaults, validate
from Datasets import shapes
from experiments.materials import make_materials, material_settings
from experiments.measures import MEASURES, Trained
from training.data import fetch_data
from utils.cache import cache_key
from utils.errors import UserError, to_user_error
from utils.files import FILE_MANAGERS, write_json

MATERIALS = ("seen_pairs", "pretrained", "generated")  # of a variant that are no settings; see experiments.materials
LESSON_FILES = re.compile(  # names of all that a lesson writes into its folder
    r"results\.json|table\.md|plot\.png|materials\.txt|runs|classes|seen-\d+|pretrained(-quick)?|\d+-generated-from-.+|.+\.tmp"
)
HISTORY = ["epoch", "loss", "val_loss", "temperature", "rsum"]  # columns of history.csv that a result keeps


@dataclass(frozen=True)
class Job:
    """One variant with one seed. folder: of the run and of what was measured."""

    variant: str
    seed: int
    config: Config
    materials: dict
    measures: tuple
    classes_dir: Path
    folder: Path

    @property
    def key(self):
        """Changes with anything that changes the result."""
        places = {"run_dir": "", "cache_dir": ""}
        return cache_key(dataclasses.asdict(replace(self.config, **places)), self.measures, self.materials)

    def result(self):
        """What was measured, {"key", "measured", "history"}, or None where it was not, or with other settings."""
        try:
            result = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
            return result if result["key"] == self.key else None
        except (OSError, ValueError, KeyError):
            return None


def require_lesson_folder(folder):
    """Raises UserError for a folder that is not empty and not a lesson's own, which materials.txt begins."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--output {folder}: is a file; name a folder")
    names = sorted(path.name for path in folder.iterdir() if path.name not in FILE_MANAGERS)
    foreign = [name for name in names if "materials.txt" not in names or not LESSON_FILES.fullmatch(name)]
    if foreign:
        raise UserError(f"--output {folder}: holds what is not of a lesson ({foreign[0]}); name a new folder")


def make_jobs(lesson, preset, given, seeds, output, quick):
    """A Job for each seed and variant. given: changes of the Config from the command line."""
    base = {} if "data_dir" in given else lesson.base
    jobs = []
    for seed in seeds:
        for number, (name, changes) in enumerate(lesson.variants.items()):
            settings = changes | (lesson.quick if quick else {})
            materials = {key: settings.pop(key) for key in MATERIALS if key in settings}
            folder = output / "runs" / f"{number:02}-seed-{seed}"
            places = {"run_dir": str(folder / "run")} | ({"cache_dir": str(folder / "cache")} if lesson.timed else {})
            config = replace(PRESETS[preset], **base | {"seed": seed} | places | given | settings)
            config = replace(config, **material_settings(materials, config, output, quick))
            config = resolve_defaults(config)
            validate(config)
            jobs.append(Job(name, seed, config, materials, lesson.measures, output / "classes", folder))
    return jobs


def run_job(job):
    """Trains a Job's variant and measures it, in a process of the pool. Returns seconds."""
    started = time.perf_counter()
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / "log.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            model = main.train(job.config)
        except RuntimeError as error:
            raise to_user_error(error, job.config) from None
        seconds = time.perf_counter() - started
        history = pd.read_csv(Path(job.config.run_dir) / "history.csv")
        seen = job.materials.get("seen_pairs", shapes.MAX_SEEN)
        trained = Trained(model, job.config, history, seconds, job.classes_dir, seen)
        measured = {name: float(MEASURES[name](trained)) for name in job.measures}
    write_json(job.folder / "result.json", {"key": job.key, "measured": measured, "history": history[HISTORY].to_dict("list")})
    return seconds


def start_worker(threads):
    """Makes a process of the pool use so many threads, and end at Ctrl-C instead of going on with the next job."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def train_all(jobs, workers):
    """Runs jobs in a pool of processes, each with its share of the cores, and prints a line for each that has ended."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    spawn = multiprocessing.get_context("spawn")  # forking a process whose libraries have threads is not safe
    pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, start_worker, (threads,))
    try:
        waiting = {pool.submit(run_job, job): job for job in jobs}
        for number, future in enumerate(concurrent.futures.as_completed(waiting), start=1):
            job, seconds = waiting[future], future.result()
            first = job.measures[0]
            value = job.result()["measured"][first]
            print(f"{number}/{len(jobs)}  {job.variant}, seed {job.seed}: {first} {value:.4g}, {seconds:.0f} s", flush=True)
    except BrokenProcessPool:
        where = jobs[0].folder.parent
        raise UserError(f"{where}: a training was killed, for lack of memory perhaps; run the lesson again to go on") from None
    finally:
        pool.shutdown(cancel_futures=True)


def prepare(jobs, output, quick):
    """Draws the sample, and makes the materials of jobs, before the pool starts, so that no two processes do it.

    What that prints goes into materials.txt.
    """
    for job in jobs:
        if "seen_pairs" not in job.materials:
            fetch_data(job.config, None)
    with open(output / "materials.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        for job in jobs:
            make_materials(job, output, quick)
