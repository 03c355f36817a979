"""The compressors' yardstick: what they say of noise, of repetition, and of text that they have
seen before."""

import gzip
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from moejax.train.telemetry import compression as compressors
from moejax.train.telemetry.compression import (
  compress_held_out,
  gzip_bits_per_byte,
  xz_bits_per_byte,
)

NOISE = random.Random(0).randbytes(20_000)
OTHER = random.Random(1).randbytes(100_000)
BOTH = pytest.mark.parametrize('measure', [gzip_bits_per_byte, xz_bits_per_byte])


@BOTH
def test_noise_costs_eight_bits_and_repetition_next_to_none(
  measure: Callable[[bytes, bytes], float],
) -> None:
  assert 8 <= measure(b'', NOISE) < 8.1
  assert 8 <= measure(OTHER, NOISE) < 8.1, 'other text does not help'
  assert measure(b'', b'a' * 20_000) < 0.1


@BOTH
def test_text_that_was_in_training_is_nearly_free(measure: Callable[[bytes, bytes], float]) -> None:
  assert measure(OTHER + NOISE, NOISE) < 0.5


def test_gzips_window_is_short_and_xzs_is_not() -> None:
  long_ago = NOISE + OTHER
  assert gzip_bits_per_byte(long_ago, NOISE) > 8
  assert xz_bits_per_byte(long_ago, NOISE) < 0.5


def test_without_training_text_they_are_the_commands() -> None:
  text = b''.join(b'line %d of a text\n' % (i * i % 997) for i in range(2000))
  assert abs(
    gzip_bits_per_byte(b'', text) - 8 * len(gzip.compress(text, 9)) / len(text)
  ) < 8 * 20 / len(text)
  extreme = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) - len(lzma.compress(b''))
  assert xz_bits_per_byte(b'', text) == 8 * extreme / len(text)


def test_xz_learns_from_the_end_of_a_long_training_text(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(compressors, 'TRAINING_TEXT', 50_000)
  assert xz_bits_per_byte(OTHER + NOISE, NOISE) < 0.5 < 8 < xz_bits_per_byte(NOISE + OTHER, NOISE)


def test_a_text_is_read_for_them_once(tmp_path: Path) -> None:
  """A start of a corpus of gigabytes would else read all of it again."""
  reads = []

  def opened(digest: str) -> SimpleNamespace:
    return SimpleNamespace(
      fingerprint={'source_digest': digest, 'held_out': 'b', 'tokenizer_digest': 'c'},
      train_text=lambda: reads.append(digest) or OTHER,
      validation_text=lambda: NOISE,
    )

  first = dict(compress_held_out(opened('one'), tmp_path))
  assert first == {
    'gzip': gzip_bits_per_byte(OTHER, NOISE),
    'xz': xz_bits_per_byte(OTHER, NOISE),
  }
  assert [*compress_held_out(opened('one'), tmp_path)] == [*first.items()] and reads == ['one']
  assert [*compress_held_out(opened('two'), tmp_path)] == [*first.items()]
  assert reads == ['one', 'two']
