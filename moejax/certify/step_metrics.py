"""Line 14: what is logged of a step is that of the whole batch: each layer, token and copy once.

  the routing of each micro-batch -> sums in NumPy | load, dropped, statistics, f_gap, counts that
  the next step uses, balance terms made of the counts of the step before

The step has everything that could count twice or leave out: micro-batches, recomputation, buffers
that overflow, padding, and losses that look at the step before.

Letters: A micro-batches, B batch, S sequence, E experts, K experts per token, L MoE layers.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.certify import tiny_config
from moejax.certify import tiny_model as tiny
from moejax.certify.cases import Plan
from moejax.certify.checks import Check, Worst
from moejax.certify.oracle import balance as oracle_balance
from moejax.data.batch import Batch
from moejax.moe.dispatch.buffers import capacity
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.routing import Routing
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step import train_state as state
from moejax.train.step import train_step as step

PARTS, EXPERTS, TOP_K = 2, 4, 2
SUMS = 2e-6  # relative, of sums of a hundred float32 numbers
STATISTIC = 1e-5  # roots and logarithms of such sums
NEAR_TIE = 1e-3  # of `near_ties`
ROOM = 0.8  # the capacity factor: a part of the copies is dropped in most layers


def metrics_config() -> ExperimentConfig:
  """Two micro-batches, recomputation, small buffers, and f of the step before."""
  base = tiny_config.base_config()
  losses = {'global_batch': '0.1', 'sequence': '0.1', 'router_z': '1e-3'}
  balance = dataclasses.replace(base.balance, losses=losses, accumulation='lagged')
  return tiny_config.change(
    base,
    micro_batches=PARTS,
    remat='full',
    dispatch=DispatchConfig('dense_matmul', ROOM, 'position'),
    balance=balance,
  )


class CutRouting(NamedTuple):
  """What one micro-batch gave, in NumPy."""

  routing: Routing  # [L, B / A, S, ...]
  mask: np.ndarray  # [B / A, S]

  def counts(self) -> np.ndarray:
    """Copies by expert of the unbiased choice, which f counts. [L, E]."""
    ids = [oracle_balance.load(one, self.mask, EXPERTS) for one in self.routing.best_ids]
    return np.array(ids)

  def load(self) -> np.ndarray:
    """Copies by expert, as dispatched. [L, E]."""
    ids = [oracle_balance.load(one, self.mask, EXPERTS) for one in self.routing.expert_ids]
    return np.array(ids)

  def dropped(self) -> np.ndarray:
    """The part of its copies that find no room, the first being served first. [L]."""
    room = capacity(self.mask.size * TOP_K, EXPERTS, ROOM)
    load = self.load()
    return np.maximum(load - room, 0).sum(-1) / load.sum(-1)


def parts_of(
  plan: Plan, before: state.TrainState, rows: Batch, micro_batches: int = PARTS
) -> list[CutRouting]:
  """The routing of each micro-batch, by running one block after the other on it."""
  program, parts = plan.program(tiny.layer_routings), []
  for i in range(micro_batches):
    part = jax.tree.map(lambda a, i=i: np.split(np.asarray(a), micro_batches)[i], rows)
    routed = program(before.model, np.asarray(before.router.bias), part)
    parts.append(CutRouting(jax.tree.map(np.asarray, routed), part.segment_ids > 0))
  return parts


def share(counts: np.ndarray) -> np.ndarray:
  """f of counts [L, E]: 1 at balance, and 0 of no counts."""
  return EXPERTS * counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def load_statistics(load: np.ndarray) -> dict[str, np.ndarray]:
  """How even the load [L, E] of each layer is, by name. [L]."""
  relative = load / load.mean(-1, keepdims=True)
  parts = relative / EXPERTS
  entropy = -(parts * np.log(np.where(parts > 0, parts, 1))).sum(-1)
  floor = 2 * np.log(EXPERTS) * (1 - TOP_K / EXPERTS) / load.mean(-1)
  return {
    'max_vio': relative.max(-1) - 1,
    'expert_usage': (load > 0).mean(-1),
    'dead_experts': (relative < 0.1).sum(-1),
    'load_entropy': entropy / np.log(EXPERTS),
    'balance_score': 1 - relative.std(-1),
    'std_of_share': parts.std(-1),
    'noise_floor': np.sqrt(floor),
  }


def company(ids: np.ndarray) -> np.ndarray:
  """The share of copies that go with the most frequent partner of their expert. [L, T, K]."""
  chosen = (ids[..., None] == np.arange(EXPERTS)).any(-2).astype(int)  # [L, T, E]
  pairs = np.einsum('lte,ltf->lef', chosen, chosen) * (1 - np.eye(EXPERTS))
  return pairs.max(-1).sum(-1) / chosen.sum((1, 2))


def wanted_statistics(parts: list[CutRouting], bias: np.ndarray) -> dict[str, np.ndarray]:
  """What is known of each layer, by name, in float64: a row of STATISTICS each. [L].

  bias: [L, E], of the routers.
  """

  def tokens_of(name: str) -> np.ndarray:
    """What the router says of the tokens that count. [L, tokens, ...]."""
    of_parts = [getattr(part.routing, name)[:, part.mask] for part in parts]
    whole = np.concatenate(of_parts, axis=1)
    return whole.astype(np.float64) if whole.dtype == np.float32 else whole

  z, p, s = tokens_of('logits'), tokens_of('probs'), tokens_of('scores')
  ids, best, margin = tokens_of('expert_ids'), tokens_of('best_ids'), tokens_of('margin')
  load = sum(part.load() for part in parts)
  entropy = -(p * np.log(p)).sum(-1).mean(-1)
  mean = p.mean(1)
  logsumexp = np.log(np.exp(z).sum(-1))
  taken = np.take_along_axis(s, ids, -1).sum((1, 2))
  most = np.take_along_axis(s, best, -1).sum((1, 2))
  elsewhere = (ids[..., None] != best[..., None, :]).all(-1)
  tokens = sum(part.mask.sum() for part in parts)
  # Of weight by tokens, which a micro-batch with more padding has fewer of.
  dropped = sum(part.mask.sum() / tokens * part.dropped() for part in parts)
  return {
    'router_entropy': entropy,
    'mutual_information': -(mean * np.log(mean)).sum(-1) - entropy,
    'logit_rms': np.sqrt((z**2).mean((1, 2))),
    'logit_max': np.abs(z).max((1, 2)),
    'logsumexp': logsumexp.mean(-1),
    'margin': margin.mean(-1),
    'override_rate': elsewhere.mean((1, 2)),
    'price_of_balance': 1 - taken / most,
    'near_ties': (np.abs(margin) < NEAR_TIE).mean(-1),
    'coactivation': company(ids),
    'bias_mean': bias.mean(-1),
    'bias_std': bias.std(-1),
    'bias_max': np.abs(bias).max(-1),
    'dropped': dropped,
  } | load_statistics(load)


class MetricChecks:
  """The worst of everything that is logged, over steps one after another."""

  def __init__(self) -> None:
    self.load = Worst('load and the counts for the next step', 0, 'whole numbers')
    self.statistics = Worst('statistics of each layer', STATISTIC, 'relative, or below 1; float32')
    self.terms = Worst('balance terms with f of the step before', SUMS, 'relative; float32')
    self.gaps = Worst('logged distance of f from the truth', STATISTIC, 'absolute; float32')
    self.losses = Worst('nll is lm_loss where tasks weigh the same', SUMS, 'relative; float32')

  def see(
    self, plan: Plan, number: int, before: state.TrainState, counts: np.ndarray, rows: Batch
  ) -> tiny.StepResult:
    """Takes in a step, before which the counts [L, E] were those of the step before."""
    taken = tiny.take_step(plan, metrics_config(), before, rows)
    parts, metrics = parts_of(plan, before, rows), taken.metrics
    where = f'step {number}'
    truth = sum(part.counts() for part in parts)
    load = sum(part.load() for part in parts)
    self.load.see(f'load; {where}', np.abs(np.asarray(metrics['load']) - load).max())
    lagged = np.asarray(taken.after.lagged['global_batch'])[0]
    self.load.see(f'counts for the next step; {where}', np.abs(lagged - truth).max())
    statistics = wanted_statistics(parts, np.asarray(before.router.bias, np.float64))
    for name in set(metrics['layers']) - set(statistics):
      self.statistics.see(f'{name} has no oracle', float('nan'))
    for name, wanted in statistics.items():
      error = np.abs(np.asarray(metrics['layers'][name]) - wanted).max()
      self.statistics.see(f'{name}; {where}', error / max(1, np.abs(wanted).max()))
    gap = np.abs(share(counts) - share(truth)).mean()
    self.gaps.see(where, float(metrics['f_gap/global_batch']) - gap)
    # Nothing is known before the first step: f is then 1.
    f = share(counts) if counts.any() else np.ones_like(counts)
    probs = [part.routing.probs[:, part.mask] for part in parts]
    p = np.concatenate(probs, axis=1).mean(1, dtype=np.float64)
    value = float(metrics['balance/global_batch'])
    self.terms.see(where, value / (f * p).sum(-1).mean() - 1)
    self.losses.see(where, float(metrics['nll'] / metrics['lm_loss']) - 1)
    return taken

  def checks(self) -> Iterator[Check]:
    """The checks over all steps that were seen."""
    yield from (worst.check() for worst in vars(self).values())


def check_known_counts(plan: Plan, accumulation: str) -> Iterator[Check]:
  """Checks f where counts are not of the whole set, for sets of two of four micro-batches.

  accumulation: 'buffer', the micro-batches so far (2501.11873, Algorithm 1), or 'lagged', the set's
    counts of the step before.
  """
  terms = Worst(f'balance terms with f of {accumulation} counts', SUMS, 'relative; float32')
  gaps = Worst(f'logged distance of f of {accumulation} counts', STATISTIC, 'absolute; float32')
  base = tiny_config.base_config()
  balance = dataclasses.replace(
    base.balance, losses={'ep_group': '0.1'}, accumulation=accumulation, ep_groups=2
  )
  cfg = tiny_config.change(base, micro_batches=4, balance=balance)
  before, rows = tiny.start_state(plan, cfg), tiny.batch_of(plan)
  # Of each set other counts, and none of them even.
  last = jax.tree.map(lambda a: 1 + jnp.arange(a.size).reshape(a.shape) ** 2, before.lagged)
  before = before._replace(lagged=last)
  metrics = tiny.take_step(plan, cfg, before, rows).metrics
  parts = parts_of(plan, before, rows, 4)
  value, gap = 0.0, 0.0
  for number, part in enumerate(parts):
    first = number // 2 * 2
    of_set = parts[first : first + 2]
    known = sum(one.counts() for one in parts[first : number + 1])
    if accumulation == 'lagged':
      known = np.asarray(last['ep_group'][number // 2], np.float64)
    tokens = part.mask.sum() / sum(one.mask.sum() for one in of_set)
    p = part.routing.probs[:, part.mask].mean(1, dtype=np.float64)
    # Two sets, of which each is its parts by their tokens.
    value += tokens / 2 * (share(known) * p).sum(-1).mean()
    gap += np.abs(share(known) - share(sum(one.counts() for one in of_set))).mean() / 4
  terms.see('ep_group', float(metrics['balance/ep_group']) / value - 1)
  gaps.see('ep_group', float(metrics['f_gap/ep_group']) - gap)
  yield terms.check()
  yield gaps.check()


def check_evaluation_sums(plan: Plan, before: state.TrainState, rows: Batch) -> Iterator[Check]:
  """Checks the sums that evaluation gives, of a model with recomputation.

  Nothing is dropped in it, whatever room there is in training.
  """
  counted = Worst('sums of an evaluation', 0, 'whole numbers')
  dropless = tiny_config.change(tiny_config.base_config(), remat='full')
  cfg = tiny_config.change(dropless, dispatch=DispatchConfig('dense_matmul', ROOM, 'position'))
  start = tiny.start_state(plan, cfg)
  found = plan.program(step.eval_step, cfg)(start.model, start.router, rows)
  tokens = int((rows.segment_ids > 0).sum())
  for name, wanted in (('tokens', tokens), ('copies', tokens * TOP_K)):
    of_layers = np.asarray(getattr(found['stats'], name))
    counted.see(name, np.abs(of_layers - wanted).max())
  load = np.asarray(found['load'])
  counted.see('load', np.abs(load.sum(-1) - tokens * TOP_K).max())
  pairs = np.asarray(found['stats'].pairs)
  counted.see('pairs', np.abs(np.einsum('lee->le', pairs) - load).max())
  counted.see('task_tokens', float(found['task_tokens'].sum()) - rows.mask.sum())
  yield counted.check()
  undropped = Worst('evaluation against a model with room for all', SUMS, 'relative; float32')
  wide = tiny.start_state(plan, dropless)
  wanted = plan.program(step.eval_step, dropless)(wide.model, wide.router, rows)
  undropped.see('nll', float(found['task_nll'].sum() / wanted['task_nll'].sum()) - 1)
  yield undropped.check()


def metrics_line(plan: Plan) -> Iterator[Check]:
  """Checks line 14."""
  checks = MetricChecks()
  before = tiny.start_state(plan, metrics_config())
  counts = np.zeros(before.router.bias.shape)
  for number in range(3):
    # Another batch for each step: counts of the wrong step are then other counts.
    rows = tiny.batch((plan.seed, 50, number))
    before = before._replace(step=jnp.int32(number))
    taken = checks.see(plan, number, before, counts, rows)
    counts = sum(part.counts() for part in parts_of(plan, before, rows))
    before = taken.after
  yield from checks.checks()
  yield from check_known_counts(plan, 'buffer')
  yield from check_known_counts(plan, 'lagged')
  yield from check_evaluation_sums(plan, before, rows)
