"""Mistakes that a refactoring or an optimisation makes, each in a corner that few configs reach."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.data.batch import Batch
from moejax.model import layer_stack, transformer
from moejax.moe import bias_quantile
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.dispatch import dispatchers
from moejax.moe.dispatch.local_view import RoutedTokens
from moejax.moe.experts import blocked_ffn, grouped_ffn
from moejax.moe.experts.residuals import PreActivations
from moejax.moe.experts.sorted_copies import Copies, assigned_mask, expert_of_copies
from moejax.moe.experts.weights import Weights
from moejax.moe.layer import MoE
from moejax.moe.routing import Routing
from moejax.moe.selection import Tokens, jittered
from moejax.moe.token_sets import row_parts
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step import gradient_accumulation, gradient_interference, objective, train_step
from moejax.train.step.objective import Terms
from moejax.train.step.train_state import TrainState, spanning
from tests.support.mutants.patching import Mutant, Patch, change_row, wrap


def unweighted_bias_of_few_copies(patch: Patch) -> None:
  """The path for few copies, that of decoding, adds an expert's output bias without its weight."""
  forward = grouped_ffn.IMPLEMENTATIONS['gathered'].forward

  def unweighted(
    x: Array, copies: Copies, weights: Weights, *rest: object
  ) -> tuple[Array, PreActivations]:
    y, pre_activations = forward(x, copies, weights, *rest)
    if weights.biases.down is None:
      return y, pre_activations
    missing_N1 = jnp.where(assigned_mask(copies), 1 - copies.weights[:, None], 0).astype(x.dtype)
    bias_ND = weights.biases.down[expert_of_copies(copies)]
    return y.at[copies.tokens].add(missing_N1 * bias_ND), pre_activations

  change_row(patch, grouped_ffn.IMPLEMENTATIONS, 'gathered', forward=unweighted)


def gradient_of_the_last_block(patch: Patch) -> None:
  """An expert with more rows than a block gets the weight gradient of its last block alone."""
  block = blocked_ffn.Block

  def first_block(size: int, start: Array, owned: Array, is_first: bool) -> blocked_ffn.Block:
    del is_first
    return block(size, start, owned, is_first=True)

  patch.setattr(blocked_ffn, 'Block', first_block)


def jittered_experts(patch: Patch) -> None:
  """The jitter that is the router's goes into what experts, routed and shared, are given, too."""
  mixture = MoE.mixture

  def of_jittered(
    self: MoE, x: Array, routing: Routing, tokens: Tokens, *rest: object
  ) -> tuple[Array, Array]:
    noisy_x = jittered(x, tokens, self.cfg.router.jitter).astype(x.dtype)
    return mixture(self, noisy_x, routing, tokens, *rest)

  patch.setattr(MoE, 'mixture', of_jittered)


def counting_pass_without_noise(patch: Patch) -> None:
  """The pass that counts whole sets draws no noise: it counts a routing that is not trained."""

  def make(count: Callable) -> Callable:
    def changed(
      state: TrainState, parts: Batch, rows: Array, key: Array | None, cfg: ExperimentConfig
    ) -> Terms:
      del key
      return count(state, parts, rows, None, cfg)

    return changed

  wrap(patch, 'whole_set_counts', make, gradient_accumulation)


def layers_by_place_in_the_turn(patch: Patch) -> None:
  """What layers learnt is stacked by place in a scan's turn first, and so given to other layers."""

  def make(scan: Callable) -> Callable:
    def changed(run: layer_stack.LayerRun, *args: object, **named: object) -> tuple:
      x, caches, aux = scan(run, *args, **named)

      def by_place(a: Array) -> Array:
        in_turns = a.reshape(run.turns, a.shape[0] // run.turns, *a.shape[1:])
        return in_turns.swapaxes(0, 1).reshape(a.shape)

      return x, caches, jax.tree.map(by_place, aux)

    return changed

  wrap(patch, 'scan_run', make, layer_stack)


def quantile_without_groups(patch: Patch) -> None:
  """The quantile rule takes the (K+1)-th best of all experts, also of groups left out."""

  def above_the_line(choice: Array, expert_ids: Array) -> Array:
    best = jax.lax.top_k(choice, expert_ids.shape[-1] + 1)[0]
    return choice - best[..., -1:]

  patch.setattr(bias_quantile, 'above_the_line', above_the_line)


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


def detached_embeddings_ahead(patch: Patch) -> None:
  """Multi-token prediction sends no gradient to the embeddings of the tokens ahead."""

  def make(shifted: Callable) -> Callable:
    return lambda *args: jax.lax.stop_gradient(shifted(*args))

  wrap(patch, 'shifted', make, transformer)


def lagged_counts_of_another_set(patch: Patch) -> None:
  """Lagged counts are dealt to micro-batches in turn: some get those of another group's set."""

  def make(count: Callable) -> Callable:
    def changed(state: TrainState, *rest: object) -> Terms:
      cfg = rest[-1]
      if cfg.balance.accumulation != 'lagged':
        return count(state, *rest)
      spans = spanning(cfg).items()
      return {name: jnp.tile(state.lagged[name], (n, 1, 1)) for name, n in spans}

    return changed

  wrap(patch, 'whole_set_counts', make, gradient_accumulation)


def skipped_step_leaves_its_counts(patch: Patch) -> None:
  """A skipped step hands its counts on to the lagged losses of the next."""
  counted: Terms = {}
  learned = train_step.Learned

  def make(gradients: Callable) -> Callable:
    def changed(*args: object) -> gradient_accumulation.Gradients:
      found = gradients(*args)
      counted.update(found.seen)
      return found

    return changed

  def with_counts(*of_skip: object, **of_learn: object) -> train_step.Learned:
    # A step names what it learned; what a skipped one keeps is told by place.
    made = learned(*of_skip, **of_learn)
    return made._replace(lagged={name: counted[name] for name in made.lagged})

  wrap(patch, 'gradients', make, train_step)
  patch.setattr(train_step, 'Learned', with_counts)


def dropped_once_a_tensor_device(patch: Patch) -> None:
  """Each device along `tensor`, of which all see the same tokens, counts their drops anew."""

  def make(expert_parallel: Callable) -> Callable:
    def changed(*args: object) -> Callable:
      run_on_mesh = expert_parallel(*args)

      def counted(tokens: RoutedTokens, experts: Weights) -> tuple[Array, Array]:
        y, dropped = run_on_mesh(tokens, experts)
        return y, dropped * jax.sharding.get_abstract_mesh().shape['tensor']

      return counted

    return changed

  wrap(patch, 'expert_parallel', make, dispatchers)


ADVERSARY_FOUR = {
  'bias of few copies without its weight': Mutant(unweighted_bias_of_few_copies, 'invariance'),
  'gradient of the last block alone': Mutant(gradient_of_the_last_block, 'large'),
  'jitter in what experts are given': Mutant(jittered_experts, 'invariance'),
  'counting pass without noise': Mutant(counting_pass_without_noise, 'invariance'),
  'layers in the order of places in a turn': Mutant(layers_by_place_in_the_turn, 'layers'),
  'quantile rule that knows no groups': Mutant(quantile_without_groups, 'oracle'),
  'MTP coefficient of the first step': Mutant(mtp_coefficient_of_the_first_step, 'logged'),
  'losses of variation shared by tokens': Mutant(variation_shared_by_tokens, 'invariance'),
  'embeddings ahead detached': Mutant(detached_embeddings_ahead, 'logged'),
  'lagged counts of another set': Mutant(lagged_counts_of_another_set, 'metrics'),
  'counts of a skipped step': Mutant(skipped_step_leaves_its_counts, 'trained'),
  'drops once a tensor device': Mutant(dropped_once_a_tensor_device, 'large'),
}
