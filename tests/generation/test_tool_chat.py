"""A scripted model that calls a person's functions: at the prompt, in one go, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dist_lm import __main__ as program
from dist_lm.chat.messages import Call, Conversation, Message
from dist_lm.chat.parse import parse
from dist_lm.chat.template import answer_tokens
from dist_lm.config.model import ModelConfig
from dist_lm.errors import ConfigError, UserError
from dist_lm.generation.call_grammar import ToolChoice, call_constraint
from dist_lm.generation.constraint import Constraint
from dist_lm.generation.load import Openings
from dist_lm.generation.prompt_loop import PromptLoop
from dist_lm.generation.request import Answer, FinishReason, SamplingParams, TextStream
from dist_lm.generation.session import Outcome, Session, Settings
from dist_lm.generation.terminal import NO_ANSWER, interrupts
from dist_lm.generation.tool_chat import ToolChat, ToolOptions, warning_of
from dist_lm.prepare.compose import compose_config
from dist_lm.tokenizer.symbols import START
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tools.use.toolbox import Limits, Toolbox
from tests.conftest import TINY

FILE = 'def add(x: int, y: int = 1) -> int:\n    """Sum."""\n    return x + y\n'
SETTINGS = Settings(SamplingParams(max_new_tokens=50), seed=3)
ONE = Message("assistant", calls=(Call("add", {"x": 2}),))
CALLS = Message("assistant", calls=(Call("add", {"x": 2}), Call("add", {"x": 2, "y": 5})))
WORDS = Message("assistant", "It is 3 and 7.")


class Scripted(Session):
    """Answers with turns of a script; keeps what it was asked."""

    finish: FinishReason = "stop"

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, script: list[Message | list[int]]) -> None:
        self.name, self.tokenizer, self.config, self.script = "scripted", tokenizer, config, script
        self.asked: list[Conversation] = []
        self.constraints: list[Constraint | None] = []

    def answer(
        self,
        prompt: list[int],
        settings: Settings,
        n: int,
        on_text: Callable[[int, str], None],
        interrupted: Callable[[], bool] = lambda: False,
        on_token: Callable[[int], None] = lambda token: None,
    ) -> Outcome:
        opening = [self.tokenizer.special_ids[START], *self.tokenizer.encode("assistant\n")]
        assert prompt[-len(opening) :] == opening
        self.asked.append(parse(prompt[: -len(opening)], self.tokenizer))
        self.constraints.append(settings.constraint)
        turn = self.script.pop(0)
        tokens = turn if isinstance(turn, list) else answer_tokens(turn, self.tokenizer)
        assert tokens[-1] in settings.params.stop_tokens or isinstance(turn, list)
        stream = TextStream(self.tokenizer.vocabulary(), ())
        for token in tokens:
            on_token(token)
            if text := stream.add(token):
                on_text(0, text)
        done = Answer("1", 0, len(prompt), tuple(tokens), stream.text, (), (), self.finish, settings.seed, 0)
        return Outcome((done,), 0.1, settings.seed)


@pytest.fixture(scope="module")
def toolbox(tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("tools") / "tools.py"
    file.write_text(FILE)
    with Toolbox(file, Limits()) as box:
        yield box


@pytest.fixture
def scripted(tiny_work):
    config = replace(compose_config(["stage=code", *TINY]).model, max_seq_len=1024)
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    return lambda *script: Scripted(tokenizer, config, list(script))


def talk(session: Session, toolbox: Toolbox, *lines: str) -> str:
    """What the screen shows."""
    output, script = StringIO(), list(lines)

    def read(before: str, typed: str) -> str:
        if not script:
            raise EOFError
        return script.pop(0)

    console = Console(file=output, width=60, highlight=False)
    chat = ToolChat(session, toolbox, max_rounds=2)
    PromptLoop(session, SETTINGS, lambda: Openings({}, "", []), console, read, interrupts, chat).run()
    return output.getvalue()


def test_calls_and_results_are_shown_as_they_happen(scripted, toolbox):
    screen = talk(scripted(CALLS, WORDS), toolbox, "2 + 1 and 2 + 5")
    assert screen.splitlines()[1:-1] == [
        *("-> add(x=2)", "<- 3", "-> add(x=2, y=5)", "<- 7", "It is 3 and 7."),
        screen.splitlines()[-2],
    ]
    assert screen.splitlines()[-2].startswith("2 turns, ")
    assert screen.splitlines()[-2].endswith("answered, seed 3")
    assert "arguments" not in screen  # the text of a call is not shown as words


def test_a_conversation_goes_on_until_it_is_forgotten(scripted, toolbox):
    session = scripted(WORDS, WORDS, WORDS, WORDS)
    talk(session, toolbox, "one", "two", "/again", "/new", "three")
    said = [[turn.content for turn in asked.messages if turn.role == "user"] for asked in session.asked]
    assert said == [["one"], ["one", "two"], ["one", "two"], ["three"]]
    assert all(asked.tools == toolbox.tools for asked in session.asked)


def test_a_request_without_an_answer_is_taken_back(scripted, toolbox):
    session = scripted([5, 6], CALLS, CALLS, CALLS, WORDS)
    screen = talk(session, toolbox, "one", "two", "three")
    assert "the model's output is not a turn (token" in screen
    assert "no answer after --max-rounds" in screen
    assert [turn.content for turn in session.asked[-1].messages] == ["three"]


def test_turns_are_constrained_to_calls_that_fit(scripted, toolbox):
    """Forced calls are for the first turn: with them in every turn no request would get an answer."""
    session = scripted(ONE, WORDS, WORDS)
    chat = ToolChat(session, toolbox, 8, ToolChoice("required", parallel=False))
    for request in ("one", "two"):
        chat.answer(request, SETTINGS, lambda text: None, lambda line: None)
    first = call_constraint(toolbox.tools, session.tokenizer, ToolChoice("required", parallel=False))
    later = call_constraint(toolbox.tools, session.tokenizer, ToolChoice("auto", parallel=False))
    assert session.constraints == [first, later, first]


def test_a_choice_that_no_function_has_is_refused_before_the_first_request(scripted, toolbox):
    with pytest.raises(UserError, match=r"tool_choice=ad: expected .*\(add\)"):
        ToolChat(scripted(), toolbox, 8, ToolChoice("ad"))
    with pytest.raises(ConfigError, match="--tool-choice and --no-parallel-calls: expected --tools"):
        ToolOptions(None, choice=ToolChoice("required"))


def test_calls_that_are_refused_again_end_a_request_with_a_line(scripted, toolbox):
    wrong = Message("assistant", calls=(Call("add", {"z": 2}),))
    session = scripted(wrong, wrong, WORDS)
    output = StringIO()
    chat = ToolChat(session, toolbox, max_rounds=8)
    outcome = chat.answer("one", SETTINGS, output.write, lambda line: None)
    assert "no answer: the model repeats refused calls" in str(outcome)
    assert len(session.script) == 1


def test_a_conversation_that_fills_the_context_is_one_line(scripted, toolbox):
    chat = ToolChat(scripted(), toolbox, 2)
    with pytest.raises(UserError, match="the model's context is 1,024"):
        chat.answer("x " * 1000, SETTINGS, lambda text: None, lambda line: None)


def test_an_answer_that_is_cut_off_says_so(scripted, toolbox):
    session = scripted(WORDS, WORDS, [5, 6])
    assert "cut off" not in talk(session, toolbox, "one")
    session.finish = "length"
    screen = " ".join(talk(session, toolbox, "one", "two").split())
    assert "answered, cut off: max_new_tokens reached, seed 3" in screen
    assert "output is not a turn" in screen
    assert screen.count("cut off: max_new_tokens reached") == 2


def test_what_is_wrong_with_a_request_is_one_line_and_not_the_models_fault(scripted, toolbox):
    session = scripted(WORDS)
    chat = ToolChat(session, toolbox, 2)
    for text in ("", " \n\t", "\ud800"):
        with pytest.raises(UserError, match=r"empty|surrogate"):
            chat.answer(text, SETTINGS, lambda text: None, lambda line: None)
    assert not session.asked
    chat.answer("one", SETTINGS, lambda text: None, lambda line: None)
    assert [turn.content for turn in session.asked[0].messages] == ["one"]


def test_new_is_for_conversations(session):
    output, script = StringIO(), ["/new"]
    console = Console(file=output, width=80)

    def read(before: str, typed: str) -> str:
        if not script:
            raise EOFError
        return script.pop()

    PromptLoop(session, SETTINGS, lambda: Openings({}, "", []), console, read, interrupts).run()
    assert "/new: needs --tools; without it every prompt is a new text" in output.getvalue()


@pytest.fixture
def verb(small_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    file = tmp_path / "tools.py"
    file.write_text(FILE)

    def call(*words: str, script: list[Message] | None = None) -> tuple[int, str, str]:
        def answer(self, prompt, settings, n, on_text, interrupted=None, on_token=None):
            scripted = Scripted(self.tokenizer, self.config, [script.pop(0)])
            return scripted.answer(prompt, settings, n, on_text)

        if script is not None:
            monkeypatch.setattr(Session, "answer", answer)
        command = ["dist-lm", "generate", str(small_run.path), "--device", "cpu", "--prompt", "2 + 1?", *words]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as ending:
            program.main()
        return (ending.value.code, *capsys.readouterr())

    return lambda *words, script=None, tools=file: call("--tools", str(tools), *words, script=script)


def test_in_one_go_the_answer_alone_goes_to_standard_output(verb):
    code, out, errors = verb(script=[ONE, WORDS])
    assert (code, out) == (0, "It is 3 and 7.")
    lines = errors.splitlines()
    assert lines[0].startswith("this model was trained by stage=code, which does not teach calls")
    assert lines[1:3] == ["-> add(x=2)", "<- 3"]
    assert lines[3].startswith("code/small/step_00000020: 2 turns, ")


def test_no_answer_is_exit_code_1(verb):
    code, out, errors = verb("--max-rounds", "1", script=[ONE, ONE])
    assert (code, out) == (NO_ANSWER, "")
    assert "no answer after --max-rounds" in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-rounds", "0"), "error: --max-rounds=0: expected a positive integer"),
        (("--tool-seconds", "-1"), "error: --tool-seconds=-1.0: expected a positive number"),
        (("--n", "2"), "error: --n=2: --tools gives one answer"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_2(verb, words, message):
    code, out, errors = verb(*words)
    assert (code, out) == (2, "")
    assert errors.startswith(message)
    assert errors.count("\n") == 1


def test_a_file_that_is_not_there_is_found_before_the_model_is_read(verb, tmp_path):
    code, _, errors = verb(tools=tmp_path / "nowhere.py")
    assert code == 2
    assert "no such file; expected a Python file with functions" in errors


def test_only_models_that_learned_calls_come_without_a_warning():
    assert warning_of("tools") is None
    assert warning_of(None) is None
    assert "stage=language" in str(warning_of("language"))
