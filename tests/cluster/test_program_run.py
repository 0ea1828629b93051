"""Stage rlhf with a program that speaks HTTP, as its users meet it: a command, a record, replay and forks."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dist_lm.__main__ import app
from dist_lm.errors import UserError
from dist_lm.rlhf.episodes import read_episodes
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from tests.cluster.test_environment_run import ITERATIONS, prepared, started_work
from tests.training_run import train

pytestmark = [pytest.mark.cluster, pytest.mark.heavy]
__all__ = ["started_work"]  # a fixture

# Without packages, so that it starts fast.
AGENT = """
import json
import os
import sys
import urllib.error
import urllib.request


def post(url, body, key):
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as response:
        return json.loads(response.read())


task = json.loads(sys.stdin.readline())
messages = [{"role": "user", "content": f"Go {task['data']['go']}"}]
text = ""
for _ in range(2):
    body = {"model": "policy", "messages": messages, "temperature": 0.1}
    choice = post(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, os.environ["OPENAI_API_KEY"])["choices"][0]
    text += choice["message"]["content"]
    messages += [choice["message"], {"role": "user", "content": f"Again, after {len(text)}"}]
    if task["data"]["go"] == 3:
        sys.exit("three")
share = sum(c > "m" for c in text) / max(1, len(text))
post(task["reward_url"], {"reward": share}, task["reward_key"])
"""


@pytest.fixture(scope="module")
def finished(started_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("program")
    (folder / "agent.py").write_text(AGENT)
    environment = f'rlhf.environment="program:{sys.executable} -S {folder / "agent.py"}"'
    run = prepared(started_work, folder, "stage.checkpoint_every=1", environment)
    train(run, ranks=1)
    return run


def agent_of(run: RunDirectory) -> Path:
    (word,) = {word.strip("'\"") for word in run.config.read_text().split() if "agent.py" in word}
    return Path(word)


def replay(run: RunDirectory, *options: str) -> Result:
    return CliRunner().invoke(app, ["replay", str(run.path), *options])


def test_a_run_with_a_program_is_recorded_replayed_and_forked(finished):
    """Finds a command that a run reads otherwise, sampling fields of a request that change a turn, a failure that
    becomes a number, and observations of HTTP that are not those of the record when they are executed again."""
    episodes = [episode for path in sorted(finished.conversations.iterdir()) for episode in read_episodes(path)]
    assert len(episodes) == ITERATIONS * 9
    failures = {episode.verdict.failure_reason for episode in episodes}
    assert failures == {None, "crashed"}
    assert {"three"} == {e.verdict.detail.partition("(")[2].strip(")") for e in episodes if not e.verdict.valid}

    lines = [json.loads(line) for line in replay(finished, "--json").stdout.splitlines()]
    assert [line["equal"] for line in lines] == [True] * ITERATIONS
    verified = replay(finished, "--verify")
    assert verified.exit_code == 0, verified.output
    assert verified.stdout.count(": equal") == ITERATIONS

    valid = next(e for e in episodes if e.verdict.valid and len(e.turns) == 2 and e.position < 3)
    rollout = str(3 * valid.position + valid.sample + 1)
    fork = ("--iteration", "1", "--rollout", rollout, "--fork", "2")
    assert replay(finished, *fork).exit_code == 0
    edited = replay(finished, *fork, "--edit", "zzz")
    assert edited.exit_code == 0, edited.output
    assert "zzz" in edited.stdout


def test_a_program_that_has_changed_is_refused(finished):
    """Finds conversations of one program that are executed again by another one."""
    config = finished.config.read_text()
    file = agent_of(finished)
    name = next(line for line in config.splitlines() if "program:" in line).partition(": ")[2].strip("'\"")
    finished.note_files({f"rlhf.environment={name}": [file]})
    file.write_text(AGENT.replace("Again", "And again"))
    try:
        error = replay(finished, "--verify").exception
        assert isinstance(error, UserError)
        assert "agent.py: has changed since" in str(error)
    finally:
        file.write_text(AGENT)
