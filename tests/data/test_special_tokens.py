"""What published files say of special tokens, and what a tokenizer makes of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from moejax.config import ConfigError
from moejax.data.published_tokenizer import published_json, tokenizer_config_json
from moejax.data.rows import batch_from_rows
from moejax.data.special_tokens import (
  ORIGIN_FILE,
  OWN,
  TOKENIZER_CONFIG,
  SpecialTokens,
  read_special_tokens,
)
from moejax.data.tokenizer import Tokenizer
from tests.data.plain_texts import open_text

WORDS = {'<unk>': 0, '<s>': 1, '</s>': 2, '<end>': 3, 'a': 4, 'b': 5, 'c': 6}


def json_text(template: str = '') -> str:
  """A tokenizer of words, with `template` as its post-processor."""
  backend = tokenizers.Tokenizer(models.WordLevel(WORDS, unk_token='<unk>'))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens(['<s>', '</s>', '<end>'])
  if template:
    backend.post_processor = processors.TemplateProcessing(
      single=template, special_tokens=[('<s>', 1), ('</s>', 2)]
    )
  return backend.to_str()


def published(path: Path, template: str = '', said: str = '', **config: object) -> SpecialTokens:
  """What is read of a directory with this config.json, tokenizer and tokenizer_config.json."""
  (path / 'config.json').write_text(json.dumps({'model_type': 'mixtral'} | config))
  (path / 'tokenizer.json').write_text(json_text(template))
  if said:
    (path / TOKENIZER_CONFIG).write_text(said)
  return read_special_tokens(path)


def tokenizer(special: SpecialTokens, template: str = '') -> Tokenizer:
  return Tokenizer(json_text(template), 'some.json', special)


def test_all_ids_are_read_of_both_files(tmp_path: Path) -> None:
  (tmp_path / 'generation_config.json').write_text('{"eos_token_id": [3, 2]}')
  (tmp_path / 'chat_template.jinja').write_text('{{ messages }}')
  special = published(
    tmp_path, bos_token_id=1, eos_token_id=6, pad_token_id=-1, max_position_embeddings=4096
  )
  assert special.eos_ids == (3, 2, 6) and special.bos_id == 1 and special.pad_id == -1
  assert special.context_length == 4096 and special.is_published
  assert special.files == {'chat_template.jinja': '{{ messages }}'}
  assert tokenizer(special).ends == (3, 2, 6)


@pytest.mark.parametrize('value', ['</s>', True, 2.0, [2, '3']])
def test_what_is_no_id_is_told(value: object, tmp_path: Path) -> None:
  with pytest.raises(ConfigError, match='eos_token_id=.*: use a token id, a list of them, or null'):
    published(tmp_path, eos_token_id=value)


def test_a_run_of_our_own_says_nothing(tmp_path: Path) -> None:
  (tmp_path / 'config.json').write_text('{"steps": 3}')
  assert read_special_tokens(tmp_path) == read_special_tokens(tmp_path / 'nowhere') == OWN
  own = tokenizer(OWN, '<s> $A')
  assert (own.opening, own.closing, own.ends) == ((2,), (), (2,))


@pytest.mark.parametrize(
  ('template', 'said', 'opening'),
  [
    ('', '', ()),  # a bos_token_id alone opens nothing, as in Qwen's files
    ('<s> $A', '', (1,)),
    ('<s> </s> $A </s>', '', (1, 2)),
    ('$A </s>', '', ()),
    ('<s> $A', '{"add_bos_token": false}', ()),
    ('<s> $A', '{"add_bos_token": null}', (1,)),
    ('', '{"add_bos_token": true}', (1,)),
    ('', '{"add_bos_token": true, "bos_token": "<end>"}', (3,)),
    ('', '{"add_bos_token": true, "bos_token": {"content": "<end>"}}', (3,)),
  ],
)
def test_a_text_is_opened_as_transformers_opens_it(
  template: str, said: str, opening: tuple[int, ...], tmp_path: Path
) -> None:
  special = published(tmp_path, template, said, bos_token_id=1, eos_token_id=2)
  made = tokenizer(special, template)
  assert made.opening == opening
  assert made.encode_prompt('a b') == [*opening, 4, 5] and made.encode('a b') == [4, 5]
  assert made.encode_prompt('') == [*opening] or [2]
  assert made.closing == (2,)


def test_a_bos_that_is_no_token_is_told(tmp_path: Path) -> None:
  special = published(tmp_path, said='{"add_bos_token": true}', bos_token_id=99, eos_token_id=2)
  with pytest.raises(ConfigError, match='neither its bos_token nor bos_token_id'):
    tokenizer(special)


def test_special_tokens_of_a_prompt_are_tokens_and_of_a_text_are_text(tmp_path: Path) -> None:
  made = tokenizer(published(tmp_path, '<s> $A', eos_token_id=2), '<s> $A')
  assert made.encode_prompt('a<end>b') == [1, 4, 3, 5]
  assert made.encode('a <end> b') == [4, 3, 5] or 3 not in made.encode('a <end> b')
  assert made.encode_prompt('<s>a') == [1, 4], 'an opening that is spelt out is there once'


def test_the_end_of_a_document_is_one_that_the_publisher_names(tmp_path: Path) -> None:
  assert tokenizer(published(tmp_path, eos_token_id=[3, 2])).eod_id == 2
  assert tokenizer(published(tmp_path, eos_token_id=[6, 3])).eod_id == 6
  assert tokenizer(published(tmp_path, eos_token_id=[700, 3])).eod_id == 3
  assert tokenizer(published(tmp_path, eos_token_id=None)).eod_id == 2
  opened_by_it = tokenizer(published(tmp_path, '</s> $A', eos_token_id=2), '</s> $A')
  assert (opened_by_it.opening, opened_by_it.closing) == ((2,), ())


def test_ids_are_not_taken_to_another_tokenizer(tmp_path: Path) -> None:
  special = published(tmp_path, '<s> $A', eos_token_id=3)
  assert tokenizer(special, '<s> $A').special is special
  other = tokenizer(special)
  assert other.special == OWN and (other.opening, other.ends) == ((2,), (2,))


def test_what_was_read_is_saved_and_read_again(tmp_path: Path) -> None:
  special = published(tmp_path, '<s> $A', '{"add_bos_token": true}', eos_token_id=2)
  run = tmp_path / 'run'
  run.mkdir()
  (run / 'tokenizer.json').write_text(json_text('<s> $A'))
  (run / 'config.json').write_text('{"steps": 3}')
  config = json.loads((tmp_path / 'config.json').read_text())
  origin = json.dumps({'config': config, 'generation_config': {}})
  special = special._replace(files={**special.files, ORIGIN_FILE: origin})
  special.save(run)
  assert read_special_tokens(run) == special
  OWN.save(run)
  assert read_special_tokens(run) == OWN and {*run.iterdir()} == {
    run / 'config.json',
    run / 'tokenizer.json',
  }


def test_transformers_is_told_what_opens_a_text(tmp_path: Path) -> None:
  own = json.loads(tokenizer_config_json(tokenizer(OWN), 64))
  assert own['tokenizer_class'] == 'PreTrainedTokenizerFast' and own['add_bos_token'] is True
  assert own['bos_token'] == own['eos_token'] == '</s>' and own['model_max_length'] == 64
  special = published(tmp_path, '<s> $A', bos_token_id=1, eos_token_id=3, pad_token_id=0)
  said = json.loads(tokenizer_config_json(tokenizer(special, '<s> $A'), 64))
  assert 'add_bos_token' not in said, 'its tokenizer.json says it'
  assert (said['bos_token'], said['eos_token'], said['pad_token']) == ('<s>', '<end>', '<unk>')
  kept = published(tmp_path, '<s> $A', '{"add_bos_token": true}', eos_token_id=3, bos_token_id=1)
  assert tokenizer_config_json(tokenizer(kept, '<s> $A'), 64) == '{"add_bos_token": true}'


def test_the_tokenizer_of_our_own_export_opens_a_text_as_we_do(tmp_path: Path) -> None:
  own, special = tokenizer(OWN, '<s> $A'), published(tmp_path, '<s> $A', eos_token_id=2)
  written = tokenizers.Tokenizer.from_str(published_json(own))
  assert written.encode('a b').ids == own.encode_prompt('a b') == [2, 4, 5]
  assert published_json(tokenizer(special, '<s> $A')) == json_text('<s> $A')


def test_documents_are_opened_and_closed_as_the_publisher_does(
  folder: Path, tmp_path: Path
) -> None:
  """The stream is opening document closing; a token after a closing one opens a document."""
  for i in range(60, 99):
    (folder / 'text' / f'{i}.txt').write_text('a b c ' * (i % 3 + 1))
  special = published(tmp_path, '<s> $A', bos_token_id=1, eos_token_id=2)
  path = str(tmp_path / 'tokenizer.json')
  data = open_text(folder, seq_len=6, tokenizer=path, special=special)
  stream = data.held_out.streams[0].stream
  assert stream[0] == 1 and stream[-1] == 2
  assert (stream[1:][stream[:-1] == 2] == 1).all() and (stream == 1).sum() == (stream == 2).sum()
  own = open_text(folder, seq_len=6, tokenizer=path)
  assert own.held_out.streams[0].stream[0] == 2 and not (own.held_out.streams[0].stream == 1).any()
  tokens, segments, positions = (
    np.concatenate([getattr(data.batch(step), name) for step in range(40)])
    for name in ('tokens', 'segment_ids', 'positions')
  )
  opens = np.diff(segments, axis=1) > 0
  assert (
    opens.sum() > 10 and (tokens[:, 1:] == 1)[opens].all() and (tokens[:, :-1] == 2)[opens].all()
  )
  assert (positions[:, 1:][opens] == 0).all() and not ((tokens[:, 1:] == 1) & ~opens).any()


def test_a_token_after_a_closing_one_opens_a_document() -> None:
  rows = np.array([[7, 9, 1, 2, 9, -1], [9, 3, 4, 9, 9, 5]], np.int32)
  batch = batch_from_rows(rows, np.array([0, 0], np.int32), eod_id=9, closes=True)
  assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 0], [1, 2, 2, 2, 3]]
  assert batch.positions.tolist() == [[0, 1, 0, 1, 0], [0, 0, 1, 2, 0]]
  assert batch.mask.sum() == 9
