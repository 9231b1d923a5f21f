"""Download from a model hub, with a short timeout, and save copies for one."""

from pathlib import Path

import huggingface_hub

from config import load_run
from utils.errors import UserError

HUB_TIMEOUT = 5  # seconds to wait for a model hub's first answer


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
