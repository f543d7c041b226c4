"""The tree in which the gradients of virtual ranks are added: arithmetic only, no tensors or processes.

Floating-point addition is not associative: (a + b) + c and a + (b + c) have different last bits. So the order of
additions is fixed. The gradients of V virtual ranks are the leaves 0 … V-1 of a complete binary tree with 2^k places,
the smallest power of two that is at least V. Every node is the sum `left + right` of its children; a place without a
leaf is skipped, so its sibling is taken as it is, without adding a zero (-0.0 + 0.0 is 0.0).

Each process adds up the largest subtrees whose leaves it has, and whoever has all of these completes the tree: the
result does not depend on which process added what. `all_reduce` cannot do this: its order of additions depends on the
number of processes and on the size of the message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Node(NamedTuple):
    """A subtree: its first place, and its width in places, a power of two."""

    first: int
    width: int


class TreeSum(Generic[T]):
    """Adds values in the order of the tree. They are given from left to right, and added as soon as the tree allows.

    Args:
        leaves: number of leaves of the whole tree.
        add: returns left + right.
    """

    def __init__(self, leaves: int, add: Callable[[T, T], T]) -> None:
        self._leaves, self._width, self._add = leaves, 1 << (leaves - 1).bit_length(), add
        self._nodes: list[tuple[Node, T]] = []

    def push(self, node: Node, value: T) -> None:
        """Give the value of a node, the next one to the right."""
        while node.width < self._width:
            double = 2 * node.width
            if node.first % double:
                left = Node(node.first - node.width, node.width)
                if not self._nodes or self._nodes[-1][0] != left:
                    break
                value, node = self._add(self._nodes.pop()[1], value), Node(left.first, double)
            elif node.first + node.width >= self._leaves:  # nothing is to the right of it
                node = Node(node.first, double)
            else:
                break
        self._nodes.append((node, value))

    def take(self) -> list[tuple[Node, T]]:
        """Return the nodes that could not be added to others, from left to right, and begin again."""
        nodes, self._nodes = self._nodes, []
        return nodes


def subtrees(leaves: range, number: int) -> list[Node]:
    """Return the largest subtrees that consist of consecutive leaves, from left to right.

    Args:
        leaves: the leaves.
        number: number of leaves of the whole tree.
    """
    tree: TreeSum[None] = TreeSum(number, lambda left, right: None)
    for leaf in leaves:
        tree.push(Node(leaf, 1), None)
    return [node for node, _ in tree.take()]
