"""Line 12: decoding is the forward pass, for every router that a later token cannot change.

  a text -> one forward pass | a cache that is filled piece by piece -> logits of every place
  prompts -> prefill, steps that verify drafts -> a text | what the forward pass draws after each
  of its tokens

Letters: B batch, P prompt, S sequence, V vocab, E experts, L MoE layers, G drafts.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.certify import tiny_model as tiny
from moejax.certify.cases import Plan, router_name
from moejax.certify.checks import Check, Worst
from moejax.config import ConfigError
from moejax.inference.decode import Decoding, decoding_batch, prefill, step
from moejax.inference.draw import SamplingParams, draw
from moejax.inference.sampling import SampleConfig, drafts_per_step
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.model.transformer import Transformer, empty_caches
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import SCORE_FNS, RouterConfig
from moejax.moe.selection import SELECTIONS

ROWS, PROMPT, LENGTH = 3, 4, 14
VOCAB, LAYERS, EXPERTS = 8, 2, 4
STARTS = np.array([0, 2, 3], np.int32)  # rows are padded on the left, up to a last token
STEPS = 8  # of one or two tokens each
# Of logits of size 1: sums of float32 in another order. Another expert moves them by 1e-2.
SAME = 1e-4


def routers(plan: Plan) -> Iterator[RouterConfig]:
  """Every selection and score function, groups, and what is random in training alone."""
  scores, base = sorted(SCORE_FNS), RouterConfig(EXPERTS, 2)
  for i, name in enumerate(sorted(SELECTIONS)):
    for score_fn in [scores[i % len(scores)]] if plan.quick else scores:
      yield dataclasses.replace(base, selection=name, score_fn=score_fn)
  if not plan.quick:
    yield dataclasses.replace(base, score_fn='sigmoid', num_groups=2)
    yield dataclasses.replace(base, jitter=0.1, noisy=True, expert_dropout=0.25)
    yield dataclasses.replace(base, random_second=True)


def drafting_model(router: RouterConfig) -> ModelConfig:
  """A model that drafts one token, whose first layer sees fewer tokens than a prompt has."""
  return ModelConfig(
    vocab_size=VOCAB,
    d_model=16,
    num_layers=LAYERS,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, d_head=8, windows=(PROMPT - 1, 0)),
    moe=MoEConfig(router, DispatchConfig('dense_matmul'), d_expert=8),
    mtp_depth=1,
  )


class Decoder(NamedTuple):
  """A model, and the bias of its routers."""

  model: Transformer
  bias: np.ndarray  # [L + 1, E] f32


def make_decoder(plan: Plan, router: RouterConfig) -> Decoder:
  """A model of the plan's seed, with a router bias where the selection takes one."""
  cfg = drafting_model(router)
  shapes = jax.eval_shape(lambda: Transformer(jax.random.key(0), cfg))
  size = 0.3 * SELECTIONS[router.selection].takes_bias
  bias = size * plan.rng(41).normal(size=(LAYERS + 1, EXPERTS))
  return Decoder(tiny.draw_parameters(plan, shapes), bias.astype(np.float32))


class Logits(NamedTuple):
  """Logits of the same text, [B, S, V] each."""

  whole: Array  # by one forward pass
  cached: Array  # by a prompt of P tokens, and then one token after the other


def both_logits(subject: Decoder, tokens: Array) -> Logits:
  """The logits of tokens [B, S], rows of which begin at STARTS, without a cache and with one."""
  model, bias = subject
  starts, alive = jnp.asarray(STARTS), jnp.ones(ROWS, bool)

  def batch_of(part: Array, first: Array) -> object:
    return decoding_batch(part, jnp.broadcast_to(first, (ROWS,)), starts, alive)

  whole = model.logits(model(batch_of(tokens, jnp.int32(0)), bias).hidden)
  caches = empty_caches(ROWS, LENGTH, model.cfg)
  out = model(batch_of(tokens[:, :PROMPT], jnp.int32(0)), bias, caches)

  def one_more(caches: dict, place: Array) -> tuple[dict, Array]:
    token = jax.lax.dynamic_slice_in_dim(tokens, place, 1, axis=1)
    out = model(batch_of(token, place), bias, caches)
    return out.cache, model.logits(out.hidden)[:, 0]

  _, later = jax.lax.scan(one_more, out.cache, jnp.arange(PROMPT, LENGTH))
  cached = jnp.concatenate([model.logits(out.hidden), later.swapaxes(0, 1)], axis=1)
  return Logits(whole, cached)


def start_decoding(
  subject: Decoder, prompts: Array, params: SamplingParams
) -> tuple[Decoding, Array]:
  """Runs prompts [B, P]: what the next step wants, and the first tokens [B]."""
  caches = empty_caches(ROWS, LENGTH + 2 * STEPS, subject.model.cfg, 1)
  return prefill.__wrapped__(*subject, prompts, caches, jnp.asarray(STARTS), params=params)


def next_tokens(
  subject: Decoder, decoding: Decoding, params: SamplingParams
) -> tuple[Decoding, Array, Array]:
  """Verifies a draft and makes the next: the state, tokens [B, 2] and how many count [B]."""
  return step.__wrapped__(*subject, decoding, jnp.ones(ROWS, bool), params)


def drafted_text(
  plan: Plan, subject: Decoder, prompts: np.ndarray, params: SamplingParams
) -> tuple[np.ndarray, int]:
  """The text [B, S] that decoding with drafts makes of prompts, and how many drafts were right."""
  decoding, first = plan.program(start_decoding)(subject, prompts, params)
  rows = [[*prompt, int(token)] for prompt, token in zip(prompts.tolist(), np.asarray(first))]
  accepted = 0
  while min(map(len, rows)) < LENGTH:
    decoding, tokens, counts = plan.program(next_tokens)(subject, decoding, params)
    for row, new, count in zip(rows, np.asarray(tokens).tolist(), np.asarray(counts).tolist()):
      row += new[:count]
      accepted += count - 1
  return np.array([row[:LENGTH] for row in rows], np.int32), accepted


def decoding_line(plan: Plan) -> Iterator[Check]:
  """Checks line 12."""
  cached = Worst('logits with a cache, against without', SAME, 'absolute, of size 1; float32')
  drafted = Worst('tokens that drafts change', 0, 'drafts that are right change nothing')
  unseen = Worst('no draft was right, or none was wrong', 0, 'both must have been tried')
  refused = Worst('routers that look ahead and take drafts', 0, 'each must refuse')
  right = tried = 0
  for number, router in enumerate(routers(plan)):
    name = router_name(router)
    if not SELECTIONS[router.selection].causal:
      refused.see(name, not refuses_drafts(router))
      continue
    subject, rng = make_decoder(plan, router), plan.rng(40, number)
    for temperature in (0.0, 0.8):
      params = SamplingParams(
        key=jax.random.key(plan.seed + number),
        temperature=jnp.float32(temperature),
        top_k=jnp.int32(0),
        top_p=jnp.float32(1),
      )
      prompts = rng.integers(0, VOCAB, (ROWS, PROMPT)).astype(np.int32)
      text, accepted = drafted_text(plan, subject, prompts, params)
      logits = plan.program(both_logits)(subject, text)
      where = f'{name}, temperature {temperature}'
      known = np.arange(LENGTH) >= STARTS[:, None]
      difference = np.abs(np.asarray(logits.whole) - np.asarray(logits.cached)).max(-1)
      cached.see(where, difference[known].max())
      places = jnp.arange(1, LENGTH + 1) - STARTS[:, None]
      wanted = np.asarray(plan.program(draw)(logits.whole, places, params))
      drafted.see(where, (wanted[:, PROMPT - 1 : -1] != text[:, PROMPT:]).sum())
      right, tried = right + accepted, tried + ROWS * (LENGTH - PROMPT - 1)
  unseen.see(f'{right} of {tried} tokens were drafted', not 0 < right < tried)
  for worst in (cached, drafted, unseen, refused):
    yield worst.check()


def refuses_drafts(router: RouterConfig) -> bool:
  """Whether decoding such a model refuses to draft."""
  try:
    drafts_per_step(drafting_model(router), SampleConfig(draft=True))
  except ConfigError:
    return True
  return False
