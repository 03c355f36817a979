"""Tokens to the devices of their experts and back, over the `expert` mesh axis: what a dispatcher runs in on a mesh.

  a device's own tokens -> exchange around a local dispatcher, under `shard_map` -> y of its own tokens

- gather: each device sees the tokens of its whole group and adds up what its own experts give; a reduce-scatter
  brings the sums home. Works everywhere.
- ragged: each copy goes to the device of its expert alone, and what comes of it goes back.
- all_to_all: each device fills buffers for all experts from its own tokens, and the buffers travel.

Letters: D model, E experts, K experts per token, C capacity; X devices in an expert-parallel group, T tokens of one
of them, N = T * K copies, R rows of a buffer that holds whatever may come.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from moejax.moe.experts.sorted_copies import sort_copies
from moejax.moe.experts.weights import Activation, Biases, Weights
from moejax.sharding.logical_axes import RULES
from moejax.sharding.mesh import MESH_AXES


class Local(NamedTuple):
  """One device's view: tokens, and the experts that are here."""

  x: Array  # [T, D]
  expert_ids: Array  # [T, K] i32, outside [0, num_experts) for nobody; no expert twice for a token
  scores: Array  # [T, K] f32, who stays when a buffer is full
  weights: Array  # [T, K] f32
  experts: Weights
  activation: Activation
  num_experts: int  # that ids count: those that are here, or all those of the group


LocalDispatcher = Callable[
  [Local], tuple[Array, Array]
]  # -> y [T, D], copies dropped: a scalar f32
Exchange = Callable[[LocalDispatcher, Local], tuple[Array, Array]]


def at_home(local: LocalDispatcher, tokens: Local) -> tuple[Array, Array]:
  """No exchange: all experts are here, or the dispatcher sends its buffers itself, see `to_experts`."""
  return local(tokens)


def gather(local: LocalDispatcher, tokens: Local) -> tuple[Array, Array]:
  """The group's tokens to each device, and what its experts give summed at home."""
  here = tokens.experts.gate.shape[0]
  x, ids, scores, weights = (
    jax.lax.all_gather(a, 'expert', axis=0, tiled=True)
    for a in (tokens.x, tokens.expert_ids, tokens.scores, tokens.weights)
  )
  ids -= jax.lax.axis_index('expert') * here
  y, dropped = local(Local(x, ids, scores, weights, tokens.experts, tokens.activation, here))
  return jax.lax.psum_scatter(y, 'expert', scatter_dimension=0, tiled=True), dropped


def ragged(local: LocalDispatcher, tokens: Local) -> tuple[Array, Array]:
  """Each copy to the device of its expert, as a token of one expert there, and what comes of it back.

  Nothing is dropped: there is room for all copies that can come, R = X * T * min(K, E / X). Weights travel, too: so
  what an expert gave need not be kept for their gradient.
  """
  here, group = tokens.experts.gate.shape[0], jax.lax.axis_size('expert')
  copies = sort_copies(tokens.expert_ids, tokens.weights, tokens.num_experts)
  counts = jax.lax.all_gather(copies.load, 'expert').reshape(
    group, group, here
  )  # from whom, to whom, which expert
  to = counts.sum(-1)  # [X, X]
  room = group * tokens.x.shape[0] * min(tokens.expert_ids.shape[1], here)
  x, weights = (
    move(a, to, room) for a in (tokens.x[copies.tokens], copies.weights[:, None])
  )  # [R, D], [R, 1]
  mine = counts[:, jax.lax.axis_index('expert')].reshape(
    -1
  )  # a run for each source, sorted by expert: [X * E / X]
  ids = jnp.repeat(jnp.tile(jnp.arange(here), group), mine, total_repeat_length=room)
  ids = jnp.where(jnp.arange(room) < mine.sum(), ids, here)[:, None]
  y, dropped = local(
    Local(x, ids, jnp.zeros_like(weights), weights, tokens.experts, tokens.activation, here)
  )
  y = move(y, to.T, copies.tokens.size)  # [N, D]
  return jnp.zeros_like(tokens.x).at[copies.tokens].add(y), dropped


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def move(rows: Array, to: Array, room: int) -> Array:
  """Runs of rows to every device of the group. [N, D] -> [room, D], in the order of their sources, then zeros.

  Args:
    to: [X, X] i32, the same on all of them: how many rows each sends to each. They lie in the order of their receivers.
  """
  at_source, at_receiver, me = (
    jnp.cumsum(to, 1) - to,
    jnp.cumsum(to, 0) - to,
    jax.lax.axis_index('expert'),
  )
  nothing = jax.lax.full_like(rows, 0, shape=(room, *rows.shape[1:]))
  return jax.lax.ragged_all_to_all(
    rows, nothing, at_source[me], to[me], at_receiver[me], to[:, me], axis_name='expert'
  )


def move_fwd(rows: Array, to: Array, room: int) -> tuple[Array, tuple[Array, Array]]:
  """Keeps who sent how many, and an array without columns that has as many rows."""
  return move(rows, to, room), (to, rows[:, :0])


def move_bwd(room: int, kept: tuple[Array, Array], d: Array) -> tuple[Array, None]:
  """The way back. By hand: the transpose that JAX has makes zeros that vary over no mesh axis."""
  del room
  to, rows = kept
  return move(d, to.T, rows.shape[0]), None


move.defvjp(move_fwd, move_bwd)


def to_experts(ffn: Callable[[Array], Array], buffers: Array, here: int) -> Array:
  """`ffn` of [E / X, X * C, D] where the experts are, on buffers [E, C, D] of all experts, which come back so."""
  if here == buffers.shape[0]:
    return ffn(buffers)
  out = ffn(jax.lax.all_to_all(buffers, 'expert', split_axis=0, concat_axis=1, tiled=True))
  return jax.lax.all_to_all(out, 'expert', split_axis=1, concat_axis=0, tiled=True)


def layout(experts: Weights) -> Weights:
  """How the experts' arrays lie: experts over `expert`, their hidden layer over `tensor`, what remains over `fsdp`."""
  wide, narrow = (
    PartitionSpec('expert', 'fsdp', 'tensor'),
    PartitionSpec('expert', 'tensor', 'fsdp'),
  )
  hidden, out = PartitionSpec('expert', 'tensor'), PartitionSpec('expert', None)
  return Weights(
    wide, wide, narrow, Biases() if experts.biases.down is None else Biases(hidden, hidden, out)
  )


def expert_parallel(
  flat: Callable[..., tuple[Array, Array]], specs: Weights
) -> Callable[..., tuple[Array, Array]]:
  """`flat` on each device's own tokens and experts, summed over `tensor`; drops are summed over all devices."""

  def sharded(
    x: Array, ids: Array, scores: Array, weights: Array, experts: Weights
  ) -> tuple[Array, Array]:
    x, ids, scores, weights = (
      jax.lax.pcast(a, 'tensor', to='varying') for a in (x, ids, scores, weights)
    )
    # Token shards add to gradients: to vary over an axis makes the transpose a sum, and to be gathered, a split one.
    whole = (
      jax.lax.all_gather(w, 'fsdp', axis=axis, tiled=True)
      for w, axis in zip(experts[:3], (1, 1, 2))
    )
    biases = jax.lax.pcast(experts.biases, 'fsdp', to='varying')
    # The hidden layer is split over `tensor`: all have the same drops, and one of them adds the bias of the whole sum.
    of_one = jax.tree.map(lambda b: jnp.where(jax.lax.axis_index('tensor') == 0, b, 0), biases.down)
    experts = jax.lax.pcast(Weights(*whole, biases._replace(down=of_one)), 'data', to='varying')
    y, dropped = flat(x, ids, scores, weights, experts)
    return jax.lax.psum(y, 'tensor'), jax.lax.psum(dropped, MESH_AXES) / jax.lax.axis_size('tensor')

  rows = PartitionSpec(RULES['batch'])
  return jax.shard_map(
    sharded, in_specs=(rows, rows, rows, rows, specs), out_specs=(rows, PartitionSpec())
  )


# name -> (local dispatcher, a device's own tokens) -> (y of these tokens, dropped)
EXCHANGES: dict[str, Exchange] = {'all_to_all': at_home, 'gather': gather, 'ragged': ragged}
