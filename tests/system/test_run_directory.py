"""What lies in a run directory: a reader trusts nothing in it, and only one trainer writes to
it."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moejax.checkpoint.lock import hold_run_directory
from moejax.config import ConfigError, frozendict
from moejax.data.sources import DataConfig
from moejax.data.token_cache import open_cached
from moejax.data.tokenizer import load_tokenizer
from moejax.hf.logits import token_ids
from moejax.train.experiment.run_dir import open_run, read_config, read_setup, write_config
from moejax.train.telemetry.routing_probe import Probes
from tests.checkpoint.test_checkpoints import Bomb, cut, flip
from tests.support.tiny_run import config
from tests.support.trainer_process import (
  FEW,
  environment,
  run_to_end,
  spawn,
  train_command,
  wait_for,
)


def link(path: Path) -> None:
  """The file moves out of the directory, and a link leads to it."""
  path.rename(path.parent.parent / 'elsewhere')
  path.symlink_to('../elsewhere')


def evil(path: Path) -> None:
  path.write_bytes(pickle.dumps(Bomb(path.parent / 'run')))


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json'])
@pytest.mark.parametrize(
  ('harm', 'says'),
  [
    (link, 'expected files inside it only'),
    (evil, ''),
    (cut, ''),
    (lambda path: path.write_text('["../x"]'), ''),
  ],
)
def test_what_a_reader_of_a_run_cannot_trust_is_one_error(
  tmp_path: Path, name: str, harm: Callable[[Path], None], says: str
) -> None:
  cfg = config(tmp_path / 'run')
  write_config(cfg)
  load_tokenizer('bytes').save(tmp_path / 'run' / 'tokenizer.json')
  assert read_setup(cfg.workdir)[1]
  harm(tmp_path / 'run' / name)
  with pytest.raises(ConfigError) as error:
    read_setup(cfg.workdir)
  assert (
    name in str(error.value)
    and says in str(error.value)
    and not (tmp_path / 'run' / 'run').exists()
  )


def test_a_link_in_the_place_of_a_file_to_be_written_keeps_its_target(tmp_path: Path) -> None:
  """Neither the lock nor the config, nor the token cache, writes over what a link leads to."""
  precious, workdir = tmp_path / 'precious', tmp_path / 'run'
  precious.write_text('mine')
  workdir.mkdir()
  for name in ('lock', 'config.json'):
    (workdir / name).symlink_to(precious)
  theirs = open_cached(tmp_path / 'elsewhere' / 'tokens', lambda: [b'theirs'])
  (workdir / 'tokens').symlink_to(tmp_path / 'elsewhere' / 'tokens')
  with (
    pytest.raises(ConfigError, match='name a directory that can be written to'),
    hold_run_directory(workdir),
  ):
    pass
  write_config(config(workdir))
  assert read_config(str(workdir)).steps == 12
  assert bytes(open_cached(workdir / 'tokens', lambda: [b'built'])) == b'built'
  assert precious.read_text() == 'mine' and not (workdir / 'tokens').is_symlink()
  assert (
    bytes(open_cached(tmp_path / 'elsewhere' / 'tokens', lambda: [])) == bytes(theirs) == b'theirs'
  )


def test_ids_and_probes_are_never_unpickled(tmp_path: Path) -> None:
  np.save(tmp_path / 'ids.npy', np.array([[Bomb(tmp_path / 'run')]]), allow_pickle=True)
  with pytest.raises(ConfigError, match='allow_pickle=False'):
    token_ids(str(tmp_path / 'ids.npy'), 9)
  np.savez(tmp_path / '4.npz', expert_ids=np.array([Bomb(tmp_path / 'run')]))
  assert not Probes(tmp_path, 8).steps(), 'taken for damaged'
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('workdir', 'says'), [('file', 'File exists'), ('file/run', 'Not a directory'), ('', '')]
)
def test_a_run_is_named_by_a_directory(tmp_path: Path, workdir: str, says: str) -> None:
  """The directory may lie anywhere; names that become a part of a path, as those of tasks, may not
  be paths."""
  (tmp_path / 'file').write_text('mine')
  with pytest.raises(ConfigError) as error:
    if workdir:
      with hold_run_directory(tmp_path / workdir):
        pass
    DataConfig(source='mixture', mixture=frozendict({'../../x': '1 kjv'}))
  assert says in str(error.value) and (workdir or "'../../x' is none; give another") in str(
    error.value
  )
  assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.slow
def test_a_second_trainer_is_turned_away_and_readers_are_not(tmp_path: Path) -> None:
  """The first saves and deletes all the time; whoever reads meanwhile ends with a whole step, and
  deletes nothing."""
  workdir = tmp_path / 'run'
  often = {
    'steps': 100_000,
    'checkpoint__every': 10,
    'checkpoint__keep_latest': 1,
    'eval__every': 0,
  }
  first = spawn(train_command(workdir, **FEW | often))
  wait_for(first, workdir, 30)
  try:
    status, output = run_to_end(workdir)
    assert (
      status == 5
      and f'workdir={workdir} is in use by process {first.pid}; stop it or name another' in output
    )
    found = [open_run(str(workdir))[2] for _ in range(3)]
    assert found == sorted(found) and found[0] < found[-1], found
    command = [
      sys.executable,
      '-m',
      'moejax.generate',
      f'--workdir={workdir}',
      '--prompt=ab',
      '--max_tokens=4',
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (
      done.returncode == 0 and f' of {workdir}' in done.stderr and 'damaged' not in done.stderr
    ), done.stderr
  finally:
    first.kill()
    output = first.communicate()[0]
  assert 'failed' not in output, output


@pytest.mark.slow
def test_a_damaged_cache_is_made_again_and_damaged_text_is_named(tmp_path: Path) -> None:
  """Tokens with another bit, tokens cut short, a survey of zeros; then another text, and one that
  is no text."""
  workdir, cache, texts = tmp_path / 'run', tmp_path / 'cache', tmp_path / 'texts'
  texts.mkdir()
  for i in range(40):
    (texts / f'{i:02}.txt').write_text(f'{i} bottles of beer on the wall. ' * (20 + i))
    os.utime(texts / f'{i:02}.txt', (1, 1))
  source = {'data__source': 'text', 'data__path': f'{texts}/*.txt'}
  status, output = run_to_end(workdir, **source, stop_after=3)
  assert status == 0, output
  for harm, file in zip((flip, cut), sorted(cache.glob('tokens-*')), strict=True):
    harm(file)
  status, output = run_to_end(workdir, **source)
  assert status == 0 and output.count('is damaged: building it anew') == 2, output
  (texts / '07.txt').write_text('Something else. ' * 30)
  status, output = run_to_end(workdir, **source)
  assert status == 2 and 'data source_digest: ' in output and 'in the config' in output, output
  (texts / '07.txt').write_bytes(b'\xff\xfe\xff')
  flip(next(iter(cache.glob('tokens-*'))))
  status, output = run_to_end(workdir, **source)
  assert status == 2 and f'{texts}/07.txt cannot be read as UTF-8 text' in output, output
