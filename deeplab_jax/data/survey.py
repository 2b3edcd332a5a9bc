"""All that is wrong with a folder, found before it is prepared.

Preparing stops at the first problem. A survey reads the same files, tells of
every problem, and of what is allowed but seldom meant.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from deeplab_jax.data import datasets, folder, images, labels, records
from deeplab_jax.runtime import errors

TINY = 64  # pixels; a tiny image has a shorter side
HUGE = 4096  # pixels; a huge image has a longer side
EXAMPLES = 5  # of each kind of problem are named

_LIST = 'lists that cannot be used'
_CLASSES = 'no class names'
_FILES = 'listed ids without exactly one image and a label'
_UNREADABLE = 'unreadable files'
_NO_PICTURES = 'images that cannot be read as what they show'
_NO_INDICES = 'labels that hold no class indices'
_PALETTES = 'palettes that give one index several colors'
_SIZES = 'labels of another size than their image'
_VALUES = 'label values that are neither a class nor the ignore label'
_SAME = 'labels that tell nothing apart'
_ALL_VOID = 'no pixel of a class to train on'
_ABSENT = 'classes without a pixel'
_SHARED = 'ids in two lists, which makes the score worthless'
_TINY = f'tiny images, with a side below {TINY} pixels'
_HUGE = f'huge images, with a side above {HUGE} pixels: slow, and much memory'

# What is refused, beside unreadable files, which may be skipped.
_FATAL = (
  *(_LIST, _SHARED, _CLASSES, _FILES, _NO_PICTURES, _NO_INDICES, _PALETTES),
  *(_SIZES, _VALUES, _ALL_VOID),
)


@dataclasses.dataclass(frozen=True)
class Finding:
  """One kind of problem.

  Attributes:
    title: what is wrong.
    count: how often.
    examples: the first ones.
    fatal: whether the folder cannot be used for it.
  """

  title: str
  count: int
  examples: tuple[str, ...]
  fatal: bool

  @property
  def line(self) -> str:
    """The title and the examples in one line."""
    more = self.count - len(self.examples)
    rest = [f'and {more:,} more'] if more else []
    return f'{self.title}: {"; ".join([*self.examples, *rest])}'

  def __str__(self) -> str:
    """Several lines: the title with the count, then the examples."""
    kind = 'error' if self.fatal else 'warning'
    lines = [f'{kind}: {self.title}: {self.count:,}']
    lines += [f'  {example}' for example in self.examples]
    if self.count > len(self.examples):
      lines.append(f'  and {self.count - len(self.examples):,} more')
    return '\n'.join(lines)


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
  """What a survey found.

  Attributes:
    root: the folder.
    num_images: ids listed, each once.
    lines: the names in classes.txt, those of void too; None where it cannot be
      used.
    ignore_label: label value of void pixels.
    pixels: int64 [256], pixels of each label value.
    findings: the problems.
    void_line: the line that gives void its color, counted from 0, or None.
  """

  root: pathlib.Path
  num_images: int
  lines: tuple[str, ...] | None
  ignore_label: int
  pixels: np.ndarray
  findings: tuple[Finding, ...]
  void_line: int | None = None

  @property
  def num_lines(self) -> int:
    """Lines that classes.txt should have: those there, or more for values."""
    values = _values(self.pixels, self.ignore_label)
    return max(len(self.lines or ()), max(values, default=-1) + 1)

  @property
  def num_classes(self) -> int:
    """The number proposed: the lines but for that of the ignore label."""
    void = {self.ignore_label, self.void_line} - {None}
    return self.num_lines - sum(line < self.num_lines for line in void)

  def __str__(self) -> str:
    """One line: the number of classes proposed, and why."""
    values = _ranges(_values(self.pixels, self.ignore_label))
    held = f'the labels hold {values or "no class"}'
    if self.pixels[self.ignore_label]:
      held += f' and void, {self.ignore_label}'
    path, count = self.root / 'classes.txt', self.num_lines
    if self.lines is None:
      advice = f'write {path}: {count} lines, one class name each'
    elif count > len(self.lines):
      advice = f'but {path} has {len(self.lines)} names'
    else:
      advice = 'as classes.txt has names'
    for line in sorted({self.ignore_label, self.void_line} - {None}):
      if line < count:
        advice += f'; line {line + 1} is void and no class'
    return f'num_classes: {self.num_classes} ({held}; {advice})'


def survey_folder(
  directory: str | os.PathLike[str],
  splits: Sequence[str],
  *,
  ignore_label: int = 255,
  label_map: str = '',
  on_bad_image: str = 'stop',
) -> Survey:
  """Reads every listed file of a folder once, on all cores.

  Args:
    directory: the folder in VOC devkit layout.
    splits: names of the lists, that to train on first.
    ignore_label: label value of void pixels in the files.
    label_map: what other values stand for, see `labels.parse_label_map`.
    on_bad_image: 'skip' makes unreadable files a warning.

  Raises:
    UserError: if the folder or a part of it is missing, or an option is wrong.
  """
  root = folder.find_root(directory)
  notes = _Notes()
  classes = None
  try:
    classes = folder.read_classes(root)
  except errors.UserError as error:
    notes.add(_CLASSES, error)
  meaning = labels.Meaning(classes, ignore_label, label_map)
  listed = _read_lists(root, splits, notes)
  items = {
    name: item
    for found in listed.values()
    for name, item in found.items()
    if item is not None
  }
  values, palettes = _Values(), labels.Palettes()
  split_pixels = {split: np.zeros(256, np.int64) for split in listed}
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    reads = threads.map(lambda item: _read(item, meaning), items.values())
    for item, (counts, colors, problems) in zip(
      items.values(), reads, strict=True
    ):
      for problem in problems:
        notes.add(*problem)
      notes.catch(_PALETTES, palettes.add, item.label, colors)
      values.add(item, counts)
      for split in listed:
        if item.name in listed[split]:
          split_pixels[split] += counts
  values.report(notes, classes and classes.lines, ignore_label)
  findings = notes.findings(skip=on_bad_image == 'skip')
  if classes is not None:
    counts = {
      split: (
        pixels[list(meaning.values)],
        int(pixels[list(meaning.void_values)].sum()),
      )
      for split, pixels in split_pixels.items()
    }
    findings += label_findings(
      counts,
      meaning.classes,
      meaning.values,
      ignore_label,
      splits[0],
    )
  return Survey(
    root=root,
    num_images=len(set().union(*listed.values())),
    lines=None if classes is None else classes.lines,
    ignore_label=ignore_label,
    pixels=values.pixels,
    findings=findings,
    void_line=None if classes is None else classes.void_line,
  )


def label_findings(
  split_pixels: Mapping[str, tuple[np.ndarray, int]],
  classes: Sequence[str],
  values: Sequence[int],
  void_value: int,
  trained: str,
) -> tuple[Finding, ...]:
  """Finds splits that lack classes, and labels that nothing is learned from.

  Args:
    split_pixels: for every split the pixels of each class, int [C], and those
      of void.
    classes: the C class names.
    values: their values in the label files.
    void_value: that of void.
    trained: the split to train on.

  Returns:
    One finding of each kind; none if every class occurs in every split.
  """
  notes = _Notes()
  for split, (pixels, void) in split_pixels.items():
    present = np.flatnonzero(pixels)
    if not present.size and not void:
      continue  # nothing could be read, which other findings say
    if split == trained and not present.size:
      notes.add(_ALL_VOID, f'every pixel in {split} is void, {void_value}')
    elif not present.size:
      notes.add(_ABSENT, f'all {len(classes)} in {split}')
    else:
      for index in np.flatnonzero(np.equal(pixels, 0)):
        notes.add(_ABSENT, f'{classes[index]} in {split}')
  found = notes.findings()
  pixels, void = split_pixels.get(trained, (np.zeros(0), 0))
  if np.count_nonzero(pixels) == 1:
    index = int(np.argmax(pixels))
    text = f'{values[index]} ({classes[index]}) is the only value'
    if void:
      text += f' beside void, {void_value}, in {trained}; '
      text += _remedy(pixels, values, void_value)
    else:
      text += f' in {trained}, so there is nothing to learn'
    found = (Finding(_SAME, 1, (text,), fatal=bool(void)), *found)
  return found


def _remedy(pixels: np.ndarray, values: Sequence[int], void_value: int) -> str:
  """What to do if the value of void marks a class."""
  text = f'if {void_value} marks a class, set '
  if void_value <= max(values):
    return f'{text}--config.data.ignore_label=255'
  absent = np.flatnonzero(np.equal(pixels, 0))
  if absent.size:
    return f'{text}--config.data.label_map={void_value}:{values[absent[0]]}'
  following = max(values) + 1
  return (
    f'{text}--config.data.label_map={void_value}:{following} and give it a '
    'line in classes.txt'
  )


def check_tallies(
  info: datasets.DatasetInfo, tallies: Mapping[str, records.Tally], trained: str
) -> tuple[Finding, ...]:
  """Looks before training at what a survey looks at, in the same words.

  Args:
    info: of the data set.
    tallies: of its splits.
    trained: the split to train on.

  Returns:
    What is only suspect.

  Raises:
    UserError: if nothing can be learned.
  """
  found = label_findings(
    {s: (t.class_pixels, t.void_pixels) for s, t in tallies.items()},
    info.classes,
    info.values,
    info.void_value,
    trained,
  )
  for finding in found:
    if finding.fatal:
      raise errors.UserError(
        f'config.data.train_split={trained} of {info.name}: {finding.line}'
      )
  return found


class _Notes:
  """Gathers problems by kind."""

  def __init__(self) -> None:
    self._examples: dict[str, list[str]] = {}
    self._counts: collections.Counter[str] = collections.Counter()

  def add(self, title: str, example: object) -> None:
    """Counts a problem, and keeps it if it is one of the first of its kind."""
    self._counts[title] += 1
    examples = self._examples.setdefault(title, [])
    if len(examples) < EXAMPLES:
      examples.append(str(example))

  def catch(
    self, title: str, call: Callable[..., Any], *arguments: Any
  ) -> None:
    """Adds the `UserError` that a call raises, if it does."""
    try:
      call(*arguments)
    except errors.UserError as error:
      self.add(title, error)

  def findings(self, skip: bool = False) -> tuple[Finding, ...]:
    """Returns the problems; `skip` says that unreadable files are no error."""
    fatal = _FATAL if skip else (*_FATAL, _UNREADABLE)
    return tuple(
      Finding(title, self._counts[title], tuple(examples), title in fatal)
      for title, examples in self._examples.items()
    )


class _Values:
  """Counts label values.

  Attributes:
    pixels: int64 [256], pixels of each value.
  """

  def __init__(self) -> None:
    self.pixels = np.zeros(256, np.int64)
    self._files = np.zeros(256, np.int64)
    self._first: dict[int, pathlib.Path] = {}

  def add(self, item: folder.Item, counts: np.ndarray) -> None:
    """Adds the pixels of each value in the label of `item`, int [256]."""
    self.pixels += counts
    self._files += counts > 0
    for value in np.flatnonzero(counts).tolist():
      self._first.setdefault(value, item.label)

  def report(
    self, notes: _Notes, lines: Sequence[str] | None, ignore_label: int
  ) -> None:
    """Notes the values that are no line of classes.txt."""
    for value in _values(self.pixels, ignore_label):
      if lines is not None and value >= len(lines):
        notes.add(
          _VALUES,
          f'{value}: {self.pixels[value]:,} pixels in '
          f'{self._files[value]:,} files, first {self._first[value]}',
        )


def _read_lists(
  root: pathlib.Path, splits: Sequence[str], notes: _Notes
) -> dict[str, dict[str, folder.Item | None]]:
  """Returns the files by id of every list that can be used, in order.

  An id without its files stands for None.
  """
  files = folder.ImageFiles(root)
  found: dict[str, folder.Item | None] = {}

  def find(name: str) -> None:
    found[name] = None
    found[name] = files.item(name)

  listed: dict[str, dict[str, folder.Item | None]] = {}
  for split in splits:
    try:
      names = folder.read_list(root, split)
    except errors.UserError as error:
      notes.add(_LIST, error)
      continue
    listed[split] = {}
    for name in names:
      if name not in found:
        notes.catch(_FILES, find, name)
      item = found[name]
      own = name if item is None else item.name
      if own in listed[split]:
        notes.add(_LIST, f'{own!r} stands twice in {split}, as {name!r} too')
      listed[split][own] = item
  for one, other in itertools.combinations(listed, 2):
    for name in listed[one]:
      if name in listed[other]:
        notes.add(_SHARED, f'{name} in {one} and {other}')
  return listed


def _read(
  item: folder.Item, meaning: labels.Meaning
) -> tuple[np.ndarray, dict[int, tuple[int, ...]], list[tuple[str, str]]]:
  """Reads both files of an id.

  Returns:
    The pixels of each label value, int64 [256], all 0 if a file cannot be
    used; the colors of its palette indices; and the problems as pairs of title
    and example.
  """
  problems = []
  try:
    picture = images.open_picture(item.image)
  except errors.UnreadableError as error:
    problems.append((_UNREADABLE, str(error)))
  except errors.UserError as error:
    problems.append((_NO_PICTURES, str(error)))
  try:
    file = images.open_label(item.label)
    label = meaning.label_values(file)
  except errors.UnreadableError as error:
    problems.append((_UNREADABLE, str(error)))
  except errors.UserError as error:
    problems.append((_NO_INDICES, str(error)))
  if problems:
    return np.zeros(256, np.int64), {}, problems
  height, width = size = picture.pixels.shape[:2]
  try:
    folder.fit_label(item, picture, file, label)
  except errors.UserError as error:
    problems.append((_SIZES, str(error)))
  for title, holds in ((_TINY, min(size) < TINY), (_HUGE, max(size) > HUGE)):
    if holds:
      problems.append((title, f'{item.image}: {width}x{height}'))
  counts = np.bincount(label.ravel(), minlength=256)
  return counts, meaning.used_colors(file), problems


def _values(pixels: np.ndarray, ignore_label: int) -> list[int]:
  """The label values that occur, without that of void."""
  return [v for v in np.flatnonzero(pixels).tolist() if v != ignore_label]


def _ranges(values: Sequence[int]) -> str:
  """Writes ascending numbers shortly: '0 to 3, 7'."""
  runs: list[list[int]] = []
  for value in values:
    if runs and value == runs[-1][-1] + 1:
      runs[-1].append(value)
    else:
      runs.append([value])
  return ', '.join(
    f'{run[0]} to {run[-1]}' if len(run) > 1 else str(run[0]) for run in runs
  )
