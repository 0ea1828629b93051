"""Programs that take more than they may: CPU time, processes, memory, files, output."""

from tests.sandbox.escapes import Escape, refused

GREEDY = [
    Escape("endless_loop", "while True: pass", "", "timeout"),
    Escape("endless_loop_bash", "while :; do :; done", "", "timeout", "bash"),
    Escape(
        "endless_query",
        "with recursive t(n) as (select 1 union all select n + 1 from t) select count(*) from t",
        "",
        "timeout",
        "sql",
    ),
    Escape("sleeps", "import time\ntime.sleep(60)", "", "timeout"),
    Escape(
        "ignores_signals",
        """
import signal
for n in range(1, 65):
    try:
        signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
""",
        "",
        "timeout",
    ),
    Escape("loops_in_many_processes", "import os\nfor _ in range(3): os.fork()\nwhile True: pass", "", "timeout"),
    Escape(
        "lets_nobody_count_its_children",
        """
import os, signal, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for _ in range(150):
    child = os.fork()
    if child == 0:
        while time.process_time() < 0.02:
            pass
        os._exit(0)
    try:
        os.waitpid(child, 0)
    except ChildProcessError:
        pass
""",
        "",
        "timeout",
    ),
    Escape(
        "takes_a_name_that_is_no_text",
        "import ctypes\nctypes.CDLL(None).prctl(15, b'\\xff) R 1 (\\xfe', 0, 0, 0)\nwhile True: pass",
        "",
        "timeout",
    ),
    Escape(
        "runs_a_file_whose_name_is_no_text",
        "cp /usr/bin/sleep $'/tmp/\\xff 1) (\\n'; $'/tmp/\\xff 1) (\\n' 60",
        "",
        "timeout",
        "bash",
    ),
    Escape("fork_bomb", "import os\nwhile True: os.fork()", "Resource temporarily unavailable"),
    Escape(
        "fork_bomb_bash",
        "bomb() { bomb | bomb & }; bomb; wait; sleep 60",
        "Resource temporarily unavailable",
        "timeout",
        "bash",
    ),
    Escape(
        "thread_bomb",
        """
import threading, time
for _ in range(1000):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
""",
        "can't start new thread",
    ),
    Escape("ten_gigabytes", "x = bytearray(10 << 30)", "MemoryError", "memory"),
    Escape("grows", "x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError", "memory"),
    Escape(
        "fills_tmp",
        """
for name in "xyz":
    with open(f"/tmp/{{name}}", "wb") as file:
        file.write(bytes(15 << 20))
""",
        "No space left on device",
    ),
    Escape("fills_tmp_with_files", "for n in range(10**6): open(f'/tmp/{n}', 'w').close()", "No space left on device"),
    Escape("large_file", "with open('/tmp/x', 'wb') as f: f.truncate(1 << 30)", "File too large"),
    Escape("many_open_files", "files = [open('/dev/null') for _ in range(10000)]", "Too many open files"),
    Escape("huge_output", "while True: print('x' * 10000)", "x", "output"),
    Escape("huge_errors", "import os\nwhile True: os.write(2, b'x' * 10000)", "x", "output"),
    Escape("zombies", "import os\nwhile True:\n    if os.fork() == 0: os._exit(0)", "Resource temporarily unavailable"),
    Escape(
        "raises_limits",
        """
import resource
for name in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
    resource.setrlimit(name, (-1, -1))
""",
        "not allowed to raise maximum limit",
    ),
    Escape(
        "takes_the_machine",
        refused(
            "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))",
            "os.nice(-5)",
            "open('/proc/self/oom_score_adj', 'wb', 0).write(b'-1000')",
        ),
    ),
    Escape("memory_without_files", refused("os.memfd_create('x')"), only_seccomp=True),
]
