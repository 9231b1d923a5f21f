"""Find pictures of one split that are also in another: the same file name, or the same photograph under different names."""

from itertools import combinations
from pathlib import Path

from captions import load_captions
from search.duplicates import group
from search.hashes import Hashes, differing_bits
from utils.errors import UserError
from utils.files import write_json

NUM_SHOWN = 10  # near-duplicates to print


def near_duplicates(paths, num_workers=0):
    """The pairs of files that are the same photograph, by `search.duplicates`: a list of (path, path, differing bits).

    paths: of n picture files. The bits are those of their hashes, of 256. Raises UserError for a file that cannot be decoded.
    """
    with Hashes(None) as hashes:
        problems = hashes.update([(str(path), 0, 0) for path in paths], num_workers)  # nothing is kept: sizes do not matter
        if problems:
            raise UserError(f"{problems[0]}; fix or remove it")
        groups = group(hashes.pictures(), hashes.small)
    pairs = [pair for copies in groups for pair in combinations(copies, 2)]
    return [(a.path, b.path, 0 if a.codes is None else differing_bits(a.codes, b.codes)[0]) for a, b in pairs]


def leaks(options):
    """Finds pictures that are in two splits: the same file name, or near-duplicates, which are the same photograph."""
    paths, columns = (
        (options.data_dir, options.image_path, options.captions_path),
        (options.image_column, options.caption_column),
    )
    table, image_dir, _ = load_captions(*paths, columns=columns)
    names = {split: sorted(set(rows["image"])) for split, rows in table[table["split"] != ""].groupby("split")}
    place = {str(image_dir / name): (split, name) for split in names for name in names[split]}
    results = {"images": {split: len(names[split]) for split in names}, "same_name": [], "near_duplicates": []}
    for a, b in combinations(names, 2):
        in_a, in_b = ({Path(name).name for name in names[split]} for split in (a, b))  # without their folders
        results["same_name"] += sorted(in_a & in_b)
    for a, b, bits in sorted(near_duplicates(place, options.num_workers), key=lambda pair: pair[2]):
        found = dict(sorted([place[a], place[b]]))  # {split: name}
        if len(found) == 2:
            results["near_duplicates"].append(found | {"differing_bits": bits})
    print(", ".join(f"{count:,} {split}" for split, count in results["images"].items()), "images")
    print("\n".join(table.attrs["split"].lines()))
    print(f"in two splits: {len(results['same_name'])} file names, {len(results['near_duplicates'])} near-duplicates")
    for pair in results["near_duplicates"][:NUM_SHOWN]:
        print("  " + ", ".join(f"{key} {value}" for key, value in pair.items()))
    if options.json:
        write_json(options.json, results)
