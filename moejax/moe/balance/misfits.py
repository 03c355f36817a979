"""Routers for which a balance loss is the same whatever they say, by row of BALANCE_LOSSES.

(router, scope) -> why, with the remedy, as words that follow the loss's name; '' where it is not
so.

Letters: E experts, K experts per token, M groups of experts.
"""

from moejax.moe.routing import RouterConfig
from moejax.moe.token_sets import Scope


def no_misfit(router: RouterConfig, scope: Scope) -> str:
  """For losses that look at logits, weights of experts or parameters: they fit every router."""
  del router, scope
  return ''


def even_counts(router: RouterConfig, scope: Scope) -> str:
  """For losses f times P, whose gradient is that of sum_e P_e = 1 where f is always even."""
  experts, top_k, partition = router.num_experts, router.top_k, scope.partition
  if experts == 1:
    return ''  # nothing is ever uneven, and no loss is asked to see it
  if partition == 1 or (partition and experts % partition):
    return (
      f'with partition={partition}, which makes no groups of num_experts={experts}: '
      'use 0 (single experts), or a divisor above 1'
    )
  every_expert = top_k == experts and scope.assignment != 'first'
  # GShard's second expert may be left out.
  if every_expert and not (scope.assignment == 'dispatched' and router.random_second):
    return (
      f'counts all num_experts={experts} experts of every token, which is always even: '
      f'use top_k below {experts}'
    )
  if router.selection == 'uniform' and scope.assignment != 'unbiased':
    return (
      f"with assignment={scope.assignment!r} counts what selection='uniform' deals out in turn, "
      "whatever the router says: use assignment='unbiased'"
    )
  if router.selection == 'expert_choice' and scope.assignment == 'dispatched':
    return (
      "with assignment='dispatched' counts what selection='expert_choice' has made even: "
      "use assignment='unbiased'"
    )
  return ''


def even_first_choices(router: RouterConfig, scope: Scope) -> str:
  """For GShard's loss, whose f counts first choices whatever the scope says."""
  misfit = even_counts(router, scope._replace(assignment='first'))
  if router.selection != 'uniform':
    return misfit
  # It has no such switch: another loss is the remedy.
  return misfit.replace(
    "assignment='unbiased'", "the loss 'micro_batch' with assignment='unbiased'"
  )


def no_noise(router: RouterConfig, scope: Scope) -> str:
  """For the smooth load: how likely noise makes an expert one of the K best of all experts."""
  del scope
  if not router.noisy:
    return 'is the load that noise may give: use router.noisy=True, or the loss importance'
  if router.num_groups > 1:
    return f'does not know of groups: use num_groups=1 instead of {router.num_groups}'
  return ''
