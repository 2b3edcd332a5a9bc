"""Text in any script on pictures.

Pillow's own font draws plain Latin text. What it lacks is drawn in a Noto font
that has it, of the packages `manimgx_fonts` and `manimgx_fonts_cjk`; Chinese
characters take their Japanese forms. Where Pillow finds the library FriBidi,
Arabic and Hebrew read from right to left and letters are joined as in print;
without it they stand one by one, from left to right.
"""

import functools
import re
import unicodedata
from importlib import resources
from pathlib import Path

from PIL import ImageDraw, ImageFont

_PLAIN = None  # Pillow's own font, beside the paths of others
_SAMPLE = 16  # size at which it is seen what a font has
_UNASSIGNED = '\U0010ffff'  # drawn as what is missing
_REGULAR = 400  # weight of a variable font

_Font = Path | None
_Run = tuple[_Font, str]


def text_length(text: str, size: int) -> float:
  """Width of a text in pixels, in letters of `size` pixels."""
  return sum(_open(font, size).getlength(run) for font, run in _runs(text))


def draw_text(
  draw: ImageDraw.ImageDraw,
  place: tuple[float, float],
  text: str,
  color: tuple[int, int, int],
  size: int,
  align: str = 'left',
) -> None:
  """Writes a line of text.

  Args:
    draw: of the picture.
    place: x of the left or right end or the middle, y of the middle.
    text: in any script.
    color: RGB.
    size: of the letters in pixels.
    align: 'left', 'center' or 'right', what x is of.
  """
  x, y = place
  x -= {'left': 0, 'center': 0.5, 'right': 1}[align] * text_length(text, size)
  # One baseline for all fonts: that of the plain one.
  ascent, descent = _open(_PLAIN, size).getmetrics()
  y += (ascent - descent) / 2
  for font, run in _runs(text):
    opened = _open(font, size)
    draw.text((x, y), run, color, opened, anchor='ls')
    x += opened.getlength(run)


@functools.lru_cache(maxsize=4096)
def _runs(text: str) -> tuple[_Run, ...]:
  """Splits a text into runs of one font each: one if any font has all of it.

  Else each word takes a font, or each character of a word that none has.
  """
  for font in _fonts():
    if _has_all(font, text):
      return ((font, text),)
  if len(text) == 1:
    return ((_PLAIN, text),)
  words = re.findall(r'\s+|\S+', text)
  runs: list[_Run] = []
  for part in words if len(words) > 1 else text:
    for run in _runs(part):
      _append(runs, run)
  return tuple(runs)


def _append(runs: list[_Run], run: _Run) -> None:
  """Adds a run, joined to those before it that are of its font.

  A space between two words of one font is of that font as well: a script from
  right to left is set in whole. A mark belongs to the letter before it.
  """
  font, text = run
  if len(runs) > 1 and runs[-1][1].isspace() and runs[-2][0] == font:
    text = runs.pop()[1] + text
  is_mark = unicodedata.category(text[0])[0] in 'MC'
  if runs and (is_mark or runs[-1][0] == font):
    runs[-1] = runs[-1][0], runs[-1][1] + text
  else:
    runs.append((font, text))


def _has_all(font: _Font, text: str) -> bool:
  # Spaces and what joins letters are in no need of a glyph.
  return all(
    _has(font, character)
    for character in text
    if unicodedata.category(character)[0] not in 'ZC'
  )


@functools.lru_cache(maxsize=65536)
def _has(font: _Font, character: str) -> bool:
  # Drawn letter by letter, a missing one is like any other missing one.
  opened = _open(font, _SAMPLE, ImageFont.Layout.BASIC)
  return _drawn(opened, character) != _drawn(opened, _UNASSIGNED)


def _drawn(
  font: ImageFont.FreeTypeFont, text: str
) -> tuple[tuple[int, int], bytes]:
  mask = font.getmask(text)
  return mask.size, bytes(mask)


@functools.cache
def _fonts() -> tuple[_Font, ...]:
  """All fonts, in the order in which they are tried."""
  noto = Path(str(resources.files('manimgx_fonts')))
  scripts = sorted(
    path for path in noto.glob('NotoSans*.ttf') if 'Italic' not in path.name
  )
  # The one for Latin, Greek and Cyrillic first.
  scripts.sort(key=lambda path: not path.name.startswith('NotoSans['))
  cjk = Path(str(resources.files('manimgx_fonts_cjk'))).glob('*.ttc')
  return (_PLAIN, *scripts, *cjk, *noto.glob('NotoEmoji*.ttf'))


@functools.lru_cache(maxsize=256)
def _open(
  path: _Font, size: int, layout: ImageFont.Layout | None = None
) -> ImageFont.FreeTypeFont:
  if path is _PLAIN:
    plain = ImageFont.load_default(size)
    if layout is None:
      return plain
    return plain.font_variant(layout_engine=layout)
  font = ImageFont.truetype(str(path), size, layout_engine=layout)
  font.set_variation_by_axes([_REGULAR])
  return font
