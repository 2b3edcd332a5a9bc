"""Text in any script on pictures.

Pillow's own font draws plain Latin text, and Noto fonts draw what it lacks;
Chinese characters take their Japanese forms. Arabic and Hebrew are set from
right to left with joined letters if Pillow finds the library FriBidi.
"""

import functools
import re
import unicodedata
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import ImageDraw, ImageFont

WHITE = (255, 255, 255)
INK = (32, 32, 32)

_PLAIN = None  # stands for Pillow's own font among paths of others
_SAMPLE = 16  # letter size at which fonts are searched for characters
_UNASSIGNED = '\U0010ffff'  # a character that no font has
_REGULAR = 400  # weight of a variable font
_Run = tuple[Path | None, str]  # a font's file, and the text that it draws


def text_length(text: str, size: int) -> float:
  """Returns the width in pixels of a text with letters of `size` pixels."""
  return sum(_open(font, size).getlength(run) for font, run in _runs(text))


def draw_text(
  draw: ImageDraw.ImageDraw,
  place: tuple[float, float],
  text: str,
  size: int,
  align: str = 'left',
  color: tuple[int, int, int] = INK,
) -> None:
  """Writes one line of text with letters of `size` pixels.

  `place` is (x, y). The text's left end, center or right end, as `align` says,
  is at x, and its middle height at y.
  """
  x, y = place
  x -= {'left': 0, 'center': 0.5, 'right': 1}[align] * text_length(text, size)
  # All fonts share the baseline of the plain one.
  ascent, descent = _open(_PLAIN, size).getmetrics()
  y += (ascent - descent) / 2
  for path, run in _runs(text):
    font = _open(path, size)
    draw.text((x, y), run, color, font, anchor='ls')
    x += font.getlength(run)


@functools.lru_cache(maxsize=4096)
def _runs(text: str) -> tuple[_Run, ...]:
  """Splits a text into runs of one font each.

  If any font has the whole text, there is one run. Otherwise each word takes a
  font, and each character of a word that no font has.
  """
  # Spaces and joining characters need no glyph.
  drawn = [c for c in text if unicodedata.category(c)[0] not in 'ZC']
  for font in _fonts():
    if all(_has(font, character) for character in drawn):
      return ((font, text),)
  if len(text) == 1:
    return ((_PLAIN, text),)
  words = re.findall(r'\s+|\S+', text)
  runs: list[_Run] = []
  for part in words if len(words) > 1 else text:
    for run in _runs(part):
      _append(runs, *run)
  return tuple(runs)


def _append(runs: list[_Run], font: Path | None, text: str) -> None:
  """Adds a run, joined to the previous ones where they have its font.

  A space between two words of one font joins them, so that a script written
  from right to left is set as a whole. A mark joins the letter before it.
  """
  if len(runs) > 1 and runs[-1][1].isspace() and runs[-2][0] == font:
    text = runs.pop()[1] + text
  is_mark = unicodedata.category(text[0])[0] in 'MC'
  if runs and (is_mark or runs[-1][0] == font):
    font, before = runs.pop()
    text = before + text
  runs.append((font, text))


@functools.lru_cache(maxsize=65536)
def _has(font: Path | None, character: str) -> bool:
  # A font draws all characters that it lacks alike, without text shaping.
  opened = _open(font, _SAMPLE, ImageFont.Layout.BASIC)
  mask, missing = map(opened.getmask, (character, _UNASSIGNED))
  return (mask.size, bytes(mask)) != (missing.size, bytes(missing))


@functools.cache
def _fonts() -> tuple[Path | None, ...]:
  """Returns all fonts, in the order in which they are tried."""
  noto = Path(str(resources.files('manimgx_fonts')))
  scripts = [p for p in noto.glob('NotoSans*.ttf') if 'Italic' not in p.name]
  # Latin, Greek and Cyrillic, in 'NotoSans[...].ttf', come first.
  scripts.sort(key=lambda path: (not path.name.startswith('NotoSans['), path))
  cjk = Path(str(resources.files('manimgx_fonts_cjk'))).glob('*.ttc')
  return (_PLAIN, *scripts, *cjk, *noto.glob('NotoEmoji*.ttf'))


@functools.lru_cache(maxsize=256)
def _open(
  path: Path | None, size: int, layout: ImageFont.Layout | None = None
) -> ImageFont.FreeTypeFont:
  if path is _PLAIN:
    font: Any = ImageFont.load_default(size)
    return font if layout is None else font.font_variant(layout_engine=layout)
  font = ImageFont.truetype(str(path), size, layout_engine=layout)
  font.set_variation_by_axes([_REGULAR])
  return font
