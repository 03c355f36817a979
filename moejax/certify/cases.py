"""What one run of the certificate shares: how much it looks at, its programs, and its batches.

Programs are made anew for each run, from wrappers of its own: a function that was replaced since
the last run, as the mutants of the tests do, is traced again and never found in a cache.

Letters: B batch, S sequence, E experts, K experts per token.
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

import jax
import numpy as np

from moejax.certify.batches import Case, draw_cases
from moejax.moe import routing, selection

T = TypeVar('T')

# All the time would be the compiler's, on programs that run for a millisecond: nothing is
# optimised, machine code is made in one piece, and fused loops are not made by MLIR, which is two
# thirds of the time for a training step. Not every JAX has the last option.
UNOPTIMISED = {'xla_backend_optimization_level': 0, 'xla_cpu_parallel_codegen_split_count': 1}
CHEAP = (UNOPTIMISED | {'xla_cpu_use_fusion_emitters': False}, UNOPTIMISED)
MICRO_BATCHES, EP_GROUPS = 2, 4  # into which a batch is cut
# (E, K) of the routers.
SHAPES = tuple((e, k) for e, k in itertools.product((4, 8, 64, 256), (1, 2, 8)) if k <= e)
# What --quick looks at, (E, K) to score functions: each of those once, every E but the largest.
QUICK_ROUTERS = {
  (4, 1): ('sigmoid',),
  (8, 2): ('sigmoid', 'softmax', 'sqrt_softplus'),
  (64, 8): ('softmax',),
}


def cheapest() -> dict[str, int]:
  """Compiler options that compile fastest: the first of CHEAP that this JAX knows."""
  for options in CHEAP[:-1]:
    try:
      jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
      return options
    except jax.errors.JaxRuntimeError:  # no such option
      continue
  return CHEAP[-1]


class Plan:
  """How much a run looks at, and what it has compiled and computed so far."""

  def __init__(self, quick: bool, seed: int = 0) -> None:
    self.quick, self.seed = quick, seed
    self.options = cheapest()
    self._cache: dict[Hashable, object] = {}
    self._programs: dict[Hashable, Callable] = {}

  def with_seed(self, seed: int) -> 'Plan':
    """The same plan for another seed: programs, which no seed is part of, are compiled once."""
    other = Plan(self.quick, seed)
    other._programs = self._programs
    return other

  def once(self, key: Hashable, make: Callable[[], T]) -> T:
    """What `make` returns, called the first time that this run asks for the key."""
    if key not in self._cache:
      self._cache[key] = make()
    return self._cache[key]

  def program(self, function: Callable, *static: Hashable) -> Callable:
    """`function(*arrays, *static)`, compiled once a run."""
    key = function, static
    if key not in self._programs:
      # The lambda is new, so that jax's own cache, which is of the process, does not know it.
      self._programs[key] = jax.jit(
        lambda *arrays: function(*arrays, *static), compiler_options=self.options
      )
    return self._programs[key]

  def program64(self, key: Hashable, make: Callable[[], Callable]) -> Callable:
    """The function that `make` returns, compiled for float64, once a run for each key."""
    if key not in self._programs:
      compiled = jax.jit(make(), compiler_options=self.options)

      def call(*args: object) -> object:
        with jax.enable_x64(True):
          return jax.tree.map(np.asarray, jax.block_until_ready(compiled(*args)))

      self._programs[key] = call
    return self._programs[key]

  def rng(self, *path: int) -> np.random.Generator:
    """A generator of random numbers for the place that is called `path`; no two places share."""
    return np.random.default_rng((self.seed, *path))

  def token_choice(self) -> Iterator[routing.RouterConfig]:
    """Routers that take the best experts: every shape with every score function.

    Two groups of experts of which one is kept, where K allows it: what is dispatched is then not
    what the scores alone would choose.
    """
    for (experts, top_k), score_fn in itertools.product(SHAPES, sorted(routing.SCORE_FNS)):
      in_quick = (experts, top_k) in QUICK_ROUTERS and score_fn in QUICK_ROUTERS[experts, top_k]
      if in_quick or not self.quick:
        num_groups = 2 if 2 * top_k <= experts else 1
        yield routing.RouterConfig(experts, top_k, score_fn, num_groups=num_groups)

  def other_routers(self) -> Iterator[routing.RouterConfig]:
    """Every other selection with every score function, noise, and the other ways to weigh."""
    scores = sorted(routing.SCORE_FNS)
    for i, name in enumerate(sorted(set(selection.SELECTIONS) - {'top_k'})):
      # Quick: one score function for each selection, another one for the next.
      for score_fn in [scores[i % len(scores)]] if self.quick else scores:
        yield routing.RouterConfig(8, 2, score_fn, selection=name)
    yield routing.RouterConfig(8, 2, 'softmax', noisy=True)
    yield routing.RouterConfig(8, 2, 'softmax', renormalise=False, scale=2.5)
    yield routing.RouterConfig(8, 2, 'softmax', random_second=True)
    yield routing.RouterConfig(
      8, 2, 'sigmoid', weigh='softmax', num_groups=4, top_groups=2, group_best=1
    )
    if not self.quick:
      yield routing.RouterConfig(4, 1, 'sigmoid', noisy=True)
      yield routing.RouterConfig(8, 2, 'softmax', expert_dropout=0.25)


def make_cases(plan: Plan, num_experts: int) -> dict[str, Case]:
  """Batches of the plan's seed, by what is unusual about them."""
  return draw_cases(plan.rng(num_experts), num_experts)


def router_name(cfg: routing.RouterConfig) -> str:
  """'sigmoid E8 K2', and each other field that is not as RouterConfig() has it."""
  usual = dataclasses.asdict(routing.RouterConfig())
  # All token choice has two groups where it can, so that they would say nothing.
  shown = ('num_experts', 'top_k', 'score_fn', 'num_groups', 'top_groups')
  extra = [
    f'{name}={value}'
    for name, value in dataclasses.asdict(cfg).items()
    if name not in shown and value != usual[name]
  ]
  return ' '.join([cfg.score_fn, f'E{cfg.num_experts}', f'K{cfg.top_k}', *extra])
