"""Limits that a CPython child sets to itself before it runs anything: memory, files, and on Linux system calls.

What is around the process keeps it from files and from the network. Here it gives up what a hostile program could still
use up or attack: processes, sockets, memory that is not in its address space, and little used parts of the kernel.
No limit can be lifted again.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import resource
import struct
import sys

# Address space beside what programs may use: the interpreter, the libraries of packages, the copy of the variables.
OVERHEAD_BYTES = 512 * 1024 * 1024
MAX_FILES = 64
# System calls by number: x86_64, aarch64.
_DENIED = {
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "socket": (41, 198),  # socketpair stays, for event loops
    "io_uring_setup": (425, 425),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "personality": (135, 92),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
}
_CLONE, _CLONE3 = (56, 220), 435
_CLONE_THREAD = 0x10000
_X32 = 0x4000_0000  # from here on, system calls of x86_64 in another numbering
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_…

# seccomp's programs, see linux/filter.h and linux/seccomp.h.
_LOAD, _EQUAL, _AT_LEAST, _HAS_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 22, 38, 2


def confine(memory_bytes: int, file_bytes: int) -> None:
    """Limit this process, for good. `memory_bytes` is what programs may use; no file gets longer than `file_bytes`.

    macOS enforces no limit of memory; that no process is started there is Seatbelt's part.

    Raises:
        OSError: the system refuses, or the machine is one whose system calls are not known here.
    """
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: MAX_FILES,
    }
    if sys.platform == "linux":
        limits[resource.RLIMIT_AS] = memory_bytes + OVERHEAD_BYTES
    for which, most in limits.items():
        resource.setrlimit(which, (most, most))
    if sys.platform == "linux":
        _deny_system_calls()


def _deny_system_calls() -> None:
    instructions = b"".join(_filter(platform.machine()))
    program = ctypes.create_string_buffer(instructions)
    head = ctypes.create_string_buffer(struct.pack("@HP", len(instructions) // 8, ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero),
        (_PR_SET_SECCOMP, ctypes.c_ulong(_FILTER), ctypes.byref(head), zero, zero),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "the system takes no filter of system calls")


def _filter(machine: str) -> list[bytes]:
    """The instructions of a filter that lets all system calls pass but those that are denied."""
    if machine not in _MACHINES:
        raise OSError(errno.ENOSYS, f"the system calls of {machine} are not known")
    column, architecture = _MACHINES[machine]
    denied = [numbers[column] for numbers in _DENIED.values() if numbers[column] is not None]
    code = [_step(_LOAD, _ARCHITECTURE), _step(_EQUAL, architecture, 1, 0), _step(_RETURN, _KILL)]
    code += [_step(_LOAD, _NUMBER), _step(_AT_LEAST, _X32, 0, 1), _step(_RETURN, _KILL)]
    for number in denied:
        code += [_step(_EQUAL, number or 0, 0, 1), _step(_RETURN, _ERROR | errno.EPERM)]
    # Its flags are in memory, where no filter looks; the C library then takes `clone`.
    code += [_step(_EQUAL, _CLONE3, 0, 1), _step(_RETURN, _ERROR | errno.ENOSYS)]
    code += [_step(_EQUAL, _CLONE[column], 0, 3), _step(_LOAD, _FIRST_ARGUMENT)]
    code += [_step(_HAS_BITS, _CLONE_THREAD, 1, 0), _step(_RETURN, _ERROR | errno.EPERM)]
    return [*code, _step(_RETURN, _ALLOW)]


def _step(operation: int, operand: int, if_so: int = 0, if_not: int = 0) -> bytes:
    return struct.pack("@HBBI", operation, if_so, if_not, operand)
