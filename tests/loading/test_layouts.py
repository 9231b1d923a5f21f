"""Layouts of captions files that people have, each read into the same table: those of the list in docs/data-and-encoders.md."""

import json

import pandas as pd
import pytest

from captions import load_captions
from utils.errors import UserError

CAPTIONS = {f"{i}.jpg": [f"a dog , number {i}", f"it's {i}"] for i in range(6)}
PAIRS = [(name, caption) for name, captions in CAPTIONS.items() for caption in captions]
LISTS = [[name, captions] for name, captions in CAPTIONS.items()]


def rows(header, line, of=PAIRS):
    return "\n".join([header, *(line.format(*row, i=i) for i, row in enumerate(of))]) + "\n"


def frame(header, values):
    return pd.DataFrame(values, columns=header).to_csv(index=False)


def cells(write):
    return frame(["image", "caption"], [[name, write(captions)] for name, captions in LISTS])


RECORDS = [{"image": name, "caption": captions} for name, captions in LISTS]
COCO = {
    "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(6)],
    "annotations": [{"image_id": int(name[0]), "id": i, "caption": caption} for i, (name, caption) in enumerate(PAIRS)],
}
LAYOUTS = {
    "Kaggle's": {"captions.txt": rows("image,caption", '{},"{}"')},
    "a byte order mark": {"captions.csv": "\ufeff" + rows("image,caption", '{},"{}"')},
    "the original": {"Flickr8k.token.txt": rows("", "{0}#{i}\t{1}")[1:]},
    "below Flickr8k_text": {"Flickr8k_text/Flickr8k.token.txt": rows("", "{0}#{i}\t{1}")[1:]},
    "Flickr30k's bars": {"results.csv": rows("image_name| comment_number| comment", "{0}| 0| {1}")},
    "semicolons": {"own.csv": rows("photo;title", "{};{}")},
    "tabs": {"captions.tsv": rows("filepath\ttitle", "{}\t{}")},
    "open_clip's CSV": {"own.csv": rows("filepath,title", '{},"{}"')},
    "commas without quotation marks": {"captions.txt": rows("image,caption", "{},{}")},
    "a space before them": {"captions.txt": rows("image, caption", '{}, "{}"')},
    "the caption first": {"captions.csv": rows("caption,image", '"{1}",{0}')},
    "no header": {"captions.csv": rows("", '{},"{}"')[1:]},
    "blank rows": {"captions.csv": rows("image,caption", '{},"{}"') + ",\n\n"},
    "UTF-16": {"captions.csv": rows("image\tcaption", "{}\t{}").encode("utf-16")},
    "JSON in cells": {"captions.csv": cells(json.dumps)},
    "Python in cells": {"captions.csv": cells(str)},
    "numbered columns": {"captions.csv": frame(["image", "caption_1", "caption_2"], [[n, *c] for n, c in LISTS])},
    "a column and more": {"captions.csv": frame(["image", "caption", "caption2"], [[n, *c] for n, c in LISTS])},
    "absent captions": {
        "captions.csv": frame(["image", "caption", "caption2", "caption3"], [[n, *c, "nan"] for n, c in LISTS])
    },
    "Hugging Face's CSV": {"metadata.csv": rows("file_name,text", 'Images/{},"{}"')},
    "Hugging Face's JSON lines": {
        "metadata.jsonl": "".join(json.dumps({"file_name": f"Images/{n}", "text": c}) + "\n" for n, c in PAIRS)
    },
    "COCO's": {"annotations/captions_train2017.json": json.dumps(COCO)},
    "records": {"captions.json": json.dumps(RECORDS)},
    "a mapping": {"captions.json": json.dumps(CAPTIONS)},
    "pandas' JSON": {"captions.json": pd.DataFrame(PAIRS, columns=["image", "caption"]).to_json()},
    "a table for each split": {
        "train.csv": rows("image,caption", '{},"{}"', PAIRS[:8]),
        "val.csv": rows("image,caption", '{},"{}"', PAIRS[8:]),
    },
    "a text for each picture": {f"Images/{n[0]}.txt": "\n".join(c) for n, c in LISTS},
    "texts in another folder": {f"texts/{n[0]}.txt": "\n".join(c) for n, c in LISTS},
    "paths": {"captions.csv": rows("image,caption", './Images/{},"{}"')},
    "Windows' paths": {"captions.csv": rows("image,caption", 'Images\\{},"{}"')},
    "another machine's paths": {"captions.csv": rows("image,caption", '/home/me/Images/{},"{}"')},
    "names without endings": {"captions.csv": rows("image_id,caption", '{},"{}"', [(n[0], c) for n, c in PAIRS])},
    "capitals": {"captions.csv": rows("image,caption", '{},"{}"', [(n.upper(), c) for n, c in PAIRS])},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "Images").mkdir()
    for name in CAPTIONS:
        (tmp_path / "Images" / name).touch()
    return tmp_path


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_table(folder, layout):
    write(folder, LAYOUTS[layout])
    table, image_dir, skipped = load_captions(folder)
    assert sorted(zip(table["image"], table["caption"])) == sorted(PAIRS)
    assert image_dir == folder / "Images" and skipped == []


def test_tables_of_splits_say_the_split(folder):
    write(folder, LAYOUTS["a table for each split"])
    table, _, _ = load_captions(folder)
    assert dict(zip(table["image"], table["split"])) == {f"{i}.jpg": "train" if i < 4 else "val" for i in range(6)}
    write(folder, {"val.csv": rows("image,caption", '{},"{}"')})
    with pytest.raises(UserError, match=r"val\.csv, row 2: 0\.jpg is in .*train\.csv, too"):
        load_captions(folder)


BROKEN = {  # a row that cannot be used: what is said of it
    "text after a quotation mark": ('0.jpg,"Stop" sign', "wrong quotation marks"),
    "backslashes": (r'0.jpg,"a \"big\" dog"', "wrong quotation marks"),
    "too long": (f'0.jpg,"{"a" * 140_000}"', "140,008 characters"),
    "not closed": ('0.jpg,"a dog', "not closed before the next row"),
    "pandas' nan": ("0.jpg,nan", "empty caption"),
    "None": ("0.jpg,None", "empty caption"),
}


@pytest.mark.parametrize("problem", BROKEN)
@pytest.mark.parametrize("quoted", [True, False])
def test_a_row_that_cannot_be_used_is_named_and_left_out_alone(folder, problem, quoted):
    row, message = BROKEN[problem]
    good = [(n, c.replace(",", ";")) for n, c in PAIRS[2:]]
    text = rows("image,caption", '{},"{}"' if quoted else "{},{}", good).split("\n", 1)
    write(folder, {"captions.csv": f"{text[0]}\n{row}\n{text[1]}"})
    with pytest.raises(UserError, match=f"1 unusable rows .row 2: .*{message}"):
        load_captions(folder)
    table, _, skipped = load_captions(folder, skip_bad=True)
    assert list(zip(table["image"], table["caption"])) == good and len(skipped) == 1


def test_a_quoted_caption_of_several_lines_may_name_a_file(folder):
    write(folder, {"captions.csv": 'image,caption\n0.jpg,"the sign reads\nholiday.jpg, 2 MB"\n1.jpg,a cat\n'})
    assert list(load_captions(folder)[0]["caption"]) == ["the sign reads\nholiday.jpg, 2 MB", "a cat"]


@pytest.mark.parametrize(("header", "row"), [("image,caption", "9.gif,a cat"), ("caption,image", "a cat,9.gif")])
def test_a_swallowed_row_is_found_with_any_ending_and_order(folder, header, row):
    (folder / "Images" / "9.gif").touch()
    bad = '0.jpg,"a dog' if header[0] == "i" else '"a dog,0.jpg'
    write(folder, {"captions.csv": f"{header}\n{bad}\n{row}\n"})
    assert list(load_captions(folder, skip_bad=True)[0]["image"]) == ["9.gif"]


def test_cp1252_is_read_where_it_is_certain(folder, capsys):
    write(folder, {"captions.csv": "image,caption\n0.jpg,un café à Paris\n".encode("cp1252")})
    assert list(load_captions(folder)[0]["caption"]) == ["un café à Paris"]
    assert "read in cp1252" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["собака бежит".encode("cp1251"), "犬が走る".encode("shift-jis"), "café é".encode() + b"\n\xe9"]
)
def test_other_encodings_are_refused_with_the_row(folder, content):
    write(folder, {"captions.csv": b"image,caption\n0.jpg," + content + b"\n"})
    with pytest.raises(UserError, match=r"captions\.csv, row [23]: not UTF-8"):
        load_captions(folder)


def test_a_workbook_is_named_for_what_it_is(folder):
    write(folder, {"captions.xlsx": b"PK\x03\x04...."})
    with pytest.raises(UserError, match="workbook"):
        load_captions(folder)
    write(folder, {"captions.csv": b"PK\x03\x04...."})
    with pytest.raises(UserError, match="workbook"):
        load_captions(folder)


def test_a_name_that_is_not_plain_is_not_taken_and_a_near_one_is_named(folder):
    write(folder, {"captions.csv": "image,caption\nO.jpg,a dog\n", "Images/holiday.jpg": b""})
    write(folder, {"captions.csv": "image,caption\nholliday.jpg,a dog\n"})
    with pytest.raises(UserError, match=r"holliday\.jpg \(nearest: holiday\.jpg\)"):
        load_captions(folder)
    write(folder, {"captions.csv": "image,caption\na/0.jpg,a dog\nb/0.jpg,a cat\n1.jpg,a bird\n"})
    assert list(load_captions(folder, skip_bad=True)[0]["image"]) == ["1.jpg"]  # both cannot be 0.jpg


def test_how_names_were_matched_is_said(folder, capsys):
    write(folder, LAYOUTS["names without endings"])
    load_captions(folder)
    assert "matched to files: 6 without endings (0 is 0.jpg)" in capsys.readouterr().out


def test_columns_that_are_named_are_taken(folder):
    write(folder, {"own.csv": rows("wer,was,caption", '{},"{}",x')})
    assert sorted(load_captions(folder, columns=("wer", "was"))[0]["caption"]) == sorted(c for _, c in PAIRS)
    with pytest.raises(UserError, match="--image-column"):
        load_captions(folder)


def test_rubbish_beside_the_files_is_no_picture(folder):
    write(folder, LAYOUTS["names without endings"] | {f"Images/._{name}": b"" for name in CAPTIONS} | {"._captions.csv": b"\0"})
    write(
        folder,
        {"Images/@eaDir/0.jpg": b"", "Images/__MACOSX/1.jpg": b"", "Images/$RECYCLE.BIN/2.jpg": b"", "Images/.t/0.jpg": b""},
    )
    assert set(load_captions(folder)[0]["image"]) == set(CAPTIONS)


def test_a_hidden_picture_that_is_named_is_taken(folder):
    write(folder, {"captions.csv": "image,caption\n.mine/0.jpg,a dog\n", "Images/.mine/0.jpg": b""})
    assert list(load_captions(folder)[0]["image"]) == [".mine/0.jpg"]
