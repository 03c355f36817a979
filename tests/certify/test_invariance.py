"""The batches and the variants that line 3 compares."""

import numpy as np

from moejax.certify import tiny_config
from moejax.certify import tiny_model as tiny
from moejax.certify.cases import Plan
from moejax.certify.invariance import DENSE, other_router_name, router_variants, variants
from moejax.certify.tiny_batches import documents_batch, widened_batch
from moejax.data.batch import IGNORE
from moejax.moe.dispatch.dispatchers import DISPATCHERS
from moejax.moe.routing import RouterConfig
from moejax.moe.selection import SELECTIONS


def test_two_documents_are_the_same_tokens_in_one_row_or_two() -> None:
  one, two = documents_batch((5, 7), ()), documents_batch((5,), (7,))
  for packed in (one, two):
    counted = packed.segment_ids > 0
    assert packed.tokens[counted].tolist() == list(range(1, 13))
    assert packed.positions[counted].tolist() == [*range(5), *range(7)]
    # Each document's last target is its first token: no target is of another document.
    assert packed.targets[counted].tolist() == [2, 3, 4, 5, 1, *range(7, 13), 6]
    assert (packed.targets[~counted] == IGNORE).all()
  assert one.segment_ids[0].tolist() == [1] * 5 + [2] * 7
  assert (two.segment_ids > 0).sum(1).tolist() == [5, 7]


def test_the_wide_batch_is_the_batch_and_padding() -> None:
  narrow = tiny.batch_of(Plan(quick=True))
  wide = widened_batch(narrow, 3)
  assert wide.tokens.shape == (tiny_config.ROWS, tiny_config.LENGTH + 3)
  assert np.array_equal(wide.tokens[:, : tiny_config.LENGTH], narrow.tokens)
  assert not wide.segment_ids[:, tiny_config.LENGTH :].any()


def test_the_whole_line_takes_every_variant_of_the_quick_one_and_more() -> None:
  quick = [variant.name for variant in variants(Plan(quick=True))]
  whole = [variant.name for variant in variants(Plan(quick=False))]
  assert whole[: len(quick)] == quick and len(set(whole)) == len(whole) > len(quick)
  for name in set(DISPATCHERS) - {DENSE}:
    assert any(variant.startswith(name) for variant in quick)


def test_every_selection_has_a_variant_with_the_losses_that_can_train_it() -> None:
  """The quick certificate makes none of them, so that one that is refused would not show there."""
  losses = {v.name: v.base.balance.active() for v in router_variants()}
  assert set(SELECTIONS) - {'top_k'} < losses.keys()
  assert 'gshard' in losses['hash'] and 'gshard' not in losses['uniform']
  assert all('global_batch' in names for names in losses.values())


def test_a_batch_in_which_experts_find_two_tokens_alike_is_not_taken() -> None:
  """Of seed 1's first batch a sum in another order decides which of two tokens an expert takes."""
  plan = Plan(quick=True, seed=1)
  cfg = next(v.base for v in router_variants() if v.name == 'expert_choice')
  before = tiny.start_state(plan, cfg)
  assert not tiny.choice_is_clear(plan, before, tiny.batch((1, 0)))
  assert tiny.choice_is_clear(plan, before, tiny.batch_of_router(plan, cfg))


def test_a_router_is_named_by_its_selection_or_randomness_or_score() -> None:
  assert other_router_name(RouterConfig(4, 2, selection='hash')) == 'hash'
  assert other_router_name(RouterConfig(4, 2, jitter=0.1)) == 'random'
  assert other_router_name(RouterConfig(4, 2, 'sigmoid')) == 'sigmoid'
