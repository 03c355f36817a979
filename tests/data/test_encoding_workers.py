"""Several processes make the stream that one makes, tell how far they are, and end with it."""

import re
import subprocess
from pathlib import Path

import pytest
import tokenizers

from moejax.config import ConfigError
from moejax.data import encoding, encoding_workers, progress, token_stream
from moejax.data.encoding import DocumentPiece, encode_group
from moejax.data.encoding_workers import encode_groups, num_workers
from moejax.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.mixed_texts import equal
from tests.data.plain_texts import open_text


def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen]:
  """The processes that are started from here on."""
  processes = []
  popen = subprocess.Popen

  def start(*args: object, **kwargs: object) -> subprocess.Popen:
    processes.append(popen(*args, **kwargs))
    return processes[-1]

  monkeypatch.setattr(subprocess, 'Popen', start)
  return processes


def test_many_processes_make_the_stream_of_one_and_tell_how_far_they_are(
  folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  caplog.set_level('INFO', 'moejax')
  before = open_text(folder, tokenizer='bpe:300')
  monkeypatch.setattr(encoding, 'GROUP_CHARACTERS', 500)
  monkeypatch.setattr(progress, 'PROGRESS_SECONDS', 0.0)
  monkeypatch.setattr(token_stream, 'num_workers', lambda size: 2)
  processes = started(monkeypatch)
  after = open_text(folder, tokenizer='bpe:300', cache_dir=f'{folder}/cache2')
  assert after.fingerprint == before.fingerprint
  assert all(equal(a, b) for a, b in zip(after.validation(), before.validation(), strict=True))
  assert all(equal(after.batch(step), before.batch(step)) for step in range(9))
  assert len(processes) == 4 and all(process.returncode is not None for process in processes)
  lines = re.findall(r'tokenised ([\d.]+) of ([\d.]+) MB, [\d.]+ MB/s, 0m0\ds left', caplog.text)
  assert len(lines) > 5 and all(float(done) <= float(total) for done, total in lines)
  assert re.search(r'read the text: [\d.]+ MB, [\d.]+ MB/s\n', caplog.text)


@pytest.mark.slow
def test_what_a_worker_cannot_do_is_an_error_here_and_ends_them_all(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  tokenizer = load_tokenizer('bytes')
  groups = [[DocumentPiece(True, True, f'text {i}')] for i in range(6)]
  expected = [encode_group(group, tokenizer) for group in groups]
  assert list(encode_groups(groups, tokenizer, 1)) == expected
  processes = started(monkeypatch)
  assert list(encode_groups(groups, tokenizer, 2)) == expected
  results = encode_groups(groups, tokenizer, 2)
  next(results)
  for process in processes[2:]:
    process.kill()
  with pytest.raises(ConfigError, match='a process that tokenises has ended with status -9'):
    list(results)
  results = encode_groups(groups, tokenizer, 2)
  next(results)
  results.close()  # as where an error ends the one who asks
  assert len(processes) == 6 and all(process.returncode is not None for process in processes)


def test_ids_that_are_refused_are_refused_of_a_worker() -> None:
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0, '</s>': 1}, unk_token='a'))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  groups = [[DocumentPiece(True, True, text)] for text in ('a a', 'a </s> a', 'a')]
  with pytest.raises(ConfigError, match=r"tokenizer='words' turns text into its end of document"):
    list(encode_groups(groups, Tokenizer(backend.to_str(), 'words'), 2))


def test_short_texts_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
  assert num_workers(1000) == 1 <= num_workers(encoding_workers.LEAST_BYTES)
