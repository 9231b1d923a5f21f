"""Zero-shot classification: a picture's class is the one whose prompts are most similar to it (section 3.1 of the paper)."""

import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F

from embedding import file_features, open_model, project_and_normalize, text_features, token_ids
from utils.errors import UserError
from utils.files import read_text, write_json
from utils.folders import NUM_NAMED, LeftOut, is_hidden, walk_pictures
from utils.formats import PICTURE_ENDINGS
from utils.plots import draw_confusion

WORDNET_ID = r"n\d{8}"  # names of ImageNet's class folders


def class_names(folders, names_file="", flag="--classes"):
    """The names of the classes, and the label of each class folder.

    folders: names of class folders. Without a names file they are the class names, with underscores for spaces.
    names_file: lists all classes, of which some may have no folder. Each line is a class name, or a folder name and a class
    name, with a tab between them (after a WordNet id a space will do). It can also be ImageNet's JSON,
    {"0": ["n01440764", "tench"], ...}. Of several names with commas between them only the first is used.

    Returns (names, {folder: label}), a label being an index into names.
    Raises UserError for a folder that is not in the file, and for WordNet ids without a file.
    """
    if not names_file:
        wordnet_ids = [folder for folder in folders if re.fullmatch(WORDNET_ID, folder)]
        if wordnet_ids:
            raise UserError(f"{wordnet_ids[0]}: a WordNet id is not a class name; name the classes with {flag} FILE")
        return [plain(folder) for folder in folders], {folder: label for label, folder in enumerate(folders)}
    text = read_text(names_file, flag)
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
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{names_file}: two classes are called {repeated!r}; give them different names")
    labels = {plain(folder): label for label, (folder, _) in enumerate(pairs)}
    for folder in folders:
        if plain(folder) not in labels:
            raise UserError(f"{names_file}: the folder {folder} is not among its {len(names)} classes; add a line")
    return names, {folder: labels[plain(folder)] for folder in folders}


def plain(name):
    """A class name as it is written in a prompt: with spaces, not underscores."""
    return name.replace("_", " ").strip()


def find_pictures(images, names_file="", flag="--images", names_flag="--classes"):
    """The pictures of a folder that has one subfolder per class. flag, names_flag: how messages call it, and the file.

    Returns (names, paths, labels): c class names, n picture paths, and the (n,) labels.
    What is hidden or cannot be read is left out, and printed.
    Raises UserError if there are no class folders, fewer than two classes, or no pictures.
    """
    if not Path(images).is_dir():
        raise UserError(f"{flag} {images}: no such folder")
    folders = sorted(path.name for path in Path(images).iterdir() if path.is_dir() and not is_hidden(path.name))
    if not folders:
        raise UserError(f"{flag} {images}: no class folders there; put each class's pictures into a folder named after it")
    names, label_of_folder = class_names(folders, names_file, names_flag)
    if len(names) < 2:
        raise UserError(f"{flag} {images}: only the class {names[0]}; classification needs at least two")
    paths, labels, left_out = [], [], LeftOut()
    for folder in folders:
        try:
            class_paths = sorted(Path(path) for path, *_ in walk_pictures(Path(images) / folder, left_out))
        except OSError as error:
            raise UserError(f"{flag} {Path(images) / folder}: cannot be listed ({error.strerror}); fix or remove it") from None
        paths += class_paths
        labels += [label_of_folder[folder]] * len(class_paths)
    for line in left_out.lines():
        print(line)
    if not paths:
        raise UserError(f"{flag} {images}: no pictures in its {len(folders)} folders ({', '.join(sorted(PICTURE_ENDINGS))})")
    return names, paths, torch.tensor(labels)


def classifier(model, names, templates, device, dtype):
    """The weights of a zero-shot classifier of c classes, (c, d_e): the L2-normalised embeddings of the classes' prompts.

    templates: prompts with {} in place of the class name. If there are several, the embeddings of a class are averaged, so
    classifying a picture costs no more than with one (prompt ensembling, section 3.1.4 of the paper).
    Raises UserError for a template that does not have {} exactly once.
    """
    for template in templates or [""]:
        if template.count("{}") != 1:
            raise UserError(f"template {template!r}: write {{}} in it once, in place of the class name")
    prompts = [template.replace("{}", name) for name in names for template in templates]
    T_f = text_features(model, token_ids(model.tokenizer, prompts), device, dtype)
    T_e = project_and_normalize(model.text_projection, T_f, device).view(len(names), len(templates), -1)  # (c, templates, d_e)
    return F.normalize(T_e.mean(dim=1), dim=1)


def classify(model, names, paths, templates, device, dtype, num_workers=0, skip_bad=False):
    """The best classes of n pictures among c names, (n, up to 5) indices, best first, and {position: what is wrong}.

    A picture that cannot be read is left out where skip_bad is True. Raises UserError as `classifier` and `file_features` do.
    """
    weights = classifier(model, names, templates, device, dtype)  # (c, d_e)
    I_f, bad = file_features(model, paths, device, dtype, num_workers, skip_bad)
    similarity = project_and_normalize(model.image_projection, I_f, device) @ weights.T  # (n, c)
    return similarity.topk(min(5, len(names)), dim=1).indices, bad


def accuracy_per_class(names, labels, answers):
    """{class: top-1 accuracy in percent} of n pictures, from their (n,) labels and (n,) answers, indices into names."""
    hits = (labels == answers).float()
    return {names[i]: 100 * hits[labels == i].mean().item() for i in labels.unique().tolist()}


def top1_accuracy(model, classes, templates, device, dtype, num_workers=0, skip_bad=False):
    """Zero-shot top-1 accuracy in percent. classes: from `find_pictures`; the others as for `classify`."""
    names, paths, labels = classes
    top, bad = classify(model, names, paths, templates, device, dtype, num_workers, skip_bad)
    labels = labels[[i for i in range(len(paths)) if i not in bad]]
    return 100 * (top[:, 0] == labels).float().mean().item()


def class_accuracies(model, images, templates, device, dtype):
    """`accuracy_per_class` of a folder with one subfolder of pictures per class."""
    names, paths, labels = find_pictures(images)
    top, _ = classify(model, names, paths, templates, device, dtype)
    return accuracy_per_class(names, labels, top[:, 0])


def zeroshot(options):
    """Classifies pictures zero-shot, by class names alone: top-1 and top-5 accuracy, and a confusion matrix."""
    names, paths, labels = find_pictures(options.images, options.classes)
    model, device, dtype = open_model(options.run, options.device, options.precision)
    top, bad = classify(model, names, paths, options.template, device, dtype, options.num_workers, options.skip_bad)
    labels = labels[[i for i in range(len(paths)) if i not in bad]]
    hits = top == labels[:, None]
    scores = {"images": len(labels), "classes": len(names)}
    scores |= {"top1": 100 * hits[:, 0].float().mean().item(), "top5": 100 * hits.any(dim=1).float().mean().item()}
    if bad:
        named = "; ".join(list(bad.values())[:NUM_NAMED])
        print(f"left out: {len(bad)} pictures ({named}{'; ...' if len(bad) > NUM_NAMED else ''})")
    print(f"{len(labels):,} pictures of {len(names):,} classes; chance of top-1 {100 / len(names):.2f}%")
    print(f"top-1 {scores['top1']:.1f}%  top-5 {scores['top5']:.1f}%")
    counts = torch.bincount(labels * len(names) + top[:, 0], minlength=len(names) ** 2).view(len(names), -1)
    scores["class_top1"] = accuracy_per_class(names, labels, top[:, 0])
    if options.json:
        write_json(options.json, scores)
    draw_confusion(names, counts.numpy(), options.output)
    print(f"drawn in {options.output}")
