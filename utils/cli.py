"""The command line: flags from a dataclass's fields or a function's parameters, their help, and mistakes in one line.

Nothing here takes long to load, so that a help and a mistake are answered at once.
"""

import ast
import contextlib
import difflib
import functools
import inspect
import io
import itertools
import re
import shlex
import sys
import textwrap
import tokenize
import typing
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass

from utils.errors import UserError

WIDTH = 100  # characters per line
TEXT_COLUMN = 38  # where the texts of the flags start
HELP = {"-h", "--help"}
REQUIRED = inspect.Parameter.empty  # the default of a flag that must be given
POSITIONAL = {"positional": True}  # metadata of a dataclass's field whose words stand without a flag
TYRO_MESSAGES = {  # what tyro says of a mistake: what is said here
    r"Error parsing (\S+): invalid literal for int\(\) with base 10: '(.*)'": r"\1 \2: must be a whole number",
    r"Error parsing (\S+): could not convert string to float: '(.*)'": r"\1 \2: must be a number",
    r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*?),?\)\.": r"\2 \1: must be one of \3",
    r"Missing value for argument '(\S+)'.*": r"\1: a value is missing behind it",
    r"Missing from (.*?): [A-Z]+ (\w+).*": r"\2: is missing; python \1 --help explains it",
    r"Unrecognized options: (.*)": r"\1: belongs to no flag; quote a value that has spaces, or leave it out",
}


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
    """The Flags of a dataclass or of its object, whose values are then the defaults.

    The text of a flag is the comment behind its field. A comment on a line of its own names the group of the fields below it.
    """
    source = inspect.getsource(settings if isinstance(settings, type) else type(settings))
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    groups = {row: text for row, text in comments.items() if lines[row - 1].lstrip().startswith("#")}
    types, flags = {field.name: field for field in fields(settings)}, []
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign) and node.target.id in types:
            name, rows = node.target.id, range(node.lineno, node.end_lineno + 1)
            text = next((comments[row] for row in rows if row in comments), "")
            group = next((groups[row] for row in sorted(groups, reverse=True) if row < node.lineno), "")
            default = getattr(settings, name, REQUIRED)
            positional = "positional" in types[name].metadata
            flags.append(Flag(flag_name(name), text, default, choices_of(types[name].type), group, positional))
    return flags


def function_flags(function):
    """The Flags of a function's parameters. Their texts are the lines under Args: in its docstring."""
    texts = dict(re.findall(r"^ +(\w+): (.*)$", (function.__doc__ or "").partition("Args:")[2], re.MULTILINE))
    kinds, flags = typing.get_type_hints(function), []
    for name, parameter in inspect.signature(function).parameters.items():
        positional = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
        choices = choices_of(kinds.get(name))
        flags.append(Flag(flag_name(name), texts.get(name, ""), parameter.default, choices, positional=positional))
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


def run_cli(target, program, arguments, examples=()):
    """Calls a command's function with the arguments of the command line, which become flags named as its own.

    target: the function, or a dataclass, whose object is then returned. With --help a help is printed instead, whose texts are
    those of the function's docstring or of the comments behind the fields. examples: commands to show there.
    Raises UserError for an unknown flag or a value of the wrong type.
    """
    flags = dataclass_flags(target) if is_dataclass(target) else function_flags(target)
    if HELP & set(arguments):
        words = "".join(f" [{flag.usage()}]" for flag in flags if flag.positional)
        summary = (target.__doc__ or "").partition("\n\n")[0]
        print(command_help(f"python {program}{words} [--flags]", summary, examples, flags))
        sys.exit(0)
    if is_dataclass(target):
        return parse(target, program, arguments)
    check_flags(arguments, flags, program)
    call = functools.wraps(target)(lambda *values, **named: functools.partial(target, *values, **named))
    return read_quietly(call, program, arguments)()


def parse(settings, program, arguments, default=None):
    """The object of a dataclass that a command line describes. default: an object with other defaults than the class has.

    Raises UserError for an unknown flag or a value of the wrong type.
    """
    import tyro  # only here and below: a help does without, and a missing package is then named in one line

    check_flags(arguments, dataclass_flags(settings), program)
    if words := [f for f in fields(settings) if "positional" in f.metadata]:
        marked = [(f.name, tyro.conf.Positional[f.type], field(default=f.default, metadata=f.metadata)) for f in words]
        settings = make_dataclass(settings.__name__, marked, bases=(settings,))
    return read_quietly(settings, program, arguments, **({} if default is None else {"default": default}))


def check_flags(arguments, flags, program):
    """Raises UserError for a word that looks like a flag and is none, with the nearest one, and for a flag that is missing."""
    names = {f"--{flag.name}" for flag in flags if not flag.positional}
    names |= {f"--no-{flag.name}" for flag in flags if flag.is_bool}
    for word in arguments:
        name = flag_name(word.partition("=")[0])
        if re.match(r"-+[a-z]", name) and name not in names:
            close = difflib.get_close_matches(name, sorted(names), 1)
            hint = f"did you mean {close[0]}?" if close else f"python {program} --help lists the flags"
            raise UserError(f"{name}: there is no such flag; {hint}")
    given = {flag_name(word.partition("=")[0]) for word in arguments}
    for flag in flags:
        if flag.default is REQUIRED and not flag.positional and f"--{flag.name}" not in given:
            raise UserError(f"--{flag.name} is missing: {flag.text}")


def read_quietly(target, program, arguments, **options):
    """What tyro makes of a command line. Where tyro would print a box, a UserError has its first lines as one."""
    import tyro

    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(target, prog=program, args=arguments, **options)
    except SystemExit:
        lines = [line.strip("│| ") for line in shown.getvalue().splitlines()[1:]]
        text = " ".join(itertools.takewhile(lambda line: line.strip("─-╯+"), lines))
    for theirs, ours in TYRO_MESSAGES.items():
        text = re.sub(f"^{theirs}$", ours, text)
    raise UserError(text.replace("'", ""))
