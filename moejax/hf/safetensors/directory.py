"""A model's directory of tensors: model.safetensors, or shards of it with an index.

open_tensors(directory) -> Tensors -> expect(tensors, shapes) -> tensors.read(name, index)
write_tensors(directory, [Spec], extra files): whole under its name, or not there
Knows no model. Nothing is unpickled and no code is run, whatever the directory holds.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from moejax.config import ConfigError, check
from moejax.hf.safetensors.file import Index, Spec, Stored, read_header, write_file
from moejax.hf.safetensors.quantised import BlockSize, PackedFP4, ScaledBlocks, unquantised
from moejax.runtime.files import (
  FETCH_AGAIN,
  bad_file,
  inside,
  parse_json_object,
  read_json,
  write_whole,
)
from moejax.runtime.multiprocess import (
  fail_together,
  is_first_process,
  of_this_process,
  staged_together,
)

ONE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
PICKLES = ('*.bin', '*.pt', '*.pth', '*.pkl', '*.ckpt')
OTHER_INDEX = (
  'the index and the shards are not of one save: keep only the files of one, or write them anew '
  'with save_pretrained'
)
SHOWN_NAMES = 10  # names of each kind in a message


class Tensors:
  """The tensors of a directory, read on demand.

  Those in blocks with scales are the weights that they stand for.
  """

  def __init__(
    self, directory: Path, tensors: Mapping[str, Stored | ScaledBlocks | PackedFP4]
  ) -> None:
    self.directory, self._tensors = directory, dict(tensors)

  @property
  def names(self) -> tuple[str, ...]:
    """The names of all tensors, in the order of the files."""
    return tuple(self._tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of what `read` gives."""
    return self._named(name).shape

  def dtype(self, name: str) -> str:
    """Returns the dtype of what `read` gives, a row of DTYPES.

    It is what is stored but for blocks with scales.
    """
    return self._named(name).dtype

  def is_quantised(self, name: str) -> bool:
    """Returns whether the tensor lies in blocks with scales."""
    return not isinstance(self._named(name), Stored)

  def path(self, name: str) -> Path:
    """Returns the file that the tensor lies in, for a message."""
    return self._named(name).path

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    """Returns a slice as a new array; nothing else is read of the file.

    Args:
      name: of the tensor.
      index: a slice without a step for each of the first axes; the others are whole.
    """
    return self._named(name).read(index)

  def _named(self, name: str) -> Stored | ScaledBlocks | PackedFP4:
    if name not in self._tensors:
      raise ConfigError(f'{self.directory}: no tensor {name!r}; it has {_some(self._tensors)}')
    return self._tensors[name]


def open_tensors(directory: str | os.PathLike) -> Tensors:
  """Reads and checks every header, and no tensor.

  Raises:
    ConfigError: names the file that cannot be trusted, and why.
  """
  directory = Path(directory)
  try:
    return Tensors(directory, unquantised(_stored(directory), _block_size(directory)))
  except OSError as error:
    raise ConfigError(f'{directory}: {error}; name a directory that can be read') from error


def expect(tensors: Tensors, wanted: Mapping[str, tuple[int, ...]]) -> None:
  """Checks that a directory has just the tensors that are wanted, in their shapes.

  Args:
    tensors: of the directory.
    wanted: name -> shape.

  Raises:
    ConfigError: tells all that is missing, extra or of another shape, not only the first.
  """
  check(*difference(tensors, wanted, 'are config.json and they of one model?'))


def difference(
  tensors: Tensors, wanted: Mapping[str, tuple[int, ...]], remedy: str
) -> Iterator[str]:
  """Yields a problem for all that is missing in a directory, one for extra, one for other shapes.

  Args:
    tensors: of the directory.
    wanted: name -> shape.
    remedy: the end of each problem.
  """
  have = {name: tensors.shape(name) for name in tensors.names}
  missing: list[str] = []
  extra: list[str] = []
  misshapen: list[str] = []
  for name, shape in wanted.items():
    if name not in have:
      missing.append(f'{name} {shape}')
    elif have[name] != shape:
      misshapen.append(f'{name}: expected {shape}, found {have[name]} in {tensors.path(name).name}')
  for name, shape in have.items():
    if name not in wanted:
      extra.append(f'{name} {shape} in {tensors.path(name).name}')
  kinds = {'missing': missing, 'extra': extra, 'of another shape': misshapen}
  for kind, names in kinds.items():
    if names:
      yield f'{tensors.directory}: {len(names)} tensors {kind}: {_some(names)}; {remedy}'


def write_tensors(
  directory: str | os.PathLike,
  specs: Iterable[Spec],
  extra_files: Mapping[str, str | bytes],
  max_shard_bytes: int = 5_000_000_000,
  verify: Callable[[], object] = lambda: None,
) -> None:
  """Writes a new directory, one tensor in memory at a time; it is whole or not there.

  Of several processes each writes some of the shards, all into one directory.

  Args:
    directory: to be made.
    specs: the tensors, in the order in which they fill the shards.
    extra_files: name -> content.
    max_shard_bytes: a shard is no larger, unless a single tensor is.
    verify: called by all processes when all is written; where it raises, nothing is.

  Raises:
    ConfigError: the directory holds anything: nothing is ever overwritten.
    ValueError: a tensor could not be made.
  """
  target = Path(directory).resolve()
  shards = fill_shards(specs, max_shard_bytes)
  files = {ONE: shards[0]}
  if len(shards) > 1:
    names = [f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors' for i in range(len(shards))]
    files = dict(zip(names, shards))
  weight_map = {spec.name: file for file, shard in files.items() for spec in shard}
  if len(weight_map) < sum(map(len, shards)):
    raise ValueError(f'{target}: a name is given twice')  # a header could hold only one of them
  if len(shards) > 1:
    total_size = sum(spec.nbytes for shard in shards for spec in shard)
    index = {'metadata': {'total_size': total_size}, 'weight_map': weight_map}
    extra_files = {**extra_files, INDEX: json.dumps(index, indent=2, sort_keys=True) + '\n'}
  try:
    with staged_together(target) as partial:
      with fail_together(ConfigError, OSError, ValueError):
        for file in of_this_process(files):
          write_file(partial / file, files[file])
        if is_first_process():
          for name, content in extra_files.items():
            write_whole(partial / name, content)
      verify()
  except OSError as error:
    raise ConfigError(
      f'{target}: {error}; nothing was written: mend that, or name another directory'
    ) from error


def fill_shards(specs: Iterable[Spec], max_shard_bytes: int) -> list[list[Spec]]:
  """Returns the tensors of each shard, in their order; one empty shard where there are none."""
  shards: list[list[Spec]] = [[]]
  size = 0
  for spec in specs:
    if shards[-1] and size + spec.nbytes > max_shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(spec)
    size += spec.nbytes
  return shards


def _stored(directory: Path) -> dict[str, Stored]:
  """What lies in the directory: every tensor of every shard once, as the index has it."""
  # `inside` refuses a link that leads out of the directory.
  one, index = inside(directory, ONE), inside(directory, INDEX)
  if one.is_file() and index.is_file():
    raise bad_file(directory, f'{ONE} or {INDEX}', 'both', 'move away the one that is not meant')
  if one.is_file():
    return read_header(one)
  if index.is_file():
    return _indexed(directory, index)
  pickles = sorted(path.name for kind in PICKLES for path in directory.glob(kind))
  if pickles:
    remedy = (
      'they could run any code and are never unpickled: convert them where you trust them, '
      'with save_pretrained(..., safe_serialization=True)'
    )
    raise bad_file(directory, f'{ONE} or {INDEX}', f'pickles: {_some(pickles)}', remedy)
  raise bad_file(
    directory,
    f'{ONE} or {INDEX}',
    'neither' if directory.is_dir() else 'no directory',
    'name the directory that has config.json and safetensors',
  )


def _indexed(directory: Path, index: Path) -> dict[str, Stored]:
  """The tensors of all shards that the index names, each of which has just those that it says."""
  weight_map = parse_json_object(index, index.read_bytes()).pop('weight_map', None)
  files = weight_map.values() if isinstance(weight_map, dict) else [None]
  if not all(isinstance(file, str) and file.isprintable() for file in files):
    raise bad_file(index, 'a weight_map of tensor to file', f'{weight_map!r:.200}', FETCH_AGAIN)
  shards: dict[str, set[str]] = {}
  for name, file in weight_map.items():
    shards.setdefault(file, set()).add(name)
  # An index may name any path: no shard is opened before all of them have been looked at.
  paths = {file: inside(directory, file) for file in shards}
  if strange := [file for file in shards if not file.endswith('.safetensors')]:
    raise bad_file(index, 'files of safetensors, nothing else is read', _some(strange), FETCH_AGAIN)
  if gone := [file for file, path in paths.items() if not path.is_file()]:
    raise bad_file(
      index, f'{len(shards)} shards beside it', f'{len(gone)} missing: {_some(gone)}', FETCH_AGAIN
    )
  stored: dict[str, Stored] = {}
  for file, wanted in shards.items():
    header = read_header(paths[file])
    # What the index does not name at all is there all the same; who knows the model may judge.
    elsewhere = header.keys() & weight_map.keys() - wanted
    if wanted - header.keys() or elsewhere:
      problems = f'missing {_some(wanted - header.keys())}; extra {_some(elsewhere)}'
      expected = f'the {len(wanted)} tensors that {INDEX} says'
      raise bad_file(paths[file], expected, problems, OTHER_INDEX)
    if twice := header.keys() & stored.keys():
      raise bad_file(paths[file], 'every tensor once', f'again {_some(twice)}', OTHER_INDEX)
    stored |= header
  return stored


def _block_size(directory: Path) -> BlockSize:
  """The size of config.json, where it says so; else DeepSeek's."""
  path = directory / 'config.json'
  match read_json(directory, path.name):
    case {'quantization_config': {'weight_block_size': [int(rows), int(columns)]}} if (
      min(rows, columns) > 0
    ):
      return BlockSize(rows, columns)
    case {'quantization_config': {'weight_block_size': found}}:
      raise bad_file(
        path, 'weight_block_size of two positive numbers', f'{found!r:.200}', 'mend it'
      )
  return BlockSize(128, 128)


def _some(names: Collection[str]) -> str:
  """The first few, sorted, and how many more."""
  more = f' and {len(names) - SHOWN_NAMES} more' if len(names) > SHOWN_NAMES else ''
  return (', '.join(sorted(names)[:SHOWN_NAMES]) or 'none') + more
