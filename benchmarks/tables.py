"""Put the tables of figures into README.md and docs/ from the JSON files in docs/results/.

    python benchmarks/tables.py

A document marks the place of the table in docs/results/NAME.json with two comments, `<!-- table NAME -->` and
`<!-- end of table NAME -->`; what stands between them is replaced. Below each table stands what it was measured with.
"""

import json
import re

from measure import RESULTS, ROOT

from utils.errors import UserError, run_command
from utils.files import atomic_write

TABLE = re.compile(r"(<!-- table ([\w-]+) -->\n)(?:.*?)(<!-- end of table \2 -->)", re.DOTALL)


def documents():
    """The Markdown files that may hold tables."""
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "assignment" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]


def markdown(result):
    """A result as a Markdown table, with a line on what it was measured with. result: the content of a JSON file."""
    rows = [result["columns"], ["---"] * len(result["columns"]), *result["rows"]]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    seeds = f"seeds: {result['seeds']}" if result["seeds"] not in ("", "none") else ""
    facts = [f"Commit {result['commit']}", result["date"], result["processor"], seeds, result["note"]]
    return "\n".join([*lines, "", "<sub>" + "; ".join(filter(None, facts)) + ".</sub>"])


def render(text):
    """A document's text with all its tables filled in. Raises UserError for a table that has no JSON file."""

    def fill(match):
        path = RESULTS / f"{match[2]}.json"
        if not path.exists():
            raise UserError(f"table {match[2]}: {path.relative_to(ROOT)} is missing; run the benchmark that writes it")
        return f"{match[1]}\n{markdown(json.loads(path.read_text(encoding='utf-8')))}\n\n{match[3]}"

    return TABLE.sub(fill, text)


def main():
    for path in documents():
        text = path.read_text(encoding="utf-8")
        if render(text) != text:
            atomic_write(path, lambda temporary, text=text: temporary.write_text(render(text), encoding="utf-8"))
            print(f"written {path.relative_to(ROOT)}")


if __name__ == "__main__":
    run_command(main)
