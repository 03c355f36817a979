"""What ends a document and stands in a text as letters is told, or cut at."""

from pathlib import Path

import pytest

from tests.data.plain_texts import open_text

MARK = '<|endoftext|>'
STORIES = [f'Once upon a time there was a cat, number {i}.' for i in range(400)]


def test_a_mark_in_the_text_is_told_once_with_its_remedy(
  tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
  (tmp_path / 'text').mkdir()
  (tmp_path / 'text' / 'stories.txt').write_text(f'\n{MARK}\n'.join(STORIES))
  (tmp_path / 'text' / 'page.md').write_text('<s>struck</s> out ' * 20)
  assert open_text(tmp_path).batch(0).segment_ids.max() == 1
  assert [record.getMessage() for record in caplog.records if 'stands' in record.getMessage()] == [
    f'{MARK!r} stands 399 times in the text, where it is ordinary letters; if documents end there, '
    f'set data.separator={MARK!r}'
  ]


def test_a_separator_cuts_documents_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
  (tmp_path / 'text').mkdir()
  (tmp_path / 'text' / 'stories.txt').write_text(f'\n{MARK}\n'.join(STORIES))
  data = open_text(tmp_path, separator=MARK, seq_len=128)
  text = data.train_text() + data.validation_text()
  assert len(text) == len(''.join(STORIES)) and MARK.encode() not in text
  assert data.batch(0).segment_ids.max() >= 3 and 'stands' not in caplog.text


def test_a_separator_that_cuts_nothing_is_told(
  tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
  (tmp_path / 'text').mkdir()
  told = 'data.separator={!r} has cut no document: each file is one'.format
  for i, part in enumerate((STORIES[:200], STORIES[200:])):
    (tmp_path / 'text' / f'{i}.txt').write_text('\n\n'.join(part))
    open_text(tmp_path, separator='\\n', batch_size=1, cache_dir=f'{tmp_path}/{i}')  # as in sh
    assert caplog.text.count(told('\\n')) == i + 1
  open_text(tmp_path, separator='\n\n', batch_size=1)
  open_text(tmp_path, batch_size=1)
  assert caplog.text.count('has cut no document') == 2
