"""All that is wrong with a folder, or allowed but rarely meant.

Preparing stops at the first problem; a survey reads the same files before.
"""

import collections
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deeplab_jax.data import folder, folder_files, proposals
from deeplab_jax.data.datasets import DatasetInfo, Tally
from deeplab_jax.data.images import open_picture
from deeplab_jax.data.label_files import open_label
from deeplab_jax.data.labels import Meaning, Palettes, count_values
from deeplab_jax.data.records import Item, Layout, Listing, readable
from deeplab_jax.runtime.errors import UnreadableError, UserError

TINY = 64  # pixels; a tiny image has a shorter side
HUGE = 4096  # pixels; a huge image has a longer side
EXAMPLES = 5  # of each kind of problem are named

_LIST = 'lists that cannot be used'
_FILES = 'listed ids without exactly one image and a label'
_UNREADABLE = 'unreadable files'
_NO_PICTURES = 'images that cannot be read as what they show'
_NO_INDICES = 'labels that hold no class indices'
_PALETTES = 'palettes that give one index several colors'
_SIZES = 'labels of another size than their image'
_VALUES = 'label values that are neither a class nor the ignore label'
_SAME = 'labels that tell nothing apart'
_ALL_VOID = 'no pixel of a class to train on'
_NO_NAMES = 'no class names'
_ABSENT = 'classes without a pixel'
_HIDDEN = 'void where labels show a single class, and more without void'
_SHARED = 'ids in two lists, which makes the score worthless'
_OF_LABELS = _NO_NAMES, _NO_INDICES, _PALETTES, _VALUES, _SAME, _ALL_VOID
_TINY = f'tiny images, with a side below {TINY} pixels'
_HUGE = f'huge images, with a side above {HUGE} pixels: slow, and much memory'


@dataclasses.dataclass(frozen=True)
class Finding:
  """One kind of problem."""

  title: str  # what is wrong
  count: int  # how often
  examples: tuple[str, ...]  # the first ones
  fatal: bool  # whether the folder cannot be used because of it

  @property
  def line(self) -> str:
    """The title and the examples in one line."""
    return f'{self.title}: {"; ".join(self._shown())}'

  def __str__(self) -> str:
    """Several lines: the title with the count, then the examples."""
    kind = 'error' if self.fatal else 'warning'
    head = f'{kind}: {self.title}: {self.count:,}'
    return '\n  '.join([head, *self._shown()])

  def _shown(self) -> list[str]:
    more = self.count - len(self.examples)
    return [*self.examples, *([f'and {more:,} more'] if more else [])]


class Survey(NamedTuple):
  """What a survey found."""

  root: Path
  text: str  # how many classes there are, and why
  findings: tuple[Finding, ...]
  lines: Sequence[str]  # of classes.txt
  classes: Path | Sequence[str]  # where they are from
  items: dict[str, list[Item]]  # of each split, those with files
  proposal: proposals.Proposal | None  # what may repair the labels


class _Notes(collections.defaultdict[str, list[str]]):
  """The examples of each kind of problem."""

  def catch(
    self, title: str, function: Callable[..., Any], *args: Any, **named: Any
  ) -> Any:
    """Returns the function's result; notes its `UserError` and returns None."""
    try:
      return function(*args, **named)
    except UserError as error:
      damaged = isinstance(error, UnreadableError)
      self[_UNREADABLE if damaged else title].append(str(error))

  def findings(self, *allowed: str) -> tuple[Finding, ...]:
    """Returns the problems; titles in `allowed` are no error."""
    warnings = (*allowed, _ABSENT, _HIDDEN, _TINY, _HUGE)
    return tuple(
      Finding(title, len(found), tuple(found[:EXAMPLES]), title not in warnings)
      for title, found in self.items()
      if found
    )


def survey_folder(
  directory: str | os.PathLike[str],
  splits: Sequence[str],
  *,
  ignore_label: int = 255,
  label_map: str | None = '',
  on_bad_image: str = 'stop',
  as_stored: bool = False,
  tile: int = 0,
  layout: Layout = folder_files.voc_devkit,
) -> Survey:
  """Reads every listed file of a folder once, on all cores.

  The first of the splits is the one to train on. `on_bad_image='skip'` makes
  unreadable files a warning. For the rest see `load.load_dataset`. Raises
  `UserError` if a part of the folder is missing, or an option is wrong.
  """
  root = folder_files.find_root(directory)
  notes = _Notes(list)
  found_by = {s: notes.catch(_LIST, layout, root, s) for s in splits}
  listings = {split: found for split, found in found_by.items() if found}
  if not listings and len(set(notes[_LIST])) == 1:
    raise UserError(notes[_LIST][0])  # of the folder, not of a split
  default = Listing(origin='', found={}, classes=root / 'classes.txt')
  first = next(iter(listings.values()), default)
  lines = notes.catch(_NO_NAMES, folder_files.read_classes, first) or ()
  meaning = Meaning(lines, ignore_label, label_map or first.label_map)
  listed = _read_lists(listings, notes)
  known_items = {s: [*filter(None, x.values())] for s, x in listed.items()}
  items = list(dict.fromkeys(itertools.chain(*known_items.values())))
  palettes, counts = Palettes(), np.zeros((len(items), 256), np.int64)
  how: dict[str, Any] = {'tile': tile, 'as_stored': as_stored}
  check = functools.partial(_check, meaning=meaning, **how)
  alone = functools.partial(folder.is_large, **how)
  results = readable(items, check, alone=alone)
  for row, (_, (own, colors, problems)) in enumerate(results):
    counts[row] = own
    for title, examples in problems.items():
      notes[title] += examples
    notes.catch(_PALETTES, palettes.add, colors)
  of_classes: tuple[Finding, ...] = ()
  if lines:
    for value in np.flatnonzero(counts.any(0)).tolist():
      if value >= len(lines) and value != ignore_label:
        rows = counts[:, value].nonzero()[0].tolist()
        notes[_VALUES].append(
          f'{value}: {counts[:, value].sum():,} pixels in {len(rows):,} files, '
          f'first {items[rows[0]].label}'
        )
    known, void = list(meaning.values), list(meaning.void_values)
    tallies = {split: Tally(len(known), ignore_label) for split in listed}
    for split, names in listed.items():
      rows = [row for row, item in enumerate(items) if item.name in names]
      of_split = counts[rows].sum(0)
      tallies[split].class_pixels = of_split[known]
      tallies[split].void_pixels = int(of_split[void].sum())
    of_classes = label_findings(meaning, tallies, splits[0])
    # Void that is probably a class, as 255 in some of many labels of 0 and 1.
    shown, has_void = (counts[:, known] > 0).sum(1), counts[:, void].any(1)
    if (shown[has_void] == 1).all() and (shown[~has_void] > 1).any():
      notes[_HIDDEN] += [str(items[x].label) for x in np.flatnonzero(has_void)]
    if notes[_VALUES]:  # which tell something apart
      of_classes = tuple(x for x in of_classes if x.title != _SAME)
  allowed = [_UNREADABLE] * (on_bad_image == 'skip')
  findings = notes.findings(*allowed) + of_classes
  text, place = _count_classes(first, meaning, counts.sum(0)), first.classes
  proposal = None
  if any(found.fatal and found.title in _OF_LABELS for found in findings):
    fixed = not isinstance(place, Path)
    proposal = proposals.propose(known_items, lines, ignore_label, fixed=fixed)
  return Survey(root, text, findings, lines, place, known_items, proposal)


def _count_classes(
  listing: Listing, meaning: Meaning, pixels: np.ndarray
) -> str:
  """Tells the number of classes for so many pixels of each value, and why."""
  in_file = isinstance(path := listing.classes, Path)
  ignored, names = meaning.void_value, len(meaning.lines)
  values = [v for v in np.flatnonzero(pixels).tolist() if v != ignored]
  count = max(names, max(values, default=-1) + 1)
  text = f'the labels hold {proposals.ranges(values) or "no class"}'
  if pixels[ignored]:
    text += f' and void, {ignored}'
  if not names and in_file:
    text += f'; write {path}: {count} lines, one class name each'
  elif count > names > 0:
    text += f'; but {path if in_file else listing.origin} has {names} names'
  elif in_file:
    text += '; as classes.txt has names'
  for line in sorted(v for v in meaning.void_values if v < count):
    text += f'; line {line + 1} is void and no class'
    count -= 1
  return f'num_classes: {count} ({text})'


def _read_lists(
  listings: Mapping[str, Listing], notes: _Notes
) -> dict[str, dict[str, Item | None]]:
  """Returns, for every list that can be used, its ids and their files."""
  listed: dict[str, dict[str, Item | None]] = {s: {} for s in listings}
  missing: dict[str, str] = {}
  for split, listing in listings.items():
    for name, found in listing.found.items():
      item = found if isinstance(found, Item) else None
      if item is None:
        missing.setdefault(name, str(found))
      own = item.name if item else name
      if own in listed[split]:
        notes[_LIST] += [f'{own!r} stands twice in {split}, as {name!r} too']
      listed[split][own] = item
  notes[_FILES] += missing.values()
  for one, other in itertools.combinations(listed, 2):
    shared = (name for name in listed[one] if name in listed[other])
    notes[_SHARED] += [f'{name} in {one} and {other}' for name in shared]
  return listed


def _check(
  item: Item, meaning: Meaning, as_stored: bool, tile: int
) -> tuple[np.ndarray, list[list[Any]], _Notes]:
  """Returns pixels by label value, int64 [256], colors used, and problems."""
  notes = _Notes(list)
  picture = notes.catch(
    _NO_PICTURES, open_picture, item.image, as_stored=as_stored, to_cut=tile > 0
  )
  file = notes.catch(_NO_INDICES, open_label, item.label, to_cut=tile > 0)
  values = file and notes.catch(_NO_INDICES, meaning.label_values, file)
  if picture is None or values is None:
    return np.zeros(256, np.int64), [], notes
  notes.catch(_SIZES, folder.fit_label, item, picture, file, values)
  height, width = picture.pixels.shape[:2]
  size = f'{item.image}: {width}x{height}'
  if min(height, width) < TINY:
    notes[_TINY].append(size)
  if max(height, width) > HUGE and not tile:
    notes[_HUGE].append(size)
  return count_values(values), meaning.used_colors(file), notes


def label_findings(
  info: DatasetInfo | Meaning, tallies: Mapping[str, Tally], trained: str
) -> tuple[Finding, ...]:
  """Finds splits that lack classes, and labels that nothing is learned from."""
  notes, allowed = _Notes(list), ''
  classes, values, void_value = info.classes, info.values, info.void_value
  for split, tally in tallies.items():
    present = np.flatnonzero(tally.class_pixels).tolist()
    absent = np.flatnonzero(tally.class_pixels == 0).tolist()
    if not present and not tally.void_pixels:
      continue  # nothing could be read, as other findings say
    if split == trained and len(present) == 1:
      text = f'{values[present[0]]} ({classes[present[0]]}) is the only value'
      if tally.void_pixels:
        text += f' besides void, {void_value}, in {split}; '
        text += _remedy(absent, values, void_value)
      else:
        text += f' in {split}, so there is nothing to learn'
        allowed = _SAME
      notes[_SAME].append(text)
    if present:
      notes[_ABSENT] += [f'{classes[index]} in {split}' for index in absent]
      # Void, and none where the only absent class is: is it that class?
      void = sum(
        t.void_pixels for t in tallies.values() if t.class_pixels[absent].any()
      )
      if len(absent) == 1 and not void and tally.void_pixels:
        notes[_ABSENT][-1] += f' ({_remedy(absent, values, void_value)})'
    elif split == trained:
      notes[_ALL_VOID].append(f'every pixel in {split} is void, {void_value}')
    else:
      notes[_ABSENT].append(f'all {len(classes)} in {split}')
  return notes.findings(allowed)


def _remedy(absent: list[int], values: Sequence[int], void_value: int) -> str:
  """What to do if the value of void marks a class."""
  text = f'if {void_value} marks a class, set --config.data.'
  if void_value <= max(values):
    return f'{text}ignore_label=255'
  target, more = max(values) + 1, ' and give it a line in classes.txt'
  if absent:
    target, more = values[absent[0]], ''
  return f'{text}label_map={void_value}:{target}{more}'


def check_tallies(
  info: DatasetInfo, tallies: Mapping[str, Tally], trained: str
) -> tuple[Finding, ...]:
  """Returns what is suspect; raises `UserError` if nothing can be learned."""
  found = label_findings(info, tallies, trained)
  for finding in found:
    if finding.fatal:
      raise UserError(
        f'config.data.train_split={trained} of {info.name}: {finding.line}'
      )
  return found
