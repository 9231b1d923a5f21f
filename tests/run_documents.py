"""Print the commands of README.md and docs/ that can be tried, one per line: python tests/run_documents.py

A fenced bash block is tried if the line before it is `<!-- run -->`: then as it stands; or `<!-- run with FLAGS -->`: then
with FLAGS after each command. `.ci/smoke` runs them.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"<!-- run(?: with (.+?))? -->\n```bash\n(.*?)```", re.DOTALL)


def documents():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text):
    """The commands of a document that can be tried, without comments, each on one line."""
    found = []
    for flags, block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            line = " ".join(re.sub(r"\s+# .*", "", line).split())
            if line:
                found.append(f"{line} {flags}".rstrip())
    return found


if __name__ == "__main__":
    tried = [command for path in documents() for command in commands(path.read_text(encoding="utf-8"))]
    print("\n".join(dict.fromkeys(tried)))
