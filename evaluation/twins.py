"""Twins: of two scenes whose captions have the same words in another order, which one does a caption describe?"""

import random

import torch

from Datasets import shapes
from embedding import image_features, open_model, project_and_normalize, text_features, token_ids
from utils.files import write_json
from utils.images import resize_image

SIDE = 96  # pixels of a drawn picture
CHANCE = 50.0  # percent


def twin_scores(model, pairs, device, dtype, seed=0):
    """How often a caption is more similar to its own picture than to the other of its pair, in percent; a tie counts as wrong.

    pairs: `Datasets.shapes.ScenePair`s, whose pictures are drawn with the seed.
    Returns {"pairs", "accuracy", "chance", "color", "place", "relations"}: the accuracy of all, of those that swap colours, of
    those that swap places, and of all that swap no colours, for each relation that their captions say.
    """
    rng, size, resize = random.Random(seed), model.image_encoder.size, model.image_encoder.resize
    drawn = [resize_image(shapes.paint(scene, SIDE, rng), size, resize) for pair in pairs for scene in pair.scenes]
    I_f = image_features(model, drawn, device, dtype, len(drawn))
    captions = [caption for pair in pairs for caption in pair.captions]
    T_f = text_features(model, token_ids(model.tokenizer, captions), device, dtype)
    I_e = project_and_normalize(model.image_projection, I_f, device).unflatten(0, (-1, 2))  # (pairs, 2, d_e)
    T_e = project_and_normalize(model.text_projection, T_f, device).unflatten(0, (-1, 2))
    cosines = T_e @ I_e.mT  # (pairs, 2 captions, 2 pictures)
    correct = torch.stack([cosines[:, 0, 0] > cosines[:, 0, 1], cosines[:, 1, 1] > cosines[:, 1, 0]], dim=1)  # (pairs, 2)

    def accuracy(chosen):
        rows = [i for i, pair in enumerate(pairs) if chosen(pair)]
        return 100 * correct[rows].float().mean().item() if rows else None

    relations = dict.fromkeys(shapes.RELATIONS.values())
    by_relation = {name: accuracy(lambda pair, n=name: pair.swapped != "color" and pair.relation == n) for name in relations}
    swapped = {name: accuracy(lambda pair, n=name: pair.swapped == n) for name in ("color", "place")}
    return (
        {"pairs": len(pairs), "accuracy": accuracy(lambda pair: True), "chance": CHANCE} | swapped | {"relations": by_relation}
    )


def twins(options):
    """Scores word order: which of two drawn scenes does a caption describe, where both captions have the same words?"""
    model, device, dtype = open_model(options.run, options.device, options.precision)
    scores = twin_scores(model, shapes.twin_pairs(options.pairs, options.seed), device, dtype, options.seed)
    print(f"{options.pairs:,} pairs of twins, 2 captions each; chance {CHANCE:.0f}%")
    print(f"accuracy {scores['accuracy']:.1f}%")
    for name, accuracy in (
        ("colours swapped", scores["color"]),
        ("places swapped", scores["place"]),
        *scores["relations"].items(),
    ):
        if accuracy is not None:
            print(f"{name:16}{accuracy:6.1f}%")
    if options.json:
        write_json(options.json, scores)
