"""One run at a time in a folder, also where the file system has no locks."""

import errno
import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from moeq.errors import MoeqError

LOCK_NAME, _OWNER_NAME = "lock", "owner.json"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems answer that have no locks, or whose server of locks is not there."""


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Create a folder if need be, and keep other runs out of it.

    The system frees a lock when its process dies, so a later run can tell the remains of a killed
    run from the work of a living one. It holds between machines if the file system shares it.
    Where there are no locks, a file names the owner: see :func:`_owned`.

    Args:
        folder: To be created; removed at the end if nothing is left in it.
        busy: What to say if another run has it.

    Raises:
        MoeqError: Another run has it; the message begins with ``busy``.
        OSError: It cannot be created or locked.
    """
    path = folder / LOCK_NAME
    with ExitStack() as stack:
        folder.mkdir(exist_ok=True)
        stack.callback(_remove_if_empty, folder)
        # NFS locks exclusively only what is open for writing, so no folder.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MoeqError(busy) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise OSError(error.errno, f"cannot lock: {error.strerror}", str(path)) from error
            stack.enter_context(_owned(folder / _OWNER_NAME, busy))
        # The other run may have ended, and removed this very file, before we got the lock.
        if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise MoeqError(busy)
        stack.callback(path.unlink, missing_ok=True)
        yield


@contextmanager
def _owned(path: Path, busy: str) -> Iterator[None]:
    """Keep other runs out by a file that only one can create.

    It names the machine of its owner, and a socket there that goes with the owner's process. On the
    same machine, who can take that socket knows that the owner is dead, and takes its place. Of
    another machine nobody here can know: a person has to remove the file.

    Raises:
        MoeqError: As :func:`locked`.
    """
    owner = {"machine": _machine(), "socket": secrets.token_hex(16)}
    with ExitStack() as stack:
        _take(owner, stack)
        if not _create(path, owner):
            other = _read(path)
            if other.get("machine") != owner["machine"]:
                name = str((other.get("machine") or ["another machine"])[0])
                raise MoeqError(
                    f"{busy}, on {name}. The file system has no locks, so nobody can tell from "
                    f"here whether it still runs: if it does not, remove {path}"
                )
            try:
                _take(other, stack)
            except OSError:
                raise MoeqError(busy) from None
            if _read(path) != other:  # it has just ended, and another one has begun
                raise MoeqError(busy)
        stack.callback(path.unlink, missing_ok=True)
        yield


def _take(owner: dict[str, Any], stack: ExitStack) -> None:
    """Take the socket of an owner.

    Raises:
        OSError: Another process has it.
    """
    taken = stack.enter_context(socket.socket(socket.AF_UNIX))
    taken.bind(f"\0moeq-{owner['socket']}")


def _machine() -> list[str]:
    """Return what two processes have in common that see each other's sockets: its name first."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [socket.gethostname(), boot, os.readlink("/proc/self/ns/net")]


def _create(path: Path, owner: dict[str, Any]) -> bool:
    """Write a file; say whether it was not there before.

    Raises:
        OSError: It cannot be written.
    """
    try:
        with path.open("x") as file:
            file.write(json.dumps(owner))
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _read(path: Path) -> dict[str, Any]:
    """Return what is in the file; nothing, if its owner was killed before it had written it."""
    with suppress(OSError, ValueError):
        owner = json.loads(path.read_text())
        if isinstance(owner, dict):
            return owner
    return {}


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
