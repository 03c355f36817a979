"""Line 9, on whole training steps: layers enter a loss by one reduction, the mean over MoE layers.

  one step -> each logged balance term | the oracle's loss of each layer, averaged

Letters: B batch, S sequence, E experts, K experts per token, L MoE layers.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.certify import tiny_config
from moejax.certify import tiny_model as tiny
from moejax.certify.cases import Plan
from moejax.certify.checks import Check, Worst
from moejax.certify.float64 import in_float64
from moejax.certify.measure import CANONICAL
from moejax.certify.oracle import balance as oracle_balance
from moejax.certify.oracle import bias as oracle_bias
from moejax.certify.oracle import routing as oracle
from moejax.data.batch import Batch
from moejax.model.transformer import Transformer
from moejax.moe.routing import Routing
from moejax.train.step import train_state as state

MEAN = 2e-6  # over 20 seeds the largest deviation is 0.7e-6: float32 against float64


def layers_line(plan: Plan) -> Iterator[Check]:
  """Checks line 9."""
  mean = Worst(
    "each term is the mean of its layers'",
    MEAN,
    "relative; the layers' own by the oracle, in float64",
  )
  apart = Worst(
    'two layers collapsed on opposite experts', MEAN, 'relative, of E/K; pooled they would score 1'
  )
  cfg, rows = tiny_config.base_config(), tiny.batch_of(plan)
  starts = {
    'random': tiny.start_state(plan, cfg),
    'collapsed': collapse(tiny.start_state(plan, cfg)),
  }
  for label, before in starts.items():
    result = tiny.take_step(plan, cfg, before, rows)
    routed = tiny.state_routing(plan, before, rows)
    num_layers = len(routed.logits)
    layers = [jax.tree.map(lambda a, i=i: a[i], routed) for i in range(num_layers)]
    for loss in tiny_config.loss_names():
      of_layers = np.mean([layer_loss(loss, layer, rows) for layer in layers])
      value = result.terms[f'balance/{loss}']
      mean.see(f'{loss}; {label}', (value - of_layers) / max(abs(of_layers), 1))
      if label == 'collapsed' and loss in CANONICAL:
        apart.see(loss, value / 2 - 1)  # E = 4, K = 2
  yield mean.check()
  yield apart.check()
  yield from check_other_layers(plan)


def check_other_layers(plan: Plan) -> Iterator[Check]:
  """Checks a model with dense layers among those with experts, two depths of prediction beside.

  After a dense layer come two turns of three layers, of which the first two have experts.
  """
  counted = Worst('layers with experts', 0, 'those of the stack, and each depth of prediction')
  mean = Worst('mean with multi-token prediction, without dense', MEAN, 'relative; float32')
  cfg = tiny_config.change(
    tiny_config.rich_config(), mtp_depth=2, num_layers=7, ffn_pattern=('moe', 'moe', 'dense')
  )
  rows, before = tiny.batch_of(plan), tiny.start_state(plan, cfg)
  result = tiny.take_step(plan, cfg, before, rows)

  def losses_of_layers(model: Transformer, bias: Array, rows: Batch) -> dict[str, Array]:
    return model(rows, bias, whole={}).aux.losses

  program = plan.program64(
    ('layers', cfg), lambda: in_float64(losses_of_layers, before.model, before.router.bias, rows)
  )
  for loss, of_layers in program(before.model, before.router.bias, rows).items():
    counted.see(loss, len(of_layers) - (4 + 2))
    wanted = of_layers.mean()
    value = result.terms[f'balance/{loss}']
    mean.see(loss, (value - wanted) / max(abs(wanted), 1))
  unlike = Worst('layers whose losses are alike', 0, 'each has parameters of its own')
  values = [v for v in program(before.model, before.router.bias, rows)['sequence']]
  unlike.see('sequence', len(values) - len(set(map(float, values))))
  load = np.asarray(result.metrics['load'])
  copies = int((rows.segment_ids > 0).sum()) * cfg.model.moe.router.top_k
  counted.see('copies in each layer', np.abs(load.sum(-1) - copies).max())
  own = Worst("tokens that leave a layer's own favourite", 0, 'each layer has a bias of its own')
  favourites = (np.arange(len(load)) + 1) % load.shape[-1]
  bias = np.zeros(load.shape, np.float32)
  bias[np.arange(len(load)), favourites] = 10
  biased = before._replace(router=before.router._replace(bias=jnp.asarray(bias)))
  taken = tiny.take_step(plan, cfg, biased, rows)
  favoured = np.asarray(taken.metrics['load'])
  tokens = copies // cfg.model.moe.router.top_k
  own.see('load', np.abs(favoured[np.arange(len(load)), favourites] - tokens).max())
  moved = Worst('router bias of every layer after a step', 1e-6, 'absolute; a step is 0.05')
  for layer, (old, new) in enumerate(zip(bias, np.asarray(taken.after.router.bias), strict=True)):
    rule = oracle_bias.COUNT_RULES[cfg.balance.bias_rule]
    wanted = rule(oracle_bias.BiasState(old, np.zeros_like(old)), favoured[layer], 0.05)
    moved.see(f'layer {layer}', np.abs(new - wanted.bias).max())
  for worst in (counted, mean, unlike, own, moved):
    yield worst.check()


def layer_loss(loss: str, routed: Routing, rows: Batch) -> float:
  """A layer's own loss, by the oracle, of its routing [B, S, ...]."""
  mask, experts = rows.segment_ids > 0, routed.logits.shape[-1]
  if loss == 'simbal':
    return oracle_balance.simbal(routed.router.astype(np.float64))
  if loss == 'importance':
    return oracle_balance.importance(routed.weights, routed.expert_ids, mask, experts)
  if loss == 'router_z':
    return oracle_balance.router_z(routed.logits, mask)
  assignment = 'first' if loss == 'gshard' else 'unbiased'
  chosen = oracle_balance.assignment_of(routed.logits, routed.expert_ids, 'softmax', assignment)
  sets = oracle_balance.sets_of(loss, rows.segment_ids, ep_groups=4)
  p = oracle.probabilities(routed.logits, 'softmax')
  return oracle_balance.mean_over_sets(oracle_balance.probability_losses(p, chosen, mask, sets))


def collapse(before: state.TrainState) -> state.TrainState:
  """A state whose two layers use opposite experts, with all of the probability.

  The first layer sends every token to experts 0 and 1, the second to 2 and 3.
  """
  model = jax.tree.map(lambda a: a, before.model)  # a copy: what is set below stays in it
  # A feature that all tokens have, and that no branch changes: routers look at nothing else.
  model.embed.table[...] = model.embed.table[...].at[:, 0].set(10.0)
  blocks = model.blocks
  for branch in (blocks.attention.out.w, blocks.moe.experts.down, blocks.moe.shared.down):
    branch[...] = jnp.zeros_like(branch[...])
  to_experts_LE = jnp.array([[20, 20, -20, -20], [-20, -20, 20, 20]], jnp.float32)
  router = jnp.zeros_like(model.blocks.moe.router[...])
  model.blocks.moe.router[...] = router.at[:, 0].set(to_experts_LE)
  return before._replace(model=model)
