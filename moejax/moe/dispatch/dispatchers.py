"""Dispatchers: tokens to their experts and back, the same sum over experts by different ways.

  tokens, experts -> exchange over the mesh ( local dispatcher (plain arrays of one device's
  experts) ) -> y

A local dispatcher sees a flat list of tokens and the experts of its device. An id outside [0, E) is
unassigned: so are padding, dropped copies and the copies for other devices' experts. Over an
`expert` mesh axis, an exchange brings tokens and experts together under `shard_map`: see
exchange.py. Routing itself happens before, on global arrays.

Letters: B batch, S sequence, D model, E experts, K experts per token, T = B * S tokens, N = T * K
copies.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh

from moejax.config import ConfigError, at_least, check, not_finite, not_one_of, problem_if
from moejax.moe.dispatch.buffers import capacity, capacity_matmul, quota_matmul
from moejax.moe.dispatch.exchange import (
  EXCHANGES,
  Exchange,
  expert_parallel,
  expert_specs,
  no_exchange,
)
from moejax.moe.dispatch.exchange_cost import Group, exchange_bytes, lacking_ragged
from moejax.moe.dispatch.expert_rows import sort_view
from moejax.moe.dispatch.local_view import LocalView, RoutedTokens, RowQuota
from moejax.moe.experts.grouped_ffn import AUTO, grouped_ffn, implementation_problem
from moejax.moe.experts.weights import Activation, Weights, dense_ffn
from moejax.moe.routing import Routing
from moejax.moe.selection import expert_quota
from moejax.moe.token_sets import put_at_experts

DROP_BY = ('position', 'probs')


@dataclasses.dataclass(frozen=True)
class DispatchConfig:
  """How tokens reach their experts.

  dispatcher: a row of DISPATCHERS.
  capacity_factor: in training, how much larger than an even load the experts' buffers are. 0: no
    buffers, and nothing is dropped, as it never is where nothing is trained: in validation,
    decoding and export. On a mesh, buffers are those of each device's own tokens: the more devices,
    the less evens out between them.
  drop_by: which copies stay when a buffer is full.
  exchange: how tokens and experts come together over the `expert` mesh axis, see `exchanges`.
    'auto': the one that moves the fewest bytes, of those that the devices have; ragged, which needs
    more memory, if it saves a quarter.
  implementation: of sparse_matmul's products, a row of IMPLEMENTATIONS in moe/experts/grouped_ffn.
    'auto': the platform's best.
  """

  dispatcher: str = 'sparse_matmul'
  capacity_factor: float = 0.0
  drop_by: str = 'probs'
  exchange: str = AUTO
  implementation: str = AUTO

  def __post_init__(self) -> None:
    check(*not_finite(self))
    is_known = self.dispatcher in DISPATCHERS
    never_drops = self.dispatcher == 'sparse_matmul' and self.capacity_factor > 0
    # With a wrong dispatcher or capacity, only an exchange that none takes is one more problem.
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
      implementation_problem(self.implementation),
      problem_if(
        self.implementation != AUTO and self.dispatcher != 'sparse_matmul',
        f'implementation={self.implementation!r} is of sparse_matmul: with '
        f"dispatcher={self.dispatcher!r} use 'auto'",
      ),
    )


# (x [B, S, D], routing, experts, activation, cfg[, expert_top_k]) -> y [B, S, D], dropped fraction
Dispatcher = Callable[..., tuple[Array, Array]]
# (view, cfg) -> y [T, D], copies dropped: a LocalDispatcher once it is given its config
ConfiguredDispatcher = Callable[[LocalView, DispatchConfig], tuple[Array, Array]]


def exchanges(cfg: DispatchConfig) -> tuple[str, ...]:
  """Returns the exchanges that suit this dispatcher, the one that works on all devices first."""
  if cfg.capacity_factor > 0:
    # Each device fills buffers for all experts from its own tokens: only the buffers travel.
    return ('all_to_all',)
  if cfg.dispatcher == 'sparse_matmul':
    return ('gather', 'ragged')
  # Where every expert sees every token, every device must.
  return ('gather',)


def choose_exchange(cfg: DispatchConfig, group: Group, lacking: str) -> str:
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


def exchange_group(
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

  Where experts choose, `expert_top_k` is K of `expert_quota`, by which each takes its tokens of
  each row. A routing that gives an expert more, as that selection never does, has the rest dropped.
  0: tokens choose.
  """

  def dispatcher(
    x: Array,
    routing: Routing,
    experts: Weights,
    activation: Activation,
    cfg: DispatchConfig,
    expert_top_k: int = 0,
  ) -> tuple[Array, Array]:
    num_experts, length = experts.gate.shape[0], x.shape[1]
    quota = None
    if expert_top_k:
      quota = RowQuota(length, expert_quota(length, expert_top_k, num_experts))
    # Scores only rank copies for room in a buffer: no gradient. 'clip', since the ids of unassigned
    # copies are past the end.
    scores_BSK = jnp.take_along_axis(
      jax.lax.stop_gradient(routing.probs), routing.expert_ids, axis=-1, mode='clip'
    )
    tokens = RoutedTokens(x, routing.expert_ids, scores_BSK, routing.weights)
    mesh = jax.sharding.get_abstract_mesh()

    def run(exchange: Exchange, tokens: RoutedTokens, experts: Weights) -> tuple[Array, Array]:
      flat = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), tokens)
      view = LocalView(
        flat,
        experts,
        activation,
        num_experts=num_experts,
        even_share=even_share(flat, num_experts, quota),
        quota=quota,
      )
      y_TD, dropped = exchange(functools.partial(local, cfg=cfg), view)
      return y_TD.reshape(tokens.x.shape), dropped

    if mesh.empty or mesh.size == 1:
      y, dropped = run(no_exchange, tokens, experts)
    else:
      top_k = expert_top_k or routing.expert_ids.shape[-1]
      exchange = exchange_on(mesh, cfg, x, top_k, num_experts)
      run_on_mesh = expert_parallel(functools.partial(run, exchange), expert_specs(experts))
      y, dropped = run_on_mesh(tokens, experts)
    num_copies = (routing.expert_ids < num_experts).sum()
    # A batch of padding alone has no copies: 0 of 1.
    return y, dropped / jnp.maximum(num_copies, 1)

  return dispatcher


def even_share(tokens: RoutedTokens, num_experts: int, quota: RowQuota | None) -> int:
  """Returns how many copies a device's own tokens have, or where experts choose can have.

  Of an even routing as many come to each device of an expert-parallel group.
  """
  num_tokens, top_k = tokens.expert_ids.shape
  if quota is None:
    return num_tokens * top_k
  return num_tokens // quota.length * quota.most * num_experts


def exchange_on(
  mesh: AbstractMesh, cfg: DispatchConfig, x: Array, top_k: int, num_experts: int
) -> Exchange:
  """Returns the exchange for global tokens x [B, S, D]: none if every device has all experts."""
  rows, length, d_model = x.shape
  group = exchange_group(
    cfg,
    mesh,
    tokens=rows * length,
    top_k=top_k,
    num_experts=num_experts,
    d_model=d_model,
    dtype=x.dtype,
  )
  if group.devices == 1:
    return no_exchange
  return EXCHANGES[choose_exchange(cfg, group, lacking_ragged(mesh))]


def sparse_matmul(view: LocalView, cfg: DispatchConfig) -> tuple[Array, Array]:
  """Dropless: copies sorted by expert, then `grouped_ffn`. Returns y [T, D], and 0 dropped."""
  copies, dropped = sort_view(view)
  y_TD = grouped_ffn(
    view.tokens.x,
    copies,
    view.experts,
    activation=view.activation,
    even_share=view.even_share,
    implementation=cfg.implementation,
  )
  return y_TD, dropped


def dense_matmul(view: LocalView, cfg: DispatchConfig) -> tuple[Array, Array]:
  """A dense product for each expert: on every token, or on [E, C, D] buffers.

  Buffers are filled with capacity, and where experts choose.

  Returns:
    y [T, D], and how many copies were dropped.
  """
  if cfg.capacity_factor > 0:
    return capacity_matmul(view, cfg.capacity_factor, cfg.drop_by)
  if view.quota is not None:
    return quota_matmul(view, view.quota)
  tokens = view.tokens
  combine_TE = put_at_experts(tokens.weights, tokens.expert_ids, view.num_experts)
  y_TD = dense_ffn(tokens.x, combine_TE, view.experts, view.activation)
  return y_TD, jnp.zeros_like(tokens.weights, shape=())


DISPATCHERS: dict[str, Dispatcher] = {
  'dense_matmul': over_mesh(dense_matmul),
  'sparse_matmul': over_mesh(sparse_matmul),
}
