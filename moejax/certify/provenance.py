"""What a certificate was made with: versions of packages, and the commit of a source.

No jax is imported: a foreign function is certified without it.
"""

import importlib.metadata
import pathlib
import platform
import subprocess

import moejax

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
  """The versions of Python, of moejax, and of the packages that the numbers depend on."""
  ours = {'python': platform.python_version(), 'moejax': moejax.__version__}
  return ours | {name: importlib.metadata.version(name) for name in packages}


def commit(source: pathlib.Path = pathlib.Path(moejax.__file__).parent) -> str:
  """The commit of a directory of source, 'unknown' where git does not say.

  With '+' where files in it differ from the commit.
  """

  def git(*args: str) -> str:
    # Git refuses a checkout of another user, as in a container, unless it is told that it is safe.
    command = ['git', '-c', 'safe.directory=*', *args]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=source)
    return run.stdout.strip()

  try:
    differs = bool(git('status', '--porcelain', '--', '.'))
    return git('rev-parse', '--short=12', 'HEAD') + '+' * differs
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
