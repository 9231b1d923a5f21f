"""Everything that training changes, created, saved and restored together."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from clip import CLIPModel, describe_encoders, save_weights
from config import Config, generated_per_batch, is_stream, load_run
from encoders.tokenizer import read_tokenizer
from generation.joint import Joint
from training import distributed
from training.adapters import merged
from training.checkpoint import TRAINED, load_latest, load_optimizer, write_checkpoint, write_history
from training.gradient_cache import Embedder
from training.losses import Objective
from training.optimization import create_optimizer, parameter_groups
from utils.cache import cache_key, tensors_key
from utils.errors import UserError


@dataclass
class TrainState:
    """A training between two steps. Random states need not be saved, as each step has its own seed."""

    config: Config
    model: CLIPModel
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler  # scales the loss in fp16; does nothing otherwise
    average: AveragedModel | None  # moving average of the weights, with --ema-decay
    joint: Joint | None  # the generator that is trained at the same time, with --gan joint
    data_key: str  # hash of image names and captions, which must be the same when the run is resumed
    frozen_key: str  # hash of the frozen weights, likewise
    pictures_key: str = ""  # hash of what the image files hold, likewise
    steps_done: int | None = 0  # in finished epochs; None: resumed from a checkpoint of an earlier version, without a count
    history: list = field(default_factory=list)  # a row for each finished epoch
    losses: list = field(default_factory=list)  # of each step of the current epoch: (2,), CLIP's loss and the total

    def __post_init__(self):
        self.embedder = distributed.data_parallel(Embedder(self.model))  # what a step in several processes runs

    @property
    def objective(self):
        return Objective(self.config.loss, self.config.targets)

    @property
    def scored_model(self):
        """The model that is evaluated and saved: the moving average of the weights, if there is one; adapters are merged."""
        return merged(self.average.module if self.average else self.model)

    @property
    def order(self):
        """The settings, beside the batch size and the seed, that decide which pairs the steps of an epoch have."""
        return {name: getattr(self.config, name) for name in ("captions_per_image", "unique_images", "extra_fraction")}

    def steps_before(self, steps_per_epoch):
        """How many steps the finished epochs stand for; with --steps, how many there were, whatever their batch size.

        Without --steps an epoch counts as one, whatever its batch size, so that the rates follow the epochs.
        """
        counted = self.config.steps and self.steps_done is not None
        return self.steps_done if counted else len(self.history) * steps_per_epoch

    @property
    def rsums(self):
        return [row["rsum"] for row in self.history]

    def end_epoch(self, row):
        """Adds the finished epoch's row to the history."""
        self.history.append(row)
        if self.steps_done is not None:
            self.steps_done += len(self.losses)
        self.losses = []

    def average_batch_norm_statistics(self):
        """Averages running statistics over the ranks, which each have seen their own pictures."""
        if not self.config.freezes("image"):
            distributed.average_batch_norm_statistics(self.model, *([self.average] if self.average else []))

    def save_epoch(self, best):
        """Writes an epoch's results, in the main process. best: whether to save its weights as the best ones."""
        run_dir = Path(self.config.run_dir)
        if distributed.is_main_process():
            if best:
                save_weights(self.scored_model, run_dir)
            if self.rsums[-1] > max(self.rsums[:-1], default=-1.0):
                shutil.rmtree(run_dir / TRAINED, ignore_errors=True)  # of an earlier epoch
                if self.config.wise_ft:
                    (run_dir / TRAINED).mkdir()
                    save_weights(self.scored_model, run_dir / TRAINED)
            write_history(run_dir / "history.csv", self.history)
        self.save()  # last, so that after a kill the epoch is repeated and all is written

    def trained_tensors(self, module):
        """What a checkpoint holds of the model or its average: all but the frozen encoders."""
        return {name: value for name, value in module.state_dict().items() if not is_frozen(name, self.config)}

    def save(self):
        """Writes a checkpoint into the run folder, in the main process; all ranks have to call it.

        Raises UserError, and writes nothing, where a weight is not finite.
        """
        if hasattr(self.optimizer, "consolidate_state_dict"):  # it is sharded
            self.optimizer.consolidate_state_dict(to=0)
        if not distributed.is_main_process():
            return
        run_dir, weights = Path(self.config.run_dir), self.trained_tensors(self.model)
        broken = next((name for name, value in weights.items() if not value.isfinite().all()), None)
        if broken:
            raise UserError(f"{run_dir}: {broken} is not finite; the last good checkpoint is kept; --resume with lower rates")
        saved = {"model": weights, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        saved |= {"history": self.history, "losses": torch.stack(self.losses).cpu() if self.losses else []}
        saved |= {
            "batch_size": self.config.batch_size,
            "order": self.order,
            "steps_done": self.steps_done,
            "pictures": self.pictures_key,
            "processes": distributed.size(),
            "data": self.data_key,
            "frozen": self.frozen_key,
        }
        if self.average:
            saved["average"] = self.trained_tensors(self.average)
        if self.joint:
            saved["joint"] = self.joint.state_dict()
        write_checkpoint(run_dir, saved)

    def restore(self):
        """The inverse of `save`. Raises UserError where the checkpoint is damaged or of another run."""
        load_latest(Path(self.config.run_dir), self.load, use_previous=self.config.resume == "auto")

    def load(self, saved):
        """Loads what `save` wrote. Raises UserError or ValueError where it does not match."""
        self.refuse_other_run(saved)
        missing, unexpected = self.model.load_state_dict(saved["model"], strict=False)
        if unexpected or not all(is_frozen(name, self.config) for name in missing):
            raise ValueError(f"{len(missing) + len(unexpected)} tensors differ")
        load_optimizer(self.optimizer, saved["optimizer"])
        if saved["scaler"]:  # empty unless in fp16
            self.scaler.load_state_dict(saved["scaler"])
        if self.average and "average" in saved:
            self.average.load_state_dict(saved["average"], strict=False)
        elif self.average:  # --ema-decay is new: the average starts from the weights as they are
            self.average.module.load_state_dict(self.model.state_dict())
        if self.joint:
            self.joint.load_state_dict(saved["joint"])
        self.history, self.losses = saved["history"], list(saved["losses"])
        self.steps_done = saved.get("steps_done")

    def refuse_other_run(self, saved):
        """Raises UserError where a checkpoint was made with other data, another model, or another batch size mid-epoch."""
        run_dir, batch_size = self.config.run_dir, self.config.batch_size
        if saved["data"] != self.data_key:
            raise UserError(f"{run_dir}: its captions or pictures have changed; restore them, or start a new run")
        if saved.get("pictures", self.pictures_key) != self.pictures_key:
            raise UserError(f"{run_dir}: its pictures have changed, under the same names; restore them, or start a new run")
        same_encoders = load_run(run_dir)["encoders"] == json.loads(json.dumps(describe_encoders(self.model)))
        same_tokens = read_tokenizer(run_dir).to_str() == self.model.tokenizer.to_str()
        if not (same_encoders and same_tokens and saved["frozen"] == self.frozen_key):
            raise UserError(
                f"{run_dir}: was started with other frozen weights, another text encoder or another vocabulary; name the same "
                "with --image-weights and --text-encoder, or start a new run with another --run-dir"
            )
        if len(saved["losses"]) and saved["batch_size"] != batch_size:
            raise UserError(
                f"--batch-size {batch_size}: {run_dir} stopped within an epoch with batches of {saved['batch_size']}; "
                "finish that epoch before changing it"
            )
        for name, before in saved.get("order", {}).items() if len(saved["losses"]) else ():
            if before != self.order[name]:
                raise UserError(
                    f"--{name.replace('_', '-')} {self.order[name]}: {run_dir} stopped within an epoch with {before}; finish "
                    "that epoch before changing it"
                )
        if len(saved["losses"]) and is_stream(self.config.data_dir) and saved["processes"] != distributed.size():
            raise UserError(
                f"{run_dir}: stopped within an epoch with {saved['processes']} processes, which have shards of their own each; "
                "finish that epoch with as many"
            )


def is_frozen(name, config):
    """Whether a tensor of the model, or of its moving average, belongs to a frozen encoder, or to one whose adapters train."""
    frozen = tuple(f"{part}_encoder." for part in ("image", "text") if config.freezes(part) or config.lora_rank)
    return name.removeprefix("module.").startswith(frozen) and "lora_" not in name


def create_state(config, model, splits, device, dtype):
    """The TrainState before the first step. splits: {"train": Split, "val": Split}."""
    average, joint = None, None
    if not config.micro_batch_size:
        model.image_encoder = distributed.synchronize_batch_norm(model.image_encoder, device)
    if config.ema_decay:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
    if config.compile:
        model.image_encoder.compile()
        model.text_encoder.backbone.compile(dynamic=True)  # not the code around it, which groups captions by length
    groups = parameter_groups(model, config)
    if config.gan == "joint":
        joint = Joint(model.image_projection.out_features, generated_per_batch(config), config.gan_weight, device, dtype)
        groups.append(joint.parameter_group)
    return TrainState(
        config=config,
        model=model,
        optimizer=create_optimizer(groups, device, config.shard_optimizer),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        average=average,
        joint=joint,
        data_key=cache_key(*(split.identity for split in splits.values())),
        pictures_key=cache_key(*(split.contents for split in splits.values())),
        frozen_key=tensors_key({name: value for name, value in model.named_parameters() if not value.requires_grad}),
    )
