"""Networks with more units that compute the same.

    copies    new units are copies of others, and those who read them take a share of each: a unit of which there are
              k now is read with weights 1/k of what they were (Chen, Goodfellow and Shlens 2016, "Net2Net")
    pairs     new units come in pairs that are read with opposite weights: whatever they compute, it cancels
    gradmax   new units compute nothing, and are read with those weights by which the gradients of what makes them are
              largest, so that they learn fastest (Evci et al. 2022, "GradMax")

Reading means weights whose op sums over the units. Where another op reads all units at once (a layer norm, queries with
keys), more of them change what it computes, and the width can't grow like this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from partita.arguments import check_number
from partita.errors import InputError
from partita.search.structure.network import Network

How = Literal["copies", "pairs"]
TINY = 1e-7  # what new units of gradmax compute, so that a ReLU passes gradients: its step at 0 has none
MOST_PROBES = 1024


def widened(network: Network, sizes: Mapping[str, int], *, how: How = "copies", seed: int = 0) -> Network:
    """The network with more units of some widths, and the same results.

    Args:
        sizes: of the widths that grow, afterwards.
        how: "copies" or "pairs" (one unit of an odd number is read with weight zero).
        seed: of the random choices.

    Raises:
        InputError: a size is smaller than it is now, or results can't stay the same.

    Example:
        >>> larger = widened(network, {"fc1": 200})
        >>> torch.testing.assert_close(larger.model(x), network.model(x))
    """
    if how not in ("copies", "pairs"):
        raise InputError(f'how must be "copies" or "pairs", but got {how!r}; see also gradmax()')
    random = Generator().manual_seed(seed)
    units = {name: _more_units(network, name, size, random) for name, size in sizes.items()}
    grown = network.with_units(units)
    with torch.no_grad():
        for name, now in units.items():
            if how == "copies":
                _share(grown, name, now)
            else:
                _pair(grown, name, network.width(name).size, random)
    return grown


def _more_units(network: Network, name: str, size: int, random: Generator) -> Tensor:
    """The units there are, then random ones of them for those to come."""
    old = network.width(name).size
    check_number(size, f"the size of {name}", least=1, whole=True)
    if size < old:
        raise InputError(
            f"widening makes widths larger, but {name!r} has {old} units and {size} are wanted; use pruned()"
        )
    reasons = network.reads_all(name)
    if reasons:
        raise InputError(f"results must stay the same while {name!r} grows, but they can't: {'; '.join(reasons)}")
    if not network.outgoing(name):
        raise InputError(f"{name!r} must be read with weights of the network to grow, but it is not")
    return torch.cat([torch.arange(old), torch.randint(old, (size - old,), generator=random)])


def _share(grown: Network, name: str, units: Tensor) -> None:
    """Whoever reads a unit takes an equal share of each of its copies."""
    counts = units.bincount()[units]
    for tensor, dim in grown.outgoing(name):
        mine = grown.units(name, tensor, dim)
        shares = torch.where(mine >= 0, 1 / counts[mine.clamp_min(0)], 1.0)
        value = grown.tensors[tensor]
        value.mul_(shares.to(value).view([-1 if at == dim else 1 for at in range(value.ndim)]))


def _pair(grown: Network, name: str, old: int, random: Generator) -> None:
    """Units after the first ``old`` are random, two alike each, which are read with opposite weights."""
    new = grown.width(name).size
    firsts, seconds = torch.arange(old, new - 1, 2), torch.arange(old + 1, new, 2)
    for tensor, dim in _incoming(grown, name):
        value = grown.tensors[tensor]
        first, second = (_entries(grown, name, tensor, dim, units) for units in (firsts, seconds))
        if tensor in grown.parameters and tensor not in grown.trace.scales and len(first):
            noise = torch.randn(value.index_select(dim, first).shape, generator=random).to(value)
            value.index_copy_(dim, first, noise * value.std(unbiased=False))
        value.index_copy_(dim, second, value.index_select(dim, first))
    for tensor, dim in grown.outgoing(name):
        value = grown.tensors[tensor]
        first, second = (_entries(grown, name, tensor, dim, units) for units in (firsts, seconds))
        value.index_copy_(dim, second, -value.index_select(dim, first))
        if (new - old) % 2:
            value.index_fill_(dim, _entries(grown, name, tensor, dim, torch.tensor([new - 1])), 0)


def _incoming(network: Network, name: str) -> list[tuple[str, int]]:
    """What makes the units."""
    outgoing = set(network.outgoing(name))
    return [use for use in network.uses(name) if use not in outgoing]


def _entries(network: Network, name: str, tensor: str, dim: int, units: Tensor) -> Tensor:
    """The entries of a dim that belong to these units, unit by unit, on the tensor's device."""
    mine = network.units(name, tensor, dim)
    found = [(mine == unit).nonzero().flatten() for unit in units.tolist()]
    return torch.cat([*found, torch.empty(0, dtype=torch.long)]).to(network.tensors[tensor].device)


# -- gradmax ----------------------------------------------------------------------------------------------------------


def gradmax(
    network: Network, sizes: Mapping[str, int], loss: Callable[[nn.Module], Tensor], *, seed: int = 0
) -> Network:
    """The network with more units of some widths, which get the largest gradients that units can get that change
    nothing.

    The gradient of what makes a unit that computes nothing is linear in the weights with which it is read. So one
    backward pass of a network with one such unit for each of these weights gives the whole linear map, through whatever
    lies between, and its largest singular vectors are the weights sought.

    Args:
        sizes: of the widths that grow, afterwards.
        loss: of a module, on one batch; the more samples, the better.
        seed: of the directions that are tried, where a unit is read with more than `MOST_PROBES` weights.

    Raises:
        InputError: a size is smaller than it is now, results can't stay the same, or new units get no gradient.

    Example:
        >>> larger = gradmax(network, {"fc1": 200}, lambda model: F.cross_entropy(model(x), y))
    """
    random = Generator().manual_seed(seed)
    for name, size in sizes.items():
        units = _more_units(network, name, size, random)
        if size > network.width(name).size:
            weights, kept = _fastest(network, name, size - network.width(name).size, loss, random)
            network = _with_silent(network, name, units, weights, kept)
    return network


def _fastest(
    network: Network, name: str, num: int, loss: Callable[[nn.Module], Tensor], random: Generator
) -> tuple[Tensor, str]:
    """(new units, weights of each) with which they are read, and what makes them and is not zero.

    A unit that is a product (a gated one) gets no gradient where both factors are zero: one of them is not, then.
    """
    old = network.width(name).size
    length = sum(_per_unit(network, name, *use) for use in network.outgoing(name))
    directions = torch.eye(length)
    if length > MOST_PROBES:
        directions = torch.linalg.qr(torch.randn(length, MOST_PROBES, generator=random)).Q.T
    units = torch.cat([torch.arange(old), torch.randint(old, (1,), generator=random).expand(len(directions))])
    makers = [tensor for tensor, _ in _incoming(network, name)
              if tensor in network.parameters and network.tensors[tensor].ndim > 1]  # fmt: skip
    for kept in ("", *(makers if len(makers) > 1 else ())):
        probe = _with_silent(network, name, units, directions, kept)
        loss(probe.model).backward()
        gradients = [_rows(probe, name, tensor, dim, old) for tensor, dim in _incoming(probe, name) if tensor in makers]
        left, strengths, _ = torch.linalg.svd(torch.cat(gradients, 1), full_matrices=False)
        useful = int((strengths > strengths[0] * 1e-6).sum()) if strengths[0] > 0 else 0
        if useful:
            best = left[:, torch.arange(num) % useful].T @ directions
            return best * _usual_size(network, name), kept
    raise InputError(
        f"new units of {name!r} must get gradients to grow by gradmax, but they get none: what lies behind them passes "
        'none where they are zero; use widened(how="pairs")'
    )


def _usual_size(network: Network, name: str) -> Tensor:
    """The norm of the weights with which a unit is read, on average."""
    units = torch.arange(network.width(name).size)
    found = [_outgoing_rows(network, name, tensor, dim, units) for tensor, dim in network.outgoing(name)]
    size: Tensor = torch.cat(found, 1).norm(dim=1).mean()
    return size


def _per_unit(network: Network, name: str, tensor: str, dim: int) -> int:
    value = network.tensors[tensor]
    return value.numel() // value.shape[dim] * int((network.units(name, tensor, dim) == 0).sum())


def _outgoing_rows(network: Network, name: str, tensor: str, dim: int, units: Tensor) -> Tensor:
    """(units, weights with which each is read) of one tensor."""
    value = network.tensors[tensor].detach()
    found = value.index_select(dim, _entries(network, name, tensor, dim, units)).movedim(dim, 0)
    return found.reshape(len(units), -1).float().cpu()


def _rows(network: Network, name: str, tensor: str, dim: int, old: int) -> Tensor:
    """(new units, gradient of what makes each) of one tensor."""
    gradient = network.parameters[tensor].grad
    assert gradient is not None
    units = torch.arange(old, network.width(name).size)
    found = gradient.index_select(dim, _entries(network, name, tensor, dim, units)).movedim(dim, 0)
    return found.reshape(len(units), -1).float().cpu()


def _with_silent(network: Network, name: str, units: Tensor, weights: Tensor, kept: str = "") -> Network:
    """With units that compute (next to) nothing, and the weights with which each is read. What makes them is zero but
    for the parameter ``kept``, where it is that of ``units``."""
    old = network.width(name).size
    grown = network.with_units({name: units})
    new = torch.arange(old, len(units))
    with torch.no_grad():
        for tensor, dim in _incoming(grown, name):
            value, entries = grown.tensors[tensor], _entries(grown, name, tensor, dim, new)
            if tensor in grown.parameters and tensor not in grown.trace.scales and tensor != kept:
                value.index_fill_(dim, entries, 0 if value.ndim > 1 else TINY)
            elif tensor.endswith("running_mean"):
                value.index_fill_(dim, entries, 0)
            elif tensor.endswith("running_var"):
                value.index_fill_(dim, entries, 1)
        start = 0
        for tensor, dim in grown.outgoing(name):
            value, entries = grown.tensors[tensor], _entries(grown, name, tensor, dim, new)
            length = _per_unit(network, name, tensor, dim)
            part = value.index_select(dim, entries).movedim(dim, 0)
            read = part.new_zeros(len(new), part.numel() // len(new))
            by_old = _of_old_units(grown, name, tensor, dim, old).repeat(len(entries) // len(new))
            read[:, by_old.to(read.device)] = weights[:, start : start + length].to(read)
            value.index_copy_(dim, entries, read.reshape(part.shape).movedim(0, dim))
            start += length
    return grown


def _of_old_units(network: Network, name: str, tensor: str, dim: int, old: int) -> Tensor:
    """Which entries of one slice along a dim are not there for the sake of new units (of a recurrent weight, its rows
    are of the same width)."""
    shape = list(network.tensors[tensor].shape)
    del shape[dim]
    found = torch.ones(shape, dtype=torch.bool)
    for _, other in (use for use in network.uses(name) if use[0] == tensor and use[1] != dim):
        place = other - (other > dim)
        mine = network.units(name, tensor, other) < old
        found &= mine.view([-1 if at == place else 1 for at in range(len(shape))])
    return found.flatten()
