"""Text to token ids and back: bytes, a byte-level BPE trained here, or anybody's tokenizer.json."""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moejax.config import ConfigError, check, problem_if
from moejax.data.special_tokens import OWN, TOKENIZER_CONFIG, SpecialTokens
from moejax.data.text_digest import digest_of_text
from moejax.runtime.files import write_whole

logger = logging.getLogger('moejax')

EOD = '<|endoftext|>'
# What the makers of tokenizers call the end of a document; the first that a vocabulary has counts.
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
PIECE = 1 << 18  # characters that a piece of a text has at least
LONGEST_PIECE = 1 << 22  # what tokens of a piece take in memory is a hundred times as much
# After a lone line break, where the pre-tokenizer of our BPE cuts anyway.
SEAM = re.compile(r'(?<=[\w!-~]\n)(?=[\w!-~])')
# Characters of the longest run of letters, digits, signs or blanks that our BPE takes as one word.
# Learning from a word takes the square of its length: a megabyte of DNA would take hours.
LONGEST_WORD = 256
# How GPT-2 cuts a text into words, and so do we, but that a run has an end.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = GPT2_WORDS.replace('+', f'{{1,{LONGEST_WORD}}}')
SMALLEST_BPE = 257  # every byte, so that any text can be written, and the end of document


class Tokenizer:
  """Text <-> ids.

  No text encodes to `eod_id`, the token between documents, not even that token's name.

  In a run of our own, eod opens every document and every prompt. A published model is given what
  its publisher says: documents are opened as prompts are, by bos or by nothing, and eod ends them.

  Attributes:
    name: what it was asked for by: bytes, bpe:N or a path.
    eod_id: the end-of-document token.
    opening: the ids that open each document and prompt; () for some published models.
    closing: the ids that end each document; () where the opening of the next one does.
    ends: the ids that end a text that a model writes.
    special: what the publisher says; OWN where it is of another tokenizer.
    vocabulary: text -> id of all tokens.
    vocab_size: one more than the largest id.
    specials: name -> id of the special tokens, eod included.
    digest: 32 hex digits of `json_text`.
    json_text: the content of its tokenizer.json.
  """

  def __init__(self, json_text: str, name: str, special: SpecialTokens = OWN) -> None:
    """Reads a tokenizer.json.

    Args:
      json_text: its content.
      name: for errors; whether it begins with 'bpe:' tells whether it was trained here.
      special: of the model that it is for.

    Raises:
      ConfigError: it is not a tokenizer.json, or has no end-of-document token.
    """
    try:
      self._backend = tokenizers.Tokenizer.from_str(json_text)
    except Exception as error:  # the library raises bare Exception
      raise ConfigError(f'tokenizer={name!r} is not a tokenizer.json: {error}') from error
    self._backend.encode_special_tokens = True  # special tokens spelt out in a text are text
    self._backend.no_truncation()  # which a file may ask for, and which would lose text
    self._backend.no_padding()
    self.digest = digest_of_text(json_text)
    # Ids mean nothing in another tokenizer.
    self.special = special if special.tokenizer_digest in ('', self.digest) else OWN
    self.name = name
    self.vocabulary = self._backend.get_vocab(with_added_tokens=True)
    # Not the count: ids may have holes.
    self.vocab_size = max(self.vocabulary.values(), default=-1) + 1
    added_tokens = self._backend.get_added_tokens_decoder()
    self.specials = {token.content: i for i, token in added_tokens.items() if token.special}
    self.eod_id = self._end_of_document()
    own_opening = (self.eod_id,)
    self.opening = self._published_opening() if self.special.is_published else own_opening
    self.closing = () if self.opening == own_opening else (self.eod_id,)
    self.ends = tuple(dict.fromkeys([*self.special.eos_ids, self.eod_id]))
    self.json_text = json_text
    self._is_bytes = json_text == _bytes_json()

  def _end_of_document(self) -> int:
    """The id between documents: of those that the publisher names, the one with a usual name."""
    known = {*self.vocabulary.values()}
    said = [i for i in self.special.eos_ids if i in known]
    usual = [self.vocabulary[eod] for eod in EOD_NAMES if eod in self.vocabulary]
    candidates = [i for i in usual if i in said] or said or usual
    if not candidates:
      eods = ', '.join(EOD_NAMES)
      raise ConfigError(f'tokenizer={self.name!r} has no end-of-document token, one of {eods}')
    return candidates[0]

  def _published_opening(self) -> tuple[int, ...]:
    """The ids that transformers 4 puts before a text.

    tokenizer_config.json decides where it has add_bos_token, and the post-processor of
    tokenizer.json where it has not. A bos_token_id in config.json alone opens nothing: Qwen's files
    have one that no text begins with.
    """
    said = self.special.tokenizer_config()
    if 'add_bos_token' not in said or not isinstance(said['add_bos_token'], bool):
      encoding = self._backend.encode('a', add_special_tokens=True)
      mask = [*encoding.special_tokens_mask, 0]
      return tuple(encoding.ids[: mask.index(0)])
    if not said['add_bos_token']:
      return ()
    bos_id = self._id_of(said['bos_token'] if 'bos_token' in said else None)
    bos_id = self.special.bos_id if bos_id < 0 else bos_id
    check(
      problem_if(
        bos_id not in self.vocabulary.values(),
        f'tokenizer={self.name!r}: {TOKENIZER_CONFIG} has add_bos_token=true, and neither its '
        'bos_token nor bos_token_id of config.json is a token: mend one of them',
      )
    )
    return (bos_id,)

  def _id_of(self, token: object) -> int:
    """The id of a token that tokenizer_config.json gives as a text or an object; -1: none."""
    if isinstance(token, dict) and 'content' in token:
      token = token['content']
    return self.vocabulary[token] if isinstance(token, str) and token in self.vocabulary else -1

  def pieces(self, text: str) -> Iterator[str]:
    """Yields pieces of a text which encode to the ids of the whole.

    In pieces, cores share a long text and memory is bounded. Where no line ends for LONGEST_PIECE
    characters, as in data that is no text, a word is cut there.
    """
    start = 0
    if self.name.startswith('bpe:'):  # others' rules may look across lines
      while len(text) - start > PIECE:
        latest = start + LONGEST_PIECE
        seam = SEAM.search(text, start + PIECE, latest)
        if not seam and latest >= len(text):
          break
        end = seam.start() if seam else latest
        yield text[start:end]
        start = end
    yield text[start:]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids of each text, [n] u8 or u32, computed on all cores."""
    if self._is_bytes:
      # The ids are the bytes. The library would make a hundred bytes of objects for each.
      return [np.frombuffer(text.encode(), np.uint8) for text in texts]
    encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.uint32) for encoding in encodings]

  def encode(self, text: str) -> list[int]:
    """Returns the ids of one text."""
    return self.encode_batch([text])[0].tolist()

  def encode_prompt(self, text: str) -> list[int]:
    """Returns the ids of a prompt with its opening: the names of special tokens are these tokens.

    In a text that is read to be trained on they are text; who types a prompt means the token.
    """
    self._backend.encode_special_tokens = False
    try:
      ids = self._backend.encode(text, add_special_tokens=False).ids
    finally:
      self._backend.encode_special_tokens = True
    # A prompt that spells its opening out, as chat templates do, has it once.
    begins = self.opening == tuple(ids[: len(self.opening)])
    # A model needs one token to go on from; the end of one document is what the next comes after.
    return ids if begins and ids else [*self.opening, *ids] or [self.eod_id]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of the ids without special tokens.

    A character that the ids cut in half comes out as U+FFFD.
    """
    return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

  def bytes_of_ids(self) -> np.ndarray:
    """Returns how many UTF-8 bytes of text each id stands for, [V] i64; 0 for special tokens."""
    lengths = np.zeros(self.vocab_size, np.int64)
    of_bytes = '"ByteLevel"' in json.dumps(json.loads(self.json_text)['decoder'])
    for token in self.vocabulary.keys() - self.specials.keys():
      i = self.vocabulary[token]
      if of_bytes:
        lengths[i] = len(token)  # in GPT-2's spelling, a letter for each byte
      elif re.fullmatch('<0x[0-9A-F]{2}>', token):
        lengths[i] = 1
      else:
        # What it adds to itself: the first token of a text may lose its blank.
        lengths[i] = len(self.decode([i, i]).encode()) - len(self.decode([i]).encode())
    return lengths

  def save(self, path: str | Path) -> None:
    """Writes a tokenizer.json, of which `load_tokenizer(path)` makes the same tokenizer."""
    write_whole(Path(path), self.json_text)


def spec_problem(spec: str) -> str:
  """Returns what is wrong with a tokenizer's name, '' if nothing is.

  Whether there is a file of that name is not looked at.
  """
  kind, _, size = spec.partition(':')
  if kind == 'bpe' and (not size.isdecimal() or int(size) < SMALLEST_BPE):
    smallest = f'{SMALLEST_BPE} (the bytes and end of document)'
    return f'tokenizer={spec!r}: give bpe:N with N at least {smallest}'
  if kind == 'bpe' or spec == 'bytes' or spec.endswith('.json'):
    return ''
  return f'tokenizer={spec!r} is none of bytes, bpe:N and the path of a tokenizer.json'


def load_tokenizer(
  spec: str, train_documents: Iterable[str] = (), special: SpecialTokens = OWN
) -> Tokenizer:
  """Returns the tokenizer that `spec` names.

  Args:
    spec: bytes, bpe:N, or the path of a tokenizer.json.
    train_documents: what bpe:N learns from, 1 s per 6 MB: keep its `json_text`. Others read none.
    special: of the model that it is for.

  Raises:
    ConfigError: there is no such tokenizer, or its file cannot be used.
  """
  check(spec_problem(spec))
  if spec == 'bytes':
    return Tokenizer(_bytes_json(), spec, special)
  if spec.startswith('bpe:'):
    size = int(spec.removeprefix('bpe:'))
    tokenizer = Tokenizer(_train_bpe(size, train_documents), spec)
    if tokenizer.vocab_size < size:
      logger.warning('the text yields %d tokens only, not %d', tokenizer.vocab_size, size)
    return tokenizer
  try:
    json_text = Path(spec).expanduser().read_bytes().decode()
  except (OSError, UnicodeDecodeError) as error:
    problem = f'tokenizer={spec!r}: {error}; give bytes, bpe:N or a tokenizer.json'
    raise ConfigError(problem) from error
  tokenizer = Tokenizer(json_text, spec, special)
  # Upper case, accents, a tab, double blanks: what tokenizers of other makers may not give back.
  probe = 'def f(A):\n\treturn "é 火 \U0001f525"  # end\n'
  if tokenizer.decode(tokenizer.encode(probe)) != probe:
    logger.warning(
      'tokenizer %s does not give a text back unchanged: bits per byte come out too low', spec
    )
  return tokenizer


def _train_bpe(size: int, documents: Iterable[str]) -> str:
  """Returns the tokenizer.json of a byte-level BPE of so many tokens, or fewer for little text."""
  backend = tokenizers.Tokenizer(models.BPE())
  # Part of the tokenizer, and not only of what it learns from: the ids must agree.
  words = pre_tokenizers.Split(tokenizers.Regex(WORDS), 'isolated')
  to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=[EOD],
    # Also the bytes that the text lacks, so that any other text can be written.
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(documents, trainer)
  return backend.to_str()


def _bytes_json() -> str:
  """Returns the tokenizer.json of a BPE without merges whose id of each byte is the byte.

  So that `bytes` saves and loads like the rest.
  """
  # In GPT-2's spelling a printable byte stands for itself, and the others are letters from 256 on.
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  vocabulary = {chr(byte): byte for byte in printable}
  vocabulary |= {chr(256 + i): byte for i, byte in enumerate(others)}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens([EOD])
  return backend.to_str()
