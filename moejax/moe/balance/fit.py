"""Which routers a balance loss or a bias rule can do anything for.

  router, losses and their scopes, bias rule -> what of it would do nothing, each with its remedy

A loss whose gradient is 0 whatever the router says is logged like any other, and balances nothing;
so is a bias that nothing reads. With one expert nothing is uneven, and all is accepted: a dense
model is trained with the switches of the others.

Letters: E experts, K experts per token, M groups of experts.
"""

from collections.abc import Mapping

from moejax.config import not_one_of, problem_if
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.bias import BIAS_RULES
from moejax.moe.routing import RouterConfig
from moejax.moe.selection import SELECTIONS
from moejax.moe.token_sets import Scope


def untrainable(router: RouterConfig) -> str:
  """Why no gradient of the model reaches this router, '' where it does.

  It can be computed with, and a published model may have it, which is then read, sampled and
  exported: so this is no problem of a RouterConfig, but of whoever trains with it.
  """
  # Experts that choose their tokens may leave a token several, or none.
  selection = SELECTIONS.get(router.selection)
  choose = bool(selection and selection.experts_choose)
  several = router.top_k > 1 or router.num_experts == 1 or choose
  if several or not router.renormalise:
    return ''
  remedy = 'use renormalise=False'
  if router.weigh == 'softmax':
    remedy += " with weigh='scores'"
  return (
    f'router.top_k={router.top_k} of num_experts={router.num_experts} with renormalise=True '
    f'divides the one weight of a token by itself: it is always scale={router.scale:g}, and no '
    f'gradient of the model reaches the router: {remedy}, or top_k=2 or more'
  )


def fit_problems(
  router: RouterConfig, scopes: Mapping[str, Scope], bias_rule: str, loss: str, rule: str
) -> list[str]:
  """What of losses and bias rule would do nothing for this router; '' for each that does.

  Args:
    router: to be trained.
    scopes: the losses that are on, rows of BALANCE_LOSSES, with their switches.
    bias_rule: a row of BIAS_RULES; '' for none.
    loss: how problems name a loss, '{}' standing for its name in the table.
    rule: how problems name the field of the bias rule.
  """
  problems = [bias_rule_problem(router, bias_rule, rule)]
  for name, scope in scopes.items():
    named = loss.format(name)
    misfit = BALANCE_LOSSES[name].misfit(router, scope)
    problems.append(problem_if(misfit, f'{named} {misfit}'))
    problems.append(
      problem_if(
        name == 'load' and bias_rule,
        f"{named} does not know of a bias: use bias_rule='' instead of {bias_rule!r}",
      )
    )
  return problems


def asked_problems(router: RouterConfig, scopes: Mapping[str, Scope], bias_rule: str) -> list[str]:
  """What is wrong with the losses and the bias rule that a layer is asked for, '' where nothing."""
  if not isinstance(scopes, Mapping):
    return [f'scopes={scopes!r}: use a dict of balance loss -> Scope()']
  problems = [not_one_of('scopes', name, BALANCE_LOSSES) for name in scopes]
  for name, scope in scopes.items():
    is_scope = isinstance(scope, Scope)
    # A coefficient is a likely mistake here.
    remedy = 'use a Scope(), and multiply the loss by its coefficient yourself'
    problems.append(problem_if(not is_scope, f'scopes[{name!r}]={scope!r}: {remedy}'))
  if bias_rule:
    problems.append(not_one_of('bias_rule', bias_rule, BIAS_RULES))
  if any(problems):
    return problems  # what is not there fits nothing
  if scopes or bias_rule:  # it is to be trained; otherwise a call says whether it is
    problems.append(untrainable(router))
  fits = fit_problems(router, scopes, bias_rule, loss='scopes[{!r}]', rule='bias_rule')
  return problems + fits


def bias_rule_problem(router: RouterConfig, bias_rule: str, rule: str) -> str:
  """Why a bias rule could not change who is chosen, '' where it could."""
  if not bias_rule or router.selection not in SELECTIONS:
    return ''
  named = f'{rule}={bias_rule!r}'
  if not SELECTIONS[router.selection].takes_bias:
    return (
      f'{named} would move a bias that selection={router.selection!r} ignores: '
      "use selection='top_k', or bias_rule=''"
    )
  # A second expert that may be left out makes a load uneven, and the bias says which one it is.
  always_even = router.num_experts > 1 and not router.random_second
  if router.top_k >= router.num_experts and (always_even or bias_rule == 'quantile'):
    return (
      f'{named} needs an expert that is not chosen: '
      f'use top_k below num_experts={router.num_experts}'
    )
  return ''
