"""Output of the commands: at most 79 columns on a terminal, and no traceback if the reader has gone.

In a pipe or a file, messages and commands stay on one line, as scripts expect.
"""

import itertools
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterable

from metta_fastagent.runtime.checks import printable

COLUMNS = 79
# for a shell command, which may stand next to the longest name in a run's summary
COMMAND_COLUMNS = 59
# A quoted path is one word, in which shlex writes an apostrophe as '"'"'. A backslash stays at the end of its line.
_WORD = re.compile(r"""(?:"'"|(?<!\w)'[^'"]*/[^'"]*'|\S)+(?: \\$)?""")


def show(text: str, end: str = "\n") -> None:
    """Print `text` immediately; exits quietly if the pipe is closed, as after `| head -1`."""
    try:
        print(printable(text), end=end, flush=True)
    except BrokenPipeError:
        # Python flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def wrapped(text: str, indent: int = 4) -> str:
    """On a terminal, wrap `text` to COLUMNS, all lines but the first indented; a longer path gets its own line."""
    if not sys.stderr.isatty():
        return text
    filled = (_filled(_WORD.findall(line), COLUMNS - indent) for line in filter(None, text.splitlines()))
    return f"\n{' ' * indent}".join(itertools.chain(*filled))


def shell_command(words: Iterable[str]) -> str:
    """The command made of these words; on a terminal, wrapped to COMMAND_COLUMNS with line continuations."""
    if not sys.stderr.isatty():
        return shlex.join(words)
    return " \\\n".join(_filled(map(shlex.quote, words), COMMAND_COLUMNS))


def _filled(words: Iterable[str], columns: int) -> list[str]:
    lines = [""]
    for word in words:
        longer = f"{lines[-1]} {word}".lstrip()
        lines[-1:] = [longer] if len(longer) <= columns or not lines[-1] else [lines[-1], word]
    return lines
