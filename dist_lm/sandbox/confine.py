"""Confines a process by the kernel: namespaces, limits, capabilities, files (Landlock), system calls (seccomp).

This module runs inside the sandbox, which has the standard library only. It calls the kernel through ctypes: the C
library has no functions for Landlock, and glibc's wrappers differ between versions.

Sources: landlock(7), seccomp(2), user_namespaces(7), capabilities(7), Linux `include/uapi/linux/{landlock,seccomp}.h`.
"""

from __future__ import annotations

import ctypes
import os
import resource
import stat
import struct

from dist_lm.sandbox.system_calls import (
    LAST_KNOWN,
    NUMBERS,
    ONLY_FOR_ITSELF,
    REFUSED,
    REFUSED_COMMANDS,
    SENDING_FILES,
    UNKNOWN,
    WITHOUT_EFFECT,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc_at_once = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock, which a forked child then holds
_libc_at_once.syscall.restype = ctypes.c_long

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWPID | CLONE_NEWNS
NAMESPACES_OF_CALLS = CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWUTS  # for calls that the filter refuses anyway
_NEW_ANYTHING = NAMESPACES | NAMESPACES_OF_CALLS | CLONE_NEWUSER | 0x02000000  # also CLONE_NEWCGROUP
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 8, 32, 4096
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 36, 47, 4
_SIGKILL, _SIGCHLD = 9, 17
_F_ADD_SEALS = 1033
INSIDE_ID = 1000  # user and group in a run


def _checked(returned: int, call: str) -> int:
    """Returns what a system call returned; raises OSError with the name of the call if it failed."""
    if returned < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return returned


def _prctl(option: int, *arguments: int) -> None:
    four_arguments = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    _checked(_libc.prctl(option, *four_arguments), f"prctl {option}")


def dumpable(on: bool) -> None:
    """Sets whether processes of the same user may read memory, descriptors and environment of this one."""
    _prctl(_PR_SET_DUMPABLE, int(on))


def end_with_parent() -> None:
    """Lets the kernel kill this process when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)


def adopt_orphans() -> None:
    """Makes processes below this one its children when their parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


# --- namespaces ---


def become(identity: int) -> None:
    """Becomes user and group `identity` instead of root, and loses all capabilities."""
    os.setgroups([])
    os.setresgid(identity, identity, identity)
    os.setresuid(identity, identity, identity)
    dumpable(True)  # else /proc/self belongs to root and the identities of a new namespace cannot be written


_CLONE3 = 435  # the same on all architectures


def fork_into_namespaces(is_filtered: bool) -> int:
    """Forks a child that is the first process of new pid and mount namespaces.

    One call does it all, because `fork`, `unshare` and another `fork` cost three times as much. Python runs no hooks of
    `fork` in the child, so this process must have one thread. Returns the child's pid; 0 in the child.

    Args:
        is_filtered: whether a filter will refuse system calls. Else the child also gets new ipc, net and uts
            namespaces; to make and remove these takes the kernel longer than all others together.

    Raises:
        OSError: the kernel refuses.
    """
    new = NAMESPACES if is_filtered else NAMESPACES | NAMESPACES_OF_CALLS
    arguments = struct.pack("8Q", new, 0, 0, 0, _SIGCHLD, 0, 0, 0)  # struct clone_args
    child = _libc_at_once.syscall(ctypes.c_long(_CLONE3), arguments, ctypes.c_size_t(len(arguments)))
    if child < 0 and ctypes.get_errno() == _ENOSYS:  # the filter of a container refuses clone3
        numbers = NUMBERS.get(os.uname().machine, {})
        flags = ctypes.c_ulong(new | _SIGCHLD)
        if "clone" in numbers:
            child = _libc_at_once.syscall(ctypes.c_long(numbers["clone"]), flags, None, None, None, None)
    return _checked(child, "clone")


def enter_user_namespace() -> None:
    """Puts this process into a user namespace of its own, where it has all capabilities over what it makes there.

    User and group have the number `INSIDE_ID` in it, and no others exist.

    Raises:
        OSError: the kernel refuses.
    """
    user, group = os.geteuid(), os.getegid()
    _checked(_libc.unshare(ctypes.c_int(CLONE_NEWUSER)), "unshare")
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{INSIDE_ID} {user} 1")
    write("/proc/self/gid_map", f"{INSIDE_ID} {group} 1")


def write(path: str, text: str) -> None:
    """Writes to an existing file. `open` makes many objects, and a forked process copies the memory of each."""
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    os.write(file, text.encode())
    os.close(file)


def sealed(data: bytes) -> int:
    """Returns a descriptor of a file in memory with `data`, read from its beginning, that nobody can change.

    Raises:
        OSError: the kernel refuses.
    """
    file = os.memfd_create("stdin", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(file, data)
    os.lseek(file, 0, os.SEEK_SET)

    # The module `fcntl` would be loaded anew in every run.
    _checked(_libc.fcntl(file, _F_ADD_SEALS, ctypes.c_int(0xF)), "fcntl")  # seal, shrink, grow, write
    return file


def own_files(trees: Sequence[str]) -> None:
    """Covers trees with copies of their own: their files can neither be locked together with others nor watched.

    An overlay without an upper folder reads the same files, and makes inodes of its own for each mount. /etc holds a
    file beside a tree, and is copied. Needs /proc.

    Args:
        trees: folders that exist.

    Raises:
        OSError: the kernel refuses; some trees may be covered.
    """
    for tree in trees:
        _overlay(tree.encode())

    cache = b""
    if os.path.exists("/etc/ld.so.cache"):
        cache = _content("/etc/ld.so.cache")
    alternatives = -1
    if os.path.isdir("/etc/alternatives"):
        alternatives = os.open("/etc/alternatives", os.O_PATH | os.O_CLOEXEC)

    def fill() -> None:
        if cache:
            file = os.open("/etc/ld.so.cache", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.write(file, cache)
            os.close(file)
        if alternatives >= 0:
            os.mkdir("/etc/alternatives")
            _overlay(b"/etc/alternatives", b"/proc/self/fd/%d" % alternatives)
            os.close(alternatives)

    _cover("/etc", fill)


def own_devices() -> None:
    """Covers /dev with devices of its own: DEVICES and DEVICE_LINKS, read-only as a folder.

    Raises:
        OSError: this process may not make devices, or not open them; /dev is what it was.
    """

    def fill() -> None:
        for name, minor in DEVICES.items():
            os.mknod(f"/dev/{name}", stat.S_IFCHR, os.makedev(1, minor))
            os.chmod(f"/dev/{name}", 0o666)  # noqa: S103
        for name, target in DEVICE_LINKS.items():
            os.symlink(target, f"/dev/{name}")
        os.close(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))  # a container may let it be made, and not opened

    _cover("/dev", fill)


DEVICES = {"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9}
"""Name -> minor number; the major one is 1."""
DEVICE_LINKS = {
    "shm": "/tmp",
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}


def _content(path: str) -> bytes:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(file, os.fstat(file).st_size)
    finally:
        os.close(file)


def _overlay(place: bytes, source: bytes = b"") -> None:
    """Mounts a folder over `place`, read-only: `source`, or that which is there. /tmp, which is empty here, is the
    second folder that overlays need."""
    escaped = (source or place).replace(b"\\", b"\\\\").replace(b":", b"\\:").replace(b",", b"\\,")
    flags = ctypes.c_ulong(_MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    _checked(_libc.mount(b"overlay", place, b"overlay", flags, b"lowerdir=/tmp:" + escaped), "mount overlay")


def _cover(place: str, fill: Callable[[], None]) -> None:
    """Covers a folder with an empty one for a few small files or devices, which `fill` makes; then it is read-only.

    Raises:
        OSError: the kernel refuses, or `fill` failed; nothing is covered then.
    """
    path, options, flags = place.encode(), b"size=4m,mode=0755", _MS_NOSUID | _MS_NOEXEC
    _checked(_libc.mount(b"tmpfs", path, b"tmpfs", ctypes.c_ulong(flags), options), f"mount {place}")
    try:
        fill()
        again = ctypes.c_ulong(flags | _MS_REMOUNT | _MS_RDONLY)
        _checked(_libc.mount(None, path, None, again, options), f"mount {place}")
    except OSError:
        _libc.umount2(path, 2)  # MNT_DETACH
        raise


def mount_proc(options: str = "subset=pid") -> None:
    """Mounts /proc with the processes of this pid namespace; the default options hide all files about the system."""
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    _checked(_libc.mount(b"proc", b"/proc", b"proc", flags, options.encode()), "mount /proc")


def close_proc() -> None:
    """Makes /proc of this mount namespace read-only: no process writes the memory of another one by /proc/PID/mem."""
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_RDONLY | _MS_REMOUNT | _MS_BIND
    _checked(_libc.mount(None, b"/proc", None, ctypes.c_ulong(flags), None), "mount /proc")


def mount_tmp(size: int) -> None:
    """Mounts a new, empty /tmp for at most `size` bytes.

    Raises:
        OSError: the kernel refuses.
    """
    options = f"size={size},nr_inodes={max(64, size // 4096)},mode=0777".encode()
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV)
    _checked(_libc.mount(b"tmpfs", b"/tmp", b"tmpfs", flags, options), "mount /tmp")


def unmount_tmp() -> None:
    _checked(_libc.umount2(b"/tmp", 2), "unmount /tmp")  # MNT_DETACH


# --- limits and capabilities ---


def limit(limits: Mapping[int, int], hard: Mapping[int, int] | None = None) -> None:
    """Sets soft and hard limit of each resource; never above the present hard limit.

    Args:
        limits: resource (`resource.RLIMIT_...`) -> most.
        hard: the present hard limits; None: this process reads them.

    Raises:
        OSError, ValueError: the kernel refuses.
    """
    for name, most in limits.items():
        present = resource.getrlimit(name)[1] if hard is None else hard[name]
        bound = most if present == resource.RLIM_INFINITY else min(most, present)
        resource.setrlimit(name, (bound, bound))


def gain_no_capabilities() -> None:
    """Lets no file that this process or one below it executes bring capabilities; those it has, it keeps.

    Raises:
        OSError: the kernel refuses.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
            break  # past the last one of this kernel, or no right to: then there is nothing to drop
    _libc.prctl(_PR_CAP_AMBIENT, ctypes.c_ulong(_PR_CAP_AMBIENT_CLEAR_ALL), 0, 0, 0)


def drop_capabilities() -> None:
    """Gives up all capabilities of this process for good. `gain_no_capabilities` must come before.

    Raises:
        OSError: the kernel refuses.
    """
    header = struct.pack("Ii", 0x20080522, 0)  # version 3, this process
    _checked(_libc.capset(header, bytes(24)), "capset")


# --- Landlock ---

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on all architectures
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_RIGHTS_OF_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14 | 1 << 15  # a rule for a file may grant no other rights


def landlock_version() -> int:
    """Returns the version of Landlock's interface in this kernel; 0 without Landlock."""
    version = _libc.syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint(1))
    return max(0, int(version))


class FileRules:
    """Rules of Landlock: trees that may be read, and executed, and trees that may be written, too.

    It also refuses TCP, abstract sockets and signals to processes outside, as far as the version can.

    Args:
        version: of Landlock, at least 1.
        readable: trees that may be read and executed; they must exist.

    Raises:
        OSError: a tree does not exist, or the kernel refuses.
    """

    def __init__(self, version: int, readable: Sequence[str]) -> None:
        self._handled = max(rights for since, rights in _RIGHTS_OF_VERSION.items() if since <= version)
        network = 3 if version >= 4 else 0  # bind and connect of TCP
        scoped = 3 if version >= 6 else 0  # abstract sockets, signals
        # An older kernel refuses a structure with fields that it does not know.
        attribute = struct.pack("QQQ", self._handled, network, scoped)
        if version < 4:
            attribute = attribute[:8]
        elif version < 6:
            attribute = attribute[:16]
        size = ctypes.c_size_t(len(attribute))
        ruleset = _libc.syscall(ctypes.c_long(_CREATE_RULESET), attribute, size, ctypes.c_uint(0))
        self._ruleset = _checked(ruleset, "landlock")
        self.add(readable)

    def add(self, readable: Sequence[str] = (), writable: Sequence[str] = ()) -> None:
        """Adds trees. A tree is what is at that path now: what is mounted there later is another one.

        Raises:
            OSError: a tree cannot be opened, or the kernel refuses it.
        """
        for path in readable:
            _allow(self._ruleset, path, (_EXECUTE | _READ_FILE | _READ_DIR) & self._handled)
        for path in writable:
            _allow(self._ruleset, path, self._handled)

    def close(self) -> None:
        """Closes the descriptor; processes that are restricted stay so."""
        os.close(self._ruleset)

    def restrict(self) -> None:
        """Restricts this process for good, and those that it starts. It must have `gain_no_capabilities` behind it."""
        call = ctypes.c_long(_RESTRICT_SELF)
        _checked(_libc.syscall(call, ctypes.c_int(self._ruleset), ctypes.c_uint(0)), "landlock")


def _allow(ruleset: int, path: str, rights: int) -> None:
    """Adds a rule to a ruleset of Landlock: `rights` below `path`, of a file only those that files have.

    Raises:
        OSError: the path does not exist, or the kernel refuses.
    """
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
        rights &= _FILE_RIGHTS
    rule = struct.pack("=Qi", rights, descriptor)
    _checked(
        _libc.syscall(ctypes.c_long(_ADD_RULE), ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0)),
        f"landlock {path}",
    )
    os.close(descriptor)


# --- seccomp ---

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT, _SECOND_ARGUMENT = 0, 4, 16, 24  # offsets in struct seccomp_data


def system_call_filter(machine: str, own_files: bool = True, sends_files: bool = False) -> bytes | None:
    """Returns the BPF program that refuses the calls of `system_calls`; None for an architecture without a table.

    Calls of another architecture (32-bit code, x32) end the process. Calls newer than the table do not exist. A process
    sets limits and priority of no other one: the kernel checks the user only, and the first process of a run has the
    same user.

    Args:
        machine: as `os.uname` names it: x86_64 or aarch64.
        own_files: False refuses locks of whole files (`flock`), by which sandboxes could signal each other.
        sends_files: whether the process may send files over sockets.
    """
    if machine not in NUMBERS:
        return None

    numbers = NUMBERS[machine]
    refused = [*REFUSED]
    if not own_files:
        refused.append("flock")
    if not sends_files:
        refused += SENDING_FILES
    answers = {
        numbers[name]: [_step(_RETURN, _ERRNO | error)]
        for names, error in ((refused, _EPERM), (UNKNOWN, _ENOSYS), (WITHOUT_EFFECT, 0))
        for name in names
        if name in numbers
    }
    answers[numbers["fcntl"]] = [
        _step(_LOAD, _SECOND_ARGUMENT),
        *(
            step
            for command in REFUSED_COMMANDS.values()
            for step in (_step(_EQUAL, command, 0, 1), _step(_RETURN, _ERRNO | _EPERM))
        ),
        _step(_RETURN, _ALLOW),
    ]
    for name, arguments in ONLY_FOR_ITSELF.items():
        answers[numbers[name]] = [
            *(
                step
                for place, argument in zip((_FIRST_ARGUMENT, _SECOND_ARGUMENT), arguments, strict=False)
                for step in (_step(_LOAD, place), _step(_EQUAL, argument, 1, 0), _step(_RETURN, _ERRNO | _EPERM))
            ),
            _step(_RETURN, _ALLOW),
        ]
    answers[numbers["clone"]] = [  # without namespaces
        _step(_LOAD, _FIRST_ARGUMENT),
        _step(_ANY_BIT, _NEW_ANYTHING, 0, 1),
        _step(_RETURN, _ERRNO | _EPERM),
        _step(_RETURN, _ALLOW),
    ]

    # Neighbours with the same answer are one range: (first number, steps).
    ranges: list[tuple[int, list[bytes]]] = []
    for number in range(LAST_KNOWN + 2):
        answer = answers.get(number, [_step(_RETURN, _ALLOW)])
        if number > LAST_KNOWN:
            answer = [_step(_RETURN, _ERRNO | _ENOSYS)]
        if not ranges or ranges[-1][1] != answer:
            ranges.append((number, answer))

    program = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, _ARCHITECTURES[machine], 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
    ]
    return b"".join(program + _search(ranges))


def _search(ranges: Sequence[tuple[int, list[bytes]]]) -> list[bytes]:
    """Returns the steps that find the range of a number and answer as it says.

    A binary search: the kernel runs the whole filter for each number when a process installs it.
    """
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    below = _search(ranges[:middle])
    return [_step(_AT_LEAST, ranges[middle][0], len(below), 0), *below, *_search(ranges[middle:])]


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Returns a `struct sock_filter`; the jumps count steps to skip."""
    return struct.pack("HBBI", code, if_true, if_false, value)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]


def filter_system_calls(program: bytes) -> None:
    """Installs a filter for this process and all below it. `drop_capabilities` must come before (no_new_privs).

    Raises:
        OSError: the kernel refuses.
    """
    buffer = ctypes.create_string_buffer(program, len(program))
    steps = _Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_char_p))
    _checked(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(steps), 0, 0), "seccomp")


def has_seccomp() -> bool:
    """Returns whether this kernel filters system calls, and we have the numbers of this architecture."""
    try:
        with open("/proc/self/status") as status:
            return os.uname().machine in NUMBERS and any(line.startswith("Seccomp:") for line in status)
    except OSError:
        return False
