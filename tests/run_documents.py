"""Print the commands of README.md and docs/ that can be tried, one per line: python tests/run_documents.py

A fenced bash block is tried if the line before it is `<!-- run -->`: then as it stands; or `<!-- run with FLAGS -->`: then
with FLAGS after each command that starts with python. `.ci/smoke` runs them.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^<!-- run(?: with (.+?))? -->\n```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)
QUOTED_OR_COMMENT = re.compile(r""""[^"]*"|'[^']*'|(?<!\S)#.*""")


def documents():
    return [ROOT / "README.md", ROOT / "assignment" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def command_lines(block):
    """The commands of a bash block, without comments, each on one line."""
    lines = re.sub(r"\\\n", " ", block).splitlines()
    lines = [QUOTED_OR_COMMENT.sub(lambda match: "" if match[0][0] == "#" else match[0], line) for line in lines]
    return [" ".join(line.split()) for line in lines if line.strip()]


def commands(text):
    """The commands of a document that can be tried."""
    return [
        f"{line} {flags}" if flags and line.startswith("python") else line
        for flags, block in BLOCK.findall(text)
        for line in command_lines(block)
    ]


if __name__ == "__main__":
    tried = [command for path in documents() for command in commands(path.read_text(encoding="utf-8"))]
    print("\n".join(dict.fromkeys(tried)))
