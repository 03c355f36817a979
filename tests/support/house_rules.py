"""The rules of the house that hold for one source at a time: what each objects to, line by line.

A rule is a function of a file's path and its source, and yields `line: problem`.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
NNX = {'jit', 'grad', 'value_and_grad', 'scan', 'vmap', 'remat', 'Optimizer', 'sow', 'pop'}
FAMILY_NAMES = {'model_name', 'model_type', 'family', 'arch', 'architecture'}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FILE_LINES, FUNCTION_LINES = 300, 60
# Functions whose arguments are a list of like things, however long: problems, parts of a path.
VARIADIC = {'check', 'print', 'join', 'joinpath', 'chain', 'einsum', 'Table', 'add_row'}


def file_length(path: str, source: str) -> Iterator[str]:
  count = source.count('\n')
  if count > FILE_LINES:
    yield f'1: has {count} lines, and {FILE_LINES} is the limit; make it two files'


def statements(tree: ast.Module) -> Iterator[tuple[int, list[ast.AST]]]:
  """(line, nodes) of each statement; of one that holds others, what stands before its colon."""
  for node in ast.walk(tree):
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)) or not isinstance(node, ast.stmt):
      continue
    own: list[ast.AST] = []
    waiting = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]
    while waiting:
      child = waiting.pop()
      if isinstance(child, (ast.ExceptHandler, ast.match_case)):
        continue
      own.append(child)
      waiting += ast.iter_child_nodes(child)
    yield node.lineno, own


def one_thought(path: str, source: str) -> Iterator[str]:
  """At most one comprehension and one conditional in a statement."""
  for line, nodes in statements(ast.parse(source)):
    comprehensions = sum(isinstance(node, COMPREHENSIONS) for node in nodes)
    conditionals = sum(isinstance(node, ast.IfExp) for node in nodes)
    if comprehensions > 1:
      yield f'{line}: {comprehensions} comprehensions in a statement; name one of them'
    if conditionals > 1:
      yield f'{line}: {conditionals} conditionals in a statement; write them out'


def plain_calls(path: str, source: str) -> Iterator[str]:
  """At most five values by position, and at most two by a star."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Call):
      name = ast.unparse(node.func).rpartition('.')[2]
      stars = sum(isinstance(value, ast.Starred) for value in node.args)
      if len(node.args) > 5 and name not in VARIADIC:
        yield f'{node.lineno}: {name} takes {len(node.args)} values by position; name them'
      if stars > 2 and name not in VARIADIC:
        yield f'{node.lineno}: {name} takes {stars} starred values; write them out'
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
      if len(node.targets[0].elts) > 5:
        yield f'{node.lineno}: {len(node.targets[0].elts)} values unpacked at once; name a record'


def names_of_files(path: str, source: str) -> Iterator[str]:
  if Path(path).name in (
    'utils.py',
    'common.py',
    'types.py',
    'constants.py',
    'helpers.py',
    'registry.py',
  ):
    yield '1: is a drawer for anything; name it by its role'


def function_length(path: str, source: str) -> Iterator[str]:
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, FUNCTIONS):
      count = node.end_lineno - node.lineno + 1
      if count > FUNCTION_LINES:
        yield f'{node.lineno}: {node.name} has {count} lines; {FUNCTION_LINES} is the limit'


def indent(path: str, source: str) -> Iterator[str]:
  depth = ['']
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.INDENT:
      if token.string != depth[-1] + '  ':
        yield f'{token.start[0]}: indent by two spaces'
      depth.append(token.string)
    elif token.type == tokenize.DEDENT:
      depth.pop()


def comments(path: str, source: str) -> Iterator[str]:
  log = (ROOT / 'LOG.md').read_text() if (ROOT / 'LOG.md').exists() else ''
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      if re.search(r'type:\s*ignore|noqa|pragma|pylint:|pyright:', token.string):
        yield f'{token.start[0]}: an ignore-comment; mend what it hides'
      todo = re.search(r'\b(?:TODO|FIXME|XXX)\b\W*(.*)', token.string)
      if todo and (not todo[1] or todo[1] not in log):
        yield f'{token.start[0]}: a TODO that is not in LOG.md'


def no_any(path: str, source: str) -> Iterator[str]:
  for node in ast.walk(ast.parse(source)):
    used = {ast.Name: 'id', ast.Attribute: 'attr', ast.alias: 'name'}
    if type(node) in used and getattr(node, used[type(node)]) == 'Any':
      yield f'{node.lineno}: Any says nothing; name the type, or object'


def silent_defaults(path: str, source: str) -> Iterator[str]:
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.Call):
      continue
    count = len(node.args) + any(k.arg == 'default' for k in node.keywords)
    if isinstance(node.func, ast.Name) and node.func.id == 'getattr' and count > 2:
      yield f'{node.lineno}: getattr with a default; missing is an error'
    is_get = isinstance(node.func, ast.Attribute) and node.func.attr == 'get' and count > 1
    if is_get and not ast.unparse(node.func.value).endswith('environ'):
      yield f'{node.lineno}: .get with a default; missing is an error'


def family_branches(path: str, source: str) -> Iterator[str]:
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, (ast.If, ast.IfExp, ast.Match, ast.While)):
      tested = ast.walk(node.subject if isinstance(node, ast.Match) else node.test)
      names = {
        n.attr if isinstance(n, ast.Attribute) else n.id
        for n in tested
        if isinstance(n, (ast.Name, ast.Attribute))
      }
      yield from (f'{node.lineno}: a branch on {n}; make it a field' for n in names & FAMILY_NAMES)


def plain_flax(path: str, source: str) -> Iterator[str]:
  for node in ast.walk(ast.parse(source)):
    is_nnx = isinstance(node, ast.Attribute) and ast.unparse(node.value) in ('nnx', 'flax.nnx')
    if is_nnx and node.attr in NNX or isinstance(node, ast.Attribute) and node.attr == 'sow':
      yield f'{node.lineno}: {ast.unparse(node)}; use jax.*, and return what a layer learns'
    if isinstance(node, ast.ImportFrom) and node.module == 'flax.nnx':
      yield from (f'{node.lineno}: nnx.{a.name}; use jax.*' for a in node.names if a.name in NNX)


def signatures(path: str, source: str) -> Iterator[str]:
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, FUNCTIONS):
      a = node.args
      args = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
      bare = [x.arg for x in args if not x.annotation and x.arg not in ('self', 'cls')]
      if bare or not node.returns:
        yield f'{node.lineno}: {node.name} has no type for {", ".join(bare) or "what it returns"}'


def docstrings(path: str, source: str) -> Iterator[str]:
  tree = ast.parse(source)
  if not source.startswith('"""') or not ast.get_docstring(tree):
    yield '1: the first line says what the file is for'
  for node in tree.body:
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith('_'):
      if not ast.get_docstring(node):
        yield f'{node.lineno}: {node.name} is public and has no docstring'


def file_docstring(path: str, source: str) -> Iterator[str]:
  if not source.startswith('"""') or not ast.get_docstring(ast.parse(source)):
    yield '1: the first line says what the file is for'


def this_machine(path: str, source: str) -> Iterator[str]:
  places = (
    r'(?<![\w.~}])/(root|home|Users|work|tmp|opt)/\w|https?://\S*/simple\b|--(extra-)?index-url'
  )
  for i, line in enumerate(source.split('\n'), 1):
    if found := re.search(places, line):
      yield f'{i}: {found[0]} is a place on one machine, or a registry'
