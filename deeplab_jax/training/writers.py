"""What a run leaves behind: TensorBoard events, metrics.jsonl, progress."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
from tqdm import tqdm

from deeplab_jax.runtime.files import replacing


class Writer:
  """Writes scalars, images and text of one run into its workdir.

  All of it goes to TensorBoard in `workdir/tensorboard`; scalars also to
  `workdir/metrics.jsonl`, one line {"step": ..., key: value, ...} a call.

  Attributes:
    enabled: whether anything is written.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    enabled: bool = True,
    start_step: int | None = None,
  ) -> None:
    """Opens the files, creating the workdir if need be.

    Args:
      workdir: the folder of the run.
      enabled: False on all hosts but the first: nothing is written then.
      start_step: the step a run starts or resumes from. What a killed run
        wrote for later steps is dropped from metrics.jsonl and hidden in
        TensorBoard. None keeps everything.
    """
    self.enabled = enabled
    if not enabled:
      return
    # Imported here because it loads torch where torch is installed.
    from tensorboardX import SummaryWriter

    os.makedirs(workdir, exist_ok=True)
    path = os.path.join(workdir, 'metrics.jsonl')
    _drop_lines(path, start_step)
    self._lines = open(path, 'a', encoding='utf-8')  # noqa: SIM115
    self._events = SummaryWriter(
      os.path.join(workdir, 'tensorboard'),
      purge_step=None if start_step is None else start_step + 1,
      flush_secs=10,
      # File names count seconds: two writers in one would share a file.
      filename_suffix=f'.{time.time_ns()}',
    )

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes numbers; what is None, NaN or infinite is null in the line.

    Args:
      step: the training step they belong to.
      values: numbers, also scalar arrays, by name ('train/loss'). TensorBoard
        shows a group for each part before the slash, and leaves out None.

    Raises:
      ValueError: if a key is 'step' or a value is not one number.
    """
    if not self.enabled:
      return
    if 'step' in values:
      raise ValueError("'step' is the key of the step itself, rename the value")
    numbers = {key: _number(key, value) for key, value in values.items()}
    line = json.dumps(_finite({'step': int(step), **numbers}))
    self._lines.write(line + '\n')
    self._lines.flush()
    for key, value in numbers.items():
      if value is not None:
        self._events.add_scalar(key, value, int(step))

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes a picture uint8 [H, W, 3] to TensorBoard."""
    if self.enabled:
      self._events.add_image(name, image, int(step), dataformats='HWC')

  def text(self, step: int, name: str, text: str) -> None:
    """Writes text to TensorBoard, shown line by line as it stands."""
    if self.enabled:
      # TensorBoard reads Markdown, where four spaces make a verbatim block.
      block = '\n'.join('    ' + line for line in text.splitlines())
      self._events.add_text(name, block, int(step))

  def close(self) -> None:
    """Writes out what is waiting; later calls of any method do nothing."""
    if self.enabled:
      self._lines.close()
      self._events.close()
      self.enabled = False

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()


class Progress:
  """Shows how far training is: a bar on a terminal, plain lines elsewhere.

  Both go to standard error. A line reads
  `step 120/800  loss 0.8123  lr 0.0061  54.1 images/s  1m32s left`.
  """

  def __init__(
    self,
    total: int,
    initial: int = 0,
    enabled: bool = True,
    stream: TextIO | None = None,
  ) -> None:
    """Starts the clock.

    Args:
      total: the step at which training ends.
      initial: the step it starts or resumes from.
      enabled: False on all hosts but the first: nothing is shown then.
      stream: where to write; standard error if None.
    """
    self._total, self._initial = total, initial
    self._enabled = enabled
    self._stream = sys.stderr if stream is None else stream
    self.start_clock(initial)
    self._bar = None
    if enabled and _has_screen(self._stream):
      self._bar = tqdm(
        total=total,
        initial=initial,
        file=self._stream,
        dynamic_ncols=True,
        bar_format='{percentage:3.0f}%|{bar}| {desc}',
      )

  def update(
    self,
    step: int,
    images_per_second: float,
    loss: float,
    learning_rate: float,
  ) -> None:
    """Shows the state after `step` steps.

    Args:
      step: the number of finished steps.
      images_per_second: the speed over all devices.
      loss: the training loss.
      learning_rate: the learning rate of this step.
    """
    if not self._enabled:
      return
    line = (
      f'step {step:>{len(str(self._total))}}/{self._total}'
      f'  loss {float(loss):.4f}  lr {float(learning_rate):.3g}'
      f'  {float(images_per_second):.1f} images/s{self._time_left(step)}'
    )
    if self._bar is not None:
      self._bar.n = step
    self.status(line)

  def status(self, line: str) -> None:
    """Shows a line: in the bar, in place of the one before, if there is one."""
    if not self._enabled:
      return
    if self._bar is None:
      print(line, file=self._stream, flush=True)
    else:
      self._bar.set_description_str(line)

  def write(self, message: str) -> None:
    """Prints a message on a line of its own, above the bar if there is one."""
    if not self._enabled:
      return
    if self._bar is None:
      print(message, file=self._stream, flush=True)
    else:
      self._bar.write(message, file=self._stream)

  def close(self) -> None:
    """Ends the bar; the last state stays on the screen."""
    if self._bar is not None:
      self._bar.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()

  def start_clock(self, step: int) -> None:
    """Estimates the time left by the steps after this one alone.

    Called again after the first step, in which programs are compiled.
    """
    self._mark = step, time.monotonic()

  def _time_left(self, step: int) -> str:
    """Nothing as long as no step but the first was timed."""
    first_step, first_time = self._mark
    now = time.monotonic()
    if step == self._initial + 1 and step < self._total:
      self.start_clock(step)  # it was compiled in this time
      return ''
    rate = (now - first_time) / max(step - first_step, 1)
    return f'  {_duration(rate * max(self._total - step, 0))} left'


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes a value as indented JSON; the file appears whole or not at all.

  Args:
    path: the file to write.
    value: dicts, lists, strings, numbers and arrays of them; NaN and the
      infinities, which JSON does not know, become null.
  """
  _replace(path, json.dumps(_finite(value), indent=2, allow_nan=False) + '\n')


def _replace(path: str | os.PathLike, text: str) -> None:
  with replacing(path) as temporary:
    Path(temporary).write_text(text, encoding='utf-8')


def _drop_lines(path: str, start_step: int | None) -> None:
  """Drops lines after `start_step`, and those a killed run left half done."""
  if not os.path.exists(path):
    return
  with open(path, encoding='utf-8', errors='replace') as file:
    before = file.read()
  kept = []
  for line in before.splitlines():
    try:
      step = int(json.loads(line)['step'])
    except (ValueError, KeyError, TypeError):
      continue
    if start_step is None or step <= start_step:
      kept.append(line + '\n')
  after = ''.join(kept)
  if after != before:
    _replace(path, after)


def _number(key: str, value: Any) -> int | float | None:
  if value is None:
    return None
  array = np.asarray(value)
  if array.size != 1 or array.dtype.kind in 'OUSMmc':
    raise ValueError(f'{key!r} must be one number, got {value!r}')
  number = array.item()
  return number if isinstance(number, int) else float(number)


def _finite(value: Any) -> Any:
  """Turns array values into Python's, and what JSON lacks into None."""
  if isinstance(value, Mapping):
    return {str(key): _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  if hasattr(value, 'tolist'):
    return _finite(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _has_screen(stream: TextIO) -> bool:
  """Whether the stream is a terminal that knows its size.

  A container's or a CI's terminal may report 0 rows, where tqdm shows nothing.
  """
  if not stream.isatty():
    return False
  size = os.get_terminal_size(stream.fileno())
  return size.columns > 0 and size.lines > 0


def _duration(seconds: float) -> str:
  """Writes seconds as 45s, 1m32s, 2h05m or 3d04h."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if days:
    return f'{days}d{hours:02}h'
  if hours:
    return f'{hours}h{minutes:02}m'
  return f'{minutes}m{seconds:02}s' if minutes else f'{seconds}s'
