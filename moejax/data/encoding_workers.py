"""Tokenising in several processes, in the order of the text.

The tokenizer's own threads share the work of a group, but what makes arrays of its ids is Python,
which one core does. A worker is this file as a program of its own, `python -m
moejax.data.encoding_workers FD`, and not a process of `multiprocessing`: a fork after JAX has
started its threads may hang, and a spawn would run the caller's script again.
"""

import collections
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import NamedTuple

from moejax.config import ConfigError
from moejax.data.encoding import DocumentPiece, encode_group
from moejax.data.tokenizer import Tokenizer

# Bytes of text below which starting processes takes longer than they save.
LEAST_BYTES = 64 << 20


class Worker(NamedTuple):
  """A process that encodes groups, and what it is talked to through."""

  process: subprocess.Popen
  pipe: Connection


def num_workers(text_bytes: int) -> int:
  """Returns how many processes to tokenise a text in; 1: this one alone."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  return (cores or 1) if text_bytes >= LEAST_BYTES else 1


def encode_groups(
  groups: Iterable[list[DocumentPiece]], tokenizer: Tokenizer, workers: int
) -> Iterator[bytes]:
  """Yields what `encode_group` makes of each group, in order, by so many processes.

  Raises:
    ConfigError: as `encode_group`, or a process has ended before it was done.
  """
  if workers == 1:
    for group in groups:
      yield encode_group(group, tokenizer)
    return
  with contextlib.ExitStack() as held:
    idle = collections.deque(_start_worker(held, tokenizer) for _ in range(workers))
    busy: collections.deque[Worker] = collections.deque()
    for group in groups:
      # A worker has one group at a time. Were it sent a second, both might wait for the other to
      # read: it with a result, and this process with the group.
      if not idle:
        idle.append(busy.popleft())
        yield _result_of(idle[0])
      with _expect_alive(idle[0]):
        idle[0].pipe.send(group)
      busy.append(idle.popleft())
    while busy:
      yield _result_of(busy.popleft())


def _start_worker(held: contextlib.ExitStack, tokenizer: Tokenizer) -> Worker:
  """Starts a worker, which ends when `held` does, or when this process dies."""
  ours, theirs = Pipe()
  environment = os.environ | {
    'TOKENIZERS_PARALLELISM': 'false',
    'PYTHONPATH': os.pathsep.join(filter(None, sys.path)),  # it is to find the same moejax
  }
  command = [sys.executable, '-m', 'moejax.data.encoding_workers', f'{theirs.fileno()}']
  process = subprocess.Popen(
    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
  )
  theirs.close()
  held.callback(process.wait)
  held.callback(process.terminate)
  held.callback(ours.close)
  worker = Worker(process, ours)
  with _expect_alive(worker):
    ours.send((tokenizer.json_text, tokenizer.name, tokenizer.special))
  return worker


@contextlib.contextmanager
def _expect_alive(worker: Worker) -> Iterator[None]:
  """Raises ConfigError where the worker turns out to have ended, in the block that talks to it."""
  try:
    yield
  except (EOFError, ConnectionError) as error:
    raise ConfigError(
      f'a process that tokenises has ended with status {worker.process.wait()}, as when memory is '
      'short: start again, with more of it'
    ) from error


def _result_of(worker: Worker) -> bytes:
  """Waits for the ids of the group that a worker has."""
  with _expect_alive(worker):
    result = worker.pipe.recv()
  if isinstance(result, ConfigError):
    raise result
  return result


def main(argv: list[str]) -> None:
  """Encodes the groups that come through a pipe until it is closed.

  argv: the number of its file descriptor.
  """
  # Control-C goes to all processes of a terminal; the one that asks closes the pipe.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  pipe = Connection(int(argv[0]))
  with contextlib.suppress(EOFError, ConnectionError):
    tokenizer = Tokenizer(*pipe.recv())
    while True:
      group = pipe.recv()
      try:
        result = encode_group(group, tokenizer)
      except ConfigError as error:
        result = error
      pipe.send(result)


if __name__ == '__main__':
  main(sys.argv[1:])
