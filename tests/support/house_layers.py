"""The packages of moejax and who may import whom, held against what the code imports.

`python -m tests.support.house_layers` prints the table as computed: floor, package, files, lines,
and what it imports.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

# package -> the packages, or modules of them, that it may import. A package stands one floor above
# the highest of them. An allowance that nothing uses is stale: as wrong as an import that is not
# allowed.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
  'config': (),
  'runtime': ('config',),
  'sharding': ('config',),
  'data': ('config', 'runtime.files'),
  'moe': ('config', 'sharding'),
  'checkpoint': ('config', 'runtime', 'sharding.tree'),
  'model': ('config', 'sharding', 'moe', 'data.batch'),
  'inference': ('config', 'sharding', 'model', 'moe', 'data.batch', 'data.tokenizer'),
  'families': ('config', 'sharding.tree', 'model', 'moe'),
  'train': ('config', 'runtime', 'sharding', 'data', 'moe', 'checkpoint', 'model', 'inference'),
  'plan': (
    'config',
    'runtime.chips',
    'runtime.command',
    'runtime.units',
    'sharding',
    'data.tokenizer',
    'moe',
    'model',
    'train.experiment',
    'train.step',
    'train.shapes',
  ),
  'hf': (
    'config',
    'runtime',
    'sharding',
    'data',
    'moe',
    'checkpoint',
    'model',
    'families',
    'train.experiment',
  ),
  'generate': (
    'config',
    'runtime.command',
    'checkpoint',
    'model',
    'inference',
    'train.experiment',
  ),
  'certify': (
    'config',
    'runtime.command',
    'runtime.files',
    'runtime.terminal',
    'sharding',
    'data.batch',
    'moe',
    'checkpoint',
    'model',
    'inference',
    'train.experiment',
    'train.step',
    'train.optimizer',
  ),
  '__main__': (
    'runtime.command',
    'train.__main__',
    'plan.__main__',
    'hf.__main__',
    'hf.spelling',
    'generate',
    'certify.__main__',
  ),
}


class Import(NamedTuple):
  """One module of moejax that a file imports; names are without the leading `moejax.`."""

  importer: str
  imported: str
  line: int


def module_name(path: Path) -> str:
  """'moe.layer' of moejax/moe/layer.py, 'moe' of moejax/moe/__init__.py."""
  parts = path.relative_to(ROOT / 'moejax').with_suffix('').parts
  return '.'.join(part for part in parts if part != '__init__')


def sources() -> dict[str, str]:
  """Module -> source of every file of moejax."""
  return {module_name(path): path.read_text() for path in sorted((ROOT / 'moejax').rglob('*.py'))}


def imports_of(module: str, source: str, modules: Mapping[str, str]) -> Iterator[Import]:
  """Every import of moejax in a source, wherever in the file it stands.

  `from moejax.moe import layer` imports the module moe.layer where there is one, and the package's
  own names where there is none.
  """
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      inner = [f'{node.module}.{alias.name}' for alias in node.names]
      names = [name if name.removeprefix('moejax.') in modules else node.module for name in inner]
    else:
      continue
    for name in names:
      if name.startswith('moejax.'):
        yield Import(module, name.removeprefix('moejax.'), node.lineno)


def all_imports() -> list[Import]:
  """Every import between modules of moejax."""
  modules = sources()
  return [found for name, text in modules.items() for found in imports_of(name, text, modules)]


def package_of(module: str) -> str:
  """The package at the top, '' for moejax itself."""
  return module.partition('.')[0]


def covers(allowance: str, module: str) -> bool:
  """Whether a module is the allowed one, or lies in the allowed package."""
  return module == allowance or module.startswith(f'{allowance}.')


def layering_problems(imports: list[Import]) -> Iterator[str]:
  """Imports between packages that the table does not allow, and allowances that nothing uses."""
  used: set[tuple[str, str]] = set()
  for found in imports:
    package = package_of(found.importer)
    if not package or package == package_of(found.imported):
      continue
    if package not in MAY_IMPORT:
      yield f'{package} has no row in MAY_IMPORT'
      continue
    matching = [allowance for allowance in MAY_IMPORT[package] if covers(allowance, found.imported)]
    used.update((package, allowance) for allowance in matching)
    if not matching:
      yield f'{found.importer}:{found.line} imports {found.imported}: {package} may not'
  for package, allowances in MAY_IMPORT.items():
    for allowance in allowances:
      if (package, allowance) not in used:
        yield f'{package} may import {allowance}, and nothing in it does: take it out'


def floors() -> dict[str, int]:
  """Package -> its floor, from 1; RecursionError where the table goes round in a circle."""
  found: dict[str, int] = {}

  def floor(package: str) -> int:
    if package not in found:
      below = [floor(package_of(allowance)) for allowance in MAY_IMPORT[package]]
      found[package] = 1 + max(below, default=0)
    return found[package]

  for package in MAY_IMPORT:
    floor(package)
  return found


def cycle(imports: list[Import]) -> list[str]:
  """Modules that import each other in a circle, the first again at the end; [] where none do."""
  graph: dict[str, set[str]] = defaultdict(set)
  for found in imports:
    if not found.importer.startswith(
      found.imported
    ):  # importing a module runs its package first, in any case
      graph[found.importer].add(found.imported)
  done: set[str] = set()

  def visit(module: str, path: list[str]) -> list[str]:
    if module in path:
      return [*path[path.index(module) :], module]
    if module in done:
      return []
    for other in sorted(graph[module]):
      if circle := visit(other, [*path, module]):
        return circle
    done.add(module)
    return []

  for module in sorted(graph):
    if circle := visit(module, []):
      return circle
  return []


def table() -> Iterator[str]:
  """The computed table, a line a package: floor, name, files, lines, packages that it imports."""
  modules, imports = sources(), all_imports()
  for package, floor in sorted(floors().items(), key=lambda item: item[1]):
    mine = [text for module, text in modules.items() if package_of(module) == package]
    others = {
      package_of(found.imported) for found in imports if package_of(found.importer) == package
    }
    lines = sum(text.count('\n') for text in mine)
    size = f'{len(mine):>3} files {lines:>5} lines'
    yield f'{floor}  {package:<11}{size}  {", ".join(sorted(others - {package}))}'.rstrip()


if __name__ == '__main__':
  print('\n'.join(table()))
