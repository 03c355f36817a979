"""Line 6, and the rules of line 1: the router bias is moved by the oracle's rule, once a step, and by nothing else.

  what each micro-batch saw, added up -> update | the whole batch, seen by the oracle -> its rule

Letters: B batch, S sequence, E experts, K experts per token, L MoE layers.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from moejax.certify import tiny_model as tiny
from moejax.certify.cases import MICRO_BATCHES, Plan, make_cases, router_name
from moejax.certify.measure import inputs_of, routed
from moejax.certify.oracle import balance as oracle_balance
from moejax.certify.oracle import bias as oracle_bias
from moejax.certify.oracle import routing as oracle
from moejax.certify.report import Check, Worst
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
HELD = tiny.STEPS // 2  # from this step on the rate is 0


def push(
  found: routing.Routing, before: bias.BiasState, mask: Array, rate: Array, top_k: int
) -> dict[str, bias.BiasState]:
  """What every rule makes of a batch that it sees in micro-batches. rule -> state."""

  def part(a: Array, i: int) -> Array:
    return jnp.split(a, MICRO_BATCHES)[i] if a.shape[0] == mask.shape[0] else a

  parts = [jax.tree.map(lambda a, i=i: part(a, i), found) for i in range(MICRO_BATCHES)]
  masks, after = jnp.split(mask, MICRO_BATCHES), {}
  for name, rule in bias.BIAS_RULES.items():
    seen = sum(rule.observe(routed, before.bias, m) for routed, m in zip(parts, masks))
    after[name] = rule.update(before, seen, rate, top_k)
  return after


def of_rules(plan: Plan) -> Iterator[Check]:
  """The rules alone, on batches of every kind, seen in micro-batches."""
  worst = {name: Worst(f'bias rule {name}', CLOSE, WHY) for name in sorted(bias.BIAS_RULES)}
  for cfg in (
    routing.RouterConfig(8, 2, 'sigmoid'),
    routing.RouterConfig(8, 2, 'softmax', num_groups=2),
  ):
    for label, case in make_cases(plan, 8).items():
      found, _ = plan.program(routed, cfg)(
        inputs_of(plan, case), case.bias, case.mask, case.segments
      )
      before = bias.BiasState(case.bias, plan.rng(7).normal(scale=0.1, size=8).astype(np.float32))
      seen = oracle_bias.Seen(*(np.asarray(a) for a in (found.scores, found.expert_ids, case.mask)))
      for rate in (0.05, 0.0):
        after = plan.program(push, cfg.top_k)(found, before, case.mask, jnp.float32(rate))
        for name, here in worst.items():
          if name not in oracle_bias.BIAS_RULES:
            here.see('a rule without its equation is not certified', float('nan'))
            continue
          off = apart(
            after[name], oracle_bias.bias_step(name, oracle_bias.BiasState(*before), seen, rate)
          )
          here.see(f'{router_name(cfg)}; {label}; rate {rate}', off)
  for here in worst.values():
    yield here.check()


def apart(found: bias.BiasState, wanted: bias.BiasState | oracle_bias.BiasState) -> float:
  """The largest difference in bias or momentum."""
  return max(
    float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())
    for a, b in zip(found, wanted)
  )


def wanted_step(
  plan: Plan, before: state.TrainState, rows: Batch, rule: str, rate: float
) -> tuple[np.ndarray, oracle_bias.BiasState]:
  """The load [L, E] and the new bias state [L, E], by the oracle, from each layer's logits of the whole batch."""
  found, mask, loads, states = tiny.routed(plan, before, rows), rows.segment_ids > 0, [], []
  for i, logits in enumerate(found.logits):
    layer = [np.asarray(a)[i] for a in before.router]
    ids = oracle.route(logits, layer[0], top_k=2, score_fn='softmax').expert_ids
    loads.append(oracle_balance.load(ids, mask, 4))
    seen = oracle_bias.Seen(found.scores[i], ids, mask)
    states.append(oracle_bias.bias_step(rule, oracle_bias.BiasState(*layer), seen, rate))
  return np.array(loads), oracle_bias.BiasState(*map(np.array, zip(*states)))


class Held:
  """What must not move the bias, over all rules."""

  def __init__(self) -> None:
    self.devices = Worst('bits that differ between devices', 0, 'every device holds the same')
    self.idle = Worst('moved in a skipped step, or at rate 0', 0, 'held to the bit')
    self.padding = Worst('moved by what stands in padding', 0, 'the same bits')
    self.dtypes = Worst('not float32', 0, 'a step of 1e-3 is lost in bfloat16')
    self.moments = Worst('moments beyond one for each parameter', 0, 'whole numbers')

  def see(
    self, plan: Plan, rule: str, cfg: ExperimentConfig, before: state.TrainState, taken: tiny.Taken
  ) -> None:
    """Everything about one rule that needs no new program."""
    rows = tiny.batch()
    for field, value in zip(before.router._fields, taken.after.router):
      shards = [np.asarray(shard.data) for shard in value.addressable_shards]
      self.devices.see(
        f'{rule}: {field}',
        sum(not np.array_equal(shards[0], other) for other in shards)
        + (len(shards) != jax.device_count()),
      )
      self.dtypes.see(f'{rule}: {field}', value.dtype != jnp.float32)
    late = tiny.take(plan, cfg, before._replace(step=jnp.int32(HELD)), rows, MESH)
    self.idle.see(f'{rule}: rate 0', apart(late.after.router, before.router))
    model = jax.tree.map(lambda a: a, before.model)
    model.norm.scale[...] = model.norm.scale[...].at[0].set(jnp.inf)
    poisoned = tiny.take(plan, cfg, before._replace(model=model), rows, MESH)
    self.idle.see(
      f'{rule}: skipped',
      apart(poisoned.after.router, before.router) if poisoned.metrics['skipped'] else float('nan'),
    )
    other = rows._replace(tokens=np.where(rows.segment_ids > 0, rows.tokens, OTHER_TOKEN))
    self.padding.see(
      rule, apart(tiny.take(plan, cfg, before, other, MESH).after.router, taken.after.router)
    )
    moments = optax.tree.get_all_with_path(taken.after.opt_state, 'mu')[0][1]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (moments, before.model)]
    self.moments.see(rule, sizes[0] - sizes[1])

  def checks(self) -> Iterator[Check]:
    """All of them."""
    for worst in (self.devices, self.idle, self.padding, self.dtypes, self.moments):
      yield worst.check()


def bias_line(plan: Plan) -> Iterator[Check]:
  """Line 6."""
  held, rows = Held(), tiny.batch()
  # Sign first: whatever is wrong with a step shows in it. Quantile next: what it adds up are no counts.
  rules = ['sign', 'quantile', *sorted(set(bias.BIAS_RULES) - {'sign', 'quantile'})]
  for rule in rules[:2] if plan.quick else rules:
    base = tiny.config()
    cfg = tiny.change(
      base,
      micro_batches=2,
      remat='full',
      dispatch=DispatchConfig('sparse_matmul'),
      balance=dataclasses.replace(base.balance, bias_rule=rule),
    )
    load = Worst(f'load of a step, {rule}', 0, 'whole numbers; the oracle counts the whole batch')
    after = Worst(f'bias after each of two steps, {rule}', CLOSE, WHY)
    before = tiny.start(plan, cfg)
    first = taken = tiny.take(plan, cfg, before, rows, MESH)
    for number, at in enumerate((before, first.after)):
      taken = first if number == 0 else tiny.take(plan, cfg, at, rows, MESH)
      counts, wanted = wanted_step(plan, at, rows, rule, 0.05)
      load.see(f'step {number}', np.abs(np.asarray(taken.metrics['load']) - counts).max())
      after.see(f'step {number}', apart(taken.after.router, wanted))
    yield load.check()
    yield after.check()
    if rule == 'sign':
      yield from evaluation(plan)
    held.see(plan, rule, cfg, before, first)
  yield from held.checks()
  yield from checkpointed(plan, first)
  if not plan.quick:
    yield from sensitivity(plan)


def evaluation(plan: Plan) -> Iterator[Check]:
  """A step, and the same after an evaluation."""
  worst = Worst('moved by evaluation', 0, 'the same bits')
  counted = Worst('load in evaluation', 0, 'whole numbers; what training counts')
  cfg, rows = tiny.config(), tiny.batch()
  before = tiny.start(plan, cfg)
  one = jax.block_until_ready(tiny.take(plan, cfg, before, rows))
  evaluate = plan.program(step.eval_step, cfg)
  found = evaluate(before.model, before.router, rows)
  counted.see(
    'the batch that training takes', np.abs(np.asarray(found['load'] - one.metrics['load'])).max()
  )
  # The sign rule sees nothing of a mere multiple: evaluation uses the experts that training uses least.
  opposite = before.router._replace(bias=-one.metrics['load'])
  for number in range(1, 4):
    jax.block_until_ready(evaluate(before.model, opposite, rows))
    after = tiny.take(plan, cfg, before, rows).after.router
    worst.see(
      f'a step after {number} evaluations of another router', apart(after, one.after.router)
    )
  yield counted.check()
  yield worst.check()


def checkpointed(plan: Plan, taken: tiny.Taken) -> Iterator[Check]:
  """The router's state is in the checkpoint, whatever it is."""
  worst = Worst('bias and momentum of a checkpoint', 0, 'the same bits')
  router = jax.tree.map(
    lambda a: a + jnp.arange(a.size, dtype=a.dtype).reshape(a.shape) / 3, taken.after.router
  )
  whole = taken.after._replace(router=router)
  restored = tiny.through_checkpoint(whole)
  worst.see('a state with a momentum of its own', apart(restored.router, router))
  yield worst.check()


def objective_of(
  bias_of: Array, before: state.TrainState, rows: Batch, cfg: ExperimentConfig
) -> Array:
  """The objective, as a function of the bias of every layer."""
  return gradients(
    before._replace(router=before.router._replace(bias=bias_of)), rows, cfg
  ).sums.loss


def sensitivity(plan: Plan) -> Iterator[Check]:
  """The objective of the whole model has no gradient to the bias."""
  worst = Worst('gradient of the objective to the bias', 0, 'there is none')
  cfg = tiny.config()
  before = tiny.start(plan, cfg)
  slope = plan.program(lambda *args: jax.grad(objective_of)(*args), cfg)(
    before.router.bias, before, tiny.batch()
  )
  worst.see('all layers', np.abs(np.asarray(slope)).max())
  yield worst.check()
