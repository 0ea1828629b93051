"""`python -m dist_lm generate`, from the outside."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from dist_lm import __main__ as program
from dist_lm.data.infill import InfillMarks
from dist_lm.errors import UserError
from dist_lm.generation.engine import Engine
from dist_lm.generation.load import load_model
from dist_lm.generation.request import Answer, Refusal, SamplingParams
from dist_lm.generation.session import Session, Settings
from dist_lm.generation.terminal import STOPPED
from dist_lm.storage.process import CpuUsage
from dist_lm.tracking.readable import visible
from tests.patience import patient

PROMPT = "def value_3(name):\n"
OPTIONS = ("--max-new-tokens", "20", "--seed", "11", "--temperature", "0.8", "--top-k", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def expected(small_run) -> list[str]:
    """The texts of three answers."""
    session = Session(load_model(small_run.path), torch.device("cpu"), answers=3)
    texts = ["", "", ""]

    def show(index: int, text: str) -> None:
        texts[index] += text

    params = SamplingParams(max_new_tokens=20, temperature=0.8, top_p=0.95)
    session.answer(session.tokens(PROMPT), Settings(params, 11), 3, show)
    assert len(set(texts)) == 3
    return texts


def call(monkeypatch, capsys, *words, stdin=b""):
    """(exit code, standard output, standard error)."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    monkeypatch.setattr("sys.argv", ["dist-lm", "generate", *map(str, words)])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    with pytest.raises(SystemExit) as ending:
        program.main()
    assert handlers == [signal.getsignal(number) for number in signal.valid_signals()]  # what it runs in keeps its own
    return (ending.value.code, *capsys.readouterr())


@pytest.mark.heavy
def test_the_answer_alone_goes_to_standard_output(small_run, expected):
    done = subprocess.run(
        [sys.executable, "-m", "dist_lm", "generate", small_run.path, "--prompt", PROMPT, *OPTIONS],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        timeout=patient(120),
        check=False,
    )
    assert (done.returncode, done.stdout.decode()) == (0, expected[0]), done.stderr.decode()
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("code/small/step_00000020: 20 tokens, ")
    assert line.endswith("max_new_tokens reached, seed 11")


@pytest.mark.parametrize(("free", "threads"), [(0, 1), (9, 3)])
def test_as_many_threads_compute_as_others_leave_cores_free(small_run, monkeypatch, capsys, free, threads):
    """On a machine with other work, threads that wait for each other took 25 times as long as one."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(CpuUsage, "free_cores", lambda usage: free)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert call(monkeypatch, capsys, small_run.path, "--prompt", PROMPT, *OPTIONS)[0] == 0
        assert torch.get_num_threads() == threads
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        torch.set_num_threads(3)
        assert call(monkeypatch, capsys, small_run.path, "--prompt", PROMPT, *OPTIONS)[0] == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_without_the_opening_the_prompt_is_its_own_tokens(small_run, monkeypatch, capsys):
    loaded = load_model(small_run.path)
    plain = Session(loaded, torch.device("cpu"), opening=False)
    assert plain.tokens(PROMPT) == loaded.tokenizer.encode(PROMPT)
    assert Session(loaded, torch.device("cpu")).tokens(PROMPT) == loaded.tokenizer.encode_prompt(PROMPT)
    with pytest.raises(UserError, match="no-opening"):
        plain.tokens("")
    code, out, _ = call(monkeypatch, capsys, small_run.path, "--prompt", PROMPT, *OPTIONS, "--no-opening")
    texts = [""]

    def show(index: int, text: str) -> None:
        texts[index] += text

    params = SamplingParams(max_new_tokens=20, temperature=0.8, top_p=0.95)
    plain.answer(plain.tokens(PROMPT), Settings(params, 11), 1, show)
    assert (code, out) == (0, texts[0])
    refused = call(monkeypatch, capsys, small_run.path, "--prompt", PROMPT, *OPTIONS, "--no-opening", "--chat")
    assert refused[0] == 2


@pytest.mark.heavy
def test_a_reader_that_has_seen_enough_ends_it_without_a_word(small_run):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "dist_lm", "generate", small_run.path, "--prompt", PROMPT, *OPTIONS],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=patient(120),
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def at_own_terminal() -> None:
    """Lets Ctrl-C reach this process, also where the tests run in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


SLOW_PROGRAM = """
import time
from dist_lm import __main__ as program
from dist_lm.generation.engine import Engine

step, submit = Engine.step, Engine.submit

def slow_step(engine):
    time.sleep(0.2)
    return step(engine)

def told_submit(engine, request, *arguments):
    print(f"[prompt of {len(request.prompt)} tokens]", flush=True)
    return submit(engine, request, *arguments)

Engine.step, Engine.submit = slow_step, told_submit
program.main()
"""
"""`dist-lm` with at most five tokens a second, so that Ctrl-C comes in the middle of an answer. It tells how long each
prompt is, conversation included."""


class Conversation:
    """`generate --chat` at a terminal of its own."""

    def __init__(self, run: Path, program: Sequence[str] = ("-m", "dist_lm"), options: Sequence[str] = OPTIONS) -> None:
        self._outer, inner = pty.openpty()
        words = [sys.executable, *program, "generate", str(run), "--chat", *options]
        self.program = subprocess.Popen(
            words,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            preexec_fn=at_own_terminal,  # Ctrl-C needs it
        )
        os.close(inner)
        self.text = ""  # behind what was waited for
        self.seen = ""  # all of it

    def wait_for(self, words: str) -> None:
        """Reads until the terminal has shown `words` behind what was waited for before."""
        assert self.shows(words, within=patient(120)), self.text

    def shows(self, words: str, within: float) -> bool:
        """Reads as `wait_for` does, for at most `within` seconds, and returns whether `words` came."""
        deadline = time.monotonic() + within
        while words not in self.text:
            if time.monotonic() > deadline:
                return False
            if select.select([self._outer], [], [], 0.1)[0]:
                piece = os.read(self._outer, 65536).decode(errors="replace")
                self.text += piece
                self.seen += piece
        self.text = self.text.partition(words)[2]
        return True

    def type(self, text: str) -> None:
        os.write(self._outer, text.encode())

    def interrupt(self) -> None:
        """Presses Ctrl-C until there is a new prompt: readline misses a signal that comes just before it waits."""
        deadline = time.monotonic() + patient(120)
        self.type("\x03")
        while not self.shows(PROMPT_MARK, within=2):
            assert time.monotonic() < deadline, self.text
            self.type("\x03")

    def command(self, line: str, words: str) -> None:
        """Types a command and waits for what it says and the next prompt."""
        self.type(f"{line}\n")
        self.wait_for(line)
        self.wait_for(words)
        self.wait_for(PROMPT_MARK)

    def ask(self, request: str, ending: str, interrupts: bool = False) -> int:
        """Asks SLOW_PROGRAM and waits for the end of the answer and the next prompt.

        Args:
            ending: a word of the line about the answer.
            interrupts: whether Ctrl-C is pressed when the answer has begun.

        Returns:
            The tokens of the request's prompt.
        """
        self.type(f"{request}\n")
        self.wait_for("[prompt of ")
        self.wait_for(" tokens]\r\n")
        if interrupts:
            assert self.shows_more(), "the answer does not begin"
            self.type("\x03")
        self.wait_for(ending)
        self.wait_for(PROMPT_MARK)
        return int(re.findall(r"prompt of (\d+) tokens", self.seen)[-1])

    def shows_more(self) -> bool:
        """Waits for any further text."""
        return bool(self.text or select.select([self._outer], [], [], patient(120))[0])

    def end(self) -> int:
        """Returns the exit code; the program must end within 10 s of a quiet machine."""
        deadline = time.monotonic() + patient(10)
        try:
            while self.program.poll() is None and time.monotonic() < deadline:
                # A program whose terminal nobody reads would wait.
                if select.select([self._outer], [], [], 0.01)[0]:
                    with suppress(OSError):  # its end is closed
                        self.text += os.read(self._outer, 65536).decode(errors="replace")
            assert self.program.poll() is not None, self.text
            return self.program.returncode
        finally:
            self.program.kill()
            self.program.wait()
            os.close(self._outer)


GREETING, PROMPT_MARK = "Ctrl-D leaves", "> "


@pytest.mark.heavy
@pytest.mark.parametrize(
    "words",
    [
        "/quit\n",
        "half a line\x03\x04",
        *(pytest.param(words, marks=pytest.mark.bars) for words in ("\x04", "/exit\n", "half a line\x03/quit\n")),
    ],
    ids=repr,
)
def test_a_chat_at_a_terminal_ends_when_it_is_told(small_run, words: str):
    """Finds a chat that does not end at the end of input, or waits for threads and processes at its end."""
    chat = Conversation(small_run.path)
    chat.wait_for(GREETING)
    chat.wait_for(PROMPT_MARK)
    *before, last = words.split("\x03")
    for typed in before:
        chat.type(typed)
        # Ctrl-C also discards what the terminal has not handed over; readline would wait for it for ever.
        chat.wait_for(typed)
        chat.interrupt()
    chat.type(last)
    assert chat.end() == 0, chat.text
    assert "Traceback" not in chat.text


@pytest.mark.heavy
def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(small_run):
    """Finds a Ctrl-C that ends the program or waits for the whole answer, and one after which the turns before are
    gone."""
    letters = ("--constraint", '{"regex": "[a-z]{100,200}"}')  # any answer is a turn, and a long one
    chat = Conversation(small_run.path, ("-c", SLOW_PROGRAM), (*OPTIONS, *letters))
    chat.wait_for(GREETING)
    chat.wait_for(PROMPT_MARK)

    chat.command("/max_new_tokens 3", "max_new_tokens 3")
    first_prompt = chat.ask("one", "answered")
    chat.command("/max_new_tokens 100", "max_new_tokens 100")
    second_prompt = chat.ask("two", "stopped", interrupts=True)
    n_tokens = int(re.findall(r"1 turn, (\d+) token", chat.seen)[-1])
    assert n_tokens < 100

    # The request that was stopped is taken back, and the answer before it stays.
    chat.command("/max_new_tokens 3", "max_new_tokens 3")
    third_prompt = chat.ask("six", "answered")
    assert third_prompt == second_prompt > first_prompt
    chat.type("\x04")
    assert chat.end() == 0, chat.text
    assert "Traceback" not in chat.seen


@pytest.mark.heavy
def test_several_processes_can_share_the_model(small_run, expected):
    done = subprocess.run(
        [sys.executable, "-m", "dist_lm", "generate", small_run.path, "--prompt", PROMPT, *OPTIONS, "--tp", "2"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        timeout=patient(120),
        check=False,
    )
    assert (done.returncode, done.stdout.decode()) == (0, expected[0]), done.stderr.decode()


@pytest.mark.parametrize(
    ("tp", "words"),
    [("0", "--tp=0: expected a positive integer"), ("6", "--tp=6: expected a degree that this model can be cut into")],
)
def test_a_model_that_cannot_be_shared_so_is_refused_in_one_line(small_run, monkeypatch, capsys, tp, words):
    code, output, error = call(monkeypatch, capsys, small_run.path, "--prompt", PROMPT, *OPTIONS, "--tp", tp)
    assert (code, output) == (2, "")
    assert words in error
    assert len(error.splitlines()) == 1


def test_a_prompt_can_come_from_standard_input(small_run, expected, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, small_run.path, *OPTIONS, stdin=PROMPT.encode())
    assert (code, out) == (0, expected[0])


def test_several_answers_come_one_after_the_other(small_run, expected, monkeypatch, capsys):
    code, out, errors = call(monkeypatch, capsys, small_run.path, "--prompt", PROMPT, *OPTIONS, "--n", 3)
    parts = [f"=== {i + 1} of 3 ===\n{text}" + "\n" * (not text.endswith("\n")) for i, text in enumerate(expected)]
    assert (code, out) == (0, "".join(parts))
    assert "3 answers, 60 tokens" in errors
    assert "3 max_new_tokens reached" in errors


def test_an_answer_ends_before_a_stop_text(small_run, expected, monkeypatch, capsys):
    stop = expected[0][4:7]
    code, out, errors = call(monkeypatch, capsys, small_run.path, "--prompt", PROMPT, *OPTIONS, "--stop", stop)
    assert (code, out) == (0, expected[0].partition(stop)[0])
    assert "stop text" in errors


def test_ctrl_c_ends_the_answer_in_good_order(small_run, expected, monkeypatch, capsys):
    step = Engine.step

    def stepping(engine: Engine) -> list[Answer | Refusal]:
        signal.raise_signal(signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(Engine, "step", stepping)
    code, out, errors = call(monkeypatch, capsys, small_run.path, "--prompt", PROMPT, *OPTIONS)
    assert code == STOPPED
    assert expected[0].startswith(out)
    assert len(out) < len(expected[0])
    assert "stopped, seed 11" in errors


@pytest.mark.parametrize(
    ("words", "stdin", "message"),
    [
        (("--prompt", "x", "--temperature", "-1"), b"", "error: --temperature=-1.0: expected a number >= 0"),
        (("--prompt", "x", "--max-new-tokens", "0"), b"", "error: --max-new-tokens=0: expected a positive integer"),
        (("--prompt", "x", "--repetition-penalty", "0"), b"", "error: --repetition-penalty=0.0"),
        (("--prompt", "x", "--top-k", str(10**20)), b"", "error: --top-k="),
        (("--prompt", "x", "--stop", ""), b"", "error: --stop='': expected a text that is not empty"),
        (("--prompt", "x", "--stop", "ab\udcff"), b"", "error: --stop: the text is not UTF-8 at byte 2"),
        (("--prompt", "x", "--n", "0"), b"", "error: --n=0: expected a positive integer"),
        (("--prompt", "x", "--seed", str(1 << 63)), b"", "error: --seed="),
        (("--prompt", "x", "--device", "tpu"), b"", "error: --device=tpu: expected auto, cpu or cuda"),
        (("--prompt", "x", "--tokenizer", "nowhere"), b"", "error: --tokenizer=nowhere: no tokenizer there"),
        (("--prompt", "x " * 300), b"", "error: --prompt has 601 tokens"),
        (("--prompt", "x", "--suffix", "y " * 300), b"", "error: --prompt with --suffix has 605 tokens"),
        (
            ("--prompt", "x", "--suffix", "y", "--tools", "t.py"),
            b"",
            "error: --suffix: expected --prompt, or a prompt on",
        ),
        (("--prompt", "é\udcff"), b"", "error: --prompt: the text is not UTF-8 at byte 2"),
        ((), b"", "error: --prompt is missing, and standard input is empty"),
        ((), b"\xff", "error: standard input: the prompt is not UTF-8 at byte 0"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_2(small_run, monkeypatch, capsys, words, stdin, message):
    code, out, errors = call(monkeypatch, capsys, small_run.path, *words, stdin=stdin)
    assert (code, out) == (2, "")
    assert errors.startswith(message)
    assert errors.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("verb", [("generate",), ("tools", "bfcl")])
def test_a_device_that_is_not_there_is_refused_by_the_name_of_the_option(small_run, monkeypatch, capsys, verb):
    monkeypatch.setattr("sys.argv", ["dist-lm", *verb, str(small_run.path), "--device", "cuda"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"x")))
    with pytest.raises(SystemExit) as ending:
        program.main()
    assert ending.value.code == 2
    assert capsys.readouterr().err == "error: --device=cuda: expected cpu or auto: there is no GPU here\n"


def test_an_empty_prompt_is_the_beginning_of_a_document(small_run, monkeypatch, capsys):
    code, out, errors = call(monkeypatch, capsys, small_run.path, "--prompt", "", *OPTIONS)
    assert code == 0, errors
    assert out


def test_a_run_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    code, _, errors = call(monkeypatch, capsys, tmp_path / "none", "--prompt", "x")
    assert code == 2
    assert errors.startswith(f"error: {tmp_path / 'none'}: no checkpoint there")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_symbols_and_whole_lines(small_run, expected, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", output := Terminal())
    code, *_ = call(monkeypatch, capsys, small_run.path, "--prompt", PROMPT, *OPTIONS)
    assert code == 0
    assert output.getvalue() == visible(expected[0]) + "\n" * (not expected[0].endswith("\n"))


def test_a_suffix_asks_for_the_middle(small_run, session, monkeypatch, capsys):
    marks = InfillMarks.of(session.tokenizer)
    before, after = session.tokenizer.encode("def a("), session.tokenizer.encode("return b")
    tokens = [session.tokenizer.eot_id, marks.prefix, *before, marks.suffix, *after, marks.middle]
    assert session.tokens("def a(", suffix="return b") == tokens
    parts = []
    params = SamplingParams(max_new_tokens=20, temperature=0.8, top_p=0.95)
    session.answer(tokens, Settings(params, 11), 1, lambda index, text: parts.append(text))
    words = ("--prompt", "def a(", "--suffix", "return b", *OPTIONS)
    assert call(monkeypatch, capsys, small_run.path, *words)[:2] == (0, "".join(parts))
