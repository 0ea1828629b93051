"""Ranks of one machine meet where no other user comes, under torchrun and under programs of ours."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from dist_lm.errors import ConfigError
from dist_lm.parallel import rendezvous
from dist_lm.parallel.rendezvous import (
    BACKEND,
    ERROR_FILE,
    NODES_BACKEND,
    VARIABLE,
    address_handler,
    private_handler,
    store_file,
)
from dist_lm.storage.process import reserve_port
from tests.patience import patient

RANK = """
import json, os, sys
from pathlib import Path
from dist_lm.parallel.rendezvous import store_file, store_of_ranks

rank, attempt = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
store = store_of_ranks(60)
assert store.num_keys() <= 2, "keys of an earlier start"
store.set(f"from_{rank}", attempt)
assert store.get(f"from_{1 - rank}") == attempt.encode()
file = store_file(os.environ)
Path(sys.argv[1], f"{attempt}_{rank}").write_text(json.dumps([str(file), file.parent.stat().st_mode & 0o777]))
del store
store = store_of_ranks(60)
assert store.get(f"from_{1 - rank}") == attempt.encode(), "the second object of a rank sees other keys"
sys.exit(attempt == "0")
"""
LISTENING = """
import sys
import psutil
from dist_lm.cluster import torchrun
from torch.distributed.elastic.agent.server import local_elastic_agent

def listening(*_):
    ports = [c.laddr for c in psutil.Process().net_connections() if c.status == "LISTEN"]
    print("PORTS", ports, flush=True)

wrapped = local_elastic_agent.LocalElasticAgent._start_workers
local_elastic_agent.LocalElasticAgent._start_workers = lambda *a: (listening(), wrapped(*a))[1]
torchrun.main()
"""


@pytest.mark.heavy
@pytest.mark.cluster
@pytest.mark.parametrize("door", ["agent", pytest.param("plain", marks=pytest.mark.bars)])
def test_ranks_meet_in_a_private_folder_and_anew_after_a_restart(tmp_path, door):
    """It would find a store that other users write to, or one that still holds keys of ranks that have failed."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--master-port", "0"]
    if door == "agent":
        command = [sys.executable, "-c", LISTENING, str(os.getpid()), "2", "--rdzv-backend", BACKEND]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", "--max-restarts", "1", str(script), str(tmp_path)],
        env=os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=patient(120),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stores = set()
    for attempt in range(2):
        [(file, mode)] = {tuple(json.loads((tmp_path / f"{attempt}_{rank}").read_text())) for rank in range(2)}
        assert Path(file).is_relative_to(tmp_path)
        stores.add(file)
    assert len(stores) == 2
    if door == "agent":
        assert done.stdout.count("PORTS []") == 2, done.stdout
        assert mode == 0o700
        assert not list(tmp_path.glob("dlm-*")), "something stays behind"


NODE = """
import os, sys
import psutil
from dist_lm.parallel.rendezvous import store_of_ranks

store, rank = store_of_ranks(60), int(os.environ["RANK"])
store.set(f"from_{rank}", "here")
assert store.get(f"from_{1 - rank}") == b"here"
torchrun = psutil.Process(os.getppid())
places = [[c.laddr.ip, c.laddr.port] for c in torchrun.net_connections() if c.status == "LISTEN"]
print("LISTENS", rank, places, flush=True)
store.set(f"done_{rank}", "")
store.wait([f"done_{1 - rank}"])
"""


@pytest.mark.heavy
@pytest.mark.cluster
@pytest.mark.skipif(sys.platform != "linux", reason="other loopback addresses exist on Linux only")
def test_ranks_of_two_nodes_meet_on_the_address_of_the_first_node_alone(tmp_path):
    """It would find a store that listens on every address, and nodes that all wait for another one's store."""
    script = tmp_path / "rank.py"
    script.write_text(NODE)
    with reserve_port() as reserved:
        port = reserved.getsockname()[1]
        place = ("--rdzv-backend", NODES_BACKEND, "--rdzv-endpoint", f"127.0.0.3:{port}", "--nnodes", "2")
        command = (sys.executable, "-m", "dist_lm.cluster.torchrun", str(os.getpid()), "2", *place)
        nodes = [
            subprocess.Popen([*command, "--rdzv-conf", f"rank={node}", str(script)], stdout=subprocess.PIPE, text=True)
            for node in range(2)
        ]
        try:
            said = [node.communicate(timeout=patient(120))[0] for node in nodes]
        finally:
            for node in nodes:
                node.kill()
    assert said == [f"LISTENS 0 [['127.0.0.3', {port}]]\n", "LISTENS 1 []\n"]


def test_a_folder_that_others_enter_is_refused_by_name(tmp_path):
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match=f"{tmp_path}: mode 0755"):
        store_file({VARIABLE: str(tmp_path / "store")})
    tmp_path.chmod(0o700)
    assert store_file({VARIABLE: str(tmp_path / "store")}) == tmp_path / "store"

    # torchrun's own folder: what counts is the one that it has made with mode 0700
    (tmp_path / "none_abc").mkdir(mode=0o700)
    (tmp_path / "none_abc" / "attempt_0" / "1").mkdir(parents=True)
    ranks = {ERROR_FILE: str(tmp_path / "none_abc" / "attempt_0" / "1" / "error.json"), "WORLD_SIZE": "2"}
    assert store_file(ranks | {"LOCAL_WORLD_SIZE": "2"}) == tmp_path / "none_abc" / "attempt_0" / "store"
    assert store_file(ranks | {"LOCAL_WORLD_SIZE": "1"}) is None, "ranks of two nodes have no file in common"
    (tmp_path / "none_abc").chmod(0o777)
    with pytest.raises(ConfigError, match="none_abc: mode 0777"):
        store_file(ranks | {"LOCAL_WORLD_SIZE": "2"})


def test_torchrun_finds_our_rendezvous_by_their_entry_points():
    import tomllib

    project = tomllib.loads(Path(rendezvous.__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
    handlers = {
        name: EntryPoint(name, value, "torchrun.handlers").load()()
        for name, value in project["entry-points"]["torchrun.handlers"].items()
    }
    # torchrun calls what the entry point names, and registers the result, which must be that of our own torchrun
    assert handlers == {BACKEND: private_handler(), NODES_BACKEND: address_handler()}
