"""Which files a leaf is in, and which of them are to blame."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tensorstore

from moejax.checkpoint import reader as leaves


def test_a_leaf_among_many_leads_to_its_file(tmp_path: Path) -> None:
  """The tree of a large checkpoint has nodes below nodes, whose keys lack what they share."""
  options = {'max_inline_value_bytes': 10, 'max_decoded_node_bytes': 300}
  store = tensorstore.KvStore.open(
    {'driver': 'ocdbt', 'base': f'file://{tmp_path}/', 'config': options}
  ).result()
  for i in range(60):
    store[f'model/x{i:02}/0.0'] = b'z' * (50 + i)
  sizes = {i: leaves.files_of(tmp_path, [f'model/x{i:02}']) for i in range(60)}
  assert all(len(files) == 1 for files in sizes.values()) and len({*map(str, sizes.values())}) == 60
  assert [
    (tmp_path / name).stat().st_size >= 50 + i for i, files in sizes.items() for name in files
  ] == [True] * 60
  assert leaves.files_of(tmp_path, ['model/x1', 'x01', 'model']) == set()


def test_of_the_files_of_a_leaf_the_short_and_the_missing_are_named(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  chunks = {b'a/0': 'value:p/:d/1:0:50', b'a/1': 'value:p/:d/2:0:60', b'a/2': 'value:p/:d/2:60:10'}
  tree = {
    '': {'versions': [{'root': {'location': 'root'}}]},
    'root': {'entries': [{'key': key, 'indirect_value': value} for key, value in chunks.items()]},
  }
  monkeypatch.setattr(
    tensorstore.ocdbt, 'dump', lambda base, node='': SimpleNamespace(result=lambda: tree[node])
  )
  (tmp_path / 'p' / 'd').mkdir(parents=True)
  for first, second, named in (
    (50, 70, {'1', '2'}),
    (50, 69, {'2'}),
    (49, 70, {'1'}),
    (0, 0, {'1', '2'}),
  ):
    (tmp_path / 'p' / 'd' / '1').write_bytes(bytes(first))
    (tmp_path / 'p' / 'd' / '2').write_bytes(bytes(second))
    assert leaves.files_of(tmp_path, ['a']) == {f'p/d/{name}' for name in named}
  (tmp_path / 'p' / 'd' / '2').unlink()
  (tmp_path / 'p' / 'd' / '1').write_bytes(bytes(50))
  assert leaves.files_of(tmp_path, ['a']) == {'p/d/2'}
