"""Sizes: sort keys, blocks of rows, buffers, counts. And decoding."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from moejax.certify import large_numbers
from moejax.inference import decode
from moejax.model.transformer import Output, Transformer
from moejax.moe import bias
from moejax.moe.dispatch import buffers, dispatchers, expert_rows
from moejax.moe.experts import blocked_ffn, sorted_copies
from moejax.moe.experts.grouped_ffn import IMPLEMENTATIONS
from moejax.moe.experts.sorted_copies import Copies
from tests.support.mutants.patching import Mutant, Patch, change_row, wrap


def packed_keys(patch: Patch, limit: int) -> None:
  """Sort keys packed up to a limit of their own."""

  def sort(expert_ids: Array, weights: Array, num_experts: int) -> Copies:
    count, top_k = expert_ids.size, expert_ids.shape[1]
    ids = sorted_copies.clip_unassigned(expert_ids, num_experts).reshape(-1)
    if (num_experts + 1) * count >= limit:
      order = jnp.argsort(ids, stable=True).astype(jnp.int32)
    else:
      order = jnp.sort(ids * count + jnp.arange(count, dtype=jnp.int32)) % count
    load = jnp.bincount(ids, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    return Copies(order // top_k, weights.reshape(-1)[order], load)

  for module in (sorted_copies, expert_rows, large_numbers):
    patch.setattr(module, 'sort_copies', sort)


def keys_without_limit(patch: Patch) -> None:
  """Sort keys are packed however large they are."""
  packed_keys(patch, 2**62)


def keys_of_experts_alone(patch: Patch) -> None:
  """The limit of packed keys forgets that the unassigned have keys, too."""
  packed_keys(patch, 2**31 + 2 * 60000)


def change_block(patch: Patch, **change: Callable[[blocked_ffn.Block], object]) -> None:
  """Blocks with other fields, each made of the right block."""
  block = blocked_ffn.Block

  def make(*args: object, **named: object) -> blocked_ffn.Block:
    right = block(*args, **named)
    return right._replace(**{name: of(right) for name, of in change.items()})

  patch.setattr(blocked_ffn, 'Block', make)


def blocks_overwrite(patch: Patch) -> None:
  """Each whole block overwrites the weight gradient of those before it."""
  change_block(patch, is_first=lambda block: True)


def last_row_of_a_full_block(patch: Patch) -> None:
  """A block of 256 rows leaves out its last."""
  change_block(patch, owned=lambda block: block.owned & (jnp.arange(block.size) < 255))


def rows_of_the_next_expert(patch: Patch) -> None:
  """A rest works on all rows of its block, whoever owns them."""
  change_block(patch, owned=lambda block: jnp.ones_like(block.owned))


def scale_dropped_in_backward(patch: Patch) -> None:
  """The gradient to the input leaves out the copies' weights."""

  def make(backward: Callable) -> Callable:
    def changed(residuals: object, *rest: object) -> object:
      copies = residuals.copies
      plain = copies._replace(weights=jnp.ones_like(copies.weights))
      found = backward(residuals, *rest)
      return found._replace(x=backward(residuals._replace(copies=plain), *rest).x)

    return changed

  change_implementation(patch, backward=make)


def copy_weights_of_first_rows(patch: Patch) -> None:
  """Past the first 256 copies, their weights have no gradient."""

  def make(backward: Callable) -> Callable:
    def changed(*args: object) -> object:
      found = backward(*args)
      early = jnp.arange(found.copy_weights.size) < 256
      return found._replace(copy_weights=jnp.where(early, found.copy_weights, 0))

    return changed

  change_implementation(patch, backward=make)


def change_implementation(patch: Patch, **changes: Callable[[Callable], Callable]) -> None:
  """The blocked implementation of the grouped FFN with another pass."""
  rows = IMPLEMENTATIONS
  made = {name: make(getattr(rows['blocked'], name)) for name, make in changes.items()}
  change_row(patch, rows, 'blocked', **made)


def blocks_summed_in_bfloat16(patch: Patch) -> None:
  """Weight gradients of blocks are rounded to bfloat16 before they are added up."""

  def make(outer: Callable) -> Callable:
    return lambda a, b: outer(a, b).astype(jnp.bfloat16).astype(jnp.float32)

  wrap(patch, 'sum_outer', make, blocked_ffn)


def padding_takes_room(patch: Patch) -> None:
  """Padding takes room in the last expert's buffer."""

  def clipped(expert_ids: Array, num_experts: int) -> Array:
    return jnp.minimum(expert_ids, num_experts - 1)

  patch.setattr(buffers, 'clip_unassigned', clipped)


def capacity_rounded_down(patch: Patch) -> None:
  """Buffers have floor and not ceil of their rows."""

  def floor(num_copies: int, num_experts: int, capacity_factor: float) -> int:
    return min(num_copies, max(1, math.floor(num_copies / num_experts * capacity_factor)))

  for module in (buffers, dispatchers, large_numbers):
    patch.setattr(module, 'capacity', floor)


def change_queue(patch: Patch, change: Callable[..., object]) -> None:
  """Another queue for room: (queue_copies, tokens, num_experts, drop_by) -> Queue."""

  def make(queue: Callable) -> Callable:
    return lambda *args: change(queue, *args)

  wrap(patch, 'queue_copies', make, buffers)


def worst_scores_first(patch: Patch) -> None:
  """A full expert keeps the copies with the lowest scores."""
  change_queue(
    patch, lambda queue, tokens, *rest: queue(tokens._replace(scores=-tokens.scores), *rest)
  )


def always_by_position(patch: Patch) -> None:
  """A full expert always drops the last copies."""
  change_queue(patch, lambda queue, tokens, n, drop_by: queue(tokens, n, 'position'))


def last_first(patch: Patch) -> None:
  """A full expert drops the first copies, by position."""

  def change(queue: Callable, tokens: object, n: int, drop_by: str) -> object:
    if drop_by == 'probs':
      return queue(tokens, n, drop_by)
    place = jnp.arange(tokens.scores.size, dtype=jnp.float32).reshape(tokens.scores.shape)
    return queue(tokens._replace(scores=place), n, 'probs')

  change_queue(patch, change)


def one_place_less(patch: Patch) -> None:
  """The last place of each buffer stays empty."""
  change_queue(
    patch, lambda queue, *args: (lambda found: found._replace(rank=found.rank + 1))(queue(*args))
  )


def counts_in_float32(patch: Patch) -> None:
  """A bias rule counts in float32, which loses ones from 2^24 on."""
  observe = bias.BIAS_RULES['sign'].observe
  change_row(
    patch,
    bias.BIAS_RULES,
    'sign',
    observe=lambda *args: observe(*args).astype(jnp.float32),
    update=lambda state, seen, rate, top_k: state._replace(
      bias=state.bias + rate * jnp.sign(seen.mean() - seen.astype(jnp.float32))
    ),
  )


def no_bias_with_a_cache(patch: Patch) -> None:
  """Decoding leaves out the router bias."""
  call = Transformer.__call__

  def changed(
    self: Transformer, batch: object, router: Array, cache: object = None, **named: object
  ) -> Output:
    return call(self, batch, 0 * router if cache else router, cache, **named)

  patch.setattr(Transformer, '__call__', changed)


def drafts_not_truncated(patch: Patch) -> None:
  """The cache keeps a draft that was refused."""

  def make(truncate: Callable) -> Callable:
    return lambda cache, length: truncate(cache, length + 1)

  wrap(patch, 'truncate_cache', make, decode)


def places_off_by_one(patch: Patch) -> None:
  """Tokens are drawn with the key of the place before."""

  def make(draw: Callable) -> Callable:
    return lambda logits, places, params: draw(logits, places - 1, params)

  wrap(patch, 'draw', make, decode)


def every_draft_accepted(patch: Patch) -> None:
  """Drafts are taken for what was drawn."""

  def make(accept: Callable) -> Callable:
    def changed(
      model: object, router: Array, state: object, verified: object, alive: Array
    ) -> object:
      taken = jnp.full_like(verified.accepted, verified.following.shape[1] - 1)
      return accept(model, router, state, verified._replace(accepted=taken), alive)

    return changed

  wrap(patch, 'accept_drafts', make, decode)


def positions_begin_anew(patch: Patch) -> None:
  """Each decoded token stands at the first position."""

  def make(batch_of: Callable) -> Callable:
    def changed(tokens: Array, first: Array, starts: Array, alive: Array) -> object:
      found = batch_of(tokens, first, starts, alive)
      is_step = tokens.shape[1] < 3
      return found._replace(positions=0 * found.positions) if is_step else found

    return changed

  wrap(patch, 'decoding_batch', make, decode)


EXPERTS: dict[str, Mutant] = {
  'packed keys without limit': Mutant(keys_without_limit, 'large'),
  'packed keys a little too far': Mutant(keys_of_experts_alone, 'large'),
  'blocks overwrite a gradient': Mutant(blocks_overwrite, 'large'),
  'last row of a full block': Mutant(last_row_of_a_full_block, 'large'),
  'rows of the next expert': Mutant(rows_of_the_next_expert, 'large'),
  'scale dropped in the backward pass': Mutant(scale_dropped_in_backward, 'large'),
  'weights of the first 256 copies': Mutant(copy_weights_of_first_rows, 'large'),
  'blocks summed in bfloat16': Mutant(blocks_summed_in_bfloat16, 'large'),
  'padding takes room': Mutant(padding_takes_room, 'large'),
  'capacity rounded down': Mutant(capacity_rounded_down, 'large'),
  'worst scores first': Mutant(worst_scores_first, 'large'),
  'always dropped by position': Mutant(always_by_position, 'large'),
  'last copies first': Mutant(last_first, 'causality'),
  'one place less': Mutant(one_place_less, 'large'),
  'counts in float32': Mutant(counts_in_float32, 'large'),
  'no bias with a cache': Mutant(no_bias_with_a_cache, 'decoding'),
  'drafts not truncated': Mutant(drafts_not_truncated, 'decoding'),
  'drawn for the place before': Mutant(places_off_by_one, 'decoding'),
  'every draft accepted': Mutant(every_draft_accepted, 'decoding'),
  'positions begin anew': Mutant(positions_begin_anew, 'decoding'),
}
