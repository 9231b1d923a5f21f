"""The generator: its losses, its folder, the pairs that it makes, and what training with them does."""

import csv
import shutil

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from conftest import run_script
from torch import nn

import clip
import GAN
import main
from captions import load_captions, load_generated
from config import parse_config
from dataset import PairSampler
from generation.joint import Joint
from generation.networks import IMAGE_SIZE, discriminator_loss, generator_loss, gradient_penalty
from generation.options import GANConfig, fit_batch, load_gan
from training.checkpoint import lock_run_dir
from utils import files as storage
from utils.device import autocast
from utils.errors import UserError
from utils.images import read_image


@pytest.fixture(scope="module")
def gan(run, tmp_path_factory):
    """The folder of a generator for the small sample, trained for two epochs, and the flags that did it."""
    folder = tmp_path_factory.mktemp("gan")
    flags = ["shapes", "--run", str(run), "--cache-dir", str(folder / "cache"), "--batch-size", "32", "--device", "cpu"]
    flags += ["--precision", "fp32"]
    GAN.train(*GAN.parse_config([*flags, "--run-dir", str(folder / "gan"), "--epochs", "2"]))
    return folder / "gan", flags


@pytest.fixture(scope="module")
def pairs(gan, tmp_path_factory):
    """A folder of 60 generated pictures."""
    output = tmp_path_factory.mktemp("pairs") / "pictures"
    GAN.write_pairs(*GAN.parse_config(["shapes", "--run-dir", str(gan[0]), "--generate", "60", "--output", str(output)]))
    return output


class Table(nn.Module):
    """A discriminator whose score is the picture's number plus the caption's."""

    def forward(self, image, embedding):
        return image + embedding.T


def test_losses_are_those_worked_by_hand():
    real, fake = torch.tensor([[0.5], [2.0]]), torch.tensor([[0.0], [-3.0]])
    embedding = torch.tensor([[0.0], [1.0]])
    # Right pairs score 0.5 and 3: hinges 0.5 and 0. Wrong ones 1.5 and 2: 2.5 and 3. Generated ones 0 and -2: 1 and 0.
    # The second caption always scores 1 more than the first: matching costs ln(1 + e) and ln(1 + 1/e), 0.8133 in the mean.
    assert discriminator_loss(Table(), real, fake, embedding).item() == pytest.approx(0.25 + 1.625 + 0.8133, abs=1e-4)
    assert generator_loss(Table(), fake, embedding).item() == pytest.approx(1.0 + 0.8133, abs=1e-4)


def test_the_gradient_penalty_is_half_the_squared_slope():
    class Plane(nn.Module):
        def forward(self, image, embedding):
            return (image[:, 0, 0, :1] * 3 + image[:, 1, 0, :1] * 4) / 127.5 + embedding.T

    real, embedding = torch.rand(16, 3, 2, 2) * 255, torch.zeros(16, 1)
    assert gradient_penalty(Plane(), real, embedding).item() == pytest.approx((3**2 + 4**2) / 2)


def test_the_folder_holds_a_grid_an_epoch_and_the_averaged_weights(gan):
    run_dir, _ = gan
    assert {path.name for path in run_dir.iterdir()} == {
        "gan.json", "last.pt", "cache.txt", "generator.safetensors", "history.csv", "samples",
    }  # fmt: skip
    assert sorted(path.name for path in (run_dir / "samples").iterdir()) == ["epoch-001.png", "epoch-002.png"]
    history = pd.read_csv(run_dir / "history.csv")
    assert list(history["epoch"]) == [1, 2] and np.isfinite(history).all(axis=None)
    last = torch.load(run_dir / "last.pt", weights_only=True)
    weights = safetensors.torch.load_file(run_dir / "generator.safetensors")
    assert torch.equal(weights["begin.weight"], last["average"]["module.begin.weight"])
    assert not torch.equal(weights["begin.weight"], last["generator"]["begin.weight"])


def test_a_resumed_generator_equals_an_uninterrupted_one(gan, tmp_path):
    run_dir, flags = gan
    GAN.train(*GAN.parse_config([*flags, "--run-dir", str(tmp_path / "gan"), "--epochs", "1"]))
    GAN.train(*GAN.parse_config(["shapes", "--run-dir", str(tmp_path / "gan"), "--resume", "--epochs", "2"]))
    for part in ("generator", "discriminator", "average"):
        whole, halves = (torch.load(folder / "last.pt", weights_only=True)[part] for folder in (run_dir, tmp_path / "gan"))
        assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_a_resumed_generator_takes_the_rates_that_it_is_given(gan, tmp_path):
    _, flags = gan
    GAN.train(*GAN.parse_config([*flags, "--run-dir", str(tmp_path / "gan"), "--epochs", "1"]))
    before = torch.load(tmp_path / "gan" / "last.pt", weights_only=True)
    low = ["--generator-lr", "1e-9", "--discriminator-lr", "1e-9", "--epochs", "2"]
    GAN.train(*GAN.parse_config(["shapes", "--run-dir", str(tmp_path / "gan"), "--resume", *low]))
    after = torch.load(tmp_path / "gan" / "last.pt", weights_only=True)
    for part in ("generator", "discriminator"):
        names = [name for name in before[part] if "running" not in name and "num_batches" not in name]
        assert max((after[part][name] - before[part][name]).abs().max().item() for name in names) < 1e-6
    assert GAN.load_gan(tmp_path / "gan")["config"].generator_lr == 1e-9


def test_pictures_that_a_killed_process_left_half_written_stop_no_training(gan, tmp_path, forked):
    _, flags = gan
    process = forked(int)
    process.join()
    left = tmp_path / "gan" / f"pictures.{storage.HOST}-{process.pid}.tmp"
    (left / "Images").mkdir(parents=True)
    (left / "Images" / "generated-000000.png").write_bytes(b"half")
    with lock_run_dir(tmp_path / "gan"):
        GAN.train(*GAN.parse_config([*flags, "--run-dir", str(tmp_path / "gan"), "--epochs", "1"]))
    assert not left.exists() and (tmp_path / "gan" / "generator.safetensors").exists()


def test_pictures_that_cannot_be_written_end_in_one_line_and_what_was_there_stays(gan, pairs, tmp_path, monkeypatch):
    shutil.copytree(pairs, tmp_path / "pairs")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    monkeypatch.setattr(GAN.cv2, "imwrite", lambda *_: False)  # how OpenCV says that a disk is full
    flags = ["shapes", "--run-dir", str(gan[0]), "--generate", "3", "--output", str(tmp_path / "pairs")]
    with pytest.raises(UserError, match="pairs: its pictures cannot be written"):
        GAN.write_pairs(*GAN.parse_config(flags))
    assert before == sorted(path.name for path in tmp_path.rglob("*"))


def test_generated_pairs_carry_training_captions_only(pairs, sample, run):
    table, _, _ = load_captions(sample)
    with open(pairs / "captions.txt", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({row["image"] for row in rows}) == 60
    assert {row["caption"] for row in rows} <= set(table.loc[table["split"] == "train", "caption"])
    assert {path.name for path in (pairs / "Images").iterdir()} == {row["image"] for row in rows}
    assert read_image(pairs / "Images" / rows[0]["image"], IMAGE_SIZE).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)


def test_a_generator_sees_no_image_that_its_run_did_not(small_flags, tmp_path):
    flags = small_flags(train_images=40, epochs=1, batch_size=20)
    main.train(parse_config(flags, "shapes")[0])
    source = GAN.read_captions_and_encoder(GANConfig(run=str(tmp_path / "run"), device="cpu"), "")
    seen = pd.read_csv(tmp_path / "run" / "splits.csv")
    names = set(source.table["image"][source.table["split"] == "train"])
    assert len(names) == 40 and names == set(seen["image"][seen["split"] == "train"])


def test_a_batch_has_its_share_of_generated_pictures_and_none_beside_its_own_caption():
    real, sources = 12, [{i % 12, (i + 1) % 12} for i in range(20)]  # each caption is that of two real pictures
    captions_of = [np.array([i]) for i in range(real + len(sources))]
    sampler = PairSampler(captions_of, 6, seed=0, sources=sources, generated=2)
    assert sampler.steps == 3  # of four real pictures each
    for sampler.epoch in range(50):
        batches = [[image for image, _, _ in batch] for batch in sampler]
        assert sorted(image for batch in batches for image in batch if image < real) == list(range(real))
        for batch in batches:
            generated = [sources[image - real] for image in batch if image >= real]
            assert len(batch) == 6 and len(generated) == 2
            used = [image for image in batch if image < real] + [image for images in generated for image in images]
            assert len(used) == len(set(used))


def test_too_few_generated_pictures_are_refused():
    captions_of = [np.array([i]) for i in range(12)]
    with pytest.raises(UserError, match="other captions than its 4 real ones, but only 0 of 4 fit"):
        list(PairSampler(captions_of, 6, seed=0, sources=[set(range(8))] * 4, generated=2))


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 16}, {"freeze": "both"}])
def test_generated_pairs_train_and_never_reach_validation(small_flags, pairs, sample, tmp_path, capsys, monkeypatch, options):
    seen = []
    load_splits = main.load_splits
    monkeypatch.setattr(main, "load_splits", lambda *given: seen.append(load_splits(*given)) or seen[0])
    main.train(parse_config(small_flags(extra_data=pairs, **options), "shapes")[0])
    assert "of the train images 60 are generated, 8 in each batch of 32" in capsys.readouterr().out
    splits, _ = seen[0]
    assert len(splits["train"].names) == 96 + 60 and len(splits["val"].names) == 24
    generated = {str(path) for path in (pairs / "Images").iterdir()}
    assert set(splits["train"].names[96:]) == generated and not generated & set(splits["val"].names)
    for own, caption in zip(splits["train"].sources, splits["train"].captions[5 * 96 :]):
        real = zip(splits["train"].captions[: 5 * 96], splits["train"].image_of_text)
        assert own == {image for text, image in real if text == caption}


def test_each_term_moves_what_it_should(run, sample):
    torch.manual_seed(0)
    model, _ = clip.load(run, "cpu")
    model.train()
    joint = Joint(256, 4, 1.0, torch.device("cpu"), torch.float32)
    image = torch.randint(256, (12, 3, model.image_encoder.size, model.image_encoder.size))
    text = clip.tokenize(
        [f"a {color} circle ." for color in ["red", "green", "blue", "yellow", "purple", "orange", "white", "black"]] * 2
    )[:12]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = {name: value.clone() for name, value in joint.discriminator.state_dict().items()}

    def moved(module):
        return any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())

    text = text[:, :12]
    batch = {"image": image, "text": text, "attention_mask": (text != model.tokenizer.padding["pad_id"]).long()}
    mixed, adversarial = joint.insert_generated(model, batch, scaler)
    mixed = mixed["image"]
    assert not moved(model) and not moved(joint.generator)
    assert any(not torch.equal(before[name], value) for name, value in joint.discriminator.state_dict().items())
    assert torch.equal(mixed[:8], image[:8].float()) and not torch.equal(mixed[8:], image[8:].float())
    kept = {name: parameter.grad.clone() for name, parameter in joint.discriminator.named_parameters()}
    adversarial.backward(retain_graph=True)
    assert moved(joint.generator) and not moved(model)
    joint.generator.zero_grad()
    with autocast(torch.device("cpu"), torch.float32):
        logits, _ = model(mixed, text)
    clip.contrastive_loss(logits).backward()
    assert moved(joint.generator) and moved(model.image_encoder) and moved(model.text_encoder)
    assert all(torch.equal(kept[name], parameter.grad) for name, parameter in joint.discriminator.named_parameters())


def test_joint_training_leaves_a_grid_and_a_run_that_loads(small_flags, tmp_path):
    main.train(parse_config(small_flags(gan="joint"), "shapes")[0])
    assert (tmp_path / "run" / "generated.png").exists()
    clip.load(tmp_path / "run", "cpu")


def test_another_text_encoder_is_refused(gan, small_flags, tmp_path):
    main.train(parse_config(small_flags("other", epochs=1), "shapes")[0])
    flags = ["shapes", "--run-dir", str(gan[0]), "--run", str(tmp_path / "other")]
    with pytest.raises(UserError, match="trained with another text encoder than that of .*other"):
        GAN.write_pairs(*GAN.parse_config([*flags, "--generate", "3"]))
    with pytest.raises(UserError, match="trained with another text encoder than that of .*other"):
        GAN.train(*GAN.parse_config([*flags, "--resume", "--epochs", "3"]))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_epoch(gan, tmp_path, monkeypatch):
    _, flags = gan
    flags = [*flags, "--run-dir", str(tmp_path / "gan")]
    GAN.train(*GAN.parse_config([*flags, "--epochs", "1"]))
    before = (tmp_path / "gan" / "last.pt").read_bytes()
    monkeypatch.setattr(GAN, "generator_loss", lambda *given: generator_loss(*given) * float("nan"))
    with pytest.raises(UserError, match=r"epoch 2, step 1: a loss is not finite; .* --resume"):
        GAN.train(*GAN.parse_config([*flags, "--resume", "--epochs", "2"]))
    assert (tmp_path / "gan" / "last.pt").read_bytes() == before


def test_foreign_and_empty_folders_of_pairs_are_named(pairs, sample, tmp_path):
    table, _, _ = load_captions(sample)
    with pytest.raises(UserError, match="60 of its 60 captions are not training captions of this data set"):
        load_generated(pairs, table.assign(split="val"))
    (tmp_path / "Images").mkdir()
    with pytest.raises(UserError, match="no captions file"):
        load_generated(tmp_path, table)
    with pytest.raises(UserError, match="no such folder"):
        load_generated(tmp_path / "nowhere", table)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--extra-data", "x", "--extra-fraction", "1.5"], "--extra-fraction 1.5: must be above 0 and below 1"),
        (["--extra-data", "x", "--extra-fraction", "0.001"], "makes 0 of 128 pictures"),
        (["--extra-data", "x", "--gan", "joint"], "leave one out"),
        (["--gan", "joint", "--freeze", "image"], "--gan joint: .* leave out --freeze"),
        (["--gan", "joint", "--micro-batch-size", "32"], "--gan joint: .*--micro-batch-size"),
    ],
)
def test_flags_that_make_no_sense_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        parse_config(["shapes", *flags], "shapes")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["nothing"], "preset 'nothing' is unknown; there are shapes, flickr8k"),
        (["shapes", "--run-dir", "nowhere", "--generate", "5"], "nowhere: no generator is there"),
        (["shapes", "--run", "nowhere"], "nowhere: no run is there"),
    ],
)
def test_what_a_generator_lacks_is_named(flags, message):
    with pytest.raises(UserError, match=message):
        GAN.train(*GAN.parse_config(flags))


def test_the_commands_errors_are_one_line():
    process = run_script("GAN.py", "shapes", "--batch-size", "1")
    assert process.returncode == 2
    assert process.stderr.startswith("error: --batch-size 1: must be 2 or more") and process.stderr.count("\n") == 1


def test_a_batch_that_nobody_passed_fits_the_pictures(capsys):
    config, _ = GAN.parse_config(["shapes"])
    assert fit_batch(config, 16, "DIR").batch_size == 16 and not capsys.readouterr().out
    fitted = fit_batch(config, 6, "DIR")
    assert fitted.batch_size == 6 and "batch size 6 instead of 16: there are no more training images" in capsys.readouterr().out
    with pytest.raises(UserError, match="--batch-size 16: there are only 6 training images in DIR; lower it"):
        fit_batch(GAN.parse_config(["shapes", "--batch-size", "16"])[0], 6, "DIR")
    with pytest.raises(UserError, match="DIR: 1 training images are too few for any batch; add pictures"):
        fit_batch(config, 1, "DIR")


def test_fewer_pictures_than_the_default_batch_train_a_generator(run, sample, tmp_path, capsys):
    shutil.copytree(sample, tmp_path / "few")
    train = tmp_path / "few" / "shapes.trainImages.txt"
    train.write_text("\n".join(train.read_text().split()[:10]) + "\n")
    flags = ["shapes", "--run", str(run), "--data-dir", str(tmp_path / "few"), "--run-dir", str(tmp_path / "gan")]
    flags += ["--epochs", "1", "--device", "cpu", "--cache-dir", str(tmp_path / "cache")]
    GAN.train(*GAN.parse_config(flags))
    assert "batch size 10 instead of 16" in capsys.readouterr().out
    assert load_gan(tmp_path / "gan")["config"].batch_size == 10  # so a resumed training has it, too


@pytest.mark.parametrize("changed", ["picture", "caption"])
def test_a_generator_is_not_resumed_on_other_pictures_or_captions(run, sample, tmp_path, changed):
    data = tmp_path / "data"
    shutil.copytree(sample, data)
    flags = ["shapes", "--run", str(run), "--data-dir", str(data), "--run-dir", str(tmp_path / "gan"), "--device", "cpu"]
    flags += ["--cache-dir", str(tmp_path / "cache"), "--batch-size", "32"]
    GAN.train(*GAN.parse_config([*flags, "--epochs", "1"]))
    before = (tmp_path / "gan" / "generator.safetensors").read_bytes()
    names = (data / "shapes.trainImages.txt").read_text().split()
    if changed == "picture":  # another under the same name
        shutil.copy(data / "Images" / names[1], data / "Images" / names[0])
    else:
        text = (data / "captions.txt").read_text()
        at = text.index(names[0])
        (data / "captions.txt").write_text(text[:at] + text[at:].replace(" ", " very ", 1))
    resumed = ["shapes", "--run-dir", str(tmp_path / "gan"), "--resume", "--epochs", "2"]
    with pytest.raises(UserError, match="its pictures or captions have changed; restore them, or start a new run"):
        GAN.train(*GAN.parse_config(resumed))
    assert (tmp_path / "gan" / "generator.safetensors").read_bytes() == before
