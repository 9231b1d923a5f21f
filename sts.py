"""Semantic textual similarity: does a text tower place sentences as far apart as people do?"""

import csv
from pathlib import Path
from typing import Annotated, Literal

import scipy.stats
import tyro

from captions import read_text
from embedding import open_model, project, text_features, token_ids
from storage import UserError, write_json

SCORE, FIRST, SECOND = ("score", "label"), ("sentence1", "sentence_a"), ("sentence2", "sentence_b")  # names of columns
HEADERLESS = {3: 0, 6: 3, 7: 4}  # number of columns: that of the score, with the sentences behind it; STS-B's files have 7


def read_pairs(path):
    """The (score, sentence, sentence) of an STS file's rows.

    A table, separated by tabs or commas, with a header that names sentence1, sentence2 and score; or without one: STS-B's
    files (genre, file, year, number, score, sentence, sentence, with or without the number), or score, sentence, sentence.
    Raises UserError where the file cannot be read that way.
    """
    lines = [line for line in read_text(path, "--file").split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{path}: empty; write a row a pair: score, sentence, sentence")
    tabs = "\t" in lines[0]  # sentences then hold quotation marks as they are
    rows = [line.rstrip("\r").split("\t") for line in lines] if tabs else list(csv.reader(lines))
    names = [name.strip().lower() for name in rows[0]]
    columns = [next((names.index(name) for name in known if name in names), None) for known in (SCORE, FIRST, SECOND)]
    header = None not in columns
    if not header:
        score = HEADERLESS.get(min(len(rows[0]), 7))  # some rows of STS-B name their source at the end
        if score is None:
            raise UserError(f"{path}, row 1: {len(rows[0])} columns and no header; write score, sentence1, sentence2 there")
        columns = [score, score + 1, score + 2]
    pairs = []
    for number, row in enumerate(rows[header:], start=1 + header):
        try:
            score, first, second = (row[column].strip() for column in columns)
            pairs.append((float(score), first, second))
        except (IndexError, ValueError):
            where = "column " + str(columns[0] + 1) if len(row) > max(columns) else f"only {len(row)} columns"
            raise UserError(f"{path}, row {number}: no score in {where}; mend or remove the row") from None
    return pairs


def correlations(people, cosines):
    """{"pairs", "spearman", "pearson"} of n scores with n cosines, the correlations times 100.

    Raises ValueError where one of the two does not vary, which leaves nothing to correlate.
    """
    if len(set(people)) < 2 or len(set(cosines)) < 2:
        raise ValueError("all scores are the same" if len(set(people)) < 2 else "all cosines are the same")
    spearman, pearson = scipy.stats.spearmanr(people, cosines).statistic, scipy.stats.pearsonr(people, cosines).statistic
    return {"pairs": len(people), "spearman": 100 * float(spearman), "pearson": 100 * float(pearson)}


def sts(
    run: str,
    file: tuple[str, ...],
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    json_path: Annotated[str, tyro.conf.arg(name="json")] = "",
):
    """Compares cosines of sentences with people's scores: Spearman and Pearson correlation a file, and their average.

    Args:
        run: run folder, or one of OpenAI's names
        file: STS files: STS-B's, or tables of score, sentence, sentence
        device: auto, cpu, cuda, cuda:1, mps
        precision: of matrix products; auto: bf16 where native, else fp32
        json_path: file for the scores
    """
    if not file:
        raise UserError("--file: names no file")
    tables = {name: read_pairs(name) for name in file}
    model, device, dtype = open_model(run, device, precision)
    scores = {}
    for name, pairs in tables.items():
        people, first, second = zip(*pairs)
        T_f = text_features(model, token_ids(model.tokenizer, first + second), device, dtype)
        T_e = project(model.text_projection, T_f, device)  # (2 pairs, d_e)
        cosines = (T_e[: len(pairs)] * T_e[len(pairs) :]).sum(dim=1).tolist()
        try:
            scores[Path(name).name] = correlations(people, cosines)
        except ValueError as error:
            raise UserError(f"{name}: {error}, so that nothing correlates") from None
    average = {kind: sum(row[kind] for row in scores.values()) / len(scores) for kind in ("spearman", "pearson")}
    width = max(map(len, [*scores, "average"]))
    print(f"{'':{width}} {'pairs':>8} {'Spearman':>9} {'Pearson':>9}")
    for name, row in scores.items():
        print(f"{name:{width}} {row['pairs']:8,} {row['spearman']:9.1f} {row['pearson']:9.1f}")
    print(f"{'average':{width}} {'':8} {average['spearman']:9.1f} {average['pearson']:9.1f}")
    if json_path:
        write_json(json_path, {"files": scores, "average": average})
