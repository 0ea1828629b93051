"""`dist-lm serve`: from a run to an address, and to its end by a signal."""

import os
import signal
import subprocess
import sys

import httpx
import pytest

from dist_lm import __main__ as program
from dist_lm.storage.run_directory import RunDirectory
from tests.patience import patient


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("options", "first_line"),
    [
        ((), "1 model: weights "),
        pytest.param(("--actors", "1"), "1 actor at 127.0.0.1", marks=[pytest.mark.cluster, pytest.mark.heavy]),
    ],
)
def test_a_run_is_served_until_a_signal(small_run: RunDirectory, options: tuple[str, ...], first_line: str):
    """Finds a server that does not start, answers with other weights, or leaves after a signal with an error."""
    command = [sys.executable, "-m", "dist_lm", "serve", str(small_run.path), "--port", "0", "--device", "cpu"]
    command += options
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout
            assert process.stdout.readline().startswith(first_line)
            line = process.stdout.readline()
            assert line.startswith("code/small/step_00000020: http://127.0.0.1:")
            assert "/v1, without a key; chat page: http://127.0.0.1:" in line
            url = line.split()[1].rstrip(",")
            body = {"prompt": "def add(", "max_tokens": 3, "return_token_ids": True, "seed": 1}
            answer = httpx.post(f"{url}/completions", json=body, timeout=patient(60)).json()
            assert len(answer["choices"][0]["token_ids"]) in (1, 2, 3)
            assert answer["weights_version"] == 20
            process.send_signal(signal.SIGTERM)
            assert process.wait(patient(60)) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--host", "0.0.0.0"), "--host=0.0.0.0: expected 127.0.0.1, or a key in the variable DIST_LM_API_KEY"),
        (("--port", "70000"), "--port=70000: expected 0 to 65535"),
        (("--actors", "-2"), "--actors=-2: expected a positive number, 0 for none, or -1 for as many as fit"),
        (("--ray", "127.0.0.1:6379"), "--ray=127.0.0.1:6379: expected --actors too"),
        (("--nodes", "2"), "--nodes=2: expected a positive number, with --ray; 0 for those that are there"),
        (("--max-tokens", "0"), "--max-tokens=0: expected a positive number"),
        (("--host", "203.0.113.9"), "DIST_LM_API_KEY"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_2(
    small_run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words, message: str
):
    monkeypatch.setattr("sys.argv", ["dist-lm", "serve", str(small_run.path), *words])
    with pytest.raises(SystemExit) as ending:
        program.main()
    assert ending.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
