"""The watchdog: a process that hangs says where and exits with 6.

One that gets on, or compiles, is left alone.
"""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys, pathlib, time
from moejax.runtime.watchdog import beat, watch
with watch(0.6, pathlib.Path(sys.argv[1])):
  time.sleep(0.9)                       # nothing is too long before the first beat
  for _ in range(3):
    beat()
    time.sleep(0.3)
  beat('validation')
  time.sleep(0.9)                       # compiles
  print('alive', flush=True)
  {last}
print('out', flush=True)
time.sleep(2)                           # no longer watched
print('end', flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ('last', 'status'),
  [
    ('beat()', 0),
    ('beat(); time.sleep(30)', 6),
    ('beat(); beat("validation"); time.sleep(30)', 6),
    ('beat(); beat("sample"); time.sleep(0.9)', 0),
  ],
)
def test_what_ends_a_process(last: str, status: int, tmp_path: Path) -> None:
  code = CODE.replace('{last}', last)
  done = subprocess.run(
    [sys.executable, '-c', code, str(tmp_path / 'hang.txt')],
    capture_output=True,
    text=True,
    timeout=30,
    cwd=Path(__file__).parents[2],
  )
  assert done.returncode == status, done.stderr
  assert done.stdout.split() == (['alive', 'out', 'end'] if status == 0 else ['alive'])
  if status:
    assert 'no save for 0.6 s (hang_after)' in done.stderr
    stacks = (tmp_path / 'hang.txt').read_text()
    assert (
      'most recent call first' in done.stderr
      and stacks.count('Thread 0x') >= 2
      and '<string>", line' in stacks
    )
  else:
    assert not (tmp_path / 'hang.txt').exists()


@pytest.mark.slow
def test_stacks_are_told_even_where_the_file_cannot_be_written(tmp_path: Path) -> None:
  code = CODE.replace('{last}', 'beat(); time.sleep(30)')
  done = subprocess.run(
    [sys.executable, '-c', code, str(tmp_path / 'gone' / 'hang.txt')],
    capture_output=True,
    text=True,
    timeout=30,
    cwd=Path(__file__).parents[2],
  )
  assert (
    done.returncode == 6 and 'time.sleep' not in done.stdout and '<string>", line' in done.stderr
  )
