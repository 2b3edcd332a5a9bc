"""Two evaluations compared: constructed sets, and what is refused."""

import numpy as np
import pytest

from deeplab_jax.compare import compare
from deeplab_jax.evaluation import image_table, metrics
from deeplab_jax.evaluation.image_table import ImageTable
from deeplab_jax.runtime.errors import UserError

CLASSES = 'road', 'tree'
HALF = [[50, 50], [50, 50]]  # confusion of an image of 200 pixels


def write(workdir, confusions, name='val_whole', order=None, **changes):
  """Writes the table of an evaluation that counted these confusions."""
  counts = metrics.class_counts(np.array(confusions))
  names = np.array(changes.get('names', range(len(counts))), 'str')
  order = range(len(counts)) if order is None else order
  classes = changes.get('classes', CLASSES)
  (workdir / 'eval').mkdir(parents=True, exist_ok=True)
  table = ImageTable(names[order], classes, counts[order])
  image_table.write(workdir / 'eval' / f'{name}_images.csv', table)
  return str(workdir)


@pytest.fixture
def places(tmp_path):
  return tmp_path / 'a', tmp_path / 'b'


def refused(*inputs):
  with pytest.raises(UserError) as error:
    compare(inputs)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_a_run_against_itself_differs_by_0_with_p_1(places, capsys):
  workdir = write(places[0], [HALF, [[3, 0], [0, 5]], [[9, 1], [7, 2]]])
  found = compare([workdir, workdir])
  for key in ('miou', 'pixel_accuracy', 'mean_f1', 'per_class_iou'):
    assert not np.any(found[key]['difference'])
    assert np.all(found[key]['p'] == 1)
    assert not np.any(found[key]['interval_95'])
  output = capsys.readouterr().out
  assert 'The difference is not significant and may be chance: mIoU' in output


def test_a_better_run_is_found_in_another_order_of_the_images(places, capsys):
  # B has 10 pixels more of each class in each of 8 images: of 256 ways to swap
  # all and none are as large. IoU 50 / 150 and 60 / 140.
  a = write(places[0], [HALF] * 8)
  better = [[60, 40], [40, 60]]
  b = write(places[1], [better] * 8, order=[3, 1, 2, 0, 4, 7, 6, 5])
  found = compare([a, f'{b}/eval/val_whole.json'])
  miou = found['miou']
  assert (miou['a'], miou['b']) == pytest.approx((1 / 3, 3 / 7))
  assert miou['difference'] == pytest.approx(2 / 21)
  np.testing.assert_allclose(miou['interval_95'], 2 / 21)
  assert miou['p'] == pytest.approx(2 / 256, abs=0.003)
  assert miou['p'] == found['pixel_accuracy']['p']
  assert found['per_class_iou']['p'].tolist() == [miou['p']] * 2
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == f'A is {a}/eval/val_whole'
  assert lines[1] == f'B is {b}/eval/val_whole'
  assert lines[2] == '8 images'
  row = next(line for line in lines if line.startswith('mIoU'))
  shown = f'mIoU 33.33% 42.86% +9.52% +9.52% to +9.52% {miou["p"]:.4f}'
  assert ' '.join(row.split()) == shown
  assert len({len(line) for line in lines[3:-1]}) == 1
  assert lines[-1] == f'B is better: mIoU +9.52 points, p = {miou["p"]:.4f}.'


def test_images_are_paired_by_name(places):
  sure = [[100, 0], [0, 100]]
  a = write(places[0], [HALF, sure])
  b = write(places[1], [HALF, sure], order=[1, 0])
  assert compare([a, b])['miou']['interval_95'].tolist() == [0, 0]


def test_a_class_that_one_run_lacks_has_a_dash(places, capsys):
  a = write(places[0], [[[5, 0], [0, 0]]] * 2)
  b = write(places[1], [[[4, 1], [0, 0]]] * 2)
  compare([a, b])
  row = capsys.readouterr().out.partition('IoU of tree')[2].splitlines()[0]
  assert row.split() == ['-', '0.00%', '-', '-', 'to', '-', '-']


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'classes': ('road', 'car')}, 'class tree in the first, car in'),
    ({'names': ['0', 'c']}, 'image 1 in the first, c in the'),
    ({'names': ['0', '1', '2']}, 'image None in the first, 2 in the second'),
  ],
)
def test_evaluations_of_other_things_are_refused(places, changes, words):
  a = write(places[0], [HALF] * 2)
  b = write(places[1], [HALF] * len(changes.get('names', '12')), **changes)
  line = refused(a, b)
  assert words in line and 'evaluate both on the same images' in line
  ends = [f'{place}/eval/val_whole_images.csv' for place in (a, b)]
  assert line.startswith(f'{ends[0]} and {ends[1]} cannot')


def test_labels_of_other_pixels_are_refused(places):
  # As those of another split, or of crops, are.
  a = write(places[0], [HALF] * 2)
  b = write(places[1], [HALF, [[50, 49], [50, 50]]])
  words = 'in 1, pixels of road: 100 in the first, 99 in the second'
  assert words in refused(a, b)


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
  line = refused(a, f'{a}/nowhere')
  assert line.endswith('nowhere_images.csv: no such file')


def test_several_evaluations_of_a_workdir_are_listed(places):
  a = write(places[0], [HALF])
  write(places[0], [HALF], 'val_whole_flip')
  line = refused(a, a)
  assert f'name one: {a}/eval/val_whole_flip or {a}/eval/val_whole' in line
  compare([f'{a}/eval/val_whole', f'{a}/eval/val_whole_flip'])
