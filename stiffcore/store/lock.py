"""Who works on a run: one session at a time, and its workers only as long as it lives.

A session holds a run by a record that it renews (`holder.json`), on a folder by a lock of the operating system, too. A
worker asks before every write whether the record is still its session's, and where the worker is not a child of the
session, whether it was renewed of late. Clocks of different machines are never compared: who waits for a renewal sees
the record change.
"""

import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from zarr.abc.store import Store
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import WrapperStore

from stiffcore.ending import at_end
from stiffcore.errors import BusyError
from stiffcore.store.metadata import json_buffer, parsed, read_raw
from stiffcore.store.place import check_path

HOLDER = "holder.json"
LOCK = ".lock"
# Locked by who writes, shared; and alone by who takes the run over.
WRITERS = ".writers"
HEARTBEAT_S = 3.0
# Without a renewal for so long, no worker begins to write; for so long, no other session begins. What is between them
# is left for a write that is under way.
LEASE_S = 18.0
DEAD_AFTER_S = 30.0
POLL_S = 0.25
# Tokens of the runs that this process holds.
_HELD: set[str] = set()


def _clock() -> float:
    """Seconds, those in which the machine was asleep among them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Holder:
    """Of a run, who holds it; mixed into `RunStore`."""

    url: str
    local: Path | None
    _store: Store

    @contextmanager
    def hold(self, *, leased: bool = False, tell: Callable[[str], None] = lambda text: None) -> Iterator[str]:
        """Hold the run against other processes while the context lasts.

        Of a session that died without a word, nothing is known but its silence: then this waits for `DEAD_AFTER_S`,
        unless it was of this machine and so were its workers.

        Args:
            leased: whether workers that do not end with this process will write to the run.
            tell: told what is waited for.

        Yields:
            The session's token, see `Lease`.

        Raises:
            BusyError: where another process holds it; the message says who.
        """
        with self._locked():
            me = self._taken(_me() | {"leased": leased}, tell)
            _HELD.add(me["token"])
            stop = threading.Event()
            thread = threading.Thread(target=self._beat, args=(me, stop), daemon=True, name="stiffcore-heartbeat")
            thread.start()
            try:
                with at_end(partial(self._release, me)):
                    self._refresh()
                    yield me["token"]
            finally:
                stop.set()
                thread.join()
                self._release(me)

    def _release(self, me: Mapping[str, Any]) -> None:
        _HELD.discard(me["token"])
        # what cannot be reached any more keeps the record of a holder that will be silent, or dead
        with suppress(OSError):
            if (self._read_json(HOLDER) or me)["token"] == me["token"]:
                sync(self._store.delete(HOLDER))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if self.local is None:
            yield
            return
        check_path(self.local, LOCK, "file")
        check_path(self.local, WRITERS, "file")
        lock = FileLock(self.local / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise BusyError(self._who()) from None
        try:
            yield
        finally:
            lock.release()

    def _taken(self, me: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
        before = self._read_json(HOLDER)
        if before:
            self._wait_until_silent(before, tell)
        with _alone(self.local, self.url):
            if before is not None:
                sync(self._store.delete(HOLDER))
            sync(self._store.set_if_not_exists(HOLDER, json_buffer(me)))
        if self.local is None or before:
            # not every service can refuse to write over what is there, and two may have deleted a dead one's:
            # of two that write at once, the later one is left, and the other sees it here
            time.sleep(0.5)
        if (self._read_json(HOLDER) or {}).get("token") != me["token"]:
            raise BusyError(self._who())
        return me

    def _wait_until_silent(self, holder: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        """Wait until it is sure that neither a holder nor its workers will write.

        Raises:
            BusyError: where it lives.
        """
        here, wait = holder["host"] == socket.gethostname(), DEAD_AFTER_S
        if here:
            if not _dead_here(holder):
                raise BusyError(self._who())
            if not holder.get("leased"):
                return  # its workers died with it
            wait = min(wait, DEAD_AFTER_S - (time.time() - holder["heartbeat"]))  # one clock
        if wait > 1:
            who = f"process {holder['pid']} on {holder['host']}"
            tell(f"{self.url} was being worked on by {who}: waiting up to {wait:.0f} s to see whether it still is")
        end = _clock() + wait
        while _clock() < end:
            time.sleep(min(POLL_S, wait / 4))
            now = self._read_json(HOLDER)
            if now is None:
                return
            if now and (now["token"], now["heartbeat"]) != (holder["token"], holder["heartbeat"]):
                raise BusyError(self._who())

    def _beat(self, me: Mapping[str, Any], stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT_S):
            try:
                if (self._read_json(HOLDER) or me)["token"] != me["token"]:
                    return  # this process slept too long and was taken for dead: the run is another's now
                self._write_json(HOLDER, {**me, "heartbeat": time.time()})
            except OSError:
                continue  # a network's hiccup; the next beat may come through in time

    def _refresh(self) -> None:
        """Read again what another session may have changed since the run was opened."""

    def _who(self) -> str:
        holder = self._read_json(HOLDER) or {}
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.get("since", time.time())))
        return (
            f"{self.url} is being worked on by process {holder.get('pid', '?')} on {holder.get('host', '?')}, "
            f"since {since}: wait for it, or stop it; `stiffcore status {self.url}` shows how far it is"
        )

    def holder(self) -> dict[str, Any] | None:
        """Who holds the run now, if a living process does."""
        holder = self._read_json(HOLDER)
        if not holder:
            return None
        here = holder["host"] == socket.gethostname()
        return None if (_dead_here(holder) if here else time.time() - holder["heartbeat"] >= DEAD_AFTER_S) else holder

    def check_held(self, token: str) -> None:
        """Refuse to go on where the session with this token is over, so that a late worker spoils no other's work.

        Raises:
            BusyError: where nobody holds the run, or somebody else does.
        """
        if (self._read_json(HOLDER) or {}).get("token") != token:
            raise BusyError(_over(self.url))

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        sync(self._store.set(name, json_buffer(value)))

    def _read_json(self, name: str) -> dict[str, Any] | None:
        """What a JSON file holds: None where it is not there, nothing where a killed writer left it half written."""
        for attempt in range(3):
            found = read_raw(self._store, name)
            if found is None:
                return None
            try:
                return _as_holder(parsed(found))
            except ValueError:
                # a URL's file may be seen half written
                time.sleep(0.05 * (attempt + 1))
        return {}


class Lease:
    """A worker's right to write to a run, which ends with the session that it works for.

    One in a process for each session, see `lease`: it remembers when the session was last seen alive.
    """

    def __init__(self, url: str, token: str, renewed: bool) -> None:
        """As `lease`."""
        self.url, self.token, self.renewed = url, token, renewed
        self._beat: Any = None
        self._looked = self._until = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        return lease, (self.url, self.token, self.renewed)

    async def admit(self, store: Store) -> None:
        """Wait until it is sure that the session lives.

        Raises:
            BusyError: where it is over, or silent.
        """
        import asyncio

        end = _clock() + LEASE_S
        while True:
            looking = _clock()
            beat = await self.look(store)
            if self._beat is not None and beat != self._beat:
                self._until = self._looked + LEASE_S  # it lived when the record before this one was seen
            self._beat, self._looked = beat, looking
            if not self.renewed or _clock() < self._until:
                return
            if _clock() > end:
                raise BusyError(f"the session that began this on {self.url} is silent: nothing more is written")
            await asyncio.sleep(POLL_S)

    async def look(self, store: Store) -> Any:
        """The session's last renewal.

        Raises:
            BusyError: where it is over.
        """
        found: Any = None
        raw = await store.get(HOLDER, default_buffer_prototype())
        with suppress(ValueError):
            found = parsed(raw.to_bytes()) if raw is not None else None
        if not found or found.get("token") != self.token:
            raise BusyError(_over(self.url))
        return found.get("heartbeat")


@cache
def lease(url: str, token: str, renewed: bool) -> Lease:
    """This process's lease of a run.

    Args:
        url: of the run.
        token: of the session.
        renewed: whether it counts only as long as the session renews it: where this process does not end with it.
    """
    return Lease(url, token, renewed)


class LeasedStore(WrapperStore[Store]):
    """The store of a run for a worker: it asks the lease before every write and deletion."""

    def __init__(self, store: Store, held: Lease) -> None:
        """Wrap a store.

        Args:
            store: of the run.
            held: asked before every write.
        """
        super().__init__(store)
        self.held = held

    def _with_store(self, store: Store) -> "LeasedStore":
        return type(self)(store, self.held)

    def with_read_only(self, read_only: bool = False) -> "LeasedStore":
        """As any store's."""
        return self._with_store(self._store.with_read_only(read_only))

    async def _led(self, write: Callable[[], Awaitable[None]]) -> None:
        await self.held.admit(self._store)
        folder = None if "://" in self.held.url else Path(self.held.url)
        with _beside(folder):
            await self.held.look(self._store)  # nobody takes the run over between this and the write
            await write()

    async def set(self, key: str, value: Buffer) -> None:
        """Write, while the lease lasts."""
        await self._led(lambda: self._store.set(key, value))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write, while the lease lasts."""
        await self._led(lambda: self._store.set_if_not_exists(key, value))

    async def delete(self, key: str) -> None:
        """Delete, while the lease lasts."""
        await self._led(lambda: self._store.delete(key))

    async def delete_dir(self, prefix: str) -> None:
        """Delete, while the lease lasts."""
        await self._led(lambda: self._store.delete_dir(prefix))

    async def size(self, key: str) -> int:
        """Bytes of a file, see the stores of a run."""
        return await self._store.size(key)  # type: ignore[attr-defined]  # both stores of a run have it

    async def sizes(self, prefix: str) -> dict[str, int]:
        """As the store's."""
        return await self._store.sizes(prefix)  # type: ignore[attr-defined]  # both stores of a run have it

    async def _set_many(self, values: Any) -> None:
        for key, value in values:
            await self.set(key, value)


@contextmanager
def _flock(folder: Path | None, how: int) -> Iterator[None]:
    """Lock a folder's writers out or in; nothing where its file system has no locks."""
    if folder is None:
        yield
        return
    at = os.open(folder / WRITERS, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(at, how)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(at)


def _beside(folder: Path | None) -> Any:
    """Write, beside other workers."""
    return _flock(folder, fcntl.LOCK_SH)


@contextmanager
def _alone(folder: Path | None, url: str) -> Iterator[None]:
    """Take a run over while no worker writes.

    Raises:
        BusyError: where one goes on writing.
    """
    end = _clock() + DEAD_AFTER_S
    while True:
        try:
            with _flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
                yield
                return
        except BlockingIOError:
            if _clock() > end:
                raise BusyError(f"a worker of an earlier session is still writing to {url}: end it") from None
            time.sleep(0.02)


def _over(url: str) -> str:
    return f"the session that began this on {url} is over"


def _as_holder(found: dict[str, Any]) -> dict[str, Any]:
    """Who holds a run, as read; nobody where it does not say so in the right types."""
    numbers = (("pid", int, 2**31), ("since", (int, float), 2**33), ("heartbeat", (int, float), 2**33))
    known = all(isinstance(found.get(name), kind) and 0 < found[name] < most for name, kind, most in numbers)
    return found if known and all(isinstance(found.get(name), str) for name in ("token", "host")) else {}


def _me() -> dict[str, Any]:
    now = time.time()
    return {
        "token": uuid.uuid4().hex,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": now,
        "heartbeat": now,
    }


def _dead_here(holder: Mapping[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return False
    if holder["pid"] == os.getpid():
        return holder["token"] not in _HELD  # given up where it could not be deleted
    try:
        # a process started after the holder was written only has its number
        process = psutil.Process(holder["pid"])
        return process.create_time() > holder["since"] or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
