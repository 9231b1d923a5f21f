"""Write the assignment's starter files: the project's own functions, with their bodies removed.

    python assignment/make.py [FOLDER]

A body is what stands between `# BEGIN SOLUTION` and `# END SOLUTION` in the real file. So the starter files and the project
cannot drift apart. FOLDER is assignment/starter where none is named.
"""

import ast
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it can be started from any folder

from utils.cli import run_cli
from utils.errors import UserError, run_command

STARTER = ROOT / "assignment" / "starter"
SOLUTION = re.compile(r"^( *)# BEGIN SOLUTION\n.*?# END SOLUTION\n", re.DOTALL | re.MULTILINE)
TO_DO = r'\1# BEGIN SOLUTION\n\1raise NotImplementedError("your code")\n\1# END SOLUTION\n'


@dataclass(frozen=True)
class Task:
    file: str  # of the project
    function: str
    text: str  # what the student is asked


TASKS = {
    "loss": Task(
        "clip.py",
        "contrastive_loss",
        "The symmetric loss of CLIP's pseudocode. A batch has n pairs; the right answers lie on the diagonal.",
    ),
    "forward": Task(
        "clip.py",
        "logits",
        "From features to logits. self.image_projection and self.text_projection map features to embeddings; "
        "self.logit_scale is the log of the inverse temperature.",
    ),
    "pooling": Task(
        "modules.py",
        "pooled",
        "From token outputs to one vector per caption. self.backbone(input_ids=..., attention_mask=...) returns an object "
        "whose last_hidden_state has the outputs, (n, l, d_t); the mask is 1 at real tokens and 0 at the padding after them. "
        "self.pooling says which tokens count. self.layers is 1 here: you need no other layer.",
    ),
    "recall": Task(
        "evaluation/retrieval.py",
        "recall",
        "Recall@K and median rank in both directions, from a matrix of similarities.",
    ),
    "sampler": Task(
        "dataset.py",
        "draw",
        "The order of an epoch. self.captions_of[i] lists the captions of image i, self.real is the number of images, and "
        "self.captions_per_image says how many captions to draw for each. self.generated is 0 here: no image is generated.",
    ),
}


def task_file(name, solved=False):
    """The text of a task's file: its question, the imports and constants that it uses, and the function.

    solved: with the project's own body, instead of one that raises NotImplementedError.
    """
    task = TASKS[name]
    source = (ROOT / task.file).read_text(encoding="utf-8")
    tree = ast.parse(source)
    function = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == task.function)
    used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    imports, constants = [], []
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            imports += [ast.get_source_segment(source, node)] if names & used else []
        elif isinstance(node, ast.Assign) and {target.id for target in node.targets if isinstance(target, ast.Name)} & used:
            constants.append(ast.get_source_segment(source, node))
    lines = source.splitlines(keepends=True)[function.lineno - 1 : function.end_lineno + 2]
    body = textwrap.dedent("".join(lines))
    body = body[: body.index("# END SOLUTION") + len("# END SOLUTION\n")]
    if not solved:
        body = SOLUTION.sub(TO_DO, body)
    question = textwrap.fill(f'"""Task {name}. {task.text}"""', 100)
    parts = ["\n".join(imports), "\n".join(constants)]
    return "\n\n".join([question, *filter(None, parts)]) + f"\n\n\n{body}"


def write(folder, solved=False):
    """Writes all tasks' files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        (folder / f"{name}.py").write_text(task_file(name, solved), encoding="utf-8")


def make(folder: Path = STARTER, /):
    """Writes the starter files of the assignment.

    Args:
        folder: where to write them; a file that is there is not replaced, but for the project's own without a solution
    """
    there = [name for name in TASKS if (folder / f"{name}.py").exists()]
    if folder.resolve() == STARTER:
        texts = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in there}
        there = [name for name, text in texts.items() if SOLUTION.sub(TO_DO, text) != text]  # somebody has worked in it
    if there:
        raise UserError(f"{folder / there[0]}.py: is there already; name a new folder, or remove it")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, not a folder; name another")
    write(folder)
    print(f"written {', '.join(f'{name}.py' for name in TASKS)} in {folder}")


if __name__ == "__main__":
    run_command(run_cli, make, "assignment/make.py", sys.argv[1:], ("python assignment/make.py my-solution",))
