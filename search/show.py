"""What a search says and draws: the lines that are printed, the results as JSON, and the grid of pictures."""

from functools import partial
from pathlib import Path

from search.queries import probably_nothing
from utils.errors import UserError
from utils.files import write_json
from utils.folders import printable
from utils.images import read_image

MAX_NAME = 40  # characters of a file name in a grid
GRID_PIXELS = 320  # shorter side of the pictures in a grid


def show_matches(title, matches, more):
    """Prints the matches or, with --floor, those above it and, where none is, the best guess. Returns {"query", "matches"}.

    Where probably nothing matches, a line says so, and the answer has {"probably_nothing": True}.
    matches: a list of `Match`, best first. more: as for `Search`.
    """
    relevant = [match for match in matches if match.relevant]
    answer = {"query": title, "matches": [match.record() for match in relevant]}
    nothing = not more and probably_nothing(matches)
    if nothing:
        answer["probably_nothing"] = True
    if matches and not relevant and not more:
        print(f"{title!r}: nothing here is above --floor (best guess below)")
        print_matches(matches[:1])
        return answer | {"best_guess": matches[0].record()}
    found = "probably nothing here; the best guesses:" if nothing else ""
    print(f"{title!r}: {found}".rstrip() if relevant else f"{title!r}: no more pictures")
    print_matches(relevant, divide=not nothing)
    if relevant and len(relevant) < len(matches):
        print(f"{len(relevant)} of the best {len(matches)} are above --floor")
    return answer


def print_matches(matches, divide=False):
    """Prints a list of `Match`, best first. divide: with a line before those that are less likely."""
    for i, match in enumerate(matches):
        if divide and not match.is_likely and (i == 0 or matches[i - 1].is_likely):
            print("  less likely:")
        print(f"{match.label()}  {printable(match.filename)}")


def draw_matches(title, matches, output, show, read_picture=None):
    """The grid of a list of `Match`. read_picture: maps a path to the picture to draw, in the place of the file's own."""
    from utils.plots import draw_grid  # only here: matplotlib takes most of a second

    names = [Path(match.filename).name for match in matches]
    names = [name if len(name) <= MAX_NAME else f"{name[: MAX_NAME // 2]}...{name[-MAX_NAME // 2 :]}" for name in names]
    titles = [f"{match.label().strip()}  {name}" for match, name in zip(matches, names)]
    read_picture = read_picture or partial(read_image, size=GRID_PIXELS)
    draw_grid(title, [read_picture(match.filename) for match in matches], titles, output, show)


def deliver(options, answer, draw):
    """Writes what was found, and draws it after that: draw(), or nothing where that is None.

    Raises UserError where it cannot be drawn; what was found is then not lost.
    """
    if options.json:
        write_json(options.json, answer)
    if not draw or not options.output:
        return
    try:
        draw()
    except UserError as error:
        raise UserError(f"--output {options.output}: not drawn ({error}); the results above are complete") from None
    except Exception as error:  # of many kinds: a picture that is gone meanwhile, a font's, the library's own
        reason = f"{error}".strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"--output {options.output}: not drawn ({reason}); the results above are complete") from None
    print(f"drawn in {options.output}")
