"""The grouped FFN by `jax.lax.ragged_dot`: one grouped-matmul kernel a product, which leaves anything in nobody's rows.

A device of an expert-parallel group has room for all copies of the group, and its own experts are given few of them.
So rows are made a window at a time: exact for any routing, and an even one takes a single window. To keep what windows
computed, room for all copies would be needed: the backward pass computes it anew, which with remat='full' is no more.

Letters: T tokens, D model, F FFN hidden, E experts, N copies, W rows of a window.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.experts.sorted_copies import Copies, expert_of, owned
from moejax.moe.experts.weights import Activation, Biases, Weights

# dW_e = lhs_e^T rhs_e: the ragged dimension is the contracted one.
RAGGED_OUTER = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def window_size(copies: int) -> int:
  """W: all copies; in an expert-parallel group a quarter more than an even routing gives a device, in tiles of 128."""
  mesh = jax.sharding.get_abstract_mesh().shape
  group = mesh['expert'] if 'expert' in mesh else 1
  return copies if group == 1 else min(copies, -(-5 * copies // (4 * group * 128)) * 128)


def over_windows(
  copies: Copies, size: int, body: Callable[[Copies, Array, tuple], tuple], carry: tuple, peel: bool
) -> tuple:
  """`carry = body(copies of a window, where it begins, carry)` for each with somebody's. peel: the first anyway."""
  tokens, weights = (jnp.pad(a, (0, -a.size % size)) for a in (copies.tokens, copies.weights))
  ends = jnp.cumsum(copies.load)

  def window(i: Array, carry: tuple) -> tuple:
    at = i * size
    load = jnp.clip(ends, at, at + size) - jnp.clip(ends - copies.load, at, at + size)
    here = (jax.lax.dynamic_slice_in_dim(a, at, size) for a in (tokens, weights))
    return body(Copies(*here, load), at, carry)

  carry = window(jnp.zeros_like(ends[-1]), carry) if peel else carry
  return (
    carry
    if size == tokens.size
    else jax.lax.fori_loop(int(peel), -(-ends[-1] // size), window, carry)
  )


def product(a: Array, w: Array, bias: Array | None, copies: Copies) -> Array:
  """Each row times its expert's matrix, plus its bias; 0 for nobody. [N, D], [E, D, F], [E, F] -> [N, F]."""
  y = jax.lax.ragged_dot(a, w, copies.load)
  return jnp.where(owned(copies), y if bias is None else y + bias[expert_of(copies)], 0)


def projected(rows: Array, copies: Copies, weights: Weights) -> tuple[Array, Array]:
  """gate x and up x of copies at hand. [N, D] -> [N, F] twice."""
  pairs = (weights.gate, weights.biases.gate), (weights.up, weights.biases.up)
  return tuple(product(rows, w, bias, copies) for w, bias in pairs)


def ragged_forward(
  x: Array, copies: Copies, weights: Weights, activation: Activation
) -> tuple[Array, Array, Array]:
  """`blocked_forward` by `ragged_dot`; gate x and up x of a single window [N, F], or of several [0, F]."""
  size, nothing = (
    window_size(copies.tokens.size),
    jnp.zeros_like(x, shape=(0, weights.gate.shape[2])),
  )

  def window(here: Copies, at: Array, carry: tuple) -> tuple:
    gate, up = projected(x[here.tokens], here, weights)
    out = product(activation(gate, up), weights.down, weights.biases.down, here) * here.weights[
      :, None
    ].astype(x.dtype)
    return carry[0].at[here.tokens].add(out), *(
      (gate, up) if size == copies.tokens.size else carry[1:]
    )

  return over_windows(
    copies, size, window, (jnp.zeros_like(x), nothing, nothing), size == copies.tokens.size
  )


def ragged_backward(
  x: Array,
  copies: Copies,
  weights: Weights,
  activation: Activation,
  gates: Array,
  ups: Array,
  dy: Array,
) -> tuple[Array, Array, Weights]:
  """`blocked_backward` by `ragged_dot`. What the first window gives is the sum so far: an addition less."""
  num_copies, size = copies.tokens.size, window_size(copies.tokens.size)

  def window(here: Copies, at: Array, carry: tuple) -> tuple:
    dx, d_copies, *so_far = carry
    rows, dy_rows = x[here.tokens], jnp.where(owned(here), dy[here.tokens], 0)
    pre_activations = (gates, ups) if size == num_copies else projected(rows, here, weights)
    copy_weights = here.weights[:, None].astype(x.dtype)
    hidden, pull = jax.vjp(activation, *pre_activations)
    d_hidden = product(dy_rows, weights.down.swapaxes(1, 2), None, here)
    d_scale = (d_hidden * hidden).sum(-1)
    d_gate, d_up = pull(d_hidden * copy_weights)
    d_weights = Weights(
      *(
        jax.lax.ragged_dot_general(a, b, here.load, RAGGED_OUTER)
        for a, b in ((rows, d_gate), (rows, d_up), (hidden * copy_weights, dy_rows))
      )
    )
    if weights.biases.down is not None:
      # A product with ones and zeros; as a sum of rows by their expert it would be a scatter.
      whose = jax.nn.one_hot(expert_of(here), here.load.size, dtype=x.dtype)  # [W, E]
      d_scale += (dy_rows * weights.biases.down[expert_of(here)]).sum(-1)
      d_weights = d_weights._replace(
        biases=Biases(*(whose.T @ d for d in (d_gate, d_up, dy_rows * copy_weights)))
      )
    d_rows = sum(
      product(d, w.swapaxes(1, 2), None, here)
      for d, w in ((d_gate, weights.gate), (d_up, weights.up))
    )
    d_copies = jax.lax.dynamic_update_slice_in_dim(d_copies, d_scale.astype(jnp.float32), at, 0)
    return (
      dx.at[here.tokens].add(d_rows),
      d_copies,
      jax.tree.map(lambda *a: sum(a[1:], a[0]), d_weights, *so_far),
    )

  nothing = jnp.zeros_like(copies.weights, shape=(num_copies + -num_copies % size,))
  dx, d_copies, d_weights = over_windows(copies, size, window, (jnp.zeros_like(x), nothing), True)
  return dx, d_copies[:num_copies], d_weights
