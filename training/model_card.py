"""The model card of a run: training data, encoders, settings, results and limits."""

from pathlib import Path

from config import last_part
from evaluation.retrieval import few_note
from utils.device import pick_dtype
from utils.files import atomic_write

CARD = """---
library_name: pytorch
pipeline_tag: zero-shot-image-classification
tags: [clip, image-text-retrieval]
---

# CLIP: {image} and {text}

An image encoder and a text encoder that embed pictures and captions in one space of {width} dimensions, trained with
{loss}.

## Data

{train:,} training images with {train_captions:,} captions and {val:,} validation images, from `{data}`. The
input is the centre crop of each picture, {size} x {size} pixels.{split}

## Encoders

- Image: `{image}`, weights {image_weights}, {image_trained}. Licence of the weights it started from: {image_licence}.
- Text: `{text}`, weights {text_weights}, {text_trained}, pooled over {pooling}. Licence of the weights it started from:
  {text_licence}.

{length} with a batch size of {batch_size} pairs, seed {seed}; the weights are {kept}, the best on the validation
images. `config.json` has all settings.

## Results

Recall on the {val:,} validation images, in percent, computed in {precision}. A random ranking has an R@1 of
{chance:.2f} from text to image.

| | R@1 | R@5 | R@10 | median rank |
|---|---|---|---|---|
{recalls}

The sum of the six recalls is {rsum:.1f}{few}. {correction}The settings were
chosen on these images, so results on others will be a little lower.

## Use

In {place}:

    import clip
    model, preprocess = clip.load("{run_dir}")

A copy of it is loaded by its folder, or from a model hub as `clip.load("USER/NAME")`.

## Limits

It knows what its training captions describe, and little else. It was not tested on people's faces or for decisions about
people, and it repeats the errors and biases of its data and of the weights it started from.
"""


CORRECTION = """The first two rows, and this sum, are of scores that are corrected for hubness, as a search uses them; with the
cosines alone, as in `history.csv` and as the models of `clip.load` give them, the sum is {rsum:.1f}.

"""
POOLINGS = {"first": "the first token", "mean": "all tokens", "last": "the last token"}
SOFTMAX = "the symmetric contrastive loss of Radford et al. 2021 (arXiv:2103.00020)"
LOSSES = {
    "softmax": SOFTMAX,
    "image": f"the image side of {SOFTMAX}",
    "text": f"the text side of {SOFTMAX}",
    "sigmoid": "the sigmoid loss of Zhai et al. 2023 (arXiv:2303.15343)",
    "bce": "the mean binary cross-entropy over all pairs of a batch",
}


def write_card(run_dir, config, model, splits, scores, notes=None, kept="those of an epoch"):
    """Writes RUN_DIR/README.md.

    splits: {"train": Split, "val": Split}. scores: of the validation split, from `evaluation.retrieval.recall`; where they are
    corrected for hubness with a key more, "cosines", the scores without that. notes: the `loading.splits.SplitNotes` of the
    data. kept: what the weights are.
    """
    licence = getattr(model.image_encoder.backbone, "pretrained_cfg", {}).get("license") or "see their source"
    none = "none, it was initialised randomly"
    columns = ("R@1", "R@5", "R@10", "median_rank")
    rows, sides = [], ("image_to_text", "text_to_image")
    for kind, found in (("", scores), (", cosines", scores.get("cosines", {}))):
        for side in filter(found.__contains__, sides):
            cells = [f"{side.replace('_', ' ')}{kind}", *(f"{found[side][column]:.1f}" for column in columns)]
            rows.append("| " + " | ".join(cells) + " |")
    below = Path(run_dir).resolve().is_relative_to(Path.cwd())  # else only its name: a card names no folder of this machine
    val, dtype = len(splits["val"].names), pick_dtype(config.precision, model.logit_scale.device)
    correction = CORRECTION.format(**scores["cosines"]) if "cosines" in scores else ""
    split = [f"Split: {notes.rule}.", *(f"**{line}.**" for line in [notes.caution] if line)] if notes else []
    text = CARD.format(
        split="".join(f"\n\n{line}" for line in split),
        kept=kept,
        rsum=sum(scores[side][column] for side in sides for column in columns[:3]),
        few=few_note(val),
        correction=correction,
        precision=str(dtype).removeprefix("torch."),
        image=last_part(config.image_encoder),
        text=last_part(config.text_encoder),
        width=model.image_projection.out_features,
        train=splits["train"].num_images,
        train_captions=splits["train"].num_captions,
        val=val,
        data=last_part(config.data_dir or config.captions_path),
        size=model.image_encoder.size,
        image_weights=last_part(config.model) or Path(config.image_weights).name,
        text_weights=last_part(config.model) or config.text_weights,
        image_trained="frozen" if config.freezes("image") else "trained",
        text_trained="frozen" if config.freezes("text") else "trained",
        image_licence=none if config.image_weights == "random" and not config.model else licence,
        text_licence=none if config.text_weights == "random" and not config.model else "see their source",
        pooling=POOLINGS.get(model.text_encoder.pooling, "what it was trained with"),
        loss=LOSSES[config.loss],
        length=f"{config.steps} steps" if config.steps else f"{config.epochs} epochs",
        batch_size=config.batch_size,
        seed=config.seed,
        chance=100 / val,
        recalls="\n".join(rows),
        place="the project's folder" if below else "the folder that this run's folder is in, with the project on PYTHONPATH",
        run_dir=Path(run_dir).resolve().relative_to(Path.cwd()).as_posix() if below else Path(run_dir).name,
    )
    atomic_write(Path(run_dir) / "README.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))
