"""The grouped FFN by `jax.lax.ragged_dot`: one grouped-matmul kernel for each product.

The kernel leaves anything in the rows of unassigned copies, so they are masked after each product.

A device of an expert-parallel group has room for all copies of the group, and its own experts are
given few of them. So rows are made a window at a time: exact for any routing, and an even one takes
a single window. To keep what windows computed, room for all copies would be needed: the backward
pass computes it anew, which with remat='full' is no more.

Letters: T tokens, D model, F FFN hidden, E experts, N copies, W rows of a window, P = N in whole
windows.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.experts.residuals import FfnGradients, PreActivations, Residuals
from moejax.moe.experts.sorted_copies import Copies, assigned_mask, expert_of_copies
from moejax.moe.experts.weights import Activation, Biases, Weights

Carry = TypeVar('Carry')

# dW_e = lhs_e^T rhs_e: the ragged dimension is the contracted one.
RAGGED_OUTER = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)
TILE = 128  # a window is a multiple of this many rows


class Products(NamedTuple):
  """A library's grouped products, with the arguments of those of `jax.lax`."""

  dot: Callable[..., Array]  # as jax.lax.ragged_dot
  general: Callable[..., Array]  # as jax.lax.ragged_dot_general


XLA = Products(jax.lax.ragged_dot, jax.lax.ragged_dot_general)


class GradientSums(NamedTuple):
  """What the windows of the backward pass add up so far."""

  x: Array  # [T, D]
  copy_weights: Array  # [P] f32, each window writes its own
  weights: Weights | None  # None before the first window


class Window(NamedTuple):
  """W of the sorted copies that lie one after another."""

  copies: Copies  # tokens and weights [W], and how many of them each expert has, [E]
  start: Array  # scalar i32, the first copy


def window_size(num_copies: int, even_share: int) -> int:
  """Returns W, the rows of a window: a quarter more than an even routing gives, in whole tiles.

  Args:
    num_copies: N, for which there is room. In an expert-parallel group with fewer local experts
      than a token has, N is less than all of the group's copies, so W does not follow from it.
    even_share: copies of an even routing; 0: N.
  """
  if not even_share:
    return num_copies
  tiles = -(-5 * even_share // (4 * TILE))
  return min(num_copies, tiles * TILE)


def loop_over_windows(
  copies: Copies,
  size: int,
  body: Callable[[Window, Carry], Carry],
  carry: Carry,
  peel_first: bool,
) -> Carry:
  """Returns the carry after `carry = body(window, carry)` for each window with an assigned copy.

  Args:
    copies: all N.
    size: W, of each window; the last one is padded.
    body: what a window does.
    carry: of the first call.
    peel_first: whether the first window runs before the loop and in any case, also without an
      assigned copy: its carry may then have another structure or other shapes than it returns.
  """
  tokens_P, weights_P = (jnp.pad(a, (0, -a.size % size)) for a in (copies.tokens, copies.weights))
  ends_E = jnp.cumsum(copies.load)

  def run_window(i: Array, carry: Carry) -> Carry:
    start = i * size
    stop = start + size
    # How much of each expert's run of copies lies in the window.
    begins_E = ends_E - copies.load
    load_E = jnp.clip(ends_E, start, stop) - jnp.clip(begins_E, start, stop)
    tokens_W = jax.lax.dynamic_slice_in_dim(tokens_P, start, size)
    weights_W = jax.lax.dynamic_slice_in_dim(weights_P, start, size)
    return body(Window(Copies(tokens_W, weights_W, load_E), start), carry)

  if peel_first:
    # A zero made from an array of this device varies over the mesh axes that the loop's index does.
    carry = run_window(jnp.zeros_like(ends_E[-1]), carry)
  if size == tokens_P.size:
    return carry
  num_windows = -(-ends_E[-1] // size)
  return jax.lax.fori_loop(int(peel_first), num_windows, run_window, carry)


def grouped_product(
  a_ND: Array, w_EDF: Array, bias_EF: Array | None, copies: Copies, products: Products
) -> Array:
  """Returns each row times its expert's matrix, plus its bias; 0 for unassigned copies. [N, F]."""
  y_NF = products.dot(a_ND, w_EDF, copies.load)
  is_assigned_N1 = assigned_mask(copies)
  if bias_EF is not None:
    y_NF = y_NF + bias_EF[expert_of_copies(copies)]
  return jnp.where(is_assigned_N1, y_NF, 0)


def pre_activations(
  x_ND: Array, copies: Copies, weights: Weights, products: Products
) -> PreActivations:
  """Returns gate x and up x of these copies. [N, D] -> [N, F] each."""
  return PreActivations(
    gate=grouped_product(x_ND, weights.gate, weights.biases.gate, copies, products),
    up=grouped_product(x_ND, weights.up, weights.biases.up, copies, products),
  )


def ragged_forward(
  x_TD: Array,
  copies: Copies,
  weights: Weights,
  activation: Activation,
  even_share: int = 0,
  products: Products = XLA,
) -> tuple[Array, PreActivations]:
  """Returns what `blocked_forward` does; of several windows, pre-activations of no rows [0, F]."""
  num_copies = copies.tokens.size
  size = window_size(num_copies, even_share)
  is_single = size == num_copies

  def body(window: Window, carry: tuple[Array, PreActivations]) -> tuple[Array, PreActivations]:
    y_TD, pre = carry
    tokens_W = window.copies.tokens
    pre_WF = pre_activations(x_TD[tokens_W], window.copies, weights, products)
    hidden_WF = activation(*pre_WF)
    bias_ED = weights.biases.down
    out_WD = grouped_product(hidden_WF, weights.down, bias_ED, window.copies, products)
    scaled_WD = out_WD * window.copies.weights[:, None].astype(x_TD.dtype)
    return y_TD.at[tokens_W].add(scaled_WD), pre_WF if is_single else pre

  none_0F = jnp.zeros_like(x_TD, shape=(0, weights.gate.shape[2]))
  carry = jnp.zeros_like(x_TD), PreActivations(none_0F, none_0F)
  # A single window gives pre-activations of another shape than [0, F], which a loop's carry cannot.
  return loop_over_windows(copies, size, body, carry, peel_first=is_single)


def ragged_backward(
  residuals: Residuals,
  activation: Activation,
  dy_TD: Array,
  even_share: int = 0,
  products: Products = XLA,
) -> FfnGradients:
  """Returns what `blocked_backward` does, from what `ragged_forward` kept."""
  x_TD, copies, weights, kept = residuals
  num_copies = copies.tokens.size
  size = window_size(num_copies, even_share)

  def body(window: Window, sums: GradientSums) -> GradientSums:
    own = window.copies
    x_WD = x_TD[own.tokens]
    # What the kernel or the gather left in unassigned rows must not reach a sum over rows.
    dy_WD = jnp.where(assigned_mask(own), dy_TD[own.tokens], 0)
    pre_WF = kept if size == num_copies else pre_activations(x_WD, own, weights, products)
    scale_W1 = own.weights[:, None].astype(x_TD.dtype)
    hidden_WF, pull = jax.vjp(activation, *pre_WF)
    d_hidden_WF = grouped_product(dy_WD, weights.down.swapaxes(1, 2), None, own, products)
    d_scale_W = (d_hidden_WF * hidden_WF).sum(-1)
    d_gate_WF, d_up_WF = pull(d_hidden_WF * scale_W1)
    scaled_hidden_WF = hidden_WF * scale_W1
    d_weights = Weights(
      gate=ragged_outer(x_WD, d_gate_WF, own, products),
      up=ragged_outer(x_WD, d_up_WF, own, products),
      down=ragged_outer(scaled_hidden_WF, dy_WD, own, products),
    )
    if weights.biases.down is not None:
      # A product with ones and zeros; as a sum of rows by their expert it would be a scatter.
      one_hot_WE = jax.nn.one_hot(expert_of_copies(own), own.load.size, dtype=x_TD.dtype)
      d_scale_W += (dy_WD * weights.biases.down[expert_of_copies(own)]).sum(-1)
      d_out_WD = dy_WD * scale_W1
      d_biases = Biases(one_hot_WE.T @ d_gate_WF, one_hot_WE.T @ d_up_WF, one_hot_WE.T @ d_out_WD)
      d_weights = d_weights._replace(biases=d_biases)
    dx_gate_WD = grouped_product(d_gate_WF, weights.gate.swapaxes(1, 2), None, own, products)
    dx_up_WD = grouped_product(d_up_WF, weights.up.swapaxes(1, 2), None, own, products)
    d_scale_P = jax.lax.dynamic_update_slice_in_dim(
      sums.copy_weights, d_scale_W.astype(jnp.float32), window.start, 0
    )
    dx_TD = sums.x.at[own.tokens].add(dx_gate_WD + dx_up_WD)
    # What the first window gives is the sum so far: an addition less, of arrays as large as all
    # experts.
    if sums.weights is not None:
      d_weights = jax.tree.map(jnp.add, d_weights, sums.weights)
    return GradientSums(dx_TD, d_scale_P, d_weights)

  d_scale_P = jnp.zeros_like(copies.weights, shape=(num_copies + -num_copies % size,))
  nothing = GradientSums(jnp.zeros_like(x_TD), d_scale_P, weights=None)
  # Peeled even where no copy is assigned, since its sums give the loop's carry its weights.
  sums = loop_over_windows(copies, size, body, nothing, peel_first=True)
  return FfnGradients(sums.x, sums.copy_weights[:num_copies], sums.weights)


def ragged_outer(a_ND: Array, b_NF: Array, copies: Copies, products: Products) -> Array:
  """Returns `a_e^T b_e` over the rows of each expert e. [E, D, F]."""
  return products.general(a_ND, b_NF, copies.load, RAGGED_OUTER)
