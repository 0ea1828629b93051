"""A real Slurm of three nodes, all of them this machine, in a namespace of its own."""

import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from dist_lm.storage.process import is_alive
from tests.cluster.waiting import eventually
from tests.slurm.namespace import Namespace

CHECKOUT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "nsenter", "ip", "ss")
NODES = ("n1", "n2", "n3")
CPUS = 2
ADDRESS = "127.0.1.{}"  # of node number ...
PORT = 17000
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={root}/state
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmdSpoolDir={root}/spool/%n
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
PlugStackConfig={root}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=60
# a node that is gone must not hold up the question whether the others are there
TreeWidth=1024
MessageTimeout=5
SlurmdTimeout=15
KillWait=5
OverTimeLimit=0
InactiveLimit=0
MinJobAge=600
JobRequeue=1
MaxNodeCount=16
NodeName=n[1-{count}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} RealMemory={memory} \
State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None: there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Slurm of one's own takes root on Linux"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge iproute2)" if absent else None


OWN = ("munged", "slurmctld", "slurmd", "slurmscriptd", "slurmstepd")  # processes of Slurm itself


class RealSlurm:
    """munged, slurmctld and a slurmd a node."""

    def __init__(self, root: Path, shared: Path) -> None:
        """Start it.

        Args:
            root: directory of its own.
            shared: what jobs may write to; `root` lies in it.
        """
        self.root, self.shared = root, shared
        for name in ("state", "spool", "log", "run", "munge", "home"):
            (root / name).mkdir(parents=True)
        hosts = [f"127.0.0.1 localhost {socket.gethostname()}"]
        hosts += [f"{ADDRESS.format(number)} {node}" for number, node in enumerate(NODES, 1)]
        (root / "hosts").write_text("\n".join(hosts) + "\n")
        self._write_configuration()
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(root / "home"),
            "LANG": "C.UTF-8",
            "SLURM_CONF": str(root / "slurm.conf"),
            "DIST_LM_VENV": sys.prefix,
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        venv = Path(sys.prefix)
        self.namespace = Namespace(root / "hosts", shared, [CHECKOUT, venv])
        try:
            self._start()
        except BaseException:
            self.namespace.close()
            raise

    def close(self) -> None:
        """End it and all its jobs."""
        self.namespace.close()

    def run(self, *command: str, seconds: float = 60, check: bool = True) -> str:
        """Run a command inside; what it printed."""
        return self.namespace.run(*command, environ=self.environ, directory=self.shared, seconds=seconds, check=check)

    def submit(self, script: str, *arguments: str, options: Iterable[str] = (), directory: Path | None = None) -> int:
        """sbatch a script of this checkout; the job's id."""
        command = ["sbatch", "--parsable", *options, str(CHECKOUT / script), *arguments]
        output = self.namespace.run(*command, environ=self.environ, directory=directory or self.shared)
        return int(output.strip().splitlines()[-1])

    def job(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(job))
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def state(self, job: int) -> str:
        """JobState, such as RUNNING."""
        return self.job(job)["JobState"]

    def wait(self, job: int, *states: str, seconds: float = 480) -> str:
        """Wait until a job is in one of `states`, or, without any, has ended."""
        wanted = states or ENDED

        def reached() -> str | None:
            state = self.state(job)
            assert state in (*wanted, "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"), (
                f"{state} while waiting for {wanted}"
            )
            return state if state in wanted else None

        state = eventually(f"job {job} is in {wanted}", reached, seconds)
        assert state is not None
        return state

    def wait_for_restart(self, job: int, life: int, seconds: float = 480) -> None:
        """Wait until Slurm has started a job for the `life`-th time again; a failure shows what Slurm knows of it."""
        try:
            eventually(f"job {job} has {life} restarts", lambda: self.job(job)["Restarts"] == str(life), seconds)
        except BaseException:
            print(self.run("scontrol", "show", "job", str(job)), self.run("sinfo", "--Node", "--long"), sep="\n")
            raise

    def job_processes(self) -> list[psutil.Process]:
        """The living processes of jobs, Slurm's own left out."""
        names = ((process, _name(process)) for process in self.namespace.processes())
        return [process for process, name in names if name and not name.startswith(OWN)]

    def find(self, part: str, node: str | None = None) -> list[psutil.Process]:
        """Processes of jobs whose command line contains `part`, on one node or on all."""
        found = []
        for process in self.job_processes():
            try:
                on = node is None or process.environ().get("SLURMD_NODENAME") == node
                if on and part in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def raylet(self, node: str) -> psutil.Process | None:
        """The raylet of a node."""
        return next((found for found in self.find("raylet", node) if _name(found) == "raylet"), None)

    def nodes(self, job: int) -> list[str]:
        """The nodes of a running job, that of its batch script first."""
        facts = self.job(job)
        names = self.run("scontrol", "show", "hostnames", facts["NodeList"]).split()
        return sorted(names, key=lambda name: name != facts["BatchHost"])

    def head(self, job: int) -> str:
        """The node of its batch script, and of Ray's head."""
        return self.nodes(job)[0]

    def worker(self, job: int) -> str:
        """Another one of its nodes."""
        return self.nodes(job)[1]

    def kill_node(self, node: str) -> None:
        """Switch a node off: its slurmd, its steps, and all they run.

        Power goes everywhere at once: an srun or a batch script that saw a part of its job end would have time to end
        the guards on other nodes. So all processes are stopped before the first one is killed, and children are killed
        before their parents: a stopped process group that loses its parent is woken by SIGHUP.
        """
        stopped: dict[int, psutil.Process] = {}

        def stand_still() -> bool:
            roots = [*self._slurmd(node), *self._steps(node)]
            below = [child for root in roots for child in _children(root)]
            new = [process for process in (*roots, *below, *self.find("", node)) if process.pid not in stopped]
            for process in new:
                stopped[process.pid] = process
                _send(process, signal.SIGSTOP)
            return not new

        def gone() -> bool:
            left = [process for process in stopped.values() if is_alive(process)]
            parents = {process.pid for process in left}
            for process in sorted(left, key=lambda process: -_depth(process, parents)):
                _send(process, signal.SIGKILL)
            return not left

        eventually(f"all processes of {node} stand still", stand_still)
        eventually(f"{node} is off", gone)

    def start_node(self, node: str) -> None:
        """Switch a node on."""
        self.run("slurmd", "-f", self.environ["SLURM_CONF"], "-N", node)

    def idle(self) -> set[str]:
        """Nodes that wait for work."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        return {line.split()[0] for line in lines if line.split()[1] == "idle"}

    def recover(self) -> None:
        """No jobs, and every node idle, as at the start."""
        self.run("scancel", "--user=root", check=False)
        for node in NODES:
            if not self._slurmd(node):
                self.start_node(node)
        eventually("every node is idle", self._all_idle, 180)

    def _all_idle(self) -> bool:
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        for line in lines:
            node, state = line.split()[:2]
            if "drain" in state or state == "down":
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        return self.idle() == set(NODES)

    def _write_configuration(self) -> None:
        (self.root / "munge" / "munge.key").write_bytes(os.urandom(1024))
        (self.root / "munge" / "munge.key").chmod(0o400)
        (self.root / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        (self.root / "plugstack.conf").write_text("")
        configuration = SLURM_CONF.format(
            host=socket.gethostname().partition(".")[0],
            root=self.root,
            port=PORT,
            first=PORT + 1,
            last=PORT + len(NODES),
            count=len(NODES),
            cpus=CPUS,
            memory=psutil.virtual_memory().total // 2**21,
        )
        (self.root / "slurm.conf").write_text(configuration)

    def _start(self) -> None:
        munge = self.root / "munge"
        self.run(
            *("munged", "--force", f"--key-file={munge}/munge.key", f"--socket={munge}/socket"),
            *(f"--pid-file={self.root}/run/munged.pid", f"--log-file={self.root}/log/munged.log"),
            f"--seed-file={munge}/seed",
        )
        self.run("slurmctld", "-c", "-f", self.environ["SLURM_CONF"])
        for node in NODES:
            (self.root / "spool" / node).mkdir()
            self.start_node(node)
        eventually("every node is idle", lambda: self.idle() == set(NODES))

    def _slurmd(self, node: str) -> list[psutil.Process]:
        return [process for process in self.namespace.processes() if _is_slurmd(process, node)]

    def _steps(self, node: str) -> list[psutil.Process]:
        """The slurmstepd of a node: their sockets lie in its spool directory."""
        lines = [line for line in self.namespace.sockets().splitlines() if f"{self.root}/spool/{node}/" in line]
        pids = {int(pid) for line in lines for pid in re.findall(r"pid=(\d+)", line)}
        return [process for process in self.namespace.processes() if process.pid in pids]


def _name(process: psutil.Process) -> str:
    """Of a process that may end meanwhile: empty then."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _is_slurmd(process: psutil.Process, node: str) -> bool:
    try:
        return process.name() == "slurmd" and process.cmdline()[-2:] == ["-N", node]
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _depth(process: psutil.Process, among: set[int]) -> int:
    """How many of its ancestors are in `among`."""
    try:
        return sum(parent.pid in among for parent in process.parents())
    except psutil.NoSuchProcess:
        return 0


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
