"""Line 6, and the rules of line 1: the oracle's rule moves the router bias, once a step, alone.

  what each micro-batch saw, added up -> update | the whole batch, seen by the oracle -> its rule

Letters: B batch, S sequence, E experts, K experts per token, L MoE layers.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from moejax.certify import tiny_config
from moejax.certify import tiny_model as tiny
from moejax.certify.cases import MICRO_BATCHES, Plan, make_cases, router_name
from moejax.certify.checks import Check, Worst
from moejax.certify.measure import inputs_of, route_with_noise
from moejax.certify.oracle import balance as oracle_balance
from moejax.certify.oracle import bias as oracle_bias
from moejax.certify.oracle import routing as oracle
from moejax.data.batch import Batch
from moejax.moe import bias, routing
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step import train_state as state
from moejax.train.step import train_step as step
from moejax.train.step.gradient_accumulation import gradients

CLOSE = 1e-6  # of a bias: float32 numbers of a size below 1
WHY = 'absolute; biases below 1 in float32'
MESH = MeshConfig(2, expert=2, tensor=2)
OTHER_TOKEN = 5  # for places that are padding
RATE = 0.05  # of the base's schedule, until IDLE_STEP
IDLE_STEP = tiny_config.STEPS // 2  # from this step on the rate is 0


def push(
  routed: routing.Routing, before: bias.BiasState, mask: Array, rate: Array, top_k: int
) -> dict[str, bias.BiasState]:
  """What every rule makes of a batch [B, S] that it sees in micro-batches. Rule -> new state."""

  def part(a: Array, i: int) -> Array:
    # The router's weights, which a Routing also holds, have no rows to cut.
    return jnp.split(a, MICRO_BATCHES)[i] if a.shape[0] == mask.shape[0] else a

  parts = [jax.tree.map(lambda a, i=i: part(a, i), routed) for i in range(MICRO_BATCHES)]
  masks, after = jnp.split(mask, MICRO_BATCHES), {}
  for name, rule in bias.BIAS_RULES.items():
    seen = sum(rule.observe(one, before.bias, m) for one, m in zip(parts, masks))
    after[name] = rule.update(before, seen, rate, top_k)
  return after


def check_rules(plan: Plan) -> Iterator[Check]:
  """Checks the rules alone, on batches of every kind that are seen in micro-batches."""
  worst = {name: Worst(f'bias rule {name}', CLOSE, WHY) for name in sorted(bias.BIAS_RULES)}
  for cfg in (
    routing.RouterConfig(8, 2, 'sigmoid'),
    routing.RouterConfig(8, 2, 'softmax', num_groups=2),
  ):
    for label, case in make_cases(plan, 8).items():
      route = plan.program(route_with_noise, cfg)
      routed, _ = route(inputs_of(plan, case), case.bias, case.mask, case.segments)
      momentum = plan.rng(7).normal(scale=0.1, size=8).astype(np.float32)
      before = bias.BiasState(case.bias, momentum)
      seen = oracle_bias.Seen(np.asarray(routed.scores), np.asarray(routed.expert_ids), case.mask)
      for rate in (RATE, 0.0):
        after = plan.program(push, cfg.top_k)(routed, before, case.mask, jnp.float32(rate))
        for name, check in worst.items():
          if name not in oracle_bias.BIAS_RULES:
            check.see('a rule without its equation is not certified', float('nan'))
            continue
          wanted = oracle_bias.bias_step(name, oracle_bias.BiasState(*before), seen, rate)
          where = f'{router_name(cfg)}; {label}; rate {rate}'
          check.see(where, distance(after[name], wanted))
  for check in worst.values():
    yield check.check()


def distance(one: bias.BiasState, other: bias.BiasState | oracle_bias.BiasState) -> float:
  """The largest absolute difference of two states, in bias or momentum."""
  differences = []
  for a, b in zip(one, other):
    differences.append(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())
  return float(max(differences))


class OracleStep(NamedTuple):
  """What a training step must do with the router bias."""

  load: np.ndarray  # [L, E]  how many tokens chose each expert
  after: oracle_bias.BiasState  # [L, E] each


def oracle_step(
  plan: Plan, before: state.TrainState, rows: Batch, rule: str, rate: float
) -> OracleStep:
  """Load and new bias by the oracle, from each layer's logits of the whole batch."""
  routed, mask = tiny.state_routing(plan, before, rows), rows.segment_ids > 0
  load, new_bias, momentum = [], [], []
  for i, logits in enumerate(routed.logits):
    layer = oracle_bias.BiasState(*(np.asarray(a)[i] for a in before.router))
    ids = oracle.route(logits, layer.bias, top_k=2, score_fn='softmax').expert_ids
    load.append(oracle_balance.load(ids, mask, 4))
    seen = oracle_bias.Seen(routed.scores[i], ids, mask)
    after = oracle_bias.bias_step(rule, layer, seen, rate)
    new_bias.append(after.bias)
    momentum.append(after.momentum)
  return OracleStep(np.array(load), oracle_bias.BiasState(np.array(new_bias), np.array(momentum)))


class StillChecks:
  """What must not move the bias, over all rules, and what must hold for the state that has it."""

  def __init__(self) -> None:
    self.devices = Worst('bits that differ between devices', 0, 'every device holds the same')
    self.idle = Worst('moved in a skipped step, or at rate 0', 0, 'held to the bit')
    self.padding = Worst('moved by what stands in padding', 0, 'the same bits')
    self.dtypes = Worst('not float32', 0, 'a step of 1e-3 is lost in bfloat16')
    self.moments = Worst('moments beyond one for each parameter', 0, 'whole numbers')

  def see(
    self,
    plan: Plan,
    rule: str,
    cfg: ExperimentConfig,
    before: state.TrainState,
    taken: tiny.StepResult,
  ) -> None:
    """Takes in one rule: a step on a mesh of devices, and steps from the same state that differ."""
    self.see_layout(rule, taken.after.router)
    self.see_idle_steps(plan, rule, cfg, before)
    rows = tiny.batch_of(plan)
    other = rows._replace(tokens=np.where(rows.segment_ids > 0, rows.tokens, OTHER_TOKEN))
    after = tiny.take_step(plan, cfg, before, other, MESH).after
    self.padding.see(rule, distance(after.router, taken.after.router))
    # AdamW must keep a moment for each parameter, and none for the bias, which it would decay.
    moments = optax.tree.get_all_with_path(taken.after.opt_state, 'mu')[0][1]
    num_moments = sum(leaf.size for leaf in jax.tree.leaves(moments))
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(before.model))
    self.moments.see(rule, num_moments - num_parameters)

  def see_layout(self, rule: str, router: bias.BiasState) -> None:
    """How the state lies on the devices: a whole float32 copy on each, all alike."""
    for field, value in zip(router._fields, router):
      shards = [np.asarray(shard.data) for shard in value.addressable_shards]
      unlike = sum(not np.array_equal(shards[0], other) for other in shards)
      self.devices.see(f'{rule}: {field}', unlike + (len(shards) != jax.device_count()))
      self.dtypes.see(f'{rule}: {field}', value.dtype != jnp.float32)

  def see_idle_steps(
    self, plan: Plan, rule: str, cfg: ExperimentConfig, before: state.TrainState
  ) -> None:
    """A step whose rate is 0, and one that is skipped because its objective is not finite."""
    rows = tiny.batch_of(plan)
    idle = before._replace(step=jnp.int32(IDLE_STEP))
    late = tiny.take_step(plan, cfg, idle, rows, MESH)
    self.idle.see(f'{rule}: rate 0', distance(late.after.router, before.router))
    # The step before is the last one with a rate.
    last = tiny.take_step(plan, cfg, before._replace(step=jnp.int32(IDLE_STEP - 1)), rows, MESH)
    stayed = distance(last.after.router, before.router) == 0
    self.idle.see(f'{rule}: stays at a rate that is not 0', stayed)
    model = jax.tree.map(lambda a: a, before.model)  # a copy: what is set below stays in it
    model.norm.scale[...] = model.norm.scale[...].at[0].set(jnp.inf)
    poisoned = tiny.take_step(plan, cfg, before._replace(model=model), rows, MESH)
    held = distance(poisoned.after.router, before.router)
    # A step that was taken after all has not shown what a skipped one does.
    self.idle.see(f'{rule}: skipped', held if poisoned.metrics['skipped'] else float('nan'))

  def checks(self) -> Iterator[Check]:
    """The checks over all rules that were seen."""
    for worst in (self.devices, self.idle, self.padding, self.dtypes, self.moments):
      yield worst.check()


def bias_line(plan: Plan) -> Iterator[Check]:
  """Checks line 6, on whole steps in micro-batches with recomputation, on a mesh of devices."""
  still, rows = StillChecks(), tiny.batch_of(plan)
  # Sign first: whatever is wrong with a step shows in it. Quantile next: what it adds up are no
  # counts.
  rules = ['sign', 'quantile', *sorted(set(bias.BIAS_RULES) - {'sign', 'quantile'})]
  base = tiny_config.base_config()
  for rule in rules[:2] if plan.quick else rules:
    cfg = tiny_config.change(
      base,
      micro_batches=2,
      remat='full',
      dispatch=DispatchConfig('sparse_matmul'),
      balance=dataclasses.replace(base.balance, bias_rule=rule),
    )
    load = Worst(f'load of a step, {rule}', 0, 'whole numbers; the oracle counts the whole batch')
    after = Worst(f'bias after each of two steps, {rule}', CLOSE, WHY)
    before = tiny.start_state(plan, cfg)
    first = tiny.take_step(plan, cfg, before, rows, MESH)
    second = tiny.take_step(plan, cfg, first.after, rows, MESH)
    for number, (start, taken) in enumerate(((before, first), (first.after, second))):
      wanted = oracle_step(plan, start, rows, rule, RATE)
      load.see(f'step {number}', np.abs(np.asarray(taken.metrics['load']) - wanted.load).max())
      after.see(f'step {number}', distance(taken.after.router, wanted.after))
    yield load.check()
    yield after.check()
    if rule == 'sign':
      yield from check_evaluation(plan)
    still.see(plan, rule, cfg, before, first)
  yield from still.checks()
  yield from check_checkpoint(first)
  if not plan.quick:
    yield from check_gradient(plan)


def check_evaluation(plan: Plan) -> Iterator[Check]:
  """Checks that a training step is the same after evaluations, which count loads but keep none."""
  moved = Worst('moved by evaluation', 0, 'the same bits')
  counted = Worst('load in evaluation', 0, 'whole numbers; what training counts')
  cfg, rows = tiny_config.base_config(), tiny.batch_of(plan)
  before = tiny.start_state(plan, cfg)
  one = jax.block_until_ready(tiny.take_step(plan, cfg, before, rows))
  evaluate = plan.program(step.eval_step, cfg)
  evaluated = evaluate(before.model, before.router, rows)
  difference = np.abs(np.asarray(evaluated['load'] - one.metrics['load'])).max()
  counted.see('the batch that training takes', difference)
  # The sign rule sees nothing of a mere multiple: evaluation uses the experts that training uses
  # least.
  opposite = before.router._replace(bias=-one.metrics['load'].astype(jnp.float32))
  for number in range(1, 4):
    jax.block_until_ready(evaluate(before.model, opposite, rows))
    after = tiny.take_step(plan, cfg, before, rows).after.router
    where = f'a step after {number} evaluations of another router'
    moved.see(where, distance(after, one.after.router))
  yield counted.check()
  yield moved.check()


def check_checkpoint(taken: tiny.StepResult) -> Iterator[Check]:
  """Checks that a checkpoint holds the router's state, whatever it is."""
  worst = Worst('bias and momentum of a checkpoint', 0, 'the same bits')

  def unlike_others(a: Array) -> Array:
    return a + jnp.arange(a.size, dtype=a.dtype).reshape(a.shape) / 3

  # The rule's own momentum may be 0, which a checkpoint that leaves it out would restore too.
  router = jax.tree.map(unlike_others, taken.after.router)
  restored = tiny.save_and_restore(taken.after._replace(router=router))
  worst.see('a state with a momentum of its own', distance(restored.router, router))
  yield worst.check()


def objective_of_bias(
  bias_LE: Array, before: state.TrainState, rows: Batch, cfg: ExperimentConfig
) -> Array:
  """The objective of a step, a scalar, as a function of the bias of every layer [L, E]."""
  moved = before._replace(router=before.router._replace(bias=bias_LE))
  return gradients(moved, rows, cfg).sums.loss


def check_gradient(plan: Plan) -> Iterator[Check]:
  """Checks that the objective of the whole model has no gradient to the bias."""
  worst = Worst('gradient of the objective to the bias', 0, 'there is none')
  cfg = tiny_config.base_config()
  before = tiny.start_state(plan, cfg)
  gradient = plan.program(lambda *args: jax.grad(objective_of_bias)(*args), cfg)
  slope = gradient(before.router.bias, before, tiny.batch_of(plan))
  worst.see('all layers', np.abs(np.asarray(slope)).max())
  yield worst.check()
