"""One file of tensors: slices, what is in memory, and the bytes of the library's own."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from moejax.hf.safetensors import file as tensor_file
from moejax.hf.safetensors.directory import open_tensors, write_tensors
from moejax.hf.safetensors.file import Spec
from tests.hf.safetensors.tensor_files import entry, noise, raw, write


def test_one_file_is_to_the_byte_the_file_of_the_library(tmp_path: Path) -> None:
  arrays = {'a.é"': noise((3, 5), 'F32'), 'b': noise((2,), 'BF16'), 'c': noise((2, 2), 'F8_E4M3')}
  write(tmp_path / 'ours', arrays)
  save_file(arrays, tmp_path / 'theirs', metadata={'format': 'pt'})
  ours = tmp_path / 'ours' / 'model.safetensors'
  assert ours.read_bytes() == (tmp_path / 'theirs').read_bytes()


def test_slices_are_those_of_numpy_and_only_their_bytes_are_read(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  arrays = {'a': noise((6, 1, 5, 4), 'BF16'), 'b': noise((9,), 'F64'), 'c': noise((), 'I32')}
  rng, got = np.random.default_rng(1), []
  tensors, preadv = open_tensors(write(tmp_path / 'm', arrays)), os.preadv

  def counted(file: int, buffers: list[memoryview], at: int) -> int:
    got.append(preadv(file, [buffers[0][:7]], at))  # the system may give less than was asked for
    return got[-1]

  monkeypatch.setattr(os, 'preadv', counted)
  for _ in range(150):
    for name, array in arrays.items():
      index = tuple(
        slice(*rng.choice([None, -9, -2, 0, 1, 2, 4, 9], 2))
        for _ in range(rng.integers(array.ndim + 1))
      )
      got.clear()
      read = tensors.read(name, index)
      np.testing.assert_array_equal(read, array[index], err_msg=f'{name} {index}')
      assert sum(got) == read.nbytes
  for index in ((slice(0, 4, 2),), (slice(None),) * 5):
    with pytest.raises(IndexError, match='slices'):
      tensors.read('a', index)


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
  size = 1 << 22
  calls = [
    Spec(f't{i}', (1 << 10, 1 << 10), 'F32', lambda i=i: np.full((1 << 10, 1 << 10), i, np.float32))
    for i in range(8)
  ]
  tracemalloc.start()
  try:
    write_tensors(tmp_path / 'm', calls, {}, 3 * size)
    assert size < tracemalloc.get_traced_memory()[1] < 1.5 * size
    tracemalloc.reset_peak()
    tensors = open_tensors(tmp_path / 'm')
    assert all((tensors.read(f't{i}') == i).all() for i in range(8))
    assert size < tracemalloc.get_traced_memory()[1] < 1.5 * size
  finally:
    tracemalloc.stop()


def test_a_view_that_does_not_lie_in_order_is_copied_piece_by_piece(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(tensor_file, 'CHUNK', 64)
  array = noise((50, 12), 'F32').T[:, ::2]
  assert (open_tensors(write(tmp_path / 'm', {'a': array})).read('a') == array).all()


def test_an_empty_tensor_may_stand_anywhere_in_the_header(tmp_path: Path) -> None:
  header = {'t': entry(0, 2, 2), 'u': entry(0, 0, 0), 'v': entry(2, 2, 0, 3)}
  raw(tmp_path / 'model.safetensors', header, b'ab')
  tensors = open_tensors(tmp_path)
  assert [tensors.read(name).tobytes() for name in 'tuv'] == [b'ab', b'', b'']
