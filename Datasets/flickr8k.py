"""Finds Flickr8k where people put it, or fetches Kaggle's copy."""

from pathlib import Path

from storage import UserError

KAGGLE_NAME = "adityajn105/flickr8k"
PLACES = ["Datasets/flickr8k", "Datasets/Flickr8k", "Datasets/Flicker-8k"]
KAGGLE_INPUT = "/kaggle/input"  # where Kaggle mounts data sets: at SLUG, or at datasets/OWNER/SLUG
KAGGLE_DEPTH = 4  # folders below that in which a data set may lie
BY_HAND = (
    f"download kaggle.com/datasets/{KAGGLE_NAME} in a browser and unpack it to {PLACES[0]} "
    "(Images/ and captions.txt), or name its folder with --data-dir"
)


def find():
    """The first of the usual places that is a folder with something in it, or None.

    On Kaggle that is the first folder with a captions.txt and Images/, the shallowest first.
    """
    places = [place for place in PLACES if Path(place).is_dir() and any(Path(place).iterdir())]
    return next(iter(places), None) or next(map(str, find_on_kaggle()), None)


def find_on_kaggle():
    for depth in range(1, KAGGLE_DEPTH + 1):
        for captions in sorted(Path(KAGGLE_INPUT).glob("*/" * depth + "captions.txt")):
            if (captions.parent / "Images").is_dir():
                yield captions.parent


def download():
    """Fetches Kaggle's Flickr8k (about 1 GB) through kagglehub, which keeps it, and returns its folder.

    Raises UserError where it cannot be fetched, with what to do by hand.
    """
    try:
        import kagglehub  # only here: everything else works without it

        return kagglehub.dataset_download(KAGGLE_NAME)
    except Exception as error:  # requests', Kaggle's and the socket's own, after one failed attempt
        raise UserError(f"Flickr8k cannot be fetched ({type(error).__name__}); {BY_HAND}") from None
