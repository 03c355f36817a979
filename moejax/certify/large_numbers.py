"""Line 13: what holds for a few tokens holds for many: sort keys, counts, blocks, capacities.

Models are tiny elsewhere. Here the functions whose limits depend on size are called alone: with
keys past 2^31, counts past 2^24 (from where float32 skips whole numbers), experts with every number
of rows in their last block, and buffers that overflow.

Letters: T tokens, D model, F FFN hidden, E experts, K experts per token, N copies.
"""

from collections.abc import Iterator
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.certify.cases import Plan
from moejax.certify.checks import Check, Worst
from moejax.certify.large_blocks import (
  ROUNDING,
  D,
  F,
  check_activations,
  check_blocks,
  gated_silu,
  of_copies,
)
from moejax.certify.oracle import bias as oracle_bias
from moejax.moe import bias, bias_quantile, routing
from moejax.moe.dispatch.buffers import capacity
from moejax.moe.dispatch.dispatchers import DISPATCHERS, DROP_BY, DispatchConfig
from moejax.moe.experts.sorted_copies import sort_copies
from moejax.moe.experts.weights import Biases, Weights
from moejax.moe.statistics import layer_statistics
from moejax.moe.token_sets import expert_load
from moejax.sharding.mesh import MeshConfig, make_mesh

LARGE = 2**25  # a count of float32 is off by up to 2 from here on


def check_sorting(plan: Plan) -> Iterator[Check]:
  """Checks the order of copies where `expert * N + index` is about 2^31, and beyond."""
  worst = Worst('copies sorted by expert, keys about 2^31', 0, 'the same order')
  tokens, top_k = 30000, 2
  copies = tokens * top_k
  limit = 2**31 // copies  # experts from which keys no longer fit
  for experts in (limit - 2, limit - 1, limit, limit + 1, 2 * limit + 1):
    rng = plan.rng(31, experts)
    ids = rng.integers(0, experts + 1, (tokens, top_k)).astype(np.int32)  # E: unassigned
    ids[:2] = experts - 1  # the largest keys there are
    weights = rng.random((tokens, top_k)).astype(np.float32)
    found = plan.program(sort_copies, experts)(ids, weights)
    order = np.argsort(ids.ravel(), kind='stable')
    where = f'E={experts}, N={copies}'
    worst.see(where, (np.asarray(found.tokens) != order // top_k).sum())
    worst.see(f'weights; {where}', (np.asarray(found.weights) != weights.ravel()[order]).sum())
    load = np.bincount(ids.ravel(), minlength=experts + 1)[:experts]
    worst.see(f'load; {where}', np.abs(np.asarray(found.load) - load).max())
  yield worst.check()


def observed_type(rule: bias.BiasRule) -> jnp.dtype:
  """The dtype that a rule counts in."""
  logits, mask = jnp.zeros((1, 2, 3)), jnp.ones((1, 2), bool)

  def observe(logits: Array) -> Array:
    routed = routing.route(logits, jnp.zeros(3), routing.RouterConfig(3, 2))
    return rule.observe(routed, jnp.zeros(3), mask)

  return jax.eval_shape(observe, logits).dtype


def check_counts(plan: Plan) -> Iterator[Check]:
  """Checks that counts stay whole numbers, and that rules compare them as such."""
  summed = Worst('a count and one more', 0, 'whole numbers')
  load_type = jax.eval_shape(
    lambda ids, mask: expert_load(ids, mask, 3),
    jax.ShapeDtypeStruct((1, 2, 2), jnp.int32),
    jax.ShapeDtypeStruct((1, 2), jnp.bool_),
  ).dtype
  kinds = {name: observed_type(rule) for name, rule in count_rules().items()}
  for what, kind in (kinds | {'load': load_type}).items():
    total = np.asarray(jnp.full((), 2**24, kind) + jnp.ones((), kind))
    summed.see(f'2^24 + 1 of {what}', int(total) - 2**24 - 1)
  yield summed.check()
  yield from check_rules_of_many(plan)
  statistics = Worst('statistics of a load', 1e-5, 'relative; float32')
  load = np.array([[LARGE + 1, LARGE, LARGE, LARGE + 3], [4 * LARGE, 0, 0, 0]])
  wide = layer_statistics(load.astype(np.float64), 2)
  for name, found in plan.program(layer_statistics, 2)(jnp.asarray(load.astype(load_type))).items():
    error = np.abs(np.asarray(found) - wide[name]).max()
    statistics.see(name, float(error / max(1, np.abs(wide[name]).max())))
  yield statistics.check()


def check_rules_of_many(plan: Plan) -> Iterator[Check]:
  """Checks rules of counts on loads past 2^24 that are even, or off by one."""
  why = 'of the largest step of an expert; exact where a load is even'
  moved = Worst('bias rules, counts past 2^24', 1e-6, why)
  before = bias.BiasState(np.zeros(3, np.float32), np.zeros(3, np.float32))
  for name, rule in count_rules().items():
    kind = observed_type(rule)
    for load in (
      [LARGE + 1] * 3,
      [2 * LARGE] * 3,
      [LARGE + 1, LARGE, LARGE - 1],
      [LARGE + 3, LARGE, LARGE],
    ):
      seen = jnp.asarray(np.array(load, np.int64).astype(kind))
      after = plan.program(rule.update)(before, seen, jnp.float32(0.05), 2)
      state = oracle_bias.BiasState(np.zeros(3), np.zeros(3))
      wanted = oracle_bias.COUNT_RULES[name](state, np.array(load, np.float64), 0.05)
      for what, a, b in zip(('bias', 'momentum'), after, wanted):
        # A float32 of 0.07 is rounded by 4e-9, and a proportional step of one copy in 2^25 is 1e-9:
        # only as a part of the step can both be seen.
        largest = max(np.abs(b).max(), np.finfo(np.float32).tiny)
        moved.see(f'{what} of {name}, load {load}', np.abs(np.asarray(a) - b).max() / largest)
  yield moved.check()


def check_quantile(plan: Plan) -> Iterator[Check]:
  """Checks the line of the quantile rule for 2^30 tokens: that of as many of each kind as of a few.

  Line 6 holds that of a few tokens against sorted tokens.
  """
  same = Worst('quantile of 2^30 tokens', 1e-6, 'that of 512 in the same bins; relative, float32')
  experts, tokens = 8, 512  # of which 8 is a divisor, so that the line lies at a whole token
  for top_k in (1, 2, 6):
    chances = plan.rng(33, top_k).dirichlet(np.full(bias_quantile.BINS, 0.1), experts)
    few = np.stack([plan.rng(34, top_k, e).multinomial(tokens, p) for e, p in enumerate(chances)])
    found = plan.program(bias_quantile.quantile, top_k)
    of_few, of_many = (np.asarray(found(few.astype(np.int32) * n)) for n in (1, 2**30 // tokens))
    same.see(f'E={experts}, K={top_k}', np.abs((of_many - of_few) / np.maximum(1, of_few)).max())
  yield same.check()


def count_rules() -> dict[str, bias.BiasRule]:
  """The rules of counts, as they are registered now; quantile's are histograms."""
  return {name: rule for name, rule in bias.BIAS_RULES.items() if name != 'quantile'}


def check_capacity(plan: Plan) -> Iterator[Check]:
  """Checks the size of buffers, and who has room in them, of many tokens with padding."""
  sizes = Worst('rows of a buffer', 0, 'the factor as it is written, in whole numbers')
  for copies in (1000, 1001, 4096, 10**6, 2**24 + 2, 2**30):
    for experts in (3, 8, 10, 256):
      for factor in (0.1, 0.5, 1.0, 1.1, 1.25, 1.3, 2.2):
        exact = -(-Fraction(str(factor)) * copies // experts)
        wanted = min(copies, max(1, int(exact)))
        found = capacity(copies, experts, factor)
        sizes.see(f'{copies} copies, {experts} experts, factor {factor}', found - wanted)
  yield sizes.check()
  yield from check_room(plan)


def dispatch(
  x: Array,
  routed: routing.Routing,
  weights: Weights,
  cfg: DispatchConfig,
  mesh: MeshConfig,
) -> tuple[Array, Array]:
  """A row of DISPATCHERS. The mesh is an argument so that each mesh has a program of its own."""
  del mesh
  return DISPATCHERS[cfg.dispatcher](x, routed, weights, gated_silu, cfg)


def check_room(plan: Plan) -> Iterator[Check]:
  """Checks outputs and the dropped fraction of every dispatcher on many tokens, some padding."""
  outputs = Worst('outputs of many tokens', ROUNDING, 'of the largest; float32')
  fraction = Worst('dropped fraction of many tokens', 1e-6, 'absolute; float32')
  rng, experts, top_k, shape = plan.rng(32), 8, 2, (4, 500)
  x = rng.normal(size=(*shape, D)).astype(np.float32)
  # A skewed choice: the first experts overflow.
  scores = rng.random((*shape, experts)).astype(np.float32) + np.linspace(0.3, 0, experts)
  scores = (scores / scores.sum(-1, keepdims=True)).astype(np.float32)
  ids = np.argsort(-scores, axis=-1)[..., :top_k].astype(np.int32)
  ids[rng.random(shape) < 0.3] = experts  # padding
  weights = rng.uniform(0.5, 1.5, ids.shape).astype(np.float32)
  shapes = (experts, D, F), (experts, D, F), (experts, F, D)
  biases = Biases(*(rng.normal(size=(experts, n)).astype(np.float32) for n in (F, F, D)))
  w = Weights(*(rng.normal(size=one).astype(np.float32) for one in shapes), biases)
  nothing = np.zeros((), np.float32)
  routed = routing.Routing(
    logits=nothing,
    scores=nothing,
    probs=scores,
    expert_ids=ids,
    weights=weights,
    best_ids=nothing,
    margin=nothing,
    likely=nothing,
    router=nothing,
  )
  flat_x = np.repeat(x.reshape(-1, D).astype(np.float64), top_k, 0)
  zeros = np.zeros_like(flat_x)
  of_all = of_copies(flat_x, zeros, weights.ravel().astype(np.float64), w).y  # [E, N, D]
  configs = [DispatchConfig(name) for name in DISPATCHERS]
  configs += [DispatchConfig('dense_matmul', 1.0, drop_by) for drop_by in DROP_BY]
  for cfg in configs:
    flat_ids = ids.ravel()
    rows = len(flat_ids)
    if cfg.capacity_factor:
      rows = capacity(len(flat_ids), experts, cfg.capacity_factor)
    chosen = np.take_along_axis(scores, np.minimum(ids, experts - 1), -1).ravel()
    has_room = with_room(flat_ids, chosen, rows, cfg.drop_by)
    wanted = np.zeros((*x.shape[:2], D)).reshape(-1, D)
    for copy in np.flatnonzero(has_room):
      wanted[copy // top_k] += of_all[flat_ids[copy], copy]
    assigned = (flat_ids < experts).sum()
    # Devices along `tensor` have all tokens, and a part of each expert.
    for mesh in (MeshConfig(1), MeshConfig(1, tensor=F)):
      with jax.set_mesh(make_mesh(mesh)):
        program = plan.program(dispatch, cfg, mesh)
        y, dropped = jax.block_until_ready(program(x, routed, w))
      where = f'{cfg.dispatcher}, capacity {cfg.capacity_factor} by {cfg.drop_by}'
      where += f', tensor {mesh.tensor}'
      error = np.abs(np.asarray(y).reshape(-1, D) - wanted).max() / np.abs(wanted).max()
      outputs.see(where, float(error))
      fraction.see(where, float(dropped) - (assigned - has_room.sum()) / assigned)
  yield outputs.check()
  yield fraction.check()


def with_room(ids: np.ndarray, scores: np.ndarray, rows: int, drop_by: str) -> np.ndarray:
  """Which copies [N] find room in their expert's buffer: the first, or those of the best score."""
  has_room = np.zeros(len(ids), bool)
  for expert in range(8):
    queue = np.flatnonzero(ids == expert)
    if drop_by == 'probs':
      queue = queue[np.argsort(-scores[queue], kind='stable')]
    has_room[queue[:rows]] = True
  return has_room


def large_line(plan: Plan) -> Iterator[Check]:
  """Checks line 13."""
  yield from check_sorting(plan)
  yield from check_counts(plan)
  yield from check_quantile(plan)
  yield from check_capacity(plan)
  yield from check_activations(plan)
  yield from check_blocks(plan)
