"""A batch is a function of (seed, step), and every token is used once."""

from collections import Counter
from pathlib import Path

import numpy as np

from moejax.data.pipeline import Data
from tests.data.mixed_texts import equal
from tests.data.plain_texts import B, S, ids_of, open_text, split_by_hand


def test_batch_is_a_function_of_seed_and_step(folder: Path) -> None:
  data = open_text(folder)
  forwards = {step: data.batch(step) for step in (0, 1, 2, 50, 10**9)}
  again = open_text(folder)
  assert all(equal(forwards[step], again.batch(step)) for step in reversed(forwards))
  assert not equal(forwards[0], forwards[1]) and not equal(
    forwards[0], open_text(folder, seed=1).batch(0)
  )
  assert [type(field) for field in forwards[0]] == [np.ndarray] * 6
  assert [field.dtype.name for field in forwards[0]] == [
    'int32',
    'int32',
    'bool',
    'int32',
    'int32',
    'int32',
  ]
  assert [field.shape for field in forwards[0]] == [(B, S)] * 5 + [(B,)] and not forwards[
    0
  ].task_ids.any()


def epochs_of(data: Data, count: int) -> list[list[tuple[int, ...]]]:
  """Rows of inputs and last target in the order of training, an epoch a list."""
  n = data.train_tokens // S
  batches = [data.batch(step) for step in range(-(-n * count // B))]
  rows = [(*b.tokens[i].tolist(), int(b.targets[i, -1])) for b in batches for i in range(B)]
  return [rows[i * n : (i + 1) * n] for i in range(count)]


def test_every_token_is_predicted_once_an_epoch_in_another_order(folder: Path) -> None:
  data = open_text(folder)
  train, _ = split_by_hand(folder, data)
  stream = ids_of(train)
  first, second = epochs_of(data, 2)
  expected = [tuple(stream[i : i + S + 1]) for i in range(0, len(stream) - S, S)]
  assert len(expected) % B and data.train_tokens == len(expected) * S  # epochs meet inside a batch
  assert Counter(first) == Counter(second) == Counter(expected) and first != second != expected


def test_seeds_do_not_share_epochs(folder: Path) -> None:
  epochs = {
    tuple(epoch) for seed in (0, 1, 2) for epoch in epochs_of(open_text(folder, seed=seed), 3)
  }
  assert len(epochs) == 9  # Grain shuffles epoch e of seed s by s + e


def test_validation_predicts_every_token_once(folder: Path) -> None:
  data = open_text(folder)
  batches = list(data.validation())
  _, held_out = split_by_hand(folder, data)
  stream = ids_of(held_out)
  assert sum(int(b.mask.sum()) for b in batches) == data.validation_tokens == len(stream) - 1
  assert np.concatenate([b.tokens[b.mask] for b in batches]).tolist() == stream[:-1]
  assert np.concatenate([b.targets[b.mask] for b in batches]).tolist() == stream[1:]
  assert not batches[-1].mask.all() and batches[-1].tokens.shape == (B, S)
  assert all(equal(a, b) for a, b in zip(batches, data.validation(), strict=True))


def test_some_of_the_validation_is_spread_over_it(folder: Path) -> None:
  data = open_text(folder, batch_size=1, seq_len=16)
  every = list(data.validation())
  some = list(data.validation(5))
  found = [next(i for i, b in enumerate(every) if equal(a, b)) for a in some]
  assert len(some) == 5 and found == sorted(found) and found[-1] >= len(every) * 3 // 4
  assert len(list(data.validation(10**6))) == len(every) > 10


def test_fingerprint_tells_all_that_shapes_the_stream(folder: Path) -> None:
  base = open_text(folder).fingerprint
  others = [
    open_text(folder, **change).fingerprint
    for change in (
      {'seed': 1},
      {'batch_size': 2},
      {'seq_len': 16},
      {'tokenizer': 'bpe:300'},
      {'source': 'synthetic', 'path': ''},
      {'path': f'{folder}/text/[0-4]*'},
    )
  ]
  assert len({tuple(f.items()) for f in (base, *others)}) == 7
  assert open_text(folder).fingerprint == base
  assert [base[key] for key in ('source', 'tokenizer', 'batch_size', 'seq_len', 'seed')] == [
    'text',
    'bytes',
    str(B),
    str(S),
    '0',
  ]
  assert all(type(key) is type(value) is str for key, value in base.items())
