"""Lets connections change between two steps."""

from __future__ import annotations

from partita.graph import Graph
from partita.graph.feeds import feeding_weights
from partita.graph.graph import InputKind
from partita.plan import Plan
from partita.training.block_runner import BlockRunner
from partita.training.collecting import sources_for_first
from partita.training.connecting import Cut, Tensors
from partita.training.events import ConnectionsChanged, emit
from partita.training.graph_runner import GraphRunner
from partita.training.setup import StepSetup
from partita.units import split_evenly

Runner = GraphRunner | BlockRunner


def change_connections(setup: StepSetup, runner: Runner, usual: Runner | None, step: int, *, skipped: bool) -> None:
    """After step number `step`, if they are due. Gradients of a skipped one say nothing.

    Args:
        setup: of the step.
        runner: has made it.
        usual: makes most steps; connections are priced by its cuts. None: no plan is adopted yet.
    """
    connecting = setup.connecting
    if connecting is None:
        return
    if setup.facts.kind != "element":  # zero gradients do not keep a weight where it is
        connecting.clean_weights()
    if not connecting.method.is_due(step) or (skipped and connecting.wants_gradients):
        return
    runner.collect()
    left, come = connecting.change(step, sources_for_first(runner, connecting.masks), cuts_of(setup, usual))
    connecting.clean(setup.optimizer)
    runner.take_weights()
    runner.load_state()
    emit(ConnectionsChanged(step=step, left=left, come=come, density=connecting.density))


def cuts_of(setup: StepSetup, usual: Runner | None) -> dict[str, Cut]:
    """How the layers' outputs and inputs lie on devices, where connections are priced by that."""
    connecting = setup.connecting
    if connecting is None or not connecting.method.prices_crossing or not isinstance(usual, GraphRunner):
        return {}
    return layer_cuts(usual.plan, usual.graph, connecting.masks)


def explained(setup: StepSetup, usual: Runner | None) -> tuple[str, ...]:
    """What of this is to be told, for the plan's reasons."""
    if setup.connecting is None or not setup.connecting.method.prices_crossing or usual is None:
        return setup.explained
    cuts = cuts_of(setup, usual)
    told = (
        f"new connections of {', '.join(cuts)} are priced by the inputs that they make cross devices"
        if cuts
        else "no connection makes an input cross devices under this plan, so crossing has no effect: the plan cuts the "
        "outputs of no layer that reads the outputs of another one which it cuts"
    )
    return (*setup.explained, told)


def layer_cuts(plan: Plan, graph: Graph, masks: Tensors) -> dict[str, Cut]:
    """The cuts of layers whose outputs a plan cuts along its tensor axis and whose inputs are outputs of another such
    layer. Weights are cut in dim 0: of outputs, or of blocks of them.

    Args:
        plan: of the graph.
        graph: the captured step.
        masks: by the weight of a layer, in its dense shape.
    """
    num_devices = plan.axes.get("tensor", 1)
    cut = [name for name, by_axis in plan.inputs.items() if by_axis.get("tensor") == "S(0)"]
    shapes = {item.name: item.shape for item in graph.inputs_of(InputKind.PARAMETER)}
    outputs = {}
    for name in cut:
        if name in shapes and len(shapes[name]) > 1:
            size = masks[name].shape[0] // shapes[name][0] if name in masks else 1
            outputs[name] = tuple(size * length for length in split_evenly(shapes[name][0], num_devices))
    return {
        name: Cut(outputs[name], outputs[source])
        for name, source in feeding_weights(graph).items()
        if name in masks and name in outputs and source in outputs
    }
