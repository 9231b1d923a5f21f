"""The tasks of evaluate.py and their flags. Nothing here takes long to load, so that help and mistakes are answered at once."""

import difflib
import sys
from dataclasses import dataclass

from config import Precision, SplitName, Views, require_runs
from utils.cli import HELP, run_cli
from utils.errors import UserError
from utils.files import require_own_results


@dataclass
class Retrieval:
    """Scores retrieval in both directions: R@1, R@5, R@10, median rank, and rsum, the sum of the six recalls (at most 600)."""

    run: str  # run folder, open_clip:MODEL@WEIGHTS, or one of OpenAI's names; an ensemble: several with commas between them
    data_dir: str = ""  # folder with Images/ and a captions file; empty: the data that the run was trained on
    image_path: str = ""  # folder of the images, if it is not in data_dir
    captions_path: str = ""  # captions file, if it is not in data_dir
    image_column: str = ""  # the captions file's column of images; empty: one with a usual name, such as image
    caption_column: str = ""  # its column of captions; empty: those with usual names, such as caption
    split: SplitName = "val"  # which images to score; all: every image of the data set
    views: Views = 1  # crops of each picture to embed and average: more recall for as many times the time; search with the same
    skip_bad: bool = False  # leave out unusable rows and pictures instead of stopping
    num_workers: int = 4  # threads that decode pictures
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Precision = "auto"  # of matrix products; auto: the run's own
    json: str = ""  # file for the scores


@dataclass
class Match:
    """Scores multiple choice: which of several captions is the image's own? Also draws a similarity matrix."""

    run: str  # run folder, open_clip:MODEL@WEIGHTS, or one of OpenAI's names
    data_dir: str = ""  # folder with Images/ and a captions file; empty: the data that the run was trained on
    image_path: str = ""  # folder of the images, if it is not in data_dir
    captions_path: str = ""  # captions file, if it is not in data_dir
    image_column: str = ""  # the captions file's column of images; empty: one with a usual name, such as image
    caption_column: str = ""  # its column of captions; empty: those with usual names, such as caption
    split: SplitName = "val"  # which images to score; all: every image of the data set
    choices: int = 4  # captions to choose from for each image; one is its own
    seed: int = 0  # of the random choice of captions
    skip_bad: bool = False  # leave out unusable rows and pictures instead of stopping
    num_workers: int = 4  # threads that decode pictures
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Precision = "auto"  # of matrix products; auto: the run's own
    output: str = "match.png"  # PNG file for the similarity matrix of some images and captions
    json: str = ""  # file for the scores

    def __post_init__(self):
        if self.choices < 2:
            raise UserError(f"--choices {self.choices}: must be 2 or more")


@dataclass
class ZeroShot:
    """Classifies pictures zero-shot, by class names alone: top-1 and top-5 accuracy, and a confusion matrix."""

    run: str  # run folder, open_clip:MODEL@WEIGHTS, or one of OpenAI's names
    images: str  # folder with one subfolder of pictures per class
    classes: str = (
        ""  # file of all class names, one per line; "n01440764 tench" or "folder<TAB>name" for folders with other names
    )
    template: tuple[str, ...] = ("a photo of a {}.",)  # prompts, {} is the class name; the embeddings of several are averaged
    skip_bad: bool = False  # skip pictures that cannot be decoded instead of stopping
    num_workers: int = 4  # threads that decode pictures
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Precision = "auto"  # of matrix products; auto: the run's own
    output: str = "confusion.png"  # PNG file for the confusion matrix
    json: str = ""  # file for the scores


@dataclass
class STS:
    """Compares cosines of sentence pairs with human ratings: Spearman and Pearson correlation per file, and their average."""

    run: str  # run folder, open_clip:MODEL@WEIGHTS, or one of OpenAI's names
    file: tuple[str, ...]  # STS files: STS-B's, or tables of score, sentence, sentence
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Precision = "auto"  # of matrix products; auto: the run's own
    json: str = ""  # file for the scores

    def __post_init__(self):
        if not self.file:
            raise UserError("--file: name at least one file")


@dataclass
class Twins:
    """Scores word order: which of two drawn scenes does a caption describe, where both captions have the same words?"""

    run: str  # run folder of a model trained on the drawn sample
    pairs: int = 1000  # pairs of scenes to draw
    seed: int = 0  # of the scenes
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Precision = "auto"  # of matrix products; auto: the run's own
    json: str = ""  # file for the scores

    def __post_init__(self):
        if self.pairs < 1:
            raise UserError(f"--pairs {self.pairs}: must be 1 or more")


@dataclass
class Compare:
    """Compares models by recall, zero-shot accuracy, speed of embedding and size, and draws recall against speed."""

    run: tuple[str, ...]  # run folders, open_clip:MODEL@WEIGHTS, or OpenAI's names
    data_dir: str = ""  # folder with Images/ and a captions file; empty: the data that each run was trained on
    image_path: str = ""  # folder of the images, if it is not in data_dir
    captions_path: str = ""  # captions file, if it is not in data_dir
    image_column: str = ""  # the captions file's column of images; empty: one with a usual name, such as image
    caption_column: str = ""  # its column of captions; empty: those with usual names, such as caption
    split: SplitName = "val"  # which images to score; all: every image of the data set
    images: str = ""  # folder with one subfolder of pictures per class, for zero-shot accuracy
    classes: str = ""  # file of all class names, one per line; empty: the names of the subfolders
    template: tuple[str, ...] = ("a photo of a {}.",)  # prompts, {} is the class name; the embeddings of several are averaged
    skip_bad: bool = False  # leave out unusable rows and pictures instead of stopping
    num_workers: int = 4  # threads that decode pictures
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Precision = "auto"  # of matrix products; auto: the run's own
    output: str = "compare.png"  # PNG file for recall against speed
    json: str = ""  # file for the figures

    def __post_init__(self):
        if len(set(self.run)) < 2:
            raise UserError("--run: name at least two models to compare")


@dataclass
class Calibrate:
    """Learns what a run's scores mean, for searches to come: from which score on a picture matches, and how probably."""

    run: str  # run folder, open_clip:MODEL@WEIGHTS, or one of OpenAI's names; an ensemble: several with commas between them
    data_dir: str = ""  # folder with Images/ and a captions file; empty: the data that the run was trained on
    image_path: str = ""  # folder of the images, if it is not in data_dir
    captions_path: str = ""  # captions file, if it is not in data_dir
    image_column: str = ""  # the captions file's column of images; empty: one with a usual name, such as image
    caption_column: str = ""  # its column of captions; empty: those with usual names, such as caption
    split: SplitName = "val"  # which images to learn from; all: every image of the data set
    skip_bad: bool = False  # leave out unusable rows and pictures instead of stopping
    views: Views = 1  # crops of each picture to embed and average, as in the searches to come
    cache_dir: str = (
        ".cache"  # folder where what is learned is kept for several views, an ensemble, or a model that has no run folder
    )
    num_workers: int = 4  # threads that decode pictures
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Precision = "auto"  # of matrix products; auto: the run's own
    json: str = ""  # file for what was measured


@dataclass
class Leaks:
    """Finds pictures that are in two splits: the same file name, or near-duplicates, which are the same photograph."""

    data_dir: str = ""  # folder with Images/ and a captions file
    image_path: str = ""  # folder of the images, if it is not in data_dir
    captions_path: str = ""  # captions file, if it is not in data_dir
    image_column: str = ""  # the captions file's column of images; empty: one with a usual name, such as image
    caption_column: str = ""  # its column of captions; empty: those with usual names, such as caption
    num_workers: int = 4  # threads that decode pictures
    json: str = ""  # file for the results

    def __post_init__(self):
        if not (self.data_dir or self.captions_path):
            raise UserError("--data-dir: name the folder to check")


TASKS = {  # its flags, where it is, what to write behind python evaluate.py, and what it does
    "retrieval": (Retrieval, "evaluate", "retrieval --run runs/shapes --split test", "retrieval in both directions"),
    "match": (Match, "evaluate", "match --run runs/shapes --choices 4", "multiple choice among captions"),
    "zeroshot": (ZeroShot, "evaluation.zeroshot", "zeroshot --run runs/best --images FOLDER", "classes by their names"),
    "sts": (STS, "evaluation.sts", "sts --run runs/best --file sts-test.csv", "similarity of sentences, against human ratings"),
    "twins": (Twins, "evaluation.twins", "twins --run runs/shapes", "word order: captions of the same words"),
    "compare": (Compare, "evaluation.compare", "compare --run runs/shapes runs/paper", "models side by side"),
    "calibrate": (Calibrate, "evaluation.relevance", "calibrate --run runs/shapes", "how probably a picture matches a text"),
    "leaks": (Leaks, "evaluation.leaks", "leaks --data-dir Datasets/shapes", "pictures that are in two splits"),
}


def read_task(arguments):
    """(task, its options) of a command line. Raises UserError for an unknown task, or a run that is not there."""
    task = (arguments or ["--help"])[0]
    if task in HELP:
        print("usage: python evaluate.py TASK [--flags]\n\nScores a run, or checks a data set. Tasks, each with an example:")
        for _, _, example, summary in TASKS.values():
            print(f"  {example:43}{summary}")
        print("\nThe flags of a task: python evaluate.py TASK --help")
        sys.exit(0)
    if task not in TASKS:
        close = difflib.get_close_matches(task, TASKS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"task {task!r} is unknown; {hint}choose one of {', '.join(TASKS)}")
    settings, _, example, _ = TASKS[task]
    options = run_cli(settings, f"evaluate.py {task}", arguments[1:], [f"python evaluate.py {example}"])
    runs = getattr(options, "run", ())
    for run in (runs,) if isinstance(runs, str) else runs:
        require_runs(run)
    require_own_results(getattr(options, "json", ""), getattr(options, "output", ""))
    return task, options
