"""A model's directory of tensors, as the world exchanges them: model.safetensors, or shards with an index.

open_tensors(directory) -> Tensors -> expect(tensors, shapes) -> tensors.read(name, index)
write_tensors(directory, [Spec], extra files): whole under its name, or not there
Knows no model. Nothing is unpickled and no code is run, whatever the directory holds.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from moejax.config import ConfigError, check
from moejax.hf.safetensors.file import Index, Spec, Stored, read_header, write_file
from moejax.hf.safetensors.quantised import PackedFP4, ScaledBlocks, unquantised
from moejax.runtime.files import (
  FETCH_AGAIN,
  bad_file,
  inside,
  parse_json_object,
  read_json,
  staged,
  write_whole,
)

ONE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
PICKLES = ('*.bin', '*.pt', '*.pth', '*.pkl', '*.ckpt')
SHOWN = 10  # names of each kind in a message


class Tensors:
  """The tensors of a directory, read on demand; those in blocks with scales as the weights that they stand for."""

  def __init__(
    self, directory: Path, found: Mapping[str, Stored | ScaledBlocks | PackedFP4]
  ) -> None:
    self.directory, self._found = directory, dict(found)

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(self._found)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._of(name).shape

  def dtype(self, name: str) -> str:
    """A row of DTYPES: what `read` gives, which is what is stored but for blocks with scales."""
    return self._of(name).dtype

  def is_quantised(self, name: str) -> bool:
    """Whether it lies in blocks with scales."""
    return not isinstance(self._of(name), Stored)

  def path(self, name: str) -> Path:
    """The file that it lies in, for a message."""
    return self._of(name).path

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    """A new array: the slice by `index`, a tuple of slices without steps, and nothing else is read of the file."""
    return self._of(name).read(index)

  def _of(self, name: str) -> Stored | ScaledBlocks | PackedFP4:
    if name not in self._found:
      raise ConfigError(f'{self.directory}: no tensor {name!r}; it has {_some(self._found)}')
    return self._found[name]


def open_tensors(directory: str | os.PathLike) -> Tensors:
  """Reads and checks every header, and no tensor; ConfigError names the file that cannot be trusted, and why."""
  directory = Path(directory)
  try:
    return Tensors(directory, unquantised(_stored(directory), _block_size(directory)))
  except OSError as error:
    raise ConfigError(f'{directory}: {error}; name a directory that can be read') from error


def expect(tensors: Tensors, wanted: Mapping[str, tuple[int, ...]]) -> None:
  """ConfigError of all that is missing, extra or of another shape than wanted, not only of the first."""
  have = {name: tensors.shape(name) for name in tensors.names}
  kinds = {
    'missing': [f'{name} {shape}' for name, shape in wanted.items() if name not in have],
    'extra': [
      f'{name} {shape} in {tensors.path(name).name}'
      for name, shape in have.items()
      if name not in wanted
    ],
    'of another shape': [
      f'{name}: expected {shape}, found {have[name]} in {tensors.path(name).name}'
      for name, shape in wanted.items()
      if name in have and have[name] != shape
    ],
  }
  check(
    *(
      f'{tensors.directory}: {len(which)} tensors {kind}: {_some(which)}; are config.json and they of one model?'
      for kind, which in kinds.items()
      if which
    )
  )


def write_tensors(
  directory: str | os.PathLike,
  specs: Iterable[Spec],
  extra_files: Mapping[str, str | bytes],
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a new directory, one tensor in memory at a time; whatever happens, it is whole or not there.

  ConfigError where the directory holds anything: nothing is ever overwritten.
  """
  target, shards, size = Path(directory).resolve(), [[]], 0
  for spec in specs:
    if shards[-1] and size + spec.nbytes > max_shard_bytes:
      shards, size = [*shards, []], 0
    shards[-1].append(spec)
    size += spec.nbytes
  files = {
    f'model-{i:05d}-of-{len(shards):05d}.safetensors': shard for i, shard in enumerate(shards, 1)
  }
  index = {
    'metadata': {'total_size': sum(spec.nbytes for shard in shards for spec in shard)},
    'weight_map': {spec.name: file for file, shard in files.items() for spec in shard},
  }
  if len(index['weight_map']) < sum(map(len, shards)):
    raise ValueError(f'{target}: a name is given twice')  # a header could hold only one of them
  if len(shards) == 1:
    files = {ONE: shards[0]}
  else:
    extra_files = {**extra_files, INDEX: json.dumps(index, indent=2, sort_keys=True) + '\n'}
  try:
    with staged(target) as partial:
      for file, shard in files.items():
        write_file(partial / file, shard)
      for name, content in extra_files.items():
        write_whole(partial / name, content)
  except OSError as error:
    raise ConfigError(
      f'{target}: {error}; nothing was written: mend that, or name another directory'
    ) from error


def _stored(directory: Path) -> dict[str, Stored]:
  """What lies in the directory: every tensor of every shard once, as the index has it."""
  one, index = inside(directory, ONE), inside(directory, INDEX)
  if one.is_file() and index.is_file():
    raise bad_file(directory, f'{ONE} or {INDEX}', 'both', 'move away the one that is not meant')
  if one.is_file():
    return read_header(one)
  if index.is_file():
    return _indexed(directory, index)
  pickles = sorted(path.name for kind in PICKLES for path in directory.glob(kind))
  if pickles:
    raise bad_file(
      directory,
      f'{ONE} or {INDEX}',
      f'pickles: {_some(pickles)}',
      'they could run any code and are never '
      'unpickled: convert them where you trust them, with save_pretrained(..., safe_serialization=True)',
    )
  raise bad_file(
    directory,
    f'{ONE} or {INDEX}',
    'neither' if directory.is_dir() else 'no directory',
    'name the directory that has config.json and safetensors',
  )


def _indexed(directory: Path, index: Path) -> dict[str, Stored]:
  weight_map = parse_json_object(index, index.read_bytes()).pop('weight_map', None)
  if not isinstance(weight_map, dict) or not all(
    isinstance(file, str) and file.isprintable() for file in weight_map.values()
  ):
    raise bad_file(index, 'a weight_map of tensor to file', f'{weight_map!r:.200}', FETCH_AGAIN)
  shards: dict[str, set[str]] = {}
  for name, file in weight_map.items():
    shards.setdefault(file, set()).add(name)
  paths = {file: inside(directory, file) for file in shards}
  if strange := [file for file in shards if not file.endswith('.safetensors')]:
    raise bad_file(index, 'files of safetensors, nothing else is read', _some(strange), FETCH_AGAIN)
  if gone := [file for file, path in paths.items() if not path.is_file()]:
    raise bad_file(
      index, f'{len(shards)} shards beside it', f'{len(gone)} missing: {_some(gone)}', FETCH_AGAIN
    )
  stored: dict[str, Stored] = {}
  for file, wanted in shards.items():
    found = read_header(paths[file])
    if found.keys() != wanted:
      problems = f'missing {_some(wanted - found.keys())}; extra {_some(found.keys() - wanted)}'
      raise bad_file(
        paths[file], f'the {len(wanted)} tensors that {INDEX} says', problems, FETCH_AGAIN
      )
    stored |= found
  return stored


def _block_size(directory: Path) -> tuple[int, int]:
  """Rows and columns of a block of FP8: those of config.json, where it says so."""
  path = directory / 'config.json'
  match read_json(directory, path.name):
    case {'quantization_config': {'weight_block_size': [int(rows), int(columns)]}} if (
      min(rows, columns) > 0
    ):
      return rows, columns
    case {'quantization_config': {'weight_block_size': found}}:
      raise bad_file(
        path, 'weight_block_size of two positive numbers', f'{found!r:.200}', 'mend it'
      )
  return 128, 128


def _some(names: Collection[str]) -> str:
  """The first few, sorted, and how many more."""
  more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
  return (', '.join(sorted(names)[:SHOWN]) or 'none') + more
