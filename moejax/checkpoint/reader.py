"""The leaves of a checkpoint, read one by one; errors name the leaf and the file.

Orbax keeps leaves in an OCDBT database: a manifest, nodes of a tree, files of chunks. Its errors
name the database, or the leaf, or nothing; a person wants to know which file to fetch again.
"""

import functools
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

from moejax.checkpoint.manifest import Meta, digests, unseal
from moejax.checkpoint.orbax_path import plain_path
from moejax.runtime.multiprocess import fail_together

# Files of Orbax: which leaves there are, and where the tree begins.
TABLE = '_METADATA'
MANIFEST = 'manifest.ocdbt'
NOT_DAMAGE = (MemoryError, jax.errors.JaxRuntimeError)  # errors of the machine that reads
NAMES_SHOWN = 3  # files and leaves in a message


class Damaged(ValueError):
  """A file of a checkpoint is not what was written."""


def read_leaves(
  directory: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], sums: Mapping[str, str]
) -> list[jax.Array]:
  """Returns the wanted leaves on their shardings, in order; all processes call it.

  Args:
    directory: Orbax's, that is, the part `state` of a step.
    wanted: path -> shape, dtype and sharding; None for a sharding: on the first device.
    sums: path -> digest that the leaf had when it was saved.

  Raises:
    Damaged: names what is not as it was saved, and its file; or another process found something.
  """
  import orbax.checkpoint  # here: it is a quarter of the time that importing moejax may take

  first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  targets = {
    path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or first_device)
    for path, leaf in wanted.items()
  }
  handler = orbax.checkpoint.PyTreeCheckpointHandler()

  def load(directory: Path, path: str) -> jax.Array | Damaged:
    target = targets[path]
    if not target.size:  # Orbax refuses to save empty arrays
      return jnp.zeros(target.shape, target.dtype, device=target.sharding)
    try:
      tree = {path: target}
      how = orbax.checkpoint.checkpoint_utils.construct_restore_args(tree)
      args = orbax.checkpoint.args.PyTreeRestore(tree, how, partial_restore=True)
      return handler.restore(directory, args=args)[path]
    except NOT_DAMAGE:
      raise
    except Exception as error:
      return damaged(directory, [path], error)

  with fail_together(Damaged):
    expect_tables(directory)
    # One leaf a call: of a call for all, Orbax would print an error for each when one fails.
    with plain_path(directory) as plain, ThreadPoolExecutor() as pool:
      loaded = dict(zip(targets, pool.map(functools.partial(load, plain), targets)))
    bad = [leaf for leaf in loaded.values() if isinstance(leaf, Damaged)]
    if bad:
      more = f' (and {len(bad) - 1} more)' if len(bad) > 1 else ''
      raise Damaged(f'{bad[0]}{more}')
  # Outside of fail_together: digests are computed by all processes at once, and alike in all.
  wrong = [path for path, digest in digests(loaded).items() if digest != sums[path]]
  if wrong:
    raise damaged(directory, wrong, ValueError('does not match its digest'))
  return [*loaded.values()]


def meta_in(path: Path) -> Meta:
  """Returns all of the step in a directory but its arrays.

  Where that is damaged, raises some exception or other.
  """
  return unseal((path / 'meta' / 'metadata').read_text())


def meta_everywhere(path: Path) -> Meta:
  """Returns the same, where all processes can read it and nothing in the directory is a link.

  All processes call it. Where one of them fails, all raise.
  """
  with fail_together(Exception):
    expect_plain(path)
    meta = meta_in(path)
  return meta


def expect_plain(directory: Path) -> None:
  """Raises Damaged where anything below is a link.

  Its target could be any file, and another one tomorrow.
  """
  for folder, folders, files in os.walk(directory):
    for name in (*folders, *files):
      path = Path(folder, name)
      if path.is_symlink():
        link = path.relative_to(directory)
        raise Damaged(f'{link} is a link, and links are not followed: put a copy in its place')


def expect_tables(directory: Path) -> None:
  """Raises Damaged where a table of the database is missing or torn.

  Orbax would not name the file, and leave threads behind that print more errors.
  """
  for name in (MANIFEST, TABLE):
    if not (directory / name).exists():
      raise Damaged(f'file {directory.name}/{name}: missing, and every leaf with it')
  for path in (directory / TABLE, *sorted(directory.glob('array_metadatas/*'))):
    try:
      json.loads(path.read_bytes())
    except ValueError as error:
      raise Damaged(
        f'file {path.relative_to(directory.parent)}: not JSON ({type(error).__name__})'
      ) from error


def damaged(directory: Path, leaves: Sequence[str], error: Exception) -> Damaged:
  """Returns an error that names the leaves and their file, in one line.

  What only a maintainer of Orbax would read is left out of it.

  Args:
    directory: Orbax's.
    leaves: paths of the leaves that are damaged.
    error: what reading them raised.
  """
  text = ' '.join(str(error.__cause__ or error).split()).partition(' [tensorstore_spec')[0]
  files = _files_to_blame(directory, leaves, text)
  is_missing = any(not (directory / name).exists() for name in files)
  reason = 'missing' if is_missing else text.rpartition('": ')[2][-160:]
  names = _first_few([f'{directory.name}/{name}' for name in files or [TABLE]])
  return Damaged(f'leaf {_first_few(leaves)}, file {names}: {reason}')


def _files_to_blame(directory: Path, leaves: Sequence[str], text: str) -> list[str]:
  """Returns the files, relative to the directory, that the text of an error is about.

  The last file that it names, or else those that the leaves are in.
  """
  named = re.findall(r'local file "([^"]*[^"/])"', text)
  try:
    if named:
      return [str(Path(named[-1]).relative_to(directory))]
    return sorted(files_of(directory, leaves))
  except Exception as error:
    # The tree that leads to the files is damaged itself, and its own error names its file.
    return re.findall(rf'local file "{re.escape(str(directory))}/([^"]*[^"/])"', str(error))[-1:]


def files_of(directory: Path, leaves: Collection[str]) -> set[str]:
  """Returns the files with chunks of the leaves; if some are missing or too short, only these.

  The names are relative to the directory, which is Orbax's.
  """
  chunks = chunk_ends(directory)
  needed: dict[str, int] = {}  # file -> bytes that it must have
  for leaf in chunks.keys() & set(leaves):
    for file, end in chunks[leaf].items():
      needed[file] = max(needed[file], end) if file in needed else end
  return _too_short(directory, needed) or set(needed)


def chunk_ends(directory: Path) -> dict[str, dict[str, int]]:
  """Returns leaf -> file with chunks of it -> byte at which the last of them ends.

  Small values lie in the index itself, and have no file. Only the index is read. The names of files
  are relative to the directory, which is Orbax's.
  """
  import tensorstore

  ends: dict[str, dict[str, int]] = {}
  with plain_path(directory) as plain:
    base = tensorstore.KvStore.open(f'file://{plain}/').result()
    newest = tensorstore.ocdbt.dump(base).result()['versions'][-1]
    nodes = [(newest['root']['location'], b'')]
    while nodes:
      location, prefix = nodes.pop()
      for entry in tensorstore.ocdbt.dump(base, location).result()['entries']:
        if 'location' in entry:
          nodes.append((entry['location'], prefix + entry['subtree_common_prefix']))
          continue
        # The keys of a node lack what all keys below it share. A key is LEAF/CHUNK.
        leaf = (prefix + entry['key']).decode().rpartition('/')[0]
        files = ends.setdefault(leaf, {})
        if 'indirect_value' in entry:  # value:FOLDER:NAME:START:BYTES
          _, folder, name, start, size = entry['indirect_value'].split(':')
          file, end = folder + name, int(start) + int(size)
          files[file] = max(files[file], end) if file in files else end
  return ends


def _too_short(directory: Path, needed: Mapping[str, int]) -> set[str]:
  """Returns which of the files are missing, or have fewer bytes than they must have."""
  sizes = {
    path.relative_to(directory).as_posix(): path.stat().st_size for path in directory.rglob('*')
  }
  return {name for name in needed if name not in sizes or sizes[name] < needed[name]}


def expect_readable(path: Path, leaves: Collection[str]) -> None:
  """Raises Damaged where a reader would not find the leaves of a step that was just written.

  It reads the tables and the index and looks at the lengths of the files: no array is read.

  Args:
    path: directory of the step.
    leaves: paths of all leaves that Orbax was given.
  """
  meta_in(path)
  directory = path / 'state'
  expect_tables(directory)
  chunks = chunk_ends(directory)
  for leaf in leaves:
    if leaf not in chunks:
      raise Damaged(f'leaf {leaf} is not in the index that was written')
    short = _too_short(directory, chunks[leaf])
    if short:
      raise Damaged(f'leaf {leaf}, file state/{min(short)} is missing or too short')


def _first_few(names: Sequence[str]) -> str:
  """Returns the first few names, and how many more there are."""
  more = f' and {len(names) - NAMES_SHOWN} more' if len(names) > NAMES_SHOWN else ''
  return ', '.join(names[:NAMES_SHOWN]) + more
