"""Dispatchers: tokens to their experts and back, the same sum over experts by different ways.

  tokens, experts -> exchange over the mesh ( local dispatcher (plain arrays of one device's
  experts) ) -> y

A local dispatcher sees a flat list of tokens and the experts of its device. An id outside [0, E) is
unassigned: so are padding, dropped copies and the copies for other devices' experts. Over an
`expert` mesh axis, an exchange brings tokens and experts together under `shard_map`: see
exchange.py. Routing itself happens before, on global arrays.

Letters: B batch, S sequence, D model, E experts, K experts per token, C capacity, T = B * S tokens,
N = T * K copies, Q = E * C slots of all buffers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh

from moejax.config import ConfigError, at_least, check, not_one_of, problem_if
from moejax.moe.dispatch.exchange import (
  EXCHANGES,
  Exchange,
  LocalView,
  RoutedTokens,
  expert_parallel,
  expert_specs,
  ffn_at_experts,
  no_exchange,
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
  """How tokens reach their experts.

  capacity_factor: 0 for no buffers, nothing is dropped.
  drop_by: which copies stay when a buffer is full.

  On a mesh, buffers are those of each device's own tokens: the more devices, the less evens out
  between them.
  exchange: how tokens and experts come together over the `expert` mesh axis, see `exchanges`.
    'auto': the one that moves the fewest bytes, of those that the devices have; ragged, which needs
    more memory, if it saves a quarter.
  """

  dispatcher: str = 'sparse_matmul'
  capacity_factor: float = 0.0
  drop_by: str = 'probs'
  exchange: str = AUTO

  def __post_init__(self) -> None:
    is_known = self.dispatcher in DISPATCHERS
    never_drops = self.dispatcher == 'sparse_matmul' and self.capacity_factor > 0
    # Where the dispatcher is wrong already, only a name that no dispatcher takes is one more
    # problem.
    names = exchanges(self) if is_known and not never_drops else EXCHANGES
    possible = (AUTO, *names)
    check(
      not_one_of('dispatcher', self.dispatcher, DISPATCHERS),
      *at_least(0, self, 'capacity_factor', meaning='no capacity'),
      problem_if(
        never_drops,
        f'capacity_factor={self.capacity_factor} has no meaning for '
        "dispatcher='sparse_matmul', which drops nothing: "
        "use dispatcher='dense_matmul' or capacity_factor=0",
      ),
      not_one_of('drop_by', self.drop_by, DROP_BY),
      problem_if(
        self.exchange not in possible,
        f'exchange={self.exchange!r} with dispatcher={self.dispatcher!r}, '
        f'capacity_factor={self.capacity_factor}: use one of {sorted(possible)}',
      ),
    )


# (x [B, S, D], routing, experts, activation, cfg) -> y [B, S, D], dropped fraction
Dispatcher = Callable[[Array, Routing, Weights, Activation, DispatchConfig], tuple[Array, Array]]
# (view, cfg) -> y [T, D], copies dropped: a LocalDispatcher that is still to be told its config
ConfiguredDispatcher = Callable[[LocalView, DispatchConfig], tuple[Array, Array]]


def exchanges(cfg: DispatchConfig) -> tuple[str, ...]:
  """Returns the exchanges that suit this dispatcher, the one that works on all devices first."""
  if cfg.capacity_factor > 0:
    # Buffers for all experts are filled at home; there is nothing else to send.
    return ('all_to_all',)
  if cfg.dispatcher == 'sparse_matmul':
    return ('gather', 'ragged')
  # Where every expert sees every token, every device must.
  return ('gather',)


def exchange_of(cfg: DispatchConfig, group: Group, lacking: str) -> str:
  """Returns the exchange to take.

  Args:
    cfg: may name one, or leave it to the bytes that each would move.
    group: what is to be exchanged.
    lacking: what `lacking_ragged` says of the mesh.

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
  # A ragged exchange has room for the worst routing: a few bytes saved are not worth that memory.
  saves_a_quarter = sizes['ragged'] < 0.75 * sizes[first]
  return 'ragged' if 'ragged' in others and not lacking and saves_a_quarter else first


def group_of(
  cfg: DispatchConfig,
  mesh: AbstractMesh,
  tokens: int,
  top_k: int,
  num_experts: int,
  d_model: int,
  dtype: jnp.dtype,
) -> Group:
  """Returns what a layer is to exchange for `tokens`, those of all devices of the mesh together."""
  # Tokens are split over every axis but `tensor`.
  own_tokens = tokens * mesh.shape['tensor'] // mesh.size
  rows = 0
  if cfg.capacity_factor > 0:
    rows = capacity(own_tokens * top_k, num_experts, cfg.capacity_factor)
  return Group(
    devices=mesh.shape['expert'],
    tokens=own_tokens,
    top_k=top_k,
    num_experts=num_experts,
    d_model=d_model,
    itemsize=jnp.dtype(dtype).itemsize,
    capacity=rows,
  )


def over_mesh(local: ConfiguredDispatcher) -> Dispatcher:
  """Returns a dispatcher of global arrays from one of a device's own; on a mesh, in an exchange.

  The result takes x [B, S, D] and the whole stack of experts, both in the compute dtype, and a
  routing whose padding has expert_ids past the last expert, so that it takes no place in a buffer.
  It gives y [B, S, D], zero for padding, and the dropped fraction of the copies that count, a
  scalar f32.
  """

  def dispatcher(
    x: Array, routing: Routing, experts: Weights, activation: Activation, cfg: DispatchConfig
  ) -> tuple[Array, Array]:
    num_experts = experts.gate.shape[0]
    # The probabilities only rank copies for room in a buffer: no gradient. 'clip' since unassigned
    # ids are past the end.
    scores_BSK = jnp.take_along_axis(
      jax.lax.stop_gradient(routing.probs), routing.expert_ids, axis=-1, mode='clip'
    )
    tokens = RoutedTokens(x, routing.expert_ids, scores_BSK, routing.weights)
    mesh = jax.sharding.get_abstract_mesh()

    def run(exchange: Exchange, tokens: RoutedTokens, experts: Weights) -> tuple[Array, Array]:
      flat = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), tokens)
      view = LocalView(flat, experts, activation, num_experts)
      y_TD, dropped = exchange(functools.partial(local, cfg=cfg), view)
      return y_TD.reshape(tokens.x.shape), dropped

    if mesh.empty or mesh.size == 1:
      y, dropped = run(no_exchange, tokens, experts)
    else:
      exchange = exchange_on(mesh, cfg, tokens, num_experts)
      run_on_mesh = expert_parallel(functools.partial(run, exchange), expert_specs(experts))
      y, dropped = run_on_mesh(tokens, experts)
    num_copies = (routing.expert_ids < num_experts).sum()
    # A batch of padding alone has no copies: 0 of 1.
    return y, dropped / jnp.maximum(num_copies, 1)

  return dispatcher


def exchange_on(
  mesh: AbstractMesh, cfg: DispatchConfig, tokens: RoutedTokens, num_experts: int
) -> Exchange:
  """Returns the exchange for global tokens [B, S, ...]: none if every device has all experts."""
  rows, length, d_model = tokens.x.shape
  group = group_of(
    cfg,
    mesh,
    tokens=rows * length,
    top_k=tokens.expert_ids.shape[-1],
    num_experts=num_experts,
    d_model=d_model,
    dtype=tokens.x.dtype,
  )
  if group.devices == 1:
    return no_exchange
  return EXCHANGES[exchange_of(cfg, group, lacking_ragged(mesh))]


def sparse_matmul(view: LocalView, cfg: DispatchConfig) -> tuple[Array, Array]:
  """Dropless: copies sorted by expert, then `grouped_ffn`. Returns y [T, D], and 0 dropped."""
  del cfg
  tokens = view.tokens
  num_tokens, top_k = tokens.expert_ids.shape
  tokens_N, weights_N, load_E = sort_copies(tokens.expert_ids, tokens.weights, view.num_experts)
  # A token has no expert twice: of its K at most as many as this device has; the rest is
  # unassigned, and last.
  most = num_tokens * min(top_k, view.num_experts)
  copies = Copies(tokens_N[:most], weights_N[:most], load_E)
  y_TD = grouped_ffn(tokens.x, copies, view.experts, view.activation)
  return y_TD, jnp.zeros_like(tokens.weights, shape=())


def dense_matmul(view: LocalView, cfg: DispatchConfig) -> tuple[Array, Array]:
  """A dense product for each expert: on every token without capacity, on [E, C, D] buffers with it.

  Returns y [T, D], and how many copies were dropped.
  """
  if cfg.capacity_factor > 0:
    return capacity_matmul(view, cfg)
  tokens = view.tokens
  # The one-hot of an unassigned id is all zeros.
  chosen_TKE = jax.nn.one_hot(tokens.expert_ids, view.num_experts, dtype=jnp.float32)
  combine_TE = jnp.einsum('tke,tk->te', chosen_TKE, tokens.weights)
  y_TD = dense_ffn(tokens.x, combine_TE, view.experts, view.activation)
  return y_TD, jnp.zeros_like(tokens.weights, shape=())


def capacity(num_copies: int, num_experts: int, capacity_factor: float) -> int:
  """Returns C = ceil(N / E * capacity_factor), at most all copies: rows in an expert's buffer."""
  return min(num_copies, max(1, math.ceil(num_copies / num_experts * capacity_factor)))


class Queue(NamedTuple):
  """The copies sorted by expert, then by who comes first."""

  expert_ids: Array  # [N] i32, E for the unassigned, which come last
  copies: Array  # [N] i32, which of the unsorted copies it is: t * K + k
  rank: Array  # [N] i32, place in the expert's queue


def queue_copies(tokens: RoutedTokens, num_experts: int, drop_by: str) -> Queue:
  """Returns the order in which copies take room in their experts' buffers.

  drop_by: 'probs' for the highest score first, ties by token; 'position' for the first token first.
  """
  ids_N = clip_unassigned(tokens.expert_ids, num_experts).reshape(-1)
  index_N = jnp.arange(ids_N.size, dtype=jnp.int32)
  scores_N = tokens.scores.reshape(-1)
  priority_N = -scores_N if drop_by == 'probs' else jnp.zeros_like(scores_N)
  # Two keys; a stable sort leaves ties in the order of tokens.
  sorted_ids_N, _, order_N = jax.lax.sort((ids_N, priority_N, index_N), num_keys=2, is_stable=True)
  load = jnp.bincount(ids_N, length=num_experts + 1)  # [E + 1], the last one of the unassigned
  rank_N = index_N - (jnp.cumsum(load) - load)[sorted_ids_N]
  return Queue(sorted_ids_N, order_N, rank_N)


def capacity_matmul(view: LocalView, cfg: DispatchConfig) -> tuple[Array, Array]:
  """Buffers of C rows; full experts drop the lowest scores ('probs') or last tokens ('position').

  Returns y [T, D], and how many copies were dropped. Weights are not renormalised after a drop.
  Dropping by score is
  not causal: a later token can take an earlier one's place. On a mesh, C is that of each device's
  own tokens, which fill buffers for all experts.
  """
  tokens, num_experts = view.tokens, view.num_experts
  num_tokens, top_k = tokens.expert_ids.shape
  rows = capacity(num_tokens * top_k, num_experts, cfg.capacity_factor)
  num_slots = num_experts * rows
  queue = queue_copies(tokens, num_experts, cfg.drop_by)
  fits_N = (queue.rank < rows) & (queue.expert_ids < num_experts)
  # Copies without room get a slot past the end, and indexing below drops what is written there.
  slot_N = jnp.where(fits_N, queue.expert_ids * rows + queue.rank, num_slots)
  # By index and not by one-hot products, whose [T, E, C] masks would cost more than the experts do.
  no_token_Q = jnp.full_like(slot_N, num_tokens, shape=(num_slots,))
  token_Q = no_token_Q.at[slot_N].set(queue.copies // top_k, mode='drop')
  # An empty slot has a token past the end: its row is zeros, and what comes of it is added to no
  # token.
  buffers_QD = tokens.x.at[token_Q].get(mode='fill', fill_value=0)
  ffn = functools.partial(batched_ffn, weights=view.experts, activation=view.activation)
  num_local = view.experts.gate.shape[0]
  out_ECD = ffn_at_experts(ffn, buffers_QD.reshape(num_experts, rows, -1), num_local)
  out_QD = out_ECD.reshape(num_slots, -1)
  no_weight_Q = jnp.zeros_like(tokens.weights, shape=(num_slots,))
  weight_Q = no_weight_Q.at[slot_N].set(tokens.weights.reshape(-1)[queue.copies], mode='drop')
  scaled_QD = out_QD * weight_Q[:, None].astype(out_QD.dtype)
  y_TD = jnp.zeros_like(tokens.x).at[token_Q].add(scaled_QD, mode='drop')
  is_dropped_N = (queue.expert_ids < num_experts) & ~fits_N
  return y_TD, is_dropped_N.sum().astype(jnp.float32)


DISPATCHERS: dict[str, Dispatcher] = {
  'dense_matmul': over_mesh(dense_matmul),
  'sparse_matmul': over_mesh(sparse_matmul),
}
