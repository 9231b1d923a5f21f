"""Semantic textual similarity: does the text encoder's similarity of two sentences agree with human ratings?"""

import csv
from pathlib import Path

import scipy.stats

from embedding import open_model, project_and_normalize, text_features, token_ids
from utils.errors import UserError
from utils.files import read_text, write_json

SCORE, FIRST, SECOND = ("score", "label"), ("sentence1", "sentence_a"), ("sentence2", "sentence_b")  # names of columns
SCORE_COLUMN = {3: 0, 6: 3, 7: 4}  # without a header: number of columns -> index of the score, which the sentences follow


def read_pairs(path):
    """Reads an STS file: a list of (score, sentence, sentence).

    The file is a table, separated by tabs or commas. Its header names sentence1, sentence2 and score. Without a header its
    columns are those of STS-B (genre, file, year, number, score, sentence, sentence, with or without the number), or score,
    sentence, sentence. Raises UserError for any other layout.
    """
    lines = [line for line in read_text(path, "--file").split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{path}: empty; write one row per pair: score, sentence, sentence")
    has_tabs = "\t" in lines[0]  # not for csv.reader: sentences in such files have unescaped quotation marks
    rows = [line.rstrip("\r").split("\t") for line in lines] if has_tabs else list(csv.reader(lines))
    header = [name.strip().lower() for name in rows[0]]
    columns = [next((header.index(name) for name in names if name in header), None) for names in (SCORE, FIRST, SECOND)]
    has_header = None not in columns
    if not has_header:
        score = SCORE_COLUMN.get(min(len(rows[0]), 7))  # some rows of STS-B name their source at the end
        if score is None:
            raise UserError(f"{path}, row 1: {len(rows[0])} columns and no header; write score, sentence1, sentence2 there")
        columns = [score, score + 1, score + 2]
    pairs = []
    for number, row in enumerate(rows[has_header:], start=1 + has_header):
        try:
            score, first, second = (row[column].strip() for column in columns)
            pairs.append((float(score), first, second))
        except (IndexError, ValueError):
            where = "column " + str(columns[0] + 1) if len(row) > max(columns) else f"only {len(row)} columns"
            raise UserError(f"{path}, row {number}: no score in {where}; fix or remove the row") from None
    return pairs


def correlations(ratings, cosines):
    """The correlations, times 100, of n human ratings with n cosines: {"pairs", "spearman", "pearson"}.

    Raises ValueError if all ratings or all cosines are the same: correlations are then undefined.
    """
    if len(set(ratings)) < 2 or len(set(cosines)) < 2:
        raise ValueError("all scores are the same" if len(set(ratings)) < 2 else "all cosines are the same")
    spearman, pearson = scipy.stats.spearmanr(ratings, cosines).statistic, scipy.stats.pearsonr(ratings, cosines).statistic
    return {"pairs": len(ratings), "spearman": 100 * float(spearman), "pearson": 100 * float(pearson)}


def sts_scores(model, pairs, device, dtype):
    """The correlations of ratings with cosines, as `correlations` gives them. pairs: (rating, sentence, sentence)."""
    ratings, first, second = zip(*pairs)
    T_f = text_features(model, token_ids(model.tokenizer, first + second), device, dtype)
    T_e = project_and_normalize(model.text_projection, T_f, device)  # (2 pairs, d_e)
    return correlations(ratings, (T_e[: len(pairs)] * T_e[len(pairs) :]).sum(dim=1).tolist())


def sts(options):
    """Compares cosines of sentence pairs with human ratings: Spearman and Pearson correlation per file, and their average."""
    tables = {name: read_pairs(name) for name in options.file}
    model, device, dtype = open_model(options.run, options.device, options.precision)
    scores = {}
    for name, pairs in tables.items():
        try:
            scores[Path(name).name] = sts_scores(model, pairs, device, dtype)
        except ValueError as error:
            raise UserError(f"{name}: {error}, so there is no correlation") from None
    average = {kind: sum(row[kind] for row in scores.values()) / len(scores) for kind in ("spearman", "pearson")}
    width = max(map(len, [*scores, "average"]))
    print(f"{'':{width}} {'pairs':>8} {'Spearman':>9} {'Pearson':>9}")
    for name, row in scores.items():
        print(f"{name:{width}} {row['pairs']:8,} {row['spearman']:9.1f} {row['pearson']:9.1f}")
    print(f"{'average':{width}} {'':8} {average['spearman']:9.1f} {average['pearson']:9.1f}")
    if options.json:
        write_json(options.json, {"files": scores, "average": average})
