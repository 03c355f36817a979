"""Documents to the bytes of a token stream, a group of pieces at a time.

documents -> pieces -> groups -> eod ids eod ids ...
"""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from moejax.config import ConfigError
from moejax.data.tokenizer import Tokenizer

logger = logging.getLogger('moejax')

GROUP_CHARACTERS = 4 << 20  # characters tokenised at once: bounds memory
PROGRESS_SECONDS = 10.0  # between lines that tell how far it is


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


def telling_progress(
  groups: Iterable[list[DocumentPiece]], total_bytes: int
) -> Iterator[list[DocumentPiece]]:
  """Yields the groups, and logs now and then how much text they held, how fast, and what is left.

  total_bytes: UTF-8 bytes of the text of all groups.
  """
  logger.info('tokenising %.1f MB', total_bytes / 1e6)
  done, start = 0, time.perf_counter()
  told = start
  for group in groups:
    yield group
    done += sum(len(piece.text.encode()) for piece in group)
    now = time.perf_counter()
    if now - told >= PROGRESS_SECONDS:
      told = now
      rate = done / (now - start)
      minutes, seconds = divmod(round((total_bytes - done) / rate), 60)
      amount = f'{done / 1e6:.1f} of {total_bytes / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s'
      logger.info('tokenised %s, %dm%02ds left', amount, minutes, seconds)
