"""Where ops belong that every worker could run: free nodes, and the backward ops of parameters.

A *place* is a whole number that grows along the forward phase: a stage of a pipeline, or the position of an op.
Planning and lowering ask the same questions of it, one by positions and one by stages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import fx

from partita.graph.graph import Input, InputKind
from partita.graph.randomness import is_random

_FREE_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT, InputKind.SEED)


def free_nodes(nodes: Iterable[fx.Node], inputs: Mapping[str, Input]) -> frozenset[str]:
    """Names of the nodes that follow from parameters, buffers, constants and factories alone, without random draws:
    whoever reads one computes it itself.

    Args:
        nodes: of one graph, in order, from its placeholders on.
        inputs: what is known of placeholders, by name; one that is not among them is not free.
    """
    known = {name for name, item in inputs.items() if item.kind in _FREE_KINDS}
    free: set[str] = set()
    for node in nodes:
        if node.op == "placeholder":
            is_free = node.name in known
        else:
            is_free = not is_random(node) and all(item.name in free for item in node.all_input_nodes)
        if is_free:
            free.add(node.name)
    return frozenset(free)


def homes(nodes: Iterable[fx.Node], place: Mapping[str, int], free: Collection[str]) -> dict[str, int]:
    """Free nodes -> the first place where the forward phase reads them, directly or through other free nodes.

    Args:
        place: of the forward phase's other nodes.
    """
    found: dict[str, int] = {}
    for node in reversed(list(nodes)):
        if node.name in free:
            read = [found[user.name] for user in node.users if user.name in found]
            read += [place[user.name] for user in node.users if user.name in place and user.name not in free]
            if read:
                found[node.name] = min(read)
    return found


def least_places(backward: Iterable[fx.Node], gradients: Mapping[str, str], home: Mapping[str, int]) -> dict[str, int]:
    """Backward ops that lead to a parameter's gradient -> the last place at which one of these parameters lives.

    Without it, a weight gradient would follow the activation that it reads to the stage before, and the new weight
    would have to come back every step.

    Args:
        backward: ops of the backward phase, in order.
        gradients: node of a parameter's gradient -> the parameter's placeholder.
        home: of parameters, see `homes`.
    """
    least: dict[str, int] = {}
    for node in reversed(list(backward)):
        wanted = [least[user.name] for user in node.users if user.name in least]
        if node.name in gradients:
            wanted.append(home.get(gradients[node.name], 0))
        if wanted:
            least[node.name] = max(wanted)
    return least
