"""Programs that try to get out of the sandbox; `greedy_programs` has those that take more than they may.

Each says with which outcome it must end, and in which words the kernel refuses: an escape that fails for another
reason, a mistake in it for example, fails its test. `{...}` stand for things of the machine outside (see `outside`).
"""

from dataclasses import dataclass

from dist_lm.sandbox.program import Outcome

NO = "Operation not permitted|Permission denied|Function not implemented|Bad system call"
ABSENT = "No such file or directory|Permission denied|Not a directory"
READ_ONLY = "Read-only file system|Permission denied"


@dataclass(frozen=True)
class Escape:
    name: str
    source: str
    says: str = NO  # pattern in its output
    outcome: Outcome = "failed"
    language: str = "python"
    only_seccomp: bool = False  # namespaces alone let it happen, inside the sandbox


CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if libc.syscall(ctypes.c_long(number), *given) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def vector(address):
    return address.to_bytes(8, "little") + (8).to_bytes(8, "little")
"""
"""x86_64 numbers; `call` raises what the kernel answers."""


def refused(*attempts: str) -> str:
    """Every one of these statements must raise OSError, or the escape has succeeded; the last one's error is shown."""
    tries = "".join(
        f"\ntry:\n    {one}\nexcept OSError as error:\n    last = error\nelse:\n    raise SystemExit(0)\n"
        for one in attempts
    )
    return f"{CALL}{tries}\nraise last\n"


def reading(*paths: str) -> str:
    return refused(*(f"open({path!r}, 'rb').read(1)" for path in paths))


ESCAPES = [
    # files
    Escape(
        "writes_outside",
        refused(
            *(
                f"open({path!r}, 'w')"
                for path in (
                    "/x",
                    "/usr/x",
                    "/etc/x",
                    "/dev/x",
                    "/usr/bin/env",
                    "{checkout}/x",
                    "{folder}/x",
                    "{prefix}/x",
                )
            )
        ),
        f"{READ_ONLY}|{ABSENT}",
    ),
    Escape(
        "writes_the_kernels_settings",
        refused(
            "open('/proc/sys/kernel/core_pattern', 'w')",
            "open('/proc/sysrq-trigger', 'w')",
            "open('/sys/kernel/uevent_helper', 'w')",
        ),
        ABSENT,
    ),
    Escape(
        "removes_files",
        refused(
            "os.remove('{secret}')",
            "os.remove('/usr/bin/env')",
            "os.rename('/usr/bin', '/usr/x')",
        ),
        f"{READ_ONLY}|{ABSENT}",
    ),
    Escape("reads_shadow", reading("/etc/shadow", "/etc/passwd", "/etc/hosts"), ABSENT),
    Escape("reads_home", refused("os.listdir('{home}/.ssh')", "open('{home}/.bashrc')", "os.listdir('/home')"), ABSENT),
    Escape("reads_the_checkout", reading("{checkout}/README.md", "{checkout}/dist_lm/train.py"), ABSENT),
    Escape("reads_tmp_of_others", reading("{secret}"), ABSENT),
    Escape(
        "follows_a_symlink",
        "import os\nos.symlink('{secret}', '/tmp/link')\nos.symlink('/', '/tmp/root')\n"
        + reading("/tmp/link", "/tmp/root/{secret}"),
        ABSENT,
    ),
    Escape(
        "goes_through_proc",
        reading(
            "/proc/1/root/{secret}",
            "/proc/self/root/{secret}",
            "/proc/1/cwd/../{secret}",
            "/proc/self/root/../..{secret}",
        ),
        ABSENT,
    ),
    Escape(
        "hard_links",
        refused("os.link('/usr/bin/env', '/tmp/env')", "os.link('{secret}', '/tmp/secret')"),
        f"{READ_ONLY}|{ABSENT}|cross-device",
    ),
    Escape(
        "reads_devices",
        refused(
            *(
                f"open({path!r})"
                for path in ("/dev/mem", "/dev/kmsg", "/dev/sda", "/dev/vda", "/dev/tty", "/dev/fuse", "/dev/kvm")
            )
        ),
        ABSENT,
    ),
    Escape(
        "makes_a_device",
        refused("os.mknod('/tmp/null', 0o20666, os.makedev(1, 3))", "os.mknod('/tmp/disk', 0o60666, os.makedev(8, 0))"),
    ),
    Escape(
        "opens_by_handle",
        refused("call(303, -100, b'/tmp', bytes(136), bytes(8), 0)", "call(304, -100, bytes(136), 0)"),
        NO + "|Invalid argument",
    ),
    Escape(
        "attaches_a_database",
        "attach '/usr/x.db' as x; create table x.t(a)",
        "other databases are refused",
        language="sql",
    ),
    Escape(
        "loads_an_extension",
        "select load_extension('/usr/lib/x86_64-linux-gnu/libm.so.6')",
        "not authorized",
        language="sql",
    ),
    # secrets
    Escape(
        "reads_the_environment",
        "import os\nassert '{token}' not in repr(os.environ)\n"
        + refused(
            "assert b'{token}' not in open('/proc/1/environ', 'rb').read()", "open('/proc/1/environ', 'rb').read()"
        ),
    ),
    Escape(
        "sees_processes",
        "import os\npids = [n for n in os.listdir('/proc') if n.isdigit()]\nassert len(pids) > 3, f'only {{pids}}'",
        r"only \[",
    ),
    Escape(
        "sees_descriptors",
        """
import os
found = [n for n in range(1000) if os.path.exists(f"/proc/self/fd/{{n}}")]
assert found != [0, 1, 2], "only the three"
""",
        "only the three",
    ),
    Escape("reads_memory_of_the_first_process", reading("/proc/1/mem", "/proc/1/maps") + reading("/proc/1/fd/0"), NO),
    Escape(
        "uses_keyrings",
        refused(
            "call(248, b'user', b'x', b'secret', 6, -3)", "call(250, 0, -3, 1)", "call(249, b'user', b'x', None, -3)"
        ),
        only_seccomp=True,
    ),
    # network
    Escape(
        "connects_by_tcp",
        "import socket\nsocket.create_connection(('127.0.0.1', {tcp}), timeout=5)",
        NO + "|unreachable|refused",
    ),
    Escape(
        "connects_by_tcp_6",
        "import socket\nsocket.create_connection(('::1', {tcp}), timeout=5)",
        NO + "|unreachable|refused|assign requested",
    ),
    Escape(
        "sends_by_udp",
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {tcp}))",
        NO + "|unreachable",
    ),
    Escape("connects_by_tcp_bash", "exec 5<>/dev/tcp/127.0.0.1/{tcp}", NO + "|unreachable|refused", language="bash"),
    Escape(
        "connects_to_a_unix_socket", "import socket\nsocket.socket(socket.AF_UNIX).connect('{unix}')", f"{NO}|{ABSENT}"
    ),
    Escape(
        "connects_to_an_abstract_socket",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0{abstract}')",
        NO + "|refused",
    ),
    Escape(
        "sends_to_the_kernel", "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)", only_seccomp=True
    ),
    Escape(
        "keeps_files_on_their_way",
        refused("__import__('socket').socketpair()[0].sendmsg([b'x'])", "call(307, 0, bytes(64), 1, 0)"),
        only_seccomp=True,
    ),
    Escape("sends_raw_packets", "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)"),
    Escape(
        "talks_to_the_host_of_a_machine",
        "import socket\ns = socket.socket(40, socket.SOCK_STREAM)\ns.settimeout(0.1)\ns.connect((2, 1))",
        NO + "|not supported|No such device|reset|timed out",
        only_seccomp=True,
    ),
    # other processes, the kernel
    Escape(
        "kills_the_parent",
        """
import os, signal
os.kill(1, signal.SIGKILL)
os.kill(1, signal.SIGSTOP)
raise OSError("Operation not permitted, in effect")
""",
    ),
    Escape(
        "kills_processes_outside", refused("os.kill({outside}, 9)", "os.killpg({outside}, 9)"), NO + "|No such process"
    ),
    Escape(
        "limits_the_parent",
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))\n"
        + refused(
            "resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))", "call(302, (1 << 32) + 1, 7, bytes(16), None)"
        ),
        only_seccomp=True,
    ),
    Escape(
        "schedules_the_parent",
        refused(
            "os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))",
            "os.sched_setaffinity(1, {{0}})",
            "os.setpriority(os.PRIO_PROCESS, 1, 19)",
            "call(251, 1, 1, 3 << 13)",
        ),
    ),
    Escape(
        "traces_the_parent",
        refused(
            "call(101, 16, 1, 0, 0)",
            "call(310, 1, vector(id(bytes(9)) + 32), 1, vector(id(0)), 1, 0)",
            "call(438, os.pidfd_open(1), 0, 0)",
        ),
    ),
    Escape(
        "mounts",
        refused(
            "call(165, b'tmpfs', b'/tmp', b'tmpfs', 0, None)",
            "call(166, b'/tmp', 2)",
            "call(165, None, b'/', None, 4096 | 32, None)",
            "call(430, b'tmpfs', 0)",
        ),
    ),
    Escape(
        "makes_namespaces",
        refused(
            "call(272, 0x10000000)",
            "call(272, 0x20000)",
            "call(56, 0x10000011, 0, 0, 0, 0)",
            "call(435, bytes(88), 88)",
        ),
        only_seccomp=True,
    ),
    Escape(
        "joins_namespaces",
        refused("call(308, os.open('/proc/1/ns/mnt', 0), 0)", "call(308, os.pidfd_open(1), 0x10000000)"),
    ),
    Escape("changes_the_root", refused("os.chroot('/tmp')", "call(155, b'/tmp', b'/tmp')")),
    Escape(
        "becomes_root",
        refused("os.setuid(0)", "os.setresuid(0, 0, 0)", "os.setgroups([0])", "os.setgid(0)"),
        NO + "|Invalid argument",
    ),
    Escape(
        "uses_setuid_programs",
        "su -c id; mount /x /y; [ -u /usr/bin/su ] && exec /usr/bin/su -c id; id -u | grep -qx 0",
        "",
        language="bash",
    ),
    Escape(
        "takes_capabilities",
        refused(
            "call(126, (0x20080522).to_bytes(4, 'little') + bytes(4), b'\\xff' * 24)",
            "open('/proc/self/uid_map', 'wb', 0).write(b'0 0 1')",
        ),
    ),
    Escape(
        "loads_into_the_kernel",
        refused(
            "call(321, 0, bytes(72), 72)",
            "call(175, bytes(8), 8, b'')",
            "call(246, 0, 0, 0, 0)",
            "call(298, bytes(112), 0, -1, -1, 0)",
            "call(169, 0xfee1dead, 672274793, 0, 0)",
        ),
    ),
    Escape(
        "asks_the_kernel_to_work", refused("call(425, 1, bytes(120))", "call(206, 9_000, bytes(8))"), only_seccomp=True
    ),
    Escape("handles_page_faults", refused("call(323, 0)"), only_seccomp=True),
    Escape(
        "watches_what_the_host_opens",
        refused(
            "call(254, libc.inotify_init(), b'/usr/bin', 0xfff)",
            "call(253)",
            "call(294, 0)",
            "call(300, 0, 0)",
            "__import__('fcntl').fcntl(os.open('/usr/bin', 0), 1026, 0xffffff)",
            "call(451, os.open('/usr/bin/env', 0), bytes(16), bytes(40), 0)",
        ),
        only_seccomp=True,
    ),
    Escape(
        "delays_what_the_host_opens",
        refused("__import__('fcntl').fcntl(os.open('/usr/bin/env', 0), 1024, 0)"),
        only_seccomp=True,
    ),
    Escape(
        "makes_the_host_write_to_its_disks",
        """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
NO_FILE = 999
reached = [number for number in (306, 74, 75, 277, 221, 187) if libc.syscall(number, NO_FILE, 0, 0, 0)]
assert reached, "Operation not permitted, in effect"
""",
        only_seccomp=True,
    ),
    Escape("changes_the_clock", refused("call(227, 0, bytes(16))", "call(164, bytes(16), None)")),
    Escape("changes_the_name", refused("call(170, b'x', 1)")),
    Escape(
        "takes_system_v_memory",
        refused("call(29, 0, 1 << 30, 0o1600)", "call(68, 0, 0o1600)", "call(240, b'x', 66, 0o600, None)"),
        only_seccomp=True,
    ),
    Escape(
        "calls_in_32_bits",
        """
import ctypes, mmap
getpid = bytes.fromhex("b814000000cd80c3")  # by int 0x80
memory = mmap.mmap(-1, 4096, prot=7)
memory.write(getpid)
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
""",
        "",
        only_seccomp=True,
    ),
    Escape(
        "calls_by_x32_numbers",
        refused("call(0x40000000 | 165, b'tmpfs', b'/tmp', b'tmpfs', 0, None)", "call(463, 0)"),
        NO + "|Invalid argument",
    ),
    Escape(
        "types_into_a_terminal",
        refused("__import__('fcntl').ioctl(0, 0x5412, b'x')", "open('/dev/ptmx', 'w')"),
        f"{READ_ONLY}|{ABSENT}",
    ),
]
