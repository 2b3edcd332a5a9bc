"""Scoring over devices, and the archive of results, read back."""

import functools
import tarfile

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from miniature import CLASSES, global_batch, make, shard_mapped

from deeplab_jax.evaluation import evaluator
from deeplab_jax.evaluation.evaluator import write_archive
from deeplab_jax.evaluation.protocols import Protocol
from deeplab_jax.runtime import distributed

pytestmark = pytest.mark.compiles

RESULTS = [('2008_000006', b'one'), ('2008_000011', b'other')]


def test_archive_has_the_layout_of_the_test_server(tmp_path):
  path = tmp_path / 'results_test.tar.gz'
  write_archive(path, RESULTS)
  folder = 'results/VOC2012/Segmentation/comp6_test_cls'
  with tarfile.open(path, 'r:gz') as archive:
    contents = {e.name: archive.extractfile(e).read() for e in archive}
  assert contents == {f'{folder}/{n}.png': png for n, png in RESULTS}


def test_equal_results_make_equal_bytes(tmp_path):
  for name in ('a', 'b'):
    write_archive(tmp_path / name, RESULTS)
  assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()


def test_archive_that_fails_leaves_the_old_one(tmp_path):
  path = tmp_path / 'results_test.tar.gz'
  path.write_bytes(b'old')

  def results():
    yield RESULTS[0]
    raise RuntimeError

  with pytest.raises(RuntimeError):
    write_archive(path, results())
  assert path.read_bytes() == b'old'
  assert list(tmp_path.iterdir()) == [path]


def test_eval_step_counts_each_image_alike_under_jit_shard_map_and_pmap(
  random_variables,
):
  model = make()
  variables = random_variables(model)
  batch = global_batch()
  batch['index'] = np.arange(8, dtype=np.int32)[::-1].copy()
  batch['size'] = np.full((8, 2), (33, 49), np.int32)
  asked = []

  def scores(variables, images, sizes):
    asked.append((images.shape, sizes.shape))
    return model.apply(variables, images, train=False)

  settings = {'scores': scores, 'num_classes': CLASSES}
  result = evaluator.pmap_eval_step(**settings)(
    distributed.replicate(variables), distributed.shard(batch)
  )
  assert set(asked) == {((2, 33, 49, 3), (2, 2))}
  logits = jax.jit(functools.partial(model.apply, train=False))(
    variables, batch['image']
  )
  classes = np.argmax(logits, -1)
  expected = np.zeros((8, CLASSES, CLASSES), int)
  for image, label, found in zip(
    expected, batch['label'], classes, strict=True
  ):
    valid = label != 255
    np.add.at(image, (label[valid], found[valid]), 1)
  np.testing.assert_array_equal(result['index'], batch['index'])
  np.testing.assert_array_equal(result['prediction'], classes)
  np.testing.assert_array_equal(result['confusion'], expected)

  step = functools.partial(evaluator.eval_step, **settings)
  plain = jax.jit(functools.partial(step, axis_name=None))(variables, batch)
  mapped = shard_mapped(step, PartitionSpec())(variables, batch)
  for name, value in result.items():
    np.testing.assert_array_equal(plain[name], value)
    np.testing.assert_array_equal(mapped[name], value)


def test_no_class_is_predicted_between_two_others(random_variables):
  model = make(sync_bn=False)
  variables = random_variables(model)
  bias = variables['params']['logits']['bias']
  bias[[1, 3]] = -1e6  # only 0 and 2 can win
  images = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), np.uint8)
  logits = jax.jit(functools.partial(model.apply, train=False))(
    variables, images
  )
  step = jax.jit(
    functools.partial(evaluator.predict_step, scores=Protocol().scores(model))
  )
  bias[2] += np.median(logits[..., 0] - logits[..., 2])
  sizes = np.full((2, 2), (40, 50), np.int32)
  classes, _ = step(variables, {'image': images, 'size': sizes})
  assert classes.shape == (2, 40, 50)
  assert set(np.unique(classes)) == {0, 2}
