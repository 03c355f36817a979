"""The oracle is independent of what it is compared with."""

import ast
from pathlib import Path

import moejax.certify.oracle

FOLDER = Path(moejax.certify.oracle.__file__).parent


def test_the_oracle_imports_nothing_that_a_mutant_could_change() -> None:
  """NumPy, the standard library's numbers, and each other: no mistake in moejax is made twice."""
  imported = set()
  for path in FOLDER.glob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        imported |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f'{path.name}:{node.lineno} imports by a relative name'
        imported.add(node.module)
  ours = {name for name in imported if name.startswith('moejax')}
  assert ours and all(name.startswith('moejax.certify.oracle.') for name in ours), ours
  others = {name.partition('.')[0] for name in imported - ours}
  assert others <= {'collections', 'fractions', 'math', 'numpy', 'typing'}, others
