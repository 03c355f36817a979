"""Published models by their name on the Hugging Face hub: fetched into the cache that all tools
share.
"""

import re
from pathlib import Path

from moejax.config import ConfigError
from moejax.data.special_tokens import GENERATION_FILE, SIDE_FILES, TOKENIZER_FILE
from moejax.hf.safetensors.directory import INDEX
from moejax.runtime.multiprocess import fail_together, is_first_process

# What is read of a published model. Neither pickles nor code are fetched, nor a second copy of the
# weights, as consolidated.safetensors or in a folder below.
FETCHED = ('config.json', GENERATION_FILE, TOKENIZER_FILE, *SIDE_FILES, INDEX, 'model*.safetensors')
NOT_FETCHED = ('*/*',)


def fetched(source: str) -> str:
  """Returns the directory of a published model; what is no directory and looks like ORG/NAME is
  fetched.

  All processes call it; the first one fetches, and the others find it in the cache, or fetch it
  where that is not shared.

  Raises:
    ConfigError: it cannot be fetched.
  """
  is_name = re.fullmatch(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*', source)
  if Path(source).exists() or not is_name:
    return source
  directory = source
  for is_turn in (is_first_process(), not is_first_process()):
    with fail_together(ConfigError):
      if is_turn:
        directory = snapshot(source)
  return directory


def snapshot(name: str) -> str:
  """Returns the directory in the cache, whose files are fetched where they are not there yet.

  Raises:
    ConfigError: huggingface_hub is not installed, or could not fetch them.
  """
  nowhere = f'{name} is no directory here'
  try:
    import huggingface_hub
  except ImportError as error:
    raise ConfigError(
      f"{nowhere}; to fetch it from the Hugging Face hub: pip install 'moejax[hub]'"
    ) from error
  try:
    return huggingface_hub.snapshot_download(
      name, allow_patterns=[*FETCHED], ignore_patterns=[*NOT_FETCHED]
    )
  except Exception as error:  # of a dozen kinds, by way of several libraries
    reason = ' '.join(str(error).split())[:300]
    raise ConfigError(
      f'{nowhere}, and the Hugging Face hub did not give it: {type(error).__name__}: {reason}; '
      'is the name right, is there a network, and is `hf auth login` needed?'
    ) from error
