"""The help of a command, from the comments of a dataclass's fields or from a function's docstring."""

import ast
import inspect
import io
import re
import shlex
import textwrap
import tokenize
import typing
from dataclasses import dataclass, fields

import tyro

WIDTH = 100  # characters per line
TEXT_COLUMN = 38  # where the texts of the flags start
HELP = {"-h", "--help"}
REQUIRED = inspect.Parameter.empty  # the default of a flag that must be given
POSITIONAL = tyro.conf.Positional[int].__metadata__[0]  # the mark of words that stand without a flag


@dataclass
class Flag:
    name: str  # without dashes in front
    text: str
    default: object = REQUIRED
    choices: tuple = ()
    group: str = ""
    positional: bool = False

    @property
    def is_bool(self):
        return isinstance(self.default, bool)

    def usage(self):
        """The flag with its default as the value, as --epochs 8; a flag that is on or off as --[no-]hflip."""
        if self.positional:
            return f"{self.name.upper()} ..."
        if self.is_bool:
            return f"--[no-]{self.name}"
        if self.default is REQUIRED:
            return f"--{self.name} {self.name.upper()}"
        if isinstance(self.default, tuple):
            return f"--{self.name} {shlex.join(map(str, self.default)) or '...'}"
        return f"--{self.name} {shlex.quote(str(self.default))}"

    def explanation(self):
        """The text, with the choices, the default of a flag that is on or off, and whether the flag must be given."""
        choices = ", ".join(str(choice) for choice in self.choices if choice != "")
        notes = [choices, ("default: on" if self.default else "default: off") if self.is_bool else ""]
        notes.append("required" if self.default is REQUIRED else "")
        return f"{self.text}{''.join(f' ({note})' for note in notes if note)}"


def flag_name(name):
    return name.replace("_", "-")


def choices_of(kind):
    """The values of a Literal type; () for other types."""
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def dataclass_flags(settings):
    """The Flags of a dataclass's object. Defaults are its values.

    The text of a flag is the comment behind its field. A comment on a line of its own names the group of the fields below it.
    """
    source = inspect.getsource(type(settings))
    lines, kinds = source.splitlines(), typing.get_type_hints(type(settings), include_extras=True)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    groups = {row: text for row, text in comments.items() if lines[row - 1].lstrip().startswith("#")}
    names, flags = {field.name for field in fields(settings)}, []
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign) and node.target.id in names:
            name, rows = node.target.id, range(node.lineno, node.end_lineno + 1)
            text = next((comments[row] for row in rows if row in comments), "")
            group = next((groups[row] for row in sorted(groups, reverse=True) if row < node.lineno), "")
            positional = POSITIONAL in getattr(kinds[name], "__metadata__", ())
            flags.append(Flag(flag_name(name), text, getattr(settings, name), choices_of(kinds[name]), group, positional))
    return flags


def function_flags(function):
    """The Flags of a function's parameters. Their texts are the lines under Args: in its docstring."""
    texts = dict(re.findall(r"^ +(\w+): (.*)$", (function.__doc__ or "").partition("Args:")[2], re.MULTILINE))
    kinds, flags = typing.get_type_hints(function, include_extras=True), []
    for name, parameter in inspect.signature(function).parameters.items():
        marks = getattr(kinds.get(name), "__metadata__", ())
        kind = typing.get_args(kinds[name])[0] if marks else kinds.get(name)
        given = next((mark.name for mark in marks if getattr(mark, "name", None)), name)  # of tyro.conf.arg(name=...)
        text, positional = texts.get(name, ""), POSITIONAL in marks
        flags.append(Flag(flag_name(given), text, parameter.default, choices_of(kind), positional=positional))
    return flags


def flag_lines(flags):
    """The lines of a help for Flags, with a heading where a new group starts."""
    lines, group = [], ""
    for flag in flags:
        if flag.group != group:
            lines += ["", f"{flag.group}:"]
            group = flag.group
        lines += two_columns(flag.usage(), flag.explanation(), TEXT_COLUMN)
    return lines


def two_columns(left, right, column):
    """Lines with a text to the right of another, or below it where that one is too long."""
    too_long = len(left) > column - 4
    first = " " * column if too_long else f"  {left:{column - 2}}"
    lines = textwrap.wrap(right, WIDTH, initial_indent=first, subsequent_indent=" " * column, break_on_hyphens=False)
    return [f"  {left}", *lines] if too_long or not lines else lines


def command_help(usage, summary, examples, flags):
    """The help of a command: usage, what it does, commands to copy, and its flags with their defaults."""
    lines = [f"usage: {usage}", "", *textwrap.wrap(summary, WIDTH)]
    lines += ["", *(f"  {example}" for example in examples)] if examples else []
    return "\n".join([*lines, "", "Flags, with their defaults:", *flag_lines(flags)])
