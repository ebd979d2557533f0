"""Rules that can be written down as a table: op -> rules as text (see `partita.sharding.rules`).

A letter-free notation: ``S0`` cut along dim 0, ``R`` whole, ``P`` summand, ``_`` not there. Rules that do not fit the
shapes at hand (broadcasting, missing dims) drop out on their own.
"""

from __future__ import annotations

from partita.sharding.calls import OpCall, Slot
from partita.sharding.rules import PARTIAL, REPLICATE, Cut, Rule, parse_rules, register
from partita.sharding.rules_indices import embedding_backward_rules, embedding_rules
from partita.sharding.rules_indices import nll_loss_backward_rules as class_rules

_TABLE: dict[str, tuple[str, ...]] = {
    "mm": ("S0 R -> S0", "R S1 -> S1", "S1 S0 -> P", "P R -> P", "R P -> P"),
    "bmm": ("S0 S0 -> S0", "S1 R -> S1", "R S2 -> S2", "S2 S1 -> P", "P R -> P", "R P -> P"),
    "mv": ("S0 R -> S0", "S1 S0 -> P", "P R -> P", "R P -> P"),
    "dot": ("S0 S0 -> P", "P R -> P", "R P -> P"),
    "vdot": ("S0 S0 -> P",),
    "embedding": (
        "R S0 -> S0", "R S1 -> S1", "R S2 -> S2", "S1 R -> S-1",
    ),
    "embedding_dense_backward": (
        "S0 S0 -> P", "S1 S1 -> P", "S2 S2 -> P", "S-1 R -> S1", "P R -> P",
    ),
    "nll_loss_backward": ("R S0 S0 R -> S0",),
    "nll_loss2d_backward": ("R S0 S0 R -> S0",),
}  # fmt: skip


@register("mm", "bmm", "mv", "dot", "vdot", "embedding", "embedding_dense_backward")
def table_rules(call: OpCall) -> list[Rule]:
    texts = _TABLE[call.base_name]
    if call.base_name == "embedding_dense_backward" and call.args[4]:
        texts = ("S-1 R -> S1", "P R -> P")  # scaling by how often an index occurs needs all indices
    rules = parse_rules(texts, call)
    if call.base_name == "embedding":
        rules += embedding_rules(call)
    elif call.base_name == "embedding_dense_backward":
        rules += embedding_backward_rules(call)
    return rules


@register("addmm", "baddbmm")
def add_product_rules(call: OpCall) -> list[Rule]:
    """``addmm(bias, left, right)``: the bias is broadcast from the right; it is a summand where the product is one."""
    output, bias = call.outputs[0], call.inputs[0]
    if output is None or len(call.inputs) != 3:
        return []
    rank = len(output.shape)
    texts = []
    products = {2: ("S0 R -> 0", "R S1 -> 1"), 3: ("S0 S0 -> 0", "S1 R -> 1", "R S2 -> 2")}[rank]
    for product in products:
        left, dim_text = product.split(" -> ")
        dim = int(dim_text)
        own = dim - (rank - len(bias.shape))
        cut = own >= 0 and bias.shape[own] == output.shape[dim]
        if output.shape[dim] > 1:
            texts.append(f"{f'S{own}' if cut else 'R'} {left} -> S{dim}")
    texts.append("P S1 S0 -> P" if rank == 2 else "P S2 S1 -> P")
    return parse_rules(texts, call)


@register("nll_loss_forward", "nll_loss2d_forward")
def nll_loss_rules(call: OpCall) -> list[Rule]:
    """``(input, target, weight, reduction, ignore_index) -> (loss, total_weight)``; the mean is decomposed."""
    has_weight = isinstance(call.args[2], Slot)
    weight = " R" if has_weight else ""
    reduction = call.argument(3, "reduction", 1)
    if reduction == 2:
        return parse_rules([f"S0 S0{weight} -> P P", f"P R{weight} -> P R"], call)
    if reduction == 0:
        # Without reduction torch leaves the total weight 0.
        return parse_rules([f"S0 S0{weight} -> S0 R"], call)
    return []


@register("nll_loss_backward", "nll_loss2d_backward")
def nll_loss_backward_rules(call: OpCall) -> list[Rule]:
    """``(grad, input, target, weight, reduction, ignore_index, total_weight) -> grad_input``."""
    weight = " R" if isinstance(call.args[3], Slot) else ""
    grad = "S0" if call.args[4] == 0 else "R"
    rules = parse_rules([f"{grad} S0 S0{weight} R -> S0", f"P R R{weight} R -> P"], call)
    return rules + class_rules(call)


@register("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag_rules(call: OpCall) -> list[Rule]:
    """``(weight, indices, offsets, scale_grad_by_freq, mode, ...) -> (output, places, sizes, largest)``: the columns.

    With ``include_last_offset`` the shapes that torch declares for the last three are not those that it gives.
    """
    if call.schema_argument("include_last_offset", False):
        return []
    columns = call.inputs[0].shape[1]
    outputs = tuple(
        None if spec is None else Cut(1) if len(spec.shape) == 2 and spec.shape[1] == columns else REPLICATE
        for spec in call.outputs
    )
    rest = (REPLICATE,) * (len(call.inputs) - 1)
    rules = [Rule((Cut(1), *rest), outputs, columns)]
    if call.schema_argument("mode", 0) != 2:  # sums and means
        summands = tuple(PARTIAL if isinstance(item, Cut) else item for item in outputs)
        rules.append(Rule((PARTIAL, *rest), summands))
    return rules


@register("_embedding_bag_backward", "_embedding_bag_dense_backward", "_embedding_bag_per_sample_weights_backward")
def embedding_bag_backward_rules(call: OpCall) -> list[Rule]:
    """The gradient's columns, ``(grad, indices, ...) -> grad of weight`` and ``(grad, weight, ...) -> grad of the
    samples' weights``, a sum over columns; linear in the gradient.

    Written, not found: bags are told by several tensors that must fit together, which random ones do not.
    """
    columns = call.inputs[0].shape[1]
    matrices = [len(spec.shape) == 2 and spec.shape[1] == columns for spec in call.inputs]
    inputs = tuple(Cut(1) if is_matrix else REPLICATE for is_matrix in matrices)
    summed = "per_sample" in call.base_name
    rules = [Rule(inputs, (PARTIAL if summed else Cut(1),), columns)]
    return [*rules, Rule((PARTIAL, *(REPLICATE,) * (len(inputs) - 1)), (PARTIAL,))]


@register("segment_reduce", "_segment_reduce_backward")
def segment_rules(call: OpCall) -> list[Rule]:
    """Segments are told by lengths or offsets that must fit the data: whole inputs."""
    del call
    return []


@register("lstm_layer", "lstm_layer_backward")
def lstm_rules(call: OpCall) -> list[Rule]:
    """``(input, 4 weights, hx, cx) -> (output, hy, cy, workspace)`` and its gradients: rows of the batch (dim 1 of what
    has a time, dim 0 of the rest) do not meet."""
    if call.schema_argument("batch_sizes"):
        return []  # packed sequences: the batch is no dim
    first = "S1 R R R R S0 S0"
    if call.base_name == "lstm_layer":
        return parse_rules([f"{first} -> S1 S0 S0 S0"], call)
    gradients = [
        spec for spec, argument in zip(("S1", "S0", "S0"), call.args[10:13], strict=True) if isinstance(argument, Slot)
    ]
    return parse_rules([f"{first} S1 S0 S0 {' '.join(gradients)} S0 -> S1 P P P P S0 S0"], call)


@register("masked_scatter", "unique", "nonzero", "_unique2", "bincount")
def unruled(call: OpCall) -> list[Rule]:
    """Ops whose result couples all entries: whole inputs."""
    del call
    return []
