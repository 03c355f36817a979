"""Likely mistakes in reading a published config, and how far the logits are off with each of them.

A golden that does not notice a mistake would let it pass.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from moejax.data.batch import Batch
from moejax.model.config import ModelConfig
from moejax.model.transformer import Transformer
from tests.support.family_golden import CASES, Golden, batch_of
from tests.support.quick import QUICK

T = TypeVar('T')


@functools.partial(jax.jit, compiler_options=QUICK)
def logits_of(model: Transformer, router: jax.Array, batch: Batch) -> jax.Array:
  """The logits [B, S, V] of a batch."""
  return model.logits(model(batch, router).hidden)


def changed(cfg: T, values: dict[str, object]) -> T:
  """The config with other values at some dotted paths, all at once."""
  direct: dict[str, object] = {}
  deeper: dict[str, dict[str, object]] = defaultdict(dict)
  for path, value in values.items():
    name, _, rest = path.partition('.')
    if rest:
      deeper[name][rest] = value
    else:
      direct[name] = value
  inner = {name: changed(getattr(cfg, name), fields) for name, fields in deeper.items()}
  return dataclasses.replace(cfg, **direct, **inner)


def always(cfg: ModelConfig) -> bool:
  """Whether a mistake is possible with this config: with all."""
  return True


def grouped(cfg: ModelConfig) -> bool:
  return cfg.moe.router.num_groups > 1


def weighed(cfg: ModelConfig) -> bool:
  return cfg.moe.router.weigh == 'scores' and cfg.moe.router.num_experts > 1


class Mistake(NamedTuple):
  """Fields that come out wrong, as functions of what they are, where that can be."""

  fields: dict[str, Callable[[object], object]]
  possible: Callable[[ModelConfig], bool] = always


MISTAKES = {
  'eps': Mistake({'norm_eps': lambda eps: eps / 2}),
  'eps of the latent norms': Mistake(
    {'attention.latent.norm_eps': lambda eps: 1e-2 if eps < 1e-3 else 1e-6},
    lambda cfg: cfg.attention.latent.kv_rank > 0,
  ),
  'pairs of channels': Mistake({'attention.rope.interleaved': lambda on: not on}),
  'the whole head rotated': Mistake({'attention.rope.fraction': lambda part: 1.0}),
  'no YaRN': Mistake({'attention.rope.yarn.factor': lambda factor: 1.0}),
  'no mscale': Mistake({'attention.rope.yarn.mscale_all_dim': lambda m: 0.0}),
  'YaRN truncated': Mistake({'attention.rope.yarn.truncate': lambda on: True}),
  'window off by one': Mistake(
    {'attention.windows': lambda windows: tuple(w and w + 1 for w in windows)}
  ),
  'windows of the other layers': Mistake({'attention.windows': lambda windows: windows[::-1]}),
  'no clipping': Mistake({'attention.clip_qkv': lambda limit: 0.0}),
  'no group limit': Mistake(
    {'moe.router.num_groups': lambda n: 1, 'moe.router.top_groups': lambda n: 1}
  ),
  'groups by another score': Mistake({'moe.router.group_best': lambda n: 3 - n}, grouped),
  'weights normalised or not': Mistake({'moe.router.renormalise': lambda on: not on}, weighed),
  'weights not scaled': Mistake({'moe.router.scale': lambda scale: 1.0}),
  'another score': Mistake(
    {'moe.router.score_fn': lambda name: {'sigmoid': 'softmax', 'softmax': 'sigmoid'}[name]},
    weighed,
  ),
  'no clamp': Mistake(
    {'moe.activation_limit': lambda limit: 1e9}, lambda cfg: cfg.moe.activation != 'swiglu'
  ),
}


def mistaken(cfg: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
  """Each mistake that can be made with this config, and the config with it."""
  for name, mistake in MISTAKES.items():
    values = {
      path: change(functools.reduce(getattr, path.split('.'), cfg))
      for path, change in mistake.fields.items()
    }
    if mistake.possible(cfg) and changed(cfg, values) != cfg:
      yield name, changed(cfg, values)


# last name of a parameter's path -> the value at which it does nothing
NEUTRAL = {
  'scale': 1.0,
  'b': 0.0,
  'sinks': -1e9,
  'gate_bias': 0.0,
  'up_bias': 0.0,
  'down_bias': 0.0,
  'router_logit_bias': 0.0,
}


def of_mistakes(golden: Golden) -> dict[str, float]:
  """Deviation of the logits for each likely mistake: a field that is wrong, a vector or the router
  bias ignored."""
  recorded = golden.recorded('golden')
  batch, found = batch_of(recorded, CASES), {}
  wanted = np.concatenate([recorded[f'{case}logits'] for case in CASES])
  real = batch.segment_ids > 0

  def deviation(model: Transformer, router: np.ndarray) -> float:
    return float(np.abs(logits_of(model, router, batch) - wanted)[real].max())

  leaves, tree = jax.tree.leaves(golden.model), jax.tree.structure(golden.model)
  for name, cfg in mistaken(golden.cfg):
    # The same weights in a model that believes in the wrong config.
    shapes = jax.eval_shape(lambda key, cfg=cfg: Transformer(key, cfg), jax.random.key(0))
    found[name] = deviation(jax.tree.unflatten(jax.tree.structure(shapes), leaves), golden.router)
  if golden.router.any():
    found['router bias ignored'] = deviation(golden.model, np.zeros_like(golden.router))
  for i, path in enumerate(path for path in golden.made_of if path != 'router.bias'):
    last = path.split('.')[-1]
    if last in NEUTRAL and not path.startswith('mtp.'):
      ignored = [*leaves[:i], np.full_like(leaves[i], NEUTRAL[last]), *leaves[i + 1 :]]
      found[f'{path} ignored'] = deviation(jax.tree.unflatten(tree, ignored), golden.router)
  return found
