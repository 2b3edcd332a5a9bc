"""Checkpoints written by TensorFlow itself: `pytest -m slow` with extra tf."""

import subprocess
import sys
import tarfile

import jax
import numpy as np
import pytest
from reference import slim_shapes, weight

from deeplab_jax import deeplab_v3, load_pretrained
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.weights.mapping import flatten
from deeplab_jax.weights.tf_slim import map_tf_slim, read_tf_slim

pytestmark = pytest.mark.slow

BASE = 4

# TensorFlow, which sees no formula: it writes the arrays that it is given.
PROGRAM = """
import sys
import numpy as np
import tensorflow as tf

arrays, prefix, version = np.load(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with tf.Graph().as_default(), tf.compat.v1.Session() as session:
  for name in arrays:
    tf.compat.v1.get_variable(name, initializer=arrays[name])
  tf.compat.v1.get_variable(
      'global_step', initializer=np.int64(7), trainable=False)
  saver = tf.compat.v1.train.Saver(write_version=version)
  session.run(tf.compat.v1.global_variables_initializer())
  saver.save(session, prefix, write_meta_graph=False)
"""


@pytest.fixture(scope='module')
def arrays():
  return {
    name: weight(name, shape, 'slim') for name, shape in slim_shapes(BASE)
  }


@pytest.fixture(scope='module', params=[1, 2], ids=['V1', 'V2'])
def checkpoint(request, arrays, tmp_path_factory):
  pytest.importorskip('tensorflow', reason="pip install 'deeplab_jax[tf]'")
  folder = tmp_path_factory.mktemp(f'v{request.param}')
  np.savez(folder / 'arrays.npz', **arrays)
  prefix = folder / 'resnet_v2_50.ckpt'
  subprocess.run(
    [
      sys.executable,
      '-c',
      PROGRAM,
      folder / 'arrays.npz',
      prefix,
      str(request.param),
    ],
    check=True,
  )
  assert prefix.exists() == (request.param == 1)
  (folder / 'arrays.npz').unlink()
  return prefix


def shapes():
  model = deeplab_v3('resnet50', preset='seed', width=BASE / 64)
  return jax.eval_shape(
    lambda: model.init(jax.random.key(0), np.zeros((1, 33, 33, 3)), train=False)
  )


def assert_loaded(source, arrays):
  variables, report = load_pretrained(str(source), shapes(), preset='seed')
  assert not report.initial
  assert report.unused['global_step'] == 'state of the training'
  expected = map_tf_slim(arrays).apply(arrays)
  leaves = flatten(variables)
  assert leaves.keys() == expected.keys()
  for path, array in expected.items():
    np.testing.assert_array_equal(leaves[path], array, path)


def test_checkpoint_reads_back_exactly(checkpoint, arrays):
  read = read_tf_slim(checkpoint)
  assert read.keys() == {*arrays, 'global_step'}
  assert_loaded(checkpoint, arrays)


def test_checkpoint_in_a_tar_reads_back(checkpoint, arrays, tmp_path):
  path = tmp_path / 'x.tar.gz'
  with tarfile.open(path, 'w:gz') as tar:
    for file in checkpoint.parent.iterdir():
      if file.name != 'checkpoint':
        tar.add(file, file.name)
  assert_loaded(path, arrays)


def test_any_file_of_version_2_stands_for_all(checkpoint, arrays):
  for path in checkpoint.parent.glob('*.ckpt.*'):
    assert_loaded(path, arrays)


def test_damaged_checkpoint_is_one_line(checkpoint, tmp_path):
  for file in checkpoint.parent.iterdir():
    content = bytearray(file.read_bytes())
    if file.suffix != '.index':
      content[len(content) // 2] ^= 255
    (tmp_path / file.name).write_bytes(content)
  with pytest.raises(UserError) as error:
    load_pretrained(str(tmp_path / checkpoint.name), shapes())
  assert 'truncated or damaged' in str(error.value)
  assert '\n' not in str(error.value)


def test_truncated_checkpoint_is_one_line(checkpoint, tmp_path):
  for file in checkpoint.parent.iterdir():
    content = file.read_bytes()
    (tmp_path / file.name).write_bytes(content[: len(content) // 2])
  with pytest.raises(UserError) as error:
    load_pretrained(str(tmp_path / checkpoint.name), shapes())
  assert 'truncated' in str(error.value)
  assert '\n' not in str(error.value)
