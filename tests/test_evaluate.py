"""Evaluation against a plain loop over the images."""

import contextlib
import functools
import io
import json
import logging
import shutil
import tarfile
import types

import jax
import numpy as np
import pytest
from miniature import make_config, share_programs
from PIL import Image

from deeplab_jax import build, deeplab_v3, evaluate, ops
from deeplab_jax.benchmark.timing import compilations
from deeplab_jax.data import images, transforms
from deeplab_jax.data.buckets import FILLER
from deeplab_jax.evaluation import image_table, metrics
from deeplab_jax.evaluation.protocols import (
  PROTOCOLS,
  CenterCrop,
  Protocol,
  SlidingWindow,
)
from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.visualize import labels
from deeplab_jax.weights.checkpoints import Checkpoints

pytestmark = pytest.mark.compiles


def read_variables(workdir):
  with Checkpoints(workdir) as saved:
    return saved.open(saved.latest_step).variables


_PLAIN = {}


def plain_predictions(config, dataset, variables, size=None, transform=None):
  """Name, label and prediction of one image at a time, padded to `size`."""
  model = build.make_model(config, dataset.info.num_classes)
  plain = _PLAIN.setdefault(
    repr(model), jax.jit(functools.partial(model.apply, train=False))
  )
  apply = functools.partial(plain, variables)
  for record in dataset.source(config.data.eval_split):
    image = images.decode_image(record['image'])
    label = images.decode_label(record['label'])
    if transform:
      image, label = transform(image, label, None)
    height, width = label.shape
    if size:
      padded = np.full((*size, 3), transforms.MEAN_COLOR, np.uint8)
      padded[:height, :width] = image
      logits = apply(padded[None], sizes=np.array([[height, width]]))
    else:
      logits = apply(image[None], sizes=None)
    logits = np.asarray(logits)[0, :height, :width]
    yield record['name'].decode(), label, logits.argmax(-1)


def plain_metrics(predictions, dataset):
  """Counted by numpy, whole and image by image."""
  classes = dataset.info.num_classes
  confusions = []
  for _, label, prediction in predictions:
    confusion = np.zeros((classes, classes), np.int64)
    valid = label != 255
    np.add.at(confusion, (label[valid], prediction[valid]), 1)
    confusions.append(confusion)
  counts = metrics.class_counts(np.stack(confusions))
  of_images = metrics.image_metrics(counts)
  return {
    **metrics.compute_metrics(np.sum(confusions, 0), dataset.info.classes),
    **{key: float(np.mean(values)) for key, values in of_images.items()},
  }


def assert_metrics_agree(found, expected):
  for key, value in expected.items():
    # Rounding may tip a pixel of some thousands over to another class.
    assert found[key] == pytest.approx(value, abs=2e-3), key


@pytest.fixture(scope='module', autouse=True)
def programs():
  """Each program of these evaluations is traced once."""
  with pytest.MonkeyPatch.context() as patch:
    share_programs(patch)
    yield


@pytest.fixture
def run(trained):
  """Function (**changes) -> config, data set, metrics, picture of the first."""

  def run(**changes):
    config = make_config(trained.settings, **changes)
    dataset = build.open_dataset(config, config.data.eval_split)
    model = build.make_model(config, dataset.info.num_classes)
    evaluator = build.make_evaluator(model, dataset, config)
    variables = distributed.replicate(read_variables(trained.workdir))
    scores = evaluator.run(variables, config.eval.panels)
    assert scores.confusion.sum() > 0
    picture = scores.picture(list(scores.packed))
    return config, dataset, scores.metrics, picture

  return run


@pytest.mark.parametrize(
  'split, batch_size', [('val', 1_000_000), ('train', 1), ('train', 8)]
)
def test_evaluation_equals_a_loop_over_the_images(
  trained, run, split, batch_size
):
  config, dataset, found, picture = run(
    data__eval_split=split, eval__batch_size=batch_size, eval__buckets=1
  )
  size = tuple(np.max(dataset.sizes(split), axis=0))
  expected = plain_metrics(
    plain_predictions(config, dataset, read_variables(trained.workdir), size),
    dataset,
  )
  assert_metrics_agree(found, expected)
  assert found['images'] == {'val': 3, 'train': 6}[split]
  assert set(found) - set(expected) == {
    *('images', 'split', 'protocol', 'output_stride', 'scales', 'flip'),
    'interval_95',
  }
  rows = dataset.tally(split).num_images
  assert picture.shape[0] > rows * 40 and picture.dtype == np.uint8


def test_each_image_is_counted_with_its_boundaries(trained):
  # Three images on four devices, padded to one size.
  config = make_config(
    trained.settings, eval__buckets=1, eval__boundary_iou=True
  )
  dataset = build.open_dataset(config, 'val')
  model = build.make_model(config, dataset.info.num_classes)
  variables = distributed.replicate(read_variables(trained.workdir))
  scores = build.make_evaluator(model, dataset, config).run(variables, keep=3)
  assert scores.counts.shape == (3, 5, 4)
  for index, counts in enumerate(scores.counts):
    _, label = scores.evaluator.example(index)
    prediction, valid = scores.prediction(index), label != 255
    for c, (tp, fp, fn, intersection, union) in enumerate(counts.T):
      truth, found = (label == c) & valid, (prediction == c) & valid
      assert tp == (truth & found).sum()
      assert (fp, fn) == (found.sum() - tp, truth.sum() - tp)
      assert intersection <= min(tp, union) and union <= tp + fp + fn
  *_, intersection, union = scores.counts.sum(0)
  of_class = scores.metrics['per_class_boundary_iou'].values()
  assert [x or 0 for x in of_class] == pytest.approx(
    intersection / np.maximum(union, 1), rel=0, abs=1e-12
  )


def test_each_image_may_have_its_own_size(trained, run):
  config, dataset, found, _ = run(eval__buckets=9)
  expected = plain_metrics(
    plain_predictions(config, dataset, read_variables(trained.workdir)),
    dataset,
  )
  assert_metrics_agree(found, expected)


def test_weights_of_output_stride_16_are_evaluated_at_8(trained, run):
  assert trained.config.model.output_stride == 16
  config, dataset, found, _ = run(eval__buckets=1, model__output_stride=8)
  size = tuple(np.max(dataset.sizes('val'), axis=0))
  expected = plain_metrics(
    plain_predictions(config, dataset, read_variables(trained.workdir), size),
    dataset,
  )
  assert_metrics_agree(found, expected)
  assert found['output_stride'] == 8


def test_center_crop_counts_the_crops_alone(trained, run):
  config, dataset, found, picture = run(
    eval__protocol='center_crop', eval__crop_size=(30, 41)
  )
  expected = plain_metrics(
    plain_predictions(
      config,
      dataset,
      read_variables(trained.workdir),
      transform=transforms.CenterCrop((30, 41)),
    ),
    dataset,
  )
  assert_metrics_agree(found, expected)
  assert found['protocol'] == 'center_crop'
  assert found['crop_size'] == [30, 41]
  title = labels.legend([('0', None)], 41).shape[0]
  for row, record in enumerate(dataset.source('val')):
    image, label = map(images.decode_image, (record['image'], record['label']))
    crop, _ = transforms.CenterCrop((30, 41))(image, label[..., 0], None)
    top = row * (title + 30 + 4) + title
    np.testing.assert_array_equal(picture[top : top + 30, :41], crop)


class UpsideDown(Protocol):
  """A protocol as a user writes it: in one file, used by its name or itself."""

  name = 'upside_down'

  def scores(self, model):
    look = super().scores(model)
    return lambda variables, images, sizes: look(
      variables, images[:, ::-1], sizes
    )[:, ::-1]


def test_a_protocol_from_outside_is_one_class(trained, run, monkeypatch):
  monkeypatch.setitem(PROTOCOLS, UpsideDown.name, UpsideDown)
  config, dataset, found, _ = run(eval__protocol='upside_down', eval__buckets=9)
  expected = plain_metrics(
    plain_predictions(
      config,
      dataset,
      read_variables(trained.workdir),
      transform=lambda image, label, _: (image[::-1], label[::-1]),
    ),
    dataset,
  )
  assert_metrics_agree(found, expected)
  assert found['protocol'] == 'upside_down'
  config.eval.protocol = UpsideDown
  model = build.make_model(config, dataset.info.num_classes)
  evaluator = build.make_evaluator(model, dataset, config)
  assert found == {**found, **evaluator.description}


def test_windows_and_scales_are_named_beside_the_metrics(
  trained, tmp_path, capsys, monkeypatch
):
  cached = []
  cache = ops.cache_kernels
  monkeypatch.setattr(
    ops,
    'cache_kernels',
    lambda *arguments: cached.append(arguments[2]) or cache(*arguments),
  )
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  config = make_config(
    trained.settings,
    eval__protocol='sliding_window',
    eval__crop_size=(33, 40),
    eval__scales=(0.5,),
    eval__flip=True,
  )
  result = evaluate.evaluate(config, workdir)
  assert result['crop_size'] == [33, 40]
  assert cached == [(33, 40)]  # the window, not the image
  assert result['scales'] == [0.5] and result['flip'] is True
  name = 'val_sliding_window_33x40_scales0.5_flip.json'
  assert json.loads((workdir / 'eval' / name).read_text()) == result
  assert (
    'split val, protocol sliding_window, output_stride 16, crop_size [33, 40],'
    ' scales [0.5], flip True'
  ) in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
  'protocol, stride, step, name',
  [
    (Protocol(), 16, None, 'val_whole'),
    (Protocol(flip=True), 8, None, 'val_whole_stride16_flip'),
    (Protocol(scales=(0.75, 1.0)), 16, 40, 'val_whole_scales0.75-1_step40'),
    (CenterCrop(), 16, None, 'val_center_crop_513x513'),
    (
      SlidingWindow((65, 33), 0.5),
      16,
      None,
      'val_sliding_window_65x33_overlap0.5',
    ),
  ],
)
def test_each_evaluation_has_a_name_of_its_own(protocol, stride, step, name):
  description = {'split': 'val', **protocol.describe(deeplab_v3())}
  found = evaluate.result_name(description, trained_stride=stride, step=step)
  assert found == name


@pytest.fixture(scope='module')
def evaluated(trained, tmp_path_factory):
  """The evaluation of a copy of the run: its config, workdir, result, output.

  Tests that change the workdir copy it.
  """
  workdir = tmp_path_factory.mktemp('evaluated') / 'w'
  shutil.copytree(trained.workdir, workdir)
  config = make_config(
    trained.settings, eval__save_predictions=True, eval__worst_and_best=2
  )
  with contextlib.redirect_stdout(io.StringIO()) as output:
    result = evaluate.evaluate(config, workdir)
  return types.SimpleNamespace(
    config=config, workdir=workdir, result=result, output=output.getvalue()
  )


def test_another_evaluation_is_not_replaced_silently(
  evaluated, tmp_path, caplog
):
  workdir = shutil.copytree(evaluated.workdir, tmp_path / 'w')
  path = workdir / 'eval' / 'val_whole.json'
  path.write_text('{"step": 3}')
  with caplog.at_level(logging.WARNING, 'deeplab_jax'):
    evaluate.evaluate(evaluated.config, workdir)
    assert caplog.messages == [
      f'{path.with_name("val_whole.tar.gz")}: earlier predictions are replaced',
      f'{path}: another evaluation, of step 3, is replaced',
    ]
    path.with_name('val_whole.tar.gz').unlink()
    evaluate.evaluate(evaluated.config, workdir)  # the same once more
  assert len(caplog.messages) == 2


def test_the_seeds_geometry_allows_no_padding(trained):
  config = make_config(
    trained.settings, data__eval_split='train', eval__buckets=2
  )
  dataset = build.open_dataset(config, 'train')
  model = deeplab_v3(num_classes=4, preset='seed')
  plan = build.make_evaluator(model, dataset, config)._plan
  sizes = dataset.sizes('train')
  assert {batch.size for batch in plan} == set(sizes)
  for batch in plan:
    assert {sizes[i] for i in batch.indices if i != FILLER} == {batch.size}


def test_many_sizes_are_compiled_as_few_times_as_asked(trained):
  config = make_config(
    trained.settings, data__eval_split='train', eval__buckets=2
  )
  dataset = build.open_dataset(config, 'train')
  model = build.make_model(config, dataset.info.num_classes)
  assert len(set(dataset.sizes('train'))) > 2
  evaluator = build.make_evaluator(model, dataset, config)
  variables = distributed.replicate(read_variables(trained.workdir))
  for expected in (2, 0):  # later evaluations compile nothing
    with compilations() as compiled:
      evaluator.run(variables, keep=1)
    assert len(compiled) == expected


@pytest.mark.parametrize('panels', [0, 2])
def test_picture_holds_as_many_rows_as_asked_for(run, panels):
  _, dataset, _, picture = run(eval__panels=panels)
  if panels == 0:
    assert picture is None
  else:
    heights = [height for height, _ in dataset.sizes('val')]
    line = labels.legend([('0', None)], 40).shape[0]  # a title, the legend
    assert picture.shape[0] == sum(heights[:2]) + 3 * line + 2 * 4


def test_worst_and_best_images_are_chosen_with_ties_in_order():
  mious = enumerate([0.5, 0.2, float('nan'), 0.9, 0.2, 0.9, 0.1])
  found = evaluate.extremes(dict(mious), 2)
  assert found == {'worst': [6, 1], 'best': [3, 5]}


def test_worst_and_best_are_drawn_and_named(evaluated):
  output, workdir = evaluated.output, evaluated.workdir
  dataset = build.open_dataset(evaluated.config, 'val')
  heights = dict(
    zip(dataset.names('val'), (h for h, _ in dataset.sizes('val')), strict=True)
  )
  for kind, sign in (('worst', 1), ('best', -1)):
    (line,) = (x for x in output.splitlines() if x.startswith(f'{kind} images'))
    entries = [e.split() for e in line.partition(': ')[2].split(', ')]
    values = [sign * float(value) for _, value in entries]
    assert len(values) == 2 and values == sorted(values)
    with Image.open(workdir / f'eval/val_whole_{kind}.png') as picture:
      # Two titles, two rows, a legend of one line, and what separates them.
      line = labels.legend([('0', None)], 40).shape[0]
      rows = sum(heights[name] for name, _ in entries)
      assert picture.height == 3 * line + rows + 2 * 4
  with Image.open(workdir / 'eval/val_whole_confusion.png') as picture:
    assert picture.mode == 'RGB' and picture.width == picture.height


def read_archive(path):
  with tarfile.open(path) as archive:
    return {
      entry.name: np.asarray(
        Image.open(io.BytesIO(archive.extractfile(entry).read()))
      )
      for entry in archive
    }


def test_archive_holds_the_predictions_at_the_original_sizes(
  trained, evaluated, tmp_path
):
  maps = read_archive(evaluated.workdir / 'eval/val_whole.tar.gz')
  config = make_config(trained.settings, eval__save_predictions=True)
  dataset = build.open_dataset(config, 'val')
  assert len(set(dataset.sizes('val'))) == 3 <= config.eval.buckets
  variables = read_variables(trained.workdir)
  names = [f'val_{index}' for index in range(3)]
  folder = 'results/mini/Segmentation/comp6_test_cls'
  assert list(maps) == [f'{folder}/{name}.png' for name in names]
  for name, _, prediction in plain_predictions(config, dataset, variables):
    found = maps[f'{folder}/{name}.png']
    assert found.shape == prediction.shape
    assert (found != prediction).mean() < 2e-3  # ties, rounded otherwise
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  config.eval.batch_size = 1
  evaluate.evaluate(config, workdir)
  before, again = (
    folder.joinpath('eval/val_whole.tar.gz').read_bytes()
    for folder in (evaluated.workdir, workdir)
  )
  assert again == before


def test_split_without_labels_gives_its_archive_and_no_metrics(
  trained, tmp_path, capsys
):
  folder = shutil.copytree(trained.folder, tmp_path / 'mini')
  lists = folder / 'ImageSets' / 'Segmentation'
  lists.joinpath('test.txt').write_text('val_0\nval_2\n')
  for name in ('val_0', 'val_2'):
    path = folder / 'SegmentationClass' / f'{name}.png'
    empty = np.full_like(np.asarray(Image.open(path)), 255)
    Image.fromarray(empty).save(path)
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  before = (workdir / 'eval.json').read_bytes()
  config = functools.partial(
    make_config,
    trained.settings,
    data__dir=str(folder),
    data__prepared_dir=str(tmp_path / 'prepared'),
    data__eval_split='test',
  )
  with pytest.raises(
    UserError, match=r'eval_split=test has no pixel.*save_pre'
  ):
    evaluate.evaluate(config(), workdir)
  evaluate.evaluate(config(eval__save_predictions=True), workdir)
  assert len(read_archive(workdir / 'eval/test_whole.tar.gz')) == 2
  assert 'mIoU' not in capsys.readouterr().out
  assert (workdir / 'eval.json').read_bytes() == before


def test_crops_are_no_results_for_a_test_server(trained):
  config = make_config(
    trained.settings,
    eval__protocol='center_crop',
    eval__save_predictions=True,
  )
  with pytest.raises(UserError, match='save_predictions needs whole images'):
    evaluate.evaluate(config, trained.workdir)


def test_evaluating_the_best_checkpoint_repeats_its_metrics(trained, evaluated):
  workdir, result = evaluated.workdir, evaluated.result
  assert json.loads((workdir / 'eval/val_whole.json').read_text()) == result
  assert (workdir / 'eval/val_whole.png').exists()
  for path in (workdir / 'eval.json', trained.workdir / 'eval.json'):
    assert json.loads(path.read_text()) == result == trained.result
  assert evaluated.output.startswith(f'step {result["step"]}, 3 images\n')
  assert f'{100 * result["miou"]:.2f}' in evaluated.output


@pytest.mark.parametrize('name', ['latest', '6'])
def test_evaluating_a_checkpoint_repeats_its_metrics(
  trained, tmp_path, capsys, name
):
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  of_training = (workdir / 'eval.json').read_bytes()
  config = make_config(
    trained.settings, eval__step=name, eval__worst_and_best=0
  )
  result = evaluate.evaluate(config, workdir)
  path = workdir / 'eval' / 'val_whole_step6.json'
  assert json.loads(path.read_text()) == result
  assert path.with_suffix('.png').exists()
  assert (workdir / 'eval.json').read_bytes() == of_training
  with Checkpoints(workdir) as saved:
    assert saved.open(name).step == 6
    assert result == {**saved.metrics(6), 'step': 6}
  table = capsys.readouterr().out
  assert table.startswith('step 6, 3 images\n')
  assert f'{100 * result["miou"]:.2f}' in table
  assert not list(workdir.rglob('*step6_worst.png'))
  assert 'worst images' not in table


def test_the_table_of_images_gives_the_metrics_of_the_whole(evaluated):
  path = evaluated.workdir / 'eval/val_whole_images.csv'
  table, result = image_table.read(path), evaluated.result
  assert table.names == [f'val_{index}' for index in range(3)]
  rates = metrics.rates(table.counts.sum(0))
  for key in ('miou', 'pixel_accuracy', 'mean_precision', 'mean_f1'):
    assert rates[key] == result[key]
  assert list(table.classes) == list(result['per_class_iou'])
  for key, of_images in metrics.image_metrics(table.counts).items():
    assert np.mean(of_images) == pytest.approx(result[key])
  low, high = result['interval_95']['miou']
  assert 0 <= low <= result['miou'] <= high <= 1
  (line,) = (x for x in evaluated.output.splitlines() if '95 %' in x)
  assert f'mIoU: {100 * low:.2f} to {100 * high:.2f}' in line


def test_unknown_step_is_named(trained):
  config = make_config(trained.settings, eval__step='5')
  with pytest.raises(UserError, match=r'config\.eval\.step=5 is not in'):
    evaluate.evaluate(config, trained.workdir)


def test_evaluation_without_a_split_says_how_to_name_one(trained):
  config = make_config(trained.settings, data__eval_split='')
  with pytest.raises(UserError, match=r'--config\.data\.eval_split=val'):
    evaluate.evaluate(config, trained.workdir)


def test_void_as_class_0_scores_as_if_it_were_255(trained, evaluated, tmp_path):
  folder = shutil.copytree(trained.folder, tmp_path / 'mini')
  names = (folder / 'classes.txt').read_text()
  (folder / 'classes.txt').write_text(f'unlabelled\n{names}')
  for path in (folder / 'SegmentationClass').iterdir():
    label = np.array(Image.open(path))
    Image.fromarray(np.where(label == 255, 0, label + 1)).save(path)
  config = make_config(
    trained.settings,
    data__dir=str(folder),
    data__ignore_label=0,
    eval__save_predictions=True,
  )
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  assert evaluate.evaluate(config, workdir) == trained.result
  shifted = read_archive(workdir / 'eval/val_whole.tar.gz')
  plain = read_archive(evaluated.workdir / 'eval/val_whole.tar.gz')
  assert shifted.keys() == plain.keys()
  for name, found in shifted.items():
    np.testing.assert_array_equal(found, plain[name] + 1)
