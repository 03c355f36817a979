"""One optimiser step: what a mesh, recomputing and unrolling leave as it is, what a bad step
changes, and how the router bias moves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.data.batch import Batch
from moejax.model.transformer import Transformer
from moejax.moe.bias import BIAS_RULES
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.runtime import faults
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step import train_step as step
from moejax.train.step.gradient_accumulation import gradients
from moejax.train.step.train_state import TrainState
from moejax.train.step.train_step import eval_step, train_step
from moejax.train.telemetry import routing_probe
from tests.support.quick import QUICK
from tests.train.step.step_cases import (
  CONFIG,
  LATENT,
  VOCAB,
  assert_same,
  differentiate,
  make_batch,
  replace,
  result,
  start,
  with_moe,
)

MIXED = MeshConfig(1, fsdp=2, expert=2, tensor=2)


@pytest.mark.slow
def test_a_mesh_changes_nothing_for_latent_attention_and_depths() -> None:
  """Windows, sinks and biases are on a mesh in tests/families, with gpt_oss."""
  on_mesh = with_moe(LATENT, dispatch=DispatchConfig('sparse_matmul'))
  assert_same(result(LATENT), result(on_mesh, MIXED))


@pytest.mark.slow
@pytest.mark.parametrize(('remat', 'mesh'), [('full', None), ('experts', MIXED)])
def test_remat_changes_nothing(remat: str, mesh: MeshConfig | None) -> None:
  """The other policies are in tests/model/test_layer_stack.py."""
  assert_same(result(CONFIG), result(replace(CONFIG, remat=remat), mesh))


@pytest.mark.slow
def test_unrolled_layers_change_nothing() -> None:
  assert_same(result(CONFIG), result(replace(CONFIG, unroll=2)))


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
  # 1e30 squared overflows in the gradient's norm, or in the loss.
  value = jnp.inf if bad == 'loss' else 1e30
  poisoned = jax.tree.map(lambda a: a, state.model)
  poisoned.norm.scale[...] = poisoned.norm.scale[...].at[0].set(value)
  before = state._replace(model=poisoned)
  after, metrics = stepper(CONFIG)(before, make_batch())
  assert metrics['skipped'] and int(after.step) == int(before.step) + 1
  for name in ('model', 'opt_state', 'router', 'lagged', 'stability'):
    jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))


@pytest.mark.slow
def test_a_step_whose_update_is_not_finite_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
  """Loss and gradient are finite, and what the optimiser makes of them is not.

  By the step: a good one; NaN in one update; inf in one moment; an update that is finite, but not
  once it is added to its parameter.
  """
  balance = dataclasses.replace(CONFIG.balance, accumulation='lagged')
  cfg = replace(CONFIG, micro_batches=2, balance=balance)
  tx = step.optimizer(cfg.optim, cfg.steps)
  unused = min({*range(VOCAB)} - {*make_batch().tokens.ravel().tolist()})

  def run(state: TrainState, batch: Batch) -> tuple[TrainState, step.Metrics]:
    def update(
      grads: Transformer, opt_state: optax.OptState, model: Transformer, grad_norm: jax.Array
    ) -> tuple[Transformer, optax.OptState]:
      updates, opt_state = tx.update(grads, opt_state, model, grad_norm=grad_norm)
      was = updates.embed.table[unused, 0]
      wrong = jnp.stack([was, jnp.nan, was, 3e38])[state.step]
      updates.embed.table[...] = updates.embed.table[...].at[unused, 0].set(wrong)
      moments, tree = jax.tree.flatten(opt_state)
      last = [i for i, leaf in enumerate(moments) if leaf.ndim][-1]
      moments[last] += jnp.where(state.step == 2, jnp.inf, 0)
      return updates, jax.tree.unflatten(tree, moments)

    of_step = optax.GradientTransformationExtraArgs(tx.init, update)
    monkeypatch.setattr(step, 'optimizer', lambda cfg, steps: of_step)
    return train_step(state, batch, cfg)

  state = start(cfg)
  # A number this large in a row of the embedding that no token reads.
  state.model.embed.table[...] = state.model.embed.table[...].at[unused, 0].set(1e38)
  compiled = jax.jit(run, compiler_options=QUICK)
  state, metrics = compiled(state, make_batch())
  assert not metrics['skipped'] and state.lagged['global_batch'].any()
  for skips in (1, 2, 3):
    before = state
    state, metrics = compiled(before, make_batch())
    assert metrics['skipped'] and metrics['skipped_total'] == skips and int(state.step) == skips + 1
    assert np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm'])
    for part in ('model', 'opt_state', 'router', 'lagged', 'stability'):
      jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(before, part))


@pytest.mark.slow
def test_a_spike_changes_nothing_where_it_is_to_be_skipped() -> None:
  """A trend far below the loss, or below the gradient's norm: left out, counted, and the trend
  itself goes on."""
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


@pytest.mark.slow
def test_a_fault_on_purpose_is_in_the_program_only_when_asked_for(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Unset, a step is the program it would be if nobody had thought of faults. Set, it changes that
  step and nothing else."""

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
    lambda: faults.parse_faults('nan@loss:2,inf@gradient:3,nan@validation:1'),
  )
  assert program() != unset
  run = jax.jit(lambda state, batch: train_step(state, batch, CONFIG), compiler_options=QUICK)
  state, metrics = run(start(CONFIG), make_batch())
  assert not metrics['skipped']
  for skips, name in enumerate(('loss', 'grad_norm'), 1):
    before = state
    state, metrics = run(before, make_batch())
    assert metrics['skipped'] and metrics['skipped_total'] == skips
    assert not np.isfinite(metrics[name])
    for part in ('model', 'opt_state', 'router', 'lagged', 'stability'):
      jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(before, part))
  assert not run(state, make_batch())[1]['skipped']


def test_a_finite_step_is_not_skipped() -> None:
  state, metrics = stepper(CONFIG)(start(CONFIG), make_batch())
  assert not metrics['skipped'] and int(state.step) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
  'rule',
  # Of counts, and of histograms; the certificate takes the other rules.
  ['sign', 'quantile'],
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
  np.testing.assert_allclose(out['nll'].sum(), out['task_nll'].sum(), rtol=1e-6)
  np.testing.assert_array_equal(out['nll'] > 0, make_batch().mask)
  np.testing.assert_array_equal(out['load'], sums.load)
  counted = (make_batch().segment_ids > 0).sum() * 2
  np.testing.assert_array_equal(out['load'].sum(-1), counted)


def test_evaluation_keeps_the_experts_of_the_probe_alone(monkeypatch: pytest.MonkeyPatch) -> None:
  """Of all tokens of all layers they are K numbers each, which a scan over layers would stack."""
  state, batch = start(CONFIG), make_batch()
  rows, length = batch.tokens.shape
  monkeypatch.setattr(routing_probe, 'TOKENS', 2 * length)
  traced, out = jax.make_jaxpr(functools.partial(eval_step, cfg=CONFIG), return_shape=True)(
    state.model, state.router, batch
  )
  layers, _ = state.router.bias.shape
  assert rows > 2 and out['expert_ids'].shape == (layers, 2, length, 2)
  stacked = {f'[{n},{rows},{length},2]' for n in range(1, layers + 1)}
  program = str(traced)
  assert not any(shape in program for shape in stacked)


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
