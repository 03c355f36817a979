"""How a mixture is written, what its fingerprint tells, and errors that name the task."""

import json
from pathlib import Path

import pytest

from moejax.config import ConfigError, flags, from_config_dict, frozendict, to_config_dict
from moejax.data import mixture, sources, token_stream
from moejax.data.sources import DataConfig
from tests.data.mixed_texts import (
  equal,
  open_mixture,
)


def test_an_entry_is_a_weight_a_source_and_its_argument() -> None:
  config = DataConfig(
    source='mixture',
    synthetic_seed=3,
    mixture=frozendict(
      stdlib=2,
      bible='1 kjv',
      notes=' 0.5  text a b/**/*.md, c.txt ',
      other='5e-1 synthetic',
      one='4 synthetic 07',
    ),
  )
  assert config.tasks == ('bible', 'notes', 'one', 'other', 'stdlib')
  assert [
    (c.task, c.weight, c.config.source, c.config.path, c.config.synthetic_seed)
    for c in config.components
  ] == [
    ('bible', 1 / 8, 'kjv', '', 3),
    ('notes', 1 / 16, 'text', 'a b/**/*.md, c.txt', 3),
    ('one', 1 / 2, 'synthetic', '', 7),
    ('other', 1 / 16, 'synthetic', '', 3),
    ('stdlib', 1 / 4, 'stdlib', '', 3),
  ]
  assert all(
    c.config.mixture == {} and c.config.tokenizer == config.tokenizer for c in config.components
  )


def test_a_plain_source_is_one_task() -> None:
  config = DataConfig(source='kjv')
  assert config.tasks == ('kjv',) and config.components == (('kjv', 1.0, config),)


def test_flags_files_and_hashes_know_mixtures(tmp_path: Path) -> None:
  (tmp_path / 'base.py').write_text(
    'from moejax.config import to_config_dict\nfrom moejax.data.sources import DataConfig\n'
    'def get_config():\n  return to_config_dict(DataConfig())\n'
  )
  argv = [
    '--config.source=mixture',
    '--config.mixture.code=0.7 text a/**/*.py,b/*.py',
    '--config.mixture.kjv=0.3',
  ]
  config = flags.parse_flags(argv, DataConfig, f'{tmp_path}/base.py')
  assert config.mixture == {'code': '0.7 text a/**/*.py,b/*.py', 'kjv': 0.3} and config.tasks == (
    'code',
    'kjv',
  )
  assert flags.parse_flags([argv[0], *argv[:0:-1]], DataConfig, f'{tmp_path}/base.py') == config
  assert from_config_dict(DataConfig, json.loads(to_config_dict(config).to_json())) == config
  assert len({config, from_config_dict(DataConfig, to_config_dict(config)), DataConfig()}) == 2


@pytest.mark.parametrize(
  'table, words',
  [
    ({}, "source='mixture' needs some, as mixture.code='0.7 stdlib'"),
    (
      {'a': '1 stdlb'},
      "mixture.a='1 stdlb': 'stdlb' is not one of ['kjv', 'stdlib', 'synthetic', 'text', 'tokens']",
    ),
    ({'a': 1.0}, "mixture.a=1.0: 'a' is not one of ["),
    ({'a': '1 mixture'}, "'mixture' is not one of"),
    ({'a': 'stdlib'}, "mixture.a='stdlib': give 'WEIGHT SOURCE', as '0.7 stdlib'"),
    ({'a': 'stdlib 0.7'}, "give 'WEIGHT SOURCE'"),
    ({'a': ''}, "give 'WEIGHT SOURCE'"),
    ({'a': 'nan kjv'}, "give 'WEIGHT SOURCE'"),
    ({'kjv': 0.0}, 'mixture.kjv=0.0: the weight 0 is to be a number above 0; leave the task out'),
    ({'a': '-1 kjv'}, 'the weight -1 is to be'),
    ({'a': 'inf kjv'}, 'the weight inf is to be'),
    ({'a': '1 text'}, "needs globs, as '1 text ~/notes/**/*.md'"),
    ({'a': '1 synthetic x'}, "'x' is no seed; give a whole number"),
    ({'a': '1 synthetic -1'}, "'-1' is no seed"),
    ({'a': '1 kjv x'}, "source 'kjv' takes nothing after its name; drop 'x'"),
    ({'a/b': '1 kjv'}, "and 'a/b' is none; give another"),
    ({'': '1 kjv'}, "and '' is none; give another"),
    (
      {'b': '1 text x', 'a': '2 text x'},
      "mixture.b='1 text x': mixture.a is the same text; leave one",
    ),
    ({'b': '1 kjv', 'kjv': 2.0}, 'mixture.kjv=2.0: mixture.b is the same text'),
  ],
)
def test_errors_of_entries(table: dict[str, str | float], words: str) -> None:
  with pytest.raises(ConfigError) as error:
    DataConfig(source='mixture', mixture=frozendict(table))
  assert len(error.value.problems) == 1 and words in error.value.problems[0]


def test_all_entries_that_are_wrong_are_told_at_once_and_a_mixture_is_not_passed_over() -> None:
  with pytest.raises(ConfigError) as error:
    DataConfig(source='mixture', path='x', mixture=frozendict(a='1 kjv', b='0 stdlib', c='x'))
  assert [p.split(':')[0].split('=')[0] for p in error.value.problems] == [
    'path',
    'mixture.b',
    'mixture.c',
  ]
  with pytest.raises(
    ConfigError, match="mixture.a: read by source='mixture' only, not by source='stdlib'"
  ):
    DataConfig(mixture=frozendict(a='1 kjv'))


def test_fingerprint_tells_tasks_weights_and_texts(mixed_folder: Path) -> None:
  base = open_mixture(mixed_folder).fingerprint
  others = [
    open_mixture(mixed_folder, {'code': 5, 'maths': 3, 'notes': 2.1}).fingerprint,
    open_mixture(mixed_folder, {'code': 5, 'maths': 3}).fingerprint,
    open_mixture(
      mixed_folder,
      mixture=frozendict(
        {
          'other': f'5 text {mixed_folder}/code/*',
          'maths': f'3 text {mixed_folder}/maths/*',
          'notes': f'2 text {mixed_folder}/notes/*',
        }
      ),
    ).fingerprint,
  ]
  (mixed_folder / 'notes' / '00.txt').write_text('zzz')
  others.append(open_mixture(mixed_folder).fingerprint)
  assert len({tuple(f.items()) for f in (base, *others)}) == 5
  for table in (
    {'code': 50, 'maths': 30, 'notes': 20},
    {'code': 0.25, 'maths': 0.15, 'notes': 0.1},
  ):
    assert open_mixture(mixed_folder, table).fingerprint == others[-1]  # the same weights
  ratios = [
    {'a': 7, 'b': 2, 'c': 1},
    {'a': 0.7, 'b': 0.2, 'c': 0.1},
    {'a': 2.1, 'b': 0.6, 'c': 0.3},
  ]
  assert [mixture.task_shares(table) for table in ratios] == [ratios[1]] * 3
  assert base['source'] == 'mixture' and base['mixture'] == 'code=0.5 maths=0.3 notes=0.2'
  assert all(type(key) is type(value) is str for key, value in base.items())


def fail(*args: object, **kwargs: object) -> None:
  raise TypeError('called')


def test_a_warm_start_neither_reads_nor_trains(
  mixed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(token_stream, 'RACY', 0)
  before = open_mixture(mixed_folder, tokenizer='bpe:300')
  monkeypatch.setattr(sources, 'read_documents', fail)
  monkeypatch.setattr(token_stream, 'load_tokenizer', None)
  after = open_mixture(mixed_folder, tokenizer='bpe:300')
  assert after.fingerprint == before.fingerprint and equal(after.batch(3), before.batch(3))


def test_errors_of_texts_name_the_task(mixed_folder: Path) -> None:
  def problems(**fields: object) -> str:
    with pytest.raises(ConfigError) as error:
      open_mixture(mixed_folder, **fields)
    return str(error.value)

  path = f'1 text {mixed_folder}/none*'
  assert f"mixture.notes: path='{mixed_folder}/none*' matches no file" in problems(
    mixture=frozendict(notes=path, code=f'1 text {mixed_folder}/code/*')
  )
  assert 'mixture.maths: the held-out text has 197 tokens' in problems(seq_len=200, batch_size=1)
  (mixed_folder / 'short').mkdir()
  (mixed_folder / 'short' / 'a.txt').write_text('hello\n' * 9)
  few, many = (problems(weights={'code': code, 'short': 1}) for code in (1, 0.2))
  assert few.startswith(
    'mixture.short: the held-out text has 4 tokens, less than one row of seq_len=16; give'
  )
  assert (
    ', 3 rows of seq_len=16, but batch_size=6 draws 5 of them; give more text'
    in many.splitlines()[0]
  )


def test_a_text_that_changes_is_told(mixed_folder: Path) -> None:
  data = open_mixture(mixed_folder)
  (mixed_folder / 'maths' / '07.txt').write_text('other')
  with pytest.raises(ConfigError, match='changed'):
    data.train_text()
