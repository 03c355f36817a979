"""Sparse upcycling: the FFN of a trained dense model becomes the experts of a larger one (2212.05055, section 3.1).

  source (one expert a layer) + fresh (its attention and width, more or smaller experts) -> fresh with the source in it

Granularity (2410.07524): a dense FFN of F = g f hidden units is the sum of its g slices, y = y_0 + ... + y_{g-1}.
Expert e is a copy of slice e % g, with c times its down projection. With weights w, the chosen experts of slice s add
c (sum of their w) y_s. That sum is W / g, the same part of the whole W for every slice, when

  - all experts are chosen with equal weights; or
  - whole copies are chosen, g dividing K, and the experts of a copy have equal weights: so it is in the beginning, when
    routers of experts g j to g j + g - 1 are equal ("virtual groups"), and ties are next to one another.

Then the layer gives (c W / g) y, which is the dense y for c = g / W. W is `scale` for renormalised weights, whatever K
and E are. Otherwise it follows from the logits, and c is right where those are all equal: W is then `scale` K / E for
softmax and `scale` K / 2 for sigmoid. The paper spreads c over gate, up and down, a cube root each: not quite the same
function, for silu(a x) is not a silu(x).

Shared experts hold the first slices as they are, and routed ones copies of the rest, which is what g then counts.

Letters: D model, F hidden of the dense FFN, f of an expert, E experts, K experts per token, L layers, g granularity.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import check
from moejax.model.config import ModelConfig
from moejax.model.transformer import Transformer, stack_sizes
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import SCORE_FNS, WEIGHTS, RouterConfig, weights_of
from moejax.sharding.tree import flatten, kinds

FFN = ('gate', 'up', 'down')


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
  """How experts are made of a dense FFN, where `init_from` is a dense model and this one is not.

  drop: part of each expert's hidden units that is drawn anew, by itself (Drop-Upcycling, 2502.19261, section 3.2).
  """

  drop: float = 0.0

  def __post_init__(self) -> None:
    check(f'drop={self.drop}: use 0 (plain copies) to 1' if not 0 <= self.drop <= 1 else '')


def granularity(source: ModelConfig, target: ModelConfig) -> int:
  """g, of how many slices routed experts are copies."""
  return source.moe.d_expert // target.moe.d_expert - target.moe.num_shared


def total_weight(cfg: RouterConfig) -> Array:
  """W, what the weights of the chosen experts add up to where all logits are equal."""
  logits = jnp.zeros((1, 1, cfg.num_experts))
  log_weights = WEIGHTS[cfg.weigh](SCORE_FNS[cfg.score_fn](logits), logits)
  return (
    cfg.scale * weights_of(log_weights, jnp.arange(cfg.top_k)[None, None], cfg.renormalise).sum()
  )


def not_dense(cfg: ModelConfig) -> list[str]:
  """Why a model is not a dense one, as it would have to be; '' for each thing that is well."""
  router, moe = cfg.moe.router, cfg.moe
  return [
    f'num_experts={router.num_experts}: only a model of one expert is a dense one'
    if router.num_experts > 1
    else '',
    f'the weight of its expert follows from the token: renormalise=False with score_fn={router.score_fn!r}'
    if router.num_experts == 1 and not router.renormalise and router.score_fn != 'softmax'
    else '',
    *(
      f'moe.{name}={getattr(moe, name)!r} is no part of a dense FFN'
      for name, plain in (('num_shared', 0), ('expert_bias', False), ('activation', 'swiglu'))
      if getattr(moe, name) != plain
    ),
    f'd_ff={cfg.d_ff} in its dense layers is not d_expert={moe.d_expert} in the others: only FFNs of one width are one'
    if cfg.num_dense_layers and cfg.d_ff != moe.d_expert
    else '',
  ]


def upcycle_problems(source: ModelConfig, target: ModelConfig) -> list[str]:
  """Why the target cannot be made of a dense source; '' for each thing that is well."""
  moe, width, experts = target.moe, source.moe.d_expert, target.moe.router.num_experts
  slices, g = width // moe.d_expert, granularity(source, target)
  shapes = [
    jax.eval_shape(lambda cfg=cfg: common(Transformer(jax.random.key(0), cfg)))
    for cfg in (source, target)
  ]
  return [
    f"model.moe.activation={moe.activation!r}: use 'swiglu', as in a dense FFN"
    if moe.activation != 'swiglu'
    else '',
    f'model.d_ff={target.d_ff}: use {width}, the width of the dense FFN, for num_dense_layers={target.num_dense_layers}'
    if target.num_dense_layers and target.d_ff != width
    else '',
    f'model.moe.d_expert={moe.d_expert} does not divide the {width} hidden units of the dense FFN: use a divisor'
    if width % moe.d_expert
    else f'model.moe.num_shared={moe.num_shared} leaves nothing of the {slices} parts of d_expert={moe.d_expert} that the '
    'dense FFN has: use fewer shared experts, or smaller ones'
    if g < 1
    else f'model.moe.router.num_experts={experts}: use a multiple of {g}, the parts of the dense FFN that they are copies of'
    if experts % g
    else '',
    'model.tie_embeddings=True: use False, for the head of the dense model is not its embedding'
    if target.tie_embeddings and not source.tie_embeddings
    else '',
    'it has other shapes, not only in its FFN' if kinds(shapes[0]) != kinds(shapes[1]) else '',
  ]


def outcome(source: ModelConfig, target: ModelConfig, cfg: UpcycleConfig) -> str:
  """In words, what `upcycle` does."""
  g, experts, shared = (
    granularity(source, target),
    target.moe.router.num_experts,
    target.moe.num_shared,
  )
  parts = (
    f'{g} of {g + shared} parts of its FFN, the rest is shared'
    if shared
    else f'its FFN in {g} parts'
  )
  return (
    f'{experts} experts are {experts // g} copies of '
    + (parts if g + shared > 1 else 'its FFN')
    + f'; {cfg.drop:.0%} of their units are drawn anew' * (cfg.drop > 0)
    + '; routers'
    + ' and multi-token prediction' * (target.mtp_depth > 0)
    + ' begin at random'
  )


def common(model: Transformer) -> dict[str, Array]:
  """What a dense and an MoE model share: path -> leaf; of layers, the path in a dense block, and all in one, [L]."""
  stacks = [
    {
      path.replace('moe_', 'ffn_'): leaf
      for path, leaf in flatten(getattr(model, stack)).items()
      if not path.startswith(('ffn/', 'moe/'))
    }
    for stack in stack_sizes(model.cfg)
  ]
  layers = {path: jnp.concatenate([stack[path] for stack in stacks]) for path in stacks[0]}
  return layers | {'embed/table': model.embed.table[...], 'norm/scale': model.norm.scale[...]}


def ffn(model: Transformer) -> dict[str, Array]:
  """gate and up, [L, D, F], and down, [L, F, D], of a dense model, the weight of its one expert multiplied in."""
  experts = {name: getattr(model.blocks.moe.experts, name)[...][:, 0] for name in FFN}
  experts['down'] = total_weight(model.cfg.moe.router) * experts['down']
  if not model.cfg.num_dense_layers:
    return experts
  return {
    name: jnp.concatenate([getattr(model.dense_blocks.ffn, name)[...], experts[name]])
    for name in FFN
  }


def upcycle(source: Transformer, fresh: Transformer, cfg: UpcycleConfig, key: Array) -> Transformer:
  """The freshly initialised target with the dense model in it; `not_dense` and `misfits` must have found nothing.

  Routers stay as they are, but for equal columns within a copy, and so do blocks of multi-token prediction.
  """
  first, moe, layers, weights = (
    fresh.cfg.num_dense_layers,
    fresh.cfg.moe,
    common(source),
    ffn(source),
  )
  g = granularity(source.cfg, fresh.cfg)
  made = {path: layers.pop(path) for path in ('embed/table', 'norm/scale')} | {
    'head/w': source.head_weights()
  }
  for path, leaf in (layers | {f'ffn/{name}': leaf for name, leaf in weights.items()}).items():
    made |= {
      f'dense_blocks/{path}': leaf[:first],
      f'blocks/{path.replace("ffn_", "moe_")}': leaf[first:],
    }
  made |= moe_layers({name: leaf[first:] for name, leaf in weights.items()}, moe, cfg.drop, key)
  made['blocks/moe/router'] = jnp.repeat(fresh.blocks.moe.router[...][..., ::g], g, axis=-1)
  if moe.shared_gate:
    made['blocks/moe/shared_gate'] = jnp.zeros_like(
      fresh.blocks.moe.shared_gate[...]
    )  # a factor of 1/2
  return jax.tree.unflatten(
    jax.tree.structure(fresh),
    [made[path] if path in made else leaf for path, leaf in flatten(fresh).items()],
  )


def moe_layers(
  weights: Mapping[str, Array], cfg: MoEConfig, drop: float, key: Array
) -> dict[str, Array]:
  """The dense FFN of each layer [L, ...] -> path -> experts [L, E, ...], shared experts [L, ...]."""
  # By hidden unit, as the rows of all three matrices.
  units = {
    name: leaf if name == 'down' else leaf.swapaxes(1, 2) for name, leaf in weights.items()
  }  # [L, F, D]
  first, layers = cfg.num_shared * cfg.d_expert, len(units['down'])
  shared = {name: leaf[:, :first] for name, leaf in units.items()}
  parts = {
    name: leaf[:, first:].reshape(layers, -1, cfg.d_expert, leaf.shape[-1])
    for name, leaf in units.items()
  }
  g = parts['down'].shape[1]
  experts = {
    name: leaf[:, jnp.arange(cfg.router.num_experts) % g] for name, leaf in parts.items()
  }  # [L, E, f, D]
  if drop:
    keys = jax.random.split(key, (layers, cfg.router.num_experts))
    experts = jax.vmap(jax.vmap(lambda expert, k: redrawn(expert, drop, k)))(experts, keys)
  experts['down'] *= g / total_weight(cfg.router)
  shared['down'] *= 2 if cfg.shared_gate else 1
  return {
    f'blocks/moe/{where}/{name}': leaf if name == 'down' else leaf.swapaxes(-1, -2)
    for where, made in (('experts', experts), ('shared', shared))
    for name, leaf in made.items()
  }


def redrawn(expert: Mapping[str, Array], drop: float, key: Array) -> dict[str, Array]:
  """An expert [f, D] with a part of its units drawn anew: the same units of all three matrices, each from a normal with
  the mean and standard deviation of what it replaces there."""
  count = int(drop * len(expert['down']))
  which = jax.random.permutation(key, len(expert['down']))[:count]

  def anew(rows: Array, key: Array) -> Array:
    old = rows[which]
    return rows.at[which].set(old.mean() + old.std() * jax.random.normal(key, old.shape))

  return {
    name: anew(rows, k)
    for (name, rows), k in zip(expert.items(), jax.random.split(key, len(expert)))
  }
