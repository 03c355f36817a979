"""Documents to the bytes of a token stream, a group of pieces at a time.

documents -> pieces -> groups -> eod ids eod ids ...
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from moejax.config import ConfigError
from moejax.data.tokenizer import Tokenizer

GROUP_CHARACTERS = 4 << 20  # characters tokenised at once: bounds memory


class DocumentPiece(NamedTuple):
  """A part of a document, which is tokenised by itself."""

  opens_document: bool
  closes_document: bool
  text: str


def id_dtype(tokenizer: Tokenizer) -> np.dtype:
  """Returns uint16, or uint32 where the vocabulary needs it."""
  return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def piece_groups(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[DocumentPiece]]:
  """Yields the pieces of all documents in order, about GROUP_CHARACTERS at a time."""
  group: list[DocumentPiece] = []
  size = 0
  for document in documents:
    for piece in _pieces_of(document, tokenizer):
      group.append(piece)
      size += len(piece.text)
      if size >= GROUP_CHARACTERS:
        yield group
        group, size = [], 0
  yield group


def _pieces_of(document: str, tokenizer: Tokenizer) -> Iterator[DocumentPiece]:
  """Yields the pieces of one document; which is the last is known when no other comes."""
  texts = tokenizer.pieces(document)
  text, opens = next(texts), True
  for following in texts:
    yield DocumentPiece(opens, False, text)
    text, opens = following, False
  yield DocumentPiece(opens, True, text)


def encode_group(group: list[DocumentPiece], tokenizer: Tokenizer) -> bytes:
  """Returns the ids of the pieces after each other, with what opens and closes each document.

  Raises:
    ConfigError: the tokenizer turns text into its end-of-document id, or into ids that it says it
      does not have: JAX would clamp those without an error.
  """
  dtype = id_dtype(tokenizer)
  opening = np.array(tokenizer.opening, dtype).tobytes()
  closing = np.array(tokenizer.closing, dtype).tobytes()
  parts: list[bytes] = []
  for piece, ids in zip(group, tokenizer.encode_batch([piece.text for piece in group])):
    if ids.size and (ids.max() >= tokenizer.vocab_size or (ids == tokenizer.eod_id).any()):
      raise ConfigError(
        f'tokenizer={tokenizer.name!r} turns text into its end of document (id '
        f'{tokenizer.eod_id}) or ids above its {tokenizer.vocab_size}; take another'
      )
    before, after = opening * piece.opens_document, closing * piece.closes_document
    parts += [before, ids.astype(dtype).tobytes(), after]
  return b''.join(parts)


def bytes_of_group(group: list[DocumentPiece]) -> int:
  """Returns the UTF-8 bytes of the text of the pieces."""
  return sum(len(piece.text.encode()) for piece in group)
