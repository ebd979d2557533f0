"""Dropout's masks, equal to torch's bit by bit, drawn several times as fast.

All masks of a step are drawn in order by one thread before the workers start, so that every plan sees plain PyTorch's
numbers; nothing else runs meanwhile. Torch's kernel for that (`bernoulli_kernel` in ATen/native/cpu) takes its numbers
one by one; here the generator's recurrence, its tempering and the comparison are loops over the whole state that a
compiler turns into vector instructions.

    words       w_0, w_1, ... of the Mersenne Twister MT19937, from the state where torch's generator stands
    number i    x_i = (w_2i mod 2^21) 2^32 + w_2i+1, as 53 bits of a double
    mask i      1 if x_i 2^-53 < p, that is if x_i < ceil(p 2^53), else 0

On Intel's processors torch draws from MKL by another rule. Whether these numbers are torch's is therefore found by an
experiment, at first use; where they are not, or where there is no compiler, torch draws.

Source: Matsumoto and Nishimura, "Mersenne Twister: A 623-dimensionally equidistributed uniform pseudo-random number
generator", 1998.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from partita.graph.torch_adapter import compile_source

LEAST_ELEMENTS = 2048  # reading and writing the generator's state takes as long as drawing so many numbers
_STATE_BYTES = 5056  # of torch's CPU generator: seed, left, seeded, next, 624 words in 8 bytes each, ...

SOURCE = r"""
#pragma GCC optimize("tree-loop-vectorize")  // which Inductor's own flags turn off
#include <cstdint>
#include <cstring>

namespace {

constexpr int N = 624, M = 397;

inline uint32_t mix(uint32_t high, uint32_t low) {
  uint32_t y = (high & 0x80000000u) | (low & 0x7fffffffu);
  return (y >> 1) ^ ((0u - (low & 1u)) & 0x9908b0dfu);
}

void advance(uint32_t* __restrict__ s) {
  for (int i = 0; i < N - M; i++) s[i] = s[i + M] ^ mix(s[i], s[i + 1]);
  for (int i = N - M; i < N - 1; i++) s[i] = s[i + M - N] ^ mix(s[i], s[i + 1]);
  s[N - 1] = s[M - 1] ^ mix(s[N - 1], s[0]);
}

void temper(const uint32_t* __restrict__ s, uint32_t* __restrict__ words, int count) {
  for (int i = 0; i < count; i++) {
    uint32_t y = s[i];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    words[i] = y ^ (y >> 18);
  }
}

void compare(const uint32_t* __restrict__ words, float* __restrict__ out, int64_t count, uint64_t threshold) {
  for (int64_t i = 0; i < count; i++) {
    uint64_t x = ((uint64_t)(words[2 * i] & 0x1fffffu) << 32) | words[2 * i + 1];
    out[i] = x < threshold ? 1.0f : 0.0f;
  }
}

}  // namespace

extern "C" void bernoulli(char* state, float* out, int64_t count, uint64_t threshold) {
  int32_t left;
  uint64_t next, wide[N];
  std::memcpy(&left, state + 8, 4);
  std::memcpy(&next, state + 16, 8);
  std::memcpy(wide, state + 24, sizeof wide);
  uint32_t s[N], words[N + 1];
  for (int i = 0; i < N; i++) s[i] = (uint32_t)wide[i];
  int ready = left - 1, kept = 0;  // words left in the state; words that wait for their other half
  while (count > 0) {
    if (ready == 0) {
      advance(s);
      ready = N;
      next = 0;
    }
    int64_t wanted = 2 * count - kept;
    int taken = wanted < ready ? (int)wanted : ready;
    temper(s + next, words + kept, taken);
    next += taken;
    ready -= taken;
    int64_t made = (kept + taken) / 2;
    compare(words, out, made, threshold);
    out += made;
    count -= made;
    if ((kept + taken) % 2) {
      words[0] = words[kept + taken - 1];
      kept = 1;
    } else {
      kept = 0;
    }
  }
  left = ready + 1;
  for (int i = 0; i < N; i++) wide[i] = s[i];
  std::memcpy(state + 8, &left, 4);
  std::memcpy(state + 16, &next, 8);
  std::memcpy(state + 24, wide, sizeof wide);
}
"""

Draw = Callable[[Tensor, float, Generator], None]


def bernoulli(like: Tensor, p: float, generator: Generator) -> Tensor:
    """``torch.bernoulli`` of a tensor like `like` with probability `p`, with torch's own numbers.

    Example:
        >>> bernoulli(torch.empty(4), 0.5, torch.Generator().manual_seed(0))
        tensor([1., 0., 1., 0.])
    """
    out = torch.empty_like(like, memory_format=torch.contiguous_format)  # whatever the strides of `like`, as in torch
    fast = _fast() if _is_fit(out, p, generator) else None
    if fast is None:
        return out.bernoulli_(p, generator=generator)
    fast(out, p, generator)
    return out


def _is_fit(out: Tensor, p: float, generator: Generator) -> bool:
    return (
        out.dtype is torch.float32
        and out.device.type == "cpu"
        and generator.device.type == "cpu"
        and out.numel() >= LEAST_ELEMENTS
        and out.is_contiguous()
        and 0.0 <= p <= 1.0  # else torch says what is wrong
    )


@functools.cache
def _fast() -> Draw | None:
    """The compiled kernel, if there is one and its numbers are torch's."""
    library = compile_source(SOURCE)
    if library is None:
        return None
    kernel = library.bernoulli

    def draw(out: Tensor, p: float, generator: Generator) -> None:
        from ctypes import c_int64, c_uint64, c_void_p

        state = generator.get_state()
        threshold = math.ceil(p * 2.0**53)
        kernel(c_void_p(state.data_ptr()), c_void_p(out.data_ptr()), c_int64(out.numel()), c_uint64(threshold))
        generator.set_state(state)

    return draw if _agrees(draw) else None


def _agrees(draw: Draw) -> bool:
    """Whether the numbers and the state after them are torch's, from states in different places and for odd counts."""
    ours, theirs = Generator(), Generator()
    if ours.get_state().numel() != _STATE_BYTES:
        return False
    for seed, before, count, p in ((1, 0, 3000, 0.9), (2, 1, 2049, 0.1), (3, 623, 5001, 0.5), (4, 624, 624, 1 / 3)):
        ours.manual_seed(seed)
        theirs.manual_seed(seed)
        for generator in (ours, theirs):
            torch.empty(before).uniform_(generator=generator)  # a word for each element
        mine, reference = torch.empty(count), torch.empty(count)
        draw(mine, p, ours)
        reference.bernoulli_(p, generator=theirs)
        if not torch.equal(mine, reference) or not torch.equal(ours.get_state(), theirs.get_state()):
            return False
    return True
