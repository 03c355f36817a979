"""A plain text, opened, and the same stream and split made by hand."""

from pathlib import Path

import numpy as np

from moejax.data.pipeline import Data, open_data
from moejax.data.sources import DataConfig
from moejax.data.special_tokens import OWN, SpecialTokens

S, B = 32, 5


def random_document(rng: np.random.Generator, words: int) -> str:
  return ' '.join(rng.choice(['alpha', 'beta', 'été', 'x', '\n', '火火'], words)) + '\n'


def open_text(
  folder: Path,
  batch_size: int = B,
  seq_len: int = S,
  seed: int = 0,
  special: SpecialTokens = OWN,
  **fields: object,
) -> Data:
  usual = {
    'source': 'text',
    'path': f'{folder}/text/*',
    'tokenizer': 'bytes',
    'cache_dir': f'{folder}/cache',
  }
  cfg, sizes = DataConfig(**usual | fields), {'batch_size': batch_size, 'seq_len': seq_len}
  return open_data(cfg, **sizes, seed=seed, special=special)


def ids_of(documents: list[str]) -> list[int]:
  return [token for document in documents for token in (256, *document.encode())]


def split_by_hand(folder: Path, data: Data) -> tuple[list[str], list[str]]:
  """Training and held-out documents, told apart by what the validation batches hold."""
  targets = np.concatenate([b.targets[b.mask] for b in data.validation()])
  cuts = [-1, *np.flatnonzero(targets == 256), len(targets)]
  held_out = [bytes(targets[a + 1 : b].tolist()).decode() for a, b in zip(cuts, cuts[1:])]
  texts = [path.read_text(encoding='utf-8') for path in sorted((folder / 'text').iterdir())]
  return [text for text in texts if text not in held_out], held_out
