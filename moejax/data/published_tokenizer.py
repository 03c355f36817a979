"""The files of a tokenizer in an export, with which other programs give the ids that we give.

tokenizer.json by published_json, tokenizer_config.json by tokenizer_config_json
"""

import json

import tokenizers
from tokenizers import processors

from moejax.data.special_tokens import TOKENIZER_CONFIG
from moejax.data.tokenizer import Tokenizer


def published_json(tokenizer: Tokenizer) -> str:
  """Returns the tokenizer.json of an export, whose post-processor opens a text as we do.

  transformers 5 asks it alone what to put before a prompt.
  """
  if tokenizer.special.is_published:
    return tokenizer.json_text
  backend = tokenizers.Tokenizer.from_str(tokenizer.json_text)
  eod = backend.id_to_token(tokenizer.eod_id)
  backend.post_processor = processors.TemplateProcessing(
    single=[f'{eod}:0', '$A:0'],
    pair=[f'{eod}:0', '$A:0', f'{eod}:1', '$B:1'],
    special_tokens=[(eod, tokenizer.eod_id)],
  )
  return backend.to_str()


def tokenizer_config_json(tokenizer: Tokenizer, context_length: int) -> str:
  """Returns a tokenizer_config.json with which transformers gives the ids that this one gives.

  Without one, it takes the tokenizer class of the model_type, and some of those put rules of
  their own over those of tokenizer.json: other ids, without a word.

  context_length: tokens that the model reads.
  """
  if TOKENIZER_CONFIG in tokenizer.special.files:
    return tokenizer.special.files[TOKENIZER_CONFIG]
  names = {i: token for token, i in tokenizer.vocabulary.items()}
  ids = {
    'eos_token': tokenizer.eod_id,
    'bos_token': tokenizer.special.bos_id,
    'pad_token': tokenizer.special.pad_id,
  }
  config: dict[str, object] = {'tokenizer_class': 'PreTrainedTokenizerFast'}
  if not tokenizer.special.is_published:
    # What opens our documents; of a published model the post-processor of tokenizer.json says it.
    ids['bos_token'] = tokenizer.eod_id
    config['add_bos_token'] = True
  config |= {key: names[i] for key, i in ids.items() if i in names}
  config |= {'clean_up_tokenization_spaces': False, 'model_max_length': context_length}
  return json.dumps(config, indent=2, ensure_ascii=False) + '\n'
