"""Find Flickr8k in the usual folders, or download Kaggle's copy."""

from pathlib import Path

from utils.errors import UserError

KAGGLE_NAME = "adityajn105/flickr8k"
PLACES = ["Datasets/flickr8k", "Datasets/Flickr8k", "Datasets/Flicker-8k"]
KAGGLE_INPUT = "/kaggle/input"  # Kaggle mounts data sets there, at SLUG or datasets/OWNER/SLUG
KAGGLE_DEPTH = 4  # levels of subfolders that are searched there
BY_HAND = (
    f"download kaggle.com/datasets/{KAGGLE_NAME} in a browser and unpack it to {PLACES[0]} "
    "(Images/ and captions.txt), or name its folder with --data-dir"
)


def find():
    """The first of the usual folders that is not empty, or None.

    On Kaggle: the first folder with a captions.txt and Images/, the shallowest first.
    """
    places = [place for place in PLACES if Path(place).is_dir() and any(Path(place).iterdir())]
    return next(iter(places), None) or next(map(str, find_on_kaggle()), None)


def find_on_kaggle():
    return (path.parent for path in on_kaggle("captions.txt") if (path.parent / "Images").is_dir())


def on_kaggle(name):
    """Yields the files of this name in the data sets that are attached on Kaggle, the shallowest first."""
    for depth in range(1, KAGGLE_DEPTH + 1):
        yield from sorted(Path(KAGGLE_INPUT).glob("*/" * depth + name))


def download():
    """Downloads Kaggle's Flickr8k (about 1 GB) with kagglehub, which caches it, and returns its folder.

    Raises UserError where the download fails, with instructions for a manual one.
    """
    try:
        import kagglehub  # only here: it is optional

        return kagglehub.dataset_download(KAGGLE_NAME)
    except Exception as error:  # many libraries' types
        raise UserError(f"Flickr8k cannot be downloaded ({type(error).__name__}); {BY_HAND}") from None
