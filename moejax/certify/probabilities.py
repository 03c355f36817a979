"""Line 5: what a loss calls P is the scores normalised over all experts, and never holds the bias.

  batch -> P | the oracle's;   the same batch with another bias -> other experts, the same losses

Letters: B batch, S sequence, E experts, K experts per token.
"""

from collections.abc import Iterator

import numpy as np

from moejax.certify.cases import Plan, make_cases, router_name
from moejax.certify.checks import Check, Worst
from moejax.certify.equations import VALUE
from moejax.certify.measure import CANONICAL, losses, measure
from moejax.certify.oracle import routing as oracle

ROUNDING = 'absolute, of 1; sums of float32'


def probabilities_line(plan: Plan) -> Iterator[Check]:
  """Checks line 5."""
  ours = Worst('P is the score, normalised over all experts', VALUE, ROUNDING)
  sums = Worst('rows of P sum to 1', VALUE, ROUNDING)
  values = Worst('another bias, the same unbiased losses', 0, 'the same numbers go in')
  gradients = Worst('another bias, the same gradients', 0, 'the same numbers go in')
  to_bias = Worst('gradient to the bias', 0, 'there is none')
  idle = Worst('routers that another bias does not move', 0, 'each must send some copies elsewhere')
  for cfg in plan.token_choice():
    cases, elsewhere = make_cases(plan, cfg.num_experts), 0
    for label in ('packed', 'extreme', 'low', 'all to one'):
      case, where = cases[label], f'{router_name(cfg)}; {label}'
      measured = measure(plan, cfg, case)
      probs = measured.routing.probs
      wanted = oracle.probabilities(case.logits, cfg.score_fn)
      ours.see(where, np.abs(probs - wanted)[case.mask].max())
      # Summed in float64: what is asked is whether the rows are off, not the sum of them.
      sums.see(where, np.abs(probs.astype(np.float64).sum(-1) - 1).max())
      other = measure(plan, cfg, case._replace(bias=case.bias[::-1] * 3))
      to_bias.see(where, np.abs(measured.to_bias).max())
      for i, loss in enumerate(losses(cfg)):
        # An assignment that is not 'unbiased' counts other experts under another bias.
        if loss.assignment == 'unbiased' and loss.name in (*CANONICAL, 'router_z'):
          values.see(f'{loss}; {where}', abs(measured.values[i] - other.values[i]))
          difference = np.abs(measured.gradients.logits[i] - other.gradients.logits[i]).max()
          gradients.see(f'{loss}; {where}', difference)
      elsewhere += (measured.routing.expert_ids != other.routing.expert_ids).sum()
    # Where the other bias moves no token, that it changes no loss has not been shown.
    idle.see(router_name(cfg), elsewhere == 0 and cfg.top_k < cfg.num_experts)
  for worst in (ours, sums, values, gradients, to_bias, idle):
    yield worst.check()
