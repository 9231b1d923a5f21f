"""What fine-tuning forgets: a score of what the model could do before, and mixtures of old and new weights that keep it.

WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903): weights between those before and those after fine-tuning often have most of
the new skill and most of the old.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import torch

from captions import image_positions, load_captions
from clip import load_weights, save_weights
from embedding import file_features, text_features, token_ids
from evaluation.retrieval import score
from evaluation.zeroshot import find_pictures, top1_accuracy
from training import distributed
from training.checkpoint import TRADEOFF, TRAINED, best_rsum, has_checkpoint
from training.report import recalls_line, validate
from utils.errors import UserError
from utils.files import atomic_write
from utils.plots import draw_tradeoff

MIXTURES = 11  # shares of the new weights, from 0 to 1


def kept_pictures(config):
    """The classes, pictures and labels of --keep-folder. Raises UserError as `evaluation.zeroshot.find_pictures` does."""
    return find_pictures(config.keep_folder, config.keep_classes, "--keep-folder", "--keep-classes")


def check_kept(config):
    """Raises UserError where what the Config wants the model to keep is not there, before anything is decoded."""
    if config.keep_folder:
        kept_pictures(config)
        if config.keep_template.count("{}") != 1:
            raise UserError(f"--keep-template {config.keep_template!r}: write {{}} in it once, in place of the class name")
    if config.keep_data:
        load_captions(config.keep_data, skip_bad=config.skip_bad)


def kept_score(model, config, device, dtype):
    """How well a model does what the Config wants it to keep, in percent; None where it names nothing.

    For --keep-folder it is the zero-shot top-1 accuracy; for --keep-data the mean R@1 of both directions, over its validation
    images where it has some, else over all. Raises UserError for a folder without classes or captions.
    """
    if config.keep_folder:
        return top1_accuracy(
            model, kept_pictures(config), [config.keep_template], device, dtype, config.num_workers, config.skip_bad
        )
    if not config.keep_data:
        return None
    table, image_dir, _ = load_captions(config.keep_data, skip_bad=config.skip_bad)
    rows = table[table["split"] == "val"] if "val" in set(table["split"]) else table
    names, image_of_text = image_positions(rows)
    I_f, _ = file_features(model, [image_dir / name for name in names], device, dtype, config.num_workers)
    T_f = text_features(model, token_ids(model.tokenizer, rows["caption"]), device, dtype)
    scores = score(model, I_f, T_f, image_of_text, rows["caption"], device)
    return (scores["image_to_text"]["R@1"] + scores["text_to_image"]["R@1"]) / 2


@dataclass
class Start:
    """What a run starts from.

    rsum: on the validation images before the first step, of a whole model or of heads that were trained first; -1 for random
    weights.
    """

    rsum: float
    weights: dict | None = None  # a state dict, for --wise-ft


def score_start(config, model, splits, device, dtype):
    """The Start of a run. A whole model is scored before its first step, printed, and saved as the best so far."""
    run_dir = Path(config.run_dir)
    if not config.model:
        return Start(best_rsum(run_dir / "heads"))
    scores, kept = validate(model, splits["val"], config, device, dtype), kept_score(model, config, device, dtype)
    print(f"before the first step: {recalls_line(scores)}" + ("" if kept is None else f"  kept {kept:.1f}%"), flush=True)
    if distributed.is_main_process() and not has_checkpoint(run_dir):
        save_weights(model, run_dir)
    weights = {name: value.clone() for name, value in model.state_dict().items()} if config.wise_ft else None
    return Start(scores["rsum"], weights)


def mix(before, after, share):
    """The weights between two state dicts: before + share (after - before); integers are those after."""
    return {name: before[name].lerp(value, share) if value.is_floating_point() else value for name, value in after.items()}


def choose(rows, largest_loss):
    """The row with the best rsum among those that lose at most a share of the kept score. rows: rows[0] is the old model."""
    least = (1 - largest_loss) * rows[0]["kept"]
    return max((row for row in rows if row["kept"] >= least), key=lambda row: (row["rsum"], row["kept"]))


@torch.no_grad()
def keep_best_mixture(model, start, split, config, device, dtype):
    """Scores MIXTURES of the weights before training and of the best epoch, and gives the model the one that `choose` does.

    model: with the run's weights. start: a Start. split: the validation images. Writes tradeoff.csv and tradeoff.png into the
    run folder, and the chosen weights. Prints which it is.
    """
    run_dir, before, rows = Path(config.run_dir), start.weights, []
    best = best_rsum(run_dir)
    if (run_dir / TRAINED).exists():
        load_weights(model, run_dir / TRAINED)
    elif best <= start.rsum or (run_dir / TRADEOFF).exists():  # begun without --wise-ft, or by an earlier version
        return print("mixture: none, as the run kept the weights of no epoch; train it again with --wise-ft")
    if best <= start.rsum:
        print(f"no epoch beat the start: rsum {best:.1f} at best, {start.rsum:.1f} before; that epoch is mixed with the start")
    after = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(MIXTURES):
        share = number / (MIXTURES - 1)
        model.load_state_dict(mix(before, after, share))
        rsum = validate(model, split, config, device, dtype)["rsum"]
        rows.append({"share": share, "rsum": rsum, "kept": kept_score(model, config, device, dtype)})
    chosen = choose(rows, config.wise_ft_share)
    model.load_state_dict(mix(before, after, chosen["share"]))
    print(
        f"mixture: {chosen['share']:.0%} of the new weights, rsum {chosen['rsum']:.1f} (new {rows[-1]['rsum']:.1f}, old "
        f"{rows[0]['rsum']:.1f}), kept {chosen['kept']:.1f}% (new {rows[-1]['kept']:.1f}%, old {rows[0]['kept']:.1f}%)"
    )
    if distributed.is_main_process():
        save_weights(model, run_dir)
        atomic_write(run_dir / TRADEOFF, lambda path: write_rows(path, rows, chosen))
        draw_tradeoff(rows, chosen, run_dir / "tradeoff.png")


def write_rows(path, rows, chosen):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], "chosen"])
        writer.writeheader()
        writer.writerows(row | {"chosen": "yes" if row is chosen else ""} for row in rows)
