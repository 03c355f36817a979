"""Tokenizers: any text comes back, ids are below vocab_size, eod is never text; errors."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from moejax.config import ConfigError
from moejax.data import tokenizer as tokenizer_module
from moejax.data.tokenizer import EOD, Tokenizer, load_tokenizer, spec_problem

WORDS = [
  f'def name_{i}(self, value={i * 37}):\n  return "été{i}" + self.{chr(97 + i % 26) * 3}\n'
  for i in range(400)
]
EVERY_SEVENTH = ''.join(chr(c) for c in range(0, sys.maxunicode + 1, 7) if not 0xD800 <= c < 0xE000)
TEXTS = [
  '',
  ' ',
  'a',
  '\n\n\t  x  \r\n',
  f'a{EOD}b {EOD}',
  '\0\x7f\x80\u200b\ufeff',
  'naïve 火 \U0001f525 e\u0301',
  'a' * 999,
  EVERY_SEVENTH,
]


@pytest.fixture(scope='module', params=['bytes', 'bpe:300'])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
  return load_tokenizer(request.param, WORDS)


@pytest.mark.parametrize('text', TEXTS, ids=range(len(TEXTS)))
def test_any_text_comes_back_and_no_id_is_out_of_range_or_eod(
  tokenizer: Tokenizer, text: str
) -> None:
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eod_id for i in ids)
  assert [tokenizer.encode_batch([text, 'x', text])[i].tolist() for i in (0, 2)] == [ids, ids]


def test_size_counts_eod() -> None:
  assert load_tokenizer('bytes').vocab_size == 257 and load_tokenizer('bytes').eod_id == 256
  assert load_tokenizer('bpe:300', WORDS).vocab_size == 300
  assert (
    load_tokenizer('bpe:257', WORDS).encode('ab') != []
    and load_tokenizer('bpe:257').vocab_size == 257
  )
  assert load_tokenizer('bytes').encode('é') == list('é'.encode())


def test_little_text_is_told(caplog: pytest.LogCaptureFixture) -> None:
  assert load_tokenizer('bpe:4096', ['abab abab']).vocab_size < 300
  assert 'tokens only, not 4096' in caplog.text


def test_saved_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
  tokenizer.save(tmp_path / 'tokenizer.json')
  again = load_tokenizer(str(tmp_path / 'tokenizer.json'))
  bare = tokenizers.Tokenizer.from_file(
    str(tmp_path / 'tokenizer.json')
  )  # what another program makes of it
  for text in (*TEXTS[:3], WORDS[0]):
    assert tokenizer.encode(text) == again.encode(text) == bare.encode(text).ids
  same = [(t.digest, t.eod_id, t.vocab_size) for t in (tokenizer, again)]
  assert same[0] == same[1]


def test_training_depends_on_the_text_only() -> None:
  digests = [
    load_tokenizer('bpe:300', iter(words)).digest for words in (WORDS, WORDS, WORDS[::-1][:200])
  ]
  assert digests[0] == digests[1] != digests[2]


def test_pieces_encode_to_the_ids_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(tokenizer_module, 'PIECE', 40)
  rng = np.random.default_rng(0)
  text = ''.join(
    rng.choice(['ab', ' ', '\n', '\n', "'s", '火', '.', '7', '\t', '\x1c', '\xa0', '\r'], 20000)
  )
  tokenizer = load_tokenizer('bpe:400', [text])
  pieces = list(tokenizer.pieces(text))
  assert len(pieces) > 100 and ''.join(pieces) == text
  assert np.concatenate(tokenizer.encode_batch(pieces)).tolist() == tokenizer.encode(text)


def test_words_are_those_of_gpt2_up_to_a_length() -> None:
  rng = np.random.default_rng(1)
  parts = ['ab', ' ', '  ', '\n', "'s", "'", '火', '.', '7', '\t', '\x1c', '\xa0', '\r', '²', 'é']
  text = ''.join(rng.choice(parts, 20_000))
  plain = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  ours = json.loads(load_tokenizer('bpe:300', [text]).json_text)
  words = tokenizers.Tokenizer.from_str(json.dumps(ours)).pre_tokenizer
  assert words.pre_tokenize_str(text) == plain.pre_tokenize_str(text)


@pytest.mark.parametrize('letters', ['a', 'ACGT', '火山', '0', ' ', '\n\t', '=-'])
def test_a_run_without_end_is_learnt_from_and_comes_back(letters: str) -> None:
  rng = np.random.default_rng(2)
  text = ''.join(rng.choice(list(letters), 200_000))
  start = time.perf_counter()
  tokenizer = load_tokenizer('bpe:600', [text])
  # Without the cut it is a quarter of a minute; the bound leaves room for a slow machine.
  assert time.perf_counter() - start < 5
  longest = max(len(tokenizer.decode([i])) for i in range(tokenizer.vocab_size))
  assert (
    longest <= tokenizer_module.LONGEST_WORD and tokenizer.decode(tokenizer.encode(text)) == text
  )


def test_a_line_without_end_comes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(tokenizer_module, 'PIECE', 40)
  monkeypatch.setattr(tokenizer_module, 'LONGEST_PIECE', 100)
  text = 'ab\n' * 20 + 'x' * 950 + '\ncd\n'
  pieces = list(load_tokenizer('bpe:300', [text]).pieces(text))
  assert ''.join(pieces) == text and all(pieces)
  assert max(map(len, pieces)) == 100 and len(pieces) == 12


def _word_level(vocabulary: dict[str, int], **settings: object) -> str:
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token='a'))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return json.dumps(json.loads(backend.to_str()) | settings)


def test_another_tokenizer_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
  path = tmp_path / 'other.json'
  truncation = {'direction': 'Right', 'max_length': 2, 'strategy': 'LongestFirst', 'stride': 0}
  path.write_text(_word_level({'a': 0, 'b': 70000, '</s>': 3}, truncation=truncation))
  tokenizer = load_tokenizer(str(path))
  assert (tokenizer.vocab_size, tokenizer.eod_id) == (
    70001,
    3,
  )  # the largest id, not the number of tokens
  assert tokenizer.encode('a b a b') == [
    0,
    70000,
    0,
    70000,
  ]  # a file's own truncation would lose text
  assert 'bits per byte' in caplog.text


@pytest.mark.parametrize(
  'spec, words',
  [
    ('bpe', 'bpe:N'),
    ('bpe:', 'at least 257'),
    ('bpe:256', 'at least 257'),
    ('bpe:4k', 'bpe:N'),
    ('gpt2', 'none of bytes, bpe:N and the path'),
    ('/no/such/file.json', 'No such file'),
  ],
)
def test_errors_name_the_value_and_what_would_do(spec: str, words: str) -> None:
  with pytest.raises(ConfigError, match=words) as error:
    load_tokenizer(spec)
  assert f'tokenizer={spec!r}' in str(error.value) and 'bytes' in str(error.value)


def test_bad_files(tmp_path: Path) -> None:
  path = tmp_path / 'bad.json'
  for content, words in (
    (b'{"version": 1', 'not a tokenizer.json'),
    (b'\xff\xfe', "can't decode"),
    (_word_level({'a': 0}).encode(), r'no end-of-document token, one of <\|endoftext'),
  ):
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
      load_tokenizer(str(path))


def test_names_are_checked_without_files() -> None:
  assert [spec_problem(spec) for spec in ('bytes', 'bpe:257', 'no/such.json')] == [''] * 3
