"""The model card of a run: what it was trained on and with, how well it does, and what it is not for."""

from pathlib import Path

from config import without_place
from storage import write_whole

CARD = """---
library_name: pytorch
pipeline_tag: zero-shot-image-classification
tags: [clip, image-text-retrieval]
---

# CLIP: {image} and {text}

Two towers that map pictures and captions into one space of {width} dimensions, trained with the symmetric loss of Radford et
al. 2021 (arXiv:2103.00020).

## Data

{train:,} training images with {train_captions:,} captions and {val:,} validation images, from `{data}`. Pictures are seen as
their middle square, {size} x {size} pixels.

## Towers

- Image: `{image}`, weights {image_weights}, {image_trained}. Licence of the weights it started from: {image_licence}.
- Text: `{text}`, weights {text_weights}, {text_trained}, pooled over {pooling}. Licence of the weights it started from:
  {text_licence}.

{epochs} epochs of {batch_size} pairs a step, seed {seed}; the best one on the validation images is kept. All settings stand in
`config.json`.

## Figures

Recall on the {val:,} validation images, in percent; chance of R@1 from text to image is {chance:.2f}.

| | R@1 | R@5 | R@10 | median rank |
|---|---|---|---|---|
{recalls}

The settings were chosen on these images, so others would score a little lower.

## Use

    import clip
    model, preprocess = clip.load("{run_dir}")

## Limits

It knows what its training captions speak of, and little else. It was neither tested on people's faces nor for decisions about
people, and repeats what its data and the weights it began from get wrong.
"""


def write_card(run_dir, config, model, splits, scores):
    """Writes RUN_DIR/README.md.

    splits: {"train": Pairs, "val": Pairs} of main.py. scores: what `evaluate.recall` gives for the validation split.
    """
    licence = getattr(model.image_encoder.tower, "pretrained_cfg", {}).get("license") or "see where they come from"
    none = "none, it began at random"
    columns = ("R@1", "R@5", "R@10", "median_rank")
    rows = []
    for side in ("image_to_text", "text_to_image"):
        cells = [side.replace("_", " "), *(f"{scores[side][column]:.1f}" for column in columns)]
        rows.append("| " + " | ".join(cells) + " |")
    text = CARD.format(
        image=config.image_encoder,
        text=without_place(config.text_encoder),
        width=model.image_projection.projection.out_features,
        train=len(splits["train"].names),
        train_captions=len(splits["train"].captions),
        val=len(splits["val"].names),
        data=Path(config.data_dir or config.captions_path).name,
        size=model.image_encoder.size,
        image_weights=Path(config.image_weights).name,
        text_weights=config.text_weights,
        image_trained="held still" if config.freeze in ("image", "both") else "trained",
        text_trained="held still" if config.freeze in ("text", "both") else "trained",
        image_licence=none if config.image_weights == "random" else licence,
        text_licence=none if config.text_weights == "random" else "see where they come from",
        pooling={"first": "the first token", "mean": "all tokens", "last": "the last token"}[model.text_encoder.pooling],
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        chance=100 / len(splits["val"].names),
        recalls="\n".join(rows),
        run_dir=Path(run_dir).name,
    )
    write_whole(Path(run_dir) / "README.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))
