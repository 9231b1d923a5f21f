"""The precision that models were trained in: their figures are of it, so they are scored in it, too."""

from config import load_run
from utils.device import can_multiply, pick_dtype


def own_dtype(names, models, device):
    """The dtype of matrix products in which models of these names were trained and scored, where the device has it.

    Where they differ, or are no runs, it is what `pick_dtype` takes for auto.
    """
    found = {load_run(model.run_dir)["config"].precision if model.run_dir else "auto" for model in models}
    precision = found.pop() if len(found) == 1 else "auto"
    dtype = pick_dtype(precision, device)
    if can_multiply(device, dtype):
        return dtype
    dtype = pick_dtype("auto", device)
    print(
        f"{','.join(names)}: trained in {precision}, which {device} cannot compute; in {str(dtype)[6:]} figures differ a little"
    )
    return dtype
