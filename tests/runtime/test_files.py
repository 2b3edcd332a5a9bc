"""Files that appear whole, locks, and hints at near names."""

import os
import threading
from pathlib import Path

import pytest

from deeplab_jax.runtime import files
from deeplab_jax.runtime.errors import UserError


def test_a_file_is_replaced_only_when_it_is_whole(tmp_path):
  path = tmp_path / 'result.json'
  path.write_text('old')
  with files.replacing(path) as temporary:
    with open(temporary, 'w') as file:
      file.write('new')
    assert path.read_text() == 'old'
  assert path.read_text() == 'new'
  with pytest.raises(RuntimeError), files.replacing(path) as temporary:
    with open(temporary, 'w') as file:
      file.write('half')
    raise RuntimeError
  assert path.read_text() == 'new'
  assert list(tmp_path.iterdir()) == [path]


def test_errors_name_the_file_that_was_to_be_replaced(tmp_path):
  path = tmp_path / 'missing' / 'result.json'
  with (
    pytest.raises(FileNotFoundError) as error,
    files.replacing(path) as temporary,
  ):
    Path(temporary).touch()
  assert error.value.filename == str(path)


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
  path, order = tmp_path / 'folder' / '.data.lock', []

  def second():
    with files.locked(path):
      order.append('second')

  with files.locked(path):
    thread = threading.Thread(target=second)
    thread.start()
    thread.join(timeout=0.2)
    assert thread.is_alive()
    order.append('first')
  thread.join(timeout=30)
  assert order == ['first', 'second'] and path.exists()


@pytest.mark.parametrize(
  ('name', 'others', 'hint'),
  [
    ('Train', ['train.txt', 'val.txt'], '; there is train.txt'),
    ('img-7.jpg', ['img-007.png', 'img-8.png'], '; there is img-007.png'),
    ('a-b', ['A_B', 'c'], '; there is A_B'),
    ('VOC2012', ['VOC2012test', 'x'], '; there is VOC2012test'),
    ('trian', ['train', 'val'], '; there is train'),
    ('x', ['train', 'val'], ''),
    ('train', [], ''),
  ],
)
def test_hints_name_what_was_probably_meant(name, others, hint):
  assert files.near(name, others) == hint


def test_hints_are_looked_for_beside_a_file(tmp_path):
  (tmp_path / 'photo.png').touch()
  assert files.near_file(tmp_path / 'Photo.jpg') == '; there is photo.png'
  assert files.near_file(tmp_path / 'missing' / 'photo.png') == ''


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
  path, pipe = tmp_path / 'small', tmp_path / 'pipe'
  path.write_bytes(b'abc')
  assert files.read_bytes(path, 3) == b'abc'
  os.mkfifo(pipe)
  for file, words in (
    (path, '3 bytes are too many, at most 2 are read'),
    (pipe, 'not a regular file'),
    (Path('/dev/zero'), 'not a regular file'),
    (tmp_path, 'not a regular file'),
  ):
    with pytest.raises(UserError, match=words) as error:
      files.read_bytes(file, 2)
    assert str(error.value).startswith(f'{file}: ')
