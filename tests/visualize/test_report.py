"""The page: what it loads, and what Chromium draws from the data in it."""

import base64
import html.parser
import io
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.visualize import report

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
NASTY = '</script><b onclick="x()">$a & \'co\' \u2028</b>'


class Page(html.parser.HTMLParser):
  """Tags with attributes, and texts with the tag that they follow."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.texts = [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))

  def handle_data(self, data):
    if data.strip():
      self.texts.append((self.tags[-1][0], data.strip()))

  def all(self, tag):
    return [attributes for name, attributes in self.tags if name == tag]

  def said(self, *tags):
    return [data for tag, data in self.texts if tag in tags]


def data_of(confusion=None, names=('sky', 'pole', 'ghost'), **changes):
  """What the driver gives, of a run with one evaluation."""
  shares = dict(zip(names, [0.8768, 0.0, None] + [0.5] * 200, strict=False))
  evaluation = {
    **{'name': 'val_whole', 'step': 300, 'images': 64, 'miou': 0.4567},
    **{'pixel_accuracy': 0.9, 'mean_accuracy': 0.8},
    **{'frequency_weighted_iou': 0.7, 'per_class_iou': shares},
    'per_class_accuracy': shares,
  }
  if confusion is not None:
    evaluation['confusion'] = np.asarray(confusion).tolist()
    evaluation['colors'] = ['#0000ff'] * len(names)
  empty = {'settings': {}, 'defaults': {}, 'sessions': [], 'curves': {}}
  return {**empty, 'evaluations': [evaluation], 'time': 1.8e9, **changes}


def test_a_page_is_one_file_that_loads_nothing_and_keeps_its_data():
  data = data_of(names=(NASTY, 'b', 'c'))
  text = report.page(NASTY, data)
  page = Page(text)
  tags = [tag for tag, _ in page.tags]
  assert tags.count('script') == 2 and not {'link', 'iframe', 'b'} & set(tags)
  assert not re.search(r'url\(|@import|src=|href=', text)
  assert set(re.findall('https?://[^"\']*', text)) == {
    'http://www.w3.org/2000/svg'  # a name, not an address
  }
  assert ('title', NASTY) in [(t, d) for t, d in page.texts]
  assert json.loads(page.said('script')[0]) == data


@pytest.fixture
def drawn(tmp_path):
  """Function (data) -> the page after Chromium ran its script."""
  if not CHROMIUM:
    pytest.skip('needs chromium')

  def draw(data, title='my run'):
    path = tmp_path / 'report.html'
    path.write_text(report.page(title, data), encoding='utf-8')
    command = [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu']
    command += [f'--user-data-dir={tmp_path}/profile', '--dump-dom']
    done = subprocess.run(
      [*command, path.as_uri()],
      capture_output=True,
      text=True,
      check=True,
      env=os.environ | {'HOME': str(tmp_path)},
    )
    body = done.stdout.partition('<main>')[2].partition('</main>')[0]
    return Page(body)

  return draw


def points_of(page):
  """Reads a curve back: the polyline in the units that its ticks say."""
  (line,) = page.all('polyline')
  places = np.reshape(line['points'].replace(',', ' ').split(), (-1, 2))
  ticks = {'x': [], 'y': []}
  labels = zip(page.all('text'), page.said('text'), strict=True)
  for attributes, data in labels:
    if data != 'step':
      axis = 'x' if attributes.get('class') else 'y'
      place = float(attributes[axis]) - (4 if axis == 'y' else 0)
      ticks[axis].append((place, float(data.replace(',', ''))))
  columns = []
  for axis, values in zip('xy', places.astype(float).T, strict=True):
    (a, at_a), (b, at_b) = ticks[axis][0], ticks[axis][-1]
    columns.append(at_a + (values - a) * (at_b - at_a) / (b - a))
  return np.stack(columns, 1), ticks


@pytest.mark.compiles
@pytest.mark.parametrize(
  'points',
  [
    [(20, 1.75), (40, 0.9), (60, 1.1), (300, 0.25)],
    [(20, 9e-5), (40, 3e-5)],
    [(1000, -3.0), (30000, 12345.0)],
    [(7, 0.0)],
  ],
)
def test_a_curve_goes_where_its_ticks_say(drawn, points):
  page = drawn(data_of(curves={'loss': points}))
  found, ticks = points_of(page)
  low, high = ticks['y'][0][1], ticks['y'][-1][1]
  assert low <= min(v for _, v in points) and high >= max(v for _, v in points)
  assert 2 <= len(ticks['y']) <= 7 and 2 <= len(ticks['x']) <= 7
  spans = np.array([points[-1][0], high - low])
  np.testing.assert_allclose(found / spans, points / spans, atol=1e-3)
  titles = page.said('title')
  assert [t.partition(': ')[0] for t in titles] == [
    f'step {step:,}' for step, _ in points
  ]
  values = [float(t.partition(': ')[2]) for t in titles]
  np.testing.assert_allclose(values, [v for _, v in points], rtol=1e-5)
  assert 'Not in metrics.jsonl: Validation mIoU, %; Learning rate;' in str(
    page.said('p')
  )


@pytest.mark.compiles
@pytest.mark.parametrize('count', [1, 2, 21, 60])
def test_a_confusion_matrix_shows_percent_of_the_true_class(drawn, count):
  rng = np.random.default_rng(0)
  confusion = rng.integers(0, 50, (count, count))
  confusion += 2000 * np.eye(count, dtype=int)
  confusion[-1] = 0  # a class without pixels
  names = [f'class {i}' for i in range(count)]
  page = drawn(data_of(confusion, names))
  cells = [cell for cell in page.all('b') if 'title' in cell]
  truth = confusion.sum(1, keepdims=True)
  shares = confusion / np.maximum(truth, 1)
  for i, j in np.ndindex(count, count):
    cell, share = cells[i * count + j], shares[i, j]
    words = f'class {i} seen as class {j}: {confusion[i, j]:,} pixels'
    assert cell['title'] == words
    shade = float(cell['style'].split(':')[1])
    assert shade == pytest.approx(share if i == j else share**0.5, abs=1e-3)
    kind = 'right' if i == j else 'wrong'
    assert cell['class'].split()[0] == (kind if truth[i] else 'none')
  bars = 2 * count  # of IoU and accuracy, in the table of classes
  numbers = [int(number) for number in page.said('b')[bars:]]
  shown = np.floor(100 * shares[shares >= 0.005] + 0.5).astype(int).tolist()
  assert numbers == (shown if count <= 40 else [])


@pytest.mark.compiles
def test_classes_have_colors_bars_and_pixels(drawn):
  confusion = [[2_999_990, 10, 0], [0, 1_000_000, 0], [0, 0, 0]]
  page = drawn(data_of(confusion, (NASTY, 'pole', 'ghost')), title=NASTY)
  assert NASTY in page.said('h1')
  cells = page.said('td', 'b', 'i')
  start = cells.index(NASTY)
  assert cells[start : start + 5] == [
    *(NASTY, '87.7', '87.7', '3,000,000', '75.0')
  ]
  ghost = cells.index('ghost')
  assert cells[ghost : ghost + 5] == ['ghost', '–', '–', '0', '0.0']
  assert [box['style'] for box in page.all('i')] == ['background: #0000ff'] * 3
  data = data_of()
  (evaluation,) = data['evaluations']
  evaluation['per_class_f1'] = evaluation['per_class_iou']
  evaluation['interval_95'] = {'miou': [0.4321, 0.48]}
  without = drawn(data)
  tiles = dict(zip(without.said('dt'), without.said('dd'), strict=True))
  assert tiles['mIoU, 95 % interval'] == '43.2–48.0'
  heads = without.said('th')
  assert 'F1 %' in heads and 'Precision %' not in heads
  assert 'IoU %' in heads and 'Pixels' not in heads and not without.all('i')
  assert 'No val_whole_confusion.csv: --mode=eval writes it.' in without.said(
    'p'
  )


@pytest.mark.compiles
def test_settings_sessions_and_tiles_are_told(drawn):
  machine = {
    **{'cpu': 'EPYC', 'cores': 2, 'devices': '1 × H200', 'hosts': 1},
    **{'system': 'Linux 6', 'versions': {'Python': '3.11', 'jax': '0.10.2'}},
  }
  start = 1_800_000_000.4
  ended = {'last_step': 40, 'stop': start + 3600 + 90}
  settings = {'train.steps': 60, 'model.backbone': 'resnet34', 'data.name': 'x'}
  page = drawn(
    data_of(
      curves={
        'images_per_second': [(20, 8.0), (40, 9.0)],
        'eval_miou': [(40, 0.456)],
      },
      settings={**settings, 'init_from': '', 'data.scale': [0.5, 2.0]},
      defaults={
        **{'train.steps': 300, 'model.backbone': 'resnet34', 'data.name': 'y'},
        **{'init_from': None, 'data.scale': [0.5, 2.0]},
      },
      sessions=[
        {'first_step': 1, 'start': start, **ended, **machine},
        {'first_step': 41, 'start': start, **machine},  # killed
      ],
    )
  )
  tiles = dict(zip(page.said('dt'), page.said('dd'), strict=True))
  assert tiles == {
    **{'mIoU': '45.7 %', 'Pixel accuracy': '90.0 %', 'Evaluated step': '300'},
    **{'Trained steps': '40 of 60', 'Images per second': '9'},
    'Time': '01:01:30',
  }
  cells = page.said('td')
  changed = cells.index('train.steps')
  assert cells[changed : changed + 6] == [
    *('train.steps', '60', '300', 'data.name', '"x"', '"y"')
  ]
  assert 'init_from' not in cells and 'data.scale' not in cells
  for words in (
    *('2027-01-15 08:00', '1 to 40', '41 to ?', '01:01:30', '?', 'EPYC'),
    '1 × H200',
  ):
    assert words in cells, words
  assert cells[-3:] == ['3.11', '0.10.2', 'Linux 6']
  assert 'resnet34 on x, report of 2027-01-15 08:00 UTC' in page.said('p')


@pytest.mark.compiles
def test_a_page_of_nothing_says_what_is_missing(drawn):
  page = drawn(data_of(evaluations=[]))
  lines = str(page.said('p'))
  for words in (
    'Not in metrics.jsonl: Validation mIoU, %; Training loss; Learning rate;',
    'The run has not been evaluated.',
    'Not known: the first checkpoint writes config.json.',
    'Not known: there is no sessions.json',
  ):
    assert words in lines, words


def picture_of(url):
  assert url.startswith('data:image/jpeg;base64,')
  return Image.open(io.BytesIO(base64.b64decode(url.partition(',')[2])))


def test_two_pictures_of_noise_stay_below_five_megabytes(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (2500, 3000, 3), np.uint8)
  Image.fromarray(noise).save(tmp_path / 'noise.png', compress_level=0)
  url = report.picture_url(tmp_path / 'noise.png')
  assert 2 * len(url) < 4_900_000
  width, height = picture_of(url).size
  assert 2_900_000 < width * height <= 3_000_000


def test_a_small_picture_keeps_its_size_and_its_colors(tmp_path):
  image = np.zeros((40, 60, 3), np.uint8)
  image[:, ::8] = (200, 40, 40)
  Image.fromarray(image).save(tmp_path / 'a.png')
  picture = picture_of(report.picture_url(tmp_path / 'a.png'))
  assert picture.size == (60, 40)
  lines = np.asarray(picture)[:, ::8].astype(int).mean((0, 1))
  assert np.abs(lines - (200, 40, 40)).max() < 25
