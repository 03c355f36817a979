"""Moving tokens to their experts and back: the same sum over experts, computed in different ways.

  x, expert_ids, weights -> exchange over the mesh ( local dispatcher (plain arrays of one device's experts) ) -> y

A local dispatcher sees a flat list of tokens and the experts that are here; an id outside [0, E) is nobody's, and that
is how padding, dropped copies and other devices' experts are written. Over an `expert` mesh axis, an exchange brings
tokens and experts together under `shard_map`: see exchange.py. Routing itself happens before, on global arrays.

Letters: B batch, S sequence, D model, E experts, K experts per token, C capacity, T = B * S, N = T * K.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh

from moejax.config import ConfigError, check
from moejax.moe.dispatch.exchange import (
  EXCHANGES,
  Exchange,
  Local,
  at_home,
  expert_parallel,
  layout,
  to_experts,
)
from moejax.moe.dispatch.exchange_cost import Group, exchange_bytes, lacking_ragged
from moejax.moe.experts.grouped_ffn import grouped_ffn
from moejax.moe.experts.sorted_copies import Copies, clip_unassigned, sort_copies
from moejax.moe.experts.weights import Activation, Weights, batched_ffn, dense_ffn
from moejax.moe.routing import Routing

DROP_BY = ('position', 'probs')
AUTO = 'auto'


@dataclasses.dataclass(frozen=True)
class DispatchConfig:
  """`capacity_factor` 0: no buffers, nothing is dropped. `drop_by` says who stays when a buffer is full.

  On a mesh, buffers are those of each device's own tokens: the more devices, the less evens out between them.
  exchange: how tokens and experts come together over the `expert` mesh axis, see `exchanges`. 'auto': the one that
    moves the fewest bytes, of those that the devices have; ragged, which needs more memory, if it saves a quarter.
  """

  dispatcher: str = 'sparse_matmul'
  capacity_factor: float = 0.0
  drop_by: str = 'probs'
  exchange: str = AUTO

  def __post_init__(self) -> None:
    known = self.dispatcher in DISPATCHERS
    dropless = known and self.capacity_factor > 0 and self.dispatcher == 'sparse_matmul'
    possible = (AUTO, *exchanges(self)) if known and not dropless else (AUTO, *EXCHANGES)
    check(
      '' if known else f'dispatcher={self.dispatcher!r} is not one of {sorted(DISPATCHERS)}',
      f'capacity_factor={self.capacity_factor}: use 0 (no capacity) or more'
      if self.capacity_factor < 0
      else '',
      f"capacity_factor={self.capacity_factor} has no meaning for dispatcher='sparse_matmul', which drops nothing: "
      "use dispatcher='dense_matmul' or capacity_factor=0"
      if dropless
      else '',
      f'drop_by={self.drop_by!r} is not one of {sorted(DROP_BY)}'
      if self.drop_by not in DROP_BY
      else '',
      f'exchange={self.exchange!r} with dispatcher={self.dispatcher!r}, capacity_factor={self.capacity_factor}: use '
      f'one of {sorted(possible)}'
      if self.exchange not in possible
      else '',
    )


Dispatcher = Callable[[Array, Routing, Weights, Activation, DispatchConfig], tuple[Array, Array]]


def exchanges(cfg: DispatchConfig) -> tuple[str, ...]:
  """Those that suit this dispatcher, the one that works on all devices first.

  Buffers go by all_to_all. Where every expert sees every token, every device must.
  """
  if cfg.capacity_factor > 0:
    return ('all_to_all',)
  return ('gather', 'ragged') if cfg.dispatcher == 'sparse_matmul' else ('gather',)


def exchange_of(cfg: DispatchConfig, group: Group, lacking: str) -> str:
  """The one to take. lacking: what `lacking_ragged` says of the mesh.

  Raises:
    ConfigError: the config asks for one that the devices do not have.
  """
  if cfg.exchange == 'ragged' and lacking:
    raise ConfigError(
      f"dispatch.exchange='ragged': no ragged_all_to_all on {lacking}: use 'auto' or 'gather'"
    )
  if cfg.exchange != AUTO:
    return cfg.exchange
  first, *others = exchanges(cfg)
  sizes = exchange_bytes(group)
  return (
    'ragged'
    if 'ragged' in others and not lacking and sizes['ragged'] < 0.75 * sizes[first]
    else first
  )


def group_of(
  cfg: DispatchConfig,
  mesh: AbstractMesh,
  tokens: int,
  top_k: int,
  num_experts: int,
  d_model: int,
  dtype: jnp.dtype,
) -> Group:
  """What is to be exchanged in a layer that `tokens` go through, on all devices of the mesh together."""
  own = tokens * mesh.shape['tensor'] // mesh.size
  room = capacity(own * top_k, num_experts, cfg.capacity_factor) if cfg.capacity_factor > 0 else 0
  return Group(
    mesh.shape['expert'], own, top_k, num_experts, d_model, jnp.dtype(dtype).itemsize, room
  )


def over_mesh(local: Callable[[Local, DispatchConfig], tuple[Array, Array]]) -> Dispatcher:
  """A dispatcher of global arrays from one of a device's own: in an exchange under `shard_map` where there is a mesh.

  The result takes x [B, S, D] and the whole stack of experts, both in the compute dtype, and a routing whose padding
  has expert_ids past the last expert, so that it takes no place in a buffer. It gives y [B, S, D], zero for padding,
  and the dropped fraction of the copies that count, a scalar f32.
  """

  def dispatcher(
    x: Array, routing: Routing, experts: Weights, activation: Activation, cfg: DispatchConfig
  ) -> tuple[Array, Array]:
    num_experts = experts.gate.shape[0]
    scores = jnp.take_along_axis(
      jax.lax.stop_gradient(routing.probs), routing.expert_ids, axis=-1, mode='clip'
    )

    def flat(exchange: Exchange, x: Array, *rest: Array | Weights) -> tuple[Array, Array]:
      *arrays, experts = rest
      arrays = [a.reshape(-1, a.shape[-1]) for a in (x, *arrays)]
      y, dropped = exchange(
        functools.partial(local, cfg=cfg), Local(*arrays, experts, activation, num_experts)
      )
      return y.reshape(x.shape), dropped

    mesh, run = jax.sharding.get_abstract_mesh(), functools.partial(flat, at_home)
    if not mesh.empty and mesh.size > 1:
      (rows, length, d_model), top_k = x.shape, routing.expert_ids.shape[-1]
      group = group_of(cfg, mesh, rows * length, top_k, num_experts, d_model, x.dtype)
      exchange = (
        EXCHANGES[exchange_of(cfg, group, lacking_ragged(mesh))] if group.devices > 1 else at_home
      )
      run = expert_parallel(functools.partial(flat, exchange), layout(experts))
    y, dropped = run(x, routing.expert_ids, scores, routing.weights, experts)
    return y, dropped / jnp.maximum((routing.expert_ids < num_experts).sum(), 1)

  return dispatcher


def sparse_matmul(tokens: Local, cfg: DispatchConfig) -> tuple[Array, Array]:
  """Dropless: copies sorted by expert, then `grouped_ffn`. -> y [T, D], 0 dropped."""
  del cfg
  num_tokens, top_k = tokens.expert_ids.shape
  ids, weights, load = sort_copies(tokens.expert_ids, tokens.weights, tokens.num_experts)
  # Of a token's K experts at most those that are here: the rest is nobody's, and comes last.
  most = num_tokens * min(top_k, tokens.num_experts)
  copies = Copies(ids[:most], weights[:most], load)
  return grouped_ffn(tokens.x, copies, tokens.experts, tokens.activation), jnp.zeros_like(
    tokens.weights, shape=()
  )


def dense_matmul(tokens: Local, cfg: DispatchConfig) -> tuple[Array, Array]:
  """A dense einsum for each expert: on every token without capacity, on [E, C, D] buffers with it."""
  if cfg.capacity_factor > 0:
    return capacity_matmul(tokens, cfg)
  chosen = jax.nn.one_hot(tokens.expert_ids, tokens.num_experts, dtype=jnp.float32)  # [T, K, E]
  combine = jnp.einsum('tke,tk->te', chosen, tokens.weights)
  y = dense_ffn(tokens.x, combine, tokens.experts, tokens.activation)
  return y, jnp.zeros_like(tokens.weights, shape=())


def capacity(num_copies: int, num_experts: int, capacity_factor: float) -> int:
  """C = ceil(N / E * capacity_factor), at most all copies: rows in an expert's buffer."""
  return min(num_copies, max(1, math.ceil(num_copies / num_experts * capacity_factor)))


def capacity_matmul(tokens: Local, cfg: DispatchConfig) -> tuple[Array, Array]:
  """Buffers of C rows by index; a full expert drops the lowest scores ('probs') or the last tokens ('position').

  Weights are not renormalised after a drop. Dropping by score is not causal: a later token can take an earlier one's
  place. On a mesh, C is that of each device's own tokens, which fill buffers for all experts.
  """
  num_experts, (num_tokens, top_k) = tokens.num_experts, tokens.expert_ids.shape
  copies = num_tokens * top_k
  rows = capacity(copies, num_experts, cfg.capacity_factor)
  ids = clip_unassigned(tokens.expert_ids, num_experts).reshape(-1)
  index = jnp.arange(copies, dtype=jnp.int32)
  priority = (
    -tokens.scores.reshape(-1)
    if cfg.drop_by == 'probs'
    else jnp.zeros_like(tokens.scores.reshape(-1))
  )
  sorted_ids, _, order = jax.lax.sort((ids, priority, index), num_keys=2, is_stable=True)
  load = jnp.bincount(ids, length=num_experts + 1)
  rank = index - (jnp.cumsum(load) - load)[sorted_ids]  # place in the expert's queue
  kept = (rank < rows) & (sorted_ids < num_experts)
  slots = num_experts * rows
  slot = jnp.where(kept, sorted_ids * rows + rank, slots)  # past the end: nowhere
  token_of_slot = (
    jnp.full_like(index, num_tokens, shape=(slots,)).at[slot].set(order // top_k, mode='drop')
  )
  buffers = tokens.x.at[token_of_slot].get(mode='fill', fill_value=0).reshape(num_experts, rows, -1)
  ffn = functools.partial(batched_ffn, weights=tokens.experts, activation=tokens.activation)
  out = to_experts(ffn, buffers, tokens.experts.gate.shape[0]).reshape(slots, -1)
  weight_of_slot = (
    jnp.zeros_like(tokens.weights, shape=(slots,))
    .at[slot]
    .set(tokens.weights.reshape(-1)[order], mode='drop')
  )
  y = (
    jnp.zeros_like(tokens.x)
    .at[token_of_slot]
    .add(out * weight_of_slot[:, None].astype(out.dtype), mode='drop')
  )
  return y, ((sorted_ids < num_experts) & ~kept).sum().astype(jnp.float32)


# name -> (x [B, S, D], routing, experts, activation, cfg) -> (y [B, S, D], dropped fraction)
DISPATCHERS: dict[str, Dispatcher] = {
  'dense_matmul': over_mesh(dense_matmul),
  'sparse_matmul': over_mesh(sparse_matmul),
}
