"""Mistakes of two more adversaries: each is right by default, and wrong where two options meet."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.data.batch import Batch
from moejax.model import kv_cache, layer_runs, layer_stack, transformer
from moejax.moe import bias, bias_quantile, layer, routing
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.bias_quantile import BINS, EDGES
from moejax.moe.dispatch import dispatchers
from moejax.moe.experts.grouped_ffn import IMPLEMENTATIONS
from moejax.moe.experts.residuals import PreActivations
from moejax.moe.experts.sorted_copies import Copies, assigned_mask, expert_of_copies
from moejax.moe.experts.weights import Weights
from moejax.moe.token_sets import row_parts
from moejax.sharding.params import is_param
from moejax.train import optimizer
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step import gradient_accumulation, gradient_interference, objective, train_step
from moejax.train.step.objective import Terms
from moejax.train.step.train_state import TrainState, spanning
from tests.support.mutants.patching import Mutant, Patch, change_row, wrap


def embedding_ahead_detached(patch: Patch) -> None:
  """The embedding gets no gradient from the tokens ahead that multi-token prediction reads."""

  def make(shifted: Callable) -> Callable:
    def changed(embedded: Array, batch: Batch, by: int) -> Array:
      return shifted(jax.lax.stop_gradient(embedded), batch, by)

    return changed

  wrap(patch, 'shifted', make, transformer)


def ahead_across_documents(patch: Patch) -> None:
  """The last tokens of a document are shown the next document's first by multi-token prediction.

  No loss of predictions sees it, since nothing is to be predicted there; the router does.
  """

  def shifted(embedded: Array, batch: Batch, by: int) -> Array:
    later = jnp.pad(embedded[:, by:], [(0, 0), (0, by), (0, 0)])
    return jnp.where((batch.segment_ids > 0)[..., None], later, 0)

  patch.setattr(transformer, 'shifted', shifted)


def shared_gate_detached(patch: Patch) -> None:
  """The gate of shared experts passes no gradient on to the residual."""

  def make(router_logits: Callable) -> Callable:
    def changed(x: Array, w: Array) -> Array:
      return router_logits(jax.lax.stop_gradient(x) if w.shape[1] == 1 else x, w)

    return changed

  wrap(patch, 'router_logits', make, layer)


def biases_decay(patch: Patch) -> None:
  """Weight decay spares the scales of norms alone: biases, all that route among them, decay."""

  def decay_mask(params: object) -> object:
    def decays(keys: tuple, _: object) -> bool:
      return not jax.tree_util.keystr(keys, simple=True, separator='/').endswith('scale')

    return jax.tree_util.tree_map_with_path(decays, params, is_leaf=is_param)

  patch.setattr(optimizer, 'decay_mask', decay_mask)


def schedules_by_updates(patch: Patch) -> None:
  """Coefficients are read at the optimiser's count, which stands still where a step is skipped."""

  def make(gradients: Callable) -> Callable:
    def changed(state: TrainState, *rest: object) -> gradient_accumulation.Gradients:
      updates = optimizer.updates_made(state.opt_state)
      return gradients(state._replace(step=updates), *rest)

    return changed

  wrap(patch, 'gradients', make, train_step)


def drops_of_all_tensor_shards(patch: Patch) -> None:
  """Dropped copies are added up over `tensor`, too, whose devices all drop the same ones."""

  def make(expert_parallel: Callable) -> Callable:
    def changed(run: Callable, specs: object) -> Callable:
      def run_and_count(*args: object) -> tuple[Array, Array]:
        y, dropped = run(*args)
        return y, dropped * jax.lax.axis_size('tensor')

      return expert_parallel(run_and_count, specs)

    return changed

  wrap(patch, 'expert_parallel', make, dispatchers)


def quantile_overflows(patch: Patch) -> None:
  """The quantile's rank is tokens times (E - K) over E: past int32 for millions of tokens."""

  def quantile(counts: Array, top_k: int) -> Array:
    num_experts = counts.shape[0]
    below, part = jnp.divmod(counts[0].sum() * (num_experts - top_k), num_experts)
    reached = jnp.cumsum(counts, axis=-1)

    def within(bins: Array) -> Array:
      i = jnp.minimum(bins, BINS - 1)[:, None]
      inside = jnp.maximum(jnp.take_along_axis(counts, i, axis=-1), 1)
      before = jnp.take_along_axis(reached, i, axis=-1) - inside
      share = jnp.clip((below - before + part / num_experts) / inside, 0.0, 1.0)
      edges = jnp.asarray(EDGES)
      return (edges[i] + share * (edges[i + 1] - edges[i]))[:, 0]

    first = (reached < below + (part > 0)).sum(-1)
    last = (reached <= below).sum(-1)
    return 0.5 * (within(first) + within(last))

  for module in (bias_quantile, bias):
    patch.setattr(module, 'quantile', quantile)


def quantile_line_over_all_groups(patch: Patch) -> None:
  """The quantile rule's line is the (K+1)-th largest choice, whichever groups a token may use."""

  def above_the_line(choice: Array, expert_ids: Array) -> Array:
    # By min, as elsewhere: a slice would be sorted.
    a = jax.lax.top_k(choice, expert_ids.shape[-1] + 1)[0].min(-1, keepdims=True)
    return choice - a

  patch.setattr(bias_quantile, 'above_the_line', above_the_line)


def ring_of_one_window(patch: Patch) -> None:
  """A ring has room for its window alone: enough for one token at a time, not for a chunk."""

  def make(empty_cache: Callable) -> Callable:
    def changed(
      layers: int, batch: int, length: int, cfg: object, window: int, dtype: jnp.dtype
    ) -> kv_cache.KVCache:
      room = min(length, window) if window else length
      return empty_cache(layers, batch, room, cfg, window, dtype)

    return changed

  wrap(patch, 'empty_cache', make, kv_cache, transformer)


def softmax_after_top_k_of_scores(patch: Patch) -> None:
  """Softmax after top-k is of the scores' logarithms, which is the same for softmax scores only."""
  patch.setitem(routing.WEIGHTS, 'softmax', routing.WEIGHTS['scores'])


def layers_of_turns_transposed(patch: Patch) -> None:
  """What the layers of a turn learnt is joined by their place in the turn, not by depth."""

  def make(scan_run: Callable) -> Callable:
    def changed(run: layer_runs.LayerRun, *args: object, **named: object) -> tuple:
      x, caches, aux = scan_run(run, *args, **named)
      per_turn = run.layers_per_turn.get('blocks', 1)

      def joined(a: Array) -> Array:
        turns = a.reshape(-1, per_turn, *a.shape[1:])
        return turns.swapaxes(0, 1).reshape(a.shape)

      return x, caches, jax.tree.map(joined, aux)

    return changed

  wrap(patch, 'scan_run', make, layer_stack)


def lagged_sets_in_turns(patch: Patch) -> None:
  """Micro-batches take the lagged counts of sets in turns, where neighbours share a set."""

  def make(whole_set_counts: Callable) -> Callable:
    def changed(state: TrainState, *rest: object) -> Terms:
      cfg = rest[-1]
      if cfg.balance.accumulation != 'lagged':
        return whole_set_counts(state, *rest)
      return {n: jnp.tile(state.lagged[n], (k, 1, 1)) for n, k in spanning(cfg).items()}

    return changed

  wrap(patch, 'whole_set_counts', make, gradient_accumulation)


def unweighted_bias_of_few_copies(patch: Patch) -> None:
  """The path for few copies, that of decoding, adds an expert's output bias without its weight."""
  forward = IMPLEMENTATIONS['gathered'].forward

  def unweighted(
    x: Array, copies: Copies, weights: Weights, *rest: object
  ) -> tuple[Array, PreActivations]:
    y, pre_activations = forward(x, copies, weights, *rest)
    if weights.biases.down is None:
      return y, pre_activations
    missing_N1 = jnp.where(assigned_mask(copies), 1 - copies.weights[:, None], 0).astype(x.dtype)
    bias_ND = weights.biases.down[expert_of_copies(copies)]
    return y.at[copies.tokens].add(missing_N1 * bias_ND), pre_activations

  change_row(patch, IMPLEMENTATIONS, 'gathered', forward=unweighted)


def mtp_coefficient_of_the_first_step(patch: Patch) -> None:
  """The schedule of multi-token prediction's coefficient is read once, at the first step."""

  def make(coefficients: Callable) -> Callable:
    def changed(cfg: ExperimentConfig, step: Array) -> Terms:
      at_first = coefficients(cfg, jnp.zeros_like(step))
      return coefficients(cfg, step) | {'mtp_loss': at_first['mtp_loss']}

    return changed

  wrap(patch, 'coefficients', make, objective, gradient_accumulation, gradient_interference)


def variation_shared_by_tokens(patch: Patch) -> None:
  """Micro-batches share losses of variation by tokens: padding then changes only the gradient."""
  for name in ('importance', 'load'):
    change_row(patch, BALANCE_LOSSES, name, parts=row_parts)


ADVERSARY_THREE: dict[str, Mutant] = {
  'documents run on ahead': Mutant(ahead_across_documents, 'invariance'),
  'biases decay': Mutant(biases_decay, 'trained'),
  'drops of all tensor shards': Mutant(drops_of_all_tensor_shards, 'large'),
  'embedding ahead detached': Mutant(embedding_ahead_detached, 'logged'),
  'lagged sets in turns': Mutant(lagged_sets_in_turns, 'metrics'),
  'layers of turns transposed': Mutant(layers_of_turns_transposed, 'layers'),
  'quantile line over all groups': Mutant(quantile_line_over_all_groups, 'oracle'),
  'quantile overflows': Mutant(quantile_overflows, 'large'),
  'ring of one window': Mutant(ring_of_one_window, 'decoding'),
  'schedules by updates': Mutant(schedules_by_updates, 'logged'),
  'shared gate detached': Mutant(shared_gate_detached, 'logged'),
  'softmax of the scores': Mutant(softmax_after_top_k_of_scores, 'oracle'),
  'bias of few copies without its weight': Mutant(unweighted_bias_of_few_copies, 'large'),
  'MTP coefficient of the first step': Mutant(mtp_coefficient_of_the_first_step, 'logged'),
  'losses of variation shared by tokens': Mutant(variation_shared_by_tokens, 'invariance'),
}
