"""What the writers leave on disk and on the screen, read back from there."""

import contextlib
import errno
import fcntl
import importlib.util
import io
import json
import logging
import os
import pty
import re
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from deeplab_jax.runtime import files
from deeplab_jax.training import writers


def crc32c(data):
  """CRC-32C (RFC 3720), bit by bit, masked as in TFRecord files."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
  crc ^= 0xFFFFFFFF
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(workdir):
  """The events of all files: length, its CRC, the proto, its CRC, and again."""
  events = []
  for path in sorted((workdir / 'tensorboard').iterdir()):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack('<Q', data[:8])
      payload = data[12 : 12 + length]
      checks = struct.unpack('<I', data[8:12]) + struct.unpack(
        '<I', data[12 + length : 16 + length]
      )
      assert checks == (crc32c(data[:8]), crc32c(payload))
      events.append(event_pb2.Event.FromString(payload))
      data = data[16 + length :]
  return events


def event_values(workdir):
  return [
    (event.step, value)
    for event in read_events(workdir)
    for value in event.summary.value
  ]


def event_scalars(workdir):
  return [
    (step, value.tag, pytest.approx(value.simple_value))
    for step, value in event_values(workdir)
  ]


def read_lines(workdir):
  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  text = (workdir / 'metrics.jsonl').read_text()
  assert text == '' or text.endswith('\n')
  return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_scalars_reach_tensorboard_and_metrics_jsonl(tmp_path):
  with writers.Writer(tmp_path / 'new' / 'run') as writer:
    writer.scalars(10, {'train/loss': 0.5, 'train/lr': jnp.float32(0.25)})
    writer.scalars(np.int64(20), {'val/miou': np.float64(0.75), 'images': 7})
  run = tmp_path / 'new' / 'run'
  lines = read_lines(run)
  assert lines == [
    {'step': 10, 'train/loss': 0.5, 'train/lr': 0.25},
    {'step': 20, 'val/miou': 0.75, 'images': 7},
  ]
  assert list(lines[0]) == ['step', 'train/loss', 'train/lr']
  assert isinstance(lines[1]['images'], int)
  assert event_scalars(run) == [
    (10, 'train/loss', 0.5),
    (10, 'train/lr', 0.25),
    (20, 'val/miou', 0.75),
    (20, 'images', 7),
  ]


def test_scalars_of_every_dtype_become_numbers(tmp_path):
  values = {
    'bfloat16': jnp.asarray(1.5, jnp.bfloat16),
    'int32': jnp.asarray(3, jnp.int32),
    'float16': np.float16(1),
  }
  with writers.Writer(tmp_path) as writer:
    writer.scalars(1, values)
  assert read_lines(tmp_path) == [
    {'step': 1, 'bfloat16': 1.5, 'int32': 3, 'float16': 1.0}
  ]


def test_nan_and_infinity_are_null_in_the_line(tmp_path):
  with writers.Writer(tmp_path) as writer:
    writer.scalars(3, {'a': float('nan'), 'b': np.float32('inf'), 'd': 1.0})
  assert read_lines(tmp_path) == [{'step': 3, 'a': None, 'b': None, 'd': 1.0}]
  values = {v.tag: v.simple_value for _, v in event_values(tmp_path)}
  assert values.keys() == {'a', 'b', 'd'}
  assert np.isnan(values['a'])
  assert values['b'] == np.inf


def test_lines_are_on_disk_at_once(tmp_path):
  with writers.Writer(tmp_path) as writer:
    writer.scalars(1, {'loss': 1.0})
    assert read_lines(tmp_path) == [{'step': 1, 'loss': 1.0}]


def test_image_comes_back_pixel_for_pixel(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
  with writers.Writer(tmp_path) as writer:
    writer.image(5, 'val/panel', image)
  ((step, value),) = event_values(tmp_path)
  assert (step, value.tag) == (5, 'val/panel')
  picture = Image.open(io.BytesIO(value.image.encoded_image_string))
  np.testing.assert_array_equal(np.asarray(picture), image)


def test_text_is_stored_as_a_verbatim_block(tmp_path):
  with writers.Writer(tmp_path) as writer:
    writer.text(0, 'config', 'a: 1\n  b: *2*')
  ((_, value),) = event_values(tmp_path)
  assert value.tag.startswith('config')
  assert value.metadata.plugin_data.plugin_name == 'text'
  assert value.tensor.string_val[0] == b'    a: 1\n      b: *2*'


def test_processes_but_the_first_leave_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with writers.Writer(tmp_path / 'run', start_step=3) as writer:
    writer.scalars(1, {'loss': 1.0})
    writer.image(1, 'panel', np.zeros((2, 2, 3), np.uint8))
    writer.text(1, 'config', 'x')
  assert not (tmp_path / 'run').exists()


def write_steps(workdir, steps, **options):
  with writers.Writer(workdir, **options) as writer:
    for step in steps:
      writer.scalars(step, {'loss': float(step)})


def test_resuming_drops_the_lines_after_the_checkpoint(tmp_path):
  write_steps(tmp_path, range(0, 60, 10), start_step=0)
  write_steps(tmp_path, (30, 40), start_step=20)
  assert [line['step'] for line in read_lines(tmp_path)] == [0, 10, 20, 30, 40]
  assert sorted(os.listdir(tmp_path)) == [
    *('metrics.jsonl', 'sessions.json', 'tensorboard')
  ]


def test_resuming_tells_tensorboard_to_hide_the_steps_after_it(tmp_path):
  write_steps(tmp_path, range(0, 60, 10), start_step=0)
  write_steps(tmp_path, (30, 40), start_step=20)
  starts = [
    event.step
    for event in read_events(tmp_path)
    if event.session_log.status == event_pb2.SessionLog.START
  ]
  # TensorBoard drops earlier events whose step is this one or a later one.
  assert starts == [1, 21]


def test_writers_of_the_same_second_do_not_share_an_event_file(tmp_path):
  for step in range(3):
    write_steps(tmp_path, [step])
  assert len(os.listdir(tmp_path / 'tensorboard')) == 3
  assert [step for step, *_ in event_scalars(tmp_path)] == [0, 1, 2]


def test_resuming_at_the_last_line_leaves_the_file_as_it_is(tmp_path):
  write_steps(tmp_path, (10, 20))
  before = (tmp_path / 'metrics.jsonl').stat()
  write_steps(tmp_path, (), start_step=20)
  assert (tmp_path / 'metrics.jsonl').stat().st_ino == before.st_ino
  write_steps(tmp_path, (30,), start_step=20)
  assert [line['step'] for line in read_lines(tmp_path)] == [10, 20, 30]


@pytest.mark.parametrize(
  'torn', ['{"step": 20, "lo', '{"step": 2', '3', '\xff']
)
def test_a_line_torn_by_a_kill_is_dropped(tmp_path, torn):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 10}\n' + torn.encode('latin-1'))
  write_steps(tmp_path, (30,), start_step=20)
  assert [line['step'] for line in read_lines(tmp_path)] == [10, 30]


def test_a_killed_run_resumes_with_every_line_once(tmp_path):
  script = (
    'import sys, time\n'
    'from deeplab_jax.training import writers\n'
    'writer = writers.Writer(sys.argv[1], start_step=0)\n'
    'for step in range(1, 6):\n'
    "  writer.scalars(step, {'loss': step})\n"
    "print('written', flush=True)\n"
    'time.sleep(60)\n'
  )
  with subprocess.Popen(
    [sys.executable, '-c', script, str(tmp_path)], stdout=subprocess.PIPE
  ) as process:
    assert process.stdout.readline() == b'written\n'
    process.send_signal(signal.SIGKILL)
  write_steps(tmp_path, (4, 5, 6), start_step=3)
  assert [line['step'] for line in read_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


class Recorder(writers.Backend):
  """Notes how it is called."""

  calls: list = []  # noqa: RUF012

  def __init__(self, *arguments):
    self.calls.append(arguments)

  def scalars(self, step, values):
    self.calls.append((step, values))

  def close(self):
    self.calls.append('closed')


def test_a_backend_from_outside_gets_settings_numbers_and_an_end(tmp_path):
  Recorder.calls.clear()
  settings = {'train.steps': 8}
  with writers.Writer(tmp_path, 3, ('jsonl', Recorder), settings) as writer:
    writer.scalars(np.int64(4), {'loss': jnp.float32(0.25), 'n': np.int32(7)})
    writer.image(4, 'eval', np.zeros((2, 2, 3), np.uint8))
    writer.text(4, 'table', 'it has no place for text')
  opened, logged, closed = Recorder.calls
  assert opened == (tmp_path, 3, settings)
  assert logged == (4, {'loss': 0.25, 'n': 7}) and closed == 'closed'
  assert [type(value) for value in logged[1].values()] == [float, int]
  assert [line['step'] for line in read_lines(tmp_path)] == [4]
  assert sorted(os.listdir(tmp_path)) == [
    *('metrics.jsonl', 'panels', 'sessions.json')
  ]


def test_no_backend_at_all_keeps_the_panels(tmp_path):
  with writers.Writer(tmp_path, to=()) as writer:
    writer.scalars(1, {'loss': 1.0})
    writer.image(1, 'eval', np.zeros((2, 2, 3), np.uint8))
  assert os.listdir(tmp_path) == ['panels']


def test_a_backend_that_cannot_open_closes_the_others_and_is_named(tmp_path):
  Recorder.calls.clear()

  def broken(*_):
    raise RuntimeError('no api key\nsecond line')

  with pytest.raises(ValueError, match=r'no api key$'):
    writers.Writer(tmp_path, to=(Recorder, broken))
  assert Recorder.calls[1:] == ['closed']
  with pytest.raises(ValueError, match="or mlflow, got 'tensorbord'"):
    writers.Writer(tmp_path, to=('tensorbord',))


class Breaks(Recorder):
  """Refuses the calls whose step is in `bad`, as a full disk or a service."""

  bad: dict = {}  # noqa: RUF012

  def scalars(self, step, values):
    if step in self.bad:
      raise self.bad[step]
    super().scalars(step, values)


def test_what_a_backend_refuses_is_dropped_with_one_warning(
  tmp_path, monkeypatch, caplog
):
  monkeypatch.setattr(logging.getLogger('deeplab_jax'), 'propagate', True)
  full = OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr(
    Breaks, 'bad', {2: full, 3: RuntimeError('service: down')}
  )
  monkeypatch.setattr(Breaks, 'calls', [])
  with writers.Writer(tmp_path, to=('jsonl', Breaks)) as writer:
    for step in range(1, 5):
      writer.scalars(step, {'loss': 1.0})
  logged = [call[0] for call in Breaks.calls[1:-1]]
  assert logged == [1, 4] and Breaks.calls[-1] == 'closed'
  assert [line['step'] for line in read_lines(tmp_path)] == [1, 2, 3, 4]
  assert caplog.messages == [
    'events are dropped: cannot log to Breaks (No space left on device)',
    '2 events are missing in Breaks',
  ]


FILL = """
import resource, signal, sys
import numpy as np
from deeplab_jax.training import writers
noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with writers.Writer(sys.argv[1]) as writer:
  for step in range(1, 7):
    limit = 500 if step in (3, 4) else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    writer.scalars(step, {'a': step, 'b': step})
    writer.image(step, 'panel', noise)
"""


def test_files_stay_whole_when_the_disk_fills_and_go_on_after(tmp_path):
  # The limit of the size of a file acts in the middle of what is written.
  command = [sys.executable, '-c', FILL, str(tmp_path)]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  steps = [line['step'] for line in read_lines(tmp_path)]
  assert {1, 2, 5, 6} <= set(steps) and steps == sorted(set(steps))
  scalars = [step for step, value in event_values(tmp_path) if value.tag == 'a']
  assert {1, 2, 5, 6} <= set(scalars)
  pictures = [step for step, v in event_values(tmp_path) if v.tag == 'panel']
  assert pictures == [1, 2, 5, 6]
  panels = sorted(os.listdir(tmp_path / 'panels'))
  assert panels == [f'step_{step:08d}.png' for step in (1, 2, 5, 6)]
  for name in panels:
    Image.open(tmp_path / 'panels' / name).load()
  assert 'Traceback' not in done.stderr
  said = [line for line in done.stderr.splitlines() if 'cannot log' in line]
  assert len(said) == len(set(said)) <= 3


def test_each_start_of_a_run_is_a_session(tmp_path):
  write_steps(tmp_path, (10, 20))
  write_steps(tmp_path, (30,), start_step=20)
  write_steps(tmp_path, (), start_step=30)
  sessions = json.loads((tmp_path / 'sessions.json').read_text())
  steps = [(s['first_step'], s.get('last_step')) for s in sessions]
  assert steps == [(1, 20), (21, 30), (31, None)]
  assert all('stop' in s for s in sessions[:2]) and 'stop' not in sessions[2]
  for session in sessions:
    assert session['cores'] == os.cpu_count() and session['hosts'] == 1
    assert session['devices'] == f'{jax.device_count()} × cpu'
    assert session['versions']['jax'] == jax.__version__
    assert -1 < time.time() - session['start'] < 3600


# W&B and MLflow keep threads and processes, so they log in a process of their
# own: twice, as a run that was resumed after step 20.
LOG_TWICE = """
import sys
import numpy as np
from deeplab_jax.training import writers

workdir, name = sys.argv[1:]
settings = {'train.steps': 40, 'model.multi_grid': [1, 2, 4], 'data.dir': None}
for start in (0, 20):
  with writers.Writer(workdir, start, (name,), settings) as writer:
    for step in (start + 10, start + 20):
      writer.scalars(step, {'loss': 1 / step, 'rate': np.float32('nan')})
    writer.image(start + 20, 'eval', np.full((20, 30, 3), start, np.uint8))
    writer.text(start + 20, 'eval_table', 'class  IoU <&>')
"""


def log_twice(workdir, name, **variables):
  if not importlib.util.find_spec(name):  # W&B leaves files when imported
    pytest.skip(f"needs pip install 'deeplab_jax[{name}]'")
  command = [sys.executable, '-c', LOG_TWICE, str(workdir), name]
  # Both keep files at home and among temporary ones.
  own = dict.fromkeys(('HOME', 'TMPDIR'), str(workdir.parent))
  environment = os.environ | own | variables
  subprocess.run(command, check=True, env=environment, cwd=workdir.parent)


@pytest.mark.slow
def test_mlflow_holds_the_run_in_its_local_store(tmp_path):
  workdir = tmp_path / 'my run'
  log_twice(workdir, 'mlflow', MLFLOW_DISABLE_TELEMETRY='true')
  name = (workdir / 'mlflow_run.txt').read_text()
  with contextlib.closing(sqlite3.connect(workdir / 'mlflow.db')) as store:
    runs = store.execute('SELECT run_uuid, name FROM runs').fetchall()
    params = dict(store.execute('SELECT key, value FROM params').fetchall())
    query = "SELECT step, value FROM metrics WHERE key = 'loss' ORDER BY step"
    losses = store.execute(query).fetchall()
  assert runs == [(name, 'my run')]
  assert losses == [(step, 1 / step) for step in (10, 20, 30, 40)]
  assert params['train.steps'] == '40'
  assert params['model.multi_grid'] == '[1, 2, 4]'
  run = workdir / 'mlflow' / name
  text = run / 'artifacts' / 'eval_table' / 'step_00000040.txt'
  assert text.read_text() == 'class  IoU <&>'
  pictures = sorted((run / 'artifacts' / 'images').glob('eval*.png'))
  assert {int(np.asarray(Image.open(p)).max()) for p in pictures} == {0, 20}


@pytest.mark.slow
def test_wandb_holds_the_run_offline(tmp_path):
  workdir = tmp_path / 'my run'
  log_twice(workdir, 'wandb', WANDB_MODE='offline', WANDB_SILENT='true')
  name = (workdir / 'wandb_run.txt').read_text()
  runs = sorted((workdir / 'wandb').glob(f'offline-run-*-{name}*'))
  assert runs
  stored = b''.join(p.read_bytes() for p in workdir.rglob('*.wandb'))
  for words in (b'train.steps', b'my run', b'deeplab_jax', b'loss'):
    assert words in stored
  pages = [p.read_text() for p in workdir.rglob('*.html')]
  assert any('class  IoU &lt;&amp;&gt;' in page for page in pages)
  assert any(workdir.rglob('eval*.png'))


def test_importing_the_module_imports_no_backend():
  script = (
    'import sys, deeplab_jax.training.writers; '
    "names = {'tensorboardX', 'torch', 'wandb', 'mlflow'}; "
    'sys.exit(bool(names.intersection(sys.modules)))'
  )
  assert subprocess.run([sys.executable, '-c', script]).returncode == 0


def test_write_json_makes_numpy_and_nan_valid_json(tmp_path):
  path = tmp_path / 'eval.json'
  files.write_json(
    path,
    {
      'miou': np.float32(0.5),
      'bad': [float('nan'), np.float64('-inf')],
      'per_class_iou': {'sky': None, 3: 1},
      'counts': np.arange(3),
      'pair': (1, jnp.asarray(2)),
    },
  )
  assert json.loads(path.read_text()) == {
    'miou': 0.5,
    'bad': [None, None],
    'per_class_iou': {'sky': None, '3': 1},
    'counts': [0, 1, 2],
    'pair': [1, 2],
  }
  assert 'NaN' not in path.read_text()


def test_write_json_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
  path = tmp_path / 'eval.json'
  files.write_json(path, {'miou': 1})
  with pytest.raises(AttributeError):
    files.write_json(path, {'miou': object()})

  def fail(*_):
    raise OSError('disk full')

  monkeypatch.setattr(os, 'replace', fail)
  with pytest.raises(OSError, match='disk full'):
    files.write_json(path, {'miou': 2})
  assert json.loads(path.read_text()) == {'miou': 1}
  assert os.listdir(tmp_path) == ['eval.json']


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands still until it is set: clock(seconds)."""
  now = [0.0]
  monkeypatch.setattr(writers.time, 'monotonic', lambda: now[0])
  return lambda seconds: now.__setitem__(0, seconds)


def values(images_per_second, loss, learning_rate):
  return {
    'images_per_second': images_per_second,
    'loss': loss,
    'learning_rate': learning_rate,
  }


def test_progress_writes_one_plain_line_an_update(clock):
  stream = io.StringIO()
  with writers.Progress(800, initial=0, stream=stream) as progress:
    progress.status('compiling ...')
    clock(60)
    progress.start_clock(1)
    clock(90)
    progress.update(101, values(20.0, 2.5, 0.007))
    clock(99)
    progress.update(131, values(54.12, np.float32(0.8123), jnp.float32(0.0061)))
    progress.write('step 120: mIoU 0.41')
  # Since they were compiled, 100 steps took 30 s, and 130 took 39 s, so 699
  # more take 209.7 s, and 669 more 200.7 s.
  assert stream.getvalue().splitlines() == [
    'compiling ...',
    'step 101/800  loss 2.5000  lr 0.007  20.0 images/s  03:30 left',
    'step 131/800  loss 0.8123  lr 0.0061  54.1 images/s  03:21 left',
    'step 120: mIoU 0.41',
  ]


def test_progress_knows_no_time_left_when_one_step_alone_was_compiled(clock):
  stream = io.StringIO()
  progress = writers.Progress(9, initial=4, stream=stream)
  clock(60)
  progress.start_clock(5)
  progress.update(5, values(1.0, 1.0, 1.0))
  clock(62)
  progress.update(6, values(1.0, 1.0, 1.0))
  first, second = stream.getvalue().splitlines()
  assert first.endswith('images/s')
  assert second.endswith('  00:06 left')  # 3 steps of 2 s


def test_progress_after_a_resume_counts_only_its_own_steps(clock):
  stream = io.StringIO()
  progress = writers.Progress(1000, initial=900, stream=stream)
  clock(10)
  progress.update(910, values(1.0, 1.0, 1.0))
  clock(20)
  progress.update(1000, values(1.0, 1.0, 1.0))
  first, last = stream.getvalue().splitlines()
  assert first.startswith('step  910/1000')
  assert first.endswith('  01:30 left')
  assert last.endswith('  00:00 left')


def test_progress_goes_to_standard_error_by_default(capsys):
  writers.Progress(2).update(1, values(1.0, float('nan'), 1e-5))
  captured = capsys.readouterr()
  assert captured.out == ''
  assert captured.err.startswith('step 1/2  loss nan  lr 1e-05  1.0 images/s')


def read_to_the_end(terminal):
  shown = b''
  with contextlib.suppress(OSError):  # EIO: all read and the other side closed
    while chunk := os.read(terminal, 65536):
      shown += chunk
  os.close(terminal)
  return shown


def progress_on_a_terminal(clock, rows, columns):
  """What a terminal of that size is sent."""
  master, slave = pty.openpty()
  size = struct.pack('HHHH', rows, columns, 0, 0)
  fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
  with (
    os.fdopen(slave, 'w') as terminal,
    writers.Progress(800, initial=80, stream=terminal) as progress,
  ):
    progress.status('compiling ...')
    clock(10)
    progress.update(400, values(54.1, 0.8123, 0.0061))
    progress.write('step 400: mIoU 0.41')
  return re.split(r'[\r\n]+', read_to_the_end(master).decode())


STATE = 'step 400/800  loss 0.8123  lr 0.0061  54.1 images/s  00:12 left'


@pytest.mark.parametrize('columns', [80, 120])
def test_progress_is_a_bar_on_a_terminal(clock, columns):
  shown = progress_on_a_terminal(clock, 24, columns)
  assert shown[1].startswith(' 10%|')  # where it resumed
  (bar,) = {state for state in shown if 'loss' in state}
  assert bar.startswith(' 50%|█')
  assert bar.rstrip().endswith('| ' + STATE)
  assert len(bar) <= columns
  assert any(state.rstrip().endswith('| compiling ...') for state in shown)
  assert 'step 400: mIoU 0.41' in shown


def test_progress_on_a_terminal_of_unknown_size_is_plain_lines(clock):
  shown = progress_on_a_terminal(clock, 0, 0)
  assert shown == ['compiling ...', STATE, 'step 400: mIoU 0.41', '']


def test_processes_but_the_first_show_nothing(monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  stream = io.StringIO()
  with writers.Progress(10, stream=stream) as progress:
    progress.update(1, values(1.0, 1.0, 1.0))
    progress.write('hello')
  assert stream.getvalue() == ''


def test_a_file_that_cannot_be_written_is_named_itself(tmp_path):
  path = tmp_path / 'missing' / 'a.json'
  with pytest.raises(FileNotFoundError) as error:
    files.write_json(path, {})
  assert error.value.filename == str(path)
