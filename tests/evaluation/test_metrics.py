"""The metrics against scikit-learn, hand formulas and a hand-made case."""

import doctest
import functools
import json
import re

import jax
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from properties import few

from deeplab_jax.evaluation import metrics

IGNORE = 255
NUM_CLASSES = 7
CLASSES = tuple(f'class {index}' for index in range(NUM_CLASSES))


def label_maps(seed, in_labels, in_predictions, void=0.2):
  """Random maps [2, 37, 53] that agree in about half of the pixels."""
  generator = np.random.default_rng(seed)
  shape = (2, 37, 53)
  labels = generator.choice(in_labels, shape)
  predictions = generator.choice(in_predictions, shape)
  agree = (generator.random(shape) < 0.5) & np.isin(labels, in_predictions)
  predictions = np.where(agree, labels, predictions)
  labels[generator.random(shape) < void] = IGNORE
  return labels.astype(np.uint8), predictions.astype(np.int32)


CASES = {
  'every class': (range(NUM_CLASSES), range(NUM_CLASSES)),
  'class 6 nowhere': (range(6), range(6)),
  'class 2 never predicted': (range(NUM_CLASSES), (0, 1, 3, 4, 5, 6)),
  'class 3 only predicted': ((0, 1, 2, 4, 5, 6), range(NUM_CLASSES)),
  'few classes': ((1, 4), (1, 5)),
  'nothing right': ((0, 1), (2, 3)),
}


@pytest.fixture(params=CASES)
def maps(request):
  return label_maps(len(request.param), *CASES[request.param])


def confusion_of(labels, predictions, num_classes=NUM_CLASSES):
  count = jax.jit(metrics.confusion_matrix, static_argnums=(2, 3))
  return np.asarray(count(labels, predictions, num_classes, IGNORE))


def counted(maps):
  labels, predictions = maps
  return labels[labels != IGNORE], predictions[labels != IGNORE]


def test_confusion_equals_scikit_learn(maps):
  confusion = confusion_of(*maps)
  expected = sklearn.metrics.confusion_matrix(
    *counted(maps), labels=range(NUM_CLASSES)
  )
  assert confusion.dtype == np.int32
  np.testing.assert_array_equal(confusion, expected)


def test_metrics_equal_scikit_learn(maps):
  labels, predictions = counted(maps)
  result = metrics.compute_metrics(
    confusion_of(*maps).astype(np.int64), CLASSES
  )
  near = functools.partial(pytest.approx, rel=0, abs=1e-9)

  occurring = np.union1d(labels, predictions)
  iou = sklearn.metrics.jaccard_score(
    labels, predictions, labels=occurring, average=None
  )
  recall = sklearn.metrics.recall_score(
    labels, predictions, labels=np.unique(labels), average=None
  )
  assert [result['per_class_iou'][CLASSES[c]] for c in occurring] == near(iou)
  assert [
    result['per_class_accuracy'][CLASSES[c]] for c in np.unique(labels)
  ] == near(recall)
  assert result['miou'] == near(iou.mean())
  assert result['mean_accuracy'] == near(recall.mean())
  assert result['pixel_accuracy'] == near(
    sklearn.metrics.accuracy_score(labels, predictions)
  )
  weighted = sklearn.metrics.jaccard_score(
    labels, predictions, labels=occurring, average='weighted'
  )
  assert result['frequency_weighted_iou'] == near(weighted)


@pytest.mark.filterwarnings('ignore:y_pred contains classes')
def test_mean_accuracy_equals_balanced_accuracy(maps):
  result = metrics.compute_metrics(confusion_of(*maps), CLASSES)
  expected = sklearn.metrics.balanced_accuracy_score(*counted(maps))
  assert result['mean_accuracy'] == pytest.approx(expected, rel=0, abs=1e-9)


def test_metrics_equal_sums_over_pixels(maps):
  labels, predictions = counted(maps)
  result = metrics.compute_metrics(confusion_of(*maps), CLASSES)
  ious, accuracies, weighted = {}, {}, 0.0
  for index, name in enumerate(CLASSES):
    truth, found = labels == index, predictions == index
    both, either = (truth & found).sum(), (truth | found).sum()
    ious[name] = both / either if either else None
    accuracies[name] = both / truth.sum() if truth.any() else None
    weighted += truth.mean() * (ious[name] or 0)
  near = functools.partial(pytest.approx, rel=0, abs=1e-9)
  for key, expected in (('iou', ious), ('accuracy', accuracies)):
    found = result[f'per_class_{key}']
    assert found.keys() == expected.keys()
    for name, value in expected.items():
      assert found[name] == (None if value is None else near(value))
  assert result['frequency_weighted_iou'] == near(weighted)
  assert result['pixel_accuracy'] == near((labels == predictions).mean())


def test_metrics_of_a_case_made_by_hand():
  labels = np.array([[0, 0, 0, 1], [1, 1, 1, 255]], np.uint8)
  predictions = np.array([[0, 0, 1, 1], [1, 1, 2, 0]])
  confusion = confusion_of(labels, predictions, 4)
  np.testing.assert_array_equal(
    confusion, [[2, 1, 0, 0], [0, 3, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
  )
  result = metrics.compute_metrics(confusion, ('a', 'b', 'c', 'd'))
  assert list(result) == [
    'miou',
    'pixel_accuracy',
    'mean_accuracy',
    'frequency_weighted_iou',
    'per_class_iou',
    'per_class_accuracy',
  ]
  assert result['per_class_iou'] == {'a': 2 / 3, 'b': 3 / 5, 'c': 0, 'd': None}
  assert result['per_class_accuracy'] == {
    'a': 2 / 3,
    'b': 3 / 4,
    'c': None,
    'd': None,
  }
  assert result['miou'] == pytest.approx((2 / 3 + 3 / 5) / 3)
  assert result['pixel_accuracy'] == 5 / 7
  assert result['mean_accuracy'] == pytest.approx((2 / 3 + 3 / 4) / 2)
  assert result['frequency_weighted_iou'] == pytest.approx((2 + 12 / 5) / 7)


def test_labels_and_predictions_outside_the_classes_do_not_count():
  labels = np.array([0, 2, -1, 3, 200, 1, 1], np.int32)
  predictions = np.array([0, 2, 0, 0, 0, 3, -1], np.int32)
  confusion = confusion_of(labels, predictions, 3)
  np.testing.assert_array_equal(confusion, np.diag([1, 0, 1]))


def test_ignore_label_may_be_one_of_the_classes():
  labels = np.array([0, 0, 1, 1])
  confusion = metrics.confusion_matrix(labels, np.array([0, 1, 0, 1]), 2, 0)
  np.testing.assert_array_equal(confusion, [[0, 0], [1, 1]])


def test_confusion_counts_past_two_to_the_24th_pixel_exactly():
  pixels = 2**24 + 5  # float32 stops counting at 2^24
  labels = np.zeros(pixels, np.uint8)
  assert confusion_of(labels, labels, 2)[0, 0] == pixels


def test_confusions_of_parts_add_up_to_the_whole(maps):
  parts = sum(confusion_of(*part) for part in zip(*maps, strict=True))
  np.testing.assert_array_equal(parts, confusion_of(*maps))


def seed_metrics(label, prediction):
  """The definitions of the seed's `metrics.py`, mask by mask, on one image.

  Void pixels were taken out before.
  """
  in_label = np.unique(label)
  accuracies = [(prediction[label == c] == c).mean() for c in in_label]
  ious, weighted = [], []
  for c in np.union1d(in_label, np.unique(prediction)):
    truth, found = label == c, prediction == c
    if not truth.any() or not found.any():
      continue
    iou = (truth & found).sum() / (truth | found).sum()
    ious.append(iou)
    weighted.append(truth.sum() * iou)
  return {
    'per_image_miou': np.sum(ious) / len(in_label),
    'per_image_pixel_accuracy': (label == prediction).mean(),
    'per_image_mean_accuracy': np.mean(accuracies),
    'per_image_frequency_weighted_iou': np.sum(weighted) / label.size,
  }


def test_metrics_of_images_equal_the_seeds_definitions(maps):
  labels, predictions = maps
  confusions = np.stack(
    [confusion_of(*pair) for pair in zip(*maps, strict=True)]
  )
  result = metrics.image_metrics(confusions)
  for index, (label, prediction) in enumerate(
    zip(labels, predictions, strict=True)
  ):
    expected = seed_metrics(label[label != IGNORE], prediction[label != IGNORE])
    assert set(result) == set(expected)
    for key, value in expected.items():
      assert result[key][index] == pytest.approx(value, rel=0, abs=1e-12), key


def test_class_that_is_predicted_alone_divides_no_image():
  # Image 0 sees class 2 where there is none: the whole set's mIoU counts it as
  # a class of IoU 0, the image's own does not.
  confusions = np.array([[[2, 0, 2], [0, 4, 0], [0, 0, 0]]])
  ours = metrics.compute_metrics(confusions[0], ('a', 'b', 'c'))['miou']
  assert ours == pytest.approx((0.5 + 1 + 0) / 3)
  theirs = metrics.image_metrics(confusions)['per_image_miou']
  assert theirs.tolist() == [pytest.approx((0.5 + 1) / 2)]


def test_average_leaves_out_images_without_a_counted_pixel():
  confusions = np.zeros((3, 2, 2), int)
  confusions[0] = [[3, 1], [0, 0]]
  confusions[2] = [[1, 0], [0, 1]]
  found = metrics.image_metrics(confusions)
  rows = [{key: v[i] for key, v in found.items()} for i in range(3)]
  assert np.isnan(rows[1]['per_image_miou'])
  averages = metrics.average(rows)
  assert averages['per_image_miou'] == pytest.approx((3 / 4 + 1) / 2)
  assert averages['per_image_mean_accuracy'] == pytest.approx((3 / 4 + 1) / 2)
  assert metrics.average(rows[1:2]) == dict.fromkeys(averages)


def test_table_sets_averages_over_images_apart():
  confusion = np.array([[3, 1], [0, 4]])
  whole = metrics.compute_metrics(confusion, ('a', 'b'))
  lines = metrics.format_table(
    {
      **whole,
      'per_image_miou': 0.5,
      'per_image_pixel_accuracy': 0.25,
      'per_image_mean_accuracy': None,
      'per_image_frequency_weighted_iou': 0.125,
    }
  ).splitlines()
  heading = lines.index("averaged over images (the seed's)")
  assert lines[: heading - 1] == metrics.format_table(whole).splitlines()
  assert [line.rsplit(maxsplit=1) for line in lines[heading + 1 :]] == [
    ['mIoU', '50.00'],
    ['pixel accuracy', '25.00'],
    ['mean accuracy', '-'],
    ['frequency weighted IoU', '12.50'],
  ]


def test_metrics_of_no_pixels_are_none_and_valid_json():
  confusion = np.zeros((3, 3), np.int64)
  result = metrics.compute_metrics(confusion, ('a', 'b', 'c'))
  nothing = dict.fromkeys('abc')
  assert result == {
    'miou': None,
    'pixel_accuracy': None,
    'mean_accuracy': None,
    'frequency_weighted_iou': None,
    'per_class_iou': nothing,
    'per_class_accuracy': nothing,
  }
  assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_metrics_are_python_floats_that_json_can_write(maps):
  result = metrics.compute_metrics(confusion_of(*maps), CLASSES)
  assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_counts_beyond_int32_are_not_cut():
  confusion = np.array([[3 * 10**9, 10**9], [0, 4 * 10**9]], np.int64)
  result = metrics.compute_metrics(confusion, ('a', 'b'))
  assert result['pixel_accuracy'] == pytest.approx(7 / 8, abs=1e-12)
  assert result['per_class_iou']['a'] == pytest.approx(3 / 4, abs=1e-12)


@pytest.mark.parametrize(
  ('confusion', 'classes'),
  [
    (np.zeros((2, 3), np.int64), ('a', 'b')),
    (np.zeros((2, 2), np.int64), ('a', 'b', 'c')),
    (np.zeros((2, 2), np.float32), ('a', 'b')),
    (np.zeros((2, 2), np.int64), ('a', 'a')),
  ],
)
def test_unusable_confusions_are_refused(confusion, classes):
  with pytest.raises(ValueError, match=r'must|differ'):
    metrics.compute_metrics(confusion, classes)


def test_maps_of_different_shape_are_refused():
  with pytest.raises(ValueError, match=r'\(2, 3\), \(3, 2\)'):
    metrics.confusion_matrix(np.zeros((2, 3)), np.zeros((3, 2)), 2, IGNORE)


def test_table_shows_every_class_aligned_with_a_dash_for_the_absent():
  confusion = np.array([[2, 1, 0, 0], [0, 3, 1, 0], [0] * 4, [0] * 4])
  names = ('sky', 'a class with a rather long name', 'c', 'd')
  table = metrics.format_table(metrics.compute_metrics(confusion, names))
  lines = table.splitlines()
  rows = [line.rsplit(maxsplit=2) for line in lines[2:6]]
  assert rows == [
    ['sky', '66.67', '66.67'],
    ['a class with a rather long name', '60.00', '75.00'],
    ['c', '0.00', '-'],
    ['d', '-', '-'],
  ]
  assert len({len(line) for line in lines[:7]}) == 1
  summary = dict(line.rsplit(maxsplit=1) for line in lines[7:])
  assert summary == {
    'mIoU': '42.22',
    'pixel accuracy': '71.43',
    'mean accuracy': '70.83',
    'frequency weighted IoU': '62.86',
  }
  assert len({len(line) for line in lines[7:]}) == 1


def test_examples_in_the_docstrings_hold():
  assert doctest.testmod(metrics) == (0, 2)


@pytest.mark.parametrize('shape', [(3, 3), (2, 3, 4)])
def test_matrices_of_images_of_another_shape_are_refused(shape):
  words = re.escape(f'must be [N, C, C], got {list(shape)}')
  with pytest.raises(ValueError, match=words):
    metrics.image_metrics(np.zeros(shape, int))


pixels = st.lists(
  st.tuples(st.sampled_from([0, 1, 2, 3, 9, IGNORE]), st.integers(-1, 4)),
  max_size=24,
)


@few
@given(pixels)
def test_metrics_of_any_pixels_are_those_of_loops(pairs):
  counted = [(t, p) for t, p in pairs if t < 4 and 0 <= p < 4]
  padded = np.array([*pairs, *[(IGNORE, 0)] * (24 - len(pairs))])  # one shape
  confusion = confusion_of(*padded.T, 4)
  ious, accuracies, weighted = [], [], 0.0
  for c in range(4):
    hits = sum(t == p == c for t, p in counted)
    either = sum(c in (t, p) for t, p in counted)
    truth = sum(t == c for t, _ in counted)
    ious += [hits / either] if either else []
    accuracies += [hits / truth] if truth else []
    weighted += truth * hits / max(either, 1) / max(len(counted), 1)
  right = sum(t == p for t, p in counted)
  result = metrics.compute_metrics(confusion, 'abcd')
  near = functools.partial(pytest.approx, rel=0, abs=1e-12)
  if not counted:
    assert result['miou'] is result['pixel_accuracy'] is None
    return
  assert result['miou'] == near(sum(ious) / len(ious))
  assert result['mean_accuracy'] == near(sum(accuracies) / len(accuracies))
  assert result['pixel_accuracy'] == near(right / len(counted))
  assert result['frequency_weighted_iou'] == near(weighted)
