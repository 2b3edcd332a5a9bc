"""A label map that makes labels fit the classes, if one can be guessed.

A guess gives values or colors a label value. It fits if all that it leaves out
is rare, or void already. Of the guesses that fit, the first that shows most
classes is proposed; whether it is right, a person has to judge.
"""

import collections
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deeplab_jax.data.datasets import voc_palette
from deeplab_jax.data.label_files import open_label
from deeplab_jax.data.labels import OTHER, Meaning, word, write_label_map
from deeplab_jax.data.pipeline import in_background
from deeplab_jax.data.records import Item
from deeplab_jax.runtime.errors import UserError

_Pixels = collections.Counter[Any]  # by value or color
_Guess = tuple[dict[Any, int], str]  # label values, and why

_RARE = 0.01  # largest share of the pixels that a rare value has,
_RARE_ALL = 0.1  # that all of them have together,
_RARER = 0.1  # and its largest part of the rarest class
_LEVEL = 64  # gray levels differ from numbers of classes from here on
_SMALL = 16  # lossy files have steps up to it, masks of spread values larger
_MOST_COLORS = 1024  # that are told apart in a file
_MOST_NEW = 40  # classes without names, unless their values have no gaps
_VOC_VOID = (224, 224, 192)


class Proposal(NamedTuple):
  """A label map to try."""

  label_map: str  # for `config.data.label_map`; '' if new lines are enough
  new: tuple[str, ...]  # lines that classes.txt lacks
  reason: str  # what the labels hold, and what is guessed
  table: tuple[str, ...]  # what each color is taken for

  def __str__(self) -> str:
    setting = f'--config.data.label_map={self.label_map}'
    return f'{self.reason}: {setting if self.label_map else "name all classes"}'


def propose(
  listed: Mapping[str, Sequence[Item]],
  lines: Sequence[str],
  ignore_label: int,
  *,
  fixed: bool = False,
) -> Proposal | None:
  """Reads the labels of each split and guesses what they mean.

  `lines` are those of classes.txt, none if it has to be written; if they are
  `fixed`, none is added. Returns None without a guess, or if there is nothing
  to repair.
  """
  meaning, void = Meaning(lines, ignore_label), ignore_label
  read = functools.partial(_read, skipped=-1 if void < len(lines) else void)
  held = [_sum(in_background(read, items)) for items in listed.values()]
  every = _sum(held)
  indices = collections.Counter(i for _, i in every['votes'] if i != void)
  disagree = max(indices.values(), default=0) > 1
  by_color = bool(meaning.color_values or every['rgb'] or disagree)
  table: dict[Any, int] = {}
  rows, reasons, names = [], [], meaning.lines
  if by_color and every['colors']:
    if not (guess := _of_colors(every, meaning)):
      return None
    table, why = guess
    reasons.append(why)
    names = _named(names, table, void)
    for color in sorted(table.keys() - {OTHER}, key=lambda x: (table[x], x)):
      name, n = [*names, *['void'] * 256][table[color]], every['colors'][color]
      share = n / every['colors'].total()
      rows.append(f'{word(color)}  {name}  {n:,} pixels, {share:.2%}')
  parts = [part['gray' if by_color else 'values'] for part in held]
  if whole := sum(parts, _Pixels()):
    values = [v for v in range(len(names)) if v not in meaning.void_values]
    if not (guess := _of_values(parts, every, values, void)):
      return None
    table |= guess[0]
    names = _named(names, table, void)
    used = ' or '.join(ranges(sorted(whole)).rsplit(', ', 1))
    reasons += filter(None, [f'all labels are {used}', guess[1]])
  text, new = write_label_map(table, void), names[len(lines) :]
  if not (text or new) or (new and (fixed or meaning.color_values)):
    return None
  return Proposal(text, new, '; '.join(reasons), tuple(rows))


def _sum(parts: Iterable[Mapping[str, _Pixels]]) -> dict[str, _Pixels]:
  total: dict[str, _Pixels] = collections.defaultdict(_Pixels)
  for part in parts:
    for kind, pixels in part.items():
      total[kind].update(pixels)
  return total


def _read(item: Item, skipped: int) -> dict[str, _Pixels]:
  """Counts a file; in palettes the index `skipped` is void of any color."""
  try:
    file = open_label(item.label)
  except UserError:  # which the survey shows
    return {}
  held: dict[str, _Pixels] = collections.defaultdict(_Pixels)
  if file.is_gray():
    values = file.indices(range(2**16))
    steps = np.abs(np.diff(values.astype(np.int32)))
    few = np.count_nonzero((steps > 0) & (steps <= _SMALL))
    held['steps'] = _Pixels({'all': np.count_nonzero(steps), 'small': few})
    used, counts = np.unique(values, return_counts=True)
    pairs = zip(used.tolist(), counts.tolist(), strict=True)
    held['values'] = _Pixels(dict(pairs))
    held['files'] = _Pixels([*used.tolist(), 'all'])
  if file.pixels.ndim == 3:
    held['rgb'] = _Pixels(['all'] * (not held['values']))
    codes = file.pixels @ np.array([1 << 16, 1 << 8, 1])
    found, counts = np.unique(codes, return_counts=True)
    for place in np.argsort(-counts, kind='stable')[:_MOST_COLORS].tolist():
      color = tuple(int(found[place]).to_bytes(3, 'big'))
      held['colors'][color] = int(counts[place])
    held['colors'][OTHER] = codes.size - held['colors'].total()
  elif file.palette is None:
    held['gray'] = held['values']
  else:
    for index, count in held['values'].items():
      if index < len(file.palette) and index != skipped:
        color = tuple(file.palette[index].tolist())
        held['colors'][color] += count
        held['votes'][color, index] = 1
  return held


def _shows(pixels: _Pixels, guess: Mapping[Any, int], void: int) -> int:
  """The number of classes that a guess shows; 0 if it does not fit."""
  total, seen = pixels.total(), _Pixels()
  for value in guess.keys() & pixels.keys():
    seen[guess[value]] += pixels[value]
  seen.pop(void, None)
  left = [n for v, n in pixels.items() if v not in guess and v != void]
  most = min(_RARE * total, _RARER * min(seen.values(), default=0))
  rare = max(left, default=0) <= most and sum(left) <= _RARE_ALL * total
  return len(seen) if rare else 0


def _of_values(
  parts: Sequence[_Pixels],
  every: Mapping[str, _Pixels],
  classes: Sequence[int],
  void: int,
) -> _Guess | None:
  """Guesses for each split alone if the splits agree, else for all."""
  whole, parts = sum(parts, _Pixels()), [part for part in parts if part]
  found = [_of_split(part, classes, void) for part in parts]
  known = [guess for guess in found if guess]
  table = {k: v for guess, _ in known for k, v in guess.items()}
  if known != found or any(guess.items() - table.items() for guess, _ in known):
    known = [guess for guess in [_of_split(whole, classes, void)] if guess]
    table = {k: v for guess, _ in known for k, v in guess.items()}
    for value in (v for v in whole if table.get(v, void) == void):
      splits = zip(found, parts, strict=True)
      means = {x[0].get(value) for x, part in splits if x and value in part}
      if means - {None} and void not in means:
        return None  # it would lose a class of a split
  parted = (part for _, why in known for part in why.split('; '))
  reasons = dict.fromkeys(filter(None, parted))
  rare = sorted(value for value in whole if value not in table)
  top = max((v for v in table.values() if v != void), default=-1)
  # Lossy files have values between the classes, or beside them everywhere. No
  # value of such a file can be trusted.
  files, steps = every['files'], every['steps']
  often = [v for v in rare if 2 * files[v] > files['all'] > 1]
  beside = often and often == list(range(top + 1, top + 1 + len(often)))
  blurred = len(whole) > len(classes) + 8 and 2 * steps['small'] > steps['all']
  gaps, picture = len(whole) <= max(whole), 2 * steps['all'] > whole.total()
  if not table or beside or picture or (gaps and blurred):
    return None
  if rare:
    table |= {OTHER: void} if len(rare) > 4 else dict.fromkeys(rare, void)
    reasons['what is no class is rare, and void'] = None
  return table, '; '.join(reasons)


def _of_split(
  pixels: _Pixels, classes: Sequence[int], void: int
) -> _Guess | None:
  """Returns the first guess that shows most classes, at least two."""
  own = _Pixels({v: n for v, n in pixels.items() if v != void})
  more = [_often(some) for some in (own, pixels)]
  if more[0] > 1 and max(own) > more[0]:  # gaps: void may be one of the levels
    more.reverse()
  for known in (classes, *map(range, more)):
    guesses = list(_guesses(own, pixels, known, void)) if len(known) > 1 else []
    shown = [_shows(pixels, guess, void) for guess, _ in guesses]
    if max(shown, default=0) > 1:
      guess, why = guesses[shown.index(max(shown))]
      if void not in pixels or void in guess:
        return guess, why
      rarest = min(own, key=lambda v: (guess.get(v, void) == void, own[v]))
      if pixels[void] > own[rarest]:
        why += f'; {void} stays void, and is more frequent than {rarest}'
      # A split where void occurs tells that its value is no class.
      return guess | {void: void}, why
  return None


def _often(pixels: _Pixels) -> int:
  """How many values are classes, if there are no names."""
  values, ranked = sorted(pixels), pixels.most_common()
  if values and values[-1] - values[0] == len(values) - 1 and values[0] < 2:
    return len(values)
  for count in range(2, min(len(ranked), _MOST_NEW) + 1):
    if _shows(pixels, {v: v for v, _ in ranked[:count]}, -1):
      return count
  return 0


def _guesses(
  own: _Pixels, pixels: _Pixels, classes: Sequence[int], void: int
) -> Iterator[_Guess]:
  """Yields what values may stand for; `own` are the pixels without void."""
  count = len(classes)
  same = dict(zip(classes, classes, strict=True))
  yield same, ''
  yield same | {65535: void}, '65535, which is -1, is taken for void'
  why = 'counted from 1' + ', so 0 is taken for void' * (0 in pixels)
  yield {0: void} | {value + 1: value for value in classes}, why
  absent = [value for value in classes if value not in own]
  if len(own) == 1 and void in pixels and absent:  # as the survey says, too
    yield same | {void: absent[0]}, f'{void} is taken for a class'
  kinds, white = [own, pixels], False
  if void > max(own, default=0) >= max(_LEVEL, count):
    # White is one of the gray levels, if they are not evenly spread without it.
    steps = np.diff(sorted(value for value, _ in own.most_common(count)))
    even = steps.max(initial=0) <= steps.min(initial=255) + 2 and count > 2
    kinds, white = [pixels, own] if even else [pixels], not even
  for some, number in itertools.product(kinds, (count, 2)):
    values = sorted(value for value, _ in some.most_common(number))
    if len(values) == count or (len(values) == 2 and values[0] == 0):
      guess, why = dict(zip(values, classes, strict=False)), ''
      rest = [value for value in some if value not in guess]
      few = sum(some[value] for value in rest) <= _RARE_ALL * some.total()
      if white and len(rest) == 1 and few and number == count:
        guess[rest[0]], why = void, f'; {rest[0]} is taken for void'
      yield guess, f'in ascending order{why}'
  levels = {
    round_to(255 * i / (count - 1)): value
    for i, value in enumerate(classes)
    for round_to in (math.floor, math.ceil)
  }
  yield {v: levels[v] for v in pixels if v in levels}, 'evenly spread'


def _of_colors(every: Mapping[str, _Pixels], meaning: Meaning) -> _Guess | None:
  """Guesses what colors mean; those in classes.txt are known."""
  colors, void, votes = every['colors'], meaning.void_value, every['votes']
  ranked = [c for c, _ in colors.most_common() if c != OTHER]
  known, classes = meaning.color_values, meaning.values
  guesses: list[_Guess] = []
  if known:
    others = [color for color in ranked if color not in known]
    unused = [v for c, v in known.items() if c not in ranked and v in classes]
    for some in ([], others[:1]):
      guess = known | dict.fromkeys(some, void)
      guesses.append((guess, 'what is no class is taken for void'))
    if len(others) == len(unused) == 1 and others != [_VOC_VOID]:
      why = f'{word(others[0])} is taken for {meaning.lines[unused[0]]}, whose'
      guess = known | {others[0]: unused[0]}
      guesses.insert(1, (guess, f'{why} color in classes.txt no label has'))
  elif classes:
    for count in (len(classes), len(classes) + 1):
      guesses.append(_order(ranked[:count], votes, classes, void))
  else:
    for count in range(2, min(len(ranked), _MOST_NEW) + 1):
      guesses.append(_order(ranked[:count], votes, range(count), void))
    if len(ranked) <= _MOST_NEW:
      guesses.reverse()
  for guess, why in guesses:
    if _shows(colors, guess, void) > 1:
      new = {color: v for color, v in guess.items() if known.get(color) != v}
      rest = any(n and color not in guess for color, n in colors.items())
      return new | ({OTHER: void} if rest else {}), why
  return None


def _order(
  colors: Sequence[Any], votes: _Pixels, classes: Sequence[int], void: int
) -> _Guess:
  """Gives each color, the most frequent first, a class or, if needed, void."""
  if _VOC_VOID in colors or len(colors) > len(classes):
    # What has most pixels is hardly void; of black, gray and white the rarest.
    grays = [color for color in colors[1:] if len(set(color)) == 1]
    last = _VOC_VOID if _VOC_VOID in colors else (grays or colors)[-1]
    kept = [color for color in colors if color != last]
    guess, why = _order(kept, votes, classes, void)
    return guess | {last: void}, f'{why}; {word(last)} is taken for void'
  voted = {
    color: index
    for (color, index), files in votes.items()
    if 2 * files > sum(n for (c, _), n in votes.items() if c == color)
  }
  published = {tuple(c): i for i, c in enumerate(voc_palette(256).tolist())}
  for table, why in (
    (voted, 'colors as most palettes order them'),
    (published, 'colors in the order of PASCAL VOC'),
  ):
    guess = {color: table[color] for color in colors if color in table}
    if len(set(guess.values()) & set(classes)) == len(colors):
      return guess, why
  if all(len(set(color)) == 1 for color in colors):
    return dict(zip(sorted(colors), classes, strict=False)), 'dark to light'
  # Black comes first, the others stay in order.
  guess = dict(zip(sorted(colors, key=any), classes, strict=False))
  why = 'which color is which class cannot be known, so they are taken in the '
  return guess, why + 'order of black, then of the most pixels'


def _named(
  lines: Sequence[str], table: Mapping[Any, int], void: int
) -> tuple[str, ...]:
  """Returns the lines of classes.txt, with a new one for each new class."""
  top = max((v for v in table.values() if v != void), default=-1)
  return (*lines, *(f'class{i}' for i in range(len(lines), top + 1)))


def ranges(values: Sequence[int]) -> str:
  """Writes ascending numbers as ranges: '0 to 3, 7'."""
  runs = []
  for _, run in itertools.groupby(enumerate(values), lambda x: x[1] - x[0]):
    first, *others = (value for _, value in run)
    runs.append(f'{first} to {others[-1]}' if others else str(first))
  return ', '.join(runs if len(runs) <= 8 else [f'{values[0]} to {values[-1]}'])
