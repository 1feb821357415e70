"""Heartbeat: how the processes of a job learn at once that one of them died, stopped, failed or diverged.

Every process has a connection to every other, served by a thread, next to the collectives. On it a process reports its
phase, the collective that it is in, and whether and why it failed. A closed connection means that the process is gone;
one that is silent for half of the timeout is stopped. The first finding is the verdict: the main thread raises it in
its next collective or, if it is stuck in one, the process prints it and exits with 3. Knows nothing about tensors.
"""

import atexit
import fcntl
import hmac
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import termios
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from .lost import Lost, differing

GRACE = 0.05  # seconds for the main thread to raise a verdict before it is printed: launchers kill the others soon
STUCK = 0.5  # seconds after which a main thread that is stuck in a collective is given up
SHARE = 0.2  # of the timeout, after which one that is stuck elsewhere is given up
WAIT = 0.5  # of the timeout: limit of a collective, and of silence; the rest is for ending
EXIT = 3  # the exit code of a job that lost a rank
MOST = 64 << 10  # bytes of a message

_CLOSED = 7  # TCP_CLOSE, of linux/tcp_states.h

Facts = dict[str, Any]


class Peer:
    """Another process: the connection to it, its last message and when that came, and a handle to kill it."""

    def __init__(self, rank: int, connection: socket.socket, about: Mapping[str, Any]) -> None:
        self.rank, self.connection = rank, connection
        self.said: Facts = {"phase": "start"}
        self.heard = time.monotonic()
        self.gone = False
        self.process = -1
        self._rest, self._unsent = b"", b""
        if about["machine"] == machine() and hasattr(os, "pidfd_open"):
            with suppress(OSError):
                self.process = os.pidfd_open(about["pid"])
        connection.setblocking(False)

    def receive(self) -> None:
        """Read what has arrived."""
        try:
            data = self.connection.recv(MOST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or len(self._rest) > MOST:
            self.gone = True
            return
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            with suppress(ValueError):
                said = json.loads(line)
                if isinstance(said, dict):
                    self.said = said

    def send(self, line: bytes) -> None:
        """A peer that no longer reads misses messages; it is found by its silence."""
        if len(self._unsent) < MOST:
            self._unsent += line
        with suppress(OSError):
            self._unsent = self._unsent[self.connection.send(self._unsent) :]

    def part(self, line: bytes, wait: float) -> None:
        """Send the last message."""
        with suppress(OSError):
            self.connection.settimeout(wait)
            self.connection.sendall(self._unsent + line)
            self.connection.shutdown(socket.SHUT_WR)

    def unheard(self) -> bool:
        """Whether a message has not arrived: closing now could drop it, since unread data here makes that a reset."""
        with suppress(OSError):
            state = self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
            return state != _CLOSED and any(fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4)))
        return False

    def kill(self) -> None:
        """Kill a process that is stopped for good, so that it is not left behind; only on this machine."""
        if self.process >= 0:
            with suppress(OSError):
                signal.pidfd_send_signal(self.process, signal.SIGKILL)

    @property
    def phase(self) -> str:
        return str(self.said.get("phase"))


class Lifeline:
    """This process' end: `say` tells the others, `verdict` is what is wrong with the job, None if nothing is known."""

    def __init__(self, store: Any, rank: int, size: int, timeout: float, job: str) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.verdict: str | None = None
        self.taken = False
        self.inside: float | None = None  # when the main thread entered a collective
        self.store, self.job = store, job
        self.numbers: defaultdict[object, Iterator[int]] = defaultdict(count)  # names of groups of ranks
        self.steps = 0  # counted by the main thread as it makes progress
        self._facts: Facts = {"phase": "start", "at": None, "met": 0}
        self._changed, self._telling = threading.Condition(), threading.Lock()
        self._over, self._printed, self._settled = False, False, 0.0
        self._beat = min(1.0, timeout / 10)
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self.peers = _connect(store, rank, size, timeout, job)
        self._thread = threading.Thread(target=self._run, name="lifeline", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        self._hook = sys.excepthook
        sys.excepthook = self._uncaught

    # The main thread.

    def near(self, ranks: Sequence[int]) -> bool:
        """Whether all of these ranks are on this machine."""
        return all(self.peers[rank].process >= 0 for rank in ranks if rank != self.rank)

    def say(self, **facts: Any) -> None:
        """Tell the others, before anything else can happen to this process."""
        self._facts = self._facts | facts
        self._tell()
        with suppress(OSError):
            self._wake.send(b"!")

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank cannot continue, and why."""
        if isinstance(error, Lost):
            self.taken = True
            self.say(lost=error.message)
        elif not self.taken:
            self.say(failed=describe(error))

    def meet(self, what: str) -> str | None:
        """Wait until every rank has come as often as this one, while the others make progress; else the verdict."""
        turn = self._facts["met"] + 1
        self.say(met=turn, at=[f"meet: {what}", turn])
        moved: dict[int, tuple[Any, float]] = dict.fromkeys(self.peers, (-1, time.monotonic()))
        with self._changed:
            while self.verdict is None:
                away = [peer for peer in self.peers.values() if peer.said.get("met", 0) < turn]
                if not away:
                    self.leave()
                    return None
                now = time.monotonic()
                for peer in away:
                    if peer.said.keys() & {"lost", "failed"}:
                        continue  # the other thread is about to find that
                    if peer.said.get("steps") != moved[peer.rank][0]:
                        moved[peer.rank] = (peer.said.get("steps"), now)
                    elif now - moved[peer.rank][1] > self.timeout or peer.gone or peer.said.get("done"):
                        over = peer.gone or peer.said.get("done")
                        ended = "ended" if over else f"made no progress for {self.timeout:g} s"
                        self.verdict = f"rank {peer.rank} {ended} in {peer.phase}; the others are waiting for: {what}"
                        self._settled = now
                        break
                self._changed.wait(self._beat)
        self.say(lost=self.verdict)
        self.taken = True
        return self.verdict

    def enter(self, what: str, turn: int) -> None:
        """The main thread enters a collective, the `turn`-th of its group."""
        self._facts["at"] = [what, turn]
        self.inside = time.monotonic()

    def leave(self) -> None:
        self._facts["at"] = None
        self.inside = None

    def take(self) -> str | None:
        """The verdict, which the caller will raise."""
        if self.verdict is not None:
            self.taken = True
        return self.verdict

    def why(self, ranks: Sequence[int], what: str, turn: int, error: BaseException | None) -> str:
        """Why a collective of `ranks` failed: the verdict, once it is known, or what the others say they are doing."""
        self.say(at=[what, turn], broken=True)
        waits = time.monotonic() + min(1.0, self.timeout * SHARE)
        others = [peer for peer in self.peers.values() if peer.rank in ranks]
        with self._changed:
            while self.verdict is None and (left := waits - time.monotonic()) > 0:
                if all(peer.said.get("broken") for peer in others) and others:
                    break
                self._changed.wait(left)
        if self.verdict is None:
            self._settle(self._guess(others, what, turn, error))
        self.taken = True
        return str(self.verdict)

    def _guess(self, others: Sequence[Peer], what: str, turn: int, error: BaseException | None) -> str:
        if (found := self._finding(time.monotonic())) is not None:  # a rank that knows more may have reported it
            return found
        phase = self._facts["phase"]
        for peer in others:
            if peer.gone or peer.said.get("done"):
                return f"rank {peer.rank} ended in {peer.phase}, but was expected at: {what}"
        at = {self.rank: (what, turn)} | {peer.rank: tuple(peer.said["at"]) for peer in others if peer.said.get("at")}
        turns = len({number for _, number in at.values()}) > 1
        if (
            odd := differing(
                {rank: f"{text} as exchange {number}" if turns else text for rank, (text, number) in at.items()}
            )
        ) is not None:
            return f"rank {odd[0]} diverged in {phase}: {odd[1]}"
        for peer in others:
            if peer.rank not in at:
                where = "" if peer.phase == phase else f"; it is in {peer.phase}"
                return f"rank {peer.rank} did not reach {what} within {self.timeout * WAIT:g} s in {phase}{where}"
        return f"the ranks lost each other in {phase} at: {what}: {error}"

    def close(self) -> None:
        """This process has finished. It says so before it closes its connections: silence would count as a loss."""
        if self._over:
            return
        self._over = True
        with suppress(OSError):
            self._wake.send(b"!")
        self._thread.join(1.0)
        with self._telling:
            self._facts = self._facts | {"done": True}
            for peer in self.peers.values():
                peer.part(self._line(), self._beat)
        until = time.monotonic() + self._beat
        while any(peer.unheard() for peer in self.peers.values()) and time.monotonic() < until:
            time.sleep(0.001)
        for peer in self.peers.values():
            peer.connection.close()

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self.fail(error)
        self._hook(kind, error, trace)

    # The thread.

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for peer in self.peers.values():
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            reported, last = 0.0, time.monotonic()
            while True:
                wait = self._beat if self.verdict is None else 0.05
                events = selector.select(max(0.0, min(wait, reported + self._beat - time.monotonic())))
                now = time.monotonic()
                if now - last > 3 * self._beat + 1:  # stopped or starved itself: the peers are not late
                    for peer in self.peers.values():
                        peer.heard = now
                last = now
                woken = False
                for key, _ in events:
                    if key.data is None:
                        with suppress(BlockingIOError):
                            self._woken.recv(4096)
                        woken = True
                        continue
                    peer, before = key.data, key.data.said
                    peer.receive()
                    # A peer whose collective broke wants to know where this rank is.
                    woken = woken or bool(peer.said.get("broken") and not before.get("broken"))
                    if peer.gone:
                        selector.unregister(peer.connection)
                if self._over:
                    return
                if woken or now - reported >= self._beat:
                    self._tell()
                    reported = now
                self._judge(now)

    def _tell(self) -> None:
        with self._telling:
            line = self._line()
            for peer in self.peers.values():
                if not peer.gone:
                    peer.send(line)

    def _line(self) -> bytes:
        return json.dumps(self._facts | {"steps": self.steps}).encode()[: MOST // 2] + b"\n"

    def _judge(self, now: float) -> None:
        with self._changed:
            self._changed.notify_all()
        if self.verdict is None:
            if (found := self._finding(now)) is not None:
                self._settle(found)
            return
        since = now - self._settled
        if self.taken or since < GRACE:
            return
        if not self._printed:
            self._printed = True
            report(self.rank, self.verdict)
        stuck = self.inside is not None and now - max(self.inside, self._settled) > STUCK
        if stuck or since > self.timeout * SHARE:
            self._tell()
            os._exit(EXIT)

    def _finding(self, now: float) -> str | None:
        peers = self.peers.values()
        for peer in peers:
            if (failed := peer.said.get("failed")) is not None:
                return f"rank {peer.rank} failed in {peer.phase}: {failed}"
        for peer in peers:
            if (lost := peer.said.get("lost")) is not None:
                return str(lost)
        for peer in peers:
            if peer.gone and not peer.said.get("done"):
                return f"rank {peer.rank} was killed in {peer.phase}: its process is gone"
        for peer in peers:
            if now - peer.heard > self.timeout * WAIT and not peer.said.get("done") and not peer.gone:
                peer.kill()
                silent = f"no sign of life for {now - peer.heard:.1f} s"
                return f"rank {peer.rank} stopped responding in {peer.phase}: {silent}"
        return None

    def _settle(self, verdict: str) -> None:
        """The first finding counts, everywhere."""
        with self._changed:
            if self.verdict is None:
                self._settled = time.monotonic()
                self.verdict = verdict
                self.say(lost=verdict)
            self._changed.notify_all()


def describe(error: BaseException) -> str:
    """An exception in a line."""
    from reshard.errors import ReshardError

    text = error.message if isinstance(error, ReshardError) else f"{type(error).__name__}: {error}"
    return text[:2000]


def _print(rank: int, verdict: str) -> None:
    from reshard.text.escapes import visible

    with suppress(OSError):
        os.write(2, visible(f"error: rank {rank}: {verdict}\n").encode(errors="replace"))


# Reports a verdict that a stuck main thread cannot raise; launch sets its own.
report: Callable[[int, str], object] = _print


def machine() -> str:
    """An id that two processes share if they can signal each other: this boot of the machine, and the PID namespace."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return secrets.token_hex()  # shared with none


def _connect(store: Any, rank: int, size: int, timeout: float, job: str) -> dict[int, Peer]:
    """A connection to every other rank; the lower rank listens. The store has the addresses, and a secret as proof."""

    def get(key: str, of: int) -> Any:
        name = f"reshard/{job}/{key}"
        try:
            store.wait([name], timedelta(seconds=timeout))
            return json.loads(store.get(name))
        except RuntimeError as error:
            words = f"rank {of} did not join within {timeout:g} s: {error}"
            raise Lost(words, "start all ranks at the same time") from None

    def put(key: str, value: Any) -> None:
        store.set(f"reshard/{job}/{key}", json.dumps(value))

    deadline = time.monotonic() + timeout
    with _listening(rank, store) as listener:
        if rank == 0:
            put("secret", secrets.token_hex(16))
        mine = {"address": listener.getsockname()[:2], "pid": os.getpid(), "machine": machine()}
        put(str(rank), mine)
        abouts = {other: get(str(other), other) for other in range(size) if other != rank}
        secret = get("secret", 0)
        peers: dict[int, Peer] = {}
        for other in range(rank):
            try:
                connection = socket.create_connection(tuple(abouts[other]["address"]), timeout=timeout)
                connection.sendall(_greeting(secret, rank))
            except OSError as error:
                address = abouts[other]["address"]
                raise Lost(f"rank {rank} cannot connect to rank {other} at {address}: {error}") from None
            peers[other] = Peer(other, connection, abouts[other])
        while len(peers) < size - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
                connection.settimeout(min(5.0, timeout))
                greeting = _read(connection, len(_greeting(secret, 0)))
            except TimeoutError:
                missing = min(set(range(size)) - peers.keys() - {rank})
                raise Lost(f"rank {missing} did not join within {timeout:g} s") from None
            except OSError:
                continue
            other = int.from_bytes(greeting[:4], "little")
            if rank < other < size and other not in peers and hmac.compare_digest(greeting, _greeting(secret, other)):
                peers[other] = Peer(other, connection, abouts[other])
            else:
                connection.close()  # a stranger
    for peer in peers.values():
        with suppress(OSError):
            peer.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return dict(sorted(peers.items()))


def _greeting(secret: str, rank: int) -> bytes:
    number = rank.to_bytes(4, "little")
    return number + hmac.digest(secret.encode(), number, "sha256")


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("closed")
        data += part
    return data


def _listening(rank: int, store: Any) -> socket.socket:
    """A listening socket at the address by which this machine reaches the rendezvous, so that others reach it, too."""
    host = os.environ.get("MASTER_ADDR") or getattr(store, "host", None) or "127.0.0.1"
    port = int(os.environ.get("MASTER_PORT") or 9)
    family, address = socket.AF_INET, "127.0.0.1"
    for found, kind, _, _, place in _resolved(host, port):
        with suppress(OSError), socket.socket(found, kind) as probe:
            probe.connect(place)  # a datagram socket: sends nothing
            family, address = socket.AddressFamily(found), probe.getsockname()[0]
            break
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(1024)
    return listener


def _resolved(host: str, port: int) -> list[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError:
        return []


_lines: list[tuple[Any, Lifeline]] = []


def lifeline(rank: int, size: int, timeout: float) -> Lifeline:
    """The heartbeat of torch.distributed's current process group; one for all who use it."""
    from torch.distributed import distributed_c10d as c10d

    group = c10d._get_default_group()
    for known, line in _lines:
        if known is group:
            return line
    line = Lifeline(c10d._get_default_store(), rank, size, timeout, f"life-{len(_lines)}")
    _lines.append((group, line))
    return line
