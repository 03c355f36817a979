"""Lines 3, 4 and 9, on whole training steps: what must change nothing, what is logged, and how layers are put together.

  base step | the same step computed in another way -> objective, gradient, load, router bias, and who is chosen next

Letters: B batch, S sequence, E experts, K experts per token, L MoE layers.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.certify import tiny_model as tiny
from moejax.certify.cases import Plan
from moejax.certify.oracle import balance as oracle_balance
from moejax.certify.oracle import routing as oracle
from moejax.certify.report import Check, Worst
from moejax.data.batch import IGNORE, Batch, make_batch
from moejax.model.config import REMAT_POLICIES
from moejax.moe.dispatch.dispatchers import DISPATCHERS, DispatchConfig
from moejax.moe.routing import SCORE_FNS, RouterConfig, Routing
from moejax.moe.selection import SELECTIONS
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step import train_state as state

ORDER = 'float32 sums in another order'
SAME = 2e-6  # of values and gradients whose sums have another order
SLOPE = (
  1e-2  # of a slope in float32: rounding of 1e-7 over a difference of 1e-4, and what is not linear
)
REACH = 5e-3  # of its differences
MIXED = MeshConfig(1, fsdp=2, expert=2, tensor=2)
DENSE = 'dense_matmul'  # the base's dispatcher, and the one that has capacities


class Variant(NamedTuple):
  """Another way to compute the base step."""

  name: str
  cfg: ExperimentConfig
  mesh: MeshConfig | None = None
  rows: Batch | None = None  # None: the base's


class Same:
  """The worst of every quantity over all variants."""

  def __init__(self) -> None:
    self.objective = Worst('objective', SAME, f'relative; {ORDER}')
    self.terms = Worst('terms of the objective', SAME, f'relative, or absolute below 1; {ORDER}')
    self.gradient = Worst('gradient', SAME, f'of its largest entry; {ORDER}')
    self.load = Worst('load', 0, 'whole numbers')
    self.bias = Worst('router bias after the step', 1e-6, 'absolute; a step is 0.05')
    self.chosen = Worst('experts chosen after the step', 0, 'copies that go elsewhere')

  def see(self, plan: Plan, base: ExperimentConfig, variant: Variant, at: int = 0) -> None:
    """A variant against its base, both taking step number `at`."""
    rows = tiny.batch()
    here, there = (
      tiny.take(plan, cfg, tiny.start(plan, cfg)._replace(step=jnp.int32(at)), batch, mesh)
      for cfg, batch, mesh in (
        (base, rows, None),
        (variant.cfg, variant.rows or rows, variant.mesh),
      )
    )
    name = f'{variant.name}, step {at}'
    self.compare(
      plan, name, here, there, base, skip=tiny.OF_CUT if variant.cfg.micro_batches > 1 else ()
    )

  def compare(
    self,
    plan: Plan,
    name: str,
    here: tiny.Taken,
    there: tiny.Taken,
    cfg: ExperimentConfig,
    skip: tuple[str, ...] = (),
  ) -> None:
    """Two steps that must have done the same. skip: losses that are another one for another cut."""
    self.objective.see(name, float(there.metrics['loss'] / here.metrics['loss']) - 1)
    for term, value in here.terms.items():
      if term.removeprefix('balance/') not in skip:
        self.terms.see(f'{term}; {name}', (there.terms[term] - value) / max(abs(value), 1))
    one, other = tiny.gradient(here, cfg), tiny.gradient(there, cfg)
    self.gradient.see(name, np.abs(other - one).max() / np.abs(one).max())
    self.load.see(
      name, np.abs(np.asarray(there.metrics['load']) - np.asarray(here.metrics['load'])).max()
    )
    for field, a, b in zip(here.after.router._fields, here.after.router, there.after.router):
      self.bias.see(f'{field}; {name}', np.abs(np.asarray(b) - np.asarray(a)).max())
    ids = [tiny.routed(plan, taken.after, tiny.batch()).expert_ids for taken in (here, there)]
    self.chosen.see(name, (ids[0] != ids[1]).sum())

  def checks(self) -> Iterator[Check]:
    """All of them."""
    for worst in (self.objective, self.terms, self.gradient, self.load, self.bias, self.chosen):
      yield worst.check()


def wide(by: int = 5) -> Batch:
  """The batch with columns of padding on its right, that hold garbage."""
  narrow = tiny.batch()
  padding = ((0, 0), (0, by))
  return make_batch(
    np.pad(narrow.tokens, padding, constant_values=7),
    np.pad(narrow.targets, padding, constant_values=IGNORE),
    np.pad(narrow.segment_ids, padding),
    np.pad(narrow.positions, padding),
    narrow.task_ids,
  )


def variants(plan: Plan) -> Iterator[Variant]:
  """Ways to compute the base step: one at a time, and some of them together."""
  base = tiny.config()
  dense, *others = (
    DispatchConfig(name) for name in sorted(DISPATCHERS, key=lambda name: name != DENSE)
  )
  by_place, by_score = (DispatchConfig(DENSE, 4.0, drop_by) for drop_by in ('position', 'probs'))
  yield Variant(
    'micro_batches=4, remat=full, capacity for all',
    tiny.change(base, micro_batches=4, remat='full', dispatch=by_place),
  )
  for dispatch in others:
    yield Variant(
      f'{dispatch.dispatcher}, fsdp 2 x expert 2 x tensor 2',
      tiny.change(base, dispatch=dispatch),
      MIXED,
    )
  yield Variant('padding columns', base, rows=wide())
  if plan.quick:
    return
  for n in (2, 8):
    yield Variant(f'micro_batches={n}', tiny.change(base, micro_batches=n))
  for name in sorted(set(REMAT_POLICIES) - {'none'}):
    yield Variant(f'remat={name}', tiny.change(base, remat=name))
  yield Variant('layers unrolled', tiny.change(base, unroll=2))
  yield Variant('capacity for all, by score', tiny.change(base, dispatch=by_score))
  for dispatch in others:
    yield Variant(dispatch.dispatcher, tiny.change(base, dispatch=dispatch))
  meshes = [
    (mesh, dispatch) for mesh in (MeshConfig(8), MeshConfig(2, expert=4)) for dispatch in others
  ]
  for mesh, dispatch in (*meshes, (MeshConfig(1, fsdp=8), dense), (MIXED, dense)):
    shape = ' x '.join(f'{axis} {n}' for axis, n in dataclasses.asdict(mesh).items() if n > 1)
    yield Variant(f'{dispatch.dispatcher}, {shape}', tiny.change(base, dispatch=dispatch), mesh)
  yield Variant(
    'data 2 x expert 2 x tensor 2, micro_batches=2, remat=full, capacity for all',
    tiny.change(base, dispatch=by_place, micro_batches=2, remat='full'),
    MeshConfig(2, expert=2, tensor=2),
  )


def routers() -> Iterator[tuple[str, ExperimentConfig, ExperimentConfig]]:
  """Other routers, each with a base of its own and one variant that changes everything at once."""
  others = [RouterConfig(4, 2, score_fn) for score_fn in sorted(set(SCORE_FNS) - {'softmax'})]
  others += [RouterConfig(4, 2, selection=name) for name in sorted(set(SELECTIONS) - {'top_k'})]
  others += [RouterConfig(4, 2, jitter=0.1, noisy=True, expert_dropout=0.25)]
  for router in others:
    base = tiny.config(router.noisy)
    rule = 'sign' if SELECTIONS[router.selection].takes_bias and not router.noisy else ''
    base = tiny.change(
      base, router=router, balance=dataclasses.replace(base.balance, bias_rule=rule)
    )
    name = (
      router.selection
      if router.selection != 'top_k'
      else 'random'
      if router.random
      else router.score_fn
    )
    yield (
      name,
      base,
      tiny.change(base, micro_batches=2, remat='full', dispatch=DispatchConfig('sparse_matmul')),
    )


def documents(*rows: tuple[int, ...]) -> Batch:
  """Rows of whole documents of these lengths, the same documents in order however they are laid in rows."""
  text, padded = iter(range(1, tiny.VOCAB)), []
  for lengths in rows:
    columns: list[list[int]] = [[], [], [], []]
    for number, length in enumerate(lengths):
      tokens = [next(text) for _ in range(length)]
      for column, more in zip(
        columns, (tokens, tokens[1:] + tokens[:1], [number + 1] * length, range(length))
      ):
        column += more
    fills = (3, IGNORE, 0, 0)
    padded.append(
      [column + [fill] * (tiny.LENGTH - len(column)) for column, fill in zip(columns, fills)]
    )
  tokens, targets, segments, positions = (np.array(column, np.int32) for column in zip(*padded))
  return make_batch(tokens, targets, segments, positions)


def invariance_line(plan: Plan) -> Iterator[Check]:
  """Line 3."""
  base, same = tiny.config(), Same()
  for variant in variants(plan):
    same.see(plan, base, variant)
    steps = [tiny.alone_at(name) for name in tiny.names() if name not in tiny.OF_CUT]
    for at in (
      steps if variant.cfg.micro_batches > 1 else ()
    ):  # each loss's own gradient under accumulation
      same.see(plan, base, variant, at)
  if not plan.quick:
    for name, own, other in routers():
      same.see(plan, own, Variant(f'{name}, all at once', other, MeshConfig(2, expert=2, tensor=2)))
  cfg = tiny.change(base, batch_size=2, balance=dataclasses.replace(base.balance, ep_groups=1))
  both = [
    tiny.take(plan, cfg, tiny.start(plan, cfg), rows)
    for rows in (documents((5, 7), ()), documents((5,), (7,)))
  ]
  packed = Same()
  packed.compare(plan, 'two documents in a row, or in two', *both, cfg)
  yield from same.checks()
  for check in packed.checks():
    yield check._replace(what=f'packing: {check.what}')
  yield from resume(plan)


def resume(plan: Plan) -> Iterator[Check]:
  """Two steps, and one, a checkpoint and another: the same bits, also of the router's state."""
  exact = Worst('resumed from a checkpoint: everything', 0, 'the same program on the same bits')
  placed = Worst('resumed from a checkpoint: router bias', 0, 'the same bits')
  cfg, rows, mesh = (
    tiny.change(tiny.config(), dispatch=DispatchConfig('sparse_matmul')),
    tiny.batch(),
    MIXED,
  )
  first = tiny.take(plan, cfg, tiny.start(plan, cfg), rows, mesh)
  restored = tiny.through_checkpoint(first.after)
  for field, a, b in zip(first.after.router._fields, first.after.router, restored.router):
    placed.see(field, np.abs(np.asarray(b) - np.asarray(a)).max())
  second, again = (tiny.take(plan, cfg, one, rows, mesh) for one in (first.after, restored))
  for (path, a), b in zip(jax.tree.leaves_with_path(second), jax.tree.leaves(again)):
    exact.see(jax.tree_util.keystr(path), float((np.asarray(a) != np.asarray(b)).sum()))
  yield placed.check()
  yield exact.check()


def logged_line(plan: Plan) -> Iterator[Check]:
  """Line 4."""
  total = Worst(
    'objective against its logged terms', SAME, 'relative; a sum of ten float32 numbers'
  )
  slopes = Worst(
    'slope of what is logged along the gradient',
    SLOPE,
    f'relative; differences in float32 over a step of {REACH}',
  )
  for noisy in (False,) if plan.quick else (False, True):
    cfg = tiny.config(noisy)
    cfg = tiny.change(cfg, balance=dataclasses.replace(cfg.balance, assignment='dispatched'))
    before = decided(tiny.start(plan, cfg))

    def at(
      step: int,
      by: np.ndarray | float = 0.0,
      cfg: ExperimentConfig = cfg,
      start: state.TrainState = before,
    ) -> tiny.Taken:
      return tiny.take(plan, cfg, moved(start, by)._replace(step=jnp.int32(step)), tiny.batch())

    coefficients = {
      0: {'z_loss': 1e-3}
      | {f'balance/{name}': 0.1 for name in tiny.names(noisy) if name not in tiny.OF_CUT}
    }
    coefficients |= {
      tiny.alone_at(name, noisy): {f'balance/{name}': tiny.WEIGHT} for name in tiny.names(noisy)
    }
    coefficients |= {max(coefficients) + 8: {}}
    for step, named in coefficients.items():

      def logged(taken: tiny.Taken, named: dict[str, float] = named) -> float:
        return taken.terms['lm_loss'] + sum(
          coef * taken.terms[term] for term, coef in named.items()
        )

      here = at(step)
      where = f'lm_loss and {" ".join(named) or "no other"}{", noisy router" if noisy else ""}'
      total.see(where, float(here.metrics['loss']) / logged(here) - 1)
      gradient = tiny.gradient(here, cfg)
      norm = float(np.linalg.norm(gradient))
      above, below = (logged(at(step, sign * REACH / norm * gradient)) for sign in (1, -1))
      slopes.see(where, (above - below) / (2 * REACH) / norm - 1)
  yield total.check()
  yield slopes.check()


def decided(before: state.TrainState) -> state.TrainState:
  """A bias that decides every choice, another one in each layer: f is constant, however the parameters move."""
  layers = jnp.arange(before.router.bias.shape[0])[:, None]
  return before._replace(
    router=before.router._replace(
      bias=10.0 * ((jnp.arange(before.router.bias.shape[1]) + layers) % before.router.bias.shape[1])
    )
  )


def moved(before: state.TrainState, by: np.ndarray | float) -> state.TrainState:
  """A state whose parameters are a vector further."""
  leaves, tree = jax.tree.flatten(before.model)
  by = np.broadcast_to(np.asarray(by, np.float32), sum(leaf.size for leaf in leaves))
  parts = np.split(by, np.cumsum([leaf.size for leaf in leaves])[:-1])
  return before._replace(
    model=jax.tree.unflatten(
      tree, [leaf + part.reshape(leaf.shape) for leaf, part in zip(leaves, parts)]
    )
  )


def layers_line(plan: Plan) -> Iterator[Check]:
  """Line 9."""
  mean = Worst(
    "each term is the mean of its layers'",
    1e-6,
    "relative; the layers' own by the oracle, in float64",
  )
  apart = Worst(
    'two layers collapsed on opposite experts', 1e-6, 'relative, of E/K; pooled they would score 1'
  )
  cfg, rows = tiny.config(), tiny.batch()
  for name, before in (
    ('random', tiny.start(plan, cfg)),
    ('collapsed', collapse(tiny.start(plan, cfg))),
  ):
    taken = tiny.take(plan, cfg, before, rows)
    found = tiny.routed(plan, before, rows)
    for loss in tiny.names():
      own = [
        of_layer(loss, jax.tree.map(lambda a, i=i: a[i], found), rows)
        for i in range(len(found.logits))
      ]
      value = taken.terms[f'balance/{loss}']
      mean.see(f'{loss}; {name}', (value - np.mean(own)) / max(abs(np.mean(own)), 1))
      if name == 'collapsed' and loss in ('sequence', 'micro_batch', 'ep_group', 'global_batch'):
        apart.see(loss, value / 2 - 1)  # E = 4, K = 2
  yield mean.check()
  yield apart.check()


def of_layer(loss: str, found: Routing, rows: Batch) -> float:
  """A layer's own loss, by the oracle."""
  mask, experts = rows.segment_ids > 0, found.logits.shape[-1]
  others = {
    'simbal': lambda: oracle_balance.simbal(found.router.astype(np.float64)),
    'importance': lambda: oracle_balance.importance(found.weights, found.expert_ids, mask, experts),
    'router_z': lambda: oracle_balance.router_z(found.logits, mask),
  }
  if loss in others:
    return others[loss]()
  chosen = oracle_balance.assignment_of(
    found.logits, found.expert_ids, 'softmax', 'first' if loss == 'gshard' else 'unbiased'
  )
  sets = oracle_balance.sets_of(loss, rows.segment_ids, ep_groups=4)
  return oracle_balance.mean_over_sets(
    oracle_balance.probability_losses(
      oracle.probabilities(found.logits, 'softmax'), chosen, mask, sets
    )
  )


def collapse(before: state.TrainState) -> state.TrainState:
  """The first layer sends every token to experts 0 and 1, the second to 2 and 3, with all of the probability."""
  model = jax.tree.map(lambda a: a, before.model)
  model.embed.table[...] = (
    model.embed.table[...].at[:, 0].set(10.0)
  )  # a feature that all tokens have
  for branch in (
    model.blocks.attention.out.w,
    model.blocks.moe.experts.down,
    model.blocks.moe.shared.down,
  ):
    branch[...] = jnp.zeros_like(branch[...])
  router = jnp.zeros_like(model.blocks.moe.router[...])
  model.blocks.moe.router[...] = router.at[:, 0].set(
    jnp.array([[20, 20, -20, -20], [-20, -20, 20, 20]], jnp.float32)
  )
  return before._replace(model=model)
