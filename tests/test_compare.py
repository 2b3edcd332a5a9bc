"""Two evaluations compared: constructed sets, and what is refused."""

import json

import numpy as np
import pytest

from deeplab_jax import compare
from deeplab_jax.evaluation import image_table, metrics
from deeplab_jax.evaluation.image_table import ImageTable
from deeplab_jax.runtime.errors import UserError

CLASSES = 'road', 'tree'
HALF = [[50, 50], [50, 50]]  # confusion of an image of 200 pixels


def write(workdir, confusions, name='val_whole', order=None, **changes):
  """Writes the files of an evaluation that counted these confusions."""
  confusions = np.array(confusions)
  counts = metrics.class_counts(confusions)
  values = {'names': [f'image_{i}' for i in range(len(counts))]}
  values |= {k: changes.pop(k) for k in ('names', 'classes') if k in changes}
  mious = metrics.image_metrics(confusions)['per_image_miou']
  table = {'classes': CLASSES, 'counts': counts, 'mious': mious, **values}
  result = {
    **metrics.compute_metrics(confusions.sum(0), table['classes']),
    **{
      'step': 8,
      'split': 'val',
      'protocol': 'whole',
      'flip': False,
      **changes,
    },
  }
  if order:
    for key in ('names', 'counts', 'mious'):
      table[key] = [table[key][i] for i in order]
    table['counts'] = np.array(table['counts'])
  (workdir / 'eval').mkdir(parents=True, exist_ok=True)
  path = workdir / 'eval' / name
  image_table.write(f'{path}_images.csv', ImageTable(**table))
  path.with_name(f'{name}.json').write_text(json.dumps(result))
  return str(workdir)


@pytest.fixture
def places(tmp_path):
  return tmp_path / 'a', tmp_path / 'b'


def refused(*inputs):
  with pytest.raises(UserError) as error:
    compare.compare(None, inputs)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_a_run_against_itself_differs_by_0_with_p_1(places, capsys):
  workdir = write(places[0], [HALF, [[3, 0], [0, 5]], [[9, 1], [7, 2]]])
  found = compare.compare(None, [workdir, workdir])
  for key in ('miou', 'pixel_accuracy', 'mean_f1', 'per_class_iou'):
    assert not np.any(found[key]['difference'])
    assert np.all(found[key]['p'] == 1) and not np.any(
      found[key]['interval_95']
    )
  output = capsys.readouterr().out
  assert 'The difference is not significant and may be chance: mIoU' in output
  assert 'B is better on 0 images, A on 0' in output


def test_a_better_run_is_found_by_all_swaps_of_few_images(places, capsys):
  # B has 10 pixels more of each class in each of 8 images: of 256 ways to swap
  # all and none are as large. IoU 50 / 150 and 60 / 140.
  a = write(places[0], [HALF] * 8)
  better = [[60, 40], [40, 60]]
  b = write(places[1], [better] * 8, order=[3, 1, 2, 0, 4, 7, 6, 5], step=9)
  found = compare.compare(
    places[0] / 'compared', [a, f'{b}/eval/val_whole.json']
  )
  miou = found['miou']
  assert (miou['a'], miou['b']) == pytest.approx((1 / 3, 3 / 7))
  assert miou['difference'] == pytest.approx(2 / 21)
  np.testing.assert_allclose(miou['interval_95'], 2 / 21)
  assert miou['p'] == found['pixel_accuracy']['p'] == 2 / 256
  assert found['per_class_iou']['p'].tolist() == [2 / 256] * 2
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == f'A is {a}/eval/val_whole: step 8, flip False'
  assert lines[1] == f'B is {b}/eval/val_whole: step 9, flip False'
  assert lines[2] == 'split val, protocol whole, images 8'
  row = next(line for line in lines if line.startswith('mIoU'))
  shown = 'mIoU 33.33% 42.86% +9.52% +9.52% to +9.52% 0.0078'
  assert ' '.join(row.split()) == shown
  assert len({len(line) for line in lines[3:14]}) == 1
  assert 'B is better: mIoU +9.52 points, p = 0.0078.' in lines
  assert 'B is better on 8 images, A on 0, by the mIoU of each.' in lines
  saved = json.loads((places[0] / 'compared' / 'compare.json').read_text())
  assert saved['miou']['p'] == 2 / 256
  assert saved['per_image_miou']['image_0'] == pytest.approx([1 / 3, 3 / 7])


def test_the_images_that_differ_most_are_named_first(places, capsys):
  sure, half, void = [[100, 0], [0, 100]], HALF, [[0, 0], [0, 0]]
  a = write(places[0], [half, half, sure, void])
  b = write(places[1], [half, sure, [[90, 10], [10, 90]], void])
  compare.compare(None, [a, b])
  output = capsys.readouterr().out
  assert 'B is better on 1 images, A on 1, by' in output
  first = (
    'differ most: image_1 33.33 to 100.00, image_2 100.00 to 81.82, image_0'
  )
  assert first in output and 'image_3' not in output
  assert 'not significant' in output


def test_a_class_that_one_run_lacks_has_a_dash(places, capsys):
  a = write(places[0], [[[5, 0], [0, 0]]] * 2)
  b = write(places[1], [[[4, 1], [0, 0]]] * 2)
  compare.compare(places[0], [a, b])
  row = capsys.readouterr().out.partition('IoU of tree')[2].splitlines()[0]
  assert row.split() == ['-', '0.00%', '-', '-', 'to', '-', '-']
  saved = json.loads((places[0] / 'compare.json').read_text())
  assert saved['per_class_iou']['a'] == [1.0, None]


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'split': 'test'}, 'split val in the first, test in the second'),
    ({'protocol': 'center_crop'}, 'protocol whole in the first, center_crop'),
    ({'crop_size': [9, 9]}, 'crop_size None in the first, [9, 9] in'),
    ({'classes': ('road', 'car')}, 'class tree in the first, car in'),
    ({'names': ['image_0', 'c']}, 'image image_0 in the first, c in the'),
  ],
)
def test_evaluations_of_other_things_are_refused(places, changes, words):
  a = write(places[0], [HALF] * 2)
  b = write(places[1], [HALF] * 2, **changes)
  line = refused(a, b)
  assert words in line and 'evaluate both on the same images' in line
  assert line.startswith(f'{a}/eval/val_whole and {b}/eval/val_whole cannot')


def test_labels_of_other_pixels_are_refused(places):
  a = write(places[0], [HALF] * 2)
  b = write(places[1], [HALF, [[50, 49], [50, 50]]])
  words = 'in image_1, pixels of road: 100 in the first, 99 in the second'
  assert words in refused(a, b)


def test_more_images_on_one_side_are_refused(places):
  a, b = write(places[0], [HALF] * 2), write(places[1], [HALF] * 3)
  assert 'image None in the first, image_2 in the second' in refused(a, b)


@pytest.mark.parametrize('count', [0, 1, 3])
def test_another_number_of_runs_is_refused(count):
  words = 'takes two workdirs, or two evaluations as WORKDIR/eval/NAME, got'
  assert f'{words} {count}' in refused(*['a'] * count)


def test_missing_files_are_named_with_the_command_that_makes_them(places):
  a = write(places[0], [HALF])
  places[1].mkdir()
  line = refused(a, str(places[1]))
  assert line.startswith(f'{places[1]}/eval/val_whole_images.csv: no such file')
  assert line.endswith(f'--mode=eval --workdir={places[1]}')
  line = refused(a, f'{a}/eval/val_whle')
  assert 'there is val_whole_images.csv' in line
  (places[0] / 'eval' / 'val_whole.json').unlink()
  line = refused(a, a)
  assert line.startswith(f'{a}/eval/val_whole.json: no such file')


def test_several_evaluations_of_a_workdir_are_listed(places):
  a = write(places[0], [HALF])
  write(places[0], [HALF], 'val_whole_flip')
  line = refused(a, a)
  assert f'name one: {a}/eval/val_whole_flip or {a}/eval/val_whole' in line
  compare.compare(None, [f'{a}/eval/val_whole', f'{a}/eval/val_whole_flip'])


@pytest.mark.parametrize(
  'text', ['{', '[]', '{}', '{"miou": null}', '{"miou": 1}']
)
def test_metrics_that_do_not_belong_to_the_table_are_refused(places, text):
  a = write(places[0], [HALF])
  (places[0] / 'eval' / 'val_whole.json').write_text(text)
  line = refused(a, a)
  assert line.startswith(f'{a}/eval/val_whole.json: ')
  assert line.endswith('; --mode=eval writes both again')
