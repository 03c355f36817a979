"""Part of line 3: what is random follows from seed, step, layer and row, and from nothing else.

  a step whose router draws | the same in micro-batches with recomputation -> the same
  rows of one text -> experts that differ by row, layer and step, and by nothing else

Letters: B batch, S sequence, D model, E experts, K experts per token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.certify import tiny_config
from moejax.certify import tiny_model as tiny
from moejax.certify.cases import Plan
from moejax.certify.checks import Check, Worst
from moejax.model import transformer
from moejax.moe import selection
from moejax.moe.layer import MoE, MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.moe.selection import Tokens
from moejax.train.experiment.config import ExperimentConfig

ROWS, PLACES, D = 4, 6, 8
# Each way to draw, alone: together one would hide that another draws the same everywhere.
RANDOM = {
  'jitter': RouterConfig(4, 2, jitter=0.5),
  'noisy': RouterConfig(4, 2, noisy=True),
  'expert dropout': RouterConfig(4, 2, expert_dropout=0.25),
  'random second': RouterConfig(4, 2, random_second=True),
}


def random_config() -> ExperimentConfig:
  """A router that draws for everything but groups."""
  router = RouterConfig(4, 2, jitter=0.1, noisy=True, expert_dropout=0.25, random_second=True)
  return tiny_config.change(tiny_config.base_config(noisy=True), router=router)


class Drawn(NamedTuple):
  """What a router makes of one vector in every place."""

  logits: np.ndarray  # [B, S, E]
  expert_ids: np.ndarray  # [B, S, K]


def route_alike(layer: MoE, key: Array, numbers: Array) -> Drawn:
  """The routing of rows with these numbers in the batch, all of whose places hold the same."""
  ones = jnp.ones((len(numbers), PLACES), jnp.int32)
  x = jnp.broadcast_to(jnp.linspace(0.1, 1, D), (*ones.shape, D))
  tokens = Tokens(ones, ones > 0, ones, numbers, key)
  routed = layer.route(x, jnp.zeros(layer.cfg.router.num_experts), tokens)
  return Drawn(routed.logits, routed.expert_ids)


def jittered_outputs(plan: Plan, key: Array, numbers: np.ndarray) -> int:
  """How many outputs jitter changes where all experts weigh the same: the router alone sees it."""
  cfg = MoEConfig(RouterConfig(2, 2, jitter=0.5), d_expert=4)
  shapes = jax.eval_shape(lambda: MoE(jax.random.key(0), D, cfg))
  layer = tiny.draw_parameters(plan, shapes)
  layer.router[...] = jnp.zeros((D, 2))
  ones = jnp.ones((len(numbers), PLACES), jnp.int32)
  x = jnp.asarray(plan.rng(21).normal(size=(*ones.shape, D)), jnp.float32)

  def outputs(layer: MoE, key: Array | None) -> Array:
    tokens = Tokens(ones, ones > 0, ones, jnp.asarray(numbers), key)
    return layer(x, jnp.zeros(2), tokens)[0]

  run = jax.jit(outputs)
  return int((run(layer, key) != run(layer, None)).sum())


def check_draws(plan: Plan) -> Check:
  """Checks by what draws differ, and by what they do not."""
  worst = Worst('draws that are alike, or are not', 0, 'by seed, step, layer, row and place alone')
  key, numbers = jax.random.key(plan.seed), np.arange(ROWS)
  for name, router in RANDOM.items():
    shapes = jax.eval_shape(
      lambda router=router: MoE(jax.random.key(0), D, MoEConfig(router, d_expert=4))
    )
    layer = tiny.draw_parameters(plan, shapes)
    # Logits of 2, 1, 0 and 0: for the second expert a weight of 1/4, which leaves the draw open.
    layer.router[...] = jnp.zeros((D, 4)).at[-1, :2].set(jnp.array([2.0, 1.0]))

    def draw(key: Array, numbers: np.ndarray, layer: MoE = layer) -> np.ndarray:
      drawn = plan.program(route_alike)(layer, key, numbers)
      return np.concatenate([np.asarray(a, np.float64) for a in drawn], axis=-1)

    one = draw(key, numbers)
    worst.see(f'{name}: drawn again', (draw(key, numbers) != one).sum())
    # A row draws by its number, wherever it lies.
    worst.see(f'{name}: rows turned round', (draw(key, numbers[::-1])[::-1] != one).sum())
    # Of several, since there are few ways to leave out an expert.
    others = [draw(jax.random.fold_in(key, number), numbers) for number in range(1, 9)]
    alike = sum(int((other == one).all()) for other in others)
    worst.see(f'{name}: steps and layers', alike == len(others))
    if name != 'expert dropout':  # one draw for all tokens of a layer
      worst.see(f'{name}: rows', (one == one[:1]).all())
      worst.see(f'{name}: places', (one == one[:, :1]).all())
  worst.see('jitter: what experts see', jittered_outputs(plan, key, numbers))
  keys = np.asarray(jax.random.key_data(transformer.layer_keys(key, 3)))
  worst.see('layers', 3 - len(np.unique(keys, axis=0)))
  return worst.check()


def check_distributions(plan: Plan) -> Check:
  """Checks how what is drawn is spread: 5 standard errors are passed once in a million draws."""
  worst = Worst('draws of another distribution', 5, 'standard errors of the mean')
  shape = (ROWS, 200, D)
  ones = jnp.ones(shape[:2], jnp.int32)
  tokens = Tokens(ones, ones > 0, ones, jnp.arange(ROWS), jax.random.key(plan.seed))

  def draw() -> tuple[Array, Array, Array, Array]:
    flat = jnp.zeros(shape)
    # As likely as half of the tokens: a second expert of weight 1/4.
    weights = jnp.broadcast_to(jnp.array([0.75, 0.25]), (*shape[:2], 2))
    return (
      selection.jittered(flat + 1, tokens, 0.5),
      selection.noisy(flat, flat + 2, tokens, 2)[0],
      selection.without_some(flat, tokens, 0.25),
      selection.keep_second(weights, tokens)[..., 1],
    )

  jitter, noise, dropped, second = (np.asarray(a, np.float64) for a in jax.jit(draw)())
  # Uniform from 1/2 to 3/2: its variance is 1/12, that of its square's mean 1/180.
  moments = (
    ('jitter', jitter - 1, np.sqrt(1 / 12)),
    ('square of jitter', (jitter - 1) ** 2 - 1 / 12, np.sqrt(1 / 180)),
    ('noise', noise / 2, 1.0),
    ('square of noise', (noise / 2) ** 2 - 1, np.sqrt(2)),
    ('second expert', second - 0.5, 0.5),
  )
  for name, values, std in moments:
    worst.see(name, values.mean() * np.sqrt(values.size) / std)
  outside = np.abs(jitter - 1).max() > 0.5
  worst.see('jitter beyond its epsilon', np.inf if outside else 0)
  left_out = np.isneginf(dropped).sum(-1)
  worst.see('experts left out of 8, less 2', np.inf if (left_out != D // 4).any() else 0)
  return worst.check()


def check_steps(plan: Plan) -> Check:
  """Checks that two steps from one state draw unlike numbers, and one step the same ones."""
  worst = Worst('steps that draw what another did', 0, 'each has its own')
  cfg, rows = random_config(), tiny.batch_of(plan)
  start = tiny.start_state(plan, cfg)
  values = []
  for number in (3, 4, 5, 3):
    taken = tiny.take_step(plan, cfg, start._replace(step=jnp.int32(number)), rows)
    values.append(float(taken.terms['balance/router_z']))
  worst.see('step 3 again', values[0] != values[3])
  worst.see('steps 3, 4 and 5', 3 - len(set(values[:3])))
  return worst.check()
