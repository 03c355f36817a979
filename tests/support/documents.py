"""The commands and the Python that README and docs/ show, as they stand in the text."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *(ROOT / 'docs').glob('*.md')])
FENCE = re.compile(r'^```(\w*)\n(.*?)^```', re.DOTALL | re.MULTILINE)
LINK = re.compile(r'\]\(([^)\s]+)\)')
# Paths of the repository between backticks; braces and stars stand for several.
NAMED = re.compile(r'`((?:moejax|tests|configs|benchmarks|docs|notebooks)/[\w./*{},-]*)`')


class Command(NamedTuple):
  """One command of a page, without its comment."""

  page: str
  words: tuple[str, ...]

  def __str__(self) -> str:
    return f'{self.page}: {shlex.join(self.words)}'


class Snippet(NamedTuple):
  """One block of Python of a page."""

  page: str
  source: str


def blocks(language: str) -> Iterator[Snippet]:
  """The fenced blocks of all pages in this language; '' for shell and output."""
  for page in PAGES:
    for found, body in FENCE.findall(page.read_text()):
      if found == language:
        yield Snippet(page.name, body)


def commands() -> list[Command]:
  """Every line of a block that begins with `python`, `make` or `moejax`, continued lines joined."""
  found = []
  for page, body in blocks(''):
    for line in body.replace('\\\n', ' ').splitlines():
      if line.startswith(('python ', 'make ', 'moejax ')):
        found.append(Command(page, in_python(*shlex.split(line, comments=True))))
  return found


def in_python(*words: str) -> tuple[str, ...]:
  """The words of a command, `moejax COMMAND` as the same command of Python; others as they are."""
  match words:
    case ('moejax', 'train', *rest):
      return ('python', 'train.py', *rest)
    case ('moejax', 'plan', *rest):
      return ('python', 'train.py', '--plan', *rest)
    case ('moejax', name, *rest):
      return ('python', '-m', f'moejax.{name}', *rest)
  return words


def links(page: Path) -> list[str]:
  """What a page links to, but for other sites."""
  return [link for link in LINK.findall(page.read_text()) if not link.startswith('http')]


def anchors(page: Path) -> set[str]:
  """The anchors that GitHub makes of a page's headings."""
  headings = re.findall(r'^#+ (.+)$', page.read_text(), re.MULTILINE)
  return {
    re.sub(r'[^\w\- ]', '', heading).strip().lower().replace(' ', '-') for heading in headings
  }


def expand(path: str) -> list[str]:
  """The paths that one with braces stands for: 'a/{b,c}.py' -> a/b.py, a/c.py."""
  if not (braces := re.search(r'\{([^{}]*)\}', path)):
    return [path]
  before, after = path[: braces.start()], path[braces.end() :]
  return [full for part in braces[1].split(',') for full in expand(before + part + after)]
