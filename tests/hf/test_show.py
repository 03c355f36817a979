"""What published files hold, as a table."""

from pathlib import Path

import numpy as np
import pytest

from moejax.hf.safetensors.directory import Tensors, open_tensors
from tests.hf.commands import run, with_text


def test_show_tells_what_it_is_and_reads_no_tensor(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  monkeypatch.setattr(Tensors, 'read', lambda *args: pytest.fail('a tensor is read'))
  monkeypatch.setenv('COLUMNS', '200')
  assert run('show', with_text(tmp_path / 'm')) == 0
  shown = capsys.readouterr().out
  stored = open_tensors(tmp_path / 'm')
  sizes = {name: np.prod(stored.shape(name)) for name in stored.names if 'correction' not in name}
  ahead = sum(size for name, size in sizes.items() if '.layers.3.' in name)
  for part in (
    'deepseek_v3',
    f'{sum(sizes.values()) - ahead:,}, ',
    f'{ahead:,} more',
    f'{len(stored.names)} BF16',
    '257 tokens',
    'attention.latent.kv_rank',
  ):
    assert part in shown, part
