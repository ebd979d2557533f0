"""JAX: the whole training step as one `jit`, its batch sharded over CPU devices, one a core; or on a single core.

The weights and optimizer states are replicated and their buffers given back to the step; XLA inserts the sums.
Batches lie on their devices beforehand, as torch's lie in memory.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.peers.choose import NotRaced, Prepared, StepFn, Variant, fastest
from benchmarks.peers.jax_twins import TWINS, Array, Twin
from benchmarks.peers.roster import num_cores
from benchmarks.peers.workload import Workload, load_arrays

State = tuple[dict[str, Array], dict[str, Array], dict[str, Array], Array]
# Of `torch.optim.AdamW`, by its defaults.
BETA1, BETA2, EPSILON, WEIGHT_DECAY = 0.9, 0.999, 1e-8, 0.01


def adamw(state: State, gradients: Mapping[str, Array], rate: float) -> State:
    """One update of (weights, first moments, second moments, number of updates).

    I. Loshchilov and F. Hutter, "Decoupled weight decay regularization" (2019), algorithm 2, in the form and order of
    `torch.optim.AdamW`: decay first, then the step with the bias-corrected moments.
    """
    weights, first, second, count = state
    count = count + 1
    first = {name: BETA1 * first[name] + (1 - BETA1) * g for name, g in gradients.items()}
    second = {name: BETA2 * second[name] + (1 - BETA2) * g * g for name, g in gradients.items()}
    # 1 - beta**count without the cancellation that float32 would suffer.
    scale1, scale2 = -jnp.expm1(count * math.log(BETA1)), jnp.sqrt(-jnp.expm1(count * math.log(BETA2)))
    weights = {
        name: w * (1 - rate * WEIGHT_DECAY) - rate / scale1 * first[name] / (jnp.sqrt(second[name]) / scale2 + EPSILON)
        for name, w in weights.items()
    }
    return weights, first, second, count


def first_state(weights: Mapping[str, Any]) -> State:
    """Fresh arrays, since a step takes its state's buffers over."""
    own = {name: jnp.array(value) for name, value in weights.items()}
    zeros = [{name: jnp.zeros_like(value) for name, value in own.items()} for _ in range(2)]
    return own, zeros[0], zeros[1], jnp.zeros((), jnp.float32)


def training_step(twin: Twin, rate: float) -> Callable[[State, Mapping[str, Array]], tuple[State, Array]]:
    def step(state: State, batch: Mapping[str, Array]) -> tuple[State, Array]:
        loss, gradients = jax.value_and_grad(twin)(state[0], batch)
        return adamw(state, gradients, rate), loss

    return jax.jit(step, donate_argnums=0)


def mesh_step(workload: Workload, num_devices: int) -> StepFn:
    """The step over the first devices; it takes the number of a batch."""
    weights, batches, rate = load_arrays(str(workload.arrays))
    mesh = Mesh(jax.devices()[:num_devices], ("data",))
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    state = jax.device_put(first_state(weights), whole)
    placed = [jax.device_put(batch, rows) for batch in batches]
    jitted = training_step(TWINS[workload.family], rate)

    def step(index: int) -> float:
        nonlocal state
        state, loss = jitted(state, placed[index])
        return float(loss)

    return step


def prepare(name: str, workload: Workload) -> Prepared:
    if workload.family not in TWINS:
        raise NotRaced(f"a twin is written for {', '.join(TWINS)} only")
    if workload.arrays is None:
        raise ValueError("`arrays` must name a file by `save_arrays`, but is None")
    num_devices, cores = _devices_of(name)
    choices = sorted({num_devices, 1}, reverse=True)  # a single device has the threads of all its cores, too
    variants = [Variant(f"{count} device(s)", lambda count=count: mesh_step(workload, count)) for count in choices]
    num_batches = len(load_arrays(workload.arrays)[1])
    return fastest(variants, range(num_batches), label=f"{cores} core(s), ")


@functools.cache
def _devices_of(name: str) -> tuple[int, int]:
    """Numbers of devices and cores of this process, settled once.

    Before the first use of a device: XLA counts the cores that it may run on, and makes its threads, then.
    """
    if name == "jax 1":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    jax.config.update("jax_num_cpu_devices", num_cores())
    return len(jax.devices()), num_cores()
