"""The launchers of all nodes agree on each attempt: which nodes take part, and where their processes meet.

They post to a TCPStore of torch.distributed, which the launcher of the first node serves at the job's address as long
as it runs: the store of the processes ends with rank 0. Launchers meet in rounds, one before each attempt. In a round
each posts whether it is ready; the first node decides, and posts the decision. A launcher that was started again, or
whose link was cut, joins the round that is open. One that is ready counts only while it says so again and again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from distrain.environment import LAUNCHERS, host_port
from distrain.errors import EXIT_AGAIN, EXIT_OK, ConfigError, PeerLostError
from distrain.launcher.cluster import LOCAL, Topology
from distrain.text import plural

_ANSWER_SECONDS = 5.0
"""Longest wait for one answer of the store: torch's own calls wait for a lost link for many minutes."""
_POLL_SECONDS = 0.1
_ASK_SECONDS = 1.0
"""Interval at which a launcher asks, while its processes run, whether the first node has opened the next round."""
_FRESH_SECONDS = 3.0
"""Age at which a post no longer counts: its launcher has ended, or is cut off."""
_QUIET_SECONDS = 10.0
"""Time until the first node says for whom it waits."""
_READ_SECONDS = 5.0
"""Longest wait of the first node, at the end of the job, until the others have read why it ends."""

T = TypeVar("T")

log = logging.getLogger("distrain")


@dataclass(frozen=True)
class Post:
    """The message of a launcher in a round.

    Attributes:
        node: index of its node.
        is_ready: whether it is ready for another attempt; else it ends.
        code: exit code of its last attempt; 0 before the first one.
        reason: why its last attempt ended, for people.
        killed: whether the process that failed first was ended by a signal.
        host: name of its host.
        time: seconds since the epoch.
        name: a name that no other post has.
    """

    node: int
    is_ready: bool = True
    code: int = EXIT_OK
    reason: str = ""
    killed: bool = False
    host: str = field(default_factory=socket.gethostname)
    time: float = field(default_factory=time.time)
    name: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Decision:
    """The end of a round.

    Attributes:
        posts: the posts of the nodes that take part in the attempt, by node; empty: the job ends.
        port: of the first node, where the processes of the attempt meet.
        reason: why the job ends.
        code: exit code of the launcher that ends it.
    """

    posts: tuple[Post, ...] = ()
    port: int = 0
    reason: str = ""
    code: int = EXIT_AGAIN

    @property
    def nodes(self) -> list[int]:
        """The nodes that take part, in order."""
        return [post.node for post in self.posts]


def decide(posts: Iterable[Post], expected: Iterable[int], least: int, is_late: bool) -> Decision | None:
    """Decide a round; None while it is open. The port is added by the caller.

    Args:
        posts: all posts of the round, in order; of each node the last one counts.
        expected: the nodes of the attempt before, or of the job.
        least: number of nodes that suffice.
        is_late: whether nodes that have not posted are given up.
    """
    expected, newest = set(expected), {post.node: post for post in posts}
    for post in newest.values():
        if not post.is_ready and post.node in expected:  # guard: end-of-one
            return Decision(reason=post.reason, code=post.code)
    newest = {node: post for node, post in newest.items() if post.is_ready}  # without lost nodes that came and left
    missing = sorted(expected - set(newest))
    if missing and not is_late:
        return None
    if len(newest) < least:  # guard: too-few-nodes
        nodes = ", ".join(str(node) for node in missing)
        return Decision(reason=f"node {nodes} is missing; at least {plural(least, 'node')} must take part")
    return Decision(tuple(newest[node] for node in sorted(newest)))


_OVER = Decision((Post(-1),))
"""Stands for a decision whose attempt has ended: it names no launcher."""


class Agreement:
    """This launcher among those of the other nodes.

    Args:
        topology: this node among the others, as the job was started.
        least: number of nodes that suffice for an attempt.
        start_seconds: longest wait for all nodes before the first attempt.
        rejoin_seconds: longest wait for nodes that are lost, after it.
        stopped: returns why this launcher should not wait any longer, or None.
        listening: on the first node, a socket at the job's address.
    """

    def __init__(
        self,
        topology: Topology,
        least: int,
        start_seconds: float,
        rejoin_seconds: float,
        stopped: Callable[[], str | None],
        listening: socket.socket | None,
    ) -> None:
        self._topology, self._least = topology, least
        self.seconds = start_seconds
        """Longest wait for other nodes in the next round."""
        self._rejoin_seconds, self._stopped = rejoin_seconds, stopped
        self._expected: Sequence[int] = range(topology.nodes)
        self._client = _Client(topology)
        self._seen: dict[str, tuple[int, float]] = {}
        self._listening = listening
        self._server: Any = None
        self._round = 0
        self.posts: list[Post] = []
        """Posts of the last round, on the first node."""

    def meet(self, post: Post, port: int = 0) -> Decision:
        """Take part in the next round, or in the one that is open.

        Args:
            post: what this launcher says.
            port: on the first node, the port at which the processes of the next attempt will meet.

        Returns:
            The decision; its list of nodes has this one, or is empty.

        Raises:
            ConfigError: the first node has no launcher that restarts.
            PeerLostError: it does not answer.
        """
        if self._listening is not None and self._server is None:  # not before: this imports torch
            self._server = _serve(self._listening)
        try:
            return self._decide(post, port) if self._listening is not None else self._follow(post)
        finally:
            self.seconds = self._rejoin_seconds

    def _decide(self, post: Post, port: int) -> Decision:
        """Decide a round, on the first node."""
        began, store, said = time.monotonic(), self._server, False
        store.set("open", str(self._round))
        while True:
            stop = self._stopped()
            if stop is not None and post.is_ready:
                post = Post(post.node, False, EXIT_AGAIN, stop)
            self.posts = [*self._counting(_read_posts(store, self._round)), post]
            seconds = time.monotonic() - began
            decision = decide(self.posts, self._expected, self._least, seconds > self.seconds)
            if decision is not None:
                break
            if seconds > _QUIET_SECONDS and not said:
                said = True
                missing = sorted(set(self._expected) - {each.node for each in self.posts})
                log.info("waiting for the launcher of node %s", ", ".join(map(str, missing)))
            time.sleep(_POLL_SECONDS)
        decision = replace(decision, port=port)
        store.set(f"decision/{self._round}", json.dumps(asdict(decision)))
        if not decision.posts:  # the last round stays the current one, for launchers that come a little later
            ended = {each.node for each in self.posts if not each.is_ready}
            self._wait_for_readers(len(set(self._expected) - {post.node} - ended))
            return decision
        self._round += 1
        store.set("round", str(self._round))
        self._expected = decision.nodes
        return decision

    def _counting(self, posts: Iterable[Post]) -> list[Post]:
        """Return the posts without those that are ready, but whose launchers no longer say so."""
        now, counting = time.monotonic(), []
        for post in posts:
            signs = self._server.add(_sign_key(post), 0)
            before, since = self._seen.get(post.name, (signs, float("-inf")))
            self._seen[post.name] = signs, now if signs != before else since
            if not post.is_ready or now - self._seen[post.name][1] < _FRESH_SECONDS:  # guard: stale-post
                counting.append(post)
        return counting

    def _wait_for_readers(self, number: int) -> None:
        """Wait until the others have read that the job ends: the store ends with this process."""
        deadline = time.monotonic() + _READ_SECONDS
        while self._server.add("read", 0) < number and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def _follow(self, post: Post) -> Decision:
        """Take part in a round that the first node decides."""
        if not post.is_ready:
            with contextlib.suppress(PeerLostError):  # the job may have ended
                self._client.ask(lambda store: _write_post(store, int(store.get("round")), post))
            return Decision(reason=post.reason, code=post.code)
        deadline, said = time.monotonic() + self.seconds, False
        is_posted, posted_in = False, None
        while True:
            stop = self._stopped()
            if stop is not None:
                return self._follow(Post(post.node, False, EXIT_AGAIN, stop))
            try:
                number = self._client.ask(lambda store: _show(store, post))
                decision = self._decision(posted_in) if posted_in is not None else None
                if decision is not None and self._is_for(post, decision):
                    self._round = posted_in or 0
                    return decision
                if decision is not None or not is_posted:  # a round that was decided without this node, or is over
                    posted_in = number
                    self._client.ask(partial(_write_post, number=number, post=post))
                    is_posted = True
                deadline = time.monotonic() + self.seconds  # the first node answers
            except PeerLostError:
                if time.monotonic() > deadline:
                    raise
                is_posted = False  # the post may be lost; if it is not, the decision that names it counts
                if not said:
                    said = True
                    log.info("waiting for the launcher of the first node, at %s", self._client.address)
            time.sleep(_POLL_SECONDS)

    @staticmethod
    def _is_for(post: Post, decision: Decision) -> bool:
        """Whether a launcher acts on a decision: it ends the job, or names its post."""
        return not decision.posts or post.name in [each.name for each in decision.posts]

    def _decision(self, number: int) -> Decision | None:
        key = f"decision/{number}"

        def read(store: Any) -> Decision | None:
            if not store.check([key]):
                return None
            if int(store.get("open")) > number:  # guard: decision-that-is-over
                return _OVER  # its attempt has ended: this launcher was cut off meanwhile
            content = json.loads(store.get(key))
            posts = tuple(Post(**each) for each in content.pop("posts"))
            if not posts:
                store.add("read", 1)
            return Decision(posts, **content)

        return self._client.ask(read)

    @contextlib.contextmanager
    def next_round(self) -> Iterator[Callable[[], bool]]:
        """Yield a function that returns whether the first node has opened the next round: it ended this attempt."""
        over, ended = threading.Event(), threading.Event()
        if self._listening is None:
            arguments = (_Client(self._topology), self._round, over, ended)
            threading.Thread(target=_wait_for_round, args=arguments, name="distrain-round", daemon=True).start()
        try:
            yield over.is_set
        finally:
            ended.set()


class _Client:
    """A connection to the store of the first node, made again after the link was lost."""

    def __init__(self, topology: Topology) -> None:
        self._topology, self.address = topology, host_port(topology.host, topology.port)
        self._store: Any = None

    def ask(self, action: Callable[[Any], T]) -> T:
        """Return the result of `action`, called with the store in a thread.

        Raises:
            ConfigError: another store is there.
            PeerLostError: no answer in time.
        """
        answers: list[T] = []
        errors: list[Exception] = []
        client = self._store

        def work() -> None:
            try:
                store = client or _connect(self._topology)
                answers.append(action(store))
                self._store = store
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=work, name="distrain-agreement", daemon=True)
        thread.start()
        thread.join(_ANSWER_SECONDS if client is not None else 2 * _ANSWER_SECONDS)  # guard: answer-deadline
        if answers:
            return answers[0]
        self._store = None  # a call may still wait in it
        if errors and isinstance(errors[0], ConfigError):
            raise errors[0]
        cause = str(errors[0]).partition("\n")[0][:200] if errors else f"no answer within {_ANSWER_SECONDS:g} s"
        raise PeerLostError(f"the launcher of the first node, at {self.address}, does not answer: {cause}")


def _wait_for_round(client: _Client, number: int, over: threading.Event, ended: threading.Event) -> None:
    """Set `over` when a later round than `number` is open, until `ended` is set."""
    while not ended.wait(_ASK_SECONDS):
        with contextlib.suppress(PeerLostError, ConfigError):  # the processes detect that, and this launcher then
            if client.ask(lambda store: int(store.get("open"))) > number:
                over.set()
                return


def _store_type() -> Any:
    """Import the store's class when it is needed: a launcher of one node answers quickly, and takes little memory."""
    before = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # read now; else each lost connection is a page of C++ frames
    try:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]
    finally:
        if before is None:
            del os.environ["TORCH_CPP_LOG_LEVEL"]
        else:
            os.environ["TORCH_CPP_LOG_LEVEL"] = before
    return TCPStore


def _serve(listening: socket.socket) -> Any:
    store = _store_type()(
        LOCAL,
        listening.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=_ANSWER_SECONDS),
        master_listen_fd=listening.detach(),
    )
    store.set("round", "0")
    store.set(LAUNCHERS, "")
    return store


def _connect(topology: Topology) -> Any:
    """Connect to the store of the first node.

    Raises:
        ConfigError: it is that of worker processes.
    """
    seconds = timedelta(seconds=_ANSWER_SECONDS)
    store = _store_type()(topology.host, topology.port, is_master=False, timeout=seconds)
    if not store.check([LAUNCHERS]):
        time.sleep(_POLL_SECONDS)  # it may have been created in this moment
        if not store.check([LAUNCHERS]):
            raise ConfigError("the first node was started without --restarts, this one with it: give both the same")
    return store


def _sign_key(post: Post) -> str:
    return f"sign/{post.name}"


def _show(store: Any, post: Post) -> int:
    """Show that the launcher of a post still waits; return the number of the round."""
    store.add(_sign_key(post), 1)
    return int(store.get("round"))


def _write_post(store: Any, number: int, post: Post) -> None:
    index = store.add(f"posts/{number}", 1)
    store.set(f"post/{number}/{index}", json.dumps(asdict(post)))


def _read_posts(store: Any, number: int) -> list[Post]:
    keys = [f"post/{number}/{index}" for index in range(1, store.add(f"posts/{number}", 0) + 1)]
    return [Post(**json.loads(store.get(key))) for key in keys if store.check([key])]
