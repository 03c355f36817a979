"""One optimiser step: how the batch is cut, sharded, padded, packed or recomputed changes nothing."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from moejax.certify.tiny_model import LENGTH, ROWS, VOCAB
from moejax.certify.tiny_model import batch as make_batch
from moejax.config import frozendict
from moejax.data.batch import IGNORE, Batch
from moejax.model.config import AttentionConfig, LatentConfig, ModelConfig
from moejax.model.cross_entropy import LossConfig
from moejax.model.rope import RopeConfig, YarnConfig
from moejax.model.transformer import Transformer
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.bias import BIAS_RULES
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import SCORE_FNS, RouterConfig
from moejax.moe.statistics import token_statistics
from moejax.runtime import faults
from moejax.sharding.logical_axes import spec
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.sharding.params import shardings
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step import train_step as step
from moejax.train.step.gradient_accumulation import gradients
from moejax.train.step.train_state import TrainState, init_state
from moejax.train.step.train_step import eval_step, train_step
from tests.support.quick import QUICK

# Of a gradient's largest entry: sums in another order, float32.
TOLERANCE = 1e-6

CONFIG = ExperimentConfig(
  steps=20,
  batch_size=ROWS,
  seq_len=LENGTH,
  model=ModelConfig(
    vocab_size=VOCAB,
    d_model=16,
    num_layers=2,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, d_head=8),
    # The dispatcher that compiles fastest; the others are compared with it.
    moe=MoEConfig(
      router=RouterConfig(num_experts=4, top_k=2),
      dispatch=DispatchConfig('dense_matmul'),
      d_expert=8,
      num_shared=1,
    ),
  ),
  balance=BalanceConfig(
    losses=frozendict(sequence=0.1, ep_group=0.2, global_batch=0.3, router_z=0.01),
    bias_rule='sign',
    ep_groups=4,
  ),
)


def replace(cfg: ExperimentConfig, **changes: object) -> ExperimentConfig:
  """Fields of the model by their names, of the root otherwise."""
  model = {k: v for k, v in changes.items() if k in ModelConfig.__dataclass_fields__}
  root = {k: v for k, v in changes.items() if k not in model}
  return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **model), **root)


def with_moe(cfg: ExperimentConfig, **changes: object) -> ExperimentConfig:
  return replace(cfg, moe=dataclasses.replace(cfg.model.moe, **changes))


# What else families are made of, in two: each goes through all that must change nothing.
LATENT = replace(
  CONFIG,
  mtp_depth=2,
  sandwich_norm=True,
  loss=LossConfig(z_coef='0.01', mtp_coef='0.5'),
  attention=AttentionConfig(
    2,
    2,
    8,
    RopeConfig(interleaved=True, yarn=YarnConfig(4.0, 8, mscale_all_dim=1.0)),
    latent=LatentConfig(kv_rank=6, q_rank=10, d_rope=4, d_value=6),
  ),
  moe=dataclasses.replace(CONFIG.model.moe, shared_gate=True),
)
WINDOWED = replace(
  CONFIG,
  attention=AttentionConfig(
    4,
    2,
    8,
    RopeConfig(fraction=0.5),
    windows=(3, 0),
    sinks=True,
    qkv_bias=True,
    out_bias=True,
    qk_norm='head',
    clip_qkv=1.5,
  ),
  moe=dataclasses.replace(
    CONFIG.model.moe,
    expert_bias=True,
    activation='clamped_swiglu',
    activation_limit=0.5,
    router=dataclasses.replace(CONFIG.model.moe.router, logit_bias=True),
  ),
)
FEATURES = {'plain': CONFIG, 'latent': LATENT, 'windowed': WINDOWED}
features = pytest.mark.parametrize(
  'cfg',
  [
    CONFIG,
    *(pytest.param(FEATURES[name], marks=pytest.mark.slow) for name in ('latent', 'windowed')),
  ],
  ids=FEATURES,
)


@functools.cache
def parameters(cfg: ModelConfig) -> list[jax.Array]:
  """The numbers of a fresh model; vectors moved from where they start, since 1 and 0 hide what is done with them."""
  rng = np.random.default_rng(3)
  made = jax.jit(lambda key: Transformer(key, cfg), compiler_options=QUICK)(jax.random.key(0))
  return [
    leaf + (rng.normal(scale=0.1, size=leaf.shape).astype(np.float32) if np.ptp(leaf) == 0 else 0)
    for leaf in jax.tree.leaves(made)
  ]


def start(cfg: ExperimentConfig) -> TrainState:
  """A state with routers that choose unevenly, as trained ones do, and a bias that matters."""
  shapes = jax.eval_shape(functools.partial(init_state, cfg))
  state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
  # Whatever else the config says of how to compute with them.
  plain = dataclasses.replace(
    cfg.model,
    remat='none',
    unroll=1,
    moe=dataclasses.replace(cfg.model.moe, dispatch=CONFIG.model.moe.dispatch),
  )
  model = jax.tree.unflatten(jax.tree.structure(shapes.model), parameters(plain))
  w = model.blocks.moe.router
  w[...] = 20 * w[...]
  bias = 0.02 * jnp.arange(state.router.bias.size, dtype=jnp.float32).reshape(
    state.router.bias.shape
  )
  return state._replace(model=model, router=state.router._replace(bias=bias % 0.07))


@functools.cache
def differentiate(cfg: ExperimentConfig):
  return jax.jit(functools.partial(gradients, cfg=cfg), compiler_options=QUICK)


def flat(grads: object) -> np.ndarray:
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])


@functools.cache
def result(
  cfg: ExperimentConfig, mesh: MeshConfig | None = None, step: int = 0
) -> tuple[np.ndarray, object]:
  """(gradient as one vector, sums) of the batch."""
  state, batch, run = start(cfg)._replace(step=jnp.int32(step)), make_batch(), differentiate(cfg)
  if mesh is None:
    grads, sums, *_ = run(state, batch)
  else:
    devices = make_mesh(mesh)
    with jax.set_mesh(devices):
      state = jax.device_put(state, shardings(state, devices))
      grads, sums, *_ = run(state, jax.device_put(batch, NamedSharding(devices, spec('batch'))))
  return flat(grads), jax.device_get(sums)


def assert_same(one: tuple, other: tuple) -> None:
  (grads, sums), (grads2, sums2) = one, other
  np.testing.assert_allclose(grads2, grads, rtol=0, atol=TOLERANCE * np.abs(grads).max())
  np.testing.assert_array_equal(sums2.load, sums.load)
  np.testing.assert_allclose(sums2.loss, sums.loss, rtol=1e-6)
  for name, value in sums.terms.items():
    np.testing.assert_allclose(sums2.terms[name], value, rtol=2e-6, err_msg=name)
  statistics = token_statistics(sums2.stats)
  for name, value in token_statistics(sums.stats).items():
    np.testing.assert_allclose(statistics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


@features
def test_micro_batches_change_nothing(cfg: ExperimentConfig) -> None:
  assert_same(result(cfg), result(replace(cfg, micro_batches=4)))


@pytest.mark.slow
def test_micro_batch_loss_is_the_one_that_depends_on_the_cut_by_definition() -> None:
  balance = dataclasses.replace(CONFIG.balance, losses=frozendict(micro_batch=1.0))
  one, two = (
    result(replace(CONFIG, micro_batches=n, balance=balance))[1].terms['balance/micro_batch']
    for n in (1, 2)
  )
  assert abs(one - two) > 1e-3
  halves = dataclasses.replace(balance, losses=frozendict(ep_group=1.0), ep_groups=2)
  np.testing.assert_allclose(
    two, result(replace(CONFIG, balance=halves))[1].terms['balance/ep_group'], rtol=1e-6
  )


@pytest.mark.parametrize(
  'score_fn',
  [
    'sigmoid',
    *(pytest.param(name, marks=pytest.mark.slow) for name in SCORE_FNS if name != 'sigmoid'),
  ],
)
def test_each_balance_gradient_survives_accumulation(score_fn: str) -> None:
  """Where it fails the router's balance gradient falls with the number of tokens, and the log looks right.

  One after the other holds the whole coefficient, by schedules: one program for all, and for 1 and 4 micro-batches.
  The router is a noisy one: what is random does not depend on the cut either.
  """
  names = sorted(set(BALANCE_LOSSES) - {'micro_batch', 'gshard'})  # of a micro-batch by definition
  part = 100 // len(names)
  schedules = {name: f'0, 100@{i * part}%, 0@{(i + 1) * part}%' for i, name in enumerate(names)}
  balance = dataclasses.replace(
    CONFIG.balance, losses=frozendict(schedules), bias_rule='', ep_groups=2
  )
  router = dataclasses.replace(
    CONFIG.model.moe.router, score_fn=score_fn, noisy=True, jitter=0.1, expert_dropout=0.25
  )
  moe = dataclasses.replace(CONFIG.model.moe, router=router)
  cfg = replace(CONFIG, balance=balance, steps=100, moe=moe)
  gradients_of = []
  for i, name in enumerate(names):
    one, four = (result(replace(cfg, micro_batches=n), step=i * part) for n in (1, 4))
    assert_same(one, four)
    np.testing.assert_allclose(
      one[1].loss - one[1].terms['lm_loss'], 100 * one[1].terms[f'balance/{name}'], rtol=1e-5
    )
    gradients_of.append(one[0])
  assert all(np.abs(a - b).max() > 0.1 for a, b in itertools.combinations(gradients_of, 2)), (
    'the same loss twice'
  )


MIXED = MeshConfig(1, fsdp=2, expert=2, tensor=2)


@pytest.mark.slow
@pytest.mark.parametrize('cfg', [LATENT, WINDOWED], ids=['latent', 'windowed'])
def test_a_mesh_changes_nothing_for_any_architecture(cfg: ExperimentConfig) -> None:
  assert_same(result(cfg), result(with_moe(cfg, dispatch=DispatchConfig('sparse_matmul')), MIXED))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'remat'),
  [('plain', 'full'), ('plain', 'dots'), ('latent', 'full'), ('windowed', 'full')],
)
def test_remat_changes_nothing(name: str, remat: str) -> None:
  assert_same(result(FEATURES[name]), result(replace(FEATURES[name], remat=remat)))


@pytest.mark.slow
def test_unrolled_layers_change_nothing() -> None:
  assert_same(result(CONFIG), result(replace(CONFIG, unroll=2)))


@features
def test_padding_rows_and_columns_change_nothing(cfg: ExperimentConfig) -> None:
  batch = make_batch()
  wide = Batch(
    *(
      jnp.pad(a, ((0, 0), (0, 5)), constant_values=fill)
      for a, fill in zip(batch[:5], (7, IGNORE, False, 0, 0))
    ),
    batch.task_ids,
  )
  state = start(cfg)
  with_padding = differentiate(cfg)(state, wide)
  assert_same(result(cfg), (flat(with_padding[0]), jax.device_get(with_padding[1])))


@features
def test_packing_documents_changes_nothing(cfg: ExperimentConfig) -> None:
  """A row of two documents, and the same two in rows of their own: one mean over documents, one over tokens."""
  cfg = replace(
    cfg, batch_size=2, balance=dataclasses.replace(CONFIG.balance, losses=frozendict(sequence=0.1))
  )
  tokens = np.arange(1, 13)
  first, second = 5, 7

  def row(*documents: np.ndarray) -> list[np.ndarray]:
    pad = LENGTH - sum(map(len, documents))
    columns = (
      np.concatenate([*documents, np.full(pad, 3)]),
      np.concatenate([*(np.roll(d, -1) for d in documents), np.full(pad, IGNORE)]),
      np.concatenate([*(np.full(len(d), i + 1) for i, d in enumerate(documents)), np.zeros(pad)]),
      np.concatenate([*(np.arange(len(d)) for d in documents), np.zeros(pad)]),
    )
    return [c.astype(np.int32) for c in columns]

  def batch(*rows: list[np.ndarray]) -> Batch:
    tokens, targets, segments, positions = (jnp.stack(column) for column in zip(*rows))
    return Batch(
      tokens, targets, targets != IGNORE, segments, positions, jnp.zeros(len(rows), jnp.int32)
    )

  state = start(cfg)
  packed = batch(row(tokens[:first], tokens[first:]), row())
  apart = batch(row(tokens[:first]), row(tokens[first : first + second]))
  results = [differentiate(cfg)(state, b) for b in (packed, apart)]
  assert_same(*((flat(r.grads), jax.device_get(r.sums)) for r in results))


def test_the_loss_logged_is_the_loss_differentiated() -> None:
  _, sums = result(CONFIG)
  losses = CONFIG.balance.losses
  total = sums.terms['lm_loss'] + sum(
    float(losses[name]) * sums.terms[f'balance/{name}'] for name in CONFIG.balance.active()
  )
  np.testing.assert_allclose(sums.loss, total, rtol=1e-6)


@functools.cache
def stepper(cfg: ExperimentConfig):
  return jax.jit(functools.partial(train_step, cfg=cfg), compiler_options=QUICK)


def test_training_learns_one_batch_by_heart() -> None:
  cfg = replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, learning_rate=0.02, warmup_steps=2))
  state, losses = start(cfg), []
  for _ in range(20):
    state, metrics = stepper(cfg)(state, make_batch())
    losses.append(float(metrics['lm_loss']))
  assert losses[-1] < 0.6 * losses[0], losses


@pytest.mark.parametrize('bad', ['loss', 'gradient'])
def test_a_non_finite_step_changes_nothing_but_the_count(bad: str) -> None:
  state = start(CONFIG)
  state, _ = stepper(CONFIG)(state, make_batch())
  value = (
    jnp.inf if bad == 'loss' else 1e30
  )  # 1e30 squared overflows in the gradient's norm, or in the loss
  poisoned = jax.tree.map(lambda a: a, state.model)
  poisoned.norm.scale[...] = poisoned.norm.scale[...].at[0].set(value)
  before = state._replace(model=poisoned)
  after, metrics = stepper(CONFIG)(before, make_batch())
  assert metrics['skipped'] and int(after.step) == int(before.step) + 1
  for name in ('model', 'opt_state', 'router', 'lagged', 'stability'):
    jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))


def test_a_spike_changes_nothing_where_it_is_to_be_skipped() -> None:
  """A trend far below the loss, or below the gradient's norm: left out, counted, and the trend itself goes on."""
  cfg = replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, skip_spikes=6.0))
  state, metrics = stepper(cfg)(start(cfg), make_batch())
  assert not metrics['skipped']  # no trend yet
  loss, norm = float(metrics['lm_loss']), float(metrics['grad_norm'])
  for trend in ([2 * loss, 2 * norm], [loss / 2, 2 * norm], [2 * loss, norm / 2]):
    told = state.stability._replace(steps=jnp.float32(50), trend=jnp.array(trend, jnp.float32))
    before = state._replace(stability=told)
    after, metrics = stepper(cfg)(before, make_batch())
    is_spike = trend != [2 * loss, 2 * norm]
    assert metrics['skipped'] == is_spike and metrics['skipped_total'] == is_spike
    assert int(after.step) == int(before.step) + 1 and int(after.stability.steps) == 51
    same = [
      np.array_equal(a, b)
      for name in ('model', 'opt_state', 'router')
      for a, b in zip(
        jax.tree.leaves(getattr(after, name)), jax.tree.leaves(getattr(before, name)), strict=True
      )
    ]
    assert all(same) if is_spike else not any(same[:3])
  assert not stepper(CONFIG)(before, make_batch())[1]['skipped']


def test_a_fault_on_purpose_is_in_the_program_only_when_asked_for(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Unset, a step is the program it would be if nobody had thought of faults. Set, it changes that step and nothing."""

  def program() -> str:
    return str(
      jax.make_jaxpr(functools.partial(train_step, cfg=CONFIG))(start(CONFIG), make_batch())
    )

  unset = program()
  with monkeypatch.context() as m:
    m.setattr(step, 'inject', lambda point, numbers, step: numbers)
    assert program() == unset
  monkeypatch.setattr(
    faults,
    'parse_environment',
    lambda: faults.planned('nan@loss:2,inf@gradient:3,nan@validation:1'),
  )
  assert program() != unset
  run = jax.jit(lambda state, batch: train_step(state, batch, CONFIG), compiler_options=QUICK)
  state, metrics = run(start(CONFIG), make_batch())
  assert not metrics['skipped']
  for skips, name in enumerate(('loss', 'grad_norm'), 1):
    before = state
    state, metrics = run(before, make_batch())
    assert (
      metrics['skipped'] and metrics['skipped_total'] == skips and not np.isfinite(metrics[name])
    )
    for part in ('model', 'opt_state', 'router', 'lagged', 'stability'):
      jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(before, part))
  assert not run(state, make_batch())[1]['skipped']


def test_a_finite_step_is_not_skipped() -> None:
  state, metrics = stepper(CONFIG)(start(CONFIG), make_batch())
  assert not metrics['skipped'] and int(state.step) == 1


@pytest.mark.parametrize(
  'rule',
  ['sign', *(pytest.param(rule, marks=pytest.mark.slow) for rule in BIAS_RULES if rule != 'sign')],
)
def test_the_bias_moves_once_a_step_by_the_whole_batch(rule: str) -> None:
  balance = dataclasses.replace(CONFIG.balance, bias_rule=rule, bias_rate='0.5, 0@50%')
  cfg = replace(CONFIG, micro_batches=2, balance=balance)
  before = start(cfg)
  after, metrics = stepper(cfg)(before, make_batch())
  whole = jax.jit(
    functools.partial(gradients, cfg=replace(cfg, micro_batches=1)), compiler_options=QUICK
  )
  seen = whole(before, make_batch()).sums.seen
  want = jax.vmap(lambda state, seen: BIAS_RULES[rule].update(state, seen, 0.5, 2))(
    before.router, seen
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), after.router, want
  )
  assert np.abs(np.asarray(after.router.bias - before.router.bias)).max() > 0.01
  late, _ = stepper(cfg)(before._replace(step=jnp.int32(10)), make_batch())
  jax.tree.map(np.testing.assert_array_equal, late.router, before.router)


def test_router_bias_takes_no_gradient_and_no_optimiser_state() -> None:
  state = start(CONFIG)

  def loss(bias: jax.Array) -> jax.Array:
    return gradients(
      state._replace(router=state.router._replace(bias=bias)), make_batch(), CONFIG
    ).sums.loss

  np.testing.assert_array_equal(
    jax.jit(jax.grad(loss))(state.router.bias), np.zeros(state.router.bias.shape)
  )
  shapes = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
  assert state.router.bias.shape not in shapes


def test_evaluation_moves_nothing_and_counts_what_training_would() -> None:
  state = start(CONFIG)
  out = jax.jit(functools.partial(eval_step, cfg=CONFIG))(state.model, state.router, make_batch())
  _, sums = result(CONFIG)
  np.testing.assert_allclose(
    out['task_nll'].sum() / out['task_tokens'].sum(), sums.terms['lm_loss'], rtol=1e-6
  )
  np.testing.assert_array_equal(out['load'], sums.load)
  counted = (make_batch().segment_ids > 0).sum() * 2
  np.testing.assert_array_equal(out['load'].sum(-1), counted)


def test_gradient_of_the_model_against_finite_differences() -> None:
  """The whole objective, hand-written gradients and all, along random directions, in float32."""
  state, batch = start(CONFIG), make_batch()
  grads = differentiate(CONFIG)(state, batch).grads
  for part in ('router', 'experts', 'shared'):
    leaves = jax.tree.leaves(getattr(grads.blocks.moe, part))
    norm = float(optax.tree.norm(leaves))
    moved = []
    for sign in (1, -1):
      model = jax.tree.map(lambda a: a, state.model)
      setattr(
        model.blocks.moe,
        part,
        jax.tree.map(
          lambda a, g, scale=sign * 1e-3 / norm: a + scale * g,
          getattr(model.blocks.moe, part),
          getattr(grads.blocks.moe, part),
        ),
      )
      moved.append(float(differentiate(CONFIG)(state._replace(model=model), batch).sums.loss))
    np.testing.assert_allclose((moved[0] - moved[1]) / 2e-3, norm, rtol=3e-2, err_msg=part)
