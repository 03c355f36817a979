"""Documents of plain text files: the whole file, or what lies between separators."""

import io
from collections.abc import Iterator

from moejax.data.formats.byte_stream import expect_document, open_bytes, read_whole

BLOCK = 1 << 20  # characters read at once


def read_text(path: str, separator: str) -> Iterator[str]:
  """Yields the documents of a file of UTF-8 text, which may begin with a byte order mark.

  Args:
    path: of the file, which may be packed.
    separator: what stands between documents; '': the file is one document.
  """
  with open_bytes(path) as file:
    if not separator:
      yield read_whole(file, path).decode('utf-8-sig')
      return
    # newline='': line ends stay as they are.
    with io.TextIOWrapper(file, 'utf-8-sig', newline='') as text:
      yield from _split(text, separator, path)


def _split(text: io.TextIOBase, separator: str, path: str) -> Iterator[str]:
  """Yields what lies between separators; the file is never in memory as a whole."""
  pending: list[str] = []  # blocks of a document whose end is not read yet
  size = 0  # characters in them
  while block := text.read(BLOCK):
    if pending:
      # A separator may begin in one block and end in the next.
      tail = pending.pop()
      block, size = tail + block, size - len(tail)
    *documents, rest = block.split(separator)
    for document in documents:
      yield _without_line_breaks(''.join((*pending, document)))
      pending, size = [], 0
    # All but what may be the beginning of a separator is put away, so that no letter is searched
    # more than twice.
    cut = max(len(rest) - len(separator) + 1, 0)
    pending += [rest[:cut], rest[cut:]]
    size += len(rest)
    expect_document(size, path)
  yield _without_line_breaks(''.join(pending))


def _without_line_breaks(document: str) -> str:
  """Returns the document without one line break at each end: a separator has a line to itself."""
  for line_break in ('\r\n', '\n'):
    if document.startswith(line_break):
      document = document.removeprefix(line_break)
      break
  return document.removesuffix('\n').removesuffix('\r')
