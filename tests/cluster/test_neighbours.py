"""Another user of the machine (uid 65534) beside a run: what he tries is refused, and the run ends as it would alone.

Every port that a run opens is in the table of docs/security.md, with its address and what guards it.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_lm.config.root import save_config
from dist_lm.prepare.compose import compose_config
from dist_lm.storage.run_directory import WorkDirectory
from tests.cluster.launched import CODE_STEPS, SETTINGS, follow_on
from tests.cluster.neighbour import SERVED, TRIES
from tests.cluster.neighbourhood import APART
from tests.cluster.test_rlhf_run import settings as rlhf_settings
from tests.cluster.test_rlhf_run import work_of
from tests.cluster.test_with_or_without_launcher import assert_same
from tests.conftest import TINY
from tests.patience import patient
from tests.training_run import linked, write_untrained

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.heavy,
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"),
        reason="acts as another user, in a network of its own",
    ),
]
DOCS = Path(__file__).parents[2] / "docs" / "security.md"
DEADLINE_S = patient(600)
ROUNDS = 1  # of all tries, while there are ranks


def beside_a_neighbour(run: Path, *command: str, **environment: str) -> dict[str, Any]:
    """The report of `neighbourhood.py`. The neighbour can see the folder of the run and all above it.

    Args:
        environment: variables of both.
    """
    folder = Path(tempfile.mkdtemp(prefix="n", dir="/tmp"))
    folder.chmod(0o1777)
    try:
        done = subprocess.run(
            [*APART, sys.executable, "-m", "tests.cluster.neighbourhood", str(folder), str(run), *command],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            env=os.environ | environment,
        )
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["code"] == 0, report["out"][-1000:] + report["err"][-3000:]
    return report


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that everybody can enter, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp(prefix="neighbours_", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def launched_run(undisturbed: WorkDirectory, place: Path) -> dict[str, Any]:
    """Stage code by the launcher, with the settings of the undisturbed run."""
    work = follow_on(undisturbed, place / "launched")
    run = work.run("code", "default")
    timeout = f"cluster.connect_timeout_s={patient(60):.0f}"
    command = (sys.executable, "-m", "dist_lm.launch", *SETTINGS, f"work_dir={work.path}", timeout, CODE_STEPS)
    report = beside_a_neighbour(run.path, *command)
    assert_same(run, undisturbed.run("code", "default"))
    return report


@pytest.fixture(scope="module")
def door_run(undisturbed: WorkDirectory, place: Path) -> dict[str, Any]:
    """The same by torchrun alone, with the rendezvous for machines of several users."""
    work = follow_on(undisturbed, place / "door")
    run = work.run("code", "default")
    # torchrun finds the rendezvous as in an environment in which dist_lm is installed.
    installed = place / "installed" / "dist_lm-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: dist_lm\nVersion: 0\n")
    handler = "dist_lm.parallel.rendezvous:private_handler"
    (installed / "entry_points.txt").write_text(f"[torchrun.handlers]\nprivate = {handler}\n")
    path = os.pathsep.join([str(installed.parent), *sys.path[1:]])
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "private", "--nproc-per-node", "2")
    report = beside_a_neighbour(
        run.path,
        *("env", f"PYTHONPATH={path}", *torchrun),
        *("-m", "dist_lm.train", *SETTINGS, f"work_dir={work.path}", CODE_STEPS),
    )
    assert_same(run, undisturbed.run("code", "default"))
    return report


@pytest.fixture(scope="module")
def pool_run(tiny_work: WorkDirectory, place: Path) -> dict[str, Any]:
    """Stage rlhf with two ranks and a pool of actors."""
    started = linked(tiny_work, place / "started")
    write_untrained(started, "tools", 0)
    work = work_of(started, place / "rlhf")
    run = work.run("rlhf", "default")
    settings = rlhf_settings(work, "rlhf.pool.actors=1", "cluster.ranks_per_node=2")
    command = (sys.executable, "-m", "dist_lm.launch", *settings)
    report = beside_a_neighbour(run.path, *command)
    assert run.result.exists()
    return report


@pytest.fixture(scope="module")
def served_run(tiny_work: WorkDirectory, place: Path) -> Path:
    """A run that `dist-lm serve` can serve."""
    work = linked(tiny_work, place / "served")
    run = write_untrained(work, "tools", 0)
    save_config(compose_config(["stage=tools", *TINY, f"work_dir={work.path}"]), run.config)
    return run.path


def serve(run: Path, **environment: str) -> dict[str, Any]:
    return beside_a_neighbour(run, sys.executable, "-m", "tests.cluster.served_run", str(run), **environment)


@pytest.fixture(scope="module")
def keyed_server(served_run: Path) -> dict[str, Any]:
    """`dist-lm serve` with a key, which the neighbour looks for in command lines."""
    key = secrets.token_hex(16)
    return serve(served_run, DIST_LM_API_KEY=key, NEIGHBOUR_LOOKS_FOR=key)


@pytest.fixture(scope="module")
def open_server(served_run: Path) -> dict[str, Any]:
    """`dist-lm serve` without a key."""
    return serve(served_run, DIST_LM_API_KEY="")


BY_LAUNCHER = ["launched_run", "keyed_server"]
OTHERS = [pytest.param(name, marks=pytest.mark.bars) for name in ("door_run", "pool_run")]


@pytest.fixture(params=[*BY_LAUNCHER, *OTHERS])
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("attempt", [attempt.__name__ for attempt in TRIES])
def test_what_another_user_tries_is_refused(report, attempt):
    """It would find a readable token, a store or a port without a guard, a name in /tmp that is not random."""
    neighbour = report["neighbour"]
    assert neighbour["rounds"] >= ROUNDS, "the ranks were gone before everything was tried"
    assert attempt not in neighbour["could"], neighbour["could"][attempt]
    assert neighbour["refused"][attempt]


def test_without_a_key_another_user_can_ask_the_model_and_nothing_else(open_server):
    """Finds a server whose files, memory, sockets or life another user reaches, beyond what docs/serve.md says."""
    neighbour = open_server["neighbour"]
    assert neighbour["rounds"] >= ROUNDS, "the server was gone before everything was tried"
    assert neighbour["could"].keys() == {"asks_a_server_without_a_key", "asks_a_server_with_a_key_of_his"}


def test_no_command_line_holds_the_token(report):
    assert not report["secrets_seen"]


def test_the_tries_reach_the_server(keyed_server):
    """Finds tries that end before they get an answer, and a path of the API that wants no key."""
    refused = keyed_server["neighbour"]["refused"]
    everything = f"answers by status: {{401: {len(SERVED)}}}"
    assert everything in refused["asks_a_server_without_a_key"]
    assert everything in refused["asks_a_server_with_a_key_of_his"]
    for attempt in ("reads_an_environment", "reads_memory_or_descriptors", "signals_a_process", "writes_into_the_run"):
        assert set(refused[attempt]) != {"nothing is there"}


def test_the_tries_reach_what_they_try(launched_run):
    """A neighbour who finds nothing is refused nothing: it would find a program that has another name by now."""
    refused = launched_run["neighbour"]["refused"]
    found_nothing = {name for name, texts in refused.items() if set(texts) == {"nothing is there"}}
    assert found_nothing <= {"opens_shared_memory"}
    assert any("16: " in text for text in refused["calls_ray_without_a_token"]), "no port of Ray has answered"


def documented_ports() -> dict[str, str]:
    """The table of docs/security.md: a pattern for programs -> the address on one machine."""
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", DOCS.read_text(), re.MULTILINE)
    assert rows
    return dict(rows)


def test_every_port_is_in_the_documentation(report):
    """It would find a new port, and one that listens on another address than the table says."""
    table = documented_ports()
    unknown = []
    for program, address in report["ports"]:
        matching = [pattern for pattern in table if program.startswith(pattern)]
        if not matching or table[max(matching, key=len)] != address:
            unknown.append((program, address))
    assert not unknown
    assert report["ports"]
