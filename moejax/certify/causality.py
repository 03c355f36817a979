"""Line 10: tokens after t change nothing at or before t, in the output of every layer of the whole model.

  batch, and the same with other tokens after t -> model, cut off after each layer -> first layer that differs up to t

A model is cut off by taking the outputs of the later layers away: their residual branches are multiplied by zero, so
one program serves all depths.

Letters: B batch, S sequence, E experts, L MoE layers.
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
from moejax.certify.report import Check, Worst, number
from moejax.data.batch import make_batch
from moejax.model.config import AttentionConfig, InitConfig, ModelConfig
from moejax.model.transformer import Draws, Transformer
from moejax.moe.dispatch.dispatchers import DISPATCHERS, DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import SCORE_FNS, RouterConfig
from moejax.moe.selection import SELECTIONS

ROWS, LENGTH, VOCAB, LAYERS, EXPERTS = 4, 12, 32, 3, 4
# Of hidden states of size 1. What leaks moves them by 1e-2 and more; a sum in another order by 1e-7.
LEAK = 1e-5
CUTS = (2, 5, 8)  # t


class Subject(NamedTuple):
  """A model to look at, and what it is labelled as."""

  router: RouterConfig
  dispatch: DispatchConfig
  causal: bool

  @property
  def name(self) -> str:
    """'softmax E4 K2, dense_matmul, capacity by probs'"""
    capacity = f', capacity by {self.dispatch.drop_by}' if self.dispatch.capacity_factor else ''
    return f'{router_name(self.router)}, {self.dispatch.dispatcher}{capacity}'


def labelled(router: RouterConfig, dispatch: DispatchConfig) -> Subject:
  """By the label of its selection, and of what a full expert drops."""
  by_score = dispatch.capacity_factor > 0 and dispatch.drop_by == 'probs'
  return Subject(router, dispatch, SELECTIONS[router.selection].causal and not by_score)


def subjects(plan: Plan) -> Iterator[Subject]:
  """Every selection, score function and dispatcher; both ways to drop; every way to draw random numbers."""
  dense, *others = (
    DispatchConfig(name) for name in sorted(DISPATCHERS, key=lambda name: name != 'dense_matmul')
  )
  base, scores = RouterConfig(EXPERTS, 2), sorted(SCORE_FNS)
  for name in sorted(SELECTIONS):
    for score_fn in scores[:1] if plan.quick else scores:
      yield labelled(dataclasses.replace(base, selection=name, score_fn=score_fn), dense)
  for drop_by in ('position', 'probs'):
    yield labelled(base, DispatchConfig('dense_matmul', capacity_factor=0.5, drop_by=drop_by))
  for other in others:
    yield labelled(base, other)
    if not plan.quick:
      yield labelled(dataclasses.replace(base, num_groups=2, score_fn='sigmoid'), other)
  if not plan.quick:
    yield labelled(dataclasses.replace(base, jitter=0.1, noisy=True), dense)
    yield labelled(dataclasses.replace(base, expert_dropout=0.25, random_second=True), dense)


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


def outputs(key: Array, tokens: Array, subject: Subject) -> Array:
  """The output of each layer, 0: of the embedding. [ROWS, LENGTH] -> [L + 1, ROWS, LENGTH, D]."""
  model, batch = random_model(key, subject), make_batch(tokens)
  bias = (
    0.1
    * jax.random.normal(key, (LAYERS, EXPERTS))
    * SELECTIONS[subject.router.selection].takes_bias
  )
  draws = Draws(key, jnp.arange(ROWS)) if subject.router.random else None

  def cut(depth: Array) -> Array:
    kept = (jnp.arange(LAYERS) < depth).astype(jnp.float32)
    blocks = jax.tree.map(lambda a: a, model.blocks)
    for branch in (blocks.attention.out.w, blocks.moe.experts.down):
      branch[...] = branch[...] * kept.reshape(-1, *[1] * (branch[...].ndim - 1))
    part = jax.tree.map(lambda a: a, model)
    part.blocks = blocks
    return part(batch, bias, draws=draws).hidden

  return jax.lax.map(cut, jnp.arange(LAYERS + 1))


def leaks(plan: Plan, subject: Subject) -> dict[str, tuple[int, float]]:
  """Case -> the first layer whose output at or before t changes (0: none), and by how much the outputs change.

  One row's tokens are changed at a time: by position, a full expert drops what later rows send it, so one row's future
  may drop another row's copies, but never its own past.
  """
  program, found = plan.program(outputs, subject), {}
  rng = plan.rng(10)
  for seed, t in itertools.product(range(2 if plan.quick else 4), CUTS):
    key, tokens = jax.random.key(plan.seed + seed), rng.integers(0, VOCAB, (ROWS, LENGTH))
    before = np.asarray(program(key, tokens))
    for row in range(ROWS):
      changed = tokens.copy()
      changed[row, t + 1 :] = (
        changed[row, t + 1 :] + rng.integers(1, VOCAB, LENGTH - t - 1)
      ) % VOCAB
      apart = np.abs(np.asarray(program(key, changed)) - before)[:, row, : t + 1].max(
        (1, 2)
      )  # [L + 1]
      layers = np.flatnonzero(apart > LEAK)
      found[f'seed {seed}, t = {t}, row {row}'] = (
        int(layers[0]) if len(layers) else 0,
        float(apart.max()),
      )
  return found


def causality_line(plan: Plan) -> Iterator[Check | str]:
  """Line 10; also says of each router that looks ahead in which layer it first shows."""
  causal = Worst(
    'change up to t, routers labelled causal', LEAK, 'of hidden states of size 1; leaks are 1e-2'
  )
  hidden = Worst('routers labelled non-causal that pass', 0, 'the detector must flag each of them')
  for subject in subjects(plan):
    found = leaks(plan, subject)
    first = sorted({layer for layer, _ in found.values() if layer})
    if subject.causal:
      for case, (layer, apart) in found.items():
        causal.see(f'{subject.name}; {case}' + (f'; layer {layer}' if layer else ''), apart)
    else:
      hidden.see(subject.name, not first)
    largest = max(apart for _, apart in found.values())
    yield (
      f'{"looks ahead, first in layer " + str(first[0]) if first else "causal":<31}'
      f'{subject.name} (largest change {number(largest)})'
    )
  yield causal.check()
  yield hidden.check()
