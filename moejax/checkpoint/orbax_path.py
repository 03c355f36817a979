"""A path that Orbax and TensorStore take as it is written.

Both put a directory's path into patterns and URLs: Orbax's merge of what the processes wrote is a
glob, in which `[x]` is one letter, and finds nothing then; `gs:`, `%41`, `#` and `?` mean something
in a URL.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def plain_path(directory: Path) -> Iterator[Path]:
  """Yields a path of the directory, without a character that means something in a glob or a URL.

  That is the path itself, or else a link to it in a temporary directory of this process, which
  keeps the directory's name where that is plain.
  """
  if _is_plain(str(directory)):
    yield directory
    return
  with tempfile.TemporaryDirectory(prefix='moejax-', ignore_cleanup_errors=True) as place:
    link = Path(place, directory.name if _is_plain(directory.name) else 'directory')
    link.symlink_to(directory.absolute())
    yield link


def _is_plain(path: str) -> bool:
  """Tells whether a path has only characters that stand for themselves everywhere."""
  return re.fullmatch(r'[\w/.-]*', path, re.ASCII) is not None
