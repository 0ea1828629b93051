"""A person's functions in a process of their own."""

import os
import time
from pathlib import Path

import pytest

from dist_lm.chat.messages import Call
from dist_lm.errors import ConfigError, UserError
from dist_lm.tools.use.toolbox import Limits, Toolbox
from tests.patience import patient

FILE = '''
import datetime, enum, os, subprocess, sys, time
from math import sqrt

class Unit(enum.Enum):
    KG = "kg"

calls = 0

def count() -> int:
    """How often it was called."""
    global calls
    calls += 1
    print("not an answer")
    return calls

def types(day: datetime.date, unit: Unit, names: set[str]) -> dict:
    return {"kinds": [type(one).__name__ for one in (day, unit, names)], "day": day, "unit": unit}

def fail(text: str):
    raise ValueError(text)

def leave(code: int):
    sys.exit(code)

def die():
    os._exit(3)

def hang(file: str):
    child = subprocess.Popen(["sleep", "60"])
    open(file, "w").write(f"{os.getpid()} {child.pid}")
    time.sleep(60)

def flood(size: int) -> str:
    return "x" * size

def flood_list(size: int) -> list:
    return [1] * size

def not_json() -> object:
    return float("nan")

def thing() -> object:
    return object()

def _private(x: int): ...
'''


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("tools") / "my tools.py"
    file.write_text(FILE)
    with Toolbox(file, Limits(seconds=5, characters=100)) as box:
        yield box


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "own.py"
    file.write_text(text)
    return file


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_public_functions_of_the_file_are_tools(box):
    assert [tool.name for tool in box.tools] == [
        *("count", "types", "fail", "leave", "die", "hang", "flood", "flood_list", "not_json", "thing")
    ]


def test_what_a_function_keeps_is_there_at_the_next_call(box, capfd):
    first = box.run(Call("count"))
    assert box.run(Call("count")) == first + 1
    assert capfd.readouterr().out == ""  # what it prints goes elsewhere


def test_arguments_come_as_their_types_and_results_as_json(box):
    result = box.run(Call("types", {"day": "2024-05-03", "unit": "kg", "names": ["a", "a"]}))
    assert result == {"kinds": ["date", "Unit", "set"], "day": "2024-05-03", "unit": "kg"}


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (Call("fail", {"text": "no such order"}), "ValueError: no such order"),
        (Call("fail", {"text": "x" * 500}), ("ValueError: " + "x" * 500)[:100]),
        (Call("leave", {"code": 7}), "SystemExit: 7"),
        (Call("die"), "die ended its own process (exit code 3)"),
        (Call("not_json"), "the result: nan is not JSON"),
        (Call("types", {"day": "May", "unit": "kg", "names": []}), "arguments: "),
        (Call("thing"), "PydanticSerializationError: "),
    ],
)
def test_what_goes_wrong_is_a_result(box, call, error):
    result = box.run(call)
    assert result.keys() == {"error"}
    assert result["error"].startswith(error)
    assert isinstance(box.run(Call("count")), int)


def test_a_long_result_is_cut_and_says_so(box):
    assert box.run(Call("flood", {"size": 98})) == "x" * 98
    assert box.run(Call("flood", {"size": 5000})) == "x" * 100 + " ... (cut: 100 of 5,000 characters)"
    cut = box.run(Call("flood_list", {"size": 5000}))
    assert cut.startswith("[1, 1, ")
    assert cut.endswith(" ... (cut: 100 of 15,000 characters)")


@pytest.mark.heavy
def test_a_function_that_hangs_is_ended_with_all_it_started(tmp_path):
    limit = round(patient(2))  # the function must have started its own process by then
    with Toolbox(write(tmp_path, FILE), Limits(seconds=limit)) as box:
        started = time.monotonic()
        result = box.run(Call("hang", {"file": str(tmp_path / "pids")}))
        assert result == {"error": f"hang took longer than {limit} s and was ended"}
        assert time.monotonic() - started < limit + patient(30)
        host, child = map(int, (tmp_path / "pids").read_text().split())
        assert not is_alive(host)
        deadline = time.monotonic() + patient(60)
        while is_alive(child) and time.monotonic() < deadline:
            os.sched_yield()
        assert not is_alive(child)
        assert box.run(Call("count")) == 1  # a new process


def test_a_person_can_stop_a_call(tmp_path):
    with Toolbox(write(tmp_path, FILE), Limits(seconds=60)) as box:
        result = box.run(Call("hang", {"file": str(tmp_path / "pids")}), interrupted=(tmp_path / "pids").exists)
        assert result == {"error": "hang was stopped"}


def test_tools_can_be_listed_and_neighbours_imported(tmp_path):
    (tmp_path / "beside.py").write_text('def double(x: int) -> int:\n    """Twice x."""\n    return 2 * x\n')
    text = "from beside import double\ndef other(): ...\ndef _own() -> int:\n    return 1\nTOOLS = [double, _own]\n"
    with Toolbox(write(tmp_path, text), Limits()) as box:
        assert [tool.name for tool in box.tools] == ["double", "_own"]
        assert box.run(Call("double", {"x": 4})) == 8


def test_a_file_may_be_named_as_a_module_that_it_imports(tmp_path):
    file = tmp_path / "json.py"
    file.write_text("import json\ndef f(x: int) -> str:\n    return json.dumps([x])\n")
    with Toolbox(file, Limits()) as box:
        assert box.run(Call("f", {"x": 1})) == "[1]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "no functions; expected some without _"),
        ("from math import sqrt\n", "no functions"),
        ("TOOLS = [3]\n", "TOOLS holds 3; expected functions"),
        ("TOOLS = 3\n", "TOOLS is 3; expected a list of functions"),
        ("def f(x): ...\n", r"f\(x\): no type"),
        ("def f(:\n", "SyntaxError: "),
        ("import nowhere\n", "ModuleNotFoundError: No module named 'nowhere'"),
        ("def f(): ...\ndef g(): ...\nTOOLS = [f, f]\n", "two functions are named f"),
        ("import os\nos._exit(4)\n", r"it ends the process that reads it \(exit code 4\)"),
    ],
)
def test_a_file_that_holds_no_tools_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=f"--tools=.*own.py: {message}"):
        Toolbox(write(tmp_path, text), Limits())


def test_another_name_of_a_function_is_no_other_tool(tmp_path):
    with Toolbox(write(tmp_path, "def f(x: int) -> int:\n    return x\nf2 = f\n"), Limits()) as box:
        assert [tool.name for tool in box.tools] == ["f"]
        assert box.run(Call("f", {"x": 1})) == 1


def test_a_missing_file_and_limits_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match=rf"--tools={tmp_path}: a folder; expected a Python file with functions"):
        Toolbox(tmp_path, Limits())
    with pytest.raises(UserError, match=r"--tools=.*nowhere.py: no such file"):
        Toolbox(tmp_path / "nowhere.py", Limits())
    with pytest.raises(ConfigError, match="--tool-seconds=0"):
        Limits(seconds=0)
    with pytest.raises(ConfigError, match="--tool-characters=0"):
        Limits(characters=0)
