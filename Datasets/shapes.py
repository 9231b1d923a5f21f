"""Generate the sample data set: captioned scenes of coloured shapes, in the layout of Kaggle's Flickr8k.

    python Datasets/shapes.py FOLDER
    python Datasets/shapes.py FOLDER --classes

The first writes `Images/`, `captions.txt` (five captions per image) and the three split lists. A scene has one to three
shapes, each with a colour, a size and a place, on one of several backgrounds. Three properties make word order and meaning
matter, so that a bag of words is not enough:

- Twins: many scenes have a second version in which two shapes swap their colours or places. Both are described by the same
  words.
- Composition: some pairs of colour and shape (`HELD_OUT`) occur only in the test split.
- Two of the five captions name no colours, and one of these no places either. Colours and places alone would identify nearly
  all scenes, and a model that relied on them would hardly learn the shapes.

The second writes images of a single shape, in one folder for every pair of colour and shape, for zero-shot classification.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

if __name__ == "__main__":  # a script cannot import from the parent folder by default
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.cli import POSITIONAL, run_cli
from utils.errors import run_command


@dataclass
class Draw:
    """Generates captioned images of coloured shapes."""

    folder: str = field(metadata=POSITIONAL)  # output folder; one that was drawn before is replaced, any other refused
    classes: bool = False  # one shape per image, in folders named after colour and shape


if __name__ == "__main__":
    OPTIONS = run_command(run_cli, Draw, "Datasets/shapes.py", sys.argv[1:])

import csv
import itertools
import random

import cv2
import numpy as np

from utils.files import atomic_dir

COLORS = {  # name: (words, RGB)
    "red": (["red", "crimson"], (214, 39, 40)),
    "green": (["green"], (34, 150, 60)),
    "blue": (["blue"], (36, 80, 210)),
    "yellow": (["yellow", "golden"], (246, 208, 32)),
    "purple": (["purple", "violet"], (135, 50, 170)),
    "orange": (["orange"], (250, 128, 20)),
    "white": (["white"], (250, 250, 250)),
    "black": (["black"], (20, 20, 20)),
}
SHAPES = {  # name: words
    "circle": ["circle", "disc"],
    "square": ["square", "box"],
    "triangle": ["triangle"],
    "star": ["star"],
    "ring": ["ring", "hoop"],
    "cross": ["cross", "plus sign"],
}
SIZES = {"small": (["small", "little", "tiny"], 0.12), "large": (["large", "big", "huge"], 0.165)}  # radius / side
BACKGROUNDS = {
    "grey": ["a grey background", "plain grey"],
    "sand": ["a sandy background", "sand"],
    "sky": ["a pale blue background", "a light blue sky"],
    "striped": ["a striped background", "stripes"],
    "checked": ["a checked background", "a checkerboard"],
    "grainy": ["a grainy background", "noisy grain"],
}
PLACES = {  # (row, column) of a 3 x 3 grid: words
    (0, 0): ["in the top left corner", "at the upper left"],
    (0, 1): ["at the top", "in the middle of the top edge"],
    (0, 2): ["in the top right corner", "at the upper right"],
    (1, 0): ["on the left", "at the left edge"],
    (1, 1): ["in the middle", "at the centre"],
    (1, 2): ["on the right", "at the right edge"],
    (2, 0): ["in the bottom left corner", "at the lower left"],
    (2, 1): ["at the bottom", "in the middle of the bottom edge"],
    (2, 2): ["in the bottom right corner", "at the lower right"],
}
RELATIONS = {  # words: relation
    "left of": "left",
    "to the left of": "left",
    "right of": "right",
    "to the right of": "right",
    "above": "above",
    "higher than": "above",
    "below": "below",
    "lower than": "below",
}
PREFIXES = ["", "", "a photo of ", "a picture of "]  # of captions that only name the shapes
HELD_OUT = {  # pairs of colour and shape that training never shows
    ("red", "star"),
    ("green", "ring"),
    ("blue", "triangle"),
    ("yellow", "cross"),
    ("purple", "circle"),
    ("orange", "square"),
}


MAX_SEEN = len(COLORS) * len(SHAPES) - len(HELD_OUT)


@dataclass(frozen=True)
class Thing:
    color: str
    shape: str
    size: str
    cell: tuple[int, int]  # row, column


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str

    def shows(self, pairs):
        """Whether a shape of the scene is among these pairs of colour and shape."""
        return any((thing.color, thing.shape) in pairs for thing in self.things)


# ---- scenes ----------------------------------------------------------------------------------------------------


def random_scene(rng, colors=COLORS):
    """A scene of one, two or three shapes of these colours; no two have the same colour and shape, or the same cell."""
    count = rng.choices([1, 2, 3], [0.35, 0.45, 0.2])[0]
    looks = rng.sample([(color, shape) for color in colors for shape in SHAPES], count)
    cells = rng.sample(list(PLACES), count)
    things = [Thing(*look, rng.choice(list(SIZES)), cell) for look, cell in zip(looks, cells)]
    return Scene(tuple(things), rng.choice(list(BACKGROUNDS)))


def twin(scene, rng):
    """The scene with the colours or places of the first two things swapped; None where that is the same or not allowed."""
    a, b, *others = scene.things
    trait = rng.choice([name for name in ("color", "cell") if name == "cell" or a.color != b.color])
    a, b = replace(a, **{trait: getattr(b, trait)}), replace(b, **{trait: getattr(a, trait)})
    looks = [(thing.color, thing.shape) for thing in (a, b, *others)]
    if len(set(looks)) < len(looks) or {a, b} == set(scene.things[:2]):
        return None
    return Scene((a, b, *others), scene.background)


def unseen_pairs(seen):
    """The pairs of colour and shape that training does not show, if it shows `seen` of them.

    Each colour and each shape is among those seen. Those of `HELD_OUT` are never seen, so that there are always some to test.
    Raises ValueError unless at least one pair per colour is seen, and at most all but those.
    """
    pairs = list(itertools.product(COLORS, SHAPES))
    if not len(COLORS) <= seen <= MAX_SEEN:
        raise ValueError(f"{seen} seen pairs: must be {len(COLORS)} to {MAX_SEEN}")
    shapes = list(SHAPES)
    first = [(color, shapes[(i + 1) % len(shapes)]) for i, color in enumerate(COLORS)]  # every colour and every shape
    others = [pair for pair in pairs if pair not in HELD_OUT and pair not in first]
    random.Random(0).shuffle(others)
    return set(pairs) - set([*first, *others][:seen])


def draw_scenes(count, unseen, needs_unseen, rng, used, twins=0.2, colors=COLORS):
    """A list of `count` different scenes, none of them in the set `used`, to which they are added.

    unseen: pairs of colour and shape. needs_unseen: True requires one of them in every fourth scene, False allows none. twins:
    probability of a twin. colors: of the shapes.
    """
    scenes = []
    while len(scenes) < count:
        scene = random_scene(rng, colors)
        with_twin = len(scene.things) > 1 and rng.random() < twins
        pair = [scene] + ([twin(scene, rng)] if with_twin else [])
        if None in pair or any(scene in used for scene in pair) or len(scenes) + len(pair) > count:
            continue
        if not needs_unseen and any(scene.shows(unseen) for scene in pair):
            continue
        if needs_unseen and len(scenes) % 4 == 0 and not scene.shows(unseen):
            continue
        scenes += pair
        used.update(pair)
    return scenes


# ---- captions --------------------------------------------------------------------------------------------------


def noun(thing, rng, size=False, color=True):
    """'red circle', 'small red circle', 'circle' or 'small circle', each word a random synonym."""
    words = [rng.choice(SIZES[thing.size][0])] if size else []
    words += [rng.choice(COLORS[thing.color][0])] if color else []
    return " ".join([*words, rng.choice(SHAPES[thing.shape])])


def with_article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def relation(a, b, rng):
    """Words for the place of a relative to b; a random one where two relations hold."""
    (row_a, column_a), (row_b, column_b) = a.cell, b.cell
    relations = []
    if column_a != column_b:
        relations.append(["left of", "to the left of"] if column_a < column_b else ["right of", "to the right of"])
    if row_a != row_b:
        relations.append(["above", "higher than"] if row_a < row_b else ["below", "lower than"])
    return rng.choice(rng.choice(relations))


def captions(scene, rng):
    """Five different captions. Three name at least two things by colour and shape, if there are two."""
    ground = BACKGROUNDS[scene.background]

    def one(thing, **options):
        return with_article(noun(thing, rng, **options))

    def place(thing):
        return rng.choice(PLACES[thing.cell])

    def listed(phrases):
        return ", ".join(phrases[:-1]) + " and " + phrases[-1]

    if len(scene.things) == 1:
        (a,) = scene.things
        return [
            f"{rng.choice(PREFIXES)}{one(a, size=True)} {place(a)} .",
            f"{rng.choice(PREFIXES)}{one(a, color=False)} on {rng.choice(ground)} .",
            f"on {rng.choice(ground)} there is {one(a)} {place(a)} .",
            f"one shape on {rng.choice(ground)} : {one(a, size=True, color=False)} {place(a)} .",
            f"the {noun(a, rng)} {place(a)} is {rng.choice(SIZES[a.size][0])} .",
        ]
    a, b = rng.sample(scene.things, 2)
    order = rng.sample(scene.things, len(scene.things))
    count = {2: "two", 3: "three"}[len(scene.things)]
    return [
        f"{one(a, size=True)} is {relation(a, b, rng)} {one(b, size=True)} .",
        f"{rng.choice(PREFIXES)}{listed([one(thing, color=False) for thing in order])} on {rng.choice(ground)} .",
        f"on {rng.choice(ground)} there is {one(b)} {relation(b, a, rng)} {one(a)} .",
        f"{count} shapes on {rng.choice(ground)} : {listed([one(thing, size=True, color=False) for thing in order])} .",
        f"the {noun(a, rng)} {place(a)} is {rng.choice(SIZES[a.size][0])} ; {one(b)} is {place(b)} .",
    ]


@dataclass(frozen=True)
class ScenePair:
    """Two scenes that differ in one thing, and a caption of each that is false of the other."""

    scenes: tuple[Scene, Scene]
    captions: tuple[str, str]
    swapped: str  # "color" or "place" of two shapes, or the "side" of one
    relation: str  # what the captions say, or the first one: "left", "right", "above" or "below"


def twin_pairs(count, seed=0):
    """`count` `ScenePair`s of two shapes that swap colours or places. Both captions have the same words, in another order.

    No shape is of a held-out pair of colour and shape. The pairs are the same for the same arguments.
    """
    rng, pairs = random.Random(seed), []
    while len(pairs) < count:
        scene = random_scene(rng)
        other = twin(scene, rng) if len(scene.things) == 2 else None
        if other is None or any(each.shows(HELD_OUT) for each in (scene, other)):
            continue
        a, b = scene.things
        swapped = "color" if other.things[0].cell == a.cell else "place"
        words = relation(a, b, rng)
        x, y = (
            {
                "size": rng.choice(SIZES[t.size][0]),
                "color": rng.choice(COLORS[t.color][0]),
                "shape": rng.choice(SHAPES[t.shape]),
            }
            for t in (a, b)
        )
        x_twin, y_twin = (x | {"color": y["color"]}, y | {"color": x["color"]}) if swapped == "color" else (y, x)
        captions = tuple(
            f"{with_article(' '.join(first.values()))} is {words} {with_article(' '.join(second.values()))} ."
            for first, second in ((x, y), (x_twin, y_twin))
        )
        pairs.append(ScenePair((scene, other), captions, swapped, RELATIONS[words]))
    return pairs


def mirrored_pairs(count, seed=0):
    """`count` `ScenePair`s of one shape and the same scene mirrored, left to right or up to down; captions name its place."""
    rng, pairs = random.Random(seed), []
    for _ in range(count):
        side, axis, k = rng.choice((0, 2)), rng.randrange(2), rng.randrange(2)  # axis 0: rows; k: which words for the place
        cell = [rng.randrange(3), rng.randrange(3)]
        cell[axis] = side
        other = list(cell)
        other[axis] = 2 - side
        look = rng.choice([(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT])
        thing = Thing(*look, rng.choice(list(SIZES)), tuple(cell))
        words, background = with_article(noun(thing, rng, size=True)), rng.choice(list(BACKGROUNDS))
        things = (thing, replace(thing, cell=tuple(other)))
        scenes = tuple(Scene((each,), background) for each in things)
        captions = tuple(f"{words} {PLACES[each.cell][k]} ." for each in things)
        pairs.append(ScenePair(scenes, captions, "side", (("above", "below"), ("left", "right"))[axis][side // 2]))
    return pairs


def rated_pairs(count, seed=0):
    """`count` pairs of captions of one shape each, with how alike they are: (rating, caption, caption), as in STS files.

    The rating, 1 to 5, is one more than how many of colour, shape, size and place are the same; synonyms are drawn for each.
    """
    rng, pairs = random.Random(seed), []
    traits = {"color": COLORS, "shape": SHAPES, "size": SIZES, "cell": PLACES}
    for _ in range(count):
        first = {name: rng.choice(list(values)) for name, values in traits.items()}
        same = rng.sample(list(traits), rng.randint(0, len(traits)))
        second = {
            name: first[name] if name in same else rng.choice([value for value in values if value != first[name]])
            for name, values in traits.items()
        }
        things = (Thing(**first), Thing(**second))
        pairs.append(
            (1.0 + len(same), *(f"{with_article(noun(t, rng, size=True))} {rng.choice(PLACES[t.cell])} ." for t in things))
        )
    return pairs


# ---- pictures --------------------------------------------------------------------------------------------------


def paint_background(name, side, rng):
    """A (side, side, 3) float RGB picture."""
    plain = {"grey": (150, 150, 150), "sand": (216, 190, 150), "sky": (176, 212, 240)}
    tint = np.array(plain.get(name, (170, 170, 165)), dtype=np.float32) + rng.uniform(-12, 12)
    ys, xs = np.mgrid[0:side, 0:side] / side
    period, shift = rng.uniform(0.12, 0.2), rng.random()
    if name == "striped":
        slope = rng.choice([0, 1, -1])
        pattern = np.floor((ys + slope * xs) / period + shift) % 2 * 30 - 15
    elif name == "checked":
        pattern = (np.floor(ys / period + shift) + np.floor(xs / period + shift)) % 2 * 30 - 15
    elif name == "grainy":
        pattern = np.random.default_rng(rng.getrandbits(32)).normal(0, 15, (side, side))
    else:  # plain colours with a slight gradient, as in photos
        angle = rng.uniform(0, 2 * np.pi)
        pattern = 14 * (np.cos(angle) * (xs - 0.5) + np.sin(angle) * (ys - 0.5))
    return tint + pattern[..., None].astype(np.float32)


def polygon(shape):
    """Corners of a shape of radius 1, as (x, y)."""
    if shape == "square":
        return 0.85 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    if shape == "cross":
        t = 0.35
        return np.array(
            [(-t, -1), (t, -1), (t, -t), (1, -t), (1, t), (t, t), (t, 1), (-t, 1), (-t, t), (-1, t), (-1, -t), (-t, -t)]
        )
    corners, inner = (3, 1.0) if shape == "triangle" else (10, 0.42)
    angles = 2 * np.pi * np.arange(corners) / corners - np.pi / 2
    radii = np.where(np.arange(corners) % 2, inner, 1.0)
    return 1.1 * radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def paint(scene, side, rng):
    """The scene as a (side, side, 3) uint8 RGB picture; place, rotation, size and tint of each thing vary a little."""
    scale = 4  # shapes are drawn larger and scaled down, which smooths their edges
    picture = paint_background(scene.background, side, rng).clip(0, 255).astype(np.uint8)
    picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    for thing in scene.things:
        row, column = thing.cell
        radius = SIZES[thing.size][1] * rng.uniform(0.93, 1.07) * side * scale
        x, y = ((place + 0.5 + rng.uniform(-0.1, 0.1)) / 3 * side * scale for place in (column, row))
        color = [int(np.clip(value + rng.uniform(-14, 14), 0, 255)) for value in COLORS[thing.color][1]]
        if thing.shape == "circle":
            cv2.circle(picture, (int(x), int(y)), int(radius), color, -1)
        elif thing.shape == "ring":
            cv2.circle(picture, (int(x), int(y)), int(radius * 0.8), color, int(radius * 0.4))
        else:
            angle = rng.uniform(-0.2, 0.2)
            rotation = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
            corners = radius * polygon(thing.shape) @ rotation + (x, y)
            cv2.fillPoly(picture, [corners.round().astype(np.int32)], color)
    return cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)


def write_picture(path, scene, side, rng):
    if not cv2.imwrite(str(path), cv2.cvtColor(paint(scene, side, rng), cv2.COLOR_RGB2BGR)):
        raise OSError(f"{path}: could not be written")


SAMPLE_FILES = r"Images/\d{5,}\.png|captions\.txt|shapes\.(train|dev|test)Images\.txt"  # below the folder that is drawn
CLASS_FILES = rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})/\d{{3,}}\.png"


def draw(folder, train=6000, val=300, test=300, side=96, seed=0, seen=MAX_SEEN, colors=COLORS):
    """Writes the data set into `folder`: the same images, captions and split lists for the same arguments.

    train, val, test: numbers of images. side: height and width in pixels. seen: pairs of colour and shape that training shows.
    colors: those of the shapes. A sample that was drawn there before is replaced; on failure nothing is written.
    Raises UserError where the folder holds anything else, and ValueError as `unseen_pairs` does.
    """
    rng, used, unseen = random.Random(seed), set(), unseen_pairs(seen)
    splits = {
        "train": draw_scenes(train, unseen, False, rng, used, colors=colors),
        "dev": draw_scenes(val, unseen, False, rng, used, colors=colors),
        "test": draw_scenes(test, unseen, True, rng, used, colors=colors),
    }
    names = iter(f"{number:05d}.png" for number in range(train + val + test))
    rows = []
    with atomic_dir(folder, SAMPLE_FILES) as temporary_path:
        (temporary_path / "Images").mkdir()
        for split, scenes in splits.items():
            with open(temporary_path / f"shapes.{split}Images.txt", "w", encoding="utf-8") as split_list:
                for scene in scenes:
                    name = next(names)
                    write_picture(temporary_path / "Images" / name, scene, side, rng)
                    split_list.write(f"{name}\n")
                    rows += [(name, caption) for caption in captions(scene, rng)]
        with open(temporary_path / "captions.txt", "w", newline="", encoding="utf-8") as captions_file:
            csv.writer(captions_file).writerows([("image", "caption"), *rows])


def draw_classes(folder, pictures=10, side=96, seed=0, colors=COLORS):
    """Writes `pictures` images of a single shape for each pair of colour and shape, in a folder named after it ("red circle").

    side: height and width in pixels. colors: those of the shapes. What was drawn there before is replaced; on failure nothing
    is written. Raises UserError where the folder holds anything else.
    """
    rng = random.Random(seed)
    with atomic_dir(folder, CLASS_FILES) as temporary_path:
        for color, shape in itertools.product(colors, SHAPES):
            (temporary_path / f"{color} {shape}").mkdir()
            for number in range(pictures):
                thing = Thing(color, shape, rng.choice(list(SIZES)), rng.choice(list(PLACES)))
                scene = Scene((thing,), rng.choice(list(BACKGROUNDS)))
                write_picture(temporary_path / f"{color} {shape}" / f"{number:03d}.png", scene, side, rng)


if __name__ == "__main__":
    run_command(draw_classes if OPTIONS.classes else draw, OPTIONS.folder)
