"""`python -m moejax.certify`: tries to break every promise about routing and balance, and says how near it came.

Exit status: 0 all lines hold, 1 one does not, 2 bad arguments. Eight virtual CPU devices, whatever machine this is.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

DEVICES = 8


def prepare() -> None:
  """The environment, before jax is imported: virtual devices, and a cache of compiled programs. A user's own wins."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  # In the default order virtual devices may meet two collectives in different orders, and wait for each other forever.
  os.environ['XLA_FLAGS'] = ' '.join(
    [
      os.environ.get('XLA_FLAGS', ''),
      f'--xla_force_host_platform_device_count={DEVICES}',
      '--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED',
    ]
  ).strip()
  cache = (
    pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'moejax' / 'xla'
  )
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(cache)
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'


def main(argv: Sequence[str]) -> int:
  """Parses, certifies, writes. Returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m moejax.certify', description=__doc__.split('\n')[0].split(': ')[1]
  )
  parser.add_argument('--quick', action='store_true', help='the same lines, on fewer rows')
  parser.add_argument(
    '--only', action='append', default=[], metavar='NAME', help='this line of the contract alone'
  )
  parser.add_argument(
    '--out', default='runs/certificate', metavar='DIR', help='for certificate.json and .md'
  )
  parser.add_argument(
    '--readme', default='', metavar='FILE', help='rewrite the table between its two comments'
  )
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args(argv)
  prepare()
  # Only now: what is imported below imports jax, which reads the environment once.
  from moejax.certify.contract import LINES, certify
  from moejax.certify.report import Terminal, rewrite_readme, write_certificate

  if unknown := sorted(set(args.only) - set(LINES)):
    print(
      f'moejax.certify: --only {unknown[0]} is no line: use one of {", ".join(LINES)}',
      file=sys.stderr,
    )
    return 2
  out = pathlib.Path(args.out)
  with Terminal() as terminal:
    certificate = certify(args.only or list(LINES), args.quick, args.seed, terminal)
  write_certificate(certificate, out)
  terminal.table(certificate, out)
  if args.readme:
    try:
      rewrite_readme(certificate, pathlib.Path(args.readme))
    except (OSError, ValueError) as error:
      print(f'moejax.certify: {error}', file=sys.stderr)
      return 2
  return 0 if certificate.passed else 1


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
