"""JAX twins of some families: the loss from the same weights, under the same names, on the same batches.

A twin computes in training mode what the torch model does, but keeps no running statistics of batch norm, which no
loss of training reads (in the twin's favour by a few element-wise ops). Layout is torch's; XLA chooses its own inside.

Shapes: B batch, T tokens, D model width, N heads, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Weights = Mapping[str, Array]
Twin = Callable[[Weights, Mapping[str, Array]], Array]


def linear(weights: Weights, name: str, x: Array) -> Array:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def batch_norm(weights: Weights, name: str, x: Array, *, epsilon: float = 1e-5) -> Array:
    """Statistics of the whole batch, over all dims but 1."""
    dims = (0, *range(2, x.ndim))
    shape = (1, -1, *(1,) * (x.ndim - 2))
    centred = x - x.mean(dims, keepdims=True)
    scaled = centred * lax.rsqrt((centred**2).mean(dims, keepdims=True) + epsilon)
    return scaled * weights[f"{name}.weight"].reshape(shape) + weights[f"{name}.bias"].reshape(shape)


def layer_norm(weights: Weights, name: str, x: Array, *, epsilon: float = 1e-5) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def group_norm(weights: Weights, name: str, x: Array, num_groups: int, *, epsilon: float = 1e-5) -> Array:
    grouped = x.reshape(x.shape[0], num_groups, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    scaled = (centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + epsilon)).reshape(x.shape)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    return scaled * weights[f"{name}.weight"].reshape(shape) + weights[f"{name}.bias"].reshape(shape)


def convolution(weights: Weights, name: str, x: Array, *, padding: int, num_groups: int = 1) -> Array:
    """Stride 1; [B, C, ...] with weights [C', C / num_groups, ...]."""
    kernel = weights[f"{name}.weight"]
    space = "HW"[: x.ndim - 2]
    y = lax.conv_general_dilated(
        x, kernel, (1,) * (x.ndim - 2), [(padding, padding)] * (x.ndim - 2), feature_group_count=num_groups,
        dimension_numbers=(f"NC{space}", f"OI{space}", f"NC{space}"),
    )  # fmt: skip
    if f"{name}.bias" not in weights:
        return y
    return y + weights[f"{name}.bias"].reshape(1, -1, *(1,) * (x.ndim - 2))


def max_pool(x: Array) -> Array:
    """Windows of 2 with stride 2 in every space dim."""
    window = (1, 1, *(2,) * (x.ndim - 2))
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


def cross_entropy(logits: Array, classes: Array, *, ignored: int = -100) -> Array:
    """Mean over the places whose class is not `ignored`; classes are the last dim of the logits."""
    counts = classes != ignored
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(counts, classes, 0)[..., None], -1)[..., 0]
    return -(picked * counts).sum() / counts.sum()


def mlp_batchnorm(weights: Weights, batch: Mapping[str, Array]) -> Array:
    x = batch["0"]
    for layer, norm in (("0", "1"), ("3", "4")):
        x = jax.nn.relu(batch_norm(weights, norm, linear(weights, layer, x)))
    return cross_entropy(linear(weights, "6", x), batch["1"])


def mixture_density(weights: Weights, batch: Mapping[str, Array]) -> Array:
    hidden = jnp.tanh(linear(weights, "trunk.2", jnp.tanh(linear(weights, "trunk.0", batch["0"]))))
    weight, mean, log_scale = jnp.split(linear(weights, "head", hidden), 3, axis=-1)
    log_scale = jnp.clip(log_scale, -5, 3)
    distance = (batch["1"][:, None] - mean) * jnp.exp(-log_scale)
    return -jax.nn.logsumexp(jax.nn.log_softmax(weight) - log_scale - 0.5 * distance**2, axis=-1).mean()


def conv1d(weights: Weights, batch: Mapping[str, Array]) -> Array:
    x = max_pool(jax.nn.gelu(convolution(weights, "0", batch["0"], padding=2), approximate=False))
    x = group_norm(weights, "4", convolution(weights, "3", x, padding=2, num_groups=4), 4)
    return cross_entropy(linear(weights, "8", jax.nn.gelu(x, approximate=False).mean(-1)), batch["1"])


def unet(weights: Weights, batch: Mapping[str, Array]) -> Array:
    def block(name: str, x: Array) -> Array:
        return jax.nn.relu(batch_norm(weights, f"{name}.1", convolution(weights, f"{name}.0", x, padding=1)))

    skip = block("down", batch["0"])
    low = block("bottom", max_pool(skip))
    # A transposed convolution whose stride is its window: every place becomes a window of its own.
    spread = jnp.einsum("bihw,ioyx->bohywx", low, weights["up.weight"])
    B, C, H, _, W, _ = spread.shape
    raised = spread.reshape(B, C, 2 * H, 2 * W) + weights["up.bias"].reshape(1, -1, 1, 1)
    logits = convolution(weights, "head", block("merge", jnp.concatenate([raised, skip], axis=1)), padding=0)
    return cross_entropy(jnp.moveaxis(logits, 1, -1), batch["1"])


NUM_HEADS = 4  # of `benchmarks.families` at all scales


def masked_tokens(weights: Weights, batch: Mapping[str, Array]) -> Array:
    """A pre-norm encoder whose head shares the weights of the embedding."""
    x = weights["tokens.weight"][batch["tokens"]] + weights["positions"]
    num_layers = sum(name.endswith("self_attn.in_proj_weight") for name in weights)
    for index in range(num_layers):
        x = _encoder_layer(weights, f"encoder.layers.{index}", x)
    return cross_entropy(x @ weights["tokens.weight"].T, batch["labels"])


def _encoder_layer(weights: Weights, name: str, x: Array) -> Array:
    B, T, D = x.shape
    h = layer_norm(weights, f"{name}.norm1", x)
    qkv = h @ weights[f"{name}.self_attn.in_proj_weight"].T + weights[f"{name}.self_attn.in_proj_bias"]
    q, k, v = (part.reshape(B, T, NUM_HEADS, D // NUM_HEADS) for part in jnp.split(qkv, 3, axis=-1))
    y = jax.nn.dot_product_attention(q, k, v).reshape(B, T, D)
    x = x + linear(weights, f"{name}.self_attn.out_proj", y)
    h = jax.nn.relu(linear(weights, f"{name}.linear1", layer_norm(weights, f"{name}.norm2", x)))
    return x + linear(weights, f"{name}.linear2", h)


TWINS: Mapping[str, Twin] = {
    "mlp_batchnorm": mlp_batchnorm,
    "mixture_density": mixture_density,
    "conv1d": conv1d,
    "unet": unet,
    "masked_tokens": masked_tokens,
}
