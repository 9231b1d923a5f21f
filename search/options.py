"""The flags of inference.py and app.py. Nothing here takes long to load, so that help and mistakes are answered at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from config import Precision, Views, require_runs, run_names
from utils.cli import POSITIONAL, run_cli
from utils.errors import UserError
from utils.files import as_cp1252, require_own_results

WRONG_SHARE = 0.001  # of wrong pictures above the floor whose figures are reported
SEARCH_EXAMPLES = (
    'python inference.py "a dog runs on the beach" --images ~/Pictures',
    'python inference.py "a dog" --images ~/Pictures --after 2021-06 --folder "Italy/*"',
    'python inference.py --image photo.jpg --classify "a dog" "a cat"',
    "python inference.py --duplicates --images ~/Pictures",
)
PAGE_EXAMPLES = ("python app.py", "python app.py --run runs/shapes --images ~/Pictures")


@dataclass
class Search:
    """Finds the pictures that match a text or a picture best, prints them, and draws them in a grid."""

    # What to look for
    query: tuple[str, ...] = field(default=(), metadata=POSITIONAL)  # what the pictures should show; several texts are added
    minus: tuple[str, ...] = ()  # what they should not show
    weights: tuple[float, ...] = ()  # how much each text counts, and then each of minus; empty: all the same
    similar_to: str = ""  # picture that they should be like, alone or besides the query
    query_file: str = ""  # file with a query in each line, each answered by itself
    image: str = ""  # picture to find captions and look-alikes of, or to classify
    classify: tuple[str, ...] = ()  # class names to choose from for the picture of --image
    # Where to look
    run: str = ""  # run folder, or name of a pretrained model; several, with commas: an ensemble; empty: the newest in runs/
    views: Views = 1  # crops of each picture to embed and average: better matches, for as many times the time
    images: str = ""  # folder to search, with its subfolders, or 'DIR/*.tar'; empty: the run's own validation pictures
    after: str = ""  # only pictures taken since then, as 2021, 2021-06 or 2021-06-30 (EXIF date, else the file's)
    before: str = ""  # only pictures taken before that
    folder: str = ""  # only pictures whose path below --images matches this; 'Italy/*': all in Italy
    exact: bool = False  # compare with every picture, even if there are more than 100,000
    # What to show
    n: int = 9  # pictures to find
    more: int = 0  # 1: the next n pictures, 2: those after them, and so on
    floor: float = 0.0  # leave out pictures below the score that this share of wrong ones reaches, as 0.001; 0: none
    explain: bool = False  # draw a heat map over each picture: which parts match the text
    output: str = "matches.png"  # PNG of the matches or duplicates; empty: none is drawn
    json: str = ""  # file for the results
    verbose: bool = False  # name every file that is left out, and why
    # Instead of a search
    duplicates: bool = False  # find files that are the same photograph
    map: str = ""  # write a map of all pictures into this HTML file, and a PNG beside it
    embed_only: bool = False  # only embed the pictures, for later searches; with torchrun in several processes
    export: Literal["", "onnx"] = ""  # write the run's encoders in this format, into RUN/onnx
    # Machine
    cache_dir: str = ".cache"  # folder where embeddings are kept for the next query
    num_workers: int = 4  # threads that decode pictures
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Precision = "auto"  # of matrix products; auto: the run's own

    def __post_init__(self):
        """Raises UserError unless there is one thing to do, and flags that go with it."""
        for name in ("query", "minus", "classify"):
            setattr(self, name, tuple(as_unicode(text, name) for text in getattr(self, name)))
        self.folder = as_unicode(self.folder, "--folder")
        if self.n < 1 or self.more < 0:
            raise UserError(f"--n {self.n}, --more {self.more}: must be at least 1 and at least 0")
        if not 0 <= self.floor < 1:
            raise UserError(f"--floor {self.floor}: is a share of wrong pictures, from 0 (leave out none) to below 1")
        num_queries = bool(self.query or self.similar_to) + bool(self.query_file) + bool(self.image)
        num_tasks = self.duplicates + bool(self.map) + self.embed_only + bool(self.export)
        if num_tasks and num_queries or num_tasks > 1:
            raise UserError("--duplicates, --map, --embed-only, --export: look for nothing, and go alone; leave the query out")
        if not num_tasks and num_queries != 1:
            if self.query and self.image:
                words = " ".join(f'"{text}"' for text in self.query)
                both = f"--image goes alone; for words and a picture in one query: {words} --similar-to {self.image}"
                raise UserError(f"say what to look for in one way: {both}")
            raise UserError(
                'say what to look for: a text, as in python inference.py "a dog", --query-file FILE or --image FILE'
            )
        if len(self.query) > 1 and not self.weights and not any(" " in text.strip() for text in self.query):
            joined = " ".join(self.query)
            one = f'one query: python inference.py "{joined}"'
            raise UserError(f"several words without quotes; {one}; to add texts, give them --weights, too")
        if (self.minus or self.weights or self.explain) and not self.query:
            raise UserError("--minus, --weights and --explain: go with a text to look for")
        if self.classify and not self.image:
            raise UserError("--classify: needs the picture, --image FILE")
        if len(dict.fromkeys(map(str.strip, self.classify))) == 1:
            raise UserError(f'--classify "{self.classify[0]}": one class is always 100%; name two or more to choose from')
        if self.duplicates and not self.images:
            raise UserError("--duplicates: name the folder to look through with --images")
        if self.duplicates and (self.after or self.before or self.folder):
            raise UserError("--duplicates: looks through all of --images; leave --after, --before and --folder out")
        if self.export and (self.views > 1 or len(run_names(self.run)) > 1):
            raise UserError("--export: writes one run, which embeds one view; leave --views and further runs out")
        if self.map and not self.map.lower().endswith((".html", ".htm")):
            raise UserError(f"--map {self.map}: must end in .html")


@dataclass
class Page:
    """Serves a page to search pictures by words and pictures, to look at them, and to find duplicates."""

    run: str = ""  # run folder, or name of a pretrained model; several, with commas: an ensemble; empty: the newest in runs/
    images: str = (
        ""  # folder to search, with its subfolders, which is watched for changes; empty: the run's own validation pictures
    )
    views: Views = 1  # crops of each picture to embed and average: better matches, for as many times the time
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 lets everyone in the network see the pictures, without a password
    port: int = 7860  # port to listen on
    cache_dir: str = ".cache"  # folder where embeddings are cached
    num_workers: int = 4  # threads that decode pictures
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Precision = "auto"  # of matrix products; auto: the run's own


def as_unicode(text, name):
    """A text of the command line, which may have come in cp1252. Raises UserError, with its name, where it is in neither."""
    contents = text.encode(errors="surrogateescape")
    try:
        return contents.decode()
    except UnicodeDecodeError:
        found = as_cp1252(contents)
    if found is None:
        shown = contents.decode(errors="replace")
        raise UserError(f"{name} {shown}: is not UTF-8; set the terminal to UTF-8, and type it again")
    print(f"{name} {found!r}: read in cp1252, as it is not UTF-8", flush=True)
    return found


def newest_run():
    """The run folder in runs/ that was trained last. Raises UserError if there is none."""
    weights = sorted(Path("runs").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not weights:
        raise UserError("runs/ holds no trained run; train one with python main.py, or name one with --run")
    return str(weights[-1].parent)


def read_search(arguments):
    """The Search of a command line.

    Raises UserError for a run that is not there, where a file to write is the user's own, and as `Search` does.
    """
    options = run_cli(Search, "inference.py", arguments, SEARCH_EXAMPLES)
    draws = options.query or options.similar_to or options.duplicates or options.image and not options.classify
    require_own_results(options.json, options.output if draws else "")
    return options if options.duplicates else with_run(options)


def read_page(arguments):
    """The Page of a command line. Raises UserError for a run that is not there."""
    return with_run(run_cli(Page, "app.py", arguments, PAGE_EXAMPLES))


def with_run(options):
    """The options with the newest run, where none is named. Raises UserError where it is not there."""
    options.run = options.run or newest_run()
    require_runs(options.run)
    return options
