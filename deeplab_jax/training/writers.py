"""What a run leaves behind: logs in several places, files, progress."""

import collections
import html
import importlib
import json
import logging
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from deeplab_jax.runtime import distributed, files, host
from deeplab_jax.runtime.errors import choose, first_line

log = logging.getLogger(__name__)
_Settings = dict[str, Any]


class Backend:
  """A place that a run is logged to; a subclass overrides what it can hold."""

  def __init__(self, workdir: Path, start: int, settings: _Settings) -> None:
    """Opens it for a run that goes on after step `start`.

    The steps of a killed run after that one are logged again. `settings` are
    JSON values by key, as 'train.steps'.
    """
    self._workdir = workdir

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Logs numbers by name."""

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Logs a picture uint8 [H, W, 3]."""

  def text(self, step: int, name: str, text: str) -> None:
    """Logs text whose lines stay as they are."""

  def close(self) -> None:
    """Writes what is left, at the end of the run or after an error."""


class _TensorBoard(Backend):
  """Events in `workdir/tensorboard`; it hides steps that are logged again."""

  def __init__(self, workdir: Path, start: int, settings: _Settings) -> None:
    # Late: it loads torch, if installed. Its own writer hangs on a full disk.
    from tensorboardX import proto, record_writer, summary

    self._event, self._summary = proto.event_pb2.Event, summary
    self._check = record_writer.masked_crc32c
    (folder := workdir / 'tensorboard').mkdir(exist_ok=True)
    self._path = folder / f'events.out.tfevents.{time.time_ns()}'
    self._add(file_version='brain.Event:2')
    self._add(step=start + 1, session_log={'status': 'START'})

  def _add(self, **values: Any) -> None:
    """Appends an event, framed as TFRecord files are."""
    data = self._event(wall_time=time.time(), **values).SerializeToString()
    size = struct.pack('<Q', len(data))
    checks = [struct.pack('<I', self._check(part)) for part in (size, data)]
    if files.is_remote(self._path):  # which would be written again each time
      self._path = self._path.with_suffix(f'.{time.time_ns()}')
    files.append(self._path, size + checks[0] + data + checks[1])

  def scalars(self, step: int, values: dict[str, float]) -> None:
    found = (self._summary.scalar(k, float(v)) for k, v in values.items())
    self._add(step=step, summary={'value': [x.value[0] for x in found]})

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    self._add(step=step, summary=self._summary.image(name, image, 1, 'HWC'))

  def text(self, step: int, name: str, text: str) -> None:
    # TensorBoard reads Markdown, where four spaces make a verbatim block.
    block = '\n'.join('    ' + line for line in text.splitlines())
    self._add(step=step, summary=self._summary.text(name, block))


class _JsonLines(Backend):
  """Writes `metrics.jsonl` and `sessions.json`, which the report reads.

  The first has a line {"step": ..., name: value, ...} per call, where NaN and
  the infinities are null. The second says of each start of the run when it was
  (in seconds since 1970, UTC), how far it went and on what machine.
  """

  def __init__(self, workdir: Path, start: int, settings: _Settings) -> None:
    self._lines, path = workdir / 'metrics.jsonl', workdir / 'sessions.json'
    before = json.loads(path.read_text()) if path.exists() else []
    self._session = {'first_step': start + 1, 'start': time.time()}
    self._session |= host.describe()
    self._path, self._sessions = path, [*before, self._session]
    files.write_json(path, self._sessions)
    _drop_lines(self._lines, start)
    files.append(self._lines, b'')

  def scalars(self, step: int, values: dict[str, float]) -> None:
    line = files.json_text({'step': step, **values}) + '\n'
    files.append(self._lines, line.encode())
    self._session.update(last_step=step, stop=time.time())
    files.write_json(self._path, self._sessions)


class _WeightsAndBiases(Backend):
  """A run of Weights & Biases, whose environment variables count."""

  def __init__(self, workdir: Path, start: int, settings: _Settings) -> None:
    import wandb

    self._wandb, path = wandb, workdir / 'wandb_run.txt'
    self._run = wandb.init(
      project=os.environ.get('WANDB_PROJECT', 'deeplab_jax'),
      name=workdir.resolve().name,
      dir=workdir,
      config=settings,
      id=_earlier_run(path, start),
      resume='allow',
    )
    path.write_text(self._run.id)

  def scalars(self, step: int, values: dict[str, Any]) -> None:
    self._run.log(values, step=step)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    self.scalars(step, {name: self._wandb.Image(image)})

  def text(self, step: int, name: str, text: str) -> None:
    page = f'<pre>{html.escape(text)}</pre>'
    self.scalars(step, {name: self._wandb.Html(page)})

  def close(self) -> None:
    self._run.finish()


class _MLflow(Backend):
  """A run of MLflow, at MLFLOW_TRACKING_URI or else in `workdir/mlflow.db`."""

  def __init__(self, workdir: Path, start: int, settings: _Settings) -> None:
    import mlflow

    self._mlflow, path = mlflow, workdir / 'mlflow_run.txt'
    experiment = os.environ.get('MLFLOW_EXPERIMENT_NAME', 'deeplab_jax')
    if 'MLFLOW_TRACKING_URI' not in os.environ:  # it refuses plain files now
      mlflow.set_tracking_uri(f'sqlite:///{workdir.resolve()}/mlflow.db')
      if mlflow.get_experiment_by_name(experiment) is None:
        place = (workdir / 'mlflow').resolve().as_uri()
        mlflow.create_experiment(experiment, place)
    mlflow.set_experiment(experiment)
    earlier = _earlier_run(path, start)
    run = mlflow.start_run(earlier, run_name=workdir.resolve().name)
    path.write_text(run.info.run_id)
    if not earlier:  # they are fixed then
      mlflow.log_params(settings)

  def scalars(self, step: int, values: dict[str, float]) -> None:
    self._mlflow.log_metrics(values, step=step, synchronous=False)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    self._mlflow.log_image(image, key=name, step=step)

  def text(self, step: int, name: str, text: str) -> None:
    self._mlflow.log_text(text, f'{name}/step_{step:08d}.txt')

  def close(self) -> None:
    self._mlflow.end_run()


class Panels(Backend):
  """Pictures in `workdir/panels`, whatever else is logged to."""

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Saves a picture uint8 [H, W, 3] as `step_STEP.png`."""
    folder = self._workdir / 'panels'
    folder.mkdir(exist_ok=True)
    with files.replacing(folder / f'step_{step:08d}.png') as temporary:
      Image.fromarray(image).save(temporary, 'png')


BACKENDS: dict[str, Callable[..., Any]] = {
  'tensorboard': _TensorBoard,
  'jsonl': _JsonLines,
  'wandb': _WeightsAndBiases,
  'mlflow': _MLflow,
}
_EXTRAS = 'wandb', 'mlflow'  # names of packages, and of extras of this one


def check_backends(to: Sequence[Any], *, starts: bool = False) -> None:
  """Raises `ValueError` for a name that is none of `BACKENDS`.

  If a run `starts`, their packages must be there, too.
  """
  for name in to:
    choose('to', name, BACKENDS)
    if starts and name in _EXTRAS:
      try:
        importlib.import_module(name)
      except ImportError as error:
        pip = f"pip install 'deeplab_jax[{name}]'"
        raise ValueError(f'to={name}: {first_line(error)}; {pip}') from error


class Writer(AbstractContextManager):
  """Logs a run to its backends, and pictures to `workdir/panels` as well.

  Processes other than the first write nothing. What a backend refuses, as on a
  full disk, is dropped with a warning: a log ends no run.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    start_step: int = 0,
    to: Sequence[Any] = ('tensorboard', 'jsonl'),
    settings: _Settings | None = None,
  ) -> None:
    """Opens the backends, and creates the workdir if it does not exist.

    They are names of `BACKENDS`, or functions that take what `Backend` takes.
    What a killed run wrote after `start_step` is dropped or hidden. Raises
    `ValueError` if a backend cannot be used.
    """
    self._backends, self._lost = dict[str, Any](), collections.Counter[str]()
    if not distributed.is_first_process():
      return
    (folder := files.as_path(workdir)).mkdir(parents=True, exist_ok=True)
    for key in dict.fromkeys((*to, Panels)):
      make, name = choose('to', key, BACKENDS), getattr(key, '__name__', key)
      try:
        self._backends[name] = make(folder, start_step, settings or {})
      except Exception as error:  # a service may raise anything
        self._log('close')
        if not isinstance(error, (OSError, ValueError)):
          raise ValueError(f'to={name}: {first_line(error)}') from error
        raise

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Logs numbers by name; arrays of one element become numbers."""
    numbers = {name: np.asarray(value).item() for name, value in values.items()}
    self._log('scalars', int(step), numbers)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Logs a picture uint8 [H, W, 3]."""
    self._log('image', int(step), name, image)

  def text(self, step: int, name: str, text: str) -> None:
    """Logs text, whose lines are shown as they are."""
    self._log('text', int(step), name, text)

  def _log(self, method: str, *values: Any) -> None:
    for name, backend in self._backends.items():
      try:
        getattr(backend, method)(*values)
      except Exception as error:
        if not self._lost[name]:
          why = getattr(error, 'strerror', None) or first_line(error)
          log.warning('events are dropped: cannot log to %s (%s)', name, why)
        self._lost[name] += 1

  def __exit__(self, *_: object) -> None:
    self._log('close')
    for name, count in self._lost.items():
      log.warning('%d events are missing in %s', count, name)


class Progress(AbstractContextManager):
  """Shows how far training is: a bar on a terminal, plain lines elsewhere.

  As in `step 120/800  loss 0.8123  lr 0.0061  54.1 images/s  01:32 left`.
  Processes other than the first show nothing.
  """

  def __init__(
    self, total: int, initial: int = 0, stream: TextIO | None = None
  ) -> None:
    """Starts the clock; without a `stream` it writes to standard error."""
    self._total, self._enabled = total, distributed.is_first_process()
    self._stream = stream = stream or sys.stderr
    self.start_clock(initial)
    # The terminal of a container may report no rows, where tqdm shows nothing.
    is_screen = stream.isatty() and min(os.get_terminal_size(stream.fileno()))
    self._bar = tqdm(
      total=total,
      initial=initial,
      file=stream,
      disable=not (self._enabled and is_screen),
      dynamic_ncols=True,
      bar_format='{percentage:3.0f}%|{bar}| {desc}',
    )

  def start_clock(self, step: int) -> None:
    """Estimates the time left from the steps after this one, once compiled."""
    self._mark = step, time.monotonic()

  def update(self, step: int, values: Mapping[str, float]) -> None:
    """Shows the state after `step` steps; `values` by their names below."""
    (first, then), left = self._mark, ''
    if step > first or step == self._total:
      pace = (time.monotonic() - then) / max(step - first, 1)
      seconds = round(pace * (self._total - step))
      left = f'  {tqdm.format_interval(seconds)} left'
    self._bar.n = step
    self.status(
      f'step {step:>{len(str(self._total))}}/{self._total}'
      f'  loss {values["loss"]:.4f}  lr {values["learning_rate"]:.3g}'
      f'  {values["images_per_second"]:.1f} images/s{left}'
    )

  def status(self, line: str) -> None:
    """Shows a line; a bar shows it in place of the one before."""
    if self._bar.disable:
      self.write(line)
    else:
      self._bar.set_description_str(line)

  def write(self, message: str) -> None:
    """Prints a message on a line of its own, above the bar if there is one."""
    if self._enabled:
      tqdm.write(message, file=self._stream)

  def __exit__(self, *_: object) -> None:
    self._bar.close()


def _drop_lines(path: Path, start_step: int) -> None:
  """Drops half lines, those after `start_step`, and its evaluation."""
  before = path.read_bytes().decode('utf-8', 'replace') if path.exists() else ''
  kept = ''
  for line in before.splitlines():
    whole = re.fullmatch(r'\{"step": (\d+)\b.*\}', line)
    if whole and int(whole[1]) <= start_step - ('"eval_' in line):
      kept += line + '\n'
  if kept != before:
    files.write(path, kept)


def _earlier_run(path: Path, start: int) -> str | None:
  """The run that a resumed one goes on with, as the file names it."""
  return path.read_text().strip() if start and path.exists() else None
