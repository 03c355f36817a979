"""What the files of a published model say of tokens that are not text, and of its context length.

read_special_tokens(directory) -> SpecialTokens, which a Tokenizer resolves to ids

One value goes with a model from its import through generation and training to its export. A run
that was not made from a published model has OWN.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from moejax.config import ConfigError, check, problem_if
from moejax.data.text_digest import digest_of_text
from moejax.runtime.files import inside, parse_json_object, read_json, write_whole

TOKENIZER_FILE = 'tokenizer.json'
TOKENIZER_CONFIG = 'tokenizer_config.json'
GENERATION_FILE = 'generation_config.json'
# What an import writes into the directory of its run: the config.json and generation_config.json
# that it found, and how the tensors lay in the files.
ORIGIN_FILE = 'huggingface.json'
# Files beside a tokenizer.json that say how it is used; they are kept as they are.
SIDE_FILES = (
  TOKENIZER_CONFIG,
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
  'chat_template.json',
)


class SpecialTokens(NamedTuple):
  """The special tokens and the context length of a model, as its publisher gives them."""

  is_published: bool = False  # False: the model was not published by others, and nothing is said
  bos_id: int = -1  # by config.json; whether it opens a text is the tokenizer's to say; -1: none
  eos_ids: tuple[int, ...] = ()  # each of them ends a text
  pad_id: int = -1
  context_length: int = 0  # tokens; 0: not said
  # The digest of the tokenizer.json that this was published with; '': with none, and any will do.
  tokenizer_digest: str = ''
  # Name -> content of SIDE_FILES, chat template and added tokens among them, and of ORIGIN_FILE.
  files: Mapping[str, str] = {}

  def tokenizer_config(self) -> dict[str, object]:
    """Returns what tokenizer_config.json says, {} where there is none."""
    if TOKENIZER_CONFIG not in self.files:
      return {}
    return parse_json_object(Path(TOKENIZER_CONFIG), self.files[TOKENIZER_CONFIG].encode())

  def save(self, directory: Path) -> None:
    """Writes the files into the directory of a run, from where `read_special_tokens` has them.

    Those of another model, which a start that came to nothing may have left, are removed.
    """
    for name in (ORIGIN_FILE, *SIDE_FILES):
      if name in self.files:
        write_whole(directory / name, self.files[name])
      else:
        (directory / name).unlink(missing_ok=True)


OWN = SpecialTokens()


def read_special_tokens(directory: str | Path) -> SpecialTokens:
  """Returns what a directory says: of published files, of an import, or of a run made from one.

  Returns:
    OWN for any other directory.

  Raises:
    ConfigError: a file is not what its name says.
  """
  directory = Path(directory)
  origin = read_json(directory, ORIGIN_FILE)
  if origin:
    config, generation = origin['config'], origin['generation_config']
  else:
    config = read_json(directory, 'config.json')
    generation = read_json(directory, GENERATION_FILE)
  if 'model_type' not in config:  # ours has none
    return OWN
  length = config['max_position_embeddings'] if 'max_position_embeddings' in config else 0
  eos_ids: list[int] = []
  for file in (generation, config):
    eos_ids += token_ids_in(file, 'eos_token_id')
  tokenizer_text = _text_in(directory, TOKENIZER_FILE)
  files = {name: _text_in(directory, name) for name in (ORIGIN_FILE, *SIDE_FILES)}
  special = SpecialTokens(
    is_published=True,
    bos_id=([*token_ids_in(config, 'bos_token_id'), -1])[0],
    eos_ids=tuple(dict.fromkeys(eos_ids)),
    pad_id=([*token_ids_in(config, 'pad_token_id'), -1])[0],
    context_length=length if type(length) is int else 0,
    tokenizer_digest=tokenizer_text and digest_of_text(tokenizer_text),
    files={name: text for name, text in files.items() if text},
  )
  special.tokenizer_config()  # raises here where it cannot be read
  return special


def token_ids_in(config: Mapping[str, object], key: str) -> list[int]:
  """Returns the ids that a key of config.json or generation_config.json gives: one, or a list.

  null, an absent key and negative numbers, which some publishers write, are no id.

  Raises:
    ConfigError: it is no whole number, nor a list of them.
  """
  value = config[key] if key in config else None
  ids = value if isinstance(value, list) else [value]
  ids = [i for i in ids if i is not None]
  wrong = [i for i in ids if type(i) is not int]  # a bool is an int, and no id
  check(problem_if(wrong, f'{key}={value!r}: use a token id, a list of them, or null'))
  return [i for i in ids if i >= 0]


def _text_in(directory: Path, name: str) -> str:
  """Returns the text of a file in the directory, '' where there is none."""
  path = inside(directory, name)
  try:
    return path.read_bytes().decode() if path.is_file() else ''
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f'{path}: {error}; expected UTF-8: mend it or move it away') from error
