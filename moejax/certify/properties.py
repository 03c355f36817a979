"""Lines 2, 5, 7 and 8: what a loss is at balance, what its probabilities are, what padding does, what shrinking does.

Letters: B batch, S sequence, D model, E experts, K experts per token, L layers, n losses measured.
"""

import itertools
import math
from collections.abc import Iterator

import jax
import numpy as np
from jax import Array

from moejax.certify.cases import PACKED, B, Case, Plan, S, make_cases, router_name
from moejax.certify.equations import GRADIENT, VALUE, Point, equation, relative
from moejax.certify.measure import (
  CANONICAL,
  Inputs,
  Loss,
  inputs_of,
  losses,
  measured,
  routed,
  values,
)
from moejax.certify.oracle import balance as oracle_balance
from moejax.certify.oracle import codebases as oracle_codebases
from moejax.certify.oracle import routing as oracle
from moejax.certify.report import Check, Worst
from moejax.moe import balance, routing

ONE = (*CANONICAL, 'gshard')  # 1 at balance
NOUGHT = ('importance', 'load')  # squared variations: 0 at balance
ROUNDING = 'absolute, of 1; sums of float32'


def even(cfg: routing.RouterConfig) -> np.ndarray:
  """Each token's experts, the best first, such that every run of E tokens uses each expert K times. [B, E, K]."""
  place = np.arange(cfg.num_experts)[:, None] + np.arange(cfg.top_k)
  return np.broadcast_to(place % cfg.num_experts, (B, *place.shape)).astype(np.int32)


def circulant(cfg: routing.RouterConfig) -> np.ndarray:
  """Logits that choose so, each row of E tokens the same numbers in turn. [B, E, E] f32."""
  ahead = (np.arange(cfg.num_experts) - np.arange(cfg.num_experts)[:, None]) % cfg.num_experts
  return np.broadcast_to(np.maximum(6 - 0.5 * ahead, 0), (B, *ahead.shape)).astype(np.float32)


def forced(
  inputs: Inputs,
  bias: Array,
  mask: Array,
  segments: Array,
  expert_ids: Array,
  likely: Array,
  cfg: routing.RouterConfig,
) -> routing.Routing:
  """A routing of the experts given, weighed by its own scores."""
  found, _ = routed(inputs, bias, mask, segments, cfg)
  log_weights = routing.WEIGHTS[cfg.weigh](
    routing.SCORE_FNS[cfg.score_fn](found.logits), found.logits
  )
  weights = routing.weights_of(log_weights, expert_ids, cfg.renormalise)
  return found._replace(expert_ids=expert_ids, best_ids=expert_ids, weights=weights, likely=likely)


def of_even(plan: Plan, cfg: routing.RouterConfig, logits: np.ndarray) -> np.ndarray:
  """All losses of logits whose tokens go to experts evenly, whatever the logits say. [n]."""
  experts, mask = cfg.num_experts, np.ones((B, cfg.num_experts), bool)
  inputs = Inputs(logits, np.ones_like(logits), np.eye(experts, dtype=np.float32))
  found = plan.program(forced, cfg)(
    inputs, np.zeros(experts, np.float32), mask, mask.astype(np.int32), even(cfg), circulant(cfg)
  )
  return np.asarray(plan.program(values, losses(cfg))(found, mask, mask.astype(np.int32)))


def at_balance(loss: Loss, logits: np.ndarray) -> float:
  """What a loss is at perfect balance; NaN for a row that says nothing about it."""
  if loss.name in ONE:
    return 1.0
  if loss.name == 'router_z':
    return oracle_balance.router_z(logits, np.ones(logits.shape[:2], bool))
  return 0.0 if loss.name in (*NOUGHT, 'simbal') else math.nan


def balance_line(plan: Plan) -> Iterator[Check]:
  """Line 2."""
  exact = {
    name: Worst(
      f'{name} at perfect balance', 3 * VALUE, 'relative; up to 1024 numbers added up in float32'
    )
    for name in sorted(balance.BALANCE_LOSSES)
  }
  for cfg in plan.token_choice():
    if cfg.num_groups > 1:
      cfg = routing.RouterConfig(cfg.num_experts, cfg.top_k, cfg.score_fn)
    uneven = circulant(cfg) + plan.rng(3, cfg.num_experts).normal(
      scale=0.1, size=(B, *circulant(cfg).shape[1:])
    )
    for label, logits in (
      ('even probabilities', circulant(cfg)),
      ('uneven', uneven.astype(np.float32)),
    ):
      for loss, found in zip(losses(cfg), of_even(plan, cfg, logits)):
        if (
          label == 'uneven' and loss.name in NOUGHT
        ):  # they look at probabilities, or at weights made of them
          continue
        exact[loss.name].see(
          f'{loss}; {router_name(cfg)}; {label}', relative(found, at_balance(loss, logits))
        )
  for worst in exact.values():
    yield worst.check()
  yield from conversions(plan)


def conversions(plan: Plan) -> Iterator[Check]:
  """The coefficients of other codebases, converted: the same number is added to the LM loss."""
  balanced = Worst("other codebases' coefficients, at balance", 1e-12, 'relative, all in float64')
  anywhere = Worst("other codebases' coefficients, anywhere", 1e-12, 'relative, all in float64')
  rng = plan.rng(4)
  for (experts, top_k), layers in itertools.product(((8, 2), (64, 8)), (1, 3)):
    ids = np.broadcast_to(even(routing.RouterConfig(experts, top_k)), (layers, B, experts, top_k))
    logits = rng.normal(size=(layers, B, experts, experts))
    random_ids = np.argsort(-logits, axis=-1)[..., :top_k]
    for name, (theirs, scope) in oracle_codebases.CODEBASES.items():
      ratio = balance.convert_coefficient(name, 1.0, top_k=top_k, num_moe_layers=layers)
      where, probs = (
        f'{name} E{experts} K{top_k} L{layers}',
        oracle.probabilities(logits, 'softmax'),
      )
      balanced.see(where, theirs(probs, ids) / ratio - 1)
      if scope:  # where layers are pooled there is no factor off balance
        sets = oracle_balance.sets_of(scope, np.ones((B, experts), int))
        ours = np.mean(
          [
            oracle_balance.mean_over_sets(
              oracle_balance.probability_losses(p, i, np.ones((B, experts), bool), sets)
            )
            for p, i in zip(probs, random_ids)
          ]
        )
        anywhere.see(where, theirs(probs, random_ids) / (ratio * ours) - 1)
  missing = set(balance.CODEBASES) ^ set(oracle_codebases.CODEBASES)
  for name in missing:
    balanced.see(f'{name} is not in both tables', math.nan)
  yield balanced.check()
  yield anywhere.check()


def probabilities_line(plan: Plan) -> Iterator[Check]:
  """Line 5."""
  ours = Worst('P is the score, normalised over all experts', VALUE, ROUNDING)
  sums = Worst('rows of P sum to 1', VALUE, ROUNDING)
  values = Worst('another bias, the same unbiased losses', 0, 'the same numbers go in')
  gradients = Worst('another bias, the same gradients', 0, 'the same numbers go in')
  to_bias = Worst('gradient to the bias', 0, 'there is none')
  idle = Worst('routers that another bias does not move', 0, 'each must send some copies elsewhere')
  for cfg in plan.token_choice():
    if cfg.num_experts > 8 and not plan.quick:
      continue
    cases, elsewhere = make_cases(plan, cfg.num_experts), 0
    for label in ('packed', 'extreme', 'low', 'all to one'):
      found, where = measured(plan, cfg, cases[label]), f'{router_name(cfg)}; {label}'
      wanted = oracle.probabilities(cases[label].logits, cfg.score_fn)
      ours.see(where, np.abs(found.routing.probs - wanted).max())
      sums.see(where, np.abs(found.routing.probs.astype(np.float64).sum(-1) - 1).max())
      other = measured(plan, cfg, cases[label]._replace(bias=cases[label].bias[::-1] * 3))
      to_bias.see(where, np.abs(found.to_bias).max())
      for i, loss in enumerate(losses(cfg)):
        if loss.assignment == 'unbiased' and loss.name in (*CANONICAL, 'router_z'):
          values.see(f'{loss}; {where}', abs(found.values[i] - other.values[i]))
          gradients.see(
            f'{loss}; {where}', np.abs(found.gradients.logits[i] - other.gradients.logits[i]).max()
          )
      elsewhere += (found.routing.expert_ids != other.routing.expert_ids).sum()
    idle.see(router_name(cfg), elsewhere == 0 and cfg.top_k < cfg.num_experts)
  for worst in (ours, sums, values, gradients, to_bias, idle):
    yield worst.check()


def padding_line(plan: Plan) -> Iterator[Check]:
  """Line 7."""
  rng = plan.rng(5)
  garbage = Worst('garbage in what does not count', 0, 'the same numbers are added')
  unpadded = Worst(
    'padded rows against rows that were cut', VALUE, 'relative; the cut ones by the oracle'
  )
  grads = Worst(
    'gradients of padded rows', GRADIENT, 'of the norm; the cut rows by differences of the oracle'
  )
  for cfg in plan.token_choice():
    if cfg.num_experts == 8 and cfg.top_k == 2:
      case = make_cases(plan, 8)['holes']
      case = case._replace(mask=case.mask & (np.arange(S) < 5))
      noise = rng.normal(scale=17, size=case.logits.shape).astype(np.float32)
      found, where = measured(plan, cfg, case), router_name(cfg)
      other = measured(
        plan, cfg, case._replace(logits=np.where(case.mask[..., None], case.logits, noise))
      )
      cut = Case(case.logits[:, :5], case.bias, case.mask[:, :5], case.segments[:, :5])
      short = found._replace(
        routing=jax.tree.map(
          lambda a: a[:, :5] if a.ndim > 1 and a.shape[1] == S else a, found.routing
        )
      )
      inputs = inputs_of(plan, case)._replace(logits=cut.logits)
      direction = rng.normal(size=cut.logits.shape)
      for i, loss in enumerate(losses(cfg)):
        garbage.see(
          f'{loss}; {where}',
          max(
            abs(found.values[i] - other.values[i]),
            np.abs(found.gradients.logits[i] - other.gradients.logits[i]).max(),
          ),
        )
        if loss.name == 'load':
          continue
        f = equation(loss, cfg, cut, short)
        at, above, below = (
          f(Point(inputs._replace(logits=cut.logits + h * direction), found.draws, cfg, case.bias))
          for h in (0, 1e-5, -1e-5)
        )
        unpadded.see(f'{loss}; {where}', relative(found.values[i], at))
        gradient = found.gradients.logits[i][:, :5].astype(np.float64)
        size = max(np.linalg.norm(gradient), found.sizes[i], 1e-5)
        grads.see(
          f'{loss}; {where}', ((gradient * direction).sum() - (above - below) / 2e-5) / size
        )
  yield garbage.check()
  yield unpadded.check()
  yield grads.check()
  yield from packing(plan)


def packing(plan: Plan) -> Iterator[Check]:
  """A packed row is the mean over its documents, each by its own length; where a document lies does not matter."""
  mean = Worst(
    'a packed batch is the mean of its documents', VALUE, 'relative; means in another order'
  )
  moved = Worst(
    'documents in one row, or in rows of their own', VALUE, 'relative; sums in another order'
  )
  for cfg in plan.token_choice():
    if cfg.num_experts != 8 or cfg.top_k != 2:
      continue
    case, rows, name = make_cases(plan, 8)['holes'], losses(cfg), router_name(cfg)
    documents = [
      (b, s)
      for b in range(B)
      for s in range(1, S)
      if (case.mask[b] & (case.segments[b] == s)).any()
    ]
    alone = [
      measured(
        plan,
        cfg,
        case._replace(mask=case.mask & (case.segments == s) & (np.arange(B)[:, None] == b)),
      )
      for b, s in documents
    ]
    whole = measured(plan, cfg, case)
    # The three documents of the first row, and the same in rows of their own.
    segments, logits = np.zeros((B, S), np.int32), np.zeros_like(case.logits)
    for row, (first, end) in enumerate(((0, 3), (3, 7), (7, 8))):
      segments[row, : end - first] = 1
      logits[row, : end - first] = case.logits[0, first:end]
    together = measured(
      plan, cfg, case._replace(mask=(np.arange(B)[:, None] == 0) & (PACKED > 0), segments=PACKED)
    )
    apart = measured(plan, cfg, Case(logits, case.bias, segments > 0, segments))
    for i, loss in enumerate(rows):
      if loss.name == 'sequence':
        mean.see(
          f'{loss}; {name}',
          relative(whole.values[i], float(np.mean([one.values[i] for one in alone]))),
        )
      if loss.name in ('sequence', 'global_batch', 'importance', 'router_z'):
        moved.see(f'{loss}; {name}', relative(apart.values[i], together.values[i]))
  yield mean.check()
  yield moved.check()


def shrink_line(plan: Plan) -> Iterator[Check]:
  """Line 8."""
  exact = {
    name: Worst(f'{name} of an even load', VALUE, 'by how much it is not 1; sums of float32')
    for name in ONE
  }
  below = {
    name: Worst(f'{name} below its balance', 0, 'a square is never below 0') for name in NOUGHT
  }
  for cfg in plan.token_choice():
    cfg = routing.RouterConfig(cfg.num_experts, cfg.top_k, cfg.score_fn)
    if cfg.num_experts > 64:
      continue
    noise = plan.rng(6, cfg.num_experts).normal(size=circulant(cfg).shape)
    shrunk = {
      'as they are': noise,
      'less 50': noise - 50,
      'less 1e4': noise - 1e4,
      'plus 50': noise + 50,
      'times 1e-3': noise * 1e-3,
      'times 30': noise * 30,
    }
    for (label, logits), (i, loss) in itertools.product(shrunk.items(), enumerate(losses(cfg))):
      found = plan.once(
        (cfg, label), lambda cfg=cfg, logits=logits: of_even(plan, cfg, logits.astype(np.float32))
      )[i]
      where = f'{loss}; {router_name(cfg)}; logits {label}'
      if loss.name in ONE:
        exact[loss.name].see(where, found - 1)
      elif loss.name in NOUGHT:
        below[loss.name].see(where, min(found, 0) if math.isfinite(found) else math.nan)
  for worst in (*exact.values(), *below.values()):
    yield worst.check()
