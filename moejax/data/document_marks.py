"""Marks of the end of a document that stand in a text as letters."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator

from moejax.data.tokenizer import EOD_NAMES

logger = logging.getLogger('moejax')

BEGINNINGS = ('<|', '<｜')  # of the marks that are nothing else, as </s> is in HTML
MARKS = tuple(name for name in EOD_NAMES if name.startswith(BEGINNINGS))


def tell_marks(documents: Iterable[str]) -> Iterator[str]:
  """Yields the documents, and after the last of them logs the marks that stand in their text.

  No text encodes to the end-of-document token: such a mark is some ordinary tokens, and what it
  parts is one document, over which attention runs.
  """
  counts: Counter[str] = Counter()
  for document in documents:
    # Most documents have none; two searches are cheaper than one for each mark.
    if any(beginning in document for beginning in BEGINNINGS):
      counts.update({mark: document.count(mark) for mark in MARKS})
    yield document
  for mark, count in counts.items():
    if count:
      logger.warning(
        '%r stands %d times in the text, where it is ordinary letters; if documents end there, '
        'set data.separator=%r',
        mark,
        count,
        mark,
      )
