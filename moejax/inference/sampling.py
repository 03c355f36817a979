"""Text from a model: decodes prompts step by step, and spells the tokens in whole characters.

Letters: B batch, P prompt.
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.config import (
  INT32,
  LARGEST_SEED,
  at_least,
  at_most,
  check,
  not_finite,
  problem_if,
)
from moejax.data.tokenizer import Tokenizer
from moejax.inference.decode import MAX_DRAFTS, prefill, step
from moejax.inference.draw import NOT_FINITE, SamplingParams
from moejax.model.config import ModelConfig
from moejax.model.transformer import Transformer, empty_caches
from moejax.moe.dispatch.dropless import dropless, dropless_note
from moejax.moe.layer import causality
from moejax.sharding.logical_axes import row_shards

# Prompts and caches are rounded up to this many tokens: nearby lengths share a compiled program.
ROUND = 64


class NonFiniteLogits(ArithmeticError):
  """A model gave NaN or infinite logits, from which no token can be drawn."""


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """How a text goes on, and where it ends.

  It ends after max_tokens, or before a `stop`, or where the model ends the document.

  max_tokens: how many are sampled at most.
  temperature: 0 takes the likeliest token.
  top_k: only so many of the likeliest; 0: all.
  top_p: of these the fewest that have that probability.
  seed: with the row and the place in it decides every draw.
  stop: texts; or names of special tokens; or, where there is no tokenizer, ids.
  draft: tokens are drafted by multi-token prediction and verified all at once: the same text, in
    fewer steps.
  """

  max_tokens: int = 64
  temperature: float = 0.8
  top_k: int = 0
  top_p: float = 0.95
  seed: int = 0
  stop: tuple[str, ...] = ()
  draft: bool = False

  def __post_init__(self) -> None:
    check(*not_finite(self))
    check(
      *at_least(1, self, 'max_tokens'),
      *at_most(INT32, self, 'max_tokens', 'top_k'),
      *at_most(LARGEST_SEED, self, 'seed'),
      *at_least(0, self, 'temperature', meaning='the likeliest token'),
      *at_least(0, self, 'top_k', meaning='all tokens'),
      problem_if(not 0 < self.top_p <= 1, f'top_p={self.top_p}: use a number above 0, at most 1'),
      *at_least(0, self, 'seed'),
      problem_if('' in self.stop, "stop='': use a text"),
    )


def decoding_note(model: ModelConfig) -> str:
  """Says in what decoding differs from the model as it was trained; '' for most models."""
  return dropless_note(model.moe.dispatch)


def drafts_per_step(model: ModelConfig, cfg: SampleConfig) -> int:
  """Returns how many tokens to draft in each step.

  Raises:
    ConfigError: `draft` is asked of a model that cannot.
  """
  if not cfg.draft:
    return 0
  # What is dropped in training is not in decoding.
  decoded = dataclasses.replace(model.moe, dispatch=dropless(model.moe.dispatch))
  check(
    problem_if(
      not model.mtp_depth,
      'draft=True is for a model that predicts several tokens, and this one has mtp_depth=0: '
      'use draft=False',
    ),
    *(
      f'draft=True would change the text, since it is not causal: {why}'
      for why in causality(decoded)
    ),
  )
  return min(model.mtp_depth, MAX_DRAFTS)


def decode(
  model: Transformer,
  router: Array,
  prompts: Sequence[Sequence[int]],
  cfg: SampleConfig,
  ends: Sequence[int] = (),
) -> Iterator[list[list[int]]]:
  """Yields what each step adds to each row: one token, or with `cfg.draft` one or more.

  A row ends with one of `ends`, which is yielded, or after max_tokens; from then on it is padding
  and gets nothing. `cfg.stop` is for texts, and not looked at. The tokens of a row do not depend on
  the others, but for the order of sums: also of a model that was trained with a capacity.

  Args:
    router: the bias of each MoE layer, as of `Transformer.__call__`.
    prompts: token ids of each row, one or more.

  Raises:
    NonFiniteLogits: where a token would be drawn from them.
  """
  rows, drafts = len(prompts), drafts_per_step(model.cfg, cfg)
  # A mesh wants rows for all of its devices: the first prompt fills them, and is not yielded again.
  filling = [prompts[0]] * (-rows % row_shards())
  prompts = [*prompts, *filling]
  longest = round_up(max(map(len, prompts)))
  # Padded on the left, so that all rows write their next token to the same slot.
  tokens = np.array([[0] * (longest - len(p)) + list(p) for p in prompts], np.int32)
  starts = np.array([longest - len(p) for p in prompts], np.int32)
  # The last step may begin before max_tokens, and its last depth writes twice the drafts at once.
  room = longest + round_up(cfg.max_tokens + 2 * drafts)
  caches = empty_caches(len(prompts), room, model.cfg, drafts)
  params = SamplingParams(
    key=jax.random.key(cfg.seed),
    temperature=jnp.asarray(cfg.temperature),
    top_k=jnp.asarray(cfg.top_k),
    top_p=jnp.asarray(cfg.top_p),
  )
  state, first = prefill(model, router, tokens, caches, starts, params=params)
  following, counts = np.asarray(first)[:, None], np.ones(len(prompts), int)
  left = np.where(np.arange(len(prompts)) < rows, cfg.max_tokens, 0)
  while True:
    new_ids = []
    for row in range(rows):
      # A step may give more tokens than are left, or go on after an end.
      count = min(counts[row], left[row])
      ids = up_to_end(following[row, :count].tolist(), ends)
      if NOT_FINITE in ids:
        raise NonFiniteLogits(
          f'logits are not finite after {cfg.max_tokens - left[row]} tokens: the parameters hold '
          'NaN or inf, or numbers that overflow in the dtype that the model computes in'
        )
      new_ids.append(ids)
      ended = ids and ids[-1] in ends
      left[row] = 0 if ended else left[row] - len(ids)
    yield new_ids
    if not left.any():
      return
    # Rows with nothing left are padding in the batch, so that all steps are one program.
    state, following, counts = step(model, router, state, left > 0, params)
    following, counts = np.asarray(following), np.asarray(counts)


def round_up(tokens: int) -> int:
  """Returns the next multiple of ROUND."""
  return -(-tokens // ROUND) * ROUND


def up_to_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
  """Returns the tokens up to and with the first that is an end, or all of them."""
  for i, token in enumerate(tokens):
    if token in ends:
      return tokens[: i + 1]
  return tokens


def sample(
  model: Transformer, router: Array, tokenizer: Tokenizer, prompt: str, cfg: SampleConfig
) -> Iterator[str]:
  """Yields the continuation of a prompt, piece by piece as it is decoded."""
  prompts, ends = encode_prompt(tokenizer, prompt, cfg.stop)
  steps = decode(model, router, prompts, cfg, ends)
  return detokenize(steps, tokenizer, prompts[0], cfg.stop)


def encode_prompt(
  tokenizer: Tokenizer, prompt: str, stop: Sequence[str]
) -> tuple[list[list[int]], list[int]]:
  """Encodes a prompt as the beginning of a document.

  Returns:
    The one prompt, and the ids that end its text: what ends a document, special tokens of `stop`.
  """
  special_stops = [tokenizer.specials[name] for name in stop if name in tokenizer.specials]
  return [tokenizer.encode_prompt(prompt)], [*tokenizer.ends, *special_stops]


def detokenize(
  steps: Iterable[list[list[int]]],
  tokenizer: Tokenizer,
  prompt: Sequence[int],
  stop: Sequence[str],
) -> Iterator[str]:
  """Yields the text that one row's tokens add to its prompt's, up to the first `stop` text.

  It comes in whole characters.
  """
  ids = list(prompt)
  # Tokens are spelt by what is before them: the first word of a text may have no space, and the
  # same token in its middle has one.
  prompt_length = len(tokenizer.decode(ids))
  text, shown = '', 0
  for (new_ids,) in steps:
    ids += new_ids
    # All tokens again: the new ones may end a character that others began.
    text = tokenizer.decode(ids)[prompt_length:]
    stops = [text.index(s) for s in stop if s in text]
    if stops:
      text = text[: min(stops)]
      break
    # Half of a character, or what may become a stop: wait for the rest.
    sure = first_possible_stop(text, shown, len(text.rstrip('\ufffd')), stop)
    if sure > shown:
      yield text[shown:sure]
      shown = sure
  if len(text) > shown:
    yield text[shown:]


def first_possible_stop(text: str, first: int, end: int, stop: Sequence[str]) -> int:
  """Returns the first place from which the rest of the text is the beginning of a `stop` text.

  Only places from `first` on and before `end` are looked at; `end` if there is none.
  """
  for place in range(first, end):
    rest = text[place:]
    if any(s.startswith(rest) for s in stop):
      return place
  return end


class TimedSteps:
  """Passes steps on, and measures how fast they come.

  The clock starts after the second step, since the first two wait for the compiler.
  """

  def __init__(self, steps: Iterable[list[list[int]]]) -> None:
    self._steps = steps
    self.tokens: list[int] = []  # of each step
    self._times: list[float] = []

  def __iter__(self) -> Iterator[list[list[int]]]:
    for new_ids in self._steps:
      self.tokens.append(sum(map(len, new_ids)))
      self._times.append(time.perf_counter())
      yield new_ids

  def report(self, draft: bool) -> str:
    """Says in words how many tokens came and how fast; with `draft` also how many a step."""
    parts = [f'{sum(self.tokens)} tokens']
    if len(self.tokens) > 2:
      seconds = self._times[-1] - self._times[1]
      parts.append(f'{sum(self.tokens[2:]) / seconds:.1f} tokens/s')
    if draft and len(self.tokens) > 1:
      # The first step is the prompt's, which gives one token whatever is drafted.
      parts.append(f'{sum(self.tokens[1:]) / (len(self.tokens) - 1):.2f} tokens a step')
    return ', '.join(parts)
