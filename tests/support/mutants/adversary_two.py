"""Twelve more, drawn by someone who knew the lines' names, and not what any of them compares.

Each is wrong for some configs alone: two depths of multi-token prediction, a mask of the loss,
experts over several devices, what is not trained.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.data.batch import Batch
from moejax.model import transformer
from moejax.moe import layer, token_sets
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.bias import BiasState
from moejax.moe.dispatch import exchange
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.dispatch.local_view import LocalView
from moejax.moe.experts import gathered_ffn
from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.weights import Weights
from moejax.moe.layer import MoE
from moejax.moe.routing import Routing
from moejax.moe.selection import Tokens, jittered
from moejax.moe.token_sets import Scope
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step import gradient_accumulation, gradient_interference, objective, train_step
from moejax.train.step.train_state import TrainState
from tests.support.mutants.patching import Mutant, Patch, change_row, change_step, wrap


def shares_of_the_loss_mask(patch: Patch) -> None:
  """Micro-batches weigh by the tokens that are predicted, not by those that are routed."""

  def make(part_scales: Callable) -> Callable:
    def changed(parts: Batch, depth: int, cfg: ExperimentConfig) -> objective.Scales:
      shares = {}
      for name, scope in cfg.balance.scopes(cfg.batch_size, cfg.micro_batches).items():
        shares[name] = objective.micro_batch_shares(name, parts.mask, parts.segment_ids, scope)
      return part_scales(parts, depth, cfg)._replace(balance=shares)

    return changed

  wrap(patch, 'part_scales', make, objective, gradient_accumulation, gradient_interference)


def mtp_bias_stands(patch: Patch) -> None:
  """The bias rule does not move the biases of multi-token prediction."""

  def make(move: Callable) -> Callable:
    def changed(router: BiasState, seen: Array, step: Array, cfg: ExperimentConfig) -> BiasState:
      layers = len(router.bias) - cfg.model.mtp_depth
      moved = move(router, seen, step, cfg)
      return jax.tree.map(lambda new, old: old.at[:layers].set(new[:layers]), moved, router)

    return changed

  wrap(patch, 'update_router_bias', make, train_step)


def bias_of_the_last_depth(patch: Patch) -> None:
  """Every depth of multi-token prediction takes what belongs to the last one: bias, counts, key."""

  def make(layer_of: Callable) -> Callable:
    return lambda tree, i: layer_of(tree, -1 if isinstance(tree, transformer.PerLayer) else i)

  wrap(patch, 'layer_of', make, transformer)


def weights_of_own_experts(patch: Patch) -> None:
  """Gathered tokens: a combine weight has a gradient only of experts on its token's device."""

  def changed(local: exchange.LocalDispatcher, view: LocalView) -> tuple[Array, Array]:
    own = len(view.tokens.x)

    def run(group: LocalView) -> tuple[Array, Array]:
      weights = group.tokens.weights
      is_own = jnp.arange(len(weights)) // own == jax.lax.axis_index('expert')
      weights = jnp.where(is_own[:, None], weights, jax.lax.stop_gradient(weights))
      return local(group._replace(tokens=group.tokens._replace(weights=weights)))

    return gather(run, view)

  gather = exchange.EXCHANGES['gather']
  patch.setitem(exchange.EXCHANGES, 'gather', changed)


def output_bias_by_each_shard(patch: Patch) -> None:
  """Devices along `tensor`, whose outputs are summed, each add the experts' output bias."""

  def make(gather_local_experts: Callable) -> Callable:
    def changed(experts: Weights, specs: Weights) -> Weights:
      found, down = gather_local_experts(experts, specs), experts.biases.down
      if down is None:
        return found
      down = jax.lax.pcast(down, ('data', 'fsdp', 'tensor'), to='varying')
      return found._replace(biases=found.biases._replace(down=down))

    return changed

  wrap(patch, 'gather_local_experts', make, exchange)


def unassigned_gathered(patch: Patch) -> None:
  """Where experts are gathered by copy, unassigned copies get the last expert's output."""
  patch.setattr(
    gathered_ffn, 'assigned_mask', lambda copies: jnp.ones((len(copies.tokens), 1), jnp.bool_)
  )


def clamp_passes_gradient(patch: Patch) -> None:
  """The clamps of gpt-oss' activation pass the gradient straight through."""

  def held(x: Array, low: float, high: float) -> Array:
    return x + jax.lax.stop_gradient(jnp.clip(x, low, high) - x)

  def activation(gate: Array, up: Array, limit: float) -> Array:
    gate, up = held(gate, -jnp.inf, limit), held(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)

  patch.setitem(
    ACTIVATIONS, 'clamped_swiglu', lambda limit: functools.partial(activation, limit=limit)
  )


def partition_in_turn(patch: Patch) -> None:
  """Across micro-batches f is of groups that experts are dealt to in turn, P of neighbours."""

  def make(value: Callable) -> Callable:
    def changed(routing: Routing, mask: Array, segments: Array, scope: Scope = Scope()) -> Array:
      if scope.whole is not None and scope.partition:
        dealt = scope.whole.reshape(-1, scope.partition).T.reshape(-1)
        scope = scope._replace(whole=dealt)
      return value(routing, mask, segments, scope)

    return changed

  for name in ('ep_group', 'global_batch'):
    change_row(patch, BALANCE_LOSSES, name, value=make(BALANCE_LOSSES[name].value))


def experts_see_jitter(patch: Patch) -> None:
  """The jitter of the router's input is on that of the experts, too, as if made in place."""
  mixture = MoE.mixture

  def changed(
    self: MoE, x: Array, routing: Routing, tokens: Tokens, dispatch: DispatchConfig
  ) -> tuple[Array, Array]:
    x = jittered(x, tokens, self.cfg.router.jitter).astype(x.dtype)
    return mixture(self, x, routing, tokens, dispatch)

  patch.setattr(MoE, 'mixture', changed)


def buffers_in_evaluation(patch: Patch) -> None:
  """Full experts drop copies in evaluation and decoding as they do in training."""
  patch.setattr(layer, 'dropless', lambda cfg: cfg)


def spike_leaves_the_trend(patch: Patch) -> None:
  """A spike that is skipped does not move the trend: a level that stays is never let in."""

  def change(before: TrainState, after: TrainState, metrics: dict) -> tuple[TrainState, dict]:
    stability = jax.tree.map(
      lambda old, new: jnp.where(metrics['skipped'], old, new), before.stability, after.stability
    )
    return after._replace(stability=stability), metrics

  change_step(patch, change)


def large_ids_clipped(patch: Patch) -> None:
  """Documents whose ids are past the length of the row are taken for one."""
  patch.setattr(
    token_sets, 'ids_in_range', lambda segments: jnp.clip(segments, 0, segments.shape[1])
  )


ADVERSARY_TWO: dict[str, Mutant] = {
  'weights of own experts': Mutant(weights_of_own_experts, 'invariance'),
  'unassigned copies gathered': Mutant(unassigned_gathered, 'large'),
  'shares of the loss mask': Mutant(shares_of_the_loss_mask, 'invariance'),
  'MTP bias stands': Mutant(mtp_bias_stands, 'layers'),
  'bias of the last depth': Mutant(bias_of_the_last_depth, 'layers'),
  'output bias by each tensor shard': Mutant(output_bias_by_each_shard, 'large'),
  'clamp passes the gradient': Mutant(clamp_passes_gradient, 'large'),
  'partition in turn': Mutant(partition_in_turn, 'invariance'),
  'experts see the jitter': Mutant(experts_see_jitter, 'invariance'),
  'buffers in evaluation': Mutant(buffers_in_evaluation, 'metrics'),
  'spike leaves the trend': Mutant(spike_leaves_the_trend, 'trained'),
  'large ids clipped': Mutant(large_ids_clipped, 'padding'),
}
