"""Each kind of file gives its documents, or one error that names the place."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moejax.config import ConfigError
from moejax.data.formats import Layout, byte_stream, read_documents, text_file

TEXTS = ['first', 'zweite été\n\nline', '火' * 9]


def read(path: Path, **layout: str) -> list[str]:
  return list(read_documents(f'{path}', Layout(**layout)))


def arrow_stream(table: object, path: Path) -> None:
  import pyarrow as pa

  with pa.OSFile(f'{path}', 'wb') as file, pa.ipc.new_stream(file, table.schema) as writer:
    writer.write_table(table, max_chunksize=2)  # as Hugging Face's datasets do


def arrow_file(table: object, path: Path) -> None:
  import pyarrow as pa

  with pa.OSFile(f'{path}', 'wb') as file, pa.ipc.new_file(file, table.schema) as writer:
    writer.write_table(table)


def parquet_file(table: object, path: Path) -> None:
  import pyarrow.parquet

  pyarrow.parquet.write_table(table, f'{path}', row_group_size=2)


@pytest.mark.parametrize(
  'content',
  [
    json.dumps(TEXTS),
    json.dumps([{'text': text, 'id': 1} for text in TEXTS]),
    '\n'.join(json.dumps({'text': text}) for text in TEXTS),
  ],
)
def test_json_is_an_array_or_lines(tmp_path: Path, content: str) -> None:
  (tmp_path / 'a.json').write_text(content)
  assert read(tmp_path / 'a.json') == TEXTS
  (tmp_path / 'a.json.gz').write_bytes(gzip.compress(content.encode()))
  assert read(tmp_path / 'a.json.gz') == TEXTS


def test_one_record_and_another_field(tmp_path: Path) -> None:
  (tmp_path / 'a.json').write_text('{"content": "x", "text": "y"}')
  assert [read(tmp_path / 'a.json', text_field=name) for name in ('content', 'text')] == [
    ['x'],
    ['y'],
  ]
  (tmp_path / 'a.jsonl').write_text('{"content": "x"}\n{"text": "y"}')
  with pytest.raises(ConfigError, match=r'a\.jsonl:2: .*"content".*data\.text_field'):
    read(tmp_path / 'a.jsonl', text_field='content')


@pytest.mark.parametrize('block', [1, 2, 7, 1 << 20])
def test_a_separator_may_lie_across_blocks(
  tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(text_file, 'BLOCK', block)
  path = tmp_path / 'a.txt'
  path.write_bytes('\ufeffa<|b\r\n<|end|>\r\nc\n\n<|end|>d<|end|><|end|>\n'.encode())
  assert read(path, separator='<|end|>') == ['a<|b', 'c\n', 'd', '', '']
  assert read(path, separator='<|end|') == ['a<|b', '>\r\nc\n', '>d', '>', '>']
  assert read(path)[0].startswith('a<|b\r\n<|end|>')


@pytest.mark.parametrize('suffix', ['.txt', '.jsonl', '.json', '.md.gz'])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, suffix: str) -> None:
  content = '\ufeffété' if suffix[1] in 'tm' else '\ufeff{"text": "été"}'
  pack = gzip.compress if suffix.endswith('.gz') else bytes
  (tmp_path / f'a{suffix}').write_bytes(pack(content.encode()))
  assert read(tmp_path / f'a{suffix}') == ['été']
  (tmp_path / 'wide.txt').write_bytes('été'.encode('utf-16'))
  with pytest.raises(ConfigError, match=r'wide\.txt cannot be read as UTF-8.*iconv -t UTF-8'):
    read(tmp_path / 'wide.txt')


@pytest.mark.parametrize('name', ['a.jsonl', 'a.json'])
def test_deep_json_is_an_error_of_its_line(tmp_path: Path, name: str) -> None:
  (tmp_path / name).write_text('[' * 200_000)
  with pytest.raises(ConfigError, match=rf'{name}(:1)?: expected JSON, found RecursionError'):
    read(tmp_path / name)


@pytest.mark.parametrize(
  ('name', 'place'), [('a.txt', r'a\.txt'), ('a.jsonl', r'a\.jsonl:2'), ('a.json.gz', 'a.json.gz')]
)
def test_what_is_too_large_for_a_document_is_told_before_it_is_read(
  tmp_path: Path, name: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(byte_stream, 'LARGEST_DOCUMENT', 40)
  content = b'{"text": "small"}\n{"text": "' + b'x' * 90 + b'"}'
  (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith('.gz') else content)
  with pytest.raises(ConfigError, match=f'{place}: a document or line of more than 40 bytes'):
    read(tmp_path / name)
  if name == 'a.txt':
    with pytest.raises(ConfigError, match='more than 40 bytes'):
      read(tmp_path / name, separator='none')


@pytest.mark.parametrize(
  ('suffix', 'write'),
  [('.parquet', parquet_file), ('.arrow', arrow_stream), ('.arrow', arrow_file)],
)
def test_a_column_of_a_table(
  tmp_path: Path, suffix: str, write: Callable[[object, Path], None]
) -> None:
  pa = pytest.importorskip('pyarrow')
  path = tmp_path / f'a{suffix}'
  table = pa.table({'id': [1, 2, 3], 'text': TEXTS, 'ids': [[1], [2], [3]]})
  write(table, path)
  assert read(path) == TEXTS
  write(table.set_column(1, 'text', table['text'].dictionary_encode().cast('large_string')), path)
  assert read(path) == TEXTS
  for field, words in (
    ('body', r"has no column 'body'; set data.text_field to one of id, text, ids"),
    ('ids', r"the column 'ids' holds list<.*>, not strings"),
  ):
    with pytest.raises(ConfigError, match=words):
      read(path, text_field=field)
  write(pa.table({'text': ['a', 'b', 'c', None]}), path)
  with pytest.raises(ConfigError, match=r'row 4 has no text \(null\)'):
    read(path)
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(ConfigError, match=rf'a\{suffix}'):
    read(path)
  path.write_bytes(b'no table')
  with pytest.raises(ConfigError, match=rf'a\{suffix} cannot be read'):
    read(path)


def test_zst_is_unpacked(tmp_path: Path) -> None:
  pa = pytest.importorskip('pyarrow')
  content = '\n'.join(json.dumps({'text': text}) for text in TEXTS).encode()
  packed = pa.compress(content, 'zstd', asbytes=True)
  # Two frames after each other are one file, as zstd itself has it.
  (tmp_path / 'a.jsonl.zst').write_bytes(
    packed + pa.compress(b'\n' + content, 'zstd', asbytes=True)
  )
  assert read(tmp_path / 'a.jsonl.zst') == TEXTS * 2
  (tmp_path / 'a.jsonl.zst').write_bytes(packed[:-9])
  with pytest.raises(ConfigError, match=r'a\.jsonl\.zst'):
    read(tmp_path / 'a.jsonl.zst')


def test_pyarrow_is_asked_for_where_it_is_missing(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setitem(__import__('sys').modules, 'pyarrow', None)
  for name in ('a.jsonl.zst', 'a.parquet', 'a.arrow'):
    (tmp_path / name).write_bytes(b'')
    with pytest.raises(ConfigError, match=r"is read by pyarrow: pip install 'moejax\[data\]'"):
      read(tmp_path / name)
