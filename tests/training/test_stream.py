"""Training data in shards: written, counted, read from any position, dealt to processes, and what is wrong with them."""

import io
import json
import os
import shutil
import tarfile
from dataclasses import replace

import cv2
import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import webdataset
from conftest import flags_for_small
from PIL import Image

import clip
import main
from captions import load_captions
from config import parse_config
from training import distributed, shard_reader, stream
from training.checkpoint import read_checkpoint, write_checkpoint
from training.data import fit_batch
from training.plan import print_plan
from training.shard_reader import Shards, load_index
from training.shards import WriteShards, shard_picture
from training.shards import shards as write_shards
from training.stream import StreamLoader, open_stream
from utils.errors import UserError
from utils.files import expand


@pytest.fixture(scope="module")
def written(sample, tmp_path_factory):
    """The sample in shards of 20 pictures: five of the training images, the last with 16."""
    folder = tmp_path_factory.mktemp("written") / "shards"
    write_shards(WriteShards(str(sample), str(folder), per_shard=20))
    return folder


@pytest.fixture(scope="module")
def model(run):
    return clip.load(run, "cpu")[0]


@pytest.fixture
def config_of(written, tmp_path):
    """config_of(data, **settings): the Config of a small training on shards."""

    def make(data=None, **options):
        flags = flags_for_small(data or f"{written}/train-*.tar", tmp_path, val_data=f"{written}/val-*.tar", **options)
        return parse_config(flags, "shapes")[0]

    return make


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, contents in members:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    return str(path)


def png(number=0):
    return cv2.imencode(".png", np.full((90, 100, 3), number, np.uint8))[1].tobytes()


def batches(config, model, start=0, epoch=0):
    loader = StreamLoader(open_stream(config), config, model)
    loader.batch_sampler.start, loader.batch_sampler.epoch = start, epoch
    return list(loader)


def ids(found):
    return [batch["image_id"].tolist() for batch in found]


# ---- writing -----------------------------------------------------------------------------------------------------


def test_shards_hold_each_picture_once_with_its_captions_and_its_bytes(written, sample):
    table, image_dir, _ = load_captions(sample)
    assert [len(list(written.glob(f"{split}-*.tar"))) for split in ("train", "val", "test")] == [5, 2, 2]
    rows = table[table["split"] == "train"].groupby("image")["caption"].agg(list)
    expected = {(image_dir / name).read_bytes(): captions for name, captions in rows.items()}
    shards = Shards(f"{written}/train-*.tar")
    records = [record for shard in range(5) for record in shards.read(shard)]
    assert len(records) == 96 and {record.picture: record.captions for record in records} == expected


def test_large_pictures_are_scaled_down_and_small_ones_are_left(sample, tmp_path):
    write_shards(WriteShards(str(sample), str(tmp_path / "small"), size=48))
    write_shards(WriteShards(str(sample), str(tmp_path / "large"), size=200))
    small = next(Shards(f"{tmp_path}/small/train-000000.tar").read(0))
    large = next(Shards(f"{tmp_path}/large/train-000000.tar").read(0))
    assert Image.open(io.BytesIO(small.picture)).size == (48, 48) and small.captions == large.captions
    assert any(large.picture == path.read_bytes() for path in (sample / "Images").iterdir())


@pytest.mark.parametrize("size", [0, 30, 1000])
def test_heic_pictures_become_jpegs_that_are_no_larger(tmp_path, size):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (60, 40), (200, 30, 30))).save(tmp_path / "a.heic")
    ending, contents = shard_picture(tmp_path / "a.heic", size)
    assert ending == "jpg" and Image.open(io.BytesIO(contents)).size == ((45, 30) if size == 30 else (60, 40))


def test_a_folder_that_is_there_is_not_written_over(sample, written):
    with pytest.raises(UserError, match="is there already; name a new folder"):
        write_shards(WriteShards(str(sample), str(written)))


def test_a_broken_picture_is_named_and_leaves_nothing_behind(sample, tmp_path):
    shutil.copytree(sample, tmp_path / "data")
    broken = sorted((tmp_path / "data" / "Images").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(UserError, match=f"{broken.name}.*--skip-bad"):
        write_shards(WriteShards(str(tmp_path / "data"), str(tmp_path / "shards")))
    assert not list(tmp_path.glob("shards*"))
    write_shards(WriteShards(str(tmp_path / "data"), str(tmp_path / "shards"), skip_bad=True))
    index = load_index(Shards(f"{tmp_path}/shards/*.tar"), tmp_path / "cache")
    assert sum(index.counts) == 143 and not index.problems


# ---- reading -----------------------------------------------------------------------------------------------------


def test_patterns_name_files():
    assert expand("a/s-{08..11}.tar") == [f"a/s-{number}.tar" for number in ("08", "09", "10", "11")]
    assert expand("{0..1}/{1..2}.tar") == ["0/1.tar", "0/2.tar", "1/1.tar", "1/2.tar"]


def test_tars_of_other_writers_are_read(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(3):
            row = {"__key__": f"{number:05d}", "png": png(number), "json": {"caption": f"a {number}", "url": None}}
            writer.write(row | ({"txt": "more"} if number else {}))
    two = json.dumps({"caption": ["b 0", "b 1"]}).encode()
    write_tar(
        tmp_path / "b.tar", [("x/00.jpeg", png(7)), ("x/00.json", two), ("x/01.webp", png(8)), ("x/01.txt", b"b 2\n\n b 3 \n")]
    )
    shards = Shards(f"{tmp_path}/*.tar")
    found = [(record.captions, record.picture) for shard in range(2) for record in shards.read(shard)]
    captions = [["a 0"], ["more", "a 1"], ["more", "a 2"], ["b 0", "b 1"], ["b 2", "b 3"]]
    assert found == list(zip(captions, map(png, (0, 1, 2, 7, 8))))
    index = load_index(shards, tmp_path / "cache")
    assert (index.counts, index.num_captions, index.problems) == ([3, 2], 9, [])
    assert sorted(index.captions) == sorted(caption for each in captions for caption in each)


CAPTION = "A dog runs .\nBuy prints here !\n\nMore below"
ONE_LINE = "A dog runs . Buy prints here ! More below"
SEVERAL = json.dumps({"comment": "nice!", "text": "see alt", "caption": "a dog", "description": "shot in Rome"}).encode()
TARS = {  # members of a tar file: the captions of each picture
    "img2dataset": (
        {
            "0.jpg": png(),
            "0.json": json.dumps({"caption": CAPTION, "url": "u", "key": "0"}).encode(),
            "0.txt": CAPTION.encode(),
        },
        [[ONE_LINE]],
    ),
    "line breaks in JSON": ({"0.jpg": png(), "0.json": json.dumps({"caption": CAPTION}).encode()}, [[ONE_LINE]]),
    "one name of a JSON": ({"0.jpg": png(), "0.json": SEVERAL}, [["a dog"]]),
    "keys with dots": (
        {f"x/IMG.000{i}.{end}": data for i in range(2) for end, data in (("jpg", png(i)), ("txt", f"a {i}".encode()))},
        [["a 0"], ["a 1"]],
    ),
    "fields with dots": ({"v1.0/0.input.jpg": png(), "v1.0/0.outputs.txt": b"a 0"}, [["a 0"]]),
    "capitals": (
        {"0.Jpg": png(), "0.TXT": b"a 0", "1.WEBP": png(), "1.Txt": b"a 1", "2.JPEG": png(), "2.Json": b'"a 2"'},
        [["a 0"], ["a 1"], ["a 2"]],
    ),
    "cp1252": ({"0.jpg": png(), "0.txt": "ein Bär".encode("cp1252"), "1.jpg": png(), "1.txt": b"a 1"}, [["ein Bär"], ["a 1"]]),
    "a byte order mark": ({"0.jpg": png(), "0.txt": b"\xef\xbb\xbfa 0"}, [["a 0"]]),
    "numbered": ({"0.jpg": png(), "0.json": b'{"caption_0": "a", "caption_1": "b"}'}, [["a", "b"]]),
}


@pytest.mark.parametrize("kind", TARS)
def test_tars_are_read_as_their_writers_meant(kind, tmp_path):
    members, expected = TARS[kind]
    shards = Shards(write_tar(tmp_path / "a.tar", members.items()))
    index = load_index(shards, tmp_path / "cache")
    assert [record.captions for record in shards.read(0)] == expected and all(record.picture for record in shards.read(0))
    assert (index.counts, index.problems) == ([len(expected)], []) and index.captions == sum(expected, [])
    assert [record.captions for record in shards.read(0, 1)] == expected[1:]


def test_the_caption_of_a_tar_can_be_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.jpg", png()), ("0.json", SEVERAL), ("0.txt", b"a dog")])
    for column, expected in (("description", ["shot in Rome"]), ("txt", ["a dog"]), ("title", [])):
        assert [record.captions for record in Shards(path, ("", column)).read(0)] == [expected]
    (problem,) = load_index(Shards(path, ("", "title")), tmp_path / "cache").problems
    assert problem == f"{path}: 0: no caption"


def test_a_text_that_cannot_be_read_costs_its_own_picture(tmp_path):
    members = [
        ("0.jpg", png()),
        ("0.json", b"{a"),
        ("1.jpg", png()),
        ("1.txt", b"a 1"),
        ("2.jpg", png()),
        ("2.txt", b"\x81\xff"),
    ]
    shards = Shards(write_tar(tmp_path / "a.tar", members))
    index = load_index(shards, tmp_path / "cache")
    assert index.counts == [3] and index.captions == ["a 1"]
    assert [problem.partition(".tar: ")[2] for problem in index.problems] == [
        "0: its json file is not JSON",
        "2: its txt file is not UTF-8; save it as UTF-8",
    ]


def test_tars_are_counted_as_they_are_read(tmp_path, config_of):
    members = [(f"{i}.{ending}", png(i) if ending == "png" else b"a star") for ending in ("png", "txt") for i in range(3)]
    hidden = [("__index.json", b"{}"), (".x.png", png()), ("no ending", b""), ("8.png", png(8)), ("8.json", b'["a star"]')]
    path = write_tar(tmp_path / "apart.tar", [*members, *hidden])
    shards = Shards(path)
    index = load_index(shards, tmp_path / "cache")
    assert index.counts == [7] == [len(list(shards.read(0)))] and index.num_captions == 4
    assert f"{path}: 0: its files do not lie side by side in the tar file" in index.problems
    with pytest.raises(UserError, match="0: no caption"):
        open_stream(config_of(path))


def test_what_has_changed_is_counted_and_unpacked_again(tmp_path, config_of):
    def write(count):
        columns = {"image": PICTURES[:count], "en": ["a star"] * count, "de": ["ein Stern"] * count}
        write_parquet(tmp_path / "set" / "train.parquet", columns, image=datasets.Image(), en=TEXT, de=TEXT)

    write(4)
    config = replace(config_of(f"hf:{tmp_path}/set", caption_column="en"), val_data=f"hf:{tmp_path}/set")
    assert open_stream(config).num_images == len(stream.validation_table(config)[0]) == 4
    write(9)
    assert open_stream(config).num_images == len(stream.validation_table(config)[0]) == 9
    assert set(stream.validation_table(replace(config, caption_column="de"))[0]["caption"]) == {"ein Stern"}


def test_an_epoch_has_each_picture_at_most_once_in_an_order_of_its_own(config_of, model, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 30)
    first, again, second = (ids(batches(config_of(), model, epoch=epoch)) for epoch in (0, 0, 1))
    assert first == again != second
    for found in (first, second):
        assert [len(batch) for batch in found] == [32, 32, 32] and len({i for batch in found for i in batch}) == 96


def test_batches_are_those_of_the_pictures_and_their_captions(config_of, model):
    config = config_of(captions_per_image=2, crop=1.0)
    opened = open_stream(config)
    records = [record for shard in range(5) for record in opened.shards.read(shard)]
    for batch in batches(config, model):
        texts = batch["text"].unflatten(0, (32, 2))
        for number, picture, drawn in zip(batch["image_id"].tolist(), batch["image"], texts):
            expected = cv2.cvtColor(cv2.imdecode(np.frombuffer(records[number].picture, np.uint8), 1), cv2.COLOR_BGR2RGB)
            assert (picture.permute(1, 2, 0).numpy() == cv2.resize(expected, (80, 80), interpolation=cv2.INTER_AREA)).all()
            encoded = {tuple(model.tokenizer.encode(caption).ids) for caption in records[number].captions}
            rows = [tuple(row[row != model.tokenizer.padding["pad_id"]].tolist()) for row in drawn]
            assert set(rows) <= encoded and len(set(rows)) == 2


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 4}, {"num_workers": 2}], ids=["plain", "micro", "workers"])
def test_an_epoch_goes_on_from_any_step_to_the_bit_and_opens_no_shard_that_is_behind(config_of, model, monkeypatch, options):
    monkeypatch.setattr(stream, "BLOCK", 10)
    config = replace(config_of(batch_size=8, **options), hflip=True)
    whole = batches(config, model, epoch=3)
    per_step = len(whole) // 12
    opened, read = [], Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, shard, start=0: opened.append(shard) or read(self, shard, start))
    for start in (1, 5, 11):
        opened.clear()
        rest = batches(config, model, start=start, epoch=3)
        for batch, expected in zip(rest, whole[start * per_step :], strict=True):
            assert all(torch.equal(value, expected[name]) for name, value in batch.items())
        assert len(opened) <= 5 - (start * 8 // 10 * 10) // 20


@pytest.mark.parametrize("size", [2, 4])
def test_processes_have_shards_of_their_own(config_of, model, monkeypatch, size):
    """Four processes have 20 pictures each but one, which has the two shards of 20 and 16: 8 steps of 2 or 3 each."""
    config, found, steps = config_of(batch_size=10), [], set()
    monkeypatch.setattr(distributed, "size", lambda: size)
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        loader = StreamLoader(open_stream(config), config, model)
        steps.add(loader.batch_sampler.steps)
        found.append([i for batch in loader for i in batch["image_id"].tolist()])
    assert len(steps) == 1
    shards_of = [{i // 20 for i in numbers} for numbers in found]
    assert all(a.isdisjoint(b) for i, a in enumerate(shards_of) for b in shards_of[:i])
    assert len({i for numbers in found for i in numbers}) == sum(map(len, found)) == 10 * steps.pop()


def test_a_batch_that_nobody_asked_for_fits_the_shards_of_each_process(written, monkeypatch):
    flags = ["shapes", "--data-dir", f"{written}/train-*.tar", "--val-data", f"{written}/val-*.tar"]
    config, index = parse_config(flags)[0], load_index(Shards(flags[2]), written / "cache")
    for size, expected in ((1, 96), (2, 80), (4, 80)):  # four processes have 20 pictures each at least, two have 40
        monkeypatch.setattr(distributed, "size", lambda size=size: size)
        opened = stream.Stream(None, index)
        fitted = fit_batch(config, opened.num_real, "there")
        assert fitted.batch_size == expected and stream.StreamSampler(opened, fitted).steps == 1


# ---- training ----------------------------------------------------------------------------------------------------


def outcome(run_dir):
    saved = torch.load(run_dir / "last.pt", weights_only=True)
    history = pd.read_csv(run_dir / "history.csv").drop(columns="seconds").to_numpy().tolist()
    return saved["model"], history


def test_a_run_that_is_killed_ends_with_the_same_bits(forked, written, tmp_path, times):
    """Killed after each of some steps, as `kill -9` does; the folder's splits and the tokenizer come from the shards, too."""

    def flags(name, *more):
        small = flags_for_small(f"{written}/train-*.tar", tmp_path, name, val_data=f"{written}/val-*.tar")
        return [*small, "--save-every", "1", "--resume", "auto", *more]

    forked(train_until, flags("whole"), None).join()
    for kill_at in np.random.default_rng(0).integers(1, 7, size=times(1, 20)).tolist():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        process = forked(train_until, flags("run"), kill_at)
        process.join()
        assert process.exitcode == -9
        forked(train_until, flags("run"), None).join()
        (weights, history), (expected, expected_history) = outcome(tmp_path / "run"), outcome(tmp_path / "whole")
        assert history == expected_history and all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert set(pd.read_csv(tmp_path / "run" / "splits.csv")["split"]) == {"val"}


def train_until(flags, kill_at):
    torch.set_num_threads(1)
    taken, update = [], main.train_epoch.__globals__["update_weights"]

    def dying(state):
        taken.append(None)
        if len(taken) == kill_at:
            os.kill(os.getpid(), 9)
        return update(state)

    main.train_epoch.__globals__["update_weights"] = dying
    main.train(parse_config(flags, "shapes")[0])


def test_frozen_encoders_are_run_and_their_features_standardised(config_of, tmp_path):
    config = config_of(freeze="both", epochs=1)
    trained = main.train(config)
    for head in (trained.image_projection, trained.text_projection):
        assert head.mean.abs().max() > 0 and (head.std != 1).all()
    assert len(list((tmp_path / "cache").glob("image-features-*"))) == 1  # of the validation images


def freeze_as_one_of(rank, config, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(main.train(config).state_dict(), folder / f"{rank}.pt")
    distributed.destroy_distributed()


def test_two_processes_train_one_model_and_go_on_only_as_two(forked, config_of, tmp_path):
    config = config_of(freeze="both", epochs=1, save_every=1, batch_size=8, loss="softmax")
    for process in [forked(freeze_as_one_of, rank, config, tmp_path) for rank in range(2)]:
        process.join()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    saved = read_checkpoint(tmp_path / "run" / "last.pt")
    write_checkpoint(tmp_path / "run", saved | {"losses": torch.zeros(3, 2)})
    with pytest.raises(UserError, match="stopped within an epoch with 2 processes"):
        main.train(replace(config, resume="yes"))


def test_a_broken_picture_costs_itself_and_one_line(config_of, model, tmp_path, capsys):
    members = [(f"{i:03d}.{ending}", data) for i in range(20) for ending, data in (("png", png(i)), ("txt", b"a red circle"))]
    members[8] = ("004.png", png(4)[:60])
    config = config_of(write_tar(tmp_path / "broken.tar", members), batch_size=10)
    with pytest.raises(UserError, match=r"broken\.tar: 004: .*--skip-bad"):
        batches(config, model)
    config = replace(config, skip_bad=True)
    loader = StreamLoader(open_stream(config), config, model)
    capsys.readouterr()
    for epoch in range(2):
        loader.batch_sampler.epoch = epoch
        assert sorted(map(len, ids(loader))) == [9, 10]
    assert capsys.readouterr().out.count("left out") == 1


def test_a_truncated_shard_is_left_out_by_name(config_of, written, model, tmp_path):
    for number in range(2):
        shutil.copy(written / f"train-{number:06d}.tar", tmp_path)
    path = tmp_path / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:40_000])
    config = config_of(f"{tmp_path}/train-*.tar", batch_size=10)
    with pytest.raises(UserError, match=r"train-000001\.tar: damaged, all its pictures are left out"):
        open_stream(config)
    assert sorted(i for batch in ids(batches(replace(config, skip_bad=True), model)) for i in batch) == list(range(20))


def test_a_dry_run_counts_shards_and_leaves_nothing(config_of, tmp_path, capsys):
    print_plan(config_of(freeze="image"), None)
    printed = capsys.readouterr().out
    assert "96 train images (480 captions), 24 val images (120 captions)" in printed and "2 epochs of 3 steps" in printed
    assert not list(tmp_path.iterdir())


# ---- tables ------------------------------------------------------------------------------------------------------


def write_parquet(path, columns, **features):
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(path), batch_size=8)


PICTURES = [{"bytes": png(number), "path": None} for number in range(20)]
TEXT, TEXTS = datasets.Value("string"), datasets.List(datasets.Value("string"))


@pytest.mark.parametrize(
    ("name", "captions", "kind"),
    [
        ("caption", [[f"{i} a", f"{i} b"] for i in range(20)], TEXTS),
        ("text", [f"{i} a" for i in range(20)], TEXT),
        ("remark", [f"{i} a" for i in range(20)], TEXT),
    ],
)
def test_a_folder_of_parquet_files_is_a_data_set_of_the_hub(tmp_path, name, captions, kind):
    write_parquet(
        tmp_path / "set" / "train-0.parquet", {"picture": PICTURES, name: captions}, picture=datasets.Image(), **{name: kind}
    )
    columns = ("", name if name == "remark" else "")
    for pattern in (f"hf:{tmp_path}/set", f"hf:{tmp_path}/set:train", f"{tmp_path}/set/*.parquet"):
        shards = Shards(pattern, columns)
        assert len(shards.names) == 3  # row groups
        index = load_index(shards, tmp_path / "cache")
        assert index.counts == [8, 8, 4]
        found = [record for shard in range(3) for record in shards.read(shard)]
        assert [record.picture for record in found] == [picture["bytes"] for picture in PICTURES]
        assert [record.captions for record in found] == [each if isinstance(each, list) else [each] for each in captions]
        assert [record.key for record in shards.read(1, 5)] == [record.key for record in found[13:16]]
    if name == "remark":
        with pytest.raises(UserError, match="no such column; name it with --caption-column: there are picture, remark"):
            Shards(f"hf:{tmp_path}/set")


def test_numbered_caption_columns_belong_together(tmp_path):
    columns = {"image": PICTURES, **{f"caption_{k}": [f"{i} {k}" for i in range(20)] for k in range(3)}}
    write_parquet(tmp_path / "a.parquet", columns, image=datasets.Image(), **{f"caption_{k}": TEXT for k in range(3)})
    assert next(Shards(f"{tmp_path}/a.parquet").read(0, 4)).captions == ["4 0", "4 1", "4 2"]


@pytest.mark.parametrize(
    ("picture", "caption"), [("image", "caption"), ("Image", "Caption"), ("photo", "TEXT "), ("PNG", "Caption_0")]
)
def test_a_table_that_pandas_wrote_again_is_read(picture, caption, tmp_path):
    columns = {picture: PICTURES, caption: [f"{i} a" for i in range(20)]}
    write_parquet(tmp_path / "a.parquet", columns, **{picture: datasets.Image(), caption: TEXT})
    pd.read_parquet(tmp_path / "a.parquet").to_parquet(tmp_path / "again.parquet")
    for name, given in (("a", ("", "")), ("again", ("", "")), ("again", (picture, caption.strip().lower()))):
        shards = Shards(f"{tmp_path}/{name}.parquet", given)
        found = [record for shard in range(len(shards.names)) for record in shards.read(shard)]
        assert [(r.picture, r.captions) for r in found] == [(p["bytes"], [f"{i} a"]) for i, p in enumerate(PICTURES)]
        assert load_index(shards, tmp_path / "cache").problems == []


def test_columns_of_a_table_are_not_looked_for_in_validation_tars(config_of, tmp_path):
    write_parquet(tmp_path / "a.parquet", {"scan": PICTURES, "remark": ["a"] * 20}, scan=datasets.Image(), remark=TEXT)
    tar = write_tar(tmp_path / "val.tar", [("0.png", png()), ("0.json", b'{"caption": "a star"}')])
    config = config_of(f"{tmp_path}/a.parquet", image_column="scan", caption_column="remark")
    config = replace(config, val_data=tar)
    assert open_stream(config).captions[0] == "a" and list(stream.validation_table(config)[0]["caption"]) == ["a star"]


@pytest.mark.parametrize("again", [False, True], ids=["datasets", "pandas"])
def test_rows_without_a_picture_are_named_before_training_and_listed(again, config_of, tmp_path):
    path = tmp_path / "a.parquet"
    lost = {4: None, 9: {"bytes": b"", "path": None}, 13: {"bytes": None, "path": f"{tmp_path}/gone.jpg"}}
    pictures = [lost.get(i, picture) for i, picture in enumerate(PICTURES)]
    captions = [None if i == 17 else "a red circle" for i in range(20)]
    write_parquet(path, {"image": pictures, "caption": captions}, image=datasets.Image(), caption=TEXT)
    if again:
        pd.read_parquet(path).to_parquet(path)
    config = config_of(str(path), batch_size=8, epochs=1, text_layers=1)
    with pytest.raises(UserError, match="row 4: no picture; .*and 1 more; fix or remove it, or pass --skip-bad"):
        main.train(config)
    assert not (tmp_path / "run").exists()
    main.train(replace(config, skip_bad=True))
    lines = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["no picture"] * 3 + ["no caption"]


def test_a_run_is_trained_on_a_table(config_of, written, tmp_path):
    shards = Shards(f"{written}/train-*.tar")
    records = [record for shard in range(5) for record in shards.read(shard)]
    columns = {"image": [{"bytes": r.picture, "path": None} for r in records], "caption": [r.captions for r in records]}
    write_parquet(tmp_path / "set" / "train.parquet", columns, image=datasets.Image(), caption=TEXTS)
    write_parquet(
        tmp_path / "set" / "validation.parquet", {k: v[:24] for k, v in columns.items()}, image=datasets.Image(), caption=TEXTS
    )
    main.train(replace(config_of(f"hf:{tmp_path}/set", epochs=1), val_data=f"hf:{tmp_path}/set:validation"))
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 1


# ---- what cannot be used -----------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_named_in_one_line(config_of, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_reader, "hub_answers", lambda: False)
    pictures = [(f"{i}.png", png(i)) for i in range(4)]
    alone, texts = write_tar(tmp_path / "alone.tar", pictures), write_tar(tmp_path / "texts.tar", [("0.txt", b"a circle")])
    write_parquet(
        tmp_path / "numbers.parquet",
        {"image": PICTURES, "caption": [1] * 20},
        image=datasets.Image(),
        caption=datasets.Value("int64"),
    )
    write_parquet(tmp_path / "words.parquet", {"image": ["a"] * 20, "caption": ["a"] * 20}, image=TEXT, caption=TEXT)
    (tmp_path / "no.tar").write_bytes(b"nonsense" * 1000)
    for data, expected in (
        (f"{tmp_path}/nothing-*.tar", "no such files; check the pattern"),
        (f"{tmp_path}/shard-{{0..3}}.tar", "no such file as .*shard-0.tar"),
        (alone, r"no captions \(.*alone.tar: 0: no caption\); there has to be a KEY.txt or KEY.json beside each KEY.jpg"),
        (texts, "texts.tar: 0: no picture; fix or remove it, or pass --skip-bad"),
        (f"{tmp_path}/no.tar", "no captions .*no.tar: damaged"),
        (f"{tmp_path}/numbers.parquet", "the column caption holds no captions .*int64.*; name another with --caption-column"),
        (f"{tmp_path}/words.parquet", "the column image holds no pictures .*; name another with --image-column"),
        ("hf:someone/pictures", "no such folder, and the hub cannot be reached; check the network"),
    ):
        with pytest.raises(UserError, match=expected):
            open_stream(config_of(data))
    with pytest.raises(UserError, match="no such column; name it with --image-column: there are image, caption"):
        open_stream(config_of(f"{tmp_path}/words.parquet", image_column="picture"))
    monkeypatch.setattr(distributed, "size", lambda: 6)
    with pytest.raises(UserError, match="5 shards for 6 processes; write at least 6"):
        open_stream(config_of())


def test_settings_that_need_a_folder_are_refused(config_of, written):
    for options in ({"train_images": 9}, {"image_unfreeze_from": "layer4"}, {"unique_images": False}, {"gan": "joint"}):
        with pytest.raises(UserError, match="is read in shards; .* need a folder"):
            config_of(**options)
    with pytest.raises(UserError, match="name validation pictures with --val-data"):
        parse_config(["shapes", "--data-dir", f"{written}/train-*.tar"], "shapes")
    with pytest.raises(UserError, match="--val-data: goes with shards"):
        parse_config(["shapes", "--val-data", str(written)], "shapes")


def test_a_full_disk_leaves_no_shards(sample, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(UserError, match="cannot be written .*No space left"):
        write_shards(WriteShards(str(sample), str(tmp_path / "shards")))
    assert not list(tmp_path.glob("shards*"))


def test_lines_are_captions_and_other_breaks_are_none(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", png(1)), ("1.txt", "a dog\u2028runs\r\na\x0ccat\n".encode())])
    [record] = Shards(f"{tmp_path}/*.tar").read(0)
    assert record.captions == ["a dog\u2028runs", "a\x0ccat"]


@pytest.mark.parametrize("captions, flips", [("un perro corre a la izquierda", False), ("a dog runs on the beach", True)])
def test_crops_of_shards_are_flipped_beside_english_captions_only(config_of, model, tmp_path, capsys, captions, flips):
    write_tar(tmp_path / "a.tar", [m for i in range(8) for m in ((f"{i}.png", png(i)), (f"{i}.txt", captions.encode()))])
    config = replace(config_of(batch_size=4), data_dir=f"{tmp_path}/*.tar", hflip=True)
    for asked, expected in ((False, flips), (True, True)):
        loader = StreamLoader(open_stream(config), replace(config, flip_left_right=asked), model)
        assert loader.crops.config.hflip is expected
    assert ("--hflip: off" in capsys.readouterr().out) is not flips
