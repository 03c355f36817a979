"""Text from a model: decode prompts step by step, and spell the tokens in whole characters up to where to stop.

Letters: B batch, P prompt.
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.config import check
from moejax.data.tokenizer import Tokenizer
from moejax.inference.decode import MOST_GUESSES, Drawing, prefill, step
from moejax.model.config import ModelConfig
from moejax.model.transformer import Transformer, empty_caches
from moejax.moe.layer import causality
from moejax.sharding.logical_axes import row_shards

# Prompts and caches are rounded up to this many tokens, so that nearby lengths share a compiled program.
ROUND = 64


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """How a text goes on, and where it ends: at max_tokens, or before a `stop`, or where the model ends the document.

  temperature: 0 takes the likeliest token.  top_k: only so many of the likeliest; 0: all.
  top_p: of these the fewest that have that probability.  seed: with the row and the place in it decides every draw.
  stop: texts; or names of special tokens; or, where there is no tokenizer, ids.
  draft: guess tokens by multi-token prediction and check them all at once: the same text, in fewer steps.
  """

  max_tokens: int = 64
  temperature: float = 0.8
  top_k: int = 0
  top_p: float = 0.95
  seed: int = 0
  stop: tuple[str, ...] = ()
  draft: bool = False

  def __post_init__(self) -> None:
    check(
      f'max_tokens={self.max_tokens}: use 1 or more' if self.max_tokens < 1 else '',
      f'temperature={self.temperature}: use 0 (the likeliest token) or more'
      if not self.temperature >= 0
      else '',
      f'top_k={self.top_k}: use 0 (all tokens) or more' if self.top_k < 0 else '',
      f'top_p={self.top_p}: use a number above 0, at most 1' if not 0 < self.top_p <= 1 else '',
      f'seed={self.seed}: use 0 or more' if self.seed < 0 else '',
      "stop='': use a text" if '' in self.stop else '',
    )


def guesses(model: ModelConfig, cfg: SampleConfig) -> int:
  """Tokens to guess in each step.

  Raises:
    ConfigError: `draft` is asked of a model that cannot.
  """
  if not cfg.draft:
    return 0
  check(
    'draft=True is for a model that predicts several tokens, and this one has mtp_depth=0: use draft=False'
    if not model.mtp_depth
    else '',
    *(
      f'draft=True would change the text, since it is not causal: {why}'
      for why in causality(model.moe)
    ),
  )
  return min(model.mtp_depth, MOST_GUESSES)


def decode(
  model: Transformer,
  router: Array,
  prompts: Sequence[Sequence[int]],
  cfg: SampleConfig,
  ends: Sequence[int] = (),
) -> Iterator[list[list[int]]]:
  """Yields what each step adds to each row: one token, with `cfg.draft` one or more, and nothing once it has ended.

  A row ends with one of `ends`, which is yielded, or after max_tokens; it is padding from then on. `cfg.stop` is for
  texts, and not looked at. What a row says does not depend on the others, but for the order of sums.
  """
  rows, count = len(prompts), guesses(model.cfg, cfg)
  prompts = [
    *prompts,
    *[prompts[0]] * (-rows % row_shards()),
  ]  # a mesh wants rows for all of its devices
  longest = rounded(max(map(len, prompts)))
  tokens = np.array([[0] * (longest - len(p)) + list(p) for p in prompts], np.int32)
  starts = np.array([longest - len(p) for p in prompts], np.int32)
  caches = empty_caches(
    len(prompts), longest + rounded(cfg.max_tokens + 2 * count), model.cfg, count
  )
  drawing = Drawing(
    jax.random.key(cfg.seed), *map(jnp.asarray, (cfg.temperature, cfg.top_k, cfg.top_p))
  )
  state, first = prefill(model, router, tokens, caches, starts, drawing)
  following, counts = np.asarray(first)[:, None], np.ones(len(prompts), int)
  left = np.where(np.arange(len(prompts)) < rows, cfg.max_tokens, 0)
  while True:
    given = [
      cut(following[row, : min(counts[row], left[row])].tolist(), ends) for row in range(rows)
    ]
    yield given
    left[:rows] = [
      0 if new and new[-1] in ends else left[row] - len(new) for row, new in enumerate(given)
    ]
    if not left.any():
      return
    state, following, counts = step(model, router, state, left > 0, drawing)
    following, counts = np.asarray(following), np.asarray(counts)


def rounded(tokens: int) -> int:
  """Up to the next multiple of ROUND."""
  return -(-tokens // ROUND) * ROUND


def cut(tokens: list[int], ends: Sequence[int]) -> list[int]:
  """Up to and with the first that is an end."""
  return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]


def sample(
  model: Transformer, router: Array, tokenizer: Tokenizer, prompt: str, cfg: SampleConfig
) -> Iterator[str]:
  """The continuation of a prompt, piece by piece as it is decoded."""
  prompts, ends = encode_prompt(tokenizer, prompt, cfg.stop)
  return text(decode(model, router, prompts, cfg, ends), tokenizer, cfg.stop)


def encode_prompt(
  tokenizer: Tokenizer, prompt: str, stop: Sequence[str]
) -> tuple[list[list[int]], list[int]]:
  """The prompt as the beginning of a document, and the ids that end it: the document's, special tokens of `stop`."""
  ends = [
    tokenizer.eod_id,
    *(tokenizer.specials[name] for name in stop if name in tokenizer.specials),
  ]
  return [[tokenizer.eod_id, *tokenizer.encode(prompt)]], ends


def text(
  steps: Iterable[list[list[int]]], tokenizer: Tokenizer, stop: Sequence[str]
) -> Iterator[str]:
  """What the tokens of one row spell, in whole characters, up to the first of the `stop` texts."""
  ids: list[int] = []
  whole, shown = '', 0
  for (new,) in steps:
    ids += new
    whole = tokenizer.decode(ids)
    found = [at for at in map(whole.find, stop) if at >= 0]
    if found:
      whole = whole[: min(found)]
      break
    # Half of a character, or what may become a stop: wait for the rest.
    sure = len(whole.rstrip('\ufffd'))
    sure = min(
      (at for at in range(shown, sure) if any(s.startswith(whole[at:]) for s in stop)), default=sure
    )
    if sure > shown:
      yield whole[shown:sure]
      shown = sure
  if len(whole) > shown:
    yield whole[shown:]


class Timed:
  """Steps as they pass, and how fast: the clock starts after the second, since the first two wait for the compiler."""

  def __init__(self, steps: Iterable[list[list[int]]]) -> None:
    self._steps = steps
    self.tokens: list[int] = []  # of each step
    self._times: list[float] = []

  def __iter__(self) -> Iterator[list[list[int]]]:
    for new in self._steps:
      self.tokens.append(sum(map(len, new)))
      self._times.append(time.perf_counter())
      yield new

  def report(self, draft: bool) -> str:
    """In words."""
    said = f'{sum(self.tokens)} tokens'
    if len(self.tokens) > 2:
      said += f', {sum(self.tokens[2:]) / (self._times[-1] - self._times[1]):.1f} tokens/s'
    if draft and len(self.tokens) > 1:
      said += f', {sum(self.tokens[1:]) / (len(self.tokens) - 1):.2f} tokens a step'
    return said
