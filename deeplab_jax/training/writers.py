"""What a run leaves behind: TensorBoard events, metrics.jsonl, progress."""

import json
import operator
import os
import re
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.files import replacing


class Writer(AbstractContextManager):
  """Writes the scalars, images and text of a run into its workdir.

  TensorBoard finds all of it in `workdir/tensorboard`. Scalars also go to
  `workdir/metrics.jsonl`: one line {"step": ..., name: value, ...} a call.
  Processes other than the first write nothing.
  """

  def __init__(self, workdir: str | os.PathLike, start_step: int = 0) -> None:
    """Opens the files, and creates the workdir if it does not exist.

    What a killed run wrote after `start_step` is dropped from metrics.jsonl and
    hidden in TensorBoard.
    """
    self._enabled = distributed.is_first_process()
    if not self._enabled:
      return
    # A late import: tensorboardX loads torch where torch is installed.
    from tensorboardX import SummaryWriter

    self._panels = Path(workdir, 'panels')
    path = Path(workdir, 'metrics.jsonl')
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_lines(path, start_step)
    self._lines = path.open('a', encoding='utf-8')
    self._events = SummaryWriter(
      str(path.with_name('tensorboard')),
      purge_step=start_step + 1,
      flush_secs=10,
      # Two writers of the same second would share a file.
      filename_suffix=f'.{time.time_ns()}',
    )

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes numbers by name; in the line, NaN and the infinities are null."""
    if self._enabled:
      self._lines.write(_json({'step': step, **values}) + '\n')
      self._lines.flush()
      for name, value in values.items():
        self._events.add_scalar(name, float(value), int(step))

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes a picture uint8 [H, W, 3] to TensorBoard and `workdir/panels`."""
    if self._enabled:
      self._events.add_image(name, image, int(step), dataformats='HWC')
      self._panels.mkdir(exist_ok=True)
      with replacing(self._panels / f'step_{step:08d}.png') as temporary:
        Image.fromarray(image).save(temporary, 'png')

  def text(self, step: int, name: str, text: str) -> None:
    """Writes text to TensorBoard, which shows its lines as they are."""
    if self._enabled:
      # TensorBoard reads Markdown, where four spaces make a verbatim block.
      block = '\n'.join('    ' + line for line in text.splitlines())
      self._events.add_text(name, block, int(step))

  def __exit__(self, *_: object) -> None:
    if self._enabled:
      self._lines.close()
      self._events.close()


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
    first, then = self._mark
    left = ''
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


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes a value, arrays included, as indented JSON, whole or not at all.

  NaN and the infinities, which JSON does not know, become null.
  """
  text = _json(value, indent=2) + '\n'
  with replacing(path) as temporary:
    Path(temporary).write_text(text, encoding='utf-8')


def _drop_lines(path: Path, start_step: int) -> None:
  """Drops lines after `start_step`, and those a killed run left half done."""
  before = path.read_text('utf-8', 'replace') if path.exists() else ''
  kept = ''
  for line in before.splitlines():
    whole = re.fullmatch(r'\{"step": (\d+)\b.*\}', line)
    if whole and int(whole[1]) <= start_step:
      kept += line + '\n'
  if kept != before:
    with replacing(path) as temporary:
      Path(temporary).write_text(kept, encoding='utf-8')


def _json(value: Any, **options: Any) -> str:
  text = json.dumps(value, default=operator.methodcaller('tolist'))
  finite = json.loads(text, parse_constant=lambda _: None)
  return json.dumps(finite, **options)
