"""What is printed and drawn during training and at its end, and the rows of history.csv."""

import math
from pathlib import Path

import numpy as np

from config import generated_per_batch, is_stream
from embedding import embed_texts, picture_vectors, project_and_normalize, text_features, token_ids
from encoders.hubness import BANK, Hubness
from encoders.tokenizer import count_unknown
from evaluation.relevance import relevance_line, write_relevance
from evaluation.retrieval import (
    FEW,
    number_captions,
    recall,
    recall_table,
    repeats_line,
    right_pairs,
    score,
    similarities,
)
from training import distributed
from training.checkpoint import PREVIOUS, TRADEOFF
from training.data import Split, count_cut, some_pairs, split_features
from training.losses import SIDES, Objective
from training.model_card import write_card
from utils.errors import UserError
from utils.images import center_crop
from utils.plots import draw_curves, draw_generated, draw_matches, draw_similarity

NUM_QUERIES, NUM_MATCHES, NUM_PAIRS = 5, 6, 8  # in matches.png and similarity.png
NUM_GENERATED = 8  # in generated.png
MAX_HALF = 1000  # images of a half, as their captions' scores are copied for each
NUM_HALVES, MIN_WORSE = 100, 95  # random halves of the validation images, and in how many a correction that is dropped loses


def validate(model, split, config, device, dtype):
    """Recall on a split, as `evaluation.retrieval.recall` gives it, its "loss", in batches as in training, and its "images"."""
    I_f, T_f = split_features(model, split, device, dtype)
    loss = validation_loss(model, I_f, T_f, split.image_of_text, config, device)
    return score(model, I_f, T_f, split.image_of_text, split.captions, device) | {"loss": loss, "images": len(I_f)}


def validation_loss(model, I_f, T_f, image_of_text, config, device):
    """The mean loss of images, each with its first caption, in batches of their order; right is the image's own caption.

    I_f: (n, d_i). T_f: (m, d_t). A last, smaller batch is left out, as it would be easier; with fewer than batch_size images
    there is one batch of all. Nothing is random, so training goes on as it would without this.
    """
    _, first_captions = np.unique(image_of_text, return_index=True)
    I_e = project_and_normalize(model.image_projection, I_f, device)
    T_e = project_and_normalize(model.text_projection, T_f[first_captions], device)
    n, objective = min(config.batch_size, len(I_e)), Objective(config.loss)
    scale, bias = (value if value is None else value.detach().cpu() for value in (model.logit_scale, model.logit_bias))
    batches = [slice(start, start + n) for start in range(0, len(I_e) - n + 1, n)]
    return float(np.mean([objective.batch_loss(I_e[rows], T_e[rows], scale, bias).item() for rows in batches]))


def print_setup(config, model, splits, image_dir, num_skipped, device, dtype):
    """Prints the data set, the model and the settings."""
    counts = [f"{split.num_images:,} {name} images ({split.num_captions:,} captions)" for name, split in splits.items()]
    where = config.data_dir if is_stream(config.data_dir) else image_dir
    print(f"{' and '.join(counts)} from {where}; left out: {num_skipped}")
    print("\n".join(splits["val"].notes.lines()))
    cut = sum(count_cut(model.tokenizer, split) for split in splits.values())
    if cut:
        print(f"{cut:,} captions are longer than {model.tokenizer.truncation['max_length']} tokens, and are cut there")
    unknown = sum(count_unknown(model.tokenizer, split.captions) for split in splits.values())
    if unknown:
        print(
            f"{unknown:,} captions are mostly unknown to the text encoder's tokenizer, and cannot be told apart: use one that "
            "knows their language (--text-encoder xlm-roberta-base), or --text-weights random --text-encoder distilbert, whose "
            "vocabulary is made from the captions"
        )
    if splits["train"].sources:
        extra = generated_per_batch(config)
        count = len(splits["train"].sources)
        print(f"of the train images {count:,} are generated, {extra} in each batch of {config.batch_size}")
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{config.image_encoder} at {model.image_encoder.size} px, {config.text_encoder}, {millions:.1f} million parameters")
    if repeats := repeats_line(splits["val"].captions, splits["val"].image_of_text):
        print(f"validation: {repeats}")
    print(f"freeze {config.freeze}, pooling {model.text_encoder.pooling}, {device}, {str(dtype).removeprefix('torch.')}")


def recalls_line(scores):
    """Recalls as they are printed for an epoch. scores: from `validate`."""
    texts = []
    for direction in ("image_to_text", "text_to_image"):
        recalls = "/".join(f"{scores[direction][f'R@{k}']:.1f}" for k in (1, 5, 10))
        texts.append(f"{direction.replace('_', ' ')} {recalls}")
    few = f" over {scores['images']} images" if scores["images"] < FEW else ""
    return f"{'  '.join(texts)}  rsum {scores['rsum']:.1f}{few}"


def history_row(state, trained, scores, kept, seconds):
    """A row of history.csv. trained: what `train_epoch` gives; scores: what `validate` gives; kept: `keeping.kept_score`."""
    # A model that knows nothing has the loss ln(n); for sigmoid and bce no such value is known.
    chance = math.log(state.config.batch_size) if state.config.loss in SIDES else math.nan
    row = {"epoch": len(state.history) + 1, "loss": trained["loss"], "chance_loss": chance}
    row |= {"val_loss": scores["loss"], "temperature": math.exp(-state.model.logit_scale.item())}
    row["lr_scale"] = trained["lr_scale"]
    for direction in ("image_to_text", "text_to_image"):
        row |= {f"{direction}_{name}": value for name, value in scores[direction].items()}
    row |= {} if kept is None else {"kept": kept}
    return row | {"skipped_steps": trained["skipped_steps"], "rsum": scores["rsum"], "seconds": seconds}


def print_epoch(row, scores, epochs, best):
    """Prints an epoch's results. row: of `history_row`, made from the scores. best: the best so far gets a star."""
    skipped, chance = row["skipped_steps"], row["chance_loss"]
    kept = f"  kept {row['kept']:.1f}%" if "kept" in row else ""
    chance = "" if math.isnan(chance) else f" (chance {chance:.3f})"
    print(
        f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}  loss {row['loss']:.3f}{chance}  "
        f"temperature {row['temperature']:.3f}  {recalls_line(scores)}{'*' if best else ' '}{kept} {row['seconds']:.1f} s"
        + (f"  skipped: {skipped} steps whose gradients were not finite in fp16" if skipped else ""),
        flush=True,
    )


def draw_generated_pictures(state, split, device, dtype):
    """Draws generated.png: generated pictures for some captions of a split, below the centre crops of the real ones."""
    model, every = state.scored_model, max(1, len(split.captions) // NUM_GENERATED)
    chosen = range(0, len(split.captions), every)[:NUM_GENERATED]
    captions = [split.captions[i] for i in chosen]
    real = [center_crop(split.pictures[split.image_of_text[i]], model.image_encoder.size) for i in chosen]
    T_f = text_features(model, token_ids(model.tokenizer, captions), device, dtype)
    pictures = state.joint.pictures(project_and_normalize(model.text_projection, T_f, device))
    path = Path(state.config.run_dir) / "generated.png"
    draw_generated(f"validation captions, epoch {len(state.history)}", captions, real, pictures, path)


def write_report(state, splits, start, device, dtype):
    """Scores the best epoch's model again, prints it, and writes curves, examples and the model card.

    start: the `keeping.Start` of the run.
    """
    run_dir, model, history, validation = Path(state.config.run_dir), state.model, state.history, splits["val"]
    I_f, T_f = split_features(model, validation, device, dtype)
    scores = score(model, I_f, T_f, validation.image_of_text, validation.captions, device)
    best, chance = max(history, key=lambda row: row["rsum"]), 100 / len(validation.names)
    before = "before fine-tuning" + ("" if state.config.model else " (heads only)")
    improved, mixed = best["rsum"] > start.rsum, state.config.wise_ft and (run_dir / TRADEOFF).exists()
    summary = "mixture" if mixed else f"best epoch {best['epoch']}" if improved else f"best {before}"
    print(f"\n{summary}, in {run_dir}; validation recall in percent (chance of R@1 from text to image: {chance:.2f}):")
    print(recall_table(scores, len(validation.names)))
    if validation.notes.caution:
        print(validation.notes.caution)
    if start.rsum >= 0:
        print(f"rsum {start.rsum:.1f} {before}, {scores['rsum']:.1f} now")
    hubness = learn_hubness(model, splits["train"], device, dtype)
    if hubness:
        scores = correct_hubs(model, hubness, scores, validation, I_f, T_f, device, run_dir)
    if distributed.is_main_process():
        draw_curves(history, run_dir / "curves.png")
        draw_examples(model, validation, I_f, T_f, device, run_dir)
        learn_relevance(model, validation, I_f, device, run_dir)
        kept = (
            "a mixture of those before and after"
            if mixed
            else f"those of epoch {best['epoch']}"
            if improved
            else f"those {before}"
        )
        write_card(run_dir, state.config, model, splits, scores, validation.notes, kept)
        (run_dir / PREVIOUS).unlink(missing_ok=True)  # needed only while training goes on


def learn_hubness(model, train, device, dtype):
    """The `Hubness` of a model, whose banks are the centre crops of at most BANK training pictures and a caption of each.

    train: a `training.data.Split`. None for a `Stream`, which has no features of all.
    """
    if not isinstance(train, Split):
        return None
    chosen = np.linspace(0, train.num_real, min(BANK, train.num_real), endpoint=False).astype(int)
    banks = zip(
        (model.image_projection, model.text_projection), split_features(model, some_pairs(train, chosen), device, dtype)
    )
    rounded = [project_and_normalize(head, features, device).half().float() for head, features in banks]  # as it is saved
    return Hubness(*rounded, model.logit_scale.exp().item())


def correct_hubs(model, hubness, scores, validation, I_f, T_f, device, run_dir):
    """Gives a model a `Hubness` and keeps it in run_dir unless recall is lower for sure. Returns the scores to report.

    scores: of the cosines alone. validation: a Split, whose features are I_f and T_f. One figure would be no reason: among few
    images chance decides it, and where the correction was measured it helped.
    """
    image_of_text, before = validation.image_of_text, similarities(model, I_f, T_f, device)
    model.hubness = hubness
    right = right_pairs(image_of_text, number_captions(validation.captions), before.shape[1])
    after = similarities(model, I_f, T_f, device)
    corrected = recall(after, image_of_text, right)
    worse = count_worse(before, after, image_of_text, right) if corrected["rsum"] < scores["rsum"] else 0
    helps = worse < MIN_WORSE
    kept = "kept, although" if helps else "not kept, as"
    kept = f"{kept} rsum is lower in {worse} of {NUM_HALVES} random halves of the images" if worse else "kept"
    print(f"hubness correction: rsum {corrected['rsum']:.1f} instead of {scores['rsum']:.1f}; {kept}")
    if not helps:
        model.hubness = None
        return scores
    print(recall_table(corrected, len(validation.names)))
    if distributed.is_main_process():
        hubness.save(run_dir)
    return corrected | {"cosines": scores}


def count_worse(before, after, image_of_text, right):
    """In how many of NUM_HALVES random halves of the images the rsum after a correction is lower.

    before, after: (m, n) scores. image_of_text: (m,), right: (m, n), as for `evaluation.retrieval.recall`. The rsum of halves
    varies as that of bootstrap samples does, which would hold some images twice.
    """
    n, rng, worse = before.shape[1], np.random.default_rng(0), 0
    for _ in range(NUM_HALVES):
        images = np.sort(rng.choice(n, min(-(-n // 2), MAX_HALF), replace=False))
        rows = np.flatnonzero(np.isin(image_of_text, images))
        part, own = np.ix_(rows, images), np.searchsorted(images, image_of_text[rows])
        rsums = [recall(similarity[part], own, right[part])["rsum"] for similarity in (before, after)]
        worse += rsums[1] < rsums[0]
    return worse


def learn_relevance(model, split, I_f, device, run_dir):
    """Writes what a search needs to say how probably a picture matches, and prints how it does."""
    I_v = picture_vectors(model, I_f, device).numpy()
    try:
        unseen = write_relevance(
            run_dir, I_v, split.captions, split.image_of_text, lambda texts: embed_texts(model, texts).numpy()
        )
        print(relevance_line(unseen))
    except UserError as error:
        print(f"no match probabilities: {error}")


def draw_examples(model, split, I_f, T_f, device, run_dir):
    """Draws similarity.png, some images against a caption of each, and matches.png, the best matches of some captions."""
    images = np.arange(len(split.names))[:: max(1, len(split.names) // NUM_PAIRS)][:NUM_PAIRS]
    captions_of_image = [np.flatnonzero(split.image_of_text == image) for image in images]
    rows = [captions[i % len(captions)] for i, captions in enumerate(captions_of_image)]  # not always an image's first caption
    similarity = similarities(model, I_f, T_f[rows], device)  # (NUM_PAIRS, n)
    captions = [split.captions[row] for row in rows]
    draw_similarity([split.pictures[i] for i in images], captions, similarity[:, images], run_dir / "similarity.png")
    searches = []
    for caption, scores, image in list(zip(captions, similarity, images))[:NUM_QUERIES]:
        best = np.argsort(-scores, kind="stable")[:NUM_MATCHES]
        right = int(np.flatnonzero(best == image)[0]) if image in best else None
        searches.append((caption, [split.pictures[i] for i in best], [f"{scores[i]:.2f}" for i in best], right))
    draw_matches(searches, run_dir / "matches.png")
