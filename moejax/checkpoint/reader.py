"""The leaves of a checkpoint, read one by one; one that cannot be read is told by its name and its file.

Orbax keeps leaves in an OCDBT database: a manifest, nodes of a tree, files of chunks. Its errors name the database,
or the leaf, or nothing; a person wants to know which file to fetch again.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

from moejax.checkpoint.manifest import Meta, digests, unseal
from moejax.runtime.multiprocess import fail_together

TABLE, MANIFEST = (
  '_METADATA',
  'manifest.ocdbt',
)  # of Orbax: which leaves there are, where the tree begins
NOT_DAMAGE = MemoryError, jax.errors.JaxRuntimeError
SHOWN = 3  # files and leaves in a message


class Damaged(ValueError):
  """A file of a checkpoint is not what was written."""


def read_leaves(
  directory: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], sums: Mapping[str, str]
) -> list[jax.Array]:
  """The wanted leaves of Orbax's `directory`, on their shardings, compared with their digests. All processes call it.

  Raises:
    Damaged: names what is not as it was saved, and its file; or another process found something.
  """
  import orbax.checkpoint  # here: it is a quarter of the time that importing moejax may take

  home = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  wanted = {
    p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or home)
    for p, x in wanted.items()
  }
  handler, how = (
    orbax.checkpoint.PyTreeCheckpointHandler(),
    orbax.checkpoint.checkpoint_utils.construct_restore_args,
  )

  def load(path: str) -> jax.Array | Damaged:
    only = {path: wanted[path]}
    try:
      if not wanted[path].size:
        return jnp.zeros(wanted[path].shape, wanted[path].dtype, device=wanted[path].sharding)
      args = orbax.checkpoint.args.PyTreeRestore(only, how(only), partial_restore=True)
      return handler.restore(directory, args=args)[path]
    except NOT_DAMAGE:
      raise
    except Exception as error:
      return _told(directory, [path], error)

  with fail_together(Damaged):
    _expect_tables(directory)
    with ThreadPoolExecutor() as pool:  # Orbax is loud of the others when one fails
      loaded = dict(zip(wanted, pool.map(load, wanted)))
    if bad := [leaf for leaf in loaded.values() if isinstance(leaf, Damaged)]:
      raise Damaged(f'{bad[0]}' + (f' (and {len(bad) - 1} more)' if bad[1:] else ''))
  if wrong := [path for path, value in digests(loaded).items() if value != sums[path]]:
    raise _told(directory, wrong, ValueError('does not match its digest'))
  return [*loaded.values()]


def meta_in(path: Path) -> Meta:
  """What is known of the step in a directory without its arrays; some exception or other where that is damaged."""
  return unseal((path / 'meta' / 'metadata').read_text())


def meta_everywhere(path: Path) -> Meta:
  """The same where every process can read it, and nothing in the directory is a link. All processes call it."""
  with fail_together(Exception):
    expect_plain(path)
    meta = meta_in(path)
  return meta


def expect_plain(directory: Path) -> None:
  """Damaged where anything below is a link: its target could be any file, and another one tomorrow."""
  for folder, folders, files in os.walk(directory):
    for path in (Path(folder, name) for name in (*folders, *files)):
      if path.is_symlink():
        raise Damaged(
          f'{path.relative_to(directory)} is a link, and links are not followed: put a copy in its place'
        )


def _expect_tables(directory: Path) -> None:
  """Damaged for what Orbax tells without a file's name, and with more errors from threads that it leaves behind."""
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


def _told(directory: Path, leaves: Sequence[str], error: Exception) -> Damaged:
  """The error with leaf and file named, and without what only a maintainer of Orbax would read."""
  text = ' '.join(str(error.__cause__ or error).split()).partition(' [tensorstore_spec')[0]
  named = re.findall(r'local file "([^"]*[^"/])"', text)[-1:]
  try:
    files = [str(Path(name).relative_to(directory)) for name in named] or sorted(
      files_of(directory, leaves)
    )
  except (
    Exception
  ) as other:  # the tree that leads to the files is damaged itself: its error has the name
    files = re.findall(rf'local file "{re.escape(str(directory))}/([^"]*[^"/])"', str(other))[-1:]
  what = f'leaf {_some(leaves)}, file ' + _some(
    [f'{directory.name}/{name}' for name in files or [TABLE]]
  )
  is_there = all((directory / name).exists() for name in files)
  reason = text.rpartition('": ')[2][-160:] if is_there else 'missing'
  return Damaged(f'{what}: {reason}')


def files_of(directory: Path, leaves: Sequence[str]) -> set[str]:
  """The files with chunks of the leaves; if some of those are missing or too short, only these."""
  import tensorstore

  base = tensorstore.KvStore.open(f'file://{directory}/').result()

  found: dict[str, int] = {}  # file -> bytes that it must have
  nodes = [(tensorstore.ocdbt.dump(base).result()['versions'][-1]['root']['location'], b'')]
  while nodes:
    location, prefix = nodes.pop()
    for entry in tensorstore.ocdbt.dump(base, location).result()['entries']:
      leaf = (prefix + entry['key']).decode().rpartition('/')[0]
      if 'location' in entry:
        nodes.append((entry['location'], prefix + entry['subtree_common_prefix']))
      elif 'indirect_value' in entry and leaf in leaves:  # value:FOLDER:NAME:START:BYTES
        _, folder, name, start, size = entry['indirect_value'].split(':')
        found[folder + name] = max(
          int(start) + int(size), *(found[n] for n in (folder + name,) if n in found), 0
        )
  sizes = {
    path.relative_to(directory).as_posix(): path.stat().st_size for path in directory.rglob('*')
  }
  return {name for name in found if name not in sizes or sizes[name] < found[name]} or {*found}


def _some(names: Sequence[str]) -> str:
  """The first few, and how many more."""
  return ', '.join(names[:SHOWN]) + (
    f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
  )
