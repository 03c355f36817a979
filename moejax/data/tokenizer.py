"""Text to token ids and back: bytes, a byte-level BPE trained here, or anybody's tokenizer.json."""

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moejax.config import ConfigError, check
from moejax.runtime.files import write_whole

logger = logging.getLogger('moejax')

EOD = '<|endoftext|>'
EOD_NAMES = (
  EOD,
  '<|end_of_text|>',
  '<|eod|>',
  '<|eos|>',
  '<eos>',
  '</s>',
  '[EOS]',
  '<｜end▁of▁sentence｜>',
)
PIECE = 1 << 18  # characters
SEAM = re.compile(
  r'(?<=[\w!-~]\n)(?=[\w!-~])'
)  # a lone line break, where the pre-tokenizer cuts anyway
SMALLEST_BPE = 257  # every byte, so that any text can be written, and the end of document


class Tokenizer:
  """Text <-> ids. No text encodes to `eod_id`, the token between documents, not even that token's name."""

  def __init__(self, json_text: str, name: str) -> None:
    try:
      self._backend = tokenizers.Tokenizer.from_str(json_text)
    except Exception as error:  # the library raises bare Exception
      raise ConfigError(f'tokenizer={name!r} is not a tokenizer.json: {error}') from error
    self._backend.encode_special_tokens = True  # special tokens spelt out in a text are text
    self._backend.no_truncation()
    self._backend.no_padding()
    vocabulary = self._backend.get_vocab(with_added_tokens=True)
    found = [vocabulary[eod] for eod in EOD_NAMES if eod in vocabulary]
    check(
      ''
      if found
      else f'tokenizer={name!r} has no end-of-document token, one of {", ".join(EOD_NAMES)}'
    )
    self.name, self.eod_id = name, found[0]
    self.vocab_size = max(vocabulary.values()) + 1  # not the count: ids may have holes
    self.specials = {
      token.content: i
      for i, token in self._backend.get_added_tokens_decoder().items()
      if token.special
    }
    self.digest = hashlib.blake2b(json_text.encode(), digest_size=16).hexdigest()
    self.json_text, self._is_bytes = json_text, json_text == _bytes_json()

  def pieces(self, text: str) -> Iterator[str]:
    """Pieces that encode to the ids of the whole, so that cores share a long text and memory is bounded."""
    start = 0
    if self.name.startswith('bpe:'):  # others' rules may look across lines
      while seam := SEAM.search(text, start + PIECE):
        yield text[start : seam.start()]
        start = seam.start()
    yield text[start:]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """One array of ids a text, on all cores."""
    if (
      self._is_bytes
    ):  # ids are the bytes: no need to go by way of a hundred bytes of objects for each
      return [np.frombuffer(text.encode(), np.uint8) for text in texts]
    encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.uint32) for encoding in encodings]

  def encode(self, text: str) -> list[int]:
    return self.encode_batch([text])[0].tolist()

  def decode(self, ids: Sequence[int]) -> str:
    """The text of the ids without special tokens; a character cut in half comes out as U+FFFD."""
    return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

  def save(self, path: str | Path) -> None:
    """Writes the tokenizer.json that `load_tokenizer(path)` gives back, digest and all."""
    write_whole(Path(path), self.json_text)


def spec_problem(spec: str) -> str:
  """What is wrong with a tokenizer's name, '' when nothing is; whether a file is there is not looked at."""
  kind, _, size = spec.partition(':')
  if kind == 'bpe' and (not size.isdecimal() or int(size) < SMALLEST_BPE):
    return f'tokenizer={spec!r}: give bpe:N with N at least {SMALLEST_BPE} (the bytes and end of document)'
  if kind == 'bpe' or spec == 'bytes' or spec.endswith('.json'):
    return ''
  return f'tokenizer={spec!r} is none of bytes, bpe:N and the path of a tokenizer.json'


def load_tokenizer(spec: str, train_documents: Iterable[str] = ()) -> Tokenizer:
  """The tokenizer `spec` names; bpe:N learns from `train_documents` (1 s per 6 MB: keep `json_text`)."""
  check(spec_problem(spec))
  if spec == 'bytes':
    return Tokenizer(_bytes_json(), spec)
  if spec.startswith('bpe:'):
    tokenizer = Tokenizer(_train_bpe(int(spec[4:]), train_documents), spec)
    if tokenizer.vocab_size < int(spec[4:]):
      logger.warning('the text yields %d tokens only, not %s', tokenizer.vocab_size, spec[4:])
    return tokenizer
  try:
    json_text = Path(spec).expanduser().read_bytes().decode()
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(
      f'tokenizer={spec!r}: {error}; give bytes, bpe:N or a tokenizer.json'
    ) from error
  tokenizer, probe = Tokenizer(json_text, spec), 'def f(A):\n\treturn "é 火 \U0001f525"  # end\n'
  if tokenizer.decode(tokenizer.encode(probe)) != probe:
    logger.warning(
      'tokenizer %s does not give a text back unchanged: bits per byte come out too low', spec
    )
  return tokenizer


def _train_bpe(size: int, documents: Iterable[str]) -> str:
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # bytes that the text lacks, too
  backend.train_from_iterator(
    documents,
    trainers.BpeTrainer(
      vocab_size=size, special_tokens=[EOD], initial_alphabet=alphabet, show_progress=False
    ),
  )
  return backend.to_str()


def _bytes_json() -> str:
  """A BPE without merges whose id of each byte is the byte, so that `bytes` saves and loads like the rest."""
  printable = [
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
  ]  # GPT-2 spells the others from 256 on
  others = (b for b in range(256) if b not in printable)
  vocabulary = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens([EOD])
  return backend.to_str()
