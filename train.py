"""`python train.py` is `moejax train` of this checkout; see moejax/train/__main__.py."""

import sys

from moejax.__main__ import train_or_plan as main
from moejax.runtime.command import run_quietly
from moejax.train.__main__ import start_again_with_huge_pages

if __name__ == '__main__':
  start_again_with_huge_pages()
  sys.exit(run_quietly(main, sys.argv[1:]))
