"""Texts in many scripts: every character is drawn, none as a box."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from deeplab_jax.visualize import lettering
from deeplab_jax.visualize.figures import confusion_picture
from deeplab_jax.visualize.labels import legend

# A word that names a road, a tree or a cat, by its script.
WORDS = {
  'Latin with marks': 'čačak',
  'Greek': 'δρόμος',
  'Cyrillic': 'дорога',
  'Armenian': 'ծառ',
  'Georgian': 'გზა',
  'Hebrew': 'חתול',
  'Arabic': 'طريق',
  'Devanagari': 'सड़क',
  'Bengali': 'গাছ',
  'Gujarati': 'ઝાડ',
  'Gurmukhi': 'ਸੜਕ',
  'Tamil': 'மரம்',
  'Telugu': 'చెట్టు',
  'Kannada': 'ಮರ',
  'Malayalam': 'മരം',
  'Sinhala': 'ගස',
  'Thai': 'ถนน',
  'Lao': 'ຖະໜົນ',
  'Khmer': 'ផ្លូវ',
  'Burmese': 'လမ်း',
  'Amharic': 'መንገድ',
  'simplified Chinese': '马路',
  'traditional Chinese': '馬路',
  'Japanese': 'ねコ道',
  'Korean': '도로',
  'emoji': '🚗',
}


def drawn(text, size=24):
  """What is drawn: bool [height, width]."""
  width = round(lettering.text_length(text, size)) + 2 * size
  picture = Image.new('RGB', (width, 3 * size), (255, 255, 255))
  place = size, 1.5 * size
  draw = ImageDraw.Draw(picture)
  lettering.draw_text(draw, place, text, size, color=(0, 0, 0))
  return np.asarray(picture)[..., 0] < 128


def boxes(size=24):
  """What the fonts draw for a character that they lack, cut to its ink."""
  return [
    cut(drawn_by(lettering._open(font, size), '\U0010ffff'))
    for font in lettering._fonts()
  ]


def drawn_by(font, text):
  picture = Image.new('L', (100, 100), 255)
  ImageDraw.Draw(picture).text((30, 30), text, 0, font)
  return np.asarray(picture) < 128


def cut(ink):
  rows, columns = np.nonzero(ink.any(1))[0], np.nonzero(ink.any(0))[0]
  if not rows.size:
    return ink[:0, :0]
  return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@pytest.mark.parametrize('script', WORDS)
def test_every_character_is_drawn_and_none_as_a_box(script):
  missing = boxes()
  plain = ImageFont.load_default(24)
  for character in WORDS[script]:
    ink = cut(drawn(character))
    assert ink.any(), character
    assert not any(np.array_equal(ink, box) for box in missing), character
    ((font, _),) = lettering._runs(WORDS[script])
    assert lettering._has(font, character)
  # Pillow's own font alone draws a box at least once.
  box = cut(drawn_by(plain, '\U0010ffff'))
  alone = [cut(drawn_by(plain, character)) for character in WORDS[script]]
  assert any(np.array_equal(ink, box) for ink in alone)


@pytest.mark.parametrize('script', WORDS)
def test_legend_and_confusion_picture_show_the_word(script):
  word = WORDS[script]
  size = 16
  width = round(lettering.text_length(word, size))
  canvas = Image.new('RGB', (width + 20, 40), (255, 255, 255))
  lettering.draw_text(ImageDraw.Draw(canvas), (10, 20), word, size)
  wanted = cut(np.asarray(canvas)[..., 0] < 128)
  strip = legend([(word, None)], 0, size)
  np.testing.assert_array_equal(cut(strip[..., 0] < 128), wanted)
  picture = confusion_picture(np.ones((1, 1), int), [word])
  # Left of the row, after the title on its side; the cell is 44 pixels.
  corner = picture.shape[0] - 44 - 22
  name = picture[corner : corner + 44, 44:corner, 0] < 128
  assert abs(int(name.sum()) - int(wanted.sum())) <= 0.1 * wanted.sum()


def test_plain_text_looks_as_pillow_draws_it():
  font = ImageFont.load_default(13)
  for text in ('traffic light 12.5%', '<0.1%'):
    ours, pillows = (
      Image.new('RGB', (200, 30), (255, 255, 255)) for _ in range(2)
    )
    draw = ImageDraw.Draw(ours)
    lettering.draw_text(draw, (8, 15), text, 13, color=(0, 0, 0))
    ImageDraw.Draw(pillows).text((8, 15), text, (0, 0, 0), font, anchor='lm')
    np.testing.assert_array_equal(cut_ink(ours), cut_ink(pillows))
    assert lettering.text_length(text, 13) == font.getlength(text)


def cut_ink(picture):
  return cut(np.asarray(picture)[..., 0] < 128)


def test_one_font_draws_a_text_where_one_has_it_all():
  ((font, text),) = lettering._runs('路 (road) 12%')
  assert 'CJK' in font.name and text == '路 (road) 12%'


def test_words_of_one_script_stay_together_and_marks_with_their_letter():
  (font, words), (plain, rest) = lettering._runs('قط أسود 12.5%')
  assert 'Arabic' in font.name and plain is None
  assert (words, rest) == ('قط أسود', ' 12.5%')
  # U+0301 follows a letter of a font that has not both.
  texts = [text for _, text in lettering._runs('ก猫\u0301')]
  assert texts == ['ก', '猫\u0301']


def test_text_that_no_font_has_is_drawn_as_boxes():
  assert drawn('\U00013000').any()  # a hieroglyph


@pytest.mark.parametrize('align', ['left', 'center', 'right'])
def test_text_is_aligned_at_its_place(align):
  text = '道路 road'
  picture = Image.new('L', (400, 60), 255)
  draw = ImageDraw.Draw(picture)
  lettering.draw_text(draw, (200, 30), text, 20, align, color=0)
  columns = np.nonzero((np.asarray(picture) < 128).any(0))[0]
  width = lettering.text_length(text, 20)
  left = 200 - {'left': 0, 'center': width / 2, 'right': width}[align]
  assert abs(columns[0] - left) <= 3
  assert abs(columns[-1] - (left + width)) <= 3
