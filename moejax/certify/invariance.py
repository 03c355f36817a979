"""Line 3, on whole training steps: what must change nothing.

  base step | the same step computed in another way -> objective, gradient, load, router bias, and
  who is chosen next

Letters: B batch, S sequence, E experts, K experts per token, L MoE layers.
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
from moejax.certify.randomness import (
  check_distributions,
  check_draws,
  check_steps,
  random_config,
)
from moejax.certify.tiny_batches import documents_batch, widened_batch
from moejax.config import frozendict
from moejax.data.batch import IGNORE, Batch
from moejax.model.config import REMAT_POLICIES
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.dispatch.dispatchers import DISPATCHERS, DispatchConfig
from moejax.moe.routing import SCORE_FNS, RouterConfig
from moejax.moe.selection import SELECTIONS
from moejax.moe.token_sets import Scope
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment.config import ExperimentConfig

ORDER = 'float32 sums in another order'
SAME = 2e-6  # of values whose sums have another order
GRADIENT = 2e-5  # of a leaf's gradient, which may be a sum that cancels
STATISTIC = 1e-5
SMALLEST = 1e-6  # gradients of leaves below it are compared as parts of it
NEAR_TIE = 1e-5  # margins of choices that parameters which differ by rounding may flip
MIXED_MESH = MeshConfig(1, fsdp=2, expert=2, tensor=2)
SPREAD = MeshConfig(2, expert=2, tensor=2)
DENSE = 'dense_matmul'  # the base's dispatcher, and the one that has capacities
BY_PLACE = DispatchConfig(DENSE, 4.0, 'position')  # with room for all


class Variant(NamedTuple):
  """Another way to compute the base step."""

  name: str
  cfg: ExperimentConfig
  mesh: MeshConfig | None = None
  rows: Batch | None = None  # None: the base's


class SameChecks:
  """The worst of every quantity over all variants."""

  def __init__(self) -> None:
    self.objective = Worst('objective', SAME, f'relative; {ORDER}')
    self.terms = Worst('terms of the objective', SAME, f'relative, or absolute below 1; {ORDER}')
    self.gradient = Worst('gradient', GRADIENT, f"of each leaf's largest entry; {ORDER}")
    self.statistics = Worst('statistics of the layers', STATISTIC, f'relative, or below 1; {ORDER}')
    self.load = Worst('load', 0, 'whole numbers')
    self.bias = Worst('router bias after the step', 1e-6, 'absolute; a step is 0.05')
    why = 'copies that go elsewhere, and are no near tie'
    self.chosen = Worst('experts chosen after the step', 0, why)

  def see(self, plan: Plan, base: ExperimentConfig, variant: Variant, number: int = 0) -> None:
    """Takes in a variant against its base, both taking the step of this number."""
    base_start, variant_start = (
      tiny.start_state(plan, cfg)._replace(step=jnp.int32(number)) for cfg in (base, variant.cfg)
    )
    rows = variant.rows or tiny.batch_of(plan)
    one = tiny.take_step(plan, base, base_start, tiny.batch_of(plan))
    other = tiny.take_step(plan, variant.cfg, variant_start, rows, variant.mesh)
    skip = tiny_config.CUT_DEPENDENT if variant.cfg.micro_batches > 1 else ()
    self.compare(plan, f'{variant.name}, step {number}', (one, other), base, skip)

  def compare(
    self,
    plan: Plan,
    name: str,
    results: tuple[tiny.StepResult, tiny.StepResult],
    cfg: ExperimentConfig,
    skip: tuple[str, ...] = (),
  ) -> None:
    """Takes in two steps that must have done the same.

    skip: losses of which this is not asked, because another cut makes another loss of them.
    """
    one, other = results
    self.objective.see(name, float(other.metrics['loss'] / one.metrics['loss']) - 1)
    for term, value in one.terms.items():
      if term.removeprefix('balance/') not in skip:
        self.terms.see(f'{term}; {name}', (other.terms[term] - value) / max(abs(value), 1))
    others = tiny.leaf_gradients(other, cfg)
    for leaf, g in tiny.leaf_gradients(one, cfg).items():
      # What is 0 in one, as of an expert that nobody chose, must be 0 in the other.
      largest = max(np.abs(g).max(), SMALLEST)
      self.gradient.see(f'{leaf}; {name}', np.abs(others[leaf] - g).max() / largest)
    for statistic, of_layers in one.metrics['layers'].items():
      difference = np.abs(np.asarray(other.metrics['layers'][statistic] - of_layers)).max()
      largest = max(float(np.abs(of_layers).max()), 1)
      self.statistics.see(f'{statistic}; {name}', float(difference) / largest)
    loads = [np.asarray(result.metrics['load']) for result in results]
    self.load.see(name, np.abs(loads[1] - loads[0]).max())
    for metric, gap in other.metrics.items():
      if metric.startswith('f_gap/'):  # a counting pass knows the truth
        self.terms.see(f'{metric}; {name}', float(gap))
    for field, a, b in zip(one.after.router._fields, one.after.router, other.after.router):
      self.bias.see(f'{field}; {name}', np.abs(np.asarray(b) - np.asarray(a)).max())
    # The next forward pass sees parameters and bias at once: a wrong update of either shows.
    routed = [tiny.state_routing(plan, r.after, tiny.batch_of(plan)) for r in results]
    is_clear = np.minimum(*(np.abs(r.margin) for r in routed)) > NEAR_TIE
    # Which, and not in which order: with the bias, two that are chosen may be all but equal.
    elsewhere = (np.sort(routed[0].expert_ids) != np.sort(routed[1].expert_ids)).any(-1)
    self.chosen.see(name, (elsewhere & is_clear).sum())

  def checks(self) -> Iterator[Check]:
    """The checks over all variants that were seen."""
    yield from (worst.check() for worst in vars(self).values())


def variants(plan: Plan) -> Iterator[Variant]:
  """Ways to compute the base step: one at a time, and some of them together."""
  base = tiny_config.base_config()
  others = [DispatchConfig(name) for name in DISPATCHERS if name != DENSE]
  yield Variant(
    'micro_batches=8, remat=full, capacity for all',
    # A row each, so that an expert-parallel group is two of them, and not all.
    tiny_config.change(base, micro_batches=8, remat='full', dispatch=BY_PLACE),
  )
  for dispatch in others:
    cfg = tiny_config.change(base, dispatch=dispatch)
    yield Variant(f'{dispatch.dispatcher}, fsdp 2 x expert 2 x tensor 2', cfg, MIXED_MESH)
  yield Variant('padding columns', base, rows=widened_batch(tiny.batch_of(plan)))
  if not plan.quick:
    yield from slow_variants(base, others)


def slow_variants(base: ExperimentConfig, others: list[DispatchConfig]) -> Iterator[Variant]:
  """The variants that --quick leaves out; others: dispatchers that are not DENSE."""
  for n in (2, 4):
    yield Variant(f'micro_batches={n}', tiny_config.change(base, micro_batches=n))
  for name in sorted(set(REMAT_POLICIES) - {'none'}):
    yield Variant(f'remat={name}', tiny_config.change(base, remat=name))
  yield Variant('layers unrolled', tiny_config.change(base, unroll=2))
  by_score = DispatchConfig(DENSE, 4.0, 'probs')
  yield Variant('capacity for all, by score', tiny_config.change(base, dispatch=by_score))
  for dispatch in others:
    yield Variant(dispatch.dispatcher, tiny_config.change(base, dispatch=dispatch))
  dense = DispatchConfig(DENSE)
  placed = [(mesh, one) for mesh in (MeshConfig(8), MeshConfig(2, expert=4)) for one in others]
  for mesh, dispatch in (*placed, (MeshConfig(1, fsdp=8), dense), (MIXED_MESH, dense)):
    shape = ' x '.join(f'{axis} {n}' for axis, n in dataclasses.asdict(mesh).items() if n > 1)
    cfg = tiny_config.change(base, dispatch=dispatch)
    yield Variant(f'{dispatch.dispatcher}, {shape}', cfg, mesh)
  yield Variant(
    'data 2 x expert 2 x tensor 2, micro_batches=2, remat=full, capacity for all',
    tiny_config.change(base, dispatch=BY_PLACE, micro_batches=2, remat='full'),
    SPREAD,
  )


class RouterVariant(NamedTuple):
  """Another router: a base that has it, and a config that computes the same in another way."""

  name: str
  base: ExperimentConfig
  changed: ExperimentConfig


def other_router_name(router: RouterConfig) -> str:
  """What is unusual about a router: its selection, its randomness or its score function."""
  if router.selection != 'top_k':
    return router.selection
  return 'random' if router.random else router.score_fn


def losses_that_fit(losses: frozendict, router: RouterConfig) -> frozendict:
  """Those of the losses, name -> coefficient, that can do something for this router."""
  fit = [name for name in losses if not BALANCE_LOSSES[name].misfit(router, Scope())]
  return frozendict({name: losses[name] for name in fit})


def router_variants() -> Iterator[RouterVariant]:
  """Other routers, each with a base of its own and one variant that changes everything at once."""
  routers = [RouterConfig(4, 2, score_fn) for score_fn in sorted(set(SCORE_FNS) - {'softmax'})]
  routers += [RouterConfig(4, 2, selection=name) for name in sorted(set(SELECTIONS) - {'top_k'})]
  routers += [RouterConfig(4, 2, jitter=0.1, noisy=True, expert_dropout=0.25)]
  for router in routers:
    base = tiny_config.base_config(router.noisy)
    rule = 'sign' if SELECTIONS[router.selection].takes_bias and not router.noisy else ''
    losses = losses_that_fit(base.balance.losses, router)
    balance = dataclasses.replace(base.balance, losses=losses, bias_rule=rule)
    base = tiny_config.change(base, router=router, balance=balance)
    changed = tiny_config.change(
      base, micro_batches=2, remat='full', dispatch=DispatchConfig('sparse_matmul')
    )
    yield RouterVariant(other_router_name(router), base, changed)


def invariance_line(plan: Plan) -> Iterator[Check]:
  """Checks line 3."""
  # First what takes no whole step.
  yield check_draws(plan)
  yield check_distributions(plan)
  base, same = tiny_config.base_config(), SameChecks()
  for variant in variants(plan):
    same.see(plan, base, variant)
    if variant.cfg.micro_batches > 1:
      # Each loss's own gradient under accumulation: at step 0 all losses share one.
      for name in tiny_config.loss_names():
        if name not in tiny_config.CUT_DEPENDENT:
          same.see(plan, base, variant, tiny_config.step_alone(f'balance/{name}'))
  if not plan.quick:
    for router in router_variants():
      see_router(plan, same, router)
  # What f counts, across micro-batches and within them, where the bias overrides choices.
  balance = dataclasses.replace(base.balance, assignment='dispatched', partition=2)
  dispatched = tiny_config.change(base, balance=balance)
  cut = tiny_config.change(dispatched, micro_batches=8)
  same.see(plan, dispatched, Variant('f of what was dispatched, micro_batches=8', cut))
  see_prompts(plan, same, base)
  changed = tiny_config.change(random_config(), micro_batches=4, remat='full')
  # What a counting pass sees, of which f is made, is what the other passes see.
  number = tiny_config.step_alone('balance/global_batch', noisy=True)
  same.see(plan, random_config(), Variant('random router, micro_batches=4', changed), number)
  yield from same.checks()
  yield check_steps(plan)
  yield from check_packing(plan, base)
  yield from check_resume(plan)


def see_router(plan: Plan, same: SameChecks, router: RouterVariant) -> None:
  """Takes in a variant of another router, on a batch in which none of its choices is a near tie."""
  rows = tiny.batch_of_router(plan, router.base)
  one = tiny.take_step(plan, router.base, tiny.start_state(plan, router.base), rows)
  start = tiny.start_state(plan, router.changed)
  other = tiny.take_step(plan, router.changed, start, rows, SPREAD)
  name, skip = f'{router.name}, all at once', tiny_config.CUT_DEPENDENT
  same.compare(plan, name, (one, other), router.base, skip)


def see_prompts(plan: Plan, same: SameChecks, base: ExperimentConfig) -> None:
  """Takes in micro-batches of text that is routed and not predicted, as prompts are."""
  rows = tiny.batch_of(plan)
  # More of a row the further down it is: micro-batches differ in what is predicted.
  is_prompt = np.arange(tiny_config.LENGTH) < np.arange(tiny_config.ROWS)[:, None]
  rows = rows._replace(
    targets=np.where(is_prompt, IGNORE, rows.targets), mask=rows.mask & ~is_prompt
  )
  cut = tiny_config.change(base, micro_batches=8, remat='full', dispatch=BY_PLACE)
  results = [tiny.take_step(plan, cfg, tiny.start_state(plan, cfg), rows) for cfg in (base, cut)]
  skip = tiny_config.CUT_DEPENDENT
  same.compare(plan, 'prompts, micro_batches=8', tuple(results), base, skip)


def check_packing(plan: Plan, base: ExperimentConfig) -> Iterator[Check]:
  """Checks that two documents give the same step in one row and in rows of their own.

  With multi-token prediction, whose blocks look at the tokens ahead: of their own document alone.
  """
  balance = dataclasses.replace(base.balance, ep_groups=1)
  cfg, results = tiny_config.change(base, batch_size=2, balance=balance, mtp_depth=2), []
  for rows in (documents_batch((5, 7), ()), documents_batch((5,), (7,))):
    results.append(tiny.take_step(plan, cfg, tiny.start_state(plan, cfg), rows))
  packed = SameChecks()
  packed.compare(plan, 'two documents in a row, or in two', tuple(results), cfg)
  for check in packed.checks():
    yield check._replace(what=f'packing: {check.what}')


def check_resume(plan: Plan) -> Iterator[Check]:
  """Checks two steps against one, a checkpoint and another: the same bits, also of the router."""
  exact = Worst('resumed from a checkpoint: everything', 0, 'the same program on the same bits')
  placed = Worst('resumed from a checkpoint: router bias', 0, 'the same bits')
  cfg = tiny_config.change(tiny_config.base_config(), dispatch=DispatchConfig('sparse_matmul'))
  rows = tiny.batch_of(plan)
  first = tiny.take_step(plan, cfg, tiny.start_state(plan, cfg), rows, MIXED_MESH)
  restored = tiny.save_and_restore(first.after)
  for field, a, b in zip(first.after.router._fields, first.after.router, restored.router):
    placed.see(field, np.abs(np.asarray(b) - np.asarray(a)).max())
  second = tiny.take_step(plan, cfg, first.after, rows, MIXED_MESH)
  again = tiny.take_step(plan, cfg, restored, rows, MIXED_MESH)
  for (path, a), b in zip(jax.tree.leaves_with_path(second), jax.tree.leaves(again)):
    exact.see(jax.tree_util.keystr(path), float((np.asarray(a) != np.asarray(b)).sum()))
  yield placed.check()
  yield exact.check()
