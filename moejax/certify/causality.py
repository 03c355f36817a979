"""Line 10: tokens after t change nothing at or before t, in the output of every layer of the model.

  batch, and the same with other tokens after t -> model, cut off after each layer
  -> first layer whose output differs up to t

A model is cut off by taking the outputs of the later layers away: their residual branches are
multiplied by zero, so one program serves all depths.

Letters: B batch, S sequence, D model, E experts, L MoE layers.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.certify.cases import Plan, router_name
from moejax.certify.checks import Check, Worst, number
from moejax.data.batch import make_batch
from moejax.model.config import AttentionConfig, InitConfig, ModelConfig
from moejax.model.transformer import Draws, Transformer
from moejax.moe.dispatch.dispatchers import DISPATCHERS, DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import SCORE_FNS, RouterConfig
from moejax.moe.selection import SELECTIONS

ROWS, LENGTH, VOCAB, LAYERS, EXPERTS = 4, 12, 32, 3, 4
# Of hidden states of size 1. What leaks moves them by 1e-2 and more; a sum in another order by
# 1e-7.
LEAK = 1e-5
CUTS = (2, 5, 8)  # t


class Subject(NamedTuple):
  """A model to look at, and what it is labelled as."""

  router: RouterConfig
  dispatch: DispatchConfig
  causal: bool

  @property
  def name(self) -> str:
    """The router, the dispatcher and its capacity: 'softmax E4 K2, dense_matmul'."""
    capacity = f', capacity by {self.dispatch.drop_by}' if self.dispatch.capacity_factor else ''
    return f'{router_name(self.router)}, {self.dispatch.dispatcher}{capacity}'


def make_subject(router: RouterConfig, dispatch: DispatchConfig) -> Subject:
  """A model labelled by its selection, and by what a full expert drops.

  Where a full expert drops by score, a later token can evict an earlier one.
  """
  by_score = dispatch.capacity_factor > 0 and dispatch.drop_by == 'probs'
  return Subject(router, dispatch, SELECTIONS[router.selection].causal and not by_score)


def subjects(plan: Plan) -> Iterator[Subject]:
  """Every selection, score function, dispatcher, way to drop and way to draw random numbers."""
  dense = DispatchConfig('dense_matmul')
  others = [DispatchConfig(name) for name in DISPATCHERS if name != 'dense_matmul']
  base, scores = RouterConfig(EXPERTS, 2), sorted(SCORE_FNS)
  for name in sorted(SELECTIONS):
    for score_fn in scores[:1] if plan.quick else scores:
      router = dataclasses.replace(base, selection=name, score_fn=score_fn)
      yield make_subject(router, dense)
  for drop_by in ('position', 'probs'):
    dropping = DispatchConfig('dense_matmul', capacity_factor=0.5, drop_by=drop_by)
    yield make_subject(base, dropping)
  for other in others:
    yield make_subject(base, other)
    if not plan.quick:
      grouped = dataclasses.replace(base, num_groups=2, score_fn='sigmoid')
      yield make_subject(grouped, other)
  if not plan.quick:
    yield make_subject(dataclasses.replace(base, jitter=0.1, noisy=True), dense)
    dropout = dataclasses.replace(base, expert_dropout=0.25, random_second=True)
    yield make_subject(dropout, dense)


def random_model(key: Array, subject: Subject) -> Transformer:
  """A model whose routers choose unevenly and whose experts matter."""
  cfg = ModelConfig(
    vocab_size=VOCAB,
    d_model=16,
    num_layers=LAYERS,
    init=InitConfig(0.3),
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, d_head=8),
    moe=MoEConfig(subject.router, subject.dispatch, d_expert=8),
  )
  return Transformer(key, cfg)


def layer_outputs(key: Array, tokens: Array, subject: Subject) -> Array:
  """The output of each layer, that of the embedding first. [B, S] -> [L + 1, B, S, D]."""
  model, batch = random_model(key, subject), make_batch(tokens)
  takes_bias = SELECTIONS[subject.router.selection].takes_bias
  bias = 0.1 * jax.random.normal(key, (LAYERS, EXPERTS)) * takes_bias
  draws = Draws(key, jnp.arange(ROWS)) if subject.router.random else None

  def hidden_at(depth: Array) -> Array:
    kept = (jnp.arange(LAYERS) < depth).astype(jnp.float32)
    blocks = jax.tree.map(lambda a: a, model.blocks)
    for branch in (blocks.attention.out.w, blocks.moe.experts.down):
      branch[...] = branch[...] * kept.reshape(-1, *[1] * (branch[...].ndim - 1))
    part = jax.tree.map(lambda a: a, model)
    part.blocks = blocks
    # As in training, {} for losses of no sets: where nothing is trained, nothing is dropped.
    return part(batch, bias, whole={}, draws=draws).hidden

  # One depth after the other in a loop: the model is compiled once.
  return jax.lax.map(hidden_at, jnp.arange(LAYERS + 1))


class Change(NamedTuple):
  """How outputs at or before t differ when tokens after t do."""

  layer: int  # the first whose output changes by more than LEAK; 0: none
  size: float  # the largest absolute difference, in any layer


def output_changes(plan: Plan, subject: Subject) -> dict[str, Change]:
  """How much outputs at or before t change, by case: which seed, t and row.

  One row's tokens are changed at a time: by position, a full expert drops what later rows send it,
  so one row's future may drop another row's copies, but never its own past.
  """
  program, changes = plan.program(layer_outputs, subject), {}
  rng = plan.rng(10)
  for seed, t in itertools.product(range(2 if plan.quick else 4), CUTS):
    key, tokens = jax.random.key(plan.seed + seed), rng.integers(0, VOCAB, (ROWS, LENGTH))
    before = np.asarray(program(key, tokens))
    for row in range(ROWS):
      changed = tokens.copy()
      # From 1 on, so that every token after t is another one.
      steps = rng.integers(1, VOCAB, LENGTH - t - 1)
      changed[row, t + 1 :] = (changed[row, t + 1 :] + steps) % VOCAB
      difference = np.abs(np.asarray(program(key, changed)) - before)
      of_layers = difference[:, row, : t + 1].max((1, 2))  # [L + 1]
      layers = np.flatnonzero(of_layers > LEAK)
      first = int(layers[0]) if len(layers) else 0
      changes[f'seed {seed}, t = {t}, row {row}'] = Change(first, float(of_layers.max()))
  return changes


def causality_line(plan: Plan) -> Iterator[Check | str]:
  """Checks line 10; also notes of each router that looks ahead in which layer it first shows."""
  causal = Worst(
    'change up to t, routers labelled causal', LEAK, 'of hidden states of size 1; leaks are 1e-2'
  )
  # That nothing changes is only worth something if the same measurement sees what does leak.
  unseen = Worst('routers labelled non-causal that pass', 0, 'the detector must flag each of them')
  for subject in subjects(plan):
    changes = output_changes(plan, subject)
    layers = [change.layer for change in changes.values() if change.layer]
    if subject.causal:
      for case, change in changes.items():
        leak = f'; layer {change.layer}' if change.layer else ''
        causal.see(f'{subject.name}; {case}{leak}', change.size)
    else:
      unseen.see(subject.name, not layers)
    verdict = f'looks ahead, first in layer {min(layers)}' if layers else 'causal'
    largest = number(max(change.size for change in changes.values()))
    yield f'{verdict:<31}{subject.name} (largest change {largest})'
  yield causal.check()
  yield unseen.check()
