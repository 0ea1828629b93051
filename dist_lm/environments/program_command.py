"""The command of an environment that is a program of a user: `program:COMMAND`."""

import shlex
from pathlib import Path

from dist_lm.errors import ConfigError

PROGRAM = "program:"  # how the names of these environments begin


def program_of(name: str) -> list[str]:
    """Returns the program that `program:COMMAND` names, with its arguments. No shell reads them.

    Raises:
        ConfigError: there is no command, or a quote is not closed.
    """
    try:
        argv = shlex.split(name.removeprefix(PROGRAM))
    except ValueError as error:
        raise ConfigError(f"environment {name}: expected {PROGRAM}COMMAND ({error})") from error
    if not argv:
        raise ConfigError(f"environment {name}: expected {PROGRAM}COMMAND, such as {PROGRAM}python agent.py")
    return argv


def files_of(name: str) -> list[Path]:
    """Returns the files that the words of a command name, without the interpreter that `PATH` or a full path names.

    Raises:
        ConfigError: there is no such file, for a word that ends in .py; or there is no command.
    """
    program, *arguments = program_of(name)
    words = arguments if Path(program).is_absolute() else [program, *arguments]
    for word in words:
        if word.endswith(".py") and not Path(word).is_file():
            raise ConfigError(f"environment {name}: there is no file {word}")
    return [Path(word) for word in words if Path(word).is_file()]
