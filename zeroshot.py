"""Zero-shot classification: the class whose prompts a picture is most like (section 3.1 of the paper)."""

import json
import re
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro

from captions import read_text
from dataset import PICTURE_ENDINGS
from embedding import file_features, open_model, project, text_features, token_ids
from plots import draw_confusion
from storage import UserError, write_json

WORDNET_ID = r"n\d{8}"


def class_names(folders, names_file=""):
    """The names of the classes, and each folder's position among them.

    folders: names of class folders. Without a names file they are the classes' names, underscores being spaces.
    names_file: all classes, of which some may have no folder. A line a class: its name, or a folder's name and, behind a tab
    or, where it is a wordnet id, a space, the name; or ImageNet's {"0": ["n01440764", "tench"], ...}. Of several names
    between commas the first counts.

    Returns (names, {folder: position}). Raises UserError for a folder that is not in the list and for wordnet ids without one.
    """
    if not names_file:
        unnamed = [folder for folder in folders if re.fullmatch(WORDNET_ID, folder)]
        if unnamed:
            raise UserError(f"{unnamed[0]}: a wordnet id says nothing to the model; name the classes with --classes FILE")
        return [plain(folder) for folder in folders], {folder: position for position, folder in enumerate(folders)}
    text = read_text(names_file, "--classes")
    if Path(names_file).suffix == ".json":
        try:
            pairs = [tuple(pair) for _, pair in sorted(json.loads(text).items(), key=lambda item: int(item[0]))]
            pairs = [(folder, name) for folder, name in pairs]
        except (ValueError, AttributeError, TypeError):
            raise UserError(f'{names_file}: not in the layout {{"0": ["n01440764", "tench"], ...}}') from None
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        pairs = [re.match(rf"({WORDNET_ID}) +(.+)|([^\t]+)\t(.+)|(.+)", line).groups() for line in lines]
        pairs = [(a or c or e, b or d or e) for a, b, c, d, e in pairs]
    names = [plain(name.split(",")[0]) for _, name in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{names_file}: two classes are called {twice!r}; tell them apart")
    positions = {plain(folder): position for position, (folder, _) in enumerate(pairs)}
    for folder in folders:
        if plain(folder) not in positions:
            raise UserError(f"{names_file}: the folder {folder} is not among its {len(names)} classes; add a line")
    return names, {folder: positions[plain(folder)] for folder in folders}


def plain(name):
    return name.replace("_", " ").strip()


def find_pictures(images, names_file=""):
    """(names, paths, labels) of a folder of class folders: c class names, n picture paths, and (n,) each one's class.

    Raises UserError where there are no class folders, fewer than two classes, or no pictures.
    """
    if not Path(images).is_dir():
        raise UserError(f"--images {images}: no such folder")
    folders = sorted(path.name for path in Path(images).iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UserError(f"--images {images}: no class folders there; put each class's pictures into a folder named after it")
    names, positions = class_names(folders, names_file)
    if len(names) < 2:
        raise UserError(f"--images {images}: only the class {names[0]}; there is nothing to tell it from")
    paths, labels = [], []
    for folder in folders:
        found = sorted(path for path in (Path(images) / folder).rglob("*") if path.suffix.lower() in PICTURE_ENDINGS)
        paths += found
        labels += [positions[folder]] * len(found)
    if not paths:
        raise UserError(f"--images {images}: no pictures in its {len(folders)} folders ({', '.join(sorted(PICTURE_ENDINGS))})")
    return names, paths, torch.tensor(labels)


def classifier(model, names, templates, device, dtype):
    """The weights of a zero-shot classifier of c classes, (c, d_e): what encoding its prompts gives, of length 1.

    templates: texts with {} where the class name goes. Where there are several, a class's embeddings are averaged, which
    costs no more than one when classifying (section 3.1.4 of the paper).
    Raises UserError for a template without {}.
    """
    for template in templates or [""]:
        if template.count("{}") != 1:
            raise UserError(f"--template {template!r}: must hold {{}} once, where the class name goes")
    prompts = [template.replace("{}", name) for name in names for template in templates]
    T_f = text_features(model, token_ids(model.tokenizer, prompts), device, dtype)
    T_e = project(model.text_projection, T_f, device).view(len(names), len(templates), -1)  # (c, templates, d_e)
    return F.normalize(T_e.mean(dim=1), dim=1)


def zeroshot(
    run: str,
    images: str,
    classes: str = "",
    template: tuple[str, ...] = ("a photo of a {}.",),
    skip_bad: bool = False,
    num_workers: int = 4,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    output: str = "confusion.png",
    json_path: Annotated[str, tyro.conf.arg(name="json")] = "",
):
    """Classifies pictures by the names of their classes alone: top-1 and top-5 accuracy, and a confusion matrix.

    Args:
        run: run folder, or one of OpenAI's names
        images: folder with a folder of pictures for each class
        classes: file of all class names, a line each; "n01440764 tench" or "folder<TAB>name" names a folder
        template: prompts with {} for the class name; several are averaged
        skip_bad: leave out pictures that cannot be decoded instead of stopping
        num_workers: threads that decode pictures
        device: auto, cpu, cuda, cuda:1, mps
        precision: of matrix products; auto: bf16 where native, else fp32
        output: PNG of the confusion matrix
        json_path: file for the scores
    """
    names, paths, labels = find_pictures(images, classes)
    model, device, dtype = open_model(run, device, precision)
    weights = classifier(model, names, template, device, dtype)  # (c, d_e)
    I_f, bad = file_features(model, paths, device, dtype, num_workers, skip_bad)
    labels = labels[[position for position in range(len(paths)) if position not in bad]]
    similarity = project(model.image_projection, I_f, device) @ weights.T  # (n, c)
    top = similarity.topk(min(5, len(names)), dim=1).indices  # (n, 5)
    hits = top == labels[:, None]
    scores = {"images": len(labels), "classes": len(names)}
    scores |= {"top1": 100 * hits[:, 0].float().mean().item(), "top5": 100 * hits.any(dim=1).float().mean().item()}
    if bad:
        print(f"left out: {len(bad)} pictures")
    print(f"{len(labels):,} pictures of {len(names):,} classes; chance of top-1 {100 / len(names):.2f}%")
    print(f"top-1 {scores['top1']:.1f}%  top-5 {scores['top5']:.1f}%")
    counts = torch.bincount(labels * len(names) + top[:, 0], minlength=len(names) ** 2).view(len(names), -1)
    draw_confusion(names, counts.numpy(), output)
    print(f"drawn in {output}")
    if json_path:
        write_json(json_path, scores)
