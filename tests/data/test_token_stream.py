"""What a tokenizer learns from, and what it may turn a text into."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from moejax.config import ConfigError
from moejax.data import encoding, token_stream
from moejax.data import pipeline as data_module
from moejax.data import tokenizer as tokenizer_module
from moejax.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.mixed_texts import LETTERS, equal, open_mixture
from tests.data.plain_texts import open_text, split_by_hand


def test_a_tokenizer_learns_from_a_sample_of_the_training_text(
  folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  train, held_out = split_by_hand(folder, open_text(folder))
  seen = []

  def load(spec: str, documents: Iterable[str]) -> Tokenizer:
    seen.extend(documents)
    return load_tokenizer(spec, seen)

  monkeypatch.setattr(token_stream, 'load_tokenizer', load)
  open_text(folder, tokenizer='bpe:300')
  assert seen == train and held_out
  monkeypatch.setattr(token_stream, 'TOKENIZER_SAMPLE', 2000)
  seen.clear()
  open_text(folder, tokenizer='bpe:301')
  assert seen and set(seen) < set(train) and len(''.join(seen)) < 4000


def test_pieces_and_groups_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  (folder / 'text' / 'long.py').write_text('x = 1\ny = f(x)\n' * 200)
  before = open_text(folder, tokenizer='bpe:300')
  monkeypatch.setattr(tokenizer_module, 'PIECE', 50)
  monkeypatch.setattr(encoding, 'GROUP_CHARACTERS', 200)
  after = open_text(folder, tokenizer='bpe:300', cache_dir=f'{folder}/cache2')
  assert after.fingerprint == before.fingerprint
  assert all(equal(a, b) for a, b in zip(after.validation(), before.validation(), strict=True))


def test_a_text_larger_than_memory_is_read_from_its_end(
  folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  data = open_text(folder)
  whole = data.train_text()
  monkeypatch.setattr(token_stream, 'TEXT_IN_MEMORY', 3000)
  end = data.train_text()
  assert whole.endswith(end) and 3000 <= len(end) < 3600 < len(whole)


def test_ids_that_jax_would_clamp_are_refused(
  folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  for bad, words in ((257, 'above its 257'), (256, 'end of document')):
    ids = [np.array([1, bad])]
    monkeypatch.setattr(
      data_module.Tokenizer, 'encode_batch', lambda self, texts, ids=ids: ids * len(texts)
    )
    with pytest.raises(ConfigError, match=words):
      open_text(folder)
  assert not [path for path in (folder / 'cache').iterdir() if path.name.startswith('tokens')]


def test_large_vocabularies_keep_their_ids(folder: Path) -> None:
  words = {'alpha': 0, 'beta': 70000, '</s>': 65537, '?': 2}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='?'))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  backend.save(f'{folder}/big.json')
  batch = open_text(folder, tokenizer=f'{folder}/big.json').batch(0)
  assert set(np.unique(batch.tokens)) == {0, 2, 65537, 70000}


def bytes_sampled(
  mixed_folder: Path, weights: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> Counter:
  """Task -> bytes of it that the tokenizer learns from."""
  seen = []

  def load(spec: str, documents: Iterable[str]) -> Tokenizer:
    seen.extend(documents)
    return load_tokenizer(spec, seen)

  monkeypatch.setattr(token_stream, 'load_tokenizer', load)
  open_mixture(mixed_folder, weights, tokenizer='bpe:260', batch_size=1)
  bytes_of = Counter()
  for text in seen:
    bytes_of[next(task for task, letters in LETTERS.items() if set(text) <= {*letters, '\n'})] += (
      len(text.encode())
    )
  assert all(seen)
  return bytes_of


@pytest.mark.parametrize('sample', [2000, 1 << 22])
@pytest.mark.parametrize(
  'weights',
  [
    {'code': 1, 'maths': 1},
    {'code': 8, 'maths': 1, 'notes': 1},
    {'code': 1, 'maths': 2, 'notes': 7},
  ],
)
def test_the_tokenizer_learns_from_all_as_they_are_weighted(
  mixed_folder: Path, weights: dict[str, float], sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(token_stream, 'TOKENIZER_SAMPLE', sample)
  found = bytes_sampled(mixed_folder, weights, monkeypatch)
  total = sum(found.values())
  assert total <= sample * 1.2 and (total > sample / 2.5 or sample > 10_000)
  for task, weight in weights.items():  # to half a document, and a twentieth
    assert abs(found[task] - total * weight / sum(weights.values())) <= 60 + total / 20, found


def test_a_long_document_does_not_drown_the_others(
  mixed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(token_stream, 'TOKENIZER_SAMPLE', 4000)
  for path in (mixed_folder / 'maths').iterdir():
    path.unlink()
  (mixed_folder / 'maths' / 'x.txt').write_text('pqrs\n' * 4000)
  found = bytes_sampled(mixed_folder, {'code': 3, 'maths': 1}, monkeypatch)
  assert found['maths'] / sum(found.values()) == pytest.approx(1 / 4, rel=0.25), found


def test_the_tokenizer_is_of_the_mixture(mixed_folder: Path) -> None:
  tables = ({'code': 1, 'maths': 1}, {'code': 9, 'maths': 1}, {'code': 1, 'notes': 1}, {'code': 1})
  shared = [
    open_mixture(mixed_folder, table, tokenizer='bpe:300', batch_size=1) for table in tables
  ]
  alone = [
    open_mixture(
      mixed_folder, table, tokenizer='bpe:300', batch_size=1, cache_dir=f'{mixed_folder}/cache{i}'
    )
    for i, table in enumerate(tables)
  ]
  assert [a.fingerprint for a in shared] == [b.fingerprint for b in alone]
  assert len({data.fingerprint['tokenizer_digest'] for data in shared}) >= 3
  assert all(len(list((mixed_folder / f'cache{i}').glob('tokenizer-*'))) == 1 for i in range(4))
