"""Which layers of a model have experts: the first few may have none, and then a pattern repeats.

num_dense_layers, ffn_pattern, num_layers -> [has experts] by depth, and back
"""

from collections.abc import Sequence

from moejax.config import problem_if

FFN_KINDS = ('moe', 'dense')  # what a layer has after attention: experts, or one SwiGLU


def layers_with_experts(
  num_layers: int, num_dense_layers: int, pattern: Sequence[str]
) -> tuple[bool, ...]:
  """Returns whether each layer has experts; the pattern is of the layers after the dense ones."""
  later = range(num_layers - num_dense_layers)
  return (*[False] * num_dense_layers, *(pattern[i % len(pattern)] == 'moe' for i in later))


def dense_and_pattern(has_experts: Sequence[bool]) -> tuple[int, tuple[str, ...]]:
  """Returns num_dense_layers and the shortest pattern of such layers; one at least has experts."""
  dense = [*has_experts].index(True)
  kinds = tuple('moe' if has else 'dense' for has in has_experts[dense:])
  return dense, kinds[: period_of(kinds)]


def period_of(items: Sequence[object]) -> int:
  """Returns how many first items give all when they are repeated."""
  period = 1
  while any(item != items[i % period] for i, item in enumerate(items)):
    period += 1
  return period


def pattern_problem(pattern: Sequence[str], num_dense_layers: int) -> str:
  """Says why a pattern cannot be; '' where it can.

  It may not begin with 'dense': two configs would then say the same layers.
  """
  if not {*pattern} <= {*FFN_KINDS} or 'moe' not in pattern:
    return f"ffn_pattern={pattern!r}: use words 'moe' and 'dense', and one 'moe' at least"
  first = pattern.index('moe')
  rotated = pattern[first:] + pattern[:first]
  return problem_if(
    first > 0,
    f"ffn_pattern={pattern!r} begins with 'dense': use {rotated!r}, and count the layers before it "
    f'in num_dense_layers={num_dense_layers + first}',
  )
