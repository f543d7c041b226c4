"""Launchers agree on each attempt: the decision is a pure function; the rounds use a real store, in threads."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from distrain.errors import ConfigError, PeerLostError
from distrain.launcher import agreement
from distrain.launcher.agreement import Agreement, Decision, Post, decide
from distrain.launcher.cluster import LOCAL, Topology

SECONDS = 30
"""Longest wait for a thread."""


@given(st.lists(st.builds(Post, st.integers(0, 4), st.booleans())), st.booleans(), st.integers(1, 5))
def test_a_decision_is_an_end_or_has_the_newest_post_of_each_node(posts: list[Post], is_late: bool, least: int) -> None:
    posts = [*posts, Post(0)]
    newest = {post.node: post for post in posts}
    decision = decide(posts, range(5), least, is_late)
    if not all(post.is_ready for post in newest.values()):
        assert decision is not None
        assert decision.nodes == []
    elif len(newest) < 5 and not is_late:
        assert decision is None
    elif len(newest) < least:
        assert decision is not None
        assert decision.nodes == []
        assert "is missing" in decision.reason
    else:
        assert decision == Decision(tuple(newest[node] for node in sorted(newest)))


def test_a_node_that_is_not_waited_for_may_take_part() -> None:
    assert decide([Post(2), Post(0)], expected=[0], least=1, is_late=False).nodes == [0, 2]  # type: ignore[union-attr]
    left = Post(2, is_ready=False)
    assert decide([Post(2), left, Post(0)], expected=[0], least=1, is_late=False).nodes == [0]  # type: ignore[union-attr]


Launcher = Callable[..., Agreement]


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    """`launcher(node, nodes)`: the agreement of a launcher; all of a test meet at the same port."""
    listening = socket.create_server((LOCAL, 0))
    port = listening.getsockname()[1]

    def start(
        node: int, nodes: int = 2, least: int | None = None, seconds: float = SECONDS, stop: str | None = None
    ) -> Agreement:
        topology = Topology(nodes, node, LOCAL, port, "test")
        return Agreement(topology, least or nodes, seconds, seconds, lambda: stop, listening if node == 0 else None)

    yield start
    listening.close()


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """Return the results, or exceptions, of calls that wait for each other."""
    results: list[Any] = [None] * len(calls)

    def run(index: int, call: Callable[[], Any]) -> None:
        try:
            results[index] = call()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    return results


def test_launchers_meet_before_each_attempt(launcher: Launcher) -> None:
    first, second = launcher(0), launcher(1)
    for port in (1111, 2222):
        decisions = in_threads(partial(first.meet, Post(0), port), partial(second.meet, Post(1)))
        assert [(each.nodes, each.port) for each in decisions] == [([0, 1], port)] * 2


def test_the_end_of_one_is_the_end_of_all(launcher: Launcher) -> None:
    first, second, third = (launcher(node, 3, seconds=3) for node in range(3))
    fault = Post(2, is_ready=False, code=1, reason="a fault", killed=False)
    decisions = in_threads(lambda: first.meet(Post(0)), lambda: second.meet(Post(1)), lambda: third.meet(fault))
    assert [(each.nodes, each.reason, each.code) for each in decisions] == [([], "a fault", 1)] * 3
    assert fault in first.posts


def test_the_first_node_waits_for_one_that_is_done_a_little_later(launcher: Launcher) -> None:
    first, second = launcher(0), launcher(1)
    in_threads(lambda: first.meet(Post(0)), lambda: second.meet(Post(1)))

    def later() -> Decision:
        time.sleep(0.5)
        return second.meet(Post(1))

    began = time.monotonic()
    decisions = in_threads(lambda: first.meet(Post(0, is_ready=False, code=0, reason="done")), later)
    assert [(each.nodes, each.code) for each in decisions] == [([], 0)] * 2
    assert 0.5 < time.monotonic() - began < agreement._READ_SECONDS


def test_a_launcher_that_is_started_again_takes_part_in_the_next_attempt(launcher: Launcher) -> None:
    first, lost = launcher(0), launcher(1)
    in_threads(lambda: first.meet(Post(0)), lambda: lost.meet(Post(1)))
    again = launcher(1)
    decisions = in_threads(lambda: again.meet(Post(1)), lambda: first.meet(Post(0)))
    assert [each.nodes for each in decisions] == [[0, 1]] * 2


def test_without_a_lost_node_the_others_continue(launcher: Launcher) -> None:
    first, second, lost = (launcher(node, 3, least=2, seconds=2) for node in range(3))
    in_threads(*(lambda each=each, node=node: each.meet(Post(node)) for node, each in enumerate((first, second, lost))))
    decisions = in_threads(lambda: first.meet(Post(0)), lambda: second.meet(Post(1)))
    assert [each.nodes for each in decisions] == [[0, 1]] * 2
    returned = threading.Thread(target=lost.meet, args=[Post(2)], daemon=True)
    returned.start()
    while not any(post.node == 2 for post in _posts(first)):
        time.sleep(0.01)
    decisions = in_threads(lambda: first.meet(Post(0)), lambda: second.meet(Post(1)))
    assert [each.nodes for each in decisions] == [[0, 1, 2]] * 2
    returned.join(SECONDS)
    assert not returned.is_alive()


def test_a_launcher_that_has_ended_after_its_post_does_not_take_part(launcher: Launcher) -> None:
    first = launcher(0, least=1, seconds=0.2)
    assert first.meet(Post(0)).nodes == [0]
    agreement._write_post(first._server, first._round, Post(1))
    assert first.meet(Post(0)).nodes == [0]


def test_a_launcher_sees_that_the_first_node_has_opened_the_next_round(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "_ASK_SECONDS", 0.05)
    first, second = launcher(0), launcher(1)
    for _ in range(2):
        in_threads(lambda: first.meet(Post(0)), lambda: second.meet(Post(1)))
    with second.next_round() as is_over, first.next_round() as is_over_on_first:
        time.sleep(0.3)
        assert not is_over()
        opened = threading.Thread(target=first.meet, args=[Post(0)], daemon=True)
        opened.start()
        deadline = time.monotonic() + SECONDS
        while not is_over():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not is_over_on_first()
        second.meet(Post(1))
        opened.join(SECONDS)


def test_a_first_node_without_restarts_is_named() -> None:
    store = TCPStore(LOCAL, 0, is_master=True, wait_for_workers=False)
    second = Agreement(Topology(2, 1, LOCAL, store.port, "test"), 2, SECONDS, SECONDS, lambda: None, None)
    with pytest.raises(ConfigError, match="the first node was started without --restarts"):
        second.meet(Post(1))


def _posts(first: Agreement) -> list[Post]:
    return agreement._read_posts(first._server, first._round)


@pytest.mark.parametrize("is_over", [False, True])
def test_a_link_that_is_cut_after_the_post(launcher: Launcher, monkeypatch: pytest.MonkeyPatch, is_over: bool) -> None:
    """The decision that was missed counts while its attempt waits for this node; later the next round does."""
    first, second = launcher(0), launcher(1)
    healed, read = threading.Event(), second._decision

    def cut(number: int) -> Decision | None:
        if not healed.is_set():
            raise PeerLostError("cut")
        return read(number)

    monkeypatch.setattr(second, "_decision", cut)

    def decide_once_or_twice() -> Decision:
        decision = first.meet(Post(0), 1111)
        if is_over:
            first._server.set("open", str(first._round))  # as `meet` does at once
        healed.set()
        return first.meet(Post(0), 2222) if is_over else decision

    decisions = in_threads(decide_once_or_twice, lambda: second.meet(Post(1)))
    assert [(each.nodes, each.port) for each in decisions] == [([0, 1], 2222 if is_over else 1111)] * 2


def test_too_few_nodes_end_the_job(launcher: Launcher) -> None:
    first = launcher(0, seconds=0.2)
    assert first.meet(Post(0)).reason == "node 1 is missing; at least 2 nodes must take part"


def test_a_stop_ends_the_wait(launcher: Launcher) -> None:
    first, second = launcher(0, 3), launcher(1, 3, stop="stopped by SIGTERM")
    decisions = in_threads(lambda: first.meet(Post(0)), lambda: second.meet(Post(1)))
    assert [(each.nodes, each.reason) for each in decisions] == [([], "stopped by SIGTERM")] * 2


def test_a_first_node_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_ANSWER_SECONDS", 0.3)
    with socket.create_server((LOCAL, 0)) as server:  # it accepts connections, and never answers
        port = server.getsockname()[1]
        second = Agreement(Topology(2, 1, LOCAL, port, "test"), 2, 0.1, 0.1, lambda: None, None)
        [error] = in_threads(lambda: second.meet(Post(1)))
        assert isinstance(error, PeerLostError)
        assert f"the launcher of the first node, at {LOCAL}:{port}, does not answer" in str(error)
