"""Runs and models on a model hub: download them, with a short timeout, and what of a run goes there."""

import filecmp
import shutil
from pathlib import Path

import huggingface_hub
import safetensors.torch

from config import HUBNESS_FILE, load_run
from loading.trained import SPLITS
from utils.errors import UserError

NEEDED = "config.json", "model.safetensors", "tokenizer.json"  # without which a run folder cannot be loaded
WRITTEN = "config.json", "model.safetensors", HUBNESS_FILE  # of the model
# What is true of a run folder's weights alone: learned, measured or drawn with them.
RELEVANCE = "relevance.json", "references.npy", "reference-words.npy"  # of `search.relevance`
OF_WEIGHTS = HUBNESS_FILE, *RELEVANCE, "relevance.png", "README.md", "matches.png", "similarity.png"
OF_WEIGHTS += ("tradeoff.csv", "tradeoff.png")
COPIED = "tokenizer.json", SPLITS, "README.md", "history.csv", "curves.png", *RELEVANCE  # of the run
HUB_TIMEOUT = 5  # seconds to wait for a model hub's first answer


class HubModel(huggingface_hub.ModelHubMixin):
    """A model with huggingface_hub's calls, whose copy on a hub never mixes two sets of weights."""

    def push_to_hub(self, repo_id, *, delete_patterns=(), **options):
        """huggingface_hub's call: uploads a copy of the run, and removes there what belongs to weights pushed before."""
        patterns = [delete_patterns] if isinstance(delete_patterns, str) else delete_patterns or ()
        return super().push_to_hub(repo_id, delete_patterns=[*OF_WEIGHTS, *patterns], **options)


def weights_as_bytes(model):
    """What a file of the model's weights holds. Tensors that share memory are written each for itself."""
    state, places = {}, set()
    for name, tensor in model.state_dict().items():
        place = tensor.untyped_storage().data_ptr()
        state[name] = tensor.clone() if place in places else tensor.contiguous()
        places.add(place)
    return safetensors.torch.save(state)  # not save_file, which reports a full disk differently


def from_hub(load):
    """What load() returns: first from files that are already downloaded, else with the hub.

    Raises what load() does, an OSError or a RuntimeError, within HUB_TIMEOUT where no hub answers: by themselves the libraries
    try every file five times with growing pauses.
    """
    constants = huggingface_hub.constants
    if constants.HF_HUB_OFFLINE:
        return load()
    constants.HF_HUB_OFFLINE = True
    try:
        return load()
    except (OSError, RuntimeError) as error:
        missing = error
    finally:
        constants.HF_HUB_OFFLINE = False
    if not hub_answers():
        raise missing
    return load()


def hub_answers():
    """Whether the model hub answers, with the same certificates, proxies and address as downloads."""
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # its type depends on huggingface_hub's HTTP library
        return False
    return True


def require_copy_folder(folder, names):
    """Raises UserError where a copy of a run cannot be saved into a folder: a file that it would replace is of no such copy.

    names: of the files of a copy. Copies have no checkpoint, a run that was trained there has.
    """
    there = [name for name in names if Path(folder, name).exists()]
    if not there:
        return
    try:
        load_run(folder)
    except UserError:
        raise UserError(f"{folder}: holds {there[0]}, which is not of a run; name a new folder") from None
    if Path(folder, "last.pt").exists():
        raise UserError(f"{folder}: is a run that was trained there; name a new folder")


def fetch_run(name, **options):
    """The local folder of the run USER/NAME: the newest version where the hub answers, else what was downloaded before.

    options: of huggingface_hub.snapshot_download; None: as if it was left out.
    Raises an OSError or a ValueError where the hub has no such name, UserError where a download was interrupted.
    """
    options = {key: value for key, value in options.items() if value}
    constants, offline = huggingface_hub.constants, huggingface_hub.constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not hub_answers()
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=[*COPIED, *WRITTEN], **options)
    finally:
        constants.HF_HUB_OFFLINE = offline
    if missing := [file for file in NEEDED if not Path(folder, file).exists()]:
        raise UserError(
            f"{name}: no {' and no '.join(missing)} in {folder}; its download was interrupted, or it is no run; "
            "load it again where the model hub answers"
        )
    return folder


def copy_run_files(run_dir, folder):
    """Copies what belongs to a run into a folder that has a model's weights.

    Where these are not the run's, what is OF_WEIGHTS is left out.
    """
    weights = [Path(place, "model.safetensors") for place in (run_dir, folder)]
    same = all(map(Path.exists, weights)) and filecmp.cmp(*weights, shallow=False)
    for name in COPIED:
        if Path(run_dir, name).exists() and (same or name not in OF_WEIGHTS):
            shutil.copyfile(Path(run_dir, name), Path(folder, name))
