"""What one run of the certificate shares: how much it looks at, its compiled programs, and the batches it routes.

Programs are made anew for each run, from wrappers of its own: a function that was replaced since the last run, as the
mutants of the tests do, is traced again and never found in a cache.

Letters: B batch, S sequence, E experts, K experts per token.
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from moejax.moe import routing, selection

T = TypeVar('T')

# All the time would be the compiler's, on programs that run for a millisecond: nothing is optimised, and fused loops
# are not made by MLIR, which is two thirds of the time for a training step. Not every JAX has the second option.
CHEAP = (
  {'xla_backend_optimization_level': 0, 'xla_cpu_use_fusion_emitters': False},
  {'xla_backend_optimization_level': 0},
)
B, S = 4, 8  # of the batches of logits
MICRO_BATCHES, EP_GROUPS = 2, 4  # into which they are cut
SHAPES = tuple((e, k) for e, k in itertools.product((4, 8, 64, 256), (1, 2, 8)) if k <= e)
# What --quick looks at: every score function once, and every scale of E but the largest.
QUICK_ROUTERS = {
  (4, 1): ('sigmoid',),
  (8, 2): ('sigmoid', 'softmax', 'sqrt_softplus'),
  (64, 8): ('softmax',),
}


def cheapest() -> dict[str, int]:
  """The first of the compiler's options that this JAX has."""
  for options in CHEAP[:-1]:
    try:
      jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
      return options
    except jax.errors.JaxRuntimeError:  # no such option
      continue
  return CHEAP[-1]


class Plan:
  """How much to look at, and what was compiled and computed for it so far."""

  def __init__(self, quick: bool, seed: int = 0) -> None:
    self.quick, self.seed = quick, seed
    self.options = cheapest()
    self._kept: dict[Hashable, object] = {}

  def once(self, key: Hashable, make: Callable[[], T]) -> T:
    """What `make` makes, made at the first time of asking."""
    if key not in self._kept:
      self._kept[key] = make()
    return self._kept[key]

  def program(self, function: Callable, *static: Hashable) -> Callable:
    """`function(*arrays, *static)`, compiled once a run."""

    def make() -> Callable:
      return jax.jit(lambda *arrays: function(*arrays, *static), compiler_options=self.options)

    return self.once((function, static), make)

  def rng(self, *path: int) -> np.random.Generator:
    """Random numbers of their own for every place that draws some."""
    return np.random.default_rng((self.seed, *path))

  def token_choice(self) -> Iterator[routing.RouterConfig]:
    """Routers that take the best experts: every shape with every score function.

    Two groups of experts of which one is kept, where K allows it: what is dispatched is then not what the scores alone
    would choose.
    """
    for (experts, top_k), score_fn in itertools.product(SHAPES, sorted(routing.SCORE_FNS)):
      if (
        not self.quick
        or (experts, top_k) in QUICK_ROUTERS
        and score_fn in QUICK_ROUTERS[experts, top_k]
      ):
        yield routing.RouterConfig(
          experts, top_k, score_fn, num_groups=2 if 2 * top_k <= experts else 1
        )

  def other_routers(self) -> Iterator[routing.RouterConfig]:
    """Every other selection with every score function, noise, and the other ways to weigh."""
    scores = sorted(routing.SCORE_FNS)
    for i, name in enumerate(sorted(set(selection.SELECTIONS) - {'top_k'})):
      for score_fn in scores[i % len(scores) :][:1] if self.quick else scores:
        yield routing.RouterConfig(8, 2, score_fn, selection=name)
    yield routing.RouterConfig(8, 2, 'softmax', noisy=True)
    if not self.quick:
      yield routing.RouterConfig(4, 1, 'sigmoid', noisy=True)
      yield routing.RouterConfig(
        8, 2, 'sigmoid', weigh='softmax', num_groups=4, top_groups=2, group_best=1
      )
      yield routing.RouterConfig(8, 2, 'softmax', renormalise=False, scale=2.5)
      yield routing.RouterConfig(8, 2, 'softmax', random_second=True)
      yield routing.RouterConfig(8, 2, 'softmax', expert_dropout=0.25)


class Case(NamedTuple):
  """A batch of logits, and which of its tokens count."""

  logits: np.ndarray  # [B, S, E] f32
  bias: np.ndarray  # [E] f32
  mask: np.ndarray  # [B, S] bool
  segments: np.ndarray  # [B, S] i32


WHOLE = np.ones((B, S), np.int32)
PADDED = (np.arange(S) < np.array([[8], [5], [1], [3]])).astype(np.int32)
PACKED = np.array(
  [[1, 1, 1, 2, 2, 2, 2, 3], [1, 2, 2, 3, 3, 3, 4, 4], [1] * 8, [1] * 4 + [2] * 4], np.int32
)
MIXED = np.where(np.arange(S) < np.array([[8], [6], [0], [7]]), PACKED, 0).astype(np.int32)


def make_cases(plan: Plan, num_experts: int) -> dict[str, Case]:
  """Batches by what is unusual about them."""
  rng, shape = plan.rng(num_experts), (B, S, num_experts)
  bias, none = (
    rng.normal(scale=0.3, size=num_experts).astype(np.float32),
    np.zeros(num_experts, np.float32),
  )
  plain = rng.normal(size=shape).astype(np.float32)
  ahead, avoided = plain.copy(), plain.copy()
  ahead[..., 1], avoided[..., 0] = 50, -20
  holes = (MIXED > 0) & (
    rng.random((B, S)) < 0.8
  )  # also tokens inside a document that do not count
  holes[0, 3:7] = False  # and a document of which no token does
  single = np.zeros((B, S), bool)
  single[1, 2] = True
  return {
    'plain': Case(plain, none, WHOLE > 0, WHOLE),
    'padded': Case(2 * plain, bias, PADDED > 0, PADDED),
    'packed': Case(plain, bias, PACKED > 0, PACKED),
    'holes': Case(plain, bias, holes, MIXED),
    'ties': Case(rng.integers(0, 2, shape).astype(np.float32), none, MIXED > 0, MIXED),
    'equal': Case(np.zeros(shape, np.float32), bias, MIXED > 0, MIXED),
    'extreme': Case(rng.choice([-1e4, 0, 1e4], shape).astype(np.float32), bias, MIXED > 0, MIXED),
    'all to one': Case(ahead, bias, MIXED > 0, MIXED),
    'one unchosen': Case(avoided, none, MIXED > 0, MIXED),
    'low': Case(plain - 50, none, MIXED > 0, MIXED),
    'single': Case(plain, bias, single, PACKED),
    'nothing': Case(plain, bias, np.zeros((B, S), bool), PADDED),
  }


def router_name(cfg: routing.RouterConfig) -> str:
  """'sigmoid E8 K2', and what else is unusual about it."""
  usual = dataclasses.asdict(routing.RouterConfig())
  shown = ('num_experts', 'top_k', 'score_fn', 'num_groups', 'top_groups')
  extra = [
    f'{name}={value}'
    for name, value in dataclasses.asdict(cfg).items()
    if name not in shown and value != usual[name]
  ]
  return ' '.join([cfg.score_fn, f'E{cfg.num_experts}', f'K{cfg.top_k}', *extra])
