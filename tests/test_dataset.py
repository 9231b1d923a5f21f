"""Pictures, the cache of decoded ones, batches, and the drawn sample."""

import csv
import errno
import pickle
import random
import shutil

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from captions import is_english, mentions_left_or_right
from dataset import CLIPDataset, PairSampler, pad
from Datasets import shapes
from training.data import batch_loader
from utils import images as images_module
from utils.cache import cached_tensor
from utils.errors import UserError
from utils.images import center_crop, decode_images, read_image, resize_image


def write_picture(path, height, width, seed=0):
    rng = np.random.default_rng(seed)
    picture = cv2.resize(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    Image.fromarray(picture).save(path)
    return path


@pytest.fixture
def pictures(tmp_path):
    return [write_picture(tmp_path / f"{i}.png", 40 + 7 * i, 60, seed=i) for i in range(5)]


@pytest.mark.parametrize(
    ("shape", "expected"), [((60, 40), (48, 32)), ((40, 60), (32, 48)), ((10, 10), (32, 32)), ((10, 500), (32, 96))]
)
def test_shorter_side_gets_the_size_and_panoramas_are_cut(shape, expected):
    assert resize_image(np.zeros((*shape, 3), np.uint8), 32).shape == (*expected, 3)


def test_center_crop_takes_the_middle():
    image = np.arange(4 * 8 * 3).reshape(4, 8, 3)
    assert (center_crop(image, 4) == image[:, 2:6]).all()


def test_reading_agrees_with_pillow_and_obeys_exif(tmp_path):
    picture = Image.new("RGB", (40, 20), (200, 30, 30))
    picture.paste((20, 40, 220), (20, 0, 40, 20))  # red on the left, blue on the right
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter clockwise
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "turned.jpg", 20)
    assert image.shape == (40, 20, 3)
    assert image[5, 10, 0] > 150 and image[35, 10, 2] > 150  # red above, blue below, and red comes first


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    Image.new("RGB", (20, 20), (128, 128, 128)).convert(mode).save(path)
    assert read_image(path, 16).shape == (16, 16, 3)


def damaged(path, kind):
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"not a picture", "truncated": data[: len(data) // 2]}[kind])


@pytest.mark.parametrize("kind", ["empty", "text", "truncated"])
def test_a_damaged_picture_is_named_and_leaves_no_cache(pictures, tmp_path, kind):
    damaged(pictures[2], kind)
    with pytest.raises(UserError, match=r"2\.png.*--skip-bad"):
        decode_images(pictures, 32, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    images, bad = decode_images(pictures, 32, tmp_path / "cache", skip_bad=True)
    assert list(bad) == [2]
    assert (images[3] == read_image(pictures[3], 32)).all()


def test_truncated_jpegs_are_refused(tmp_path):
    path = tmp_path / "a.jpg"
    write_picture(path, 60, 60)
    damaged(path, "truncated")
    with pytest.raises(ValueError, match="truncated"):
        read_image(path, 32)


def test_cache_holds_what_reading_gives_notices_changes_and_travels_to_workers(pictures, tmp_path, capsys):
    images, bad = decode_images(pictures, 32, tmp_path / "cache", num_workers=2)
    assert bad == {} and len(images) == 5
    for i, path in enumerate(pictures):
        assert (images[i] == read_image(path, 32)).all()
    assert len(pickle.dumps(images)) < 500
    assert (pickle.loads(pickle.dumps(images))[4] == images[4]).all()
    capsys.readouterr()
    decode_images(pictures, 32, tmp_path / "cache")
    assert capsys.readouterr().out == ""  # the second time nothing is decoded
    write_picture(pictures[0], 50, 50, seed=9)
    assert (decode_images(pictures, 32, tmp_path / "cache")[0][0] == read_image(pictures[0], 32)).all()


def test_a_truncated_cache_is_made_again(pictures, tmp_path):
    images, _ = decode_images(pictures, 32, tmp_path / "cache")
    pixels = images.folder / "pixels.bin"
    expected = images[4].copy()
    del images
    pixels.write_bytes(pixels.read_bytes()[:-100])
    assert (decode_images(pictures, 32, tmp_path / "cache")[0][4] == expected).all()


def test_a_cache_of_other_pictures_is_made_again(pictures, tmp_path):
    images, _ = decode_images(pictures, 32, tmp_path / "cache")
    others, _ = decode_images(pictures[:3], 32, tmp_path / "cache")
    folder = images.folder
    shutil.rmtree(folder)
    others.folder.rename(folder)
    assert (decode_images(pictures, 32, tmp_path / "cache")[0][4] == read_image(pictures[4], 32)).all()


@pytest.mark.parametrize("damage", ["none", "truncated", "another shape", "another kind", "no array"])
def test_a_cached_tensor_is_read_where_it_is_whole_and_made_again_elsewhere(tmp_path, damage):
    path, expected, computed = tmp_path / "cache" / "a.npy", torch.randn(6, 4).bfloat16(), []

    def cached():
        return cached_tensor(path, (6, 4), torch.bfloat16, lambda: computed.append(1) or expected.split(4))

    assert torch.equal(cached(), expected)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-2])
    elif damage == "another shape":
        np.save(path, np.zeros((5, 4), dtype=np.int16))
    elif damage == "another kind":
        np.save(path, np.zeros((6, 4), dtype=np.float32))
    elif damage == "no array":
        path.write_bytes(b"something else")
    assert torch.equal(cached(), expected)
    assert len(computed) == (1 if damage == "none" else 2)


def test_a_full_disk_ends_in_one_line_and_leaves_no_cache(pictures, tmp_path, monkeypatch):
    def blocks():
        yield torch.zeros(2, 4)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"a\.npy: cannot be written \(No space left on device\)"):
        cached_tensor(tmp_path / "a.npy", (6, 4), torch.float32, blocks)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"--cache-dir .*No space left on device"):
        decode_images(pictures, 32, tmp_path / "cache")
    assert [path.name for path in tmp_path.rglob("*") if path.suffix in (".npy", ".bin", ".tmp")] == []


def test_a_batch_holds_an_image_once_with_a_caption_of_its_own():
    captions_of = [np.arange(start, start + 1 + start % 4) for start in range(0, 50, 5)]
    owner = {caption: image for image, captions in enumerate(captions_of) for caption in captions}
    sampler, seen = PairSampler(captions_of, batch_size=4, seed=0), set()
    for sampler.epoch in range(30):
        batches = list(sampler)
        assert [len(batch) for batch in batches] == [4, 4]
        images = [image for batch in batches for image, _, _ in batch]
        assert len(set(images)) == 8
        assert all(owner[caption] == image for batch in batches for image, (caption,), _ in batch)
        seen |= {caption for batch in batches for _, (caption,), _ in batch}
    assert seen == set(owner)  # every caption is drawn sooner or later


def test_an_image_comes_with_several_of_its_captions_side_by_side():
    captions_of = [np.array([0, 1, 2]), np.array([3]), np.array([4, 5])]
    sampler, seen = PairSampler(captions_of, batch_size=3, seed=0, captions_per_image=2), set()
    for sampler.epoch in range(20):
        (batch,) = sampler
        drawn = {image: captions for image, captions, _ in batch}
        assert all(set(captions) <= set(captions_of[image].tolist()) for image, captions in drawn.items())
        assert drawn[1] == [3, 3] and len(set(drawn[0])) == len(set(drawn[2])) == 2  # twice only where there is one
        seen |= set(drawn[0])
    assert seen == {0, 1, 2}
    views, texts = torch.arange(3.0).view(3, 1, 1), [[10 + i] for i in range(6)]
    (loaded,) = batch_loader(CLIPDataset(views, texts, 32, image_key="image_features"), sampler, 0)
    assert loaded["image_features"].flatten().tolist() == [image for image, _, _ in batch]
    assert loaded["text"].flatten().tolist() == [10 + caption for _, captions, _ in batch for caption in captions]


def test_an_epoch_is_the_same_again_and_with_workers(pictures, tmp_path):
    images, _ = decode_images(pictures, 32, tmp_path / "cache")
    texts = [[1] * (i + 1) for i in range(10)]
    dataset = CLIPDataset(images, texts, size=32, crop=0.6)
    captions_of = [np.array([2 * i, 2 * i + 1]) for i in range(5)]

    def epoch(number, workers):
        sampler = PairSampler(captions_of, 2, seed=0)
        sampler.epoch = number
        return list(batch_loader(dataset, sampler, 0, workers))

    first, again, other = epoch(3, 0), epoch(3, 2), epoch(4, 0)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, again) for name in a)
    assert not all(torch.equal(a["image"], b["image"]) for a, b in zip(first, other))
    assert first[0]["image"].shape == (2, 3, 32, 32)
    assert first[0]["text"].shape == first[0]["attention_mask"].shape


def test_micro_batches_are_the_batch_in_parts_twice():
    captions_of = [np.array([i]) for i in range(13)]
    whole, parts = PairSampler(captions_of, 6, seed=0), PairSampler(captions_of, 6, seed=0, micro_batch_size=2)
    assert (whole.steps, whole.parts, len(whole)) == (2, 1, 2)
    assert (parts.steps, parts.parts, len(parts)) == (2, 3, 12)
    for batch, start in zip(whole, (0, 6)):
        first, again = list(parts)[start : start + 3], list(parts)[start + 3 : start + 6]
        assert sum(first, []) == batch and again == first


def test_one_of_the_cached_views_is_drawn():
    views = torch.arange(12.0).view(2, 3, 2)  # two images, three views, activations of shape (2,)
    dataset = CLIPDataset(views, [[1]], size=32, image_key="image_activations")
    assert [dataset[(1, [0], seed)][0].tolist() for seed in (0, 1, 5)] == [[6.0, 7.0], [8.0, 9.0], [10.0, 11.0]]


def test_half_of_the_crops_are_mirror_images_but_not_beside_left_and_right(pictures, tmp_path):
    images, _ = decode_images(pictures, 32, tmp_path / "cache")
    captions = ["a dog", "a man to the LEFT of a dog", "a rightward arrow", "a bright cleft"]
    no_flip = [mentions_left_or_right(caption) for caption in captions]
    assert no_flip == [False, True, True, False]
    plain = CLIPDataset(images, [[1]] * 4, size=32, crop=0.6)
    mirrored = CLIPDataset(images, [[1]] * 4, size=32, crop=0.6, no_flip=no_flip)
    for seed in range(4):
        crop = plain[(0, [0, 3], seed)][0]
        turned = crop[:, ::-1] if seed % 2 else crop
        assert not np.array_equal(crop, crop[:, ::-1])
        np.testing.assert_array_equal(mirrored[(0, [0, 3], seed)][0], turned)
        np.testing.assert_array_equal(mirrored[(0, [0, 1], seed)][0], crop)
    views = torch.arange(5.0).view(1, 5, 1)  # the second and the fourth are mirror images
    kept = CLIPDataset(views, [[1]] * 4, size=32, no_flip=no_flip, image_key="image_features")
    assert [kept[(0, [0], seed)][0].item() for seed in range(6)] == [0, 1, 2, 3, 4, 0]
    assert [kept[(0, [2], seed)][0].item() for seed in range(6)] == [0, 0, 2, 2, 4, 0]


def test_padding_reaches_the_longest_of_the_batch():
    input_ids, mask = pad([[5, 6, 7], [8]], pad_id=9)
    assert input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_the_sample_is_the_same_for_the_same_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shapes.draw(tmp_path / name, train=6, val=2, test=2, seed=seed)
    text = {name: (tmp_path / name / "captions.txt").read_text() for name in "abc"}
    assert text["a"] == text["b"] != text["c"]
    for path in (tmp_path / "a" / "Images").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "Images" / path.name).read_bytes()


def test_held_out_looks_occur_in_the_test_split_only(sample):
    words = {color: names for color, (names, _) in shapes.COLORS.items()}
    held_out = [f"{c} {s}" for color, shape in shapes.HELD_OUT for c in words[color] for s in shapes.SHAPES[shape]]
    with open(sample / "captions.txt", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for split in ("train", "dev", "test"):
        names = set((sample / f"shapes.{split}Images.txt").read_text().split())
        captions = [row["caption"] for row in rows if row["image"] in names]
        assert len(captions) == 5 * len(names)
        found[split] = sum(any(look in caption for look in held_out) for caption in captions)
    assert found["train"] == found["dev"] == 0 < found["test"]


@pytest.mark.parametrize("seen", [8, 20, shapes.MAX_SEEN])
def test_training_shows_so_many_pairs_and_each_colour_and_shape(seen):
    unseen = shapes.unseen_pairs(seen)
    shown = {(color, shape) for color in shapes.COLORS for shape in shapes.SHAPES} - unseen
    assert len(shown) == seen and unseen >= shapes.HELD_OUT
    assert {color for color, _ in shown} == set(shapes.COLORS) and {shape for _, shape in shown} == set(shapes.SHAPES)


def test_more_or_fewer_pairs_than_there_are_cannot_be_shown():
    assert shapes.unseen_pairs(shapes.MAX_SEEN) == shapes.HELD_OUT
    for seen in (7, shapes.MAX_SEEN + 1):
        with pytest.raises(ValueError, match="must be 8 to 42"):
            shapes.unseen_pairs(seen)


def test_a_sample_of_few_pairs_shows_no_other_in_training(tmp_path):
    shapes.draw(tmp_path / "few", train=12, val=4, test=4, seen=10)
    words = {(c, s): [f"{a} {b}" for a in shapes.COLORS[c][0] for b in shapes.SHAPES[s]] for c, s in shapes.unseen_pairs(10)}
    text = (tmp_path / "few" / "captions.txt").read_text(encoding="utf-8").splitlines()[1 : 1 + 5 * 16]
    assert not [line for line in text for names in words.values() for name in names if name in line]


def test_two_captions_of_five_name_no_colours(sample):
    colors = [word for words, _ in shapes.COLORS.values() for word in words]
    looks = [f"{color} {word}" for color in colors for words in shapes.SHAPES.values() for word in words]
    with open(sample / "captions.txt", newline="", encoding="utf-8") as file:
        captions = [row["caption"] for row in csv.DictReader(file)]
    colored = [any(look in caption for look in looks) for caption in captions]
    assert colored == [True, False, True, False, True] * (len(captions) // 5)


def test_class_folders_show_one_shape_of_their_colour(tmp_path):
    shapes.draw_classes(tmp_path / "classes", pictures=2)
    folders = sorted(path.name for path in (tmp_path / "classes").iterdir())
    assert folders == sorted(f"{color} {shape}" for color in shapes.COLORS for shape in shapes.SHAPES)
    for folder in folders:
        assert len(list((tmp_path / "classes" / folder).iterdir())) == 2
        color = np.array(shapes.COLORS[folder.split()[0]][1])
        picture = read_image(tmp_path / "classes" / folder / "000.png", 96)
        assert (np.abs(picture.astype(int) - color).max(axis=2) < 20).sum() > 100  # pixels


def test_captions_tell_the_truth_about_places():
    thing = shapes.Thing
    scene = shapes.Scene((thing("red", "circle", "small", (0, 0)), thing("blue", "star", "large", (0, 2))), "grey")
    for seed in range(50):
        relation, _, ground, *_ = shapes.captions(scene, random.Random(seed))
        red_first = relation.index("circle" if "circle" in relation else "disc") < relation.index("star")
        assert ("left" in relation) == red_first and ("right" in relation) != red_first
        assert "above" not in relation and "below" not in relation
        assert "grey" in ground


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["A dog runs through the snow .", "two men on a bench"], True),
        (["a small red circle left of a blue square", "a ring on a grey background"], True),
        (["Ein Hund läuft am Strand", "Zwei Männer sitzen links auf einer Bank"], False),
        (["un perro corre por la playa a la izquierda"], False),
        (["बाईं ओर एक कुत्ता"], False),
        (["左边有一只狗"], False),
    ],
)
def test_english_captions_are_told_from_others_which_are_not_flipped(captions, expected):
    assert is_english(captions) == expected


def test_a_picture_that_could_not_be_read_for_a_while_is_decoded_by_the_next_run(pictures, tmp_path, monkeypatch):
    read_bytes = images_module.read_bytes

    def failing(path):
        if path == pictures[2]:
            raise OSError(5, "Input/output error", str(path))
        return read_bytes(path)

    monkeypatch.setattr(images_module, "read_bytes", failing)
    assert list(decode_images(pictures, 32, tmp_path / "cache", skip_bad=True)[1]) == [2]
    monkeypatch.setattr(images_module, "read_bytes", read_bytes)
    assert decode_images(pictures, 32, tmp_path / "cache", skip_bad=True)[1] == {}
