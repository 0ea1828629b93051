"""Runs Bash and judges tests of it: test and program are two shells, which share neither processes nor files.

    judge (Python) ── test: bash          program: bash ── agent (Python)
          └──────────────── socket: calls, files ───────────────┘

The functions that the program defines are stubs in the shell of the test. A stub sends its arguments, its input and its
folder, and prints what the function printed; its status is that of the function. A call in a subshell, as in `$(...)`,
runs in a subshell of the program's shell, another one in that shell itself, which keeps its variables. Variables that
the test reads and never sets, as `$REPLY`, are the program's.

Both sides have a /tmp. Before a call, files of the test that its arguments name are copied to the program (all, if
none is named and there is no input); after it, what the program changed is copied to the test: regular files and
folders, with their rights and times. Links, pipes and sockets of a program are not copied, so a file of the test is
never another one than it seems. A program cannot read or change what it was not given.

Where a test lets its shell read a text of the program as code (`dist_lm.sandbox.expansions`), only plain texts pass.

This module runs inside the sandbox. Only the standard library is imported, and little of it. What comes from the
program is hostile.
"""

from __future__ import annotations

import os
import select

from dist_lm.sandbox.environment import ENVIRONMENT, PATH
from dist_lm.sandbox.expansions import Places, harm, places_of
from dist_lm.sandbox.frames import read_exactly, write_frame
from dist_lm.sandbox.shared_files import FailedError, Folder, checked
from dist_lm.sandbox.values import Decoder, Encoder, MalformedError, NotCarriedError

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

    from dist_lm.sandbox.shared_files import Change

PASSED = b"passed"
MAX_FRAME = 4 << 20
MAX_OUTPUT = 1 << 20  # bytes that a call may print

# Names that a test means as what they are everywhere, even if a program defines a function of that name.
STANDARD = frozenset(
    """
    . : [ [[ alias bg bind break builtin caller case cd command compgen complete compopt continue coproc declare
    dirs disown do done echo elif else enable esac eval exec exit export false fc fg fi for function getopts
    hash help history if in jobs kill let local logout mapfile popd printf pushd pwd read readarray readonly
    return select set shift shopt source suspend test then time times trap true type typeset ulimit umask
    unalias unset until wait while { } ! ar arch awk b2sum base32 base64 basename basenc bash bc bunzip2 busybox
    bzcat bzcmp bzdiff bzgrep bzip2 cal cat chgrp chmod chown chroot chrt cksum clear cmp col colrm column comm
    cp cpio csplit curl cut dash date dc dd df diff diff3 dir dircolors dirname dos2unix du ed egrep env
    envsubst ex expand expr factor fgrep file find flock fmt fold free gawk getconf getent getopt git grep
    groups gunzip gzip hd head hexdump hostid hostname iconv id infocmp install ionice join jq killall last less
    link ln locale logname look ls lscpu lsof lzcat lzma m4 make mawk mcookie md5 md5sum mkdir mkfifo mknod
    mktemp more mv namei nawk nice nl nm node nohup nproc numfmt objdump od openssl paste patch pathchk perl
    pgrep pidof pinky pkill pr printenv ps pstree ptx python python3 readlink realpath renice reset rev rgrep rm
    rmdir ruby script sdiff sed seq setsid sh sha1sum sha224sum sha256sum sha384sum sha512sum shasum shred shuf
    sleep sort split sqlite3 ssh stat stdbuf strace strings stty sum sync tabs tac tail tar taskset tee tempfile
    timeout top touch tput tr truncate tsort tty ul uname unexpand uniq unlink unzip uptime users uuidgen vdir
    vi vim vmstat watch wc wget whereis which who whoami xargs xxd xz xzcat xzcmp xzdiff xzgrep yes zcat zcmp
    zdiff zegrep zfgrep zgrep zip zstd zstdcat
    """.split()
)
_NAME = rb"[A-Za-z_][A-Za-z0-9_.-]*"


# --- messages ---


def _send(channel: int, *values: Any) -> None:
    """Writes a message: a length (4 bytes) and values.

    Raises:
        OSError: the other side has ended.
        NotCarriedError: the message is too long, or a value is of another kind.
    """
    encoder = Encoder()
    encoder.put(values)
    write_frame(channel, encoder.finished())


def _receive(channel: int) -> Any:
    """Returns the values of a message.

    Raises:
        OSError: the other side has ended.
        MalformedError: the other side says what no side says.
    """
    length = int.from_bytes(read_exactly(channel, 4), "big")
    if length > MAX_FRAME + 64:
        raise MalformedError(f"a message of {length} bytes")
    decoder = Decoder(read_exactly(channel, length))
    values = decoder.take()
    decoder.end()
    return values


# --- shells ---


def _quoted(text: bytes) -> bytes:
    return b"'" + text.replace(b"'", b"'\\''") + b"'"


def execute(script: bytes) -> NoReturn:
    """Becomes a shell that runs a script, with the fixed ENVIRONMENT and without files of settings; does not return.

    Exit code 126: the shell cannot start; most often the script is longer than an argument may be.

    Raises:
        ValueError: the script has a NUL byte.
        StopIteration: no folder of PATH has a bash.
    """
    # Python ignores these signals, and a new program inherits that.
    import signal

    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)

    shell = next(path for folder in PATH.split(":") if os.access(path := f"{folder}/bash", os.X_OK))
    try:
        os.execve(shell, ["bash", "--norc", "--noprofile", "-c", script, "program"], ENVIRONMENT)
    except OSError as error:
        os.write(2, f"bash: {error}\n".encode())
    os._exit(126)


def _start(script: bytes, files: dict[int, int]) -> int:
    """Starts a shell that runs a script and returns its process id.

    Args:
        files: open files, number in the shell -> descriptor here, which stays open.
    """
    child = os.fork()
    if child == 0:
        try:
            # The numbers of one side may be in use on the other one.
            copies = [(number, os.dup(descriptor)) for number, descriptor in files.items()]
            for number, copy in copies:
                os.dup2(copy, number)
            execute(script)
        finally:
            os._exit(126)
    return child


def _identity(folder: bytes) -> list[int]:
    status = os.stat(folder)
    return [status.st_dev, status.st_ino]


def _unnamed_file() -> int:
    """Returns the descriptor of an empty file that no folder has any more; files in memory are refused here."""
    name = f".dist_lm-{os.getpid()}"
    file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(name)
    return file


# --- the program ---

_INPUT, _COMMANDS, _REPORTS = 40, 41, 42  # descriptors in the shell of a program
_LOOP = (
    b"while IFS= builtin read -r -d '' -u %d dist_lm_command; do builtin eval \"$dist_lm_command\"; done" % _COMMANDS
)


def run(test: dict[str, str], source: str, channel: int) -> NoReturn:
    """Runs a program in place of this process; its exit code is that of the script. Does not return.

    With a judge (`channel` is a descriptor and not -1), this process runs the program in a shell below it, answers the
    judge's calls and ends with 0 if the judge is satisfied, else with 1.

    Args:
        test: its `before` runs in front of the program.

    Raises:
        ValueError: the program has a NUL byte.
    """
    before = test["before"]
    script = os.fsencode(f"{before}\n{source}\n" if before else f"{source}\n")
    if channel < 0:
        execute(script)

    try:
        satisfied = _Agent(script, channel).serve()
    except (OSError, MalformedError, NotCarriedError, FailedError) as error:
        os.write(2, f"{error}\n".encode(errors="replace"))
        satisfied = False
    os._exit(0 if satisfied else 1)


class _Agent:
    """Starts the shell of a program and lets it answer calls."""

    def __init__(self, script: bytes, channel: int) -> None:
        self.channel = channel
        self.variables, identity = _receive(channel)
        self.folder = Folder(os.fsencode(os.getcwd()), sends_links=False)
        self.has_own_folder = _identity(self.folder.root) != identity  # else there are no namespaces
        self.input = _unnamed_file()
        commands, self.commands = os.pipe()
        self.reports, reports = os.pipe()

        # `eval` parses the program alone: an open end (`true ||`, a backslash) would take in the line behind it. A
        # program whose end is open swallows the line that notes its exit code, and then it reports nothing.
        noted = _quoted(script + b"dist_lm_ended=$?")
        report = self._noting(b"$dist_lm_ended")
        names = b"builtin declare -F >&%d; builtin printf '\\0' >&%d" % (_REPORTS, _REPORTS)
        begin = b"builtin eval %s\n[[ $dist_lm_ended ]] || builtin exit 1\n%s; %s" % (noted, report, names)
        self.shell = _start(
            b"%s\n%s" % (begin, _LOOP),
            {_INPUT: self.input, _COMMANDS: commands, _REPORTS: reports},
        )
        os.close(commands)
        os.close(reports)
        self.pidfd = os.pidfd_open(self.shell)
        self.buffer = b""

    def serve(self) -> bool:
        """Waits for the end of the script, tells the judge of it, then answers calls until the judge is satisfied;
        returns True.

        Raises:
            OSError: the judge has ended, so it is not satisfied.
            MalformedError, NotCarriedError: a message that cannot be read, or is too long.
            FailedError: a call prints too much, or there are too many files.
        """
        status, state = self._reported(self._report(self._num_fields + 1, ()))
        functions = state.pop() if state else b""
        names = [line.split(b" ")[-1] for line in functions.splitlines()]
        _send(self.channel, status, names, state, self._changes())

        while True:
            message = _receive(self.channel)
            if message == ():
                return True
            is_subshell, folder, words, content, changes = message
            if self.has_own_folder:
                self.folder.apply(changes)
            answer = self._call(is_subshell, folder, words, content)
            _send(self.channel, *answer, self._changes())

    def _changes(self) -> list[Change]:
        return self.folder.changes() if self.has_own_folder else []

    @property
    def _num_fields(self) -> int:
        return 2 + 2 * len(self.variables)

    def _noting(self, status: bytes) -> bytes:
        """Returns the command that reports a status, the folder, and whether each variable is set, and its value."""
        values = b" ".join(b'"${%s+set}" "${%s-}"' % (name, name) for name in self.variables)
        return b'builtin printf \'%%s\\0\' "%s" "$PWD" %s >&%d' % (status, values, _REPORTS)

    def _reported(self, report: list[bytes]) -> tuple[int, list[bytes]]:
        """Returns status and state (folder and variables) of a report; status -1: there is none."""
        if not report or not report[0].isdigit():
            return -1, []
        return int(report[0]), report[1:]

    def _call(self, is_subshell: bool, folder: bytes, words: list[bytes], content: bytes) -> tuple:
        """Lets the shell make a call, in `folder` and with `content` as its input, and waits for it.

        Returns status (-1: the shell has ended), output, errors, and the state: the folder, and whether each variable
        is set, and its value.

        Args:
            is_subshell: whether the call changes nothing of the shell, as in `$(...)`.

        Raises:
            FailedError: the call prints too much.
        """
        os.ftruncate(self.input, 0)
        os.pwrite(self.input, content, 0)
        os.lseek(self.input, 0, os.SEEK_SET)

        # The shell opens the pipes itself, by their place in /proc: it runs already.
        pipes = [os.pipe() for _ in range(2)]
        output, errors = (b"/proc/%d/fd/%d" % (os.getpid(), write_end) for _, write_end in pipes)
        command = b" ".join(map(_quoted, words))
        call = b"builtin cd -- %s && %s" % (_quoted(folder), command)
        call = b"( %s )" % call if is_subshell else b"{ %s; }" % call
        self._command(b"%s <&%d >%s 2>%s\n%s\0" % (call, _INPUT, output, errors, self._noting(b"$?")))

        read_ends = [read_end for read_end, _ in pipes]
        report = self._report(self._num_fields, read_ends, [write_end for _, write_end in pipes], waits=is_subshell)
        texts = [self._texts[read_end] for read_end in read_ends]
        for read_end in read_ends:
            os.close(read_end)
        status, state = self._reported(report)
        return status, *texts, state

    def _command(self, text: bytes) -> None:
        view = memoryview(text)
        while view:
            view = view[os.write(self.commands, view) :]

    def _report(
        self, num_fields: int, pipes: Sequence[int], write_ends: Sequence[int] = (), waits: bool = False
    ) -> list[bytes]:
        """Waits for what the shell reports and returns its fields; none if it ends before.

        Meanwhile it reads pipes into `_texts`.

        Args:
            write_ends: ends of the pipes that are closed once the shell has reported.
            waits: whether to go on until nobody writes to the pipes any more, as `$(...)` does.

        Raises:
            FailedError: a pipe has more than MAX_OUTPUT bytes.
        """
        self._texts = {pipe: b"" for pipe in pipes}
        poller = select.poll()
        for file in (self.reports, self.pidfd, *pipes):
            poller.register(file, select.POLLIN)

        open_pipes = {*pipes}
        report: list[bytes] | None = None
        while report is None or open_pipes:
            ready = [file for file, _ in poller.poll(0 if report is not None and not waits else None)]
            if report is not None and not waits and not ready:
                break

            for file in ready:
                if file in open_pipes:
                    piece = os.read(file, 1 << 16)
                    self._texts[file] += piece
                    if not piece:
                        poller.unregister(file)
                        open_pipes.remove(file)
                    if len(self._texts[file]) > MAX_OUTPUT:
                        raise FailedError(f"a call prints more than {MAX_OUTPUT} bytes")

            # The report may come in pieces, and the next one right behind it.
            if report is None and self.reports in ready:
                piece = os.read(self.reports, 1 << 16)
                self.buffer += piece
                if self.buffer.count(b"\0") >= num_fields:
                    *report, self.buffer = self.buffer.split(b"\0", num_fields)
                elif not piece:
                    report = []
            elif report is None and self.pidfd in ready:
                report = []

            if report is not None and write_ends:
                for file in (self.reports, self.pidfd):
                    poller.unregister(file)
                for write_end in write_ends:
                    os.close(write_end)
                write_ends = ()
        return report


# --- the judge ---

_REQUESTS, _ANSWERS, _TURN, _NEXT, _OUTPUT = 50, 51, 52, 53, 54  # descriptors in the shell of a test
_STUBS = rb"""
dist_lm_read() { IFS= builtin read -r -d '' -u ANSWERS "$1"; }
dist_lm_state() {
  local dist_lm_name dist_lm_set dist_lm_value
  dist_lm_read dist_lm_value
  [[ $1 == 1 ]] || builtin cd -- "$dist_lm_value" 2> /dev/null || :
  for dist_lm_name in VARIABLES; do
    dist_lm_read dist_lm_set
    dist_lm_read dist_lm_value
    [[ $1 == 1 || $dist_lm_set != set ]] || builtin printf -v "$dist_lm_name" %s "$dist_lm_value"
  done
}
dist_lm_call() {
  local IFS= LC_ALL=C dist_lm_text dist_lm_status dist_lm_errors dist_lm_inner=$((BASHPID != $$))
  local -a dist_lm_input=() dist_lm_output=()
  while builtin read -r -d '' dist_lm_text; do dist_lm_input+=("$dist_lm_text"); done 2> /dev/null
  dist_lm_input+=("$dist_lm_text")
  builtin read -r -N 1 -u TURN dist_lm_text
  builtin printf '%s\0' call "$dist_lm_inner" "$PWD" "$#" "$@" "${#dist_lm_input[@]}" "${dist_lm_input[@]}" >&REQUESTS
  dist_lm_read dist_lm_status
  dist_lm_read dist_lm_errors
  dist_lm_state "$dist_lm_inner"
  while builtin read -r -d '' dist_lm_text <&OUTPUT; do dist_lm_output+=("$dist_lm_text"); done
  builtin printf . >&NEXT
  builtin printf %s "$dist_lm_errors" >&2
  [[ ${#dist_lm_output[@]} == 0 ]] || builtin printf '%s\0' "${dist_lm_output[@]}"
  builtin printf %s "$dist_lm_text"
  return "$dist_lm_status"
}
"""
# Variables that mean something to a shell.
_SPECIAL = frozenset(
    b"PATH IFS HOME PWD OLDPWD LANG TMPDIR TZ SHELLOPTS BASHOPTS PS1 PS2 PS4 ENV CDPATH GLOBIGNORE EXECIGNORE FIGNORE "
    b"RANDOM SRANDOM SECONDS LINENO HOSTNAME UID EUID PPID OPTIND OPTARG PIPESTATUS FUNCNAME DIRSTACK GROUPS "
    b"MAPFILE COPROC".split()
)


def judge(test: dict[str, str], channel: int, verdict: int) -> NoReturn:
    """Judges a test of Bash and ends the process; the test passes if the last command of its code returns 0.

    Then PASSED is written to `verdict`; else the reason to standard error, with exit code 1.

    Args:
        channel: socket to the program.
        verdict: descriptor of a pipe.
    """
    from dist_lm.sandbox import confine

    # A test may run a file of the program: nothing that it starts opens the pipe of the verdict by /proc.
    confine.dumpable(False)
    os.set_inheritable(verdict, False)
    try:
        _judge(test, channel)
    except (OSError, MalformedError, NotCarriedError, FailedError) as error:
        os.write(2, f"{error}\n".encode(errors="replace"))
        os._exit(1)
    os.write(verdict, PASSED)
    os._exit(0)


def _judge(test: dict[str, str], channel: int) -> None:
    """Runs a test; returns if it passes, after telling the program so.

    Raises:
        FailedError: it fails.
        OSError: the program has ended.
        MalformedError: the program says what no program says.
        NotCarriedError: a call of the test is too long.
    """
    import re

    folder = Folder(os.fsencode(os.getcwd()), sends_links=True)
    code = os.fsencode(test["code"])
    variables = _variables(os.fsencode(test["before"]) + b"\n" + code)
    _send(channel, variables, _identity(folder.root))
    status, names, state, changes = checked(_receive(channel), int, list, list, list)
    if status < 0:
        raise FailedError("the script does not come to its end")

    words = {*re.findall(_NAME, code + b" " + os.fsencode(test["before"]))}
    entry = os.fsencode(test["entry"])
    stubs = [name for name in words & {name for name in names if type(name) is bytes} if _is_program(name, entry)]
    turn, next_turn = os.pipe()
    os.write(next_turn, b".")
    requests, requests_end = os.pipe()
    answers_end, answers = os.pipe()
    output = _unnamed_file()

    numbers = {b"TURN": _TURN, b"NEXT": _NEXT, b"REQUESTS": _REQUESTS, b"ANSWERS": _ANSWERS, b"OUTPUT": _OUTPUT}
    filled = {name: b"%d" % number for name, number in numbers.items()} | {b"VARIABLES": b" ".join(variables)}
    script = re.sub(b"|".join(filled), lambda match: filled[match[0]], _STUBS)
    script += b"".join(b'function %s { dist_lm_call %s "$@"; }\n' % (name, name) for name in stubs)
    script += os.fsencode(test["before"]) + b"\n"
    # Changes that the program made to files before its first call come behind the same code before it.
    script += b"builtin printf 'files\\0' >&%d\ndist_lm_state 0\n" % _REQUESTS
    script += b"(exit %d) && :\n%s\n" % (status, code)
    script += b"[[ $? -eq 0 ]] && builtin printf 'passed\\0' >&%d\n" % _REQUESTS
    shell = _start(
        script, {_REQUESTS: requests_end, _ANSWERS: answers_end, _TURN: turn, _NEXT: next_turn, _OUTPUT: output}
    )
    for file in (requests_end, answers_end, turn, next_turn):
        os.close(file)

    fields = _Fields(requests, os.pidfd_open(shell))
    targets = _targets(code)
    places = places_of(code, stubs)
    _refuse_code(places, variables, state)
    has_passed = False
    while request := fields.next():
        if request == b"passed":
            has_passed = True
        elif request == b"files":
            folder.changes()  # the code before has made the same files on both sides
            _refuse_targets(folder.new_paths(changes), targets, [])
            folder.apply(changes)
            _write(answers, state, len(variables))
        else:
            _answer(fields, channel, folder, answers, output, variables, targets, places)
    _, wait_status = os.waitpid(shell, 0)
    if not has_passed or wait_status != 0:
        raise FailedError("the code of the test does not return 0")
    _send(channel)


def _is_program(name: bytes, entry: bytes) -> bool:
    return name == entry or name.decode() not in STANDARD


def _variables(text: bytes) -> list[bytes]:
    """Returns the variables that a test reads and never sets: each time its name stands behind a `$`."""
    import re

    read = {*re.findall(rb"\$(?:\{[#!]?)?([A-Za-z_][A-Za-z0-9_]*)", text)}
    names_without_dollar = {*re.findall(rb"(?<![A-Za-z0-9_${#!])([A-Za-z_][A-Za-z0-9_]*)", text)}
    assigned = {*re.findall(rb"\$\{([A-Za-z_][A-Za-z0-9_]*):?=", text)}
    return sorted(
        name
        for name in read - names_without_dollar - assigned - _SPECIAL
        if name[:4] not in (b"BASH", b"LC_A", b"dist")
    )


def _given(root: bytes, place: bytes, arguments: list[bytes], content: bytes) -> Callable[[bytes], bool] | None:
    """Returns a function that says of a path whether a call is given that file: the test may keep files, as of the
    expected content, for itself. None: the call is given all files.

    Arguments that are paths name the files. A call without such an argument is given all files, unless it has an input.

    Args:
        root: the shared folder.
        place: the folder of the call.
        content: its input.
    """
    named = [path for path in _paths(root, place, arguments) if os.path.lexists(os.path.join(root, path))]
    if not named and not content:
        return None
    return lambda path: _is_named(path, named)


def _paths(root: bytes, place: bytes, arguments: list[bytes]) -> list[bytes]:
    """Returns the arguments of a call as paths below `root`."""
    return [os.path.relpath(os.path.normpath(os.path.join(place, argument)), root) for argument in arguments]


def _is_named(path: bytes, names: list[bytes]) -> bool:
    """Returns whether a path is one of `names`, below one, or a folder above one."""

    def is_below(path: bytes, folder: bytes) -> bool:
        return path.startswith(folder + b"/")

    return any(path == name or name == b"." or is_below(path, name) or is_below(name, path) for name in names)


def _targets(code: bytes) -> set[bytes]:
    """Returns the last parts of paths that the code of a test seems to write: targets of `>` and of commands."""
    import re

    text = code.translate(None, b"'\"")
    values = dict(re.findall(rb"\b(\w+)=([^\s;&|()<>]+)", text))
    text = re.sub(rb"\$\{?(\w+)\}?", lambda match: values.get(match[1], match[0]), text)
    written = re.findall(rb">[>|&]?[ \t]*([^\s;&|<>()]+)", text)
    for arguments in re.findall(rb"\b(?:tee|cp|mv|touch|mkdir|ln|install|dd|truncate)\b([^;&|\n]*)", text):
        written += arguments.split()
    return {path.rstrip(b"/").rpartition(b"/")[2] for path in written} - {b"", b"null"}


def _refuse_targets(new_paths: list[bytes], targets: set[bytes], named: list[bytes]) -> None:
    """Refuses new files of a program where the test writes its own: a folder, or a file that nobody may write, would
    stay, and the test would compare the program's files with each other.

    Raises:
        FailedError: names the file.
    """
    for path in new_paths:
        name = path.rpartition(b"/")[2]
        if (name in targets or name[:1] == b"-") and not _is_named(path, named):
            raise FailedError(f"the program makes {os.fsdecode(path)}, which is the test's to make")


def _refuse_code(places: Places, variables: list[bytes], state: list[Any]) -> None:
    """Refuses values of variables that the shell of the test would read as code.

    Args:
        state: folder, then whether each variable is set, and its value.

    Raises:
        FailedError: names the variable.
    """
    for name, is_set, value in zip(variables, state[1::2], state[2::2], strict=False):
        if is_set and type(value) is bytes and (read_as := harm(places, (b"$", name), value)):
            raise FailedError(f"the test reads ${os.fsdecode(name)} as {read_as}; its value is {value!r:.100}")


def _answer(
    fields: _Fields,
    channel: int,
    folder: Folder,
    answers: int,
    output: int,
    variables: list[bytes],
    targets: set[bytes],
    places: Places,
) -> None:
    """Passes a call of the test to the program, and the program's answer to the test; waits for it. Files that either
    side changed are changed on the other one.

    Args:
        fields: holds the rest of the call.
        answers, output: what the shell of the test reads: status and state, and what the call printed.
        targets: names of files that the test writes itself.

    Raises:
        FailedError: the call ended the shell of the program, or the program changed files of the test.
        OSError: the program has ended.
        MalformedError: its answer has another form.
        NotCarriedError: the call is too long.
    """
    is_subshell = fields.next() == b"1"
    place = fields.next()
    words = [fields.next() for _ in range(int(fields.next()))]
    content = b"\0".join([fields.next() for _ in range(int(fields.next()))])

    changes = folder.changes(_given(folder.root, place, words[1:], content))
    _send(channel, is_subshell, place, words, content, changes)
    status, printed, errors, state, changes = checked(_receive(channel), int, bytes, bytes, list, list)
    if status < 0:
        raise FailedError("a call ended the shell")
    if is_subshell and (read_as := harm(places, words, printed)):
        raise FailedError(f"the test reads the output of {os.fsdecode(words[0])} as {read_as}; it is {printed!r:.100}")
    _refuse_code(places, variables, state)
    _refuse_targets(folder.new_paths(changes), targets, _paths(folder.root, place, words[1:]))
    folder.apply(changes)

    os.ftruncate(output, 0)
    os.pwrite(output, printed, 0)
    os.lseek(output, 0, os.SEEK_SET)
    _write(answers, [b"%d" % (status & 0xFF), errors.replace(b"\0", b"")[-2_000:]], -1)
    _write(answers, state, len(variables))


def _write(answers: int, state: list[Any], num_variables: int) -> None:
    """Writes fields to the shell of the test: the program's, which are hostile, or two of our own.

    Args:
        num_variables: the program's fields are a folder, and two for each variable; -1: fields of our own.

    Raises:
        MalformedError: these are no fields, or another number than the shell reads.
    """
    if any(type(field) is not bytes or b"\0" in field or len(field) > 1 << 15 for field in state):
        raise MalformedError("a state of another form")
    if num_variables >= 0 and len(state) != 1 + 2 * num_variables:
        raise MalformedError("a state of another size")
    content = memoryview(b"".join(field + b"\0" for field in state))
    while content:
        content = content[os.write(answers, content) :]


class _Fields:
    """Reads what the shell of a test writes, field by field."""

    def __init__(self, pipe: int, pidfd: int) -> None:
        self.pipe = pipe
        self.poller = select.poll()
        for file in (pipe, pidfd):
            self.poller.register(file, select.POLLIN)
        self.buffer = b""

    def next(self) -> bytes:
        """Returns the next field; empty once the shell has ended."""
        while b"\0" not in self.buffer:
            if all(file != self.pipe for file, _ in self.poller.poll()):
                return b""
            piece = os.read(self.pipe, 1 << 16)
            if not piece:
                return b""
            self.buffer += piece
        field, _, self.buffer = self.buffer.partition(b"\0")
        return field
