"""Texts that come as ids: each format, the check against the tokenizer, and the two sides."""

import itertools
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from moejax.config import ConfigError, frozendict
from moejax.data import token_source
from moejax.data.pipeline import Data, open_data
from moejax.data.sources import DataConfig
from moejax.data.token_files import TOKEN_FORMATS, IdRange, Joined
from moejax.data.tokenizer import load_tokenizer

EOD = 256
TEXTS = [f'document {i} ' + 'abc xyz '[i % 4 :] * (i % 7 + 1) for i in range(200)]
DOCUMENTS = [[*text.encode(), EOD] for text in TEXTS]  # as nanoGPT and OLMo end them
IDS = np.concatenate(DOCUMENTS)


def megatron(path: Path, dtype: str) -> None:
  IDS.astype(dtype).tofile(path)
  lengths = np.array([len(document) for document in DOCUMENTS], np.int32)
  code = {'uint16': 8, 'int32': 4}[dtype]
  with open(path.with_suffix('.idx'), 'wb') as file:
    file.write(b'MMIDIDX\x00\x00' + struct.pack('<QBQQ', 1, code, len(lengths), len(lengths) + 1))
    file.write(lengths.tobytes())
    file.write((np.cumsum(lengths) - lengths).astype(np.int64).tobytes())
    file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


def array_record(path: Path) -> None:
  from array_record.python.array_record_module import ArrayRecordWriter

  writer = ArrayRecordWriter(f'{path}', 'group_size:1')
  for document in DOCUMENTS:
    writer.write(np.array(document, np.uint16).tobytes())
  writer.close()


WRITERS: dict[str, Callable[[Path], None]] = {
  'flat.bin': lambda path: IDS.astype(np.uint16).tofile(path),
  'olmo.npy': lambda path: IDS.astype(np.uint16).tofile(path),
  'saved.npy': lambda path: np.save(path, IDS.astype(np.uint32)),
  'small.bin': lambda path: megatron(path, 'uint16'),
  'wide.bin': lambda path: megatron(path, 'int32'),
  'a.array_record': array_record,
}


def open_ids(folder: Path, **fields: object) -> Data:
  usual = {'source': 'tokens', 'path': f'{folder}/ids', 'tokenizer': 'bytes'}
  config = DataConfig(**usual | {'cache_dir': f'{folder}/cache'} | fields)
  return open_data(config, batch_size=2, seq_len=32, seed=0)


def write(folder: Path, name: str, ids: np.ndarray = IDS) -> None:
  (folder / 'ids').mkdir(exist_ok=True)
  ids.astype(np.uint16).tofile(folder / 'ids' / name)


@pytest.mark.parametrize('name', WRITERS)
def test_a_format_gives_the_ids_that_were_written(tmp_path: Path, name: str) -> None:
  WRITERS[name](tmp_path / name)
  ids = TOKEN_FORMATS[Path(name).suffix](f'{tmp_path / name}', np.dtype(np.uint16))
  assert len(ids) == len(IDS) and np.array_equal(ids[0 : len(IDS)], IDS)
  for start, stop in itertools.product((0, 1, 37, 4000), (2, 40, 999, len(IDS) + 5)):
    assert np.array_equal(ids[start:stop], IDS[start:stop])


def test_joined_and_part_read_as_one() -> None:
  joined = Joined([IDS[:7], IDS[7:7], IDS[7:50], IDS[50:]])
  part = IdRange(joined, 5, 60)
  assert len(joined) == len(IDS) and len(part) == 55 and len(Joined([])) == 0
  for start, stop in ((0, 7), (6, 8), (7, 50), (3, 55), (50, 50), (40, 99)):
    assert np.array_equal(joined[start:stop], IDS[start:stop])
    assert np.array_equal(part[start:stop], IDS[5:60][start:stop])


@pytest.mark.parametrize('name', WRITERS)
def test_both_sides_hold_every_document_once(tmp_path: Path, name: str) -> None:
  (tmp_path / 'ids').mkdir()
  WRITERS[name](tmp_path / 'ids' / name)
  data = open_ids(tmp_path)
  train, validation = data.train_text().decode(), data.validation_text().decode()
  assert train + validation == ''.join(TEXTS)
  assert (data.train_bytes, data.validation_bytes) == (len(train), len(validation))
  assert 0.04 < len(validation) / len(train + validation) < 0.08
  targets = np.concatenate([batch.targets[batch.mask] for batch in data.validation()])
  held_out = len(targets) + 1
  assert IDS[-held_out] == EOD and np.array_equal(targets, IDS[-held_out + 1 :])
  assert {int(row[0]) for row in data.batch(0).segment_ids} == {1}
  assert data.batch(0).segment_ids.max() > 1


def test_files_named_val_are_held_out(tmp_path: Path) -> None:
  write(tmp_path, 'train_0.bin', IDS[:3000])
  write(tmp_path, 'train_1.bin', IDS[3000:4000])
  write(tmp_path, 'val.bin', IDS[4000:])
  data = open_ids(tmp_path)
  assert data.train_tokens == 3999 // 32 * 32
  assert data.validation_tokens == len(IDS) - 4001
  text = load_tokenizer('bytes').decode(IDS[4000:].tolist())
  assert data.validation_text().decode() == text and data.validation_bytes == len(text)


def test_a_file_is_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  write(tmp_path, 'a.bin', IDS[:3000])
  write(tmp_path, 'b.bin', IDS[3000:])
  before = open_ids(tmp_path)
  scanned = []
  scan = token_source._scan
  monkeypatch.setattr(
    token_source, '_scan', lambda ids, *rest: scanned.append(len(ids)) or scan(ids, *rest)
  )
  assert open_ids(tmp_path).fingerprint == before.fingerprint
  assert not scanned
  changed = IDS[3000:].copy()
  changed[0] ^= 1
  write(tmp_path, 'b.bin', changed)
  after = open_ids(tmp_path).fingerprint
  assert after['source_digest'] != before.fingerprint['source_digest']
  assert scanned == [len(IDS) - 3000]


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'tokenizer': 'bpe:300'}, "tokenizer='bpe:300' is made of text: name the tokenizer.json"),
    ({'token_dtype': 'int8'}, r"token_dtype='int8' is not one of \['uint16', 'uint32'\]"),
    ({'token_dtype': 'uint32'}, r'id \d+ after 0 ids is none of the 257 .*than uint32'),
    ({'path': ''}, "path='': source='tokens' needs"),
    ({'path': 'none/*'}, r'matches no file that can be read, of \.bin \.npy \.array_record'),
  ],
)
def test_errors_of_fields(tmp_path: Path, fields: dict[str, str], words: str) -> None:
  write(tmp_path, 'a.bin')
  with pytest.raises(ConfigError, match=words):
    open_ids(tmp_path, **fields)


def test_errors_of_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
  path = tmp_path / 'ids' / 'a.bin'
  write(tmp_path, 'a.bin', np.append(IDS, 257))
  with pytest.raises(ConfigError, match=r'a\.bin: id 257 after 0 ids is none of the 257 of token'):
    open_ids(tmp_path)
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ConfigError, match=r'a\.bin has \d+ bytes, which are no ids of .*uint16'):
    open_ids(tmp_path)
  path.with_suffix('.idx').write_bytes(b'TNTIDX\x00\x00' + bytes(50))
  with pytest.raises(ConfigError, match=r'a\.idx is no index of Megatron'):
    open_ids(tmp_path)
  megatron(path, 'uint16')
  path.write_bytes(path.read_bytes()[:-2])
  with pytest.raises(ConfigError, match=r'a\.bin: .*a\.idx tells of \d+ bytes, found \d+'):
    open_ids(tmp_path)
  path.with_suffix('.idx').unlink()
  write(tmp_path, 'a.bin', IDS[IDS != EOD])
  open_ids(tmp_path)
  assert 'holds no end of document, id 256 of bytes' in caplog.text


def test_ids_mix_with_text(tmp_path: Path) -> None:
  write(tmp_path, 'a.bin')
  (tmp_path / 'text').mkdir()
  for i in range(40):
    (tmp_path / 'text' / f'{i}.txt').write_text(f'UPPER {i}\n' * 9)
  table = {'web': f'1 tokens {tmp_path}/ids', 'own': f'1 text {tmp_path}/text'}
  data = open_ids(tmp_path, source='mixture', path='', mixture=frozendict(table))
  batch = data.batch(0)
  tasks = [data.tasks[task] for task in batch.task_ids]
  texts = [bytes(row[row < EOD].tolist()).decode() for row in batch.tokens]
  assert sorted(tasks) == ['own', 'web']
  assert all(('UPPER' in text) == (task == 'own') for text, task in zip(texts, tasks))


def test_bytes_of_ids_add_up_to_the_text() -> None:
  text = 'naïve 火 text, and more text'
  for tokenizer in (load_tokenizer('bytes'), load_tokenizer('bpe:280', [text] * 9)):
    lengths = tokenizer.bytes_of_ids()
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert lengths[tokenizer.eod_id] == 0


def test_bytes_of_ids_of_a_tokenizer_of_words() -> None:
  vocabulary = {'▁a': 0, 'b': 1, '<0xC3>': 2, '</s>': 3, '▁火': 4}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
  backend.decoder = tokenizers.decoders.Metaspace()
  backend.add_special_tokens(['</s>'])
  tokenizer = token_source.Tokenizer(backend.to_str(), 'words')
  assert tokenizer.bytes_of_ids().tolist() == [2, 1, 1, 0, 4]
