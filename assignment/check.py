"""Check the assignment: python assignment/check.py [FOLDER] gives points for each task, with a reason for each lost one.

FOLDER holds the files that assignment/make.py wrote, as the student has completed them; assignment/starter where none is named.
Each task runs in a process of its own, with a time limit, so that one that crashes or never ends costs its own points only.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it can be started from any folder

from utils.cli import POSITIONAL, run_cli
from utils.errors import UserError, run_command

STARTER = ROOT / "assignment" / "starter"
FUNCTIONS = {"loss": "contrastive_loss", "forward": "logits", "pooling": "pooled", "recall": "recall", "sampler": "draw"}
RUN = "run"  # the short training with the student's functions


@dataclass
class Grade:
    """Gives points for each task of the assignment, with a reason for each lost one."""

    folder: Path = field(default=STARTER, metadata=POSITIONAL)  # the completed files that assignment/make.py wrote
    seed: int = 0  # of the student's own sample and random tables
    task: str = ""  # check this task only
    json: str = ""  # file for the points and reasons

    def __post_init__(self):
        if not self.folder.is_dir():
            make = f"python assignment/make.py {self.folder}"
            raise UserError(f"{self.folder}: no such folder; write the starter files with {make}")
        if self.task not in ("", *FUNCTIONS, RUN):
            raise UserError(f"--task {self.task}: unknown; there are {', '.join((*FUNCTIONS, RUN))}")


if __name__ == "__main__":  # before the imports below, which take seconds to load
    OPTIONS = run_command(run_cli, Grade, "assignment/check.py", sys.argv[1:], ("python assignment/check.py my-solution",))

import concurrent.futures
import importlib.util
import json
import math
import multiprocessing
import os
import tempfile
import types

import numpy as np
import torch

import clip
import dataset
import main as training
import modules
from config import parse_config
from Datasets import shapes
from evaluation.retrieval import KS
from utils.files import require_own_results, write_json

TIME_LIMIT = 30  # seconds per task; the training has more
RUN_TIME_LIMIT = 120
FORKS = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows
PROCESSES = multiprocessing.get_context("forkserver" if FORKS else "spawn")
PROCESSES.set_forkserver_preload(["__main__", "main"])  # the imports are made once, and cost no task its time


def load_function(folder, task):
    """The student's function of a task. Raises ImportError where its file does not give it."""
    try:
        spec = importlib.util.spec_from_file_location(f"student_{task}", folder / f"{task}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, FUNCTIONS[task])
    except BaseException as error:  # the student's file may do anything, sys.exit() too
        raise ImportError(f"{task}.py cannot be imported: {type(error).__name__}: {error}") from None


def require(condition, reason):
    """Ends a check with a reason."""
    if not condition:
        raise AssertionError(reason)


def close(found, expected, reason):
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    require(found.shape == expected.shape, f"{reason}: shape {found.shape}, expected {expected.shape}")
    require(np.allclose(found, expected, atol=1e-4), f"{reason}: {found.round(3).tolist()}, not {expected.round(3).tolist()}")


# ---- the loss --------------------------------------------------------------------------------------------------------


def loss_by_hand(logits):
    """The pseudocode with explicit loops."""
    n, total = len(logits), 0.0
    for i in range(n):
        for line in (logits[i], logits[:, i]):
            total -= line[i] - math.log(sum(math.exp(value) for value in line))
    return total / (2 * n)


def uniform_logits_give_chance(loss, rng):
    for n in (2, 7):
        close(loss(torch.full((n, n), 0.3)).item(), math.log(n), f"uniform logits of {n} pairs give ln {n}")


def three_by_three_by_hand(loss, rng):
    close(loss(torch.eye(3) * math.log(2)).item(), math.log(2), "ln 2 on the diagonal, 0 elsewhere: each right one has 2 / 4")


def the_diagonal_is_right(loss, rng):
    right, wrong = torch.eye(4) * 9, torch.eye(4).flip(0) * 9
    require(loss(right).item() < 0.1 < loss(wrong).item(), "the pairs on the diagonal must be the right ones")


def both_sides_as_a_loop(loss, rng):
    logits = rng.normal(size=(5, 5)) * 3
    close(loss(torch.tensor(logits)).item(), loss_by_hand(logits), "the mean over rows and columns, against explicit loops")


# ---- forward ---------------------------------------------------------------------------------------------------------


def small_model(rng, scale=0.0):
    weight = torch.tensor(rng.normal(size=(4, 6)), dtype=torch.float32)
    project = lambda features: features @ weight.T  # noqa: E731
    return types.SimpleNamespace(image_projection=project, text_projection=project, logit_scale=torch.tensor(scale)), weight


def one_row_per_image(forward, rng):
    model, _ = small_model(rng)
    found = forward(model, torch.ones(2, 6), torch.ones(3, 6))
    require(tuple(found.shape) == (2, 3), f"2 images and 3 captions give (2, 3) logits, not {tuple(found.shape)}")


def of_features(rng):
    return (torch.tensor(rng.normal(size=(n, 6)), dtype=torch.float32) for n in (2, 3))


def cosines(weight, I_f, T_f):
    """The cosines of 2 images and 3 captions by hand."""
    pairs = [[(weight @ i, weight @ t) for t in T_f] for i in I_f]
    return [[(a @ b / a.norm() / b.norm()).item() for a, b in row] for row in pairs]


def embeddings_are_normalized(forward, rng):
    model, weight = small_model(rng)
    I_f, T_f = of_features(rng)
    close(forward(model, 5 * I_f, 3 * T_f), cosines(weight, I_f, T_f), "longer features must not change a cosine")


def cosines_by_hand(forward, rng):
    model, weight = small_model(rng)
    I_f, T_f = of_features(rng)
    close(forward(model, I_f, T_f), cosines(weight, I_f, T_f), "at a temperature of 1 the logits are the cosines")


def the_temperature_scales(forward, rng):
    I_f, T_f = of_features(rng)
    model, weight = small_model(rng, math.log(20.0))
    expected = [[20 * cosine for cosine in row] for row in cosines(weight, I_f, T_f)]
    close(forward(model, I_f, T_f), expected, "logit_scale ln 20 multiplies the cosines by 20")


# ---- pooling ---------------------------------------------------------------------------------------------------------


def pool(pooled, hidden, mask, pooling):
    """What a student's function makes of token outputs, (n, l, d_t)."""
    hidden, mask = torch.tensor(hidden), torch.tensor(mask)
    output = types.SimpleNamespace(last_hidden_state=hidden, hidden_states=(hidden, hidden))
    encoder = types.SimpleNamespace(backbone=lambda **given: output, pooling=pooling, layers=1)
    return pooled(encoder, torch.ones_like(mask), mask)


HIDDEN = [[[1.0, 2.0], [3.0, 4.0], [50.0, 60.0]], [[5.0, 6.0], [7.0, 8.0], [9.0, 10.0]]]
MASK = [[1, 1, 0], [1, 1, 1]]


def mean_of_the_real_tokens(pooled, rng):
    close(pool(pooled, HIDDEN, MASK, "mean"), [[2, 3], [7, 8]], "the mean over the mask")


def padding_changes_nothing(pooled, rng):
    longer = [row + [[99.0, 99.0]] for row in HIDDEN]
    for pooling in ("mean", "last", "first"):
        with_padding = pool(pooled, longer, [row + [0] for row in MASK], pooling)
        close(with_padding, pool(pooled, HIDDEN, MASK, pooling), f"more padding must not change the pooled vector ({pooling})")


def the_first_token(pooled, rng):
    close(pool(pooled, HIDDEN, MASK, "first"), [[1, 2], [5, 6]], "the first token")


def the_last_real_token(pooled, rng):
    close(pool(pooled, HIDDEN, MASK, "last"), [[3, 4], [9, 10]], "the last real token, which a causal encoder needs")


# ---- recall ----------------------------------------------------------------------------------------------------------


def recall_by_hand(similarity, image_of_text):
    """Both directions with explicit loops, ties against the model."""
    m, n = similarity.shape
    text_ranks = [sum(similarity[t, i] >= similarity[t, image_of_text[t]] for i in range(n)) for t in range(m)]  # with its own
    image_ranks = []
    for image in range(n):
        own = max(similarity[t, image] for t in range(m) if image_of_text[t] == image)
        others = sum(similarity[t, image] >= own for t in range(m) if image_of_text[t] != image)
        image_ranks.append(1 + others)
    return {"image_to_text": image_ranks, "text_to_image": text_ranks}


def compare_recall(recall, similarity, image_of_text, reason):
    found = recall(np.asarray(similarity, dtype=float), np.asarray(image_of_text))
    for direction, ranks in recall_by_hand(np.asarray(similarity, dtype=float), np.asarray(image_of_text)).items():
        for k in KS:
            expected = 100 * np.mean(np.array(ranks) <= k)
            close(found[direction][f"R@{k}"], expected, f"{reason}, {direction} R@{k}")
        close(found[direction]["median_rank"], np.median(ranks), f"{reason}, {direction} median rank")


def a_table_by_hand(recall, rng):
    found = recall(np.array([[0.9, 0.1], [0.8, 0.7]]), np.array([0, 1]))  # the second caption finds the first image
    close(found["text_to_image"]["R@1"], 50, "two captions, of which one finds its image, text to image R@1")
    close(found["image_to_text"]["R@1"], 100, "both images find their caption, image to text R@1")
    total = sum(found[direction][f"R@{k}"] for direction in ("image_to_text", "text_to_image") for k in KS)
    close(found["rsum"], total, "rsum is the sum of the six recalls")


def ties_count_against(recall, rng):
    found = recall(np.zeros((6, 3)), np.array([0, 0, 1, 1, 2, 2]))
    close([found[d]["R@1"] for d in ("image_to_text", "text_to_image")], [0, 0], "with all similarities equal R@1 is 0")


def uneven_captions(recall, rng):
    image_of_text = np.array([0, 0, 0, 0, 1, 2, 2, 3, 4, 5, 5, 5])
    compare_recall(recall, rng.normal(size=(12, 6)), image_of_text, "images with 1 to 4 captions")


def as_a_loop(recall, rng):
    compare_recall(recall, rng.normal(size=(60, 20)), np.repeat(np.arange(20), 3), "20 images with 3 captions each")


# ---- the sampler -----------------------------------------------------------------------------------------------------


def epoch(draw, seed, captions_per_image=1):
    captions_of = [np.arange(5 * i, 5 * i + 5) for i in range(40)]
    sampler = types.SimpleNamespace(captions_of=captions_of, real=40, generated=0, captions_per_image=captions_per_image)
    return draw(sampler, np.random.default_rng(seed))


def each_image_once(draw, rng):
    images = [image for image, _, _ in epoch(draw, 0)]
    require(sorted(images) == list(range(40)), f"each of 40 images must be drawn once; {len(set(images))} of them are")


def captions_are_the_images_own(draw, rng):
    for count in (1, 3):
        for image, captions, _ in epoch(draw, 0, count):
            require(len(set(captions)) == count, f"{count} different captions are asked for, {len(set(captions))} were drawn")
            require(
                all(caption // 5 == image for caption in captions), f"image {image} has captions {list(captions)} of another"
            )


def random_but_the_same_again(draw, rng):
    first, again, other = ([image for image, _, _ in epoch(draw, seed)] for seed in (0, 0, 1))
    require(first == again, "the same generator must give the same epoch")
    require(first != other and first != sorted(first), "the order must be random")


# ---- a short training ------------------------------------------------------------------------------------------------


def short_run(functions, seed):
    """The best rsum of a short training with the student's functions, and what chance would give. seed: of the sample."""
    clip.contrastive_loss = functions["loss"]
    clip.CLIPModel.logits = functions["forward"]
    modules.TextEncoder.pooled = functions["pooling"]
    dataset.PairSampler.draw = functions["sampler"]
    with tempfile.TemporaryDirectory() as folder:
        shapes.draw(f"{folder}/sample", train=1024, val=64, test=8, seed=seed)
        flags = ["shapes", "--data-dir", f"{folder}/sample", "--run-dir", f"{folder}/run", "--cache-dir", f"{folder}/cache"]
        config, _ = parse_config([*flags, "--batch-size", "64", "--epochs", "5", "--seed", str(seed)], "shapes")
        training.train(config)
        rows = (Path(folder) / "run" / "history.csv").read_text(encoding="utf-8").splitlines()
    column = rows[0].split(",").index("rsum")
    chance = 2 * 100 * sum(KS) / 64  # six recalls, of which each is about K of 64
    return max(float(row.split(",")[column]) for row in rows[1:]), chance


def beats_chance(functions, seed):
    rsum, chance = short_run(functions, seed)
    require(rsum > 2 * chance, f"a short training reaches rsum {rsum:.0f}, where chance is {chance:.0f}")


# ---- points ----------------------------------------------------------------------------------------------------------

CHECKS = {  # task: {check: points}
    "loss": {uniform_logits_give_chance: 5, three_by_three_by_hand: 5, the_diagonal_is_right: 5, both_sides_as_a_loop: 5},
    "forward": {one_row_per_image: 5, embeddings_are_normalized: 5, cosines_by_hand: 5, the_temperature_scales: 5},
    "pooling": {mean_of_the_real_tokens: 5, padding_changes_nothing: 5, the_first_token: 5, the_last_real_token: 5},
    "recall": {a_table_by_hand: 5, ties_count_against: 5, uneven_captions: 5, as_a_loop: 5},
    "sampler": {each_image_once: 4, captions_are_the_images_own: 4, random_but_the_same_again: 2},
    RUN: {beats_chance: 10},
}


def check_task(folder, task, seed):
    """[(points got, points possible, what is checked, reason)] of a task; the reason is empty where all points are got."""
    results = []
    try:
        if task == RUN:
            arguments = {name: load_function(folder, name) for name in FUNCTIONS if name != "recall"}, seed
        else:
            arguments = load_function(folder, task), np.random.default_rng(seed)
        broken = ""
    except ImportError as error:
        broken = str(error)
    for check, points in CHECKS[task].items():
        reason = broken
        if not broken:
            try:
                check(*arguments)
            except AssertionError as error:
                reason = str(error) or "an assertion failed"
            except BaseException as error:
                reason = f"{type(error).__name__}: {error}"
        results.append((0 if reason else points, points, check.__name__.replace("_", " "), " ".join(reason.split())[:300]))
    return results


def check_apart(folder, task, seed):
    """`check_task` in a process of its own, which ends after a time limit."""
    with tempfile.TemporaryDirectory() as results:
        path = Path(results) / "results.json"
        process = PROCESSES.Process(target=check_one_task, args=(folder, task, seed, path))
        process.start()
        limit = RUN_TIME_LIMIT if task == RUN else TIME_LIMIT
        process.join(limit)
        reason = "ended the process that checked it"
        if process.is_alive():
            process.kill()
            process.join()
            reason = f"did not end within {limit} seconds"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return [(0, points, check.__name__.replace("_", " "), reason) for check, points in CHECKS[task].items()]


def check_one_task(folder, task, seed, path):
    """Writes the result of `check_task` into a file. What the student's code prints is not shown."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    path.write_text(json.dumps(check_task(folder, task, seed)), encoding="utf-8")


def grade(options):
    """What `python assignment/check.py` does. options: a `Grade`."""
    require_own_results(options.json)
    folder = options.folder.resolve()
    tasks = [options.task] if options.task else list(CHECKS)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        checked = dict(zip(tasks, pool.map(lambda name: check_apart(folder, name, options.seed), tasks)))
    for name, results in checked.items():
        print(f"{name}: {sum(got for got, *_ in results)} of {sum(points for _, points, *_ in results)}")
        for got, points, what, reason in results:
            if reason:
                print(f"  -{points - got}  {what}: {reason}")
    got, possible = (sum(result[i] for results in checked.values() for result in results) for i in (0, 1))
    print(f"{got} of {possible} points")
    if options.json:
        write_json(options.json, {"points": got, "possible": possible, "tasks": checked})


if __name__ == "__main__":
    run_command(grade, OPTIONS)
