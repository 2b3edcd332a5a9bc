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
from collections.abc import Mapping, Sequence

import numpy as np

from deeplab_jax import errors
from deeplab_jax.data import folder, images, records

TINY = 64  # pixels; a tiny image has a shorter side
HUGE = 4096  # pixels; a huge image has a longer side
EXAMPLES = 5  # of each kind of problem are named

_LIST = 'lists that cannot be used'
_CLASSES = 'no class names'
_FILES = 'listed ids without exactly one image and a label'
_UNREADABLE = 'unreadable files'
_NO_INDICES = 'labels that hold no class indices'
_SIZES = 'labels of another size than their image'
_VALUES = 'label values that are neither a class nor the ignore label'
_SAME = 'labels that tell nothing apart'
_ABSENT = 'classes without a pixel'
_SHARED = 'ids in two lists, which makes the score worthless'
_TINY = f'tiny images, with a side below {TINY} pixels'
_HUGE = f'huge images, with a side above {HUGE} pixels: slow, and much memory'

# What is refused, beside unreadable files, which may be skipped.
_FATAL = (_LIST, _SHARED, _CLASSES, _FILES, _NO_INDICES, _SIZES, _VALUES)


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
    classes: the names in classes.txt, None where it cannot be used.
    ignore_label: label value of void pixels.
    pixels: int64 [256], pixels of each label value.
    findings: the problems.
  """

  root: pathlib.Path
  num_images: int
  classes: tuple[str, ...] | None
  ignore_label: int
  pixels: np.ndarray
  findings: tuple[Finding, ...]

  @property
  def num_classes(self) -> int:
    """The number proposed: of the names, or more if label values go beyond."""
    values = _values(self.pixels, self.ignore_label)
    return max(len(self.classes or ()), max(values, default=-1) + 1)

  def __str__(self) -> str:
    """One line: the number of classes proposed, and why."""
    values = _ranges(_values(self.pixels, self.ignore_label))
    held = f'the labels hold {values or "no class"}'
    if self.pixels[self.ignore_label]:
      held += f' and void, {self.ignore_label}'
    path, count = self.root / 'classes.txt', self.num_classes
    if self.classes is None:
      advice = f'write {path}: {count} lines, one class name each'
    elif count > len(self.classes):
      advice = f'but {path} has {len(self.classes)} names'
    else:
      advice = 'as classes.txt has names'
    return f'num_classes: {count} ({held}; {advice})'


def survey_folder(
  directory: str | os.PathLike[str],
  splits: Sequence[str],
  *,
  ignore_label: int = 255,
  on_bad_image: str = 'stop',
) -> Survey:
  """Reads every listed file of a folder once, on all cores.

  Args:
    directory: the folder in VOC devkit layout.
    splits: names of the lists.
    ignore_label: label value of void pixels.
    on_bad_image: 'skip' makes unreadable files a warning.

  Raises:
    UserError: if the folder or a part of it is missing.
  """
  root = folder.find_root(directory)
  notes = _Notes()
  classes = None
  try:
    classes = folder.read_classes(root)
  except errors.UserError as error:
    notes.add(_CLASSES, error)
  listed = _read_lists(root, splits, notes)
  items = _find_items(root, listed, notes)
  values = _Values()
  split_pixels = {split: np.zeros(256, np.int64) for split in listed}
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    for item, (counts, problems) in zip(
      items, threads.map(_read, items), strict=True
    ):
      for problem in problems:
        notes.add(*problem)
      values.add(item, counts)
      for split in listed:
        if item.name in listed[split]:
          split_pixels[split] += counts
  values.report(notes, classes, ignore_label)
  findings = notes.findings(skip=on_bad_image == 'skip')
  if classes is not None:
    findings += absent_classes(split_pixels, classes)
  return Survey(
    root=root,
    num_images=len(set().union(*listed.values())),
    classes=classes,
    ignore_label=ignore_label,
    pixels=values.pixels,
    findings=findings,
  )


def absent_classes(
  split_pixels: Mapping[str, np.ndarray], classes: Sequence[str]
) -> tuple[Finding, ...]:
  """Finds the classes without a pixel.

  Args:
    split_pixels: for every split the pixels of each class, int [C] or longer.
    classes: the C class names.

  Returns:
    One finding, or none if every class occurs in every split.
  """
  notes = _Notes()
  for split, pixels in split_pixels.items():
    counts = list(zip(classes, pixels, strict=False))
    if not any(count for _, count in counts):
      notes.add(_ABSENT, f'all {len(classes)} in {split}')
      continue
    for name, count in counts:
      if not count:
        notes.add(_ABSENT, f'{name} in {split}')
  return notes.findings()


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
    self, notes: _Notes, classes: Sequence[str] | None, ignore_label: int
  ) -> None:
    """Notes the values that are no class, or one class alone."""
    values = _values(self.pixels, ignore_label)
    if classes is not None:
      for value in values:
        if value >= len(classes):
          notes.add(
            _VALUES,
            f'{value}: {self.pixels[value]:,} pixels in '
            f'{self._files[value]:,} files, first {self._first[value]}',
          )
    if len(values) == 1:
      notes.add(
        _SAME,
        f'{values[0]} is the only value beside void, {ignore_label}; if '
        f'{ignore_label} marks a class, store it as the next index',
      )


def _read_lists(
  root: pathlib.Path, splits: Sequence[str], notes: _Notes
) -> dict[str, dict[str, None]]:
  """Returns the ids of every list that can be used, in order."""
  listed = {}
  for split in splits:
    try:
      listed[split] = dict.fromkeys(folder.read_list(root, split))
    except errors.UserError as error:
      notes.add(_LIST, error)
  for one, other in itertools.combinations(listed, 2):
    for name in listed[one]:
      if name in listed[other]:
        notes.add(_SHARED, f'{name} in {one} and {other}')
  return listed


def _find_items(
  root: pathlib.Path, listed: Mapping[str, Mapping[str, None]], notes: _Notes
) -> list[folder.Item]:
  """Returns the files of every id, each once."""
  files = folder.ImageFiles(root)
  items = []
  for name in dict.fromkeys(itertools.chain(*listed.values())):
    try:
      items.append(files.item(name))
    except errors.UserError as error:
      notes.add(_FILES, error)
  return items


def _read(item: folder.Item) -> tuple[np.ndarray, list[tuple[str, str]]]:
  """Reads both files of an id.

  Returns:
    The pixels of each label value, int64 [256], all 0 if a file cannot be
    used; and the problems as pairs of title and example.
  """
  arrays, problems = [], []
  for read, path in (
    (images.read_image, item.image),
    (images.read_label, item.label),
  ):
    try:
      arrays.append(read(path))
    except errors.UnreadableError as error:
      problems.append((_UNREADABLE, str(error)))
    except errors.UserError as error:
      problems.append((_NO_INDICES, str(error)))
  if problems:
    return np.zeros(256, np.int64), problems
  image, label = arrays
  height, width = size = image.shape[:2]
  try:
    records.check_size(item, size, label.shape)
  except errors.UserError as error:
    problems.append((_SIZES, str(error)))
  for title, holds in ((_TINY, min(size) < TINY), (_HUGE, max(size) > HUGE)):
    if holds:
      problems.append((title, f'{item.image}: {width}x{height}'))
  return np.bincount(label.ravel(), minlength=256), problems


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
