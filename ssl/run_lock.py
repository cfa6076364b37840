"""One run at a time in a run folder: `run.lock`, held by the process that writes there.

The file is locked by flock(2), which the operating system lets go of when the holder ends, however it ends, and says
in JSON who holds it. Where the file system has no flock, or keeps it to each machine, that record decides: a holder on
this machine is looked up by its process id and the time it began, one on another machine by whether its record still
changes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ssl.distributed as distributed

NAME = "run.lock"
BEAT_SECONDS = 5.0
"""How often the holder rewrites its record."""
SILENT_SECONDS = 30.0
"""For so long the record of another machine is watched; where it does not change, its run is taken for dead."""
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

log = logging.getLogger(__name__)
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLock:
    """Holds a run folder while it is entered. Every rank enters; the first takes the lock and tells the others.

    Raises ValueError, on every rank, where another run holds the folder: on which host, as which process, since when.
    """

    def __init__(self, out: Path, *, beat: float = BEAT_SECONDS, silent: float = SILENT_SECONDS) -> None:
        """`beat` and `silent` are in seconds: see BEAT_SECONDS and SILENT_SECONDS."""
        self.path = out / NAME
        self.beat, self.silent = beat, silent
        self._file: int | None = None
        self._record: dict[str, Any] = {}
        self._released = threading.Event()
        self._beating = threading.Thread()

    def __enter__(self) -> RunLock:
        refusal = None
        if distributed.is_main():
            try:
                self._take()
            except (ValueError, OSError) as error:
                refusal = str(error)
        refusal = distributed.from_main(refusal)
        if refusal is not None:
            raise ValueError(refusal)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let the folder go. Does nothing where it is not held, as in a child process that was forked meanwhile."""
        if self._file is None:
            return
        self._released.set()
        self._beating.join(timeout=self.beat)
        file, self._file = self._file, None
        _held.discard(self)
        with contextlib.suppress(OSError):
            if _same_file(file, self.path) and _read(self.path).get("token") == self._record["token"]:
                self.path.unlink()
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # also of what a child process may have inherited
        if not self._beating.is_alive():  # else it hangs in a write, and must not find another file under this number
            os.close(file)

    def _take(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                raise OSError(f"{self.path} cannot be opened, to hold the run folder: {error.strerror}") from error
            try:
                locked = self._flock(file)
                if not _same_file(file, self.path):  # the one before has just left, and taken the file with it
                    os.close(file)
                    continue
                self._check_earlier(locked=locked)
                self._hold(file)
                if not locked:
                    self._check_still_ours()
            except BaseException:
                self._file = None
                _held.discard(self)
                os.close(file)
                raise
            self._beating.start()
            return

    def _flock(self, file: int) -> bool:
        """Whether the file system has locked the file for us; ValueError where another process has it."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(self._refusal(self._settled_record())) from None
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise OSError(f"{self.path} cannot be locked: {error.strerror}") from error
            return False
        return True

    def _settled_record(self) -> dict[str, Any]:
        """The record of who has just locked the file, which may be about to write it."""
        until = time.monotonic() + min(1.0, self.silent)
        while not (record := _read(self.path)) or (_is_here(record) and not _is_alive(record)):
            if time.monotonic() > until:
                break
            time.sleep(0.02)
        return record

    def _check_earlier(self, *, locked: bool) -> None:
        """Raise ValueError where the record in the file is that of a run that goes on."""
        record = _read(self.path)
        if not record:
            return
        if _is_here(record):
            # With flock the system has let go of it already: a run of this machine that ended without a word.
            dead = locked or not _is_alive(record)
        else:
            dead = self._is_silent(record)
        if not dead:
            raise ValueError(self._refusal(record))
        log.warning("%s: taking over from process %s on %s, which is gone", self.path.parent, *_holder(record))

    def _is_silent(self, record: dict[str, Any]) -> bool:
        """Whether a run of another machine, whose processes cannot be asked for, no longer rewrites its record."""
        log.warning(
            "%s was held by process %s on %s; watching for %g s whether it still is",
            *(self.path.parent, *_holder(record), self.silent),
        )
        until = time.monotonic() + self.silent
        while time.monotonic() < until:
            time.sleep(min(1.0, self.silent / 4))
            if _read(self.path) != record:
                return False
        return True

    def _hold(self, file: int) -> None:
        self._record = _own_record()
        self._file = file
        self._released = threading.Event()
        self._beating = threading.Thread(target=self._keep_alive, args=(file,), name="run lock", daemon=True)
        _held.add(self)
        self._write(file)

    def _check_still_ours(self) -> None:
        """Without flock two may come at once: the one that wrote last stays."""
        time.sleep(min(0.5, self.silent / 4))
        record = _read(self.path)
        if record.get("token") != self._record["token"]:
            raise ValueError(self._refusal(record))

    def _write(self, file: int) -> None:
        """Rewrite the record in its place; on a full disk flock alone holds the folder."""
        content = json.dumps(self._record).ljust(400) + "\n"  # as long each time, so that no reader finds a torn end
        with contextlib.suppress(OSError):
            os.pwrite(file, content.encode(), 0)
            os.fsync(file)

    def _keep_alive(self, file: int) -> None:
        while not self._released.wait(self.beat):
            self._record["beats"] += 1
            self._write(file)

    def _refusal(self, record: dict[str, Any]) -> str:
        process, host = _holder(record)
        return (
            f"another run is at work in {self.path.parent}: process {process} on {host}, since "
            f"{record.get('since', 'an unknown time')}. Give another out=, or wait until it has ended; if you are sure "
            f"that it has, remove {self.path}"
        )


def is_held(out: Path) -> bool:
    """Whether a run is at work in a folder, as its lock tells without being taken; nothing is waited for.

    A run of another machine counts for so long as its record is rewritten, by the date of the file.
    """
    record = _read(out / NAME)
    if not record:
        return False
    if _is_here(record):
        return _is_alive(record)
    try:
        return time.time() - (out / NAME).stat().st_mtime < 2 * SILENT_SECONDS
    except OSError:
        return False


def _close_in_child() -> None:
    """A forked child shares the lock's file, and would keep the folder locked after its parent has died."""
    for lock in list(_held):
        if lock._file is not None:
            os.close(lock._file)
        lock._file = None
        lock._released.set()
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _own_record() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "began": _began(os.getpid()),
        "beats": 0,
        "token": os.urandom(8).hex(),
    }


def _holder(record: dict[str, Any]) -> tuple[Any, Any]:
    return record.get("pid", "unknown"), record.get("host", "an unknown host")


def _read(path: Path) -> dict[str, Any]:
    """The record in a lock file; nothing where there is none, or none of ours."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _machine() -> list[str]:
    """What tells one space of process ids from another: host, start of the machine, and container."""
    boot, container = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        container = os.readlink("/proc/self/ns/pid")
    return [socket.gethostname(), boot, container]


def _is_here(record: dict[str, Any]) -> bool:
    return record.get("machine") == _machine()


def _is_alive(record: dict[str, Any]) -> bool:
    """Whether the process of a record of this machine lives. Another that was given its number since began later."""
    pid = record.get("pid")
    if not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user, but alive
        pass
    return _began(pid) == record.get("began")


def _began(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None where the system does not tell, or it is a zombie's."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
