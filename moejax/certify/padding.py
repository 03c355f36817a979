"""Line 7: padding counts nowhere, and a packed row is the mean of its documents.

  a batch | the same with other tokens, in other rows, or cut -> each loss and its gradients

Letters: B batch, S sequence, E experts, K experts per token.
"""

from collections.abc import Iterator

import jax
import numpy as np

from moejax.certify.batches import PACKED, B, Case, S
from moejax.certify.cases import Plan, make_cases, router_name
from moejax.certify.checks import Check, Worst
from moejax.certify.equations import GRADIENT, STEP, VALUE, Point, equation, relative
from moejax.certify.measure import Measured, inputs_of, losses, measure
from moejax.moe import routing

CUT = 5  # places of each row that count; the others are cut off
# Losses whose sets do not depend on the row in which a document lies.
PACKING_LOSSES = ('sequence', 'global_batch', 'importance', 'router_z')

NUMBERED = 37  # documents are 37, 74, ...: more than a row has tokens


def padding_routers(plan: Plan) -> Iterator[routing.RouterConfig]:
  """Routers of one size: which tokens count does not depend on how many experts there are."""
  for cfg in plan.token_choice():
    if cfg.num_experts == 8 and cfg.top_k == 2:
      yield cfg


def cut_rows(measured: Measured) -> Measured:
  """What was measured, with the routing of the first CUT places of each row."""

  def cut(a: np.ndarray) -> np.ndarray:
    return a[:, :CUT] if a.ndim > 1 and a.shape[1] == S else a

  return measured._replace(routing=jax.tree.map(cut, measured.routing))


def padding_line(plan: Plan) -> Iterator[Check]:
  """Checks line 7."""
  rng = plan.rng(5)
  garbage = Worst('garbage in what does not count', 0, 'the same numbers are added')
  unpadded = Worst(
    'padded rows against rows that were cut', VALUE, 'relative; the cut ones by the oracle'
  )
  grads = Worst(
    'gradients of padded rows', GRADIENT, 'of the norm; the cut rows by differences of the oracle'
  )
  for cfg in padding_routers(plan):
    case = make_cases(plan, 8)['holes']
    case = case._replace(mask=case.mask & (np.arange(S) < CUT))
    noise = rng.normal(scale=17, size=case.logits.shape).astype(np.float32)
    noisy = case._replace(logits=np.where(case.mask[..., None], case.logits, noise))
    measured, other = measure(plan, cfg, case), measure(plan, cfg, noisy)
    cut = Case(case.logits[:, :CUT], case.bias, case.mask[:, :CUT], case.segments[:, :CUT])
    inputs = inputs_of(plan, case)
    direction = rng.normal(size=cut.logits.shape)
    points = []
    for h in (0, STEP, -STEP):
      shifted = inputs._replace(logits=cut.logits + h * direction)
      points.append(Point(shifted, measured.draws, cfg, case.bias))
    for i, loss in enumerate(losses(cfg)):
      where = f'{loss}; {router_name(cfg)}'
      value_change = abs(measured.values[i] - other.values[i])
      difference = measured.gradients.logits[i] - other.gradients.logits[i]
      garbage.see(where, max(value_change, np.abs(difference).max()))
      if loss.name == 'load':  # there is no load that noise may give
        continue
      f = equation(loss, cfg, cut, cut_rows(measured))
      value, above, below = (f(point) for point in points)
      unpadded.see(where, relative(measured.values[i], value))
      gradient = measured.gradients.logits[i][:, :CUT].astype(np.float64)
      size = max(np.linalg.norm(gradient), measured.sizes[i], 1e-5)
      slope = (above - below) / (2 * STEP)
      grads.see(where, ((gradient * direction).sum() - slope) / size)
  yield garbage.check()
  yield unpadded.check()
  yield grads.check()
  yield from check_packed_rows(plan)


def documents_apart(case: Case) -> Case:
  """The three documents of the first row of PACKED, each in a row of its own; no others."""
  segments, logits = np.zeros((B, S), np.int32), np.zeros_like(case.logits)
  for row, (first, end) in enumerate(((0, 3), (3, 7), (7, 8))):
    segments[row, : end - first] = 1
    logits[row, : end - first] = case.logits[0, first:end]
  return Case(logits, case.bias, segments > 0, segments)


def measure_documents(plan: Plan, cfg: routing.RouterConfig, case: Case) -> list[Measured]:
  """Each document of which a token counts, measured alone."""
  documents = []
  for b in range(B):
    for segment in range(1, S):
      row = np.arange(B)[:, None] == b
      mask = case.mask & (case.segments == segment) & row
      if mask.any():
        documents.append(measure(plan, cfg, case._replace(mask=mask)))
  return documents


def check_packed_rows(plan: Plan) -> Iterator[Check]:
  """Checks that a packed row is the mean over its documents, each by its own length.

  Also that where a document lies does not matter.
  """
  mean = Worst(
    'a packed batch is the mean of its documents', VALUE, 'relative; means in another order'
  )
  moved = Worst(
    'documents in one row, or in rows of their own', VALUE, 'relative; sums in another order'
  )
  numbers = Worst('documents of other numbers', 0, 'only which tokens have the same one counts')
  for cfg in padding_routers(plan):
    case, name = make_cases(plan, 8)['holes'], router_name(cfg)
    alone, whole = measure_documents(plan, cfg, case), measure(plan, cfg, case)
    first_row = (np.arange(B)[:, None] == 0) & (PACKED > 0)
    together = measure(plan, cfg, case._replace(mask=first_row, segments=PACKED))
    renumbered = measure(plan, cfg, case._replace(mask=first_row, segments=NUMBERED * PACKED))
    apart = measure(plan, cfg, documents_apart(case))
    for i, loss in enumerate(losses(cfg)):
      if loss.name == 'sequence':
        mean_alone = float(np.mean([one.values[i] for one in alone]))
        mean.see(f'{loss}; {name}', relative(whole.values[i], mean_alone))
      numbers.see(f'{loss}; {name}', renumbered.values[i] - together.values[i])
      if loss.name in PACKING_LOSSES:
        moved.see(f'{loss}; {name}', relative(apart.values[i], together.values[i]))
  yield mean.check()
  yield moved.check()
  yield numbers.check()
