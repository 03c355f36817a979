"""Sparse upcycling: the FFN of a trained dense model becomes the experts of a larger one.

  source (one expert a layer) + fresh (its attention and width, more or smaller experts)
    -> fresh with the source in it                                     (2212.05055, section 3.1)

Granularity (2410.07524): a dense FFN of F = g f hidden units is the sum of its g slices,
y = y_0 + ... + y_{g-1}. Expert e is a copy of slice e % g, with c times its down projection. With
weights w, the chosen experts of slice s add c (sum of their w) y_s. That sum is W / g, the same
part of the whole W for every slice, when

  - all experts are chosen with equal weights; or
  - whole copies are chosen, g dividing K, and the experts of a copy have equal weights: so it is in
    the beginning, when routers of experts g j to g j + g - 1 are equal ("virtual groups"), and ties
    are next to one another.

Then the layer gives (c W / g) y, which is the dense y for c = g / W. W is `scale` for renormalised
weights, whatever K and E are. Otherwise it follows from the logits, and c is right where those are
all equal: W is then `scale` K / E for softmax and `scale` K / 2 for sigmoid. The paper spreads c
over gate, up and down, a cube root each: not quite the same function, for silu(a x) is not a
silu(x).

Shared experts hold the first slices as they are, and routed ones copies of the rest, which is what
g then counts.

Letters: D model, F hidden of the dense FFN, f of an expert, E experts, K experts per token,
L layers, g granularity.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.config import check, not_finite, problem_if
from moejax.config.decimals import decimal_of
from moejax.model.config import ModelConfig
from moejax.model.layer_runs import by_depth, stack_layers
from moejax.model.transformer import Transformer
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import SCORE_FNS, WEIGHTS, RouterConfig, weights_of
from moejax.sharding.tree import flatten, kinds

FFN = ('gate', 'up', 'down')


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
  """How experts are made of a dense FFN, where `init_from` is a dense model and this one is not.

  drop: part of each expert's hidden units that is drawn anew, in each expert by itself
    (Drop-Upcycling, 2502.19261, section 3.2).
  """

  drop: float = 0.0

  def __post_init__(self) -> None:
    check(*not_finite(self))
    check(problem_if(not 0 <= self.drop <= 1, f'drop={self.drop}: use 0 (plain copies) to 1'))


def granularity(source: ModelConfig, target: ModelConfig) -> int:
  """Returns g, the number of slices of the dense FFN that routed experts are copies of."""
  return (source.moe.d_expert - target.moe.shared_width) // target.moe.d_expert


def total_weight(cfg: RouterConfig) -> Array:
  """Returns W, what the weights of the chosen experts add up to where all logits are equal."""
  logits = jnp.zeros((1, 1, cfg.num_experts))
  log_weights = WEIGHTS[cfg.weigh](SCORE_FNS[cfg.score_fn](logits), logits)
  # Which experts are chosen makes no difference between equals: the first ones.
  expert_ids = jnp.arange(cfg.top_k)[None, None]
  return cfg.scale * weights_of(log_weights, expert_ids, cfg.renormalise).sum()


def not_dense(cfg: ModelConfig) -> list[str]:
  """Says why a model is not a dense one, as it would have to be; '' for each thing that is well."""
  router, moe = cfg.moe.router, cfg.moe
  # Of one expert the renormalised weight is 1, and so is its softmax; its sigmoid is not.
  weight_varies = (
    router.num_experts == 1 and not router.renormalise and router.score_fn != 'softmax'
  )
  plain = {'num_shared': 0, 'expert_bias': False, 'activation': 'swiglu'}
  return [
    problem_if(
      router.num_experts > 1,
      f'num_experts={router.num_experts}: only a model of one expert is a dense one',
    ),
    problem_if(
      weight_varies,
      'the weight of its expert follows from the token: renormalise=False with '
      f'score_fn={router.score_fn!r}',
    ),
    *(
      f'moe.{name}={getattr(moe, name)!r} is no part of a dense FFN'
      for name, value in plain.items()
      if getattr(moe, name) != value
    ),
    problem_if(
      not all(cfg.has_experts) and cfg.d_ff != moe.d_expert,
      f'd_ff={cfg.d_ff} in its dense layers is not d_expert={moe.d_expert} in the others: '
      'only FFNs of one width are one',
    ),
  ]


def slices_problem(source: ModelConfig, target: ModelConfig) -> str:
  """Says why the dense FFN cannot be cut into the target's experts; '' where it can."""
  moe, width, experts = target.moe, source.moe.d_expert, target.moe.router.num_experts
  routed, g = width - moe.shared_width, granularity(source, target)
  if routed <= 0:
    return (
      f'model.moe.num_shared={moe.num_shared}, {moe.shared_width} hidden units, leaves nothing of '
      f'the {width} that the dense FFN has: use fewer shared experts, or smaller ones'
    )
  if routed % moe.d_expert:
    beside = f', less the {moe.shared_width} of shared experts' if moe.num_shared else ''
    return (
      f'model.moe.d_expert={moe.d_expert} does not divide the {width} hidden units of the dense '
      f'FFN{beside}: use a divisor'
    )
  return problem_if(
    experts % g,
    f'model.moe.router.num_experts={experts}: use a multiple of {g}, the parts of the dense FFN '
    'that they are copies of',
  )


def upcycle_problems(source: ModelConfig, target: ModelConfig) -> list[str]:
  """Says why the target cannot be made of a dense source; '' for each thing that is well."""
  moe, width = target.moe, source.moe.d_expert
  source_shapes, target_shapes = (
    jax.eval_shape(lambda cfg=cfg: shared_leaves(Transformer(jax.random.key(0), cfg)))
    for cfg in (source, target)
  )
  return [
    problem_if(
      moe.activation != 'swiglu',
      f"model.moe.activation={moe.activation!r}: use 'swiglu', as in a dense FFN",
    ),
    problem_if(
      not all(target.has_experts) and target.d_ff != width,
      f'model.d_ff={target.d_ff}: use {width}, the width of the dense FFN, for the layers '
      'without experts',
    ),
    slices_problem(source, target),
    problem_if(
      target.tie_embeddings and not source.tie_embeddings,
      'model.tie_embeddings=True: use False, for the head of the dense model is not its embedding',
    ),
    problem_if(
      kinds(source_shapes) != kinds(target_shapes), 'it has other shapes, not only in its FFN'
    ),
  ]


def outcome(source: ModelConfig, target: ModelConfig, cfg: UpcycleConfig) -> str:
  """Says in words what `upcycle` does."""
  g, shared = granularity(source, target), target.moe.num_shared
  experts = target.moe.router.num_experts
  if target.moe.d_shared:
    ffn = f'its FFN in {g} parts, beside {target.moe.shared_width} units that are shared'
  elif shared:
    ffn = f'{g} of {g + shared} parts of its FFN, the rest is shared'
  elif g > 1:
    ffn = f'its FFN in {g} parts'
  else:
    ffn = 'its FFN'
  parts = [f'{experts} experts are {experts // g} copies of {ffn}']
  if cfg.drop > 0:
    parts.append(f'{cfg.drop:.0%} of their units are drawn anew')
  if target.mtp_depth > 0:
    parts.append('routers and multi-token prediction begin at random')
  else:
    parts.append('routers begin at random')
  return '; '.join(parts)


def shared_leaves(model: Transformer) -> dict[str, Array]:
  """Path -> leaf of what a dense and an MoE model share.

  Leaves of layers are under the path that they have in a dense block, all layers in one: [L, ...].
  """
  parts: dict[str, dict[str, Array]] = {}  # path -> stack -> leaf
  for stack in stack_layers(model.cfg):
    for path, leaf in flatten(getattr(model, stack)).items():
      if not path.startswith(('ffn/', 'moe/')):
        # The norms of the second branch have one name before a dense FFN, another before experts.
        parts.setdefault(path.replace('moe_', 'ffn_'), {})[stack] = leaf
  layers = {path: by_depth(stacks, model.cfg) for path, stacks in parts.items()}
  return layers | {'embed/table': model.embed.table[...], 'norm/scale': model.norm.scale[...]}


def ffn_weights(model: Transformer) -> dict[str, Array]:
  """Returns gate and up, [L, D, F], and down, [L, F, D], of all layers of a dense model.

  The weight of the one expert is multiplied into down.
  """
  experts = {name: getattr(model.blocks.moe.experts, name)[...][:, 0] for name in FFN}
  experts['down'] = total_weight(model.cfg.moe.router) * experts['down']
  stacks = {name: {'blocks': experts[name]} for name in FFN}
  if not all(model.cfg.has_experts):
    for name in FFN:
      stacks[name]['dense_blocks'] = getattr(model.dense_blocks.ffn, name)[...]
  return {name: by_depth(parts, model.cfg) for name, parts in stacks.items()}


def upcycle(source: Transformer, fresh: Transformer, cfg: UpcycleConfig, key: Array) -> Transformer:
  """Returns the freshly initialised target with the dense model in it.

  `not_dense` and `upcycle_problems` must have found nothing. Routers stay as they are, but for
  equal columns within a copy, and so do blocks of multi-token prediction.
  """
  moe, has_experts = fresh.cfg.moe, np.array(fresh.cfg.has_experts)
  leaves, ffn = shared_leaves(source), ffn_weights(source)
  g = granularity(source.cfg, fresh.cfg)
  made = {
    'embed/table': leaves.pop('embed/table'),
    'norm/scale': leaves.pop('norm/scale'),
    # Of a tied source the transposed embedding.
    'head/w': source.head_weights(),
  }
  layers = leaves | {f'ffn/{name}': leaf for name, leaf in ffn.items()}
  for path, leaf in layers.items():
    made[f'dense_blocks/{path}'] = leaf[~has_experts]
    made[f'blocks/{path.replace("ffn_", "moe_")}'] = leaf[has_experts]
  in_blocks = {name: leaf[has_experts] for name, leaf in ffn.items()}
  made |= moe_layers(in_blocks, moe, cfg.drop, key)
  # One column of each copy, for all of its experts: they tie, and are chosen together.
  made['blocks/moe/router'] = jnp.repeat(fresh.blocks.moe.router[...][..., ::g], g, axis=-1)
  if moe.shared_gate:
    # A factor of sigmoid(0) = 1/2, which `moe_layers` makes up for.
    made['blocks/moe/shared_gate'] = jnp.zeros_like(fresh.blocks.moe.shared_gate[...])
  # Not all that is made is asked for: a target may have no dense blocks, or tied embeddings.
  new_leaves = [made[path] if path in made else leaf for path, leaf in flatten(fresh).items()]
  return jax.tree.unflatten(jax.tree.structure(fresh), new_leaves)


def moe_layers(
  weights: Mapping[str, Array], cfg: MoEConfig, drop: float, key: Array
) -> dict[str, Array]:
  """Makes the experts of every MoE layer.

  Args:
    weights: gate, up and down of the dense FFN of each layer, [L, ...].
    drop: part of the units that is drawn anew, from `key`.

  Returns:
    Path -> routed experts [L, E, ...] and shared experts [L, ...].
  """
  # By hidden unit, as the rows of all three matrices: [L, F, D].
  units = {name: leaf if name == 'down' else leaf.swapaxes(1, 2) for name, leaf in weights.items()}
  first, layers = cfg.shared_width, len(units['down'])
  shared = {name: leaf[:, :first] for name, leaf in units.items()}
  slices = {
    name: leaf[:, first:].reshape(layers, -1, cfg.d_expert, leaf.shape[-1])
    for name, leaf in units.items()
  }  # [L, g, f, D]
  g = slices['down'].shape[1]
  slice_of_expert = jnp.arange(cfg.router.num_experts) % g
  experts = {name: leaf[:, slice_of_expert] for name, leaf in slices.items()}  # [L, E, f, D]
  if drop:
    keys = jax.random.split(key, (layers, cfg.router.num_experts))
    experts = jax.vmap(jax.vmap(lambda expert, k: redraw_units(expert, drop, k)))(experts, keys)
  experts['down'] *= g / total_weight(cfg.router)
  shared['down'] *= 2 if cfg.shared_gate else 1  # against the gate's factor of 1/2
  made = {f'experts/{name}': leaf for name, leaf in experts.items()}
  made |= {f'shared/{name}': leaf for name, leaf in shared.items()}
  return {
    f'blocks/moe/{path}': leaf if path.endswith('/down') else leaf.swapaxes(-1, -2)
    for path, leaf in made.items()
  }


def redraw_units(expert: Mapping[str, Array], drop: float, key: Array) -> dict[str, Array]:
  """Draws a part of an expert's units anew, [f, D] -> [f, D].

  They are the same units in all three matrices, each from a normal with the mean and standard
  deviation of what it replaces there.
  """
  units = len(expert['down'])
  dropped = jax.random.permutation(key, units)[: math.floor(decimal_of(drop) * units)]

  def redraw(rows: Array, key: Array) -> Array:
    old = rows[dropped]
    new = old.mean() + old.std() * jax.random.normal(key, old.shape)
    return rows.at[dropped].set(new)

  keys = jax.random.split(key, len(expert))
  return {name: redraw(rows, k) for (name, rows), k in zip(expert.items(), keys)}
