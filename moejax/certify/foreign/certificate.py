"""The certificate of a foreign function: its lines, run, timed, shown and written.

function, claim -> calls on batches that are odd -> checks | a diagnosis of what is off
                -> Certificate -> terminal, certificate.json, certificate.md, badge.json
"""

import dataclasses
import inspect
import pathlib
import time
from collections.abc import Callable, Iterator

from moejax.certify.checks import Certificate, Check, Result
from moejax.certify.foreign.call import Foreign
from moejax.certify.foreign.claim import ROUTER, Claim, make_claim
from moejax.certify.foreign.given import KINDS
from moejax.certify.foreign.gradient_lines import gradient_checks
from moejax.certify.foreign.loss_lines import (
  Asked,
  ask,
  balanced_checks,
  biased_checks,
  diagnosis,
  even_labels,
  garbage_checks,
  shrunk_checks,
  value_checks,
)
from moejax.certify.foreign.router_lines import (
  TOLERANCES_OF_ROUTERS,
  choice_checks,
  decide,
  explain_choice,
  explain_weights,
  router_given,
  weight_checks,
)
from moejax.certify.provenance import commit, versions
from moejax.certify.report import write_certificate
from moejax.certify.terminal import Terminal
from moejax.config import check, problem_if

# What a function must take to be asked about a kind of batch.
NEEDED = {
  'padded rows': 'mask',
  'packed documents': 'segment_ids',
  'holes': 'mask',
  'extreme logits': 'expert_ids',
  'no token that counts': 'mask',
}
Found = Callable[[], Iterator[Check | str]]


def certify_function(
  function: Callable,
  like: str = 'sequence',
  *,
  dtype: str = 'float32',
  seed: int = 0,
  out: str = '',
  quiet: bool = False,
  **claim: object,
) -> Certificate:
  """Certifies a balance loss or a router of another codebase: NumPy in, NumPy out.

  The function is given what its parameters name:

    logits [B, S, E] floats; expert_ids [B, S, K] int64, those that f counts, best first;
    mask [B, S] bool, the tokens that count; segment_ids [B, S] int64, documents 1, 2, ... of a
    row, 0 for padding; bias [E] floats, what the choice adds to the scores; noise, std [B, S, E]
    floats, of a noisy choice; router [D, E] floats, the weights behind the logits.

  With `layers=L` all but mask, segment_ids and router have a leading axis [L, ...]. B is 4 and S is
  8, or E. What it does not take, it is not asked about: `Result.notes` say so.

  A loss returns one number, or a pair of it and its gradient, of the shape of the logits (of
  `router` for SimBal). Without a gradient the differences of its values are compared, in float64
  where the function keeps it. A router returns expert_ids [B, S, K], integers in any order, and
  weights [B, S, K].

  Args:
    function: the loss or router.
    like: a row of BALANCE_LOSSES, or 'router'.
    dtype: of the floats that it is given, which sets the tolerances: 'float32' or 'float64'.
    seed: of all that is drawn.
    out: a directory for certificate.json, certificate.md and badge.json; '' for none.
    quiet: nothing is printed.
    **claim: the other fields of `Claim`: what the function computes.

  Raises:
    ConfigError: a claim that makes no sense, or a function that cannot be called on plain inputs,
      or returns something else than is asked for. On odd inputs that is a failed check.
  """
  problem = problem_if(type(seed) is not int or seed < 0, f'seed={seed!r}: use 0 or more')
  foreign = Foreign(function, make_claim(like, claim), dtype)
  check(problem)
  start, lines = time.perf_counter(), router_results if like == ROUTER else loss_results
  found, results = lines(foreign, seed), []
  for i, result in enumerate(found, 1):
    results.append(dataclasses.replace(result, number=i))
  certificate = Certificate(results, about(foreign, seed, time.perf_counter() - start))
  if not quiet:
    print_certificate(certificate)
  if out:
    write_certificate(certificate, pathlib.Path(out))
  return certificate


def print_certificate(certificate: Certificate) -> None:
  """Prints every check and note, and the table."""
  with Terminal() as terminal:
    for result in certificate.results:
      for found in result.checks:
        terminal.check(result.name, found)
      for note in result.notes:
        terminal.note(note)
    terminal.table(certificate)


def line_result(name: str, promise: str, find: Found, notes: list[str] | None = None) -> Result:
  """A line of the certificate: its checks, and what it says besides."""
  start, found = time.perf_counter(), list(find())
  said = [finding for finding in found if isinstance(finding, str)]
  return Result(
    name=name,
    number=0,
    promise=promise,
    checks=tuple(finding for finding in found if isinstance(finding, Check)),
    seconds=time.perf_counter() - start,
    notes=(*(notes or []), *said),
  )


def loss_lines(asked: Asked) -> dict[str, tuple[str, Callable[[Asked], Iterator[Check | str]]]]:
  """The lines that make sense for a loss: name -> promise and checks."""
  claim, takes = asked.claim, asked.foreign.takes
  lines = {
    'value': (f'the value is that of the equation: {claim.text()}', value_checks),
    'gradient': ('the gradient is that of the equation', gradient_checks),
  }
  if even_labels(asked):
    balanced = claim.factor * claim.equation.balanced
    lines['balance'] = (f'{balanced:g} at perfect balance', balanced_checks)
  if {'padded rows', 'holes'} & asked.kinds.keys():
    lines['padding'] = ('padding counts nowhere', garbage_checks)
  if claim.is_product and even_labels(asked):
    lines['shrink'] = ('shrinking all scores leaves an even load as it is', shrunk_checks)
  if 'bias' in takes:
    lines['bias'] = ('the bias chooses, and is in nothing else', biased_checks)
  return lines


def loss_results(foreign: Foreign, seed: int) -> Iterator[Result]:
  """The lines of a loss, one by one; what explains the values is with the first that failed."""
  asked = ask(foreign, seed)
  results = []
  for name, (promise, find) in loss_lines(asked).items():
    notes = not_asked(asked) if name == 'value' else []
    results.append(line_result(name, promise, lambda find=find: find(asked), notes))
  # Only now: what explains one value must explain them all.
  explanations = diagnosis(asked)
  for result in results:
    if not result.passed and result.name != 'gradient':
      result, explanations = explained(result, explanations), []
    yield result


def explained(result: Result, explanations: list[str]) -> Result:
  """A line that failed, and what explains it as notes."""
  notes = [f'explained: {explanation}' for explanation in explanations]
  return dataclasses.replace(result, notes=(*result.notes, *notes))


def not_asked(asked: Asked) -> list[str]:
  """What a function is not asked about, since it does not take it."""
  takes, claim, notes = asked.foreign.takes, asked.claim, []
  for kind in KINDS:
    # Of documents only the sequence loss knows, and of tokens all but SimBal.
    is_idle = kind == 'packed documents' and claim.like != 'sequence' or claim.like == 'simbal'
    if kind not in asked.kinds and not is_idle:
      notes.append(f'not asked: {kind}: it takes no {NEEDED[kind]}')
  if claim.is_product and 'expert_ids' not in takes:
    notes.append('not asked: ties, of which a function that chooses by itself may take any')
  if claim.is_product and 'bias' not in takes:
    notes.append('not asked: a bias in P: it takes no bias')
  return notes


def router_results(foreign: Foreign, seed: int) -> Iterator[Result]:
  """The lines of a router, one by one."""
  given = router_given(foreign.claim, foreign.takes, seed, foreign.dtype)
  foreign.probe(given['plain'])
  decisions, claim = list(decide(foreign, given)), foreign.claim
  room = 10 * TOLERANCES_OF_ROUTERS[foreign.dtype][0]
  notes = [] if 'bias' in foreign.takes else ['not asked: a bias: it takes none']
  choice = line_result(
    'choice',
    f'the experts are those of the best choices: {claim.text()}',
    lambda: choice_checks(foreign, decisions),
    notes,
  )
  if explanation := '' if choice.passed else explain_choice(claim, decisions, room):
    choice = explained(choice, [explanation])
  yield choice
  weights = line_result(
    'weights',
    'the weights are those of the equation',
    lambda: weight_checks(foreign, decisions),
    ['not asked: the gradient of the weights'],
  )
  if explanation := '' if weights.passed else explain_weights(claim, decisions, room):
    weights = explained(weights, [explanation])
  yield weights


def about(foreign: Foreign, seed: int, seconds: float) -> dict[str, object]:
  """What is needed to make the certificate again; the commit is that of the function's source."""
  claim: Claim = foreign.claim
  arguments = [foreign.name, claim.text(), f'dtype={foreign.dtype!r}', f'seed={seed}']
  return {
    'command': f'moejax.certify.check({", ".join(arguments)})',
    'quick': False,
    'seed': seed,
    'seconds': round(seconds, 1),
    'commit': commit_of(foreign.function),
    'made': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
    'devices': f'NumPy, {foreign.dtype}',
    'versions': versions(('numpy',)),
    'covered': {'function': [foreign.name], 'taken': sorted(foreign.takes)},
  }


def commit_of(function: Callable) -> str:
  """The commit of the directory that holds a function's source, 'unknown' where there is none."""
  try:
    source = inspect.getsourcefile(inspect.unwrap(function))
  except TypeError:  # an object that can be called, or a partial
    return 'unknown'
  path = pathlib.Path(source or '')
  return commit(path.parent) if path.is_file() else 'unknown'
