"""Sampling: what rows do not share, where they end, and text in whole characters."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import tokenizers
from flax import nnx
from jax import monitoring
from tokenizers import decoders, models

from moejax.config import ConfigError
from moejax.data.tokenizer import Tokenizer, load_tokenizer
from moejax.inference import sampling
from moejax.inference.sampling import (
  NonFiniteLogits,
  SampleConfig,
  TimedSteps,
  detokenize,
  encode_prompt,
  first_possible_stop,
  up_to_end,
)
from moejax.model.config import ModelConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from tests.inference.decode_cases import (
  BASE,
  GREEDY,
  PROMPTS,
  E,
  certain,
  decode_all,
)
from tests.support.unoptimised import DECODING

TOKENIZER = load_tokenizer('bytes')
EOD = TOKENIZER.eod_id


@pytest.mark.slow
def test_draws_are_the_same_with_guesses_and_whatever_the_other_rows_are() -> None:
  model, ask = certain(2), SampleConfig(16, 1.0, 5, 0.9, seed=3)
  said, _ = decode_all(model, ask)
  guessed, counts = decode_all(model, dataclasses.replace(ask, draft=True))
  assert guessed == said and {1, 2, 3} <= {*sum(counts, [])}
  others = [[9] * 24, *PROMPTS[1:3], [4], [2] * 9]
  assert decode_all(model, ask, others)[0][1:3] == said[1:3]
  assert decode_all(model, dataclasses.replace(ask, seed=4))[0][0] != said[0]
  again = decode_all(model, ask, [PROMPTS[1]] * 5)[0]
  assert again[1] == said[1] and len({*map(tuple, again)}) == 5, 'rows are drawn one by one'


@pytest.mark.parametrize('draft', [False, True])
def test_a_row_ends_by_itself(draft: bool) -> None:
  """With an end, which is the last it says, or after max_tokens, in the middle of a step or not.

  Others go on.
  """
  model = certain(2)
  ask = dataclasses.replace(GREEDY, max_tokens=13, draft=draft)
  said, _ = decode_all(model, ask)
  end = next(token for token in said[0][1:5] if any(token not in other for other in said[1:]))
  ended, counts = decode_all(model, ask, ends=(end,))
  want = [row[: row.index(end) + 1] if end in row else row for row in said]
  assert ended == want and len({*map(len, want)}) > 1 and max(map(len, want)) == 13
  for row, text in enumerate(want):
    total = np.cumsum([0, *(step[row] for step in counts)])
    assert all(step[row] == 0 for step, before in zip(counts, total) if before >= len(text))
  assert decode_all(model, ask, [PROMPTS[2], *PROMPTS[1:2] * 4], (end,))[0][:2] == [
    want[2],
    want[1],
  ]


@pytest.mark.slow
def test_nearby_lengths_and_other_settings_share_two_programs() -> None:
  """One for the prompt and one for all tokens after it; nothing else is compiled either."""
  compiled: list[str] = []

  def listen(name: str, seconds: float, **about: str | int) -> None:
    if 'backend_compile' in name:
      compiled.append(name)

  model = certain(2)

  def run(prompts: list[list[int]], cfg: SampleConfig) -> list[int]:
    before = [program._cache_size() for program in DECODING.values()]
    decode_all(model, cfg, prompts)
    return [program._cache_size() - size for program, size in zip(DECODING.values(), before)]

  monitoring.register_event_duration_secs_listener(listen)
  try:
    assert run(PROMPTS[2:4], SampleConfig(50, 0.5, 0, 0.9, 0, draft=True)) == [1, 1]
    assert compiled, 'the event has another name by now'
    compiled.clear()
    assert run([[1], [2, 3]], SampleConfig(50, 0.0, 3, 1.0, 1, draft=True)) == [0, 0]
    assert run([[1, 2], [3] * 5], SampleConfig(49, 0.8, 7, 0.5, 2, ('x',), draft=True)) == [0, 0]
    assert not compiled
  finally:
    monitoring.unregister_event_duration_listener(listen)


def test_there_is_room_for_guesses_beyond_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
  """A step that begins before the last token writes a chunk.

  Its last depth writes as many slots again less two.
  """
  asked: list[int] = []

  def spied(batch: int, length: int, cfg: ModelConfig, depths: int) -> None:
    asked.append(length - (24 + max_tokens + 2 * depths - 2))
    raise StopIteration

  monkeypatch.setattr(sampling, 'empty_caches', spied)
  for max_tokens in range(1, 20):
    with pytest.raises(RuntimeError, match='StopIteration'):
      decode_all(certain(3), SampleConfig(max_tokens, draft=True))
  assert min(asked) >= 0 and max(asked) < 10 and len(asked) == 19


@pytest.mark.parametrize(
  ('cfg', 'told'),
  [
    (BASE, 'mtp_depth=0: use draft=False'),
    (
      dataclasses.replace(
        BASE, mtp_depth=1, moe=MoEConfig(RouterConfig(E, 2, selection='expert_choice'), d_expert=8)
      ),
      "selection='expert_choice'",
    ),
  ],
  ids=['one token', 'not causal'],
)
def test_guesses_are_refused_where_there_are_none_or_they_would_matter(
  cfg: ModelConfig, told: str
) -> None:
  with pytest.raises(ConfigError, match=told):
    sampling.drafts_per_step(cfg, SampleConfig(draft=True))
  assert sampling.drafts_per_step(cfg, SampleConfig()) == 0


def spell(pieces: Sequence[Sequence[int]], *stop: str) -> list[str]:
  """What is shown of one row that says these tokens, step by step."""
  return list(detokenize(([list(new)] for new in pieces), TOKENIZER, [EOD], stop))


def test_a_text_is_what_the_tokens_add_to_their_prompt() -> None:
  """A decoder that strips the first space of a text strips none of what comes after a prompt."""
  backend = tokenizers.Tokenizer(
    models.WordLevel({'▁the': 0, '▁cat': 1, '</s>': 2, '<u>': 3}, unk_token='<u>')
  )
  backend.decoder = decoders.Sequence(
    [decoders.Replace('▁', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
  )
  backend.add_special_tokens(['</s>'])
  tokenizer = Tokenizer(backend.to_str(), 'words')
  assert ''.join(detokenize([[[1]], [[0, 2]]], tokenizer, [2, 0], ())) == ' cat the'
  assert ''.join(detokenize([[[1]], [[0, 2]]], tokenizer, [2], ())) == 'cat the'
  assert ''.join(detokenize([[[1]], [[0]]], tokenizer, [2, 0], (' the',))) == ' cat'


@pytest.mark.parametrize('draft', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_logits_that_are_not_finite_end_the_text_with_a_message(draft: bool) -> None:
  """Where they are of a row that goes on; what another row said before is not lost."""
  model = certain(2)
  table = model.embed.table[...]
  said, _ = decode_all(model, dataclasses.replace(GREEDY, draft=draft), [[1, 2, 3]])
  spoilt = nnx.clone(model)
  spoilt.embed.table[...] = table.at[said[0][1]].set(np.nan)
  with pytest.raises(NonFiniteLogits, match='logits are not finite after [1-9]'):
    decode_all(spoilt, dataclasses.replace(GREEDY, draft=draft), [[1, 2, 3]])
  spoilt.embed.table[...] = table.at[2].set(np.inf)
  with pytest.raises(NonFiniteLogits, match='logits are not finite after 0 tokens'):
    decode_all(spoilt, GREEDY, [[1, 2, 3]])


def test_text_comes_in_whole_characters_and_whole_to_the_end() -> None:
  letters = [[i] for i in 'aé火b'.encode()]
  assert spell(letters) == ['a', 'é', '火', 'b']
  assert spell([[*b'a\xe7'], [*b'b']]) == ['a', '\ufffdb']
  assert spell([[*'aé'.encode()], [], [*'火b'.encode(), EOD]]) == ['aé', '火b']
  assert spell(letters[:-2]) == ['a', 'é', '\ufffd'] and spell([]) == []


@pytest.mark.parametrize(
  ('said', 'stop', 'shown'),
  [
    ('abcd', ['c'], ['a', 'b']),
    ('abcd', ['bc', 'cd'], ['a']),
    ('abcd', ['d', 'cd', 'abd'], ['ab']),
    ('ababac', ['abac'], ['ab']),
    ('aab', ['ab'], ['a']),
    ('abx', ['aby'], ['abx']),
    ('ab', ['abc'], ['ab']),
    ('a\n\nb', ['\n\n'], ['a']),
    ('é火', ['火'], ['é']),
    ('abc', ['a'], []),
    ('abc', ['x'], ['a', 'b', 'c']),
  ],
)
def test_text_ends_before_the_first_stop(said: str, stop: list[str], shown: list[str]) -> None:
  """And what may become one is not shown before it is known."""
  assert spell([[i] for i in said.encode()], *stop) == shown
  assert ''.join(spell([[*said.encode()]], *stop)) == ''.join(shown)


def test_a_prompt_opens_a_document_and_ends_with_it_or_a_special_token() -> None:
  assert encode_prompt(TOKENIZER, 'é', ()) == ([[EOD, *'é'.encode()]], [EOD])
  assert encode_prompt(TOKENIZER, '', ('x', '<|endoftext|>')) == ([[EOD]], [EOD, EOD])


def test_all_that_is_wrong_is_told_at_once() -> None:
  with pytest.raises(ConfigError) as error:
    SampleConfig(0, -1.0, -1, 2.0, -1, ('',))
  assert len(error.value.problems) == 6


def test_what_may_become_a_stop_is_looked_for_in_a_part_of_the_text() -> None:
  assert first_possible_stop('abab', 0, 4, ['abac']) == 0 + 2
  assert first_possible_stop('abab', 3, 4, ['abac', 'bc']) == 3
  assert first_possible_stop('abab', 3, 4, ['abac']) == first_possible_stop('abab', 0, 4, []) == 4


def test_tokens_are_cut_after_the_first_end() -> None:
  assert up_to_end([1, 2, 3, 2], [2, 3]) == [1, 2]
  assert up_to_end([1, 2], [4]) == [1, 2] and up_to_end([], [1]) == []


def test_a_report_counts_tokens_and_times_what_follows_the_second_step() -> None:
  steps = TimedSteps([[[1], [2]], [[3, 4], [5]], [[], [6, 7, 8]]])
  assert list(steps) == [[[1], [2]], [[3, 4], [5]], [[], [6, 7, 8]]] and steps.tokens == [2, 3, 3]
  assert steps.report(draft=False).startswith('8 tokens, ')
  assert steps.report(draft=False).endswith(' tokens/s')
  assert steps.report(draft=True).endswith(' tokens/s, 3.00 tokens a step')
  short = TimedSteps([[[1]]])
  assert list(short) == [[[1]]] and short.report(draft=True) == '1 tokens'
