"""The metrics against scikit-learn, hand formulas and a hand-made case."""

import doctest
import functools
import json

import jax
import numpy as np
import pytest
import scipy.ndimage
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
  found = np.unique(predictions)
  precision = sklearn.metrics.precision_score(
    labels, predictions, labels=found, average=None
  )
  f1 = sklearn.metrics.f1_score(
    labels, predictions, labels=occurring, average=None
  )
  of_class = result['per_class_precision'], result['per_class_f1']
  assert [of_class[0][CLASSES[c]] for c in found] == near(precision)
  assert [of_class[1][CLASSES[c]] for c in occurring] == near(f1)
  assert result['miou'] == near(iou.mean())
  assert result['mean_accuracy'] == near(recall.mean())
  assert result['mean_precision'] == near(precision.mean())
  assert result['mean_f1'] == near(f1.mean())
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
  precisions, dice = {}, {}
  for index, name in enumerate(CLASSES):
    truth, found = labels == index, predictions == index
    both, either = (truth & found).sum(), (truth | found).sum()
    ious[name] = both / either if either else None
    accuracies[name] = both / truth.sum() if truth.any() else None
    precisions[name] = both / found.sum() if found.any() else None
    total = truth.sum() + found.sum()
    dice[name] = 2 * both / total if total else None
    weighted += truth.mean() * (ious[name] or 0)
  near = functools.partial(pytest.approx, rel=0, abs=1e-9)
  for key, expected in (
    ('iou', ious),
    ('accuracy', accuracies),
    ('precision', precisions),
    ('f1', dice),
  ):
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
    'frequency_weighted_iou',
    'mean_accuracy',
    'mean_precision',
    'mean_f1',
    'per_class_iou',
    'per_class_accuracy',
    'per_class_precision',
    'per_class_f1',
  ]
  assert result['per_class_iou'] == {'a': 2 / 3, 'b': 3 / 5, 'c': 0, 'd': None}
  assert result['per_class_accuracy'] == {
    'a': 2 / 3,
    'b': 3 / 4,
    'c': None,
    'd': None,
  }
  assert result['per_class_precision'] == {'a': 1, 'b': 0.75, 'c': 0, 'd': None}
  assert result['per_class_f1'] == {'a': 0.8, 'b': 0.75, 'c': 0, 'd': None}
  assert result['mean_precision'] == pytest.approx(1.75 / 3)
  assert result['mean_f1'] == pytest.approx(1.55 / 3)
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
  result = metrics.image_metrics(metrics.class_counts(confusions))
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
  counts = metrics.class_counts(confusions)
  theirs = metrics.image_metrics(counts)['per_image_miou']
  assert theirs.tolist() == [pytest.approx((0.5 + 1) / 2)]


def test_average_leaves_out_images_without_a_counted_pixel():
  confusions = np.zeros((3, 2, 2), int)
  confusions[0] = [[3, 1], [0, 0]]
  confusions[2] = [[1, 0], [0, 1]]
  found = metrics.image_metrics(metrics.class_counts(confusions))
  assert np.isnan(found['per_image_miou'][1])
  for key in ('per_image_miou', 'per_image_mean_accuracy'):
    assert metrics.mean(found[key]) == pytest.approx((3 / 4 + 1) / 2)
    assert metrics.mean(found[key][1:2]) is None


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
    'frequency_weighted_iou': None,
    'mean_accuracy': None,
    'mean_precision': None,
    'mean_f1': None,
    'per_class_iou': nothing,
    'per_class_accuracy': nothing,
    'per_class_precision': nothing,
    'per_class_f1': nothing,
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
  titles = lines[0].split()
  assert titles[0::2] == ['class', '%', '%', '%', '%']
  assert titles[1::2] == ['IoU', 'accuracy', 'precision', 'F1']
  rows = [line.rsplit(maxsplit=4) for line in lines[2:6]]
  assert rows == [
    ['sky', '66.67', '66.67', '100.00', '80.00'],
    ['a class with a rather long name', '60.00', '75.00', '75.00', '75.00'],
    ['c', '0.00', '-', '0.00', '0.00'],
    ['d', '-', '-', '-', '-'],
  ]
  assert len({len(line) for line in lines[:7]}) == 1
  summary = dict(line.rsplit(maxsplit=1) for line in lines[7:])
  assert summary == {
    'mIoU': '42.22',
    'pixel accuracy': '71.43',
    'mean accuracy': '70.83',
    'frequency weighted IoU': '62.86',
    'mean precision': '58.33',
    'mean F1': '51.67',
  }
  assert len({len(line) for line in lines[7:]}) == 1


def test_examples_in_the_docstrings_hold():
  assert doctest.testmod(metrics) == (0, 2)


def test_table_of_an_older_evaluation_has_the_columns_that_it_knew():
  confusion = np.array([[3, 1], [0, 4]])
  whole = metrics.compute_metrics(confusion, ('a', 'b'))
  newer = 'precision', 'f1'
  older = {k: v for k, v in whole.items() if not k.endswith(newer)}
  lines = metrics.format_table(older).splitlines()
  assert lines[0].split() == ['class', 'IoU', '%', 'accuracy', '%']
  assert lines[-1].startswith('frequency weighted IoU')


def test_table_ends_with_the_interval_if_there_is_one():
  whole = metrics.compute_metrics(np.array([[3, 1], [0, 4]]), ('a', 'b'))
  ends = {'miou': [0.5, 0.75], 'pixel_accuracy': [0.8, 0.9]}
  lines = metrics.format_table({**whole, 'interval_95': ends}).splitlines()
  assert lines[-1] == '95 % interval of mIoU: 50.00 to 75.00'
  bare = metrics.format_table({**whole, 'interval_95': {}})
  assert bare == metrics.format_table(whole)


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


def boundary_by_erosion(label, prediction, classes):
  """As Cheng et al. do it: a mask without what is left of it by d erosions."""
  reach = max(1, round(0.02 * np.hypot(*label.shape)))
  void = label == IGNORE
  regions = []
  for classes_of in (label, prediction):
    masks = [(classes_of == c) & ~void for c in range(classes)]
    inner = [
      scipy.ndimage.binary_erosion(
        mask | void, np.ones((3, 3)), iterations=reach, border_value=0
      )
      for mask in masks
    ]
    regions.append([m & ~i for m, i in zip(masks, inner, strict=True)])
  return [
    [(g & p).sum() for g, p in zip(*regions, strict=True)],
    [(g | p).sum() for g, p in zip(*regions, strict=True)],
  ]


def blobs(shape, classes, void, seed):
  """Label and prediction with regions of many pixels, and void at edges."""
  rng = np.random.default_rng(seed)
  noise = scipy.ndimage.gaussian_filter(
    rng.random((classes, *shape)), (0, 6, 6)
  )
  prediction = np.argmax(noise + rng.random((classes, 1, 1)) / 99, 0)
  label = np.roll(np.argmax(noise, 0), (2, -1), (0, 1))
  label[rng.random(shape) < void] = IGNORE
  label[9:12] = IGNORE if void else label[9:12]
  return label.astype(np.uint8), prediction.astype(np.uint8)


@pytest.fixture(scope='module')
def count_boundaries():
  """Counts of images that are padded to 100x140, all at once."""

  @jax.jit
  @jax.vmap
  def count(label, prediction, size):
    return metrics.boundary_counts(label, prediction, size, 4, IGNORE)

  def run(pairs):
    labels = np.full((len(pairs), 100, 140), IGNORE, np.uint8)
    predictions, sizes = np.zeros_like(labels), []
    for i, (label, prediction) in enumerate(pairs):
      place = i, slice(label.shape[0]), slice(label.shape[1])
      labels[place], predictions[place] = label, prediction
      sizes.append(label.shape)
    return np.asarray(count(labels, predictions, np.array(sizes, np.int32)))

  return run


def test_boundary_regions_are_those_of_erosions(count_boundaries):
  # 45x60 has a distance of 1.5 pixels, rounded to 2 as in the paper's code.
  shapes = [(100, 140), (45, 60), (3, 4), (1, 1), (70, 9), (100, 140)]
  pairs = [blobs(shape, 4, 0.02 * (i % 2), i) for i, shape in enumerate(shapes)]
  expected = np.array([boundary_by_erosion(*pair, 4) for pair in pairs])
  np.testing.assert_array_equal(count_boundaries(pairs), expected)
  assert (expected[0, 0] < expected[0, 1]).all()
  result = metrics.compute_metrics(
    np.eye(4, dtype=int), 'abcd', expected.sum(0)
  )
  iou = expected.sum(0)[0] / expected.sum(0)[1]
  found = list(result['per_class_boundary_iou'].values())
  assert found == pytest.approx(iou, rel=0, abs=1e-12)
  assert result['mean_boundary_iou'] == pytest.approx(iou.mean())
  assert 'boundary %' in metrics.format_table(result).splitlines()[0]


def test_what_is_predicted_at_void_moves_no_boundary(count_boundaries):
  label, _ = blobs((100, 140), 4, 0.05, 7)
  void = label == IGNORE
  right = np.where(void, 3, label).astype(np.uint8)
  other = np.where(void, 0, label).astype(np.uint8)
  all_void = np.full_like(label, IGNORE)
  counts = count_boundaries([(label, right), (label, other), (all_void, other)])
  assert counts[0, 0].tolist() == counts[0, 1].tolist() == counts[1, 1].tolist()
  assert counts[0].all() and not counts[2].any()


def test_the_boundary_of_a_class_that_fills_the_image_is_its_frame():
  maps = np.zeros((20, 30), np.uint8)
  counts = metrics.boundary_counts(maps, maps, np.array([20, 30]), 1, IGNORE)
  assert counts.tolist() == [[96], [96]]
