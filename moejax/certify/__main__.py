"""`python -m moejax.certify`: tries to break every promise about routing and balance.

Exit status: 0 all lines hold, 1 one does not, 2 bad arguments. Eight virtual CPU devices, whatever
machine this is.
"""

import argparse
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool

from moejax.config import ConfigError, local_path
from moejax.runtime.command import CommandParser, run_quietly, usage_error

DEVICES = 8
MOST_WORKERS = 4  # by default: then the longest line takes as long as all others together
DESCRIPTION = 'tries to break every promise about routing and balance, and says how near it came.'


def prepare_environment() -> None:
  """Sets virtual devices and a cache of compiled programs, whose place a user may choose.

  To be called before jax is imported, which reads the environment once.
  """
  os.environ['JAX_PLATFORMS'] = 'cpu'
  # In the default order virtual devices may meet two collectives in different orders, and wait for
  # each other forever.
  flags = [
    os.environ.get('XLA_FLAGS', ''),
    f'--xla_force_host_platform_device_count={DEVICES}',
    '--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED',
  ]
  os.environ['XLA_FLAGS'] = ' '.join(flags).strip()
  # Where in Python an operation comes from, frame by frame, is a tenth of the time of lowering.
  os.environ.setdefault('JAX_TRACEBACK_IN_LOCATIONS_LIMIT', '0')
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    caches = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(caches / 'moejax' / 'xla')
    # By default nothing is kept that compiles in less than a second, as most programs here do.
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'


def make_parser() -> argparse.ArgumentParser:
  """The parser of the command line."""
  parser = CommandParser(prog='python -m moejax.certify', description=DESCRIPTION)
  parser.add_argument('--quick', action='store_true', help='the same lines, on fewer rows')
  parser.add_argument(
    '--only', action='append', default=[], metavar='NAME', help='this line of the contract alone'
  )
  parser.add_argument(
    '--out',
    default='runs/certificate',
    metavar='DIR',
    help='for certificate.json and .md, badge.json',
  )
  parser.add_argument(
    '--json', action='store_true', help='print one JSON object for a program, and nothing else'
  )
  parser.add_argument(
    '--readme', default='', metavar='FILE', help='rewrite the table between its two comments'
  )
  parser.add_argument('--seed', type=int, default=0, help='of all that is drawn')
  parser.add_argument(
    '--seeds',
    type=int,
    default=1,
    metavar='N',
    help='so many seeds from --seed on: of each check the worst of them',
  )
  parser.add_argument(
    '--workers',
    type=int,
    default=min(MOST_WORKERS, os.cpu_count() or 1),
    metavar='N',
    help='processes that share the lines, of some 2 GB each',
  )
  return parser


def main(argv: Sequence[str]) -> int:
  """Parses the arguments, certifies and writes the certificate. Returns the exit status."""
  args = make_parser().parse_args(argv)
  try:
    out = local_path('--out', args.out)
    readme = local_path('--readme', args.readme) if args.readme else None
  except ConfigError as error:
    print(usage_error('moejax.certify', error), file=sys.stderr)
    return 2
  prepare_environment()
  # Only now: what is imported below imports jax, which reads the environment once.
  from moejax.certify.contract import LINES, Silence, certify
  from moejax.certify.report import rewrite_readme, summary, write_certificate
  from moejax.certify.terminal import Terminal

  if unknown := sorted(set(args.only) - set(LINES)):
    known = ', '.join(LINES)
    problem = f'--only {unknown[0]} is no line: use one of {known}'
    print(usage_error('moejax.certify', problem), file=sys.stderr)
    return 2
  if args.seeds < 1 or args.seed < 0 or args.workers < 1:
    problem = 'use --seeds and --workers of 1 or more, --seed of 0 or more'
    print(usage_error('moejax.certify', problem), file=sys.stderr)
    return 2
  seeds = range(args.seed, args.seed + args.seeds)
  names = args.only or list(LINES)
  workers = min(args.workers, len(names))
  try:
    with contextlib.nullcontext(Silence()) if args.json else Terminal() as listener:
      certificate = certify(names, args.quick, seeds, listener, workers)
  except BrokenProcessPool:
    problem = 'a process was killed, as where memory runs out: use --workers=1'
    print(usage_error('moejax.certify', problem), file=sys.stderr)
    return 2
  # Before the README is looked at: a certificate that took minutes is not lost to a wrong path.
  write_certificate(certificate, out)
  if args.json:
    print(json.dumps(summary(certificate)))
  else:
    listener.table(certificate)
    listener.written(out)
  if readme:
    try:
      rewrite_readme(certificate, readme)
    except (OSError, ValueError) as error:
      print(usage_error('moejax.certify', error), file=sys.stderr)
      return 2
  return 0 if certificate.passed else 1


if __name__ == '__main__':
  sys.exit(run_quietly(main, sys.argv[1:]))
