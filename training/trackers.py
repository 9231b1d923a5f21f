"""Send the figures of each epoch to experiment trackers: --report-to tensorboard wandb mlflow trackio.

Their own settings, such as WANDB_MODE=offline or MLFLOW_TRACKING_URI, hold. What TensorBoard and Weights & Biases
write lies in the run folder.
"""

import contextlib
import dataclasses
import importlib
from pathlib import Path

import numpy as np
from PIL import Image

from training import distributed
from utils.errors import UserError

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
PROJECT = "clip"


class TensorBoard:
    def __init__(self, package, run_dir, settings):
        self.writer = package.SummaryWriter(str(run_dir / "tensorboard"))
        self.writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()))

    def log(self, figures, epoch):
        for name, value in figures.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def draw(self, name, path, epoch):
        self.writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), epoch, dataformats="HWC")

    def close(self):
        self.writer.close()


class Wandb:
    def __init__(self, package, run_dir, settings):
        self.wandb = package
        self.run = package.init(project=PROJECT, name=run_dir.name, dir=str(run_dir), config=settings)

    def log(self, figures, epoch):
        self.run.log(figures, step=epoch)

    def draw(self, name, path, epoch):
        self.run.log({name: self.wandb.Image(str(path))}, step=epoch)

    def close(self):
        self.run.finish()


class MLflow:
    def __init__(self, package, run_dir, settings):
        self.mlflow = package
        package.set_experiment(PROJECT)
        package.start_run(run_name=run_dir.name)
        package.log_params(settings)

    def log(self, figures, epoch):
        self.mlflow.log_metrics({name.replace("@", "_at_"): value for name, value in figures.items()}, step=epoch)

    def draw(self, name, path, epoch):
        self.mlflow.log_artifact(str(path))

    def close(self):
        self.mlflow.end_run()


class Trackio:
    def __init__(self, package, run_dir, settings):
        self.trackio = package
        package.init(project=PROJECT, name=run_dir.name, config=settings)

    def log(self, figures, epoch):
        self.trackio.log(figures, step=epoch)

    def draw(self, name, path, epoch):
        self.trackio.log({name: self.trackio.Image(str(path))}, step=epoch)

    def close(self):
        self.trackio.finish()


KINDS = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow, "trackio": Trackio}


class Trackers:
    """The trackers that a Config names. One that fails is left out from then on, with a message: it must not end the run."""

    def __init__(self, config):
        settings, run_dir = dataclasses.asdict(config), Path(config.run_dir)
        names = config.report_to if distributed.is_main_process() else ()
        self.trackers = {}
        for name in names:
            with self.not_fatal(name):
                self.trackers[name] = KINDS[name](load_package(name), run_dir, settings)

    @contextlib.contextmanager
    def not_fatal(self, name):
        try:
            yield
        except Exception as error:  # each package raises its own
            reason = str(error).strip().split("\n")[0]
            print(f"--report-to {name}: {reason}; it gets no more figures")
            self.trackers.pop(name, None)

    def each(self, call):
        for name, tracker in list(self.trackers.items()):
            with self.not_fatal(name):
                call(tracker)

    def log(self, row, config):
        """Sends a row of history.csv, and the learning rates at its last step."""
        rates = {name: getattr(config, name) * row["lr_scale"] for name in ("image_encoder_lr", "text_encoder_lr", "head_lr")}
        figures = {name: value for name, value in (row | rates).items() if name != "epoch" and np.isfinite(value)}
        self.each(lambda tracker: tracker.log(figures, row["epoch"]))

    def finish(self, run_dir, epoch):
        """Sends the run's pictures, and closes the trackers."""
        for path in (Path(run_dir) / "matches.png", Path(run_dir) / "similarity.png"):
            self.each(lambda tracker, path=path: tracker.draw(path.stem, path, epoch))
        self.each(lambda tracker: tracker.close())


def load_package(name):
    """Imports a tracker's package. Raises UserError where it is missing."""
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError:
        raise UserError(f"--report-to {name}: pip install {name}") from None
