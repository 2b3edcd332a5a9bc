"""Files that appear whole, locks, and hints at near names."""

import errno
import fcntl
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deeplab_jax.runtime import errors, files
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


def test_what_is_appended_stays_whole_on_a_disk_that_fills(tmp_path):
  path = tmp_path / 'lines'
  files.append(path, b'one\n')
  # In a process of its own: SIGXFSZ and the limit are the process's.
  script = (
    'import resource, signal, sys\n'
    'from pathlib import Path\n'
    'from deeplab_jax.runtime import files\n'
    'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
    'resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n'
    'for data in (b"two too long\\n", b"two\\n", b"three\\n"):\n'
    '  try:\n'
    '    files.append(Path(sys.argv[1]), data)\n'
    '  except OSError as error:\n'
    '    print(error.errno)\n'
  )
  command = [sys.executable, '-c', script, str(path)]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert done.stdout.split() == [str(errno.ENOSPC)] * 2
  assert path.read_text() == 'one\ntwo\n'


def test_a_full_disk_names_the_file_that_was_to_be_replaced(tmp_path):
  with pytest.raises(OSError) as error, files.replacing(tmp_path / 'x'):
    raise OSError(errno.ENOSPC, 'No space left on device')
  assert error.value.filename == str(tmp_path / 'x')


HOLD = """
import subprocess, sys, time
from pathlib import Path
from deeplab_jax.runtime import files
with files.held(Path(sys.argv[1])):
  child = subprocess.Popen(['sleep', '60'])
  print(child.pid, flush=True)
  time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_whose_death_frees_it(tmp_path):
  folder = tmp_path / 'run'
  command = [sys.executable, '-c', HOLD, str(folder)]
  with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
    child = int(owner.stdout.readline())
    words = f'{folder} is in use by process {owner.pid} on '
    with (
      pytest.raises(errors.UserError, match=re.escape(words)) as refused,
      files.held(folder),
    ):
      pass
    assert '--workdir' in str(refused.value) and '\n' not in str(refused.value)
    owner.kill()
  try:  # a process that the owner started keeps nothing
    with files.held(folder):
      files.check_held(folder)
  finally:
    os.kill(child, signal.SIGKILL)
  assert list(folder.iterdir()) == []


def test_a_folder_made_to_be_held_goes_if_nothing_was_written(tmp_path):
  with files.held(tmp_path / 'new'):
    assert (tmp_path / 'new' / '.lock').exists()
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(KeyError), files.held(tmp_path / 'new'):
    (tmp_path / 'new' / 'result').touch()
    raise KeyError
  assert os.listdir(tmp_path / 'new') == ['result']


@pytest.mark.parametrize('change', ['removed', 'replaced'])
def test_a_holder_notices_that_its_folder_is_gone(tmp_path, change):
  folder = tmp_path / 'run'
  with files.held(folder):
    shutil.rmtree(folder)
    if change == 'replaced':
      folder.mkdir()
      (folder / '.lock').write_text('process 1 on another host since 2020')
    with pytest.raises(errors.UserError, match='removed or taken'):
      files.check_held(folder)
  assert folder.exists() == (change == 'replaced')
  if change == 'replaced':  # the lock of another one stays
    assert (folder / '.lock').exists()


def test_without_locks_a_warning_says_so(tmp_path, monkeypatch, caplog):
  def no_locks(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(logging.getLogger('deeplab_jax'), 'propagate', True)
  monkeypatch.setattr(fcntl, 'flock', no_locks)
  with files.held(tmp_path):
    files.check_held(tmp_path)
  assert caplog.messages == [f'{tmp_path} cannot be locked: No locks available']


@pytest.fixture
def bucket(monkeypatch):
  """A folder in an emulated bucket, and the server."""
  gcs_server = pytest.importorskip('gcs_server')
  with gcs_server.serving() as server:
    for name, value in server.environment.items():
      monkeypatch.setenv(name, value)
    pytest.importorskip('gcsfs')
    yield files.as_path('gs://bucket/run'), server


def test_a_remote_file_is_replaced_only_when_it_is_whole(bucket):
  folder, server = bucket
  files.write_json(f'{folder}/a.json', {'value': 1})
  assert server.objects['bucket/run/a.json'][0] == b'{\n  "value": 1\n}\n'
  with (
    pytest.raises(RuntimeError),
    files.replacing(folder / 'a.json') as temporary,
  ):
    Path(temporary).write_bytes(b'half')
    raise RuntimeError
  assert set(server.objects) == {'bucket/run/a.json'}
  assert files.read_bytes(folder / 'a.json') == b'{\n  "value": 1\n}\n'
  assert len(files.read_bytes(folder / 'a.json', 5)) == 5


def test_remote_files_grow_and_what_other_hosts_write_is_seen(bucket):
  folder, server = bucket
  files.append(folder / 'lines', b'one\n')
  files.append(folder / 'lines', b'')
  files.append(folder / 'lines', b'two\n')
  assert server.objects['bucket/run/lines'][0] == b'one\ntwo\n'
  assert [path.name for path in folder.iterdir()] == ['lines']
  for number in range(20):  # in several pages
    server.objects[f'bucket/run/{number}'] = server.objects['bucket/run/lines']
  assert len(list(folder.iterdir())) == 21


def test_a_later_run_takes_a_remote_folder_which_the_earlier_notices(
  bucket, caplog
):
  folder, server = bucket
  with files.held(folder):
    files.check_held(folder)
    assert 'gs://bucket/run has no lock' in caplog.text
    (folder / '.lock').write_text('another process')
    with pytest.raises(UserError, match='taken by another run'):
      files.check_held(folder)
  assert server.objects['bucket/run/.lock'][0] == b'another process'


def test_a_bucket_without_access_is_refused_in_one_line(bucket):
  _, server = bucket
  server.refusal = 401
  with pytest.raises(UserError, match=r'^gs://bucket/other: .*, 401; it needs'):
    files.as_path('gs://bucket/other')


def test_a_missing_gcsfs_is_named_with_its_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  with pytest.raises(UserError, match=r"gs://b/run: .*'deeplab_jax\[gcs\]'"):
    files.as_path('gs://b/run')


def test_a_lock_that_is_a_link_or_a_pipe_is_refused(tmp_path):
  victim = tmp_path / 'victim'
  victim.write_text('precious')
  (tmp_path / '.lock').symlink_to(victim)
  with pytest.raises(OSError, match=r'\.lock'), files.held(tmp_path):
    pass
  assert victim.read_text() == 'precious'
  (tmp_path / '.lock').unlink()
  os.mkfifo(tmp_path / '.lock')
  with (
    pytest.raises(UserError, match=r'\.lock: not a regular file'),
    files.held(tmp_path),
  ):
    pass


def test_who_holds_a_folder_removes_what_a_killed_process_left(tmp_path):
  (tmp_path / 'eval').mkdir()
  left = [tmp_path / '.eval.json.7.tmp', tmp_path / 'eval' / '.x.png.12.tmp']
  kept = [tmp_path / 'own.tmp', tmp_path / 'eval' / 'x.png']
  for path in (*left, *kept):
    path.write_text('')
  with files.held(tmp_path):
    assert [path.exists() for path in left] == [False] * 2
    assert all(path.exists() for path in kept)


def test_a_lock_that_is_waited_for_is_no_link_either(tmp_path):
  victim = tmp_path / 'victim'
  victim.write_text('precious')
  (tmp_path / '.data.lock').symlink_to(victim)
  with (
    pytest.raises(OSError, match=r'data\.lock'),
    files.locked(tmp_path / '.data.lock'),
  ):
    pass
  assert victim.read_text() == 'precious'
