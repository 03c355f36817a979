"""The rules of the house: imports point down, files and lines stay short, no side doors.

Each rule is a function of one source; each is also shown a bad source and must object to it.
"""

import ast
import fnmatch
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.support import house_layers
from tests.support.house_layers import Import
from tests.support.house_rules import (
  ROOT,
  comments,
  docstrings,
  family_branches,
  file_docstring,
  file_length,
  function_length,
  indent,
  names_of_files,
  no_any,
  one_thought,
  plain_calls,
  plain_flax,
  signatures,
  silent_defaults,
  this_machine,
)

TYPED = ('train.py', 'moejax/*', 'configs/*', 'benchmarks/*')
ALL = (*TYPED, 'tests/*')
SPELT_OUT = ('tests/test_house.py', 'tests/support/house_rules.py')  # these name what they forbid

# rule -> (where it holds, what it must object to: path and source); forbidden words are spelt apart
LONG = 'def f() -> None:\n' + '  x = 1\n' * 60
RULES: dict[Callable[[str, str], Iterator[str]], tuple[tuple[str, ...], list[tuple[str, str]]]] = {
  file_length: (ALL, [('a.py', 'x = 1\n' * 301)]),
  one_thought: (
    TYPED,
    [
      ('a.py', 'x = [a for a in b] + [c for c in d]\n'),
      ('a.py', 'x = [[a for a in b] for b in c]\n'),
      ('a.py', 'x = 1 if a else 2 if b else 3\n'),
      ('a.py', 'if f(a for a in b) or g(c for c in d):\n  pass\n'),
    ],
  ),
  plain_calls: (
    TYPED,
    [
      ('a.py', 'f(1, 2, 3, 4, 5, 6)\n'),
      ('a.py', 'f(*a, *b, *c)\n'),
      ('a.py', 'a, b, c, d, e, f = g()\n'),
    ],
  ),
  names_of_files: (ALL, [('moejax/utils.py', ''), ('moejax/moe/types.py', '')]),
  function_length: (
    ALL,
    [('a.py', LONG), ('a.py', 'class A:\n  async ' + LONG.replace('\n', '\n  ').strip())],
  ),
  indent: (
    ALL,
    [('a.py', 'if x:\n    y\n'), ('a.py', 'if x:\n\ty\n'), ('a.py', 'if x:\n  if y:\n   z\n')],
  ),
  comments: (
    ALL,
    [
      ('a.py', 'x = 1  # type: ' + 'ignore\n'),
      ('a.py', 'x = 1  # no' + 'qa: E501\n'),
      ('a.py', '# TO' + 'DO\n'),
      ('a.py', 'x = 1  # FIX' + 'ME: nobody ever wrote this down\n'),
    ],
  ),
  no_any: (
    ALL,
    [('a.py', 'from typing import Any\n'), ('a.py', 'x: typing.Any = 1\n'), ('a.py', 'x: Any\n')],
  ),
  silent_defaults: (
    TYPED,
    [
      ('a.py', 'getattr(cfg, "x", 0)'),
      ('a.py', 'd.get("x", 0.0)'),
      ('a.py', 'd.get("x", default=0)'),
    ],
  ),
  family_branches: (
    ('moejax/*',),
    [
      ('a.py', 'if cfg.model_name == "x":\n  pass\n'),
      ('a.py', 'x = 1 if "deep" in family else 2\n'),
      ('a.py', 'match model_type:\n  case "x":\n    pass\n'),
    ],
  ),
  plain_flax: (
    TYPED,
    [
      ('a.py', 'nnx.jit(f)'),
      ('a.py', 'flax.nnx.Optimizer(m)'),
      ('a.py', 'self.sow("x", 1)'),
      ('a.py', 'from flax.nnx import scan\n'),
    ],
  ),
  signatures: (
    TYPED,
    [
      ('a.py', 'def f(x) -> int: ...'),
      ('a.py', 'def f(x: int): ...'),
      ('a.py', 'def f(*a) -> int: ...'),
      ('a.py', 'class A:\n  def f(self, *, k=1) -> int: ...\n'),
    ],
  ),
  docstrings: (
    TYPED,
    [
      ('a.py', 'x = 1\n'),
      ('a.py', '"""A."""\ndef f() -> None:\n  pass\n'),
      ('a.py', '"""A."""\nclass A:\n  pass\n'),
      ('a.py', '# c\n"""A."""\n'),
    ],
  ),
  file_docstring: (('tests/*',), [('a.py', 'x = 1\n'), ('a.py', '# c\n"""A."""\n')]),
}


def python_files(*patterns: str) -> list[str]:
  paths = [
    'train.py',
    *(
      str(p.relative_to(ROOT))
      for d in ('moejax', 'configs', 'tests', 'benchmarks')
      for p in (ROOT / d).rglob('*.py')
    ),
  ]
  return [p for p in paths if any(fnmatch.fnmatch(p, pattern) for pattern in patterns)]


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule: Callable[[str, str], Iterator[str]]) -> None:
  files = python_files(*RULES[rule][0])
  assert files
  broken = [
    f'{path}:{problem}' for path in files for problem in rule(path, (ROOT / path).read_text())
  ]
  assert not broken, '\n' + '\n'.join(broken)


BAD = [(rule, *bad) for rule, (_, bads) in RULES.items() for bad in bads]


@pytest.mark.parametrize(
  ('rule', 'path', 'source'), BAD, ids=lambda x: x.__name__ if callable(x) else ''
)
def test_the_rule_objects(
  rule: Callable[[str, str], Iterator[str]], path: str, source: str
) -> None:
  assert list(rule(path, source))


def test_no_tracked_file_names_a_place_on_one_machine() -> None:
  git = ['git', '-c', 'safe.directory=*', 'ls-files']
  tracked = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
    '\n'
  )
  files = [p for p in tracked if p not in SPELT_OUT and (ROOT / p).is_file()]
  broken = [
    f'{p}:{x}' for p in files for x in this_machine(p, (ROOT / p).read_text(errors='replace'))
  ]
  assert files and not broken, '\n' + '\n'.join(broken)
  for bad in (
    '/root/x',
    '/home/me',
    'in /work/x',
    'https://example.org/simple',
    '/opt/wheels',
    '/tmp/x',
  ):
    assert list(this_machine('a', bad)), bad
  assert not list(this_machine('a', 'https://github.com/a/b  ~/.cache  /usr/bin/env'))


def test_packages_import_what_the_table_allows() -> None:
  problems = list(house_layers.layering_problems(house_layers.all_imports()))
  assert not problems, '\n' + '\n'.join(problems)


def test_seven_floors_and_no_circles() -> None:
  floors = house_layers.floors()
  packages = {house_layers.package_of(module) for module in house_layers.sources()} - {''}
  # The eighth is the command that has all others, and nothing else.
  assert {*floors} == packages and floors.pop('__main__') == 8 and max(floors.values()) == 7
  assert not house_layers.cycle(house_layers.all_imports())


def public_definitions(module: str, source: str) -> list[str]:
  """The public functions and classes of a module."""
  nodes = [node for node in ast.parse(source).body if hasattr(node, 'name')]
  return [node.name for node in nodes if not node.name.startswith('_')]


def test_a_public_name_means_one_thing_in_the_whole_package() -> None:
  homes: dict[str, list[str]] = {}
  for module, source in house_layers.sources().items():
    # The oracle has the names of what it is an oracle of; every command has its `main`.
    if not module.startswith('certify.oracle'):
      for name in public_definitions(module, source):
        homes.setdefault(name, []).append(module)
  several = {name: modules for name, modules in homes.items() if len(modules) > 1}
  assert several.keys() == {'main'}, several
  assert public_definitions('a', 'def f():\n  pass\nclass A:\n  pass\ndef _g():\n  pass\n') == [
    'f',
    'A',
  ]


def test_a_wrong_layering_is_seen() -> None:
  imports = house_layers.all_imports()
  upward = Import('moe.layer', 'train.step.train_step', 1)
  assert list(house_layers.layering_problems([*imports, upward])) == [
    'moe.layer:1 imports train.step.train_step: moe may not'
  ]
  # model may import data.batch, and nothing else of data.
  assert list(
    house_layers.layering_problems([*imports, Import('model.blocks', 'data.pipeline', 2)])
  )
  assert list(house_layers.layering_problems([*imports, Import('elsewhere.x', 'config', 3)]))
  stale = [found for found in imports if not found.imported.startswith('data.batch')]
  assert (
    'model may import data.batch, and nothing in it does: take it out'
    in house_layers.layering_problems(stale)
  )
  circle = [Import('moe.a', 'moe.b', 1), Import('moe.b', 'moe.c', 1), Import('moe.c', 'moe.a', 1)]
  assert house_layers.cycle(circle) == ['moe.a', 'moe.b', 'moe.c', 'moe.a']


def test_an_import_is_seen_wherever_it_stands() -> None:
  modules = {'moe': '', 'moe.layer': '', 'config': ''}
  for source, imported in (
    ('import moejax.moe.layer\n', 'moe.layer'),
    ('from moejax.moe import layer\n', 'moe.layer'),
    ('from moejax.moe import MoE\n', 'moe'),
    ('def f():\n  from moejax.config import check\n', 'config'),
  ):
    assert [found.imported for found in house_layers.imports_of('a', source, modules)] == [
      imported
    ], source


@pytest.mark.parametrize(
  ('module', 'absent'),
  [
    ('moejax.model', ('grain', 'tokenizers')),
    ('moejax.plan', ('jax',)),
    ('moejax.runtime', ('jax',)),
    ('moejax.config', ('jax',)),
    ('moejax.train.experiment.config', ('grain', 'orbax.checkpoint', 'moejax.hf')),
  ],
)
def test_what_an_import_does_not_load(module: str, absent: tuple[str, ...]) -> None:
  """The side doors: what a package must not bring in, in a process of its own."""
  code = f'import sys, {module}; print(*({set(absent)!r} & sys.modules.keys()))'
  loaded = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True
  )
  assert not loaded.stdout.strip(), loaded.stdout


def test_what_is_allowed_passes() -> None:
  assert not list(
    silent_defaults('a.py', 'd.get(k)\nos.environ.get("A", "")\nx.at[i].get(fill_value=0)\n')
  )
  assert not list(one_thought('a.py', 'x = [a for a in b]\nif c:\n  y = 1 if d else 2\n'))
  assert not list(plain_calls('a.py', 'check(1, 2, 3, 4, 5, 6)\nf(*a, *b)\n'))
