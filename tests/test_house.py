"""The rules of the house, kept by reading every file: imports point down, files stay short, no side doors.

Each rule is a function of one source; each is also shown a bad source and must object to it.
"""
import ast
import fnmatch
import io
import re
import subprocess
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TYPED = ('train.py', 'moejax/*', 'configs/*', 'benchmarks/*')
ALL = (*TYPED, 'tests/*')

# Lines promised. A file that must break its promise wants to be two; then give the second its own row here.
LINES = {
    'train.py': 40, 'moejax/__init__.py': 5, 'moejax/checks.py': 40, 'moejax/config.py': 60,
    'moejax/flags.py': 120, 'moejax/experiment.py': 120, 'moejax/sharding.py': 150, 'moejax/layers.py': 130,
    'moejax/initial.py': 70, 'moejax/rope.py': 120, 'moejax/attention.py': 340, 'moejax/attend.py': 120,
    'moejax/splash.py': 70,
    'moejax/moe/__init__.py': 5,
    'moejax/moe/routing.py': 180, 'moejax/moe/balance.py': 220, 'moejax/moe/bias.py': 150,
    'moejax/moe/experts.py': 130, 'moejax/moe/copies.py': 50, 'moejax/moe/grouped_ffn.py': 100,
    'moejax/moe/blocked.py': 180, 'moejax/moe/ragged.py': 100, 'moejax/moe/gathered.py': 50,
    'moejax/moe/dispatch.py': 330, 'moejax/moe/layer.py': 140,
    'moejax/transformer.py': 240, 'moejax/blocks.py': 190, 'moejax/families/*.py': 150,
    'moejax/losses.py': 120, 'moejax/optim.py': 140, 'moejax/step.py': 200, 'moejax/data.py': 300,
    'moejax/schedule.py': 90, 'moejax/upcycle.py': 190, 'moejax/start.py': 100,
    'moejax/sources.py': 220, 'moejax/mixture.py': 70, 'moejax/heldout.py': 80, 'moejax/cache.py': 70,
    'moejax/tokenizer.py': 120, 'moejax/checkpoint.py': 160,
    'moejax/manifest.py': 100, 'moejax/leaves.py': 140, 'moejax/writer.py': 90, 'moejax/barrier.py': 50,
    'moejax/fingerprint.py': 80, 'moejax/rundir.py': 80, 'moejax/metrics.py': 200, 'moejax/trainer.py': 260,
    'moejax/journal.py': 150, 'moejax/report.py': 50, 'moejax/silent.py': 50, 'moejax/process.py': 80,
    'moejax/programs.py': 100, 'moejax/meshes.py': 120,
    'moejax/validation.py': 60, 'moejax/faults.py': 80, 'moejax/distributed.py': 120, 'moejax/launch.py': 90,
    'moejax/watch.py': 80, 'moejax/appended.py': 60, 'moejax/alarms.py': 100,
    'moejax/plan.py': 250, 'moejax/chips.py': 120, 'moejax/hlo.py': 180, 'moejax/groups.py': 70,
    'moejax/planned.py': 150, 'moejax/fit.py': 220, 'moejax/topology.py': 140, 'moejax/roofline.py': 120,
    'moejax/traffic.py': 100, 'moejax/moe/exchange.py': 180,
    'moejax/summary.py': 120, 'moejax/cost.py': 70, 'moejax/compressors.py': 30,
    'moejax/generate.py': 200, 'moejax/decode.py': 200, 'moejax/sampling.py': 200, 'moejax/hf.py': 220,
    'configs/*.py': 100, 'benchmarks/*.py': 200,
    'moejax/moe/selection.py': 200, 'moejax/moe/sets.py': 120, 'moejax/moe/statistics.py': 180,
    'moejax/moe/quantile.py': 100, 'moejax/moe/variation.py': 120, 'moejax/moe/canonical.py': 120,
    'moejax/stability.py': 60, 'moejax/certify/*.py': 300, 'moejax/objective.py': 180, 'moejax/state.py': 80,
    'moejax/transfer.py': 240, 'moejax/publish.py': 150, 'moejax/opened.py': 130,
    'moejax/tensors.py': 200, 'moejax/staging.py': 50, 'moejax/shards.py': 200, 'moejax/quantised.py': 120,
    'moejax/accumulation.py': 150, 'moejax/interference.py': 80, 'moejax/rows.py': 100, 'moejax/probe.py': 80,
    'moejax/probes.py': 90,
}
# Who stands where: a module imports from lower levels only, and from its own level by an arrow below.
LEVELS = {
    'moejax': 0, 'checks': 0, 'config': 0,
    'sharding': 1, 'initial': 1, 'rope': 1, 'losses': 1, 'optim': 1, 'data': 1, 'sources': 1, 'tokenizer': 1,
    'cache': 1, 'heldout': 1, 'mixture': 1, 'schedule': 1,
    'checkpoint': 1, 'manifest': 1, 'leaves': 1, 'writer': 1, 'barrier': 1, 'fingerprint': 1, 'compressors': 1,
    'rundir': 1, 'metrics': 1, 'flags': 1, 'stability': 1,
    'tensors': 1, 'staging': 1, 'shards': 1, 'quantised': 1,
    'layers': 2, 'attend': 2, 'splash': 2, 'moe': 3, 'attention': 3, 'transformer': 4, 'blocks': 4, 'decode': 5,
    'sampling': 5,
    'families': 5, 'step': 5, 'experiment': 5, 'objective': 5, 'state': 5, 'cost': 5, 'accumulation': 5,
    'interference': 5, 'rows': 5, 'transfer': 5, 'publish': 5, 'upcycle': 5, 'opened': 6, 'start': 6,
    'certify': 6, 'probe': 6, 'probes': 6, 'hf': 6, 'generate': 6, 'configs': 6, 'journal': 6, 'report': 6, 'silent': 6,
    'summary': 6, 'trainer': 6,
    'appended': 1, 'alarms': 6,
    'faults': 1, 'distributed': 1, 'launch': 1, 'watch': 1, 'chips': 1, 'hlo': 1, 'groups': 1, 'traffic': 1,
    'topology': 1, 'process': 6,
    'programs': 6, 'meshes': 6, 'validation': 6, 'plan': 6, 'planned': 6, 'fit': 6, 'roofline': 6,
    'train': 7,
}
ARROWS = {
    'transfer': {'families', 'families.*'}, 'publish': {'experiment', 'families', 'families.*', 'transfer'},
    'hf': {'generate', 'opened'}, 'opened': {'generate'},
    'config': {'checks'}, 'data': {'cache', 'heldout', 'sources', 'tokenizer'}, 'heldout': {'sources'},
    'attend': {'splash'},
    'sources': {'mixture', 'tokenizer'},
    'checkpoint': {'distributed', 'fingerprint', 'leaves', 'manifest', 'rundir', 'writer'},
    'writer': {'barrier', 'distributed', 'faults', 'manifest', 'rundir'}, 'rundir': {'distributed', 'faults'},
    'leaves': {'distributed', 'manifest'},
    'manifest': {'distributed'}, 'sharding': {'chips'}, 'distributed': {'sharding'},
    'metrics': {'appended', 'chips'}, 'appended': {'faults'},
    'step': {'accumulation', 'experiment', 'objective', 'state'},
    'interference': {'experiment', 'objective', 'state'}, 'objective': {'experiment'}, 'state': {'experiment'},
    'cost': {'experiment'}, 'accumulation': {'experiment', 'objective', 'state'},
    'experiment': {'upcycle'}, 'sampling': {'decode'}, 'start': {'generate'},
    'tensors': {'quantised', 'shards', 'staging'}, 'quantised': {'shards'},
    'transformer': {'blocks'}, 'losses': {'schedule'}, 'families': {'families.*'},
    'families.family': {'families.keys', 'families.names'},
    'families.rope_keys': {'families.keys'}, 'families.layer_keys': {'families.keys'},
    'families.tables': {'families.keys', 'families.layer_keys', 'families.names'},
    **{f'families.{name}': {'families.family', 'families.*keys', 'families.names', 'families.tables'} for name in (
        'deepseek_v2', 'deepseek_v3', 'dense', 'glm4_moe', 'gpt_oss', 'mixtral', 'olmoe', 'openpangu_ultra_moe',
        'qwen2_moe', 'qwen3_moe')},
    'optim': {'schedule', 'sharding'}, 'journal': {'alarms', 'probes', 'report', 'silent'},
    'programs': {'probe', 'start'}, 'probes': {'probe'}, 'validation': {'journal', 'programs', 'silent'},
    'plan': {'fit', 'meshes', 'planned', 'programs', 'start', 'summary'},
    'planned': {'fit', 'meshes', 'roofline', 'summary'}, 'fit': {'meshes', 'roofline'},
    'hlo': {'groups'}, 'traffic': {'hlo'}, 'topology': {'chips'},
    'trainer': {'generate', 'journal', 'meshes', 'process', 'programs', 'silent', 'start', 'summary',
                'validation'},
    'moe.layer': {'moe.selection', 'moe.statistics', 'moe.sets', 'moe.dispatch',
                  'moe.experts', 'moe.balance', 'moe.bias', 'moe.routing'},
    'moe.exchange': {'moe.copies', 'moe.experts', 'moe.routing'},
    'moe.dispatch': {'moe.exchange', 'moe.copies', 'moe.experts', 'moe.grouped_ffn', 'moe.routing'},
    'moe.grouped_ffn': {'moe.blocked', 'moe.gathered', 'moe.ragged', 'moe.copies', 'moe.experts'},
    'moe.gathered': {'moe.copies', 'moe.experts'},
    'moe.blocked': {'moe.copies', 'moe.experts'}, 'moe.ragged': {'moe.copies', 'moe.experts'},
    'moe.balance': {'moe.bias', 'moe.routing', 'moe.sets', 'moe.selection', 'moe.canonical', 'moe.variation'},
    'moe.bias': {'moe.quantile', 'moe.routing', 'moe.sets'},
    'moe.sets': {'moe.routing'}, 'moe.variation': {'moe.routing', 'moe.sets'},
    'moe.canonical': {'moe.routing', 'moe.sets'}, 'moe.statistics': {'moe.routing', 'moe.sets'},
    'moe.routing': {'moe.selection'},
    'certify.__main__': {'certify.contract', 'certify.report'}, 'certify.contract': {'certify.*'},
    'certify.laws': {'certify.equations', 'certify.measure', 'certify.oracle*', 'certify.plan', 'certify.report'},
    'certify.equations': {'certify.controller', 'certify.measure', 'certify.oracle*', 'certify.plan', 'certify.report'},
    'certify.controller': {'certify.tiny', 'certify.measure', 'certify.oracle*', 'certify.plan', 'certify.report'},
    'certify.steps': {'certify.tiny', 'certify.oracle*', 'certify.plan', 'certify.report'},
    'certify.causality': {'certify.plan', 'certify.report'},
    'certify.measure': {'certify.plan'}, 'certify.tiny': {'certify.plan'},
    **{f'certify.oracle_{name}': {'certify.oracle'} for name in ('balance', 'bias', 'codebases', 'selection')},
}
NNX = {'jit', 'grad', 'value_and_grad', 'scan', 'vmap', 'remat', 'Optimizer', 'sow', 'pop'}
FAMILY_NAMES = {'model_name', 'model_type', 'family', 'arch', 'architecture'}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
  """(line, module of ours, without the leading `moejax.`) of every import, wherever in the file it is."""
  files = {p.removesuffix('.py').replace('/', '.') for p in python_files('moejax/*', 'configs/*')}
  modules = files | {f'moejax.{name}' for name in LEVELS}
  for node in ast.walk(tree):
    names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom):
      base = '.' * node.level + (node.module or '')
      names = [f'{base}.{a.name}' if f'{base}.{a.name}' in modules else base for a in node.names]
    for name in names:
      if name.split('.')[0] in ('', 'moejax', 'configs', 'train', 'tests', 'benchmarks'):
        yield node.lineno, name.removeprefix('moejax.')


def layering(path: str, source: str) -> Iterator[str]:
  me = path.removesuffix('.py').removesuffix('/__init__').replace('/', '.').removeprefix('moejax.')
  if me.split('.')[0] not in LEVELS:
    yield f'1: {me} has no level; give it one in LEVELS'
    return
  for line, other in imported(ast.parse(source)):
    top, arrows = other.split('.')[0], ARROWS[me] if me in ARROWS else set()
    is_below = top in LEVELS and LEVELS[top] < LEVELS[me.split('.')[0]]
    if not is_below and other != me and not any(fnmatch.fnmatch(other, arrow) for arrow in arrows):
      yield f'{line}: {me} imports {other}, which is not below it'


def length(path: str, source: str) -> Iterator[str]:
  promised = [n for pattern, n in LINES.items() if fnmatch.fnmatch(path, pattern)]
  if not promised:
    yield '1: has no promise of length; give it a row in LINES'
  elif source.count('\n') > promised[0]:
    yield f'1: has {source.count(chr(10))} lines and promised {promised[0]}; make it two'


def names_of_files(path: str, source: str) -> Iterator[str]:
  if Path(path).name in ('utils.py', 'common.py', 'types.py', 'constants.py', 'helpers.py', 'registry.py'):
    yield '1: is a drawer for anything; name it by its role'


def function_length(path: str, source: str) -> Iterator[str]:
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, FUNCTIONS) and node.end_lineno - node.lineno >= 60:
      yield f'{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines; 60 is the limit'


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
      names = {n.attr if isinstance(n, ast.Attribute) else n.id for n in tested
               if isinstance(n, (ast.Name, ast.Attribute))}
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
  places = r'(?<![\w.~}])/(root|home|Users|work|tmp|opt)/\w|https?://\S*/simple\b|--(extra-)?index-url'
  for i, line in enumerate(source.split('\n'), 1):
    if found := re.search(places, line):
      yield f'{i}: {found[0]} is a place on one machine, or a registry'


# rule -> (where it holds, what it must object to: path and source); forbidden words are spelt apart
LONG = 'def f() -> None:\n' + '  x = 1\n' * 60
RULES: dict[Callable[[str, str], Iterator[str]], tuple[tuple[str, ...], list[tuple[str, str]]]] = {
    layering: (('train.py', 'moejax/*', 'configs/*'), [
        ('moejax/layers.py', 'import moejax.transformer\n'),
        ('moejax/layers.py', 'def f() -> None:\n  from moejax import step\n'),
        ('moejax/rope.py', 'from moejax.losses import x\n'),
        ('moejax/rope.py', 'from .config import x\n'),
        ('moejax/moe/routing.py', 'from moejax.moe.balance import load\n'),
        ('moejax/moe/balance.py', 'from moejax.moe import dispatch\n'),
        ('moejax/attention.py', 'from moejax.moe.layer import MoE\n'),
        ('moejax/tokenizer.py', 'from moejax import data\n'),
        ('moejax/experiment.py', 'from moejax import step\n'),
        ('moejax/families/a.py', 'from moejax.families import b\n'),
        ('moejax/trainer.py', 'from configs import tiny\n'), ('moejax/step.py', 'import tests.oracle\n'),
        ('moejax/config.py', 'from moejax.sharding import MeshConfig\n'), ('moejax/new.py', '')]),
    length: (TYPED, [('train.py', 'x = 1\n' * 41), ('moejax/extra.py', '')]),
    names_of_files: (ALL, [('moejax/utils.py', ''), ('moejax/moe/types.py', '')]),
    function_length: (ALL, [
        ('a.py', LONG), ('a.py', 'class A:\n  async ' + LONG.replace('\n', '\n  ').strip())]),
    indent: (ALL, [('a.py', 'if x:\n    y\n'), ('a.py', 'if x:\n\ty\n'), ('a.py', 'if x:\n  if y:\n   z\n')]),
    comments: (ALL, [
        ('a.py', 'x = 1  # type: ' + 'ignore\n'), ('a.py', 'x = 1  # no' + 'qa: E501\n'),
        ('a.py', '# TO' + 'DO\n'), ('a.py', 'x = 1  # FIX' + 'ME: nobody ever wrote this down\n')]),
    no_any: (ALL, [
        ('a.py', 'from typing import Any\n'), ('a.py', 'x: typing.Any = 1\n'), ('a.py', 'x: Any\n')]),
    silent_defaults: (TYPED, [('a.py', 'getattr(cfg, "x", 0)'), ('a.py', 'd.get("x", 0.0)'),
                              ('a.py', 'd.get("x", default=0)')]),
    family_branches: (('moejax/*',), [('a.py', 'if cfg.model_name == "x":\n  pass\n'),
                                      ('a.py', 'x = 1 if "deep" in family else 2\n'),
                                      ('a.py', 'match model_type:\n  case "x":\n    pass\n')]),
    plain_flax: (TYPED, [
        ('a.py', 'nnx.jit(f)'), ('a.py', 'flax.nnx.Optimizer(m)'), ('a.py', 'self.sow("x", 1)'),
        ('a.py', 'from flax.nnx import scan\n')]),
    signatures: (TYPED, [
        ('a.py', 'def f(x) -> int: ...'), ('a.py', 'def f(x: int): ...'), ('a.py', 'def f(*a) -> int: ...'),
        ('a.py', 'class A:\n  def f(self, *, k=1) -> int: ...\n')]),
    docstrings: (TYPED, [('a.py', 'x = 1\n'), ('a.py', '"""A."""\ndef f() -> None:\n  pass\n'),
                         ('a.py', '"""A."""\nclass A:\n  pass\n'), ('a.py', '# c\n"""A."""\n')]),
    file_docstring: (('tests/*',), [('a.py', 'x = 1\n'), ('a.py', '# c\n"""A."""\n')]),
}


def python_files(*patterns: str) -> list[str]:
  paths = ['train.py', *(str(p.relative_to(ROOT)) for d in ('moejax', 'configs', 'tests', 'benchmarks')
                         for p in (ROOT / d).rglob('*.py'))]
  return [p for p in paths if any(fnmatch.fnmatch(p, pattern) for pattern in patterns)]


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule: Callable[[str, str], Iterator[str]]) -> None:
  files = python_files(*RULES[rule][0])
  assert files
  broken = [f'{path}:{problem}' for path in files for problem in rule(path, (ROOT / path).read_text())]
  assert not broken, '\n' + '\n'.join(broken)


BAD = [(rule, *bad) for rule, (_, bads) in RULES.items() for bad in bads]


@pytest.mark.parametrize(('rule', 'path', 'source'), BAD, ids=lambda x: x.__name__ if callable(x) else '')
def test_the_rule_objects(rule: Callable[[str, str], Iterator[str]], path: str, source: str) -> None:
  assert list(rule(path, source))


def test_no_tracked_file_names_a_place_on_one_machine() -> None:
  git = ['git', '-c', 'safe.directory=*', 'ls-files']
  tracked = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\n')
  files = [p for p in tracked if p != 'tests/test_house.py' and (ROOT / p).is_file()]
  broken = [f'{p}:{x}' for p in files for x in this_machine(p, (ROOT / p).read_text(errors='replace'))]
  assert files and not broken, '\n' + '\n'.join(broken)
  for bad in ('/root/x', '/home/me', 'in /work/x', 'https://example.org/simple', '/opt/wheels', '/tmp/x'):
    assert list(this_machine('a', bad)), bad
  assert not list(this_machine('a', 'https://github.com/a/b  ~/.cache  /usr/bin/env'))


def test_what_is_allowed_passes() -> None:
  good = {
      'moejax/data.py': 'from moejax.tokenizer import Tokenizer\nfrom moejax import config\nimport jax\n',
      'moejax/step.py': 'from moejax import experiment\nfrom moejax.moe import layer\nimport moejax.losses\n',
      'moejax/moe/layer.py': 'from moejax.moe import dispatch, routing\nfrom moejax.layers import Linear\n',
      'moejax/families/__init__.py': 'from moejax.families import mixtral\n',
      'configs/tiny.py': 'from moejax.experiment import ExperimentConfig\nfrom moejax.config import check\n',
      'train.py': 'from moejax import flags\nfrom moejax.trainer import train\n'}
  assert not [problem for path, source in good.items() for problem in layering(path, source)]
  assert not list(silent_defaults('a.py', 'd.get(k)\nos.environ.get("A", "")\nx.at[i].get(fill_value=0)\n'))
