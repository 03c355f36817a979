"""The MoE layer against the oracle: output, aux, the gradient of every parameter, and what they depend on."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moejax.certify.oracle import balance as oracle_balance
from moejax.config import ConfigError, frozendict
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.bias import BIAS_RULES
from moejax.moe.dispatch.dispatchers import DISPATCHERS, DROP_BY, DispatchConfig
from moejax.moe.layer import MoE, MoEAux, MoEConfig
from moejax.moe.routing import SCORE_FNS, RouterConfig
from moejax.moe.selection import JITTER, NOISE, SELECTIONS, Tokens, row_keys
from moejax.moe.token_sets import Scope
from moejax.sharding.mesh import MeshConfig, make_mesh
from tests.support import oracle
from tests.support.quick import QUICK

B, S, D, F, MICRO_BATCHES = 2, 6, 8, 4, 2
DY = np.random.default_rng(2).normal(size=(B, S, D)).astype(np.float32)
COEFFICIENTS = {name: 0.1 + 0.2 * i for i, name in enumerate(sorted(BALANCE_LOSSES))}
ROUTERS = {
  score_fn: RouterConfig(8, 2, score_fn, num_groups=2, top_groups=1, scale=1.5)
  for score_fn in sorted(SCORE_FNS)
}
DROPLESS = [
  MoEConfig(router, DispatchConfig(name), F, 2)
  for router, name in itertools.product(ROUTERS.values(), sorted(DISPATCHERS))
]
TIGHT = [
  MoEConfig(ROUTERS['softmax'], DispatchConfig('dense_matmul', 0.5, drop_by), F, 2)
  for drop_by in DROP_BY
]
# Selections with room for other score functions than softmax; expert choice, whose copies are uneven, by each way.
SELECTED = [
  MoEConfig(
    RouterConfig(
      4, 1, sorted(SCORE_FNS)[i % 3], selection=name, renormalise=name == 'expert_choice', scale=1.5
    ),
    DispatchConfig(dispatcher),
    F,
  )
  for i, name in enumerate(sorted(SELECTIONS))
  for dispatcher in sorted(DISPATCHERS)
  if name == 'expert_choice' or dispatcher == 'dense_matmul'
]
NOISY = MoEConfig(RouterConfig(4, 2, 'sigmoid', noisy=True, jitter=0.3), DispatchConfig(), F)
GPT_OSS = MoEConfig(
  RouterConfig(8, 2, weigh='softmax', logit_bias=True),
  DispatchConfig(),
  F,
  activation='clamped_swiglu',
  activation_limit=1.5,
  expert_bias=True,
)
QWEN2 = MoEConfig(
  RouterConfig(8, 2, renormalise=False),
  DispatchConfig('dense_matmul'),
  F,
  num_shared=2,
  shared_gate=True,
)
OF_FAMILIES = [
  dataclasses.replace(cfg, dispatch=dispatch)
  for cfg in (GPT_OSS, QWEN2)
  for dispatch in (*map(DispatchConfig, sorted(DISPATCHERS)), *(cfg.dispatch for cfg in TIGHT))
]
LAYERS = [*DROPLESS, *TIGHT, *SELECTED, NOISY, *OF_FAMILIES]
# Differentiated where time is short; the others there give their output alone.
FIRST = [
  *(cfg for cfg in DROPLESS if cfg.router.score_fn == 'softmax'),
  next(cfg for cfg in SELECTED if cfg.router.selection == 'expert_choice'),
  NOISY,
  GPT_OSS,
  QWEN2,
]


def name_of(cfg: MoEConfig) -> str:
  parts = [cfg.router.score_fn, cfg.router.selection, cfg.dispatch.dispatcher]
  switches = {
    cfg.dispatch.drop_by: cfg.dispatch.capacity_factor,
    'noisy': cfg.router.noisy,
    'shared_gate': cfg.shared_gate,
    cfg.activation: cfg.expert_bias,
  }
  return '-'.join(parts + [name for name, on in switches.items() if on])


layers = functools.partial(pytest.mark.parametrize, 'cfg', ids=name_of)


class Given(NamedTuple):
  x: np.ndarray  # [B, S, D]
  bias: np.ndarray  # [E]
  mask: np.ndarray  # [B, S]
  segments: np.ndarray
  ids: np.ndarray

  def tokens(self, key: Array | None = None) -> Tokens:
    return Tokens(self.ids, self.mask, self.segments, jnp.array([5, 3]), key)


@functools.cache
def given(num_experts: int) -> Given:
  rng = np.random.default_rng(0)
  segments = np.array([[1, 1, 2, 2, 2, 2], [1, 2, 2, 2, 0, 0]], np.int32)
  return Given(
    rng.normal(size=(B, S, D)).astype(np.float32),
    rng.normal(size=num_experts).astype(np.float32),
    segments > 0,
    segments,
    rng.permutation(B * S).reshape(B, S).astype(np.int32),
  )


def given_to(cfg: MoEConfig) -> Given:
  return given(cfg.router.num_experts)


def key_of(cfg: MoEConfig) -> Array | None:
  return jax.random.key(9) if cfg.router.random else None


SCOPES = frozendict(
  {name: Scope(BALANCE_LOSSES[name].rows(B, MICRO_BATCHES, 1)) for name in COEFFICIENTS}
)


@functools.cache
def layer(cfg: MoEConfig, bias_rule: str = '') -> MoE:
  """Of random numbers, the noise's too: initialised for real it would have to be compiled."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(lambda: MoE(jax.random.key(0), D, cfg, SCOPES, bias_rule, std=0.5))
  return jax.tree.map(lambda a: rng.normal(scale=0.5, size=a.shape).astype(np.float32), shapes)


def with_parameters(moe: MoE, change: Callable[[str, Array], Array]) -> MoE:
  """A layer like this one, each of its arrays changed by `change(name, array)`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, a: change(jax.tree_util.keystr(path), a), moe
  )


@functools.partial(jax.jit, compiler_options=QUICK)
def run(
  moe: MoE, x: Array, bias: Array, tokens: Tokens, dy: Array
) -> tuple[Array, MoEAux, tuple[MoE, Array, Array]]:
  """y, aux, and the gradients of y · dy + Σ coefficient · loss to the layer, to x and to the bias."""

  def objective(moe: MoE, x: Array, bias: Array) -> tuple[Array, tuple[Array, MoEAux]]:
    y, aux = moe(x, bias, tokens, {})
    return (y * dy).sum() + sum(COEFFICIENTS[name] * value for name, value in aux.losses.items()), (
      y,
      aux,
    )

  gradients, (y, aux) = jax.grad(objective, (0, 1, 2), has_aux=True)(moe, x, bias)
  return y, aux, gradients


forward = jax.jit(lambda moe, x, bias, tokens: moe(x, bias, tokens, None), compiler_options=QUICK)


def run_on(
  cfg: MoEConfig, g: Given, dy: np.ndarray = DY
) -> tuple[Array, MoEAux, tuple[MoE, Array, Array]]:
  return run(layer(cfg), g.x, g.bias, g.tokens(key_of(cfg)), dy)


@functools.cache
def ran(cfg: MoEConfig) -> tuple[np.ndarray, MoEAux, tuple[MoE, np.ndarray, np.ndarray]]:
  return jax.tree.map(np.asarray, run_on(cfg, given_to(cfg)))


def output(cfg: MoEConfig, g: Given) -> tuple[np.ndarray, MoEAux]:
  """y and the aux, by a program that is there already, or one without losses and gradients."""
  if cfg in FIRST:
    return jax.tree.map(np.asarray, run_on(cfg, g)[:2])
  return jax.tree.map(np.asarray, forward(layer(cfg), g.x, g.bias, g.tokens(key_of(cfg))))


def parameters(moe: MoE) -> dict[str, np.ndarray]:
  """All there are, by their paths (router, experts.gate, shared.down, ...), in float64."""
  return {
    jax.tree_util.keystr(path[:-1], simple=True, separator='.'): np.asarray(a, np.float64)
    for path, a in jax.tree_util.tree_flatten_with_path(moe)[0]
  }


class Wanted(NamedTuple):
  y: np.ndarray
  losses: dict[str, float]
  logits: np.ndarray  # [B, S, E], noise included
  expert_ids: np.ndarray  # [B, S, K]
  best_ids: np.ndarray  # [B, S, K], by the scores alone
  kept: np.ndarray  # [T, K]


@functools.cache
def draws(num_experts: int) -> tuple[np.ndarray, np.ndarray]:
  """The jitter [B, S, D] and the noise [B, S, E] of the key: what is drawn is not in question, but what it does."""
  tokens = given(num_experts).tokens(key_of(NOISY))
  jitter = jax.vmap(lambda k: jax.random.uniform(k, (S, D), jnp.float32, 0.7, 1.3))(
    row_keys(tokens, JITTER)
  )
  noise = jax.vmap(lambda k: jax.random.normal(k, (S, num_experts)))(row_keys(tokens, NOISE))
  return np.asarray(jitter, np.float64), np.asarray(noise, np.float64)


def chosen_by(cfg: MoEConfig, logits: np.ndarray, g: Given) -> np.ndarray:
  r, logs = cfg.router, oracle.log_scores(logits, cfg.router.score_fn)
  choice = np.exp(logs) + g.bias
  if r.num_groups > 1:
    choice = np.apply_along_axis(
      oracle.limited_to_groups, -1, choice, r.num_groups, r.top_groups, 2
    )
  return oracle.SELECTIONS[r.selection](logs, choice, g.mask, g.ids, r.top_k)


FFNS = {
  'swiglu': oracle.swiglu,
  'clamped_swiglu': functools.partial(oracle.clamped_swiglu, limit=1.5),
}


def oracle_layer(
  cfg: MoEConfig, p: dict[str, np.ndarray], x: np.ndarray, like: Wanted | None = None
) -> Wanted:
  """The layer in float64; who goes where and who is dropped as in `like`, where a slope is to be taken."""
  r, g, x = cfg.router, given_to(cfg), np.asarray(x, np.float64)
  jitter, noise = draws(r.num_experts) if r.noisy else (1.0, 0.0)
  clean = x * jitter @ p['router']
  std = np.logaddexp(0, x * jitter @ p['noise']) if r.noisy else np.zeros_like(clean)
  if r.logit_bias:
    clean = clean + p['router_logit_bias']
  logits = clean + noise * std
  ids = like.expert_ids if like else chosen_by(cfg, logits, g)
  weighed_by = logits if r.weigh == 'softmax' else oracle.log_scores(logits, r.score_fn)
  weights = oracle.weigh_chosen(weighed_by, ids, r.renormalise, r.scale)
  flat = ids.reshape(B * S, -1)
  kept = like.kept if like else g.mask.reshape(-1, 1) & (flat < r.num_experts)
  if cfg.dispatch.capacity_factor and not like:
    room = oracle.capacity_of(B * S, r.num_experts, r.top_k, cfg.dispatch.capacity_factor)
    priority = np.take_along_axis(oracle.probabilities(logits, r.score_fn), ids, -1)
    kept = oracle.kept_copies(
      np.where(kept, flat, r.num_experts),
      priority.reshape(flat.shape),
      r.num_experts,
      room,
      cfg.dispatch.drop_by,
    )
  shared = []
  for i in range(cfg.num_shared):  # one wide SwiGLU is as many experts side by side
    part = slice(i * F, (i + 1) * F)
    shared.append((p['shared.gate'][:, part], p['shared.up'][:, part], p['shared.down'][part]))
  kinds = ('', '_bias') if cfg.expert_bias else ('',)
  experts = [p[f'experts.{name}{kind}'] for kind in kinds for name in ('gate', 'up', 'down')]
  y = oracle.moe(
    x.reshape(B * S, D),
    flat,
    weights.reshape(flat.shape),
    experts,
    kept,
    shared,
    p['shared_gate'] if cfg.shared_gate else None,
    FFNS[cfg.activation],
  )
  best_ids = (
    like.best_ids
    if like
    else oracle_balance.assignment_of(logits, ids[..., : r.top_k], r.score_fn, 'unbiased')
  )
  return Wanted(
    y.reshape(B, S, D),
    losses_of(cfg, p, ids, best_ids, weights, (clean, logits, std)),
    logits,
    ids,
    best_ids,
    kept,
  )


def losses_of(
  cfg: MoEConfig,
  p: dict[str, np.ndarray],
  ids: np.ndarray,
  best_ids: np.ndarray,
  weights: np.ndarray,
  z: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> dict[str, float]:
  """z: clean and noisy logits, and the noise's standard deviation."""
  r, g = cfg.router, given_to(cfg)
  likely = oracle.likely(*z, r.top_k) if r.noisy else np.zeros(z[1].shape)
  found = {
    'router_z': oracle_balance.router_z(z[1], g.mask),
    'simbal': oracle_balance.simbal(p['router']),
    'importance': oracle_balance.importance(weights, ids, g.mask, r.num_experts),
    'load': oracle_balance.smooth_load(likely, g.mask),
  }
  for name in oracle_balance.SETS:
    sets = oracle_balance.sets_of(name, g.segments, micro_batches=MICRO_BATCHES)
    found[name] = oracle_balance.mean_over_sets(
      oracle_balance.probability_losses(
        oracle.probabilities(z[1], r.score_fn),
        ids[..., :1] if name == 'gshard' else best_ids,
        g.mask,
        sets,
      )
    )
  return found


def check_forward(cfg: MoEConfig, y: np.ndarray, aux: MoEAux, want: Wanted) -> None:
  """Output, and all of the aux but its losses."""
  g, experts = given_to(cfg), cfg.router.num_experts
  np.testing.assert_allclose(y, want.y, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(np.sort(aux.expert_ids[g.mask]), np.sort(want.expert_ids[g.mask]))
  load = oracle_balance.load(want.expert_ids, g.mask, experts)
  np.testing.assert_array_equal(aux.load, load)
  np.testing.assert_array_equal(aux.seen, load, err_msg='without a rule the load is what is seen')
  copies = load.sum()
  np.testing.assert_allclose(aux.dropped, (copies - want.kept.sum()) / copies, rtol=1e-6)
  assert (aux.dropped > 0) == (cfg.dispatch.capacity_factor > 0)
  assert aux.stats.tokens == g.mask.sum() and aux.stats.copies == copies
  np.testing.assert_array_equal(np.diag(aux.stats.pairs), load)
  elsewhere = sum(
    len(set(ids) - set(best) - {experts})
    for ids, best in zip(want.expert_ids[g.mask].tolist(), want.best_ids[g.mask].tolist())
  )
  assert aux.stats.overrides == elsewhere
  assert elsewhere or cfg is NOISY, (
    'what decides besides the scores decides something, or this tests little'
  )


def check_gradients(cfg: MoEConfig) -> None:
  g, p = given_to(cfg), parameters(layer(cfg))
  y, aux, (to_moe, to_x, to_bias) = ran(cfg)
  want = oracle_layer(cfg, p, g.x)
  check_forward(cfg, y, aux, want)
  assert set(aux.losses) == set(want.losses) and not aux.whole
  for name, value in want.losses.items():
    np.testing.assert_allclose(aux.losses[name], value, rtol=2e-6, atol=1e-7, err_msg=name)
  assert (aux.losses['load'] > 0) == cfg.router.noisy
  assert not to_bias.any(), 'the bias has a gradient'

  def objective(p: dict[str, np.ndarray]) -> float:
    out = oracle_layer(cfg, p, p['x'], want)
    return float((out.y * DY).sum()) + sum(
      COEFFICIENTS[name] * value for name, value in out.losses.items()
    )

  p['x'] = g.x.astype(np.float64)
  for i, (name, gradient) in enumerate((parameters(to_moe) | {'x': to_x}).items()):
    direction = np.random.default_rng(i).normal(size=gradient.shape)
    slope = oracle.slope(lambda a, name=name: objective(p | {name: a}), p[name], direction)
    np.testing.assert_allclose(
      (gradient * direction).sum(),
      slope,
      rtol=2e-5,
      atol=1e-5 * np.linalg.norm(gradient),
      err_msg=name,
    )


@layers(FIRST)
def test_output_aux_and_gradients_are_the_oracles(cfg: MoEConfig) -> None:
  check_gradients(cfg)


@pytest.mark.slow
@layers([cfg for cfg in LAYERS if cfg not in FIRST])
def test_output_aux_and_gradients_of_the_others_are_the_oracles(cfg: MoEConfig) -> None:
  check_gradients(cfg)


@layers([*TIGHT, *SELECTED])
def test_outputs_of_all_selections_and_dispatchers_are_the_oracles(cfg: MoEConfig) -> None:
  g = given_to(cfg)
  y, aux = output(cfg, g)
  check_forward(cfg, y, aux, oracle_layer(cfg, parameters(layer(cfg)), g.x))
  assert cfg in FIRST or not (aux.losses or aux.whole), 'nothing is trained'


def test_every_selection_is_looked_at() -> None:
  assert {cfg.router.selection for cfg in SELECTED} == set(SELECTIONS)
  uneven = output(next(c for c in SELECTED if c.router.selection == 'expert_choice'), given(4))[
    1
  ].expert_ids
  counts = (uneven < 4).sum(-1)[given(4).mask]
  assert {0, 1} < set(counts.tolist()), (
    'expert choice gives some tokens nobody and some more than one'
  )


def test_dispatchers_agree() -> None:
  first, other = (ran(cfg) for cfg in FIRST[:2])
  for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


@layers([*FIRST[:2], *TIGHT, *SELECTED, NOISY])
def test_causal_unless_it_drops_by_score_or_selects_by_row(cfg: MoEConfig) -> None:
  """What comes later in a row changes nothing before it, unless it can evict by score, or experts choose tokens."""
  g, before, worst = given_to(cfg), output(cfg, given_to(cfg))[0], 0.0
  for row, begin in itertools.product(range(B), range(1, S)):
    x = g.x.copy()
    x[row, begin:] = (
      3 * g.x[row, begin - 1]
    )  # keener on the very experts that an earlier token wants
    worst = max(worst, np.abs(output(cfg, g._replace(x=x))[0] - before)[row, :begin].max())
  if SELECTIONS[cfg.router.selection].causal and not (
    cfg in TIGHT and cfg.dispatch.drop_by == 'probs'
  ):
    assert worst < 1e-5
  else:
    assert worst > 1e-2, 'it leaks; a detector that does not see it sees nothing'


@layers(FIRST)
def test_padding_changes_nothing_and_takes_no_room(cfg: MoEConfig) -> None:
  g = given_to(cfg)
  dy = np.where(g.mask[..., None], DY, 0)
  garbage = np.random.default_rng(5).normal(scale=30, size=g.x.shape).astype(np.float32)
  one, two = (
    run_on(cfg, g._replace(x=x), dy) for x in (g.x, np.where(g.mask[..., None], g.x, garbage))
  )
  np.testing.assert_allclose(one[0][g.mask], two[0][g.mask], rtol=1e-5, atol=1e-5)
  for a, b in zip(
    jax.tree.leaves((one[1]._replace(expert_ids=0), one[2])),
    jax.tree.leaves((two[1]._replace(expert_ids=0), two[2])),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  if not cfg.num_shared:
    assert not np.asarray(two[0])[~g.mask].any(), 'routed experts give padding 0'
  assert not np.asarray(two[2][1])[~g.mask].any()


@layers(TIGHT)
def test_padding_takes_no_room_in_a_buffer(cfg: MoEConfig) -> None:
  g = given_to(cfg)
  keen = np.where(g.mask[..., None], g.x, 30 * g.x[:1, :1])  # padding that would fill the buffers
  one, two = (output(cfg, g._replace(x=x)) for x in (g.x, keen))
  np.testing.assert_allclose(one[0][g.mask], two[0][g.mask], rtol=1e-5, atol=1e-5)
  assert one[1].dropped == two[1].dropped


@layers(FIRST)
def test_strange_batches_stay_finite(cfg: MoEConfig) -> None:
  """Nothing that counts; one token that does; all alike; all zero; logits of ±1e4."""
  g, moe, key = given_to(cfg), layer(cfg), key_of(cfg)
  steep = with_parameters(moe, lambda name, a: 1e4 * a if 'router' in name else a)
  nobody, one = np.zeros((B, S), bool), np.zeros((B, S), bool)
  one[1, 2] = True
  for label, of, strange in (
    ('nobody', moe, g._replace(mask=nobody)),
    ('one', moe, g._replace(mask=one)),
    ('alike', moe, g._replace(x=np.broadcast_to(g.x[:1, :1], g.x.shape))),
    ('zeros', moe, g._replace(x=0 * g.x)),
    ('steep', steep, g),
  ):
    y, aux, gradients = run(of, strange.x, strange.bias, strange.tokens(key), DY)
    finite = aux._replace(
      stats=aux.stats._replace(margin=0)
    )  # a margin may be infinite: nothing was left to compare
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, finite, gradients))), label
    copies = strange.mask.sum() * cfg.router.top_k
    if cfg.router.selection == 'expert_choice':  # each expert takes its part of a row, rounded up
      copies = sum(-(-n * cfg.router.top_k // 4) * 4 for n in strange.mask.sum(1))
    assert aux.load.sum() == aux.seen.sum() == copies, label
    if label == 'nobody':
      simbal = aux.losses['simbal']  # which looks at no token
      assert (
        aux.dropped == 0
        and not any(v for name, v in aux.losses.items() if name != 'simbal')
        and simbal > 0
      )


def test_renaming_experts_renames_their_load_and_nothing_else() -> None:
  old_name = np.array([6, 4, 7, 5, 1, 2, 0, 3])  # of each new one; groups stay together

  def rename(name: str, a: Array) -> Array:
    return a[:, old_name] if 'router' in name else a[old_name] if 'experts' in name else a

  for cfg in FIRST[:2]:
    g = given(8)
    renamed = with_parameters(layer(cfg), rename)
    y, aux, (to_moe, to_x, _) = run(renamed, g.x, g.bias[old_name], g.tokens(), DY)
    want_y, want, (want_moe, want_x, _) = ran(cfg)
    np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(to_x, want_x, rtol=1e-5, atol=1e-5)
    for a, b in zip(
      jax.tree.leaves(to_moe), jax.tree.leaves(with_parameters(want_moe, rename)), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(aux.load, want.load[old_name])
    for name, value in want.losses.items():
      np.testing.assert_allclose(aux.losses[name], value, rtol=1e-6)


def test_what_is_known_of_a_larger_set_comes_from_outside() -> None:
  """f is that of the whole set, P that of the tokens at hand; what is seen here goes out to be added up."""
  cfg, g, counts = FIRST[0], given(8), np.arange(8, dtype=np.float32)
  wide = frozendict(
    {'global_batch': Scope(2 * B), 'importance': Scope(2 * B), 'micro_batch': Scope(1)}
  )
  moe = with_parameters(layer(cfg), lambda name, a: a)
  moe.scopes = wide
  whole = {'global_batch': counts, 'importance': counts}
  _, aux = jax.jit(lambda moe: moe(g.x, g.bias, g.tokens(), whole), compiler_options=QUICK)(moe)
  want = oracle_layer(cfg, parameters(layer(cfg)), g.x)
  p = oracle.probabilities(want.logits, cfg.router.score_fn)
  f = 8 * counts / counts.sum()
  np.testing.assert_allclose(aux.losses['global_batch'], (f * p[g.mask].mean(0)).sum(), rtol=1e-6)
  np.testing.assert_allclose(
    aux.losses['importance'], oracle_balance.squared_variation(counts), rtol=1e-6
  )
  np.testing.assert_allclose(
    aux.losses['micro_batch'], ran(cfg)[1].losses['micro_batch'], rtol=1e-6
  )
  assert set(aux.whole) == set(whole)
  np.testing.assert_array_equal(
    aux.whole['global_batch'], oracle_balance.load(want.best_ids, g.mask, 8)
  )
  weights = oracle.weigh_chosen(
    oracle.log_scores(want.logits, 'softmax'), want.expert_ids, True, cfg.router.scale
  )
  gates = [weights[g.mask][want.expert_ids[g.mask] == e].sum() for e in range(8)]
  np.testing.assert_allclose(aux.whole['importance'], gates, rtol=1e-6)


def test_what_a_bias_rule_sees_is_of_the_tokens_that_count() -> None:
  """As the rule makes it of the same routing: the load, or a histogram."""
  cfg = dataclasses.replace(FIRST[0], router=RouterConfig(8, 2))
  g = given(8)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def seen(layers: dict[str, MoE], mask: Array) -> dict[str, tuple[Array, Array]]:
    tokens = g.tokens()._replace(mask=mask)
    return {
      rule: (
        moe(g.x, g.bias, tokens, None)[1].seen,
        BIAS_RULES[rule].observe(moe.route(g.x, g.bias, tokens), g.bias, mask),
      )
      for rule, moe in layers.items()
    }

  layers_of = {rule: layer(cfg, rule) for rule in ('sign', 'quantile')}
  for mask, tokens in ((g.mask, g.mask.sum()), (np.zeros((B, S), bool), 0)):
    for rule, (got, want) in seen(layers_of, mask).items():
      np.testing.assert_array_equal(got, want, err_msg=rule)
      assert got.sum() == tokens * (2 if rule == 'sign' else 8), (
        'every copy, or every expert of every token'
      )


@layers([FIRST[0], FIRST[2]])
def test_recorded_experts_are_used_again_and_weighed_anew(cfg: MoEConfig) -> None:
  g, (y, aux, gradients) = given_to(cfg), ran(cfg)
  record = g.tokens()._replace(replayed=aux.expert_ids)
  again = run(layer(cfg), g.x, -g.bias, record, DY)  # another bias has no say
  np.testing.assert_allclose(again[0], y, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(again[1].expert_ids, aux.expert_ids)
  np.testing.assert_array_equal(again[1].load, aux.load)
  for a, b in zip(
    jax.tree.leaves((again[2], again[1].losses)),
    jax.tree.leaves((gradients, aux.losses)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  other = with_parameters(layer(cfg), lambda name, a: -a if 'router' in name else a)
  moved = run(other, g.x, g.bias, record, DY)
  np.testing.assert_array_equal(moved[1].expert_ids, aux.expert_ids)
  p = parameters(other)
  like = oracle_layer(cfg, parameters(layer(cfg)), g.x)._replace(expert_ids=aux.expert_ids)
  np.testing.assert_allclose(moved[0], oracle_layer(cfg, p, g.x, like).y, rtol=1e-5, atol=1e-5)
  assert np.abs(moved[0] - y).max() > 1e-2


def test_without_a_key_nothing_is_random_and_the_logits_are_clean() -> None:
  """Evaluation of a router that is noisy in training."""
  g, p = given(4), parameters(layer(NOISY))
  y, aux = forward(layer(NOISY), g.x, g.bias, g.tokens())
  plain = dataclasses.replace(NOISY, router=RouterConfig(4, 2, 'sigmoid'))
  np.testing.assert_allclose(y, oracle_layer(plain, p, g.x).y, rtol=1e-5, atol=1e-5)
  assert np.abs(np.asarray(y) - ran(NOISY)[0]).max() > 1e-2


def test_noise_begins_alike_for_all_experts() -> None:
  made = jax.jit(lambda key: MoE(key, D, NOISY, frozendict(), '', 0.5), compiler_options=QUICK)(
    jax.random.key(1)
  )
  assert not made.noise[...].any() and made.noise[...].shape == (D, 4)
  assert 0.3 < np.std(made.router[...]) < 0.7 and not hasattr(layer(FIRST[0]), 'noise')


def test_how_parameters_start_and_where_they_lie() -> None:
  """What writes to the residual has its own width; biases start at 0, and like all vectors do not decay."""
  cfg = dataclasses.replace(GPT_OSS, num_shared=2, shared_gate=True, d_expert=64)
  make = functools.partial(MoE, d_model=D, scopes=frozendict(), bias_rule='', std=0.5)
  made, plain, narrow = jax.jit(
    lambda key: (
      make(key, cfg=cfg, out_std=0.1),
      make(key, cfg=MoEConfig(cfg.router, d_expert=64, num_shared=2)),
      make(key, cfg=cfg),
    ),
    compiler_options=QUICK,
  )(jax.random.key(1))
  axes = {
    'router': ('embed', ''),
    'router_logit_bias': ('norm',),
    'shared_gate': ('embed', ''),
    **{f'experts.{name}': ('expert', 'embed', 'mlp') for name in ('gate', 'up')},
    'experts.down': ('expert', 'mlp', 'embed'),
    'shared.down': ('mlp', 'embed'),
    **{f'experts.{name}_bias': ('expert', 'norm') for name in ('gate', 'up', 'down')},
    **{f'shared.{name}': ('embed', 'mlp') for name in ('gate', 'up')},
  }
  found, before, wide = parameters(made), parameters(plain), parameters(narrow)
  assert set(found) == set(axes) and set(axes) - set(before) == {
    'shared_gate',
    'experts.gate_bias',
    'experts.up_bias',
    'experts.down_bias',
  }
  for name, value in found.items():
    holder = functools.reduce(getattr, name.split('.'), made)
    assert holder.get_metadata('axes') == axes[name], name
    std = 0.0 if 'bias' in name else 0.1 if 'down' in name else 0.5
    np.testing.assert_allclose(
      value.std(), std, rtol=0.1 if value.size > 500 else 0.5, err_msg=name
    )
    np.testing.assert_allclose(
      wide[name], value * (5 if 'down' in name else 1), rtol=1e-6, err_msg=name
    )
    if name in before:
      np.testing.assert_array_equal(
        before[name], wide[name], err_msg='a switch changed how another parameter starts'
      )


@layers([GPT_OSS, QWEN2])
def test_computes_in_the_dtype_of_x(cfg: MoEConfig) -> None:
  g, half = given_to(cfg), jnp.bfloat16
  y, aux = forward(layer(cfg), jnp.asarray(g.x, half), g.bias, g.tokens())
  assert y.dtype == half and aux.load.dtype == jnp.float32
  exact = oracle_layer(
    cfg, parameters(layer(cfg)), np.asarray(jnp.asarray(g.x, half), np.float64)
  ).y
  assert np.abs(np.asarray(y, np.float32) - exact)[g.mask].max() < 0.03 * np.abs(exact).max()


@pytest.mark.slow
@layers([GPT_OSS, QWEN2])
def test_a_mesh_changes_nothing(cfg: MoEConfig) -> None:
  g = given_to(cfg)
  with jax.set_mesh(make_mesh(MeshConfig(expert=2, tensor=4))):
    got = run(layer(cfg), g.x, g.bias, g.tokens(), DY)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(ran(cfg)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('fields', 'problems'),
  [
    ({'d_expert': 0, 'num_shared': -1}, ['d_expert=0', 'num_shared=-1']),
    ({'shared_gate': True}, ['shared_gate=True with num_shared=0']),
    ({'activation': 'relu'}, ["activation='relu' is not one of ['clamped_swiglu', 'swiglu']"]),
    ({'activation': 'clamped_swiglu', 'activation_limit': 0.0}, ['activation_limit=0.0']),
  ],
)
def test_a_layer_that_cannot_be_is_one_clear_error(
  fields: dict[str, int | str | float], problems: list[str]
) -> None:
  with pytest.raises(ConfigError) as error:
    MoEConfig(**fields)
  assert [problem.split(':')[0] for problem in error.value.problems] == problems
