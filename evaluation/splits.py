"""Which images and captions a run is scored on, and their similarities."""

from captions import image_positions, load_captions
from config import is_model_name, is_stream, load_run, run_names
from embedding import file_features, pair_scores, picture_vectors, text_features, text_vectors, token_ids
from loading.trained import read_splits, recognised, trained_rows, unlisted_lines, with_contents
from training.stream import validation_table
from utils.errors import UserError


def embed_rows(opened, rows, skip_bad, num_workers):
    """The similarities of some rows' images and captions. Arguments: as for `embed_pairs`.

    Returns (similarity, image_of_text, captions, paths): the (m, n) `pair_scores` of m captions with n images, the (m,)
    index of each caption's image, the m captions, and the paths of the n images.
    """
    I_v, T_v, *others = embed_pairs(opened, rows, skip_bad, num_workers)
    return pair_scores(T_v, I_v), *others


def embed_pairs(opened, rows, skip_bad, num_workers):
    """Embeds the images and captions of some rows.

    opened: (model, device, dtype), from `embedding.open_model`. rows: from `select_rows`.
    Returns (I_v, T_v, image_of_text, captions, paths): the vectors of n images and m captions, (n, d_e + 1) and (m, d_e + 1)
    arrays (`embedding.picture_vectors`), the (m,) index of each caption's image, the m captions, and the paths of the n images.
    """
    (model, device, dtype), (table, image_dir, num_skipped) = opened, rows
    names, _ = image_positions(table)
    I_f, bad = file_features(model, [image_dir / name for name in names], device, dtype, num_workers, skip_bad)
    table = table[~table["image"].isin([names[position] for position in bad])]
    names, image_of_text = image_positions(table)
    captions = list(table["caption"])
    T_f = text_features(model, token_ids(model.tokenizer, captions), device, dtype)
    if num_skipped or bad:
        print(f"left out: {num_skipped} rows, {len(bad)} pictures")
    I_v, T_v = picture_vectors(model, I_f, device).numpy(), text_vectors(model, T_f, device).numpy()
    return I_v, T_v, image_of_text, captions, [image_dir / name for name in names]


def select_rows(run, data_paths, split, skip_bad, columns=("", "")):
    """The captions of a split; val and test without images that the run, or one of an ensemble's, was trained on.

    Arguments and result: as for `rows_of_run`.
    """
    chosen = same_images({name: rows_of_run(name, data_paths, split, skip_bad, columns) for name in run_names(run)})
    return next(iter(chosen.values()))


def same_images(chosen):
    """{run: rows of `select_rows`} with the images that all have. Raises UserError where there are none.

    Recall is higher among fewer images, so models can be compared on the same ones only.
    """
    paths = {name: {str(image_dir / image) for image in table["image"]} for name, (table, image_dir, _) in chosen.items()}
    common = set.intersection(*paths.values())
    if not common:
        raise UserError("--run: these runs have no images in common; name one data set for all with --data-dir")
    if any(len(images) > len(common) for images in paths.values()):
        print(f"scored on the {len(common):,} images that no run was trained on and all have")
    rows = {}
    for name, (table, image_dir, skipped) in chosen.items():
        rows[name] = table[[str(image_dir / image) in common for image in table["image"]]], image_dir, skipped
    return rows


def rows_of_run(run, data_paths, split, skip_bad, columns=("", "")):
    """The captions of a split; val and test without images that a run was trained on.

    data_paths: (data_dir, image_path, captions_path); if all are empty, the data that the run was trained on.
    columns: as for `load_captions`; empty, for the run's own data: the run's.
    Returns (table, image_dir, number of unusable rows that were left out). Raises UserError if the table would be empty.
    """
    config = None if is_model_name(run) else load_run(run)["config"]
    own_data = not any(data_paths)
    if config and own_data:
        columns = columns[0] or config.image_column, columns[1] or config.caption_column
    if own_data:
        if not config:
            raise UserError(f"--run {run}: has no data of its own; name a data set with --data-dir")
        data_paths = config.data_dir, config.image_path, config.captions_path
    if own_data and is_stream(config.data_dir):
        table, image_dir, skipped = validation_table(config)
    else:
        table, image_dir, skipped = load_captions(*data_paths, skip_bad, columns)
    if config and not own_data and is_stream(config.data_dir):
        print("this run was trained on shards, whose pictures it does not list: see that none of these is among them")
    of_split = table if split == "all" else table[table["split"] == split]
    if of_split.empty:
        counts = ", ".join(f"{name} {count}" for name, count in table["split"].value_counts().items() if name)
        raise UserError(f"--split {split}: this data has no such images (captions: {counts}); --split all scores every image")
    notes = table.attrs.get("split")
    if split != "all" and notes:
        print("\n".join([notes.lines()[0], *filter(None, [notes.caution])]))
    if config and split != "train":
        of_split = without_training_images(run, with_contents(of_split, image_dir), split)
    elif config and config.train_images and own_data:  # of this data the run saw these only
        rows = trained_rows(read_splits(run), own=True)
        of_split = of_split[of_split["image"].isin(set.union(*recognised(rows, with_contents(table, image_dir))))]
    return of_split, image_dir, len(skipped)


def without_training_images(run, table, split):
    """A table without the images that a run, or what it started from, was trained on: the score would be too good.

    table: with the column content. Prints how many are left out, and how they are recognised. With --split all they stay in.
    Raises UserError if no image remains.
    """
    rows = read_splits(run)
    by_content, by_captions = recognised(trained_rows(rows), table)
    trained = by_content | by_captions
    for line in unlisted_lines(rows):
        print(f"{run}: {line}")
    if trained and split == "all":
        print(f"{len(trained):,} of these images were trained on, so this is no score on new images")
        return table
    if trained:
        how = f" ({len(by_captions):,} of them known by name and captions, with other bytes)" if by_captions else ""
        print(f"left out: {len(trained):,} images of the {split} split, which this run was trained on{how}")
        table = table[~table["image"].isin(trained)]
    if table.empty:
        raise UserError(f"--split {split}: {run} was trained on all of these images; score it on other images")
    return table
