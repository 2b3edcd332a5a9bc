import hashlib
import itertools
import logging
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from deeplab_jax.data import buckets, images, load, pipeline, transforms
from deeplab_jax.runtime import errors

_CHAIN = (
  transforms.RandomScaleCropFlip((32, 24)),
  transforms.ColorJitter((0.2, 0.2, 0.2, 0.05)),
)


def _records(count, size=(8, 8)):
  """Records whose pixels all show their number."""
  return [
    _record(
      np.full((*size, 3), index, np.uint8),
      np.full(size, index % 5, np.uint8),
      f'record_{index}',
    )
    for index in range(count)
  ]


def _record(image, label, name='noise'):
  return {
    'image': images.encode_image(image),
    'label': images.encode_label(label),
    'name': name.encode(),
  }


@pytest.fixture
def source(voc_folder, tmp_path):
  data = load.load_dataset(
    'folder',
    directory=str(voc_folder),
    prepared_dir=str(tmp_path / 'prepared'),
  )
  return data.source('train')


def _take(count, source, chain=_CHAIN, **options):
  options = {'batch_size': 4, 'seed': 1, 'threads': 2, **options}
  iterator = pipeline.make_train_iterator(source, chain, **options)
  try:
    return [dict(batch) for batch in itertools.islice(iterator, count)]
  finally:
    iterator.close()


def _same(first, second):
  assert len(first) == len(second)
  for one, other in zip(first, second, strict=True):
    assert set(one) == set(other)
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


def _numbers(batches):
  return [batch['image'][:, 0, 0, 0].tolist() for batch in batches]


def test_batches_have_the_shape_of_the_crop(source):
  (batch,) = _take(1, source)
  assert set(batch) == {'image', 'label', 'place'}
  assert batch['image'].shape == (4, 32, 24, 3)
  assert batch['label'].shape == (4, 32, 24)
  assert batch['image'].dtype == batch['label'].dtype == np.uint8
  assert set(np.unique(batch['label'])) <= {0, 1, 2, 255}
  assert batch['place'].dtype == np.int32
  assert batch['place'].tolist() == [0, 1, 2, 3]


def test_stream_is_the_same_for_any_number_of_threads(source):
  expected = _take(5, source, threads=0)
  _same(_take(5, source, threads=1), expected)
  _same(_take(5, source, threads=4), expected)


@pytest.mark.xdist_group('alone')
def test_stream_is_the_same_for_any_number_of_workers(source):
  _same(_take(5, source, workers=2, threads=1), _take(5, source))


def test_resumed_stream_goes_on_where_it_stopped(source):
  whole = _take(9, source)  # six epochs of six images
  _same(_take(4, source, start_step=5), whole[5:])


def test_hosts_together_see_the_batch_of_one(source):
  whole = _take(5, source, start_step=2)
  hosts = [
    _take(5, source, host=host, hosts=2, start_step=2) for host in range(2)
  ]
  for step, batch in enumerate(whole):
    for key, value in batch.items():
      for host in range(2):
        np.testing.assert_array_equal(hosts[host][step][key], value[host::2])


def test_seeds_give_other_orders_and_other_crops():
  records = _records(50)
  first = _numbers(_take(10, records, (), batch_size=5))
  assert first == _numbers(_take(10, records, (), batch_size=5))
  assert first != _numbers(_take(10, records, (), batch_size=5, seed=2))


def test_every_epoch_shows_every_record_once_in_a_new_order():
  numbers = np.ravel(_numbers(_take(9, _records(12), (), batch_size=4)))
  epochs = numbers.reshape(3, 12)
  np.testing.assert_array_equal(np.sort(epochs), [list(range(12))] * 3)
  assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


@pytest.mark.parametrize('seed', [0, 7])
def test_order_of_a_seed_never_changes(seed):
  # A run that resumes goes on with the stream it began, also years later.
  order = [np.random.default_rng((seed, 0, e)).permutation(5) for e in range(4)]
  rows = np.concatenate(order)[3 * 2 : 3 * 6].reshape(4, 3)
  batches = _take(4, _records(5), (), batch_size=3, seed=seed, start_step=2)
  assert _numbers(batches) == rows.tolist()


def test_chance_of_a_row_never_changes():
  class Shift:
    def __call__(self, image, label, rng):
      return image + np.uint8(rng.integers(200)), label

  (batch,) = _take(1, _records(1), (Shift(),), seed=3, start_step=5)
  expected = [
    np.random.default_rng((3, 1, row)).integers(200) for row in range(20, 24)
  ]
  assert batch['image'][:, 0, 0, 0].tolist() == expected


def test_one_record_looks_different_every_time():
  noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
  record = _record(noise, np.zeros((40, 40), np.uint8))
  batch = _take(1, [record], _CHAIN, batch_size=8)[0]['image']
  assert len(np.unique(batch.reshape(8, -1), axis=0)) == 8


def test_stream_of_older_versions_never_changes():
  # Unscaled, as versions of OpenCV scale differently.
  rng, records = np.random.default_rng(0), []
  for _ in range(6):
    size = tuple(rng.integers(20, 50, 2))
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    label = rng.integers(0, 5, size, np.uint8)
    records.append(_record(image, label))
  digest = hashlib.sha256()
  chain = (transforms.RandomScaleCropFlip((32, 24), (1.0, 1.0)),)
  for batch in _take(6, records, chain, start_step=2):
    digest.update(batch['label'].tobytes())
    digest.update(batch['image'].tobytes())
  assert digest.hexdigest().startswith('d29d5a1deb5265f8fc8e47cdf0e59057')


# Of 20 records all show class 0, five also class 1, and one class 4.
_SHOWN = [[0, 1] if i < 5 else [0, 4] if i == 7 else [0] for i in range(20)]
_BY_CLASS = {'class_sampling': 0.6, 'shown': _SHOWN}


def test_records_come_by_class_as_often_as_computed():
  draws = np.ravel(
    _numbers(_take(100, _records(20), (), batch_size=40, **_BY_CLASS))
  )
  frequency = np.bincount(draws, minlength=20) / draws.size
  # 0.4 as ever, and 0.2 for each of three classes.
  expected = np.full(20, (0.4 + 0.2) / 20)
  expected[:5] += 0.2 / 5
  expected[7] += 0.2
  deviation = np.sqrt(expected * (1 - expected) / draws.size)
  assert (np.abs(frequency - expected) < 4 * deviation).all()


def test_rows_that_are_not_drawn_by_class_keep_their_record():
  plain = np.ravel(_numbers(_take(20, _records(20), ())))
  drawn = np.ravel(_numbers(_take(20, _records(20), (), **_BY_CLASS)))
  same = np.random.default_rng
  kept = [same((1, 2, row)).random() >= 0.6 for row in range(80)]
  np.testing.assert_array_equal(drawn[kept], plain[kept])
  assert 0.2 < np.mean(kept) < 0.6 and (drawn != plain).any()


def test_stream_by_class_is_the_same_for_any_threads_hosts_and_start():
  records = _records(20, (40, 40))
  whole = _take(9, records, **_BY_CLASS)
  _same(_take(9, records, threads=4, **_BY_CLASS), whole)
  _same(_take(4, records, start_step=5, **_BY_CLASS), whole[5:])
  hosts = [
    _take(9, records, host=host, hosts=2, **_BY_CLASS) for host in range(2)
  ]
  for step, batch in enumerate(whole):
    for host in range(2):
      np.testing.assert_array_equal(
        hosts[host][step]['image'], batch['image'][host::2]
      )


@pytest.mark.xdist_group('alone')
def test_stream_with_all_transforms_is_the_same_from_a_worker(source):
  def own(image, label, rng):  # of a recipe: workers cannot import it
    return image ^ np.uint8(rng.integers(255)), label

  chain = (
    transforms.RandomScaleCropFlip((32, 24), rotate=20, max_share=0.5),
    transforms.GaussianBlur(2.0),
    transforms.GaussianNoise(9.0),
    transforms.Cutout(0.4),
    transforms.OfRecipe(own, 3),
  )
  by_class = {'class_sampling': 0.5, 'shown': [[0]] * 5 + [[1]]}
  expected = _take(4, source, chain, **by_class)
  _same(_take(4, source, chain, workers=1, **by_class), expected)
  _same(_take(2, source, chain, start_step=2, **by_class), expected[2:])


def test_batch_may_be_larger_than_the_data_set():
  (batch,) = _take(1, _records(3), (), batch_size=7)
  counts = np.bincount(batch['image'][:, 0, 0, 0], minlength=3)
  assert counts.sum() == 7 and counts.min() == 2


def _plan(sizes, batch_size, limit=1):
  return buckets.plan_batches(sizes, limit=limit, batch_size=batch_size)


@pytest.mark.parametrize('count', [1, 5, 8])
@pytest.mark.parametrize('batch_size', [1, 3, 10])
@pytest.mark.parametrize('hosts', [1, 2, 3])
@pytest.mark.parametrize('limit', [1, 3])
def test_evaluation_shows_every_image_once(count, batch_size, hosts, limit):
  sizes = [(8, 8 + index % 4) for index in range(count)]
  records = [_records(count, size)[i] for i, size in enumerate(sizes)]
  plan = _plan(sizes, batch_size * hosts, limit)
  numbers, shapes = [], []
  for host in range(hosts):
    iterator = pipeline.make_eval_iterator(
      records, plan, host=host, hosts=hosts, threads=1
    )
    seen = list(iterator)
    iterator.close()
    shapes.append([batch['image'].shape for batch in seen])
    for batch in seen:
      filler = batch['index'] == buckets.FILLER
      assert (batch['label'][filler] == 255).all()
      for row in np.flatnonzero(~filler):
        index = batch['index'][row]
        height, width = batch['size'][row]
        assert (height, width) == sizes[index]
        assert (batch['image'][row, :height, :width] == index).all()
        assert (batch['label'][row, :height, :width] == index % 5).all()
        numbers.append(index)
  assert sorted(numbers) == list(range(count))
  assert all(one == shapes[0] for one in shapes)
  assert shapes[0] == [(batch_size, *batch.size, 3) for batch in plan]


def test_evaluation_pads_and_does_not_scale(source):
  (planned,) = _plan([(80, 90)] * len(source), len(source))
  iterator = pipeline.make_eval_iterator(source, [planned], ignore_label=9)
  (batch,) = list(iterator)
  iterator.close()
  for index, record in enumerate(source):
    image = images.decode_image(record['image'])
    label = images.decode_label(record['label'])
    height, width = label.shape
    assert batch['index'][index] == index
    np.testing.assert_array_equal(batch['image'][index, :height, :width], image)
    np.testing.assert_array_equal(batch['label'][index, :height, :width], label)
    assert (batch['image'][index, height:] == transforms.MEAN_COLOR).all()
    assert (batch['label'][index, :, width:] == 9).all()


def test_evaluation_transforms_each_record(source):
  chain = (transforms.CenterCrop((20, 30)),)
  plan = _plan([(20, 30)] * len(source), 4)
  iterator = pipeline.make_eval_iterator(source, plan, chain)
  first = next(iterator)
  iterator.close()
  for row in range(4):
    image, label = pipeline.load_example(source[row], chain)
    assert label.shape == (20, 30)
    np.testing.assert_array_equal(first['image'][row], image)
    np.testing.assert_array_equal(first['label'][row], label)


def test_record_larger_than_its_batch_is_named():
  iterator = pipeline.make_eval_iterator(
    _records(1), _plan([(9, 7)], 1), threads=0
  )
  with pytest.raises(ValueError, match=r"'record_0'.*8 wide.*\(9, 7\)"):
    next(iterator)
  iterator.close()


@pytest.mark.parametrize('key', ['image', 'label'])
@pytest.mark.parametrize('threads', [0, 2])
def test_damaged_record_is_named(key, threads):
  records = _records(3)
  records[1][key] = records[1][key][:20]
  with pytest.raises(errors.UserError, match=r"'record_1'.*damaged") as caught:
    _take(3, records, (), threads=threads)
  assert '\n' not in str(caught.value)
  iterator = pipeline.make_eval_iterator(
    records, _plan([(8, 8)] * 3, 3), threads=threads
  )
  with pytest.raises(errors.UserError, match=r"'record_1'.*damaged"):
    next(iterator)
  iterator.close()


def test_numbers_that_cannot_work_are_shown():
  with pytest.raises(ValueError, match='multiple of hosts=3, got 4'):
    _take(1, _records(3), host=0, hosts=3)
  with pytest.raises(ValueError, match='0 to 1, got 2'):
    _take(1, _records(3), host=2, hosts=2)
  with pytest.raises(ValueError, match='must have records'):
    _take(1, [])
  with pytest.raises(ValueError, match=r'at least 0, got \(-1, 0\)'):
    _take(1, _records(3), threads=-1)
  with pytest.raises(ValueError, match='class_sampling needs `shown`'):
    _take(1, _records(3), class_sampling=0.5)
  with pytest.raises(ValueError, match=r'at least 0, got \(2, -3\)'):
    _take(1, _records(3), workers=-3)


_SCRIPT = """
import multiprocessing, sys
import numpy as np
from deeplab_jax.data import images, pipeline
if __name__ == '__main__':
  image = images.encode_image(np.zeros((8, 8, 3), np.uint8))
  label = images.encode_label(np.zeros((8, 8), np.uint8))
  records = [{'image': image, 'label': label, 'name': b'x'}]
  iterator = pipeline.make_train_iterator(
    records, (), batch_size=2, seed=0, threads=1, workers=1
  )
  next(iterator)
  (worker,) = multiprocessing.active_children()
  print(worker.pid, flush=True)
  for line in sys.stdin:
    for _ in range(20):  # more than is buffered
      next(iterator)
    print('more', flush=True)
"""


def _runs(pid):
  try:
    state = pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1]
  except FileNotFoundError:
    return False
  return state.split()[0] != 'Z'


@pytest.mark.xdist_group('alone')
@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='reads /proc')
def test_worker_outlives_a_signal_but_not_its_parent(tmp_path):
  script = tmp_path / 'loads.py'
  script.write_text(_SCRIPT)
  with subprocess.Popen(
    [sys.executable, script],
    env={**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[2])},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as parent:
    worker = int(parent.stdout.readline())
    os.kill(worker, signal.SIGTERM)
    parent.stdin.write('\n')
    parent.stdin.flush()
    assert parent.stdout.readline() == 'more\n'
    assert _runs(worker)
    parent.kill()
  deadline = time.monotonic() + 10
  while _runs(worker) and time.monotonic() < deadline:
    time.sleep(0.1)
  assert not _runs(worker)


def _workers():
  return multiprocessing.active_children()


@pytest.mark.xdist_group('alone')
@pytest.mark.parametrize('moment', ['waiting', 'sending'])
def test_a_killed_worker_is_replaced_and_the_stream_stays(
  moment, monkeypatch, caplog
):
  monkeypatch.setattr(logging.getLogger('deeplab_jax'), 'propagate', True)
  segments = set(os.listdir('/dev/shm'))
  # A batch is larger than what a pipe holds, so workers wait in the middle.
  chain = (transforms.RandomScaleCropFlip((256, 256)),)
  records = _records(5)
  options = {'batch_size': 4, 'seed': 1, 'threads': 1}
  expected = _take(9, records, chain, threads=1)
  iterator = pipeline.make_train_iterator(records, chain, **options, workers=2)
  batches = [next(iterator)]
  for count in (3, 5):
    if moment == 'sending':
      time.sleep(0.3)
    os.kill(_workers()[0].pid, signal.SIGKILL)
    batches += itertools.islice(iterator, count)
  iterator.close()
  _same(batches, expected)
  assert (
    caplog.messages
    == ['a loader process ended with status -9; another goes on'] * 2
  )
  assert not _workers()
  assert set(os.listdir('/dev/shm')) == segments


@pytest.mark.xdist_group('alone')
def test_workers_that_end_again_and_again_are_an_error(caplog):
  def ends(image, label, rng):
    os._exit(7)

  with pytest.raises(
    errors.UserError, match=r'status 7, 3 times.*data\.workers'
  ):
    _take(1, _records(3), (ends,), workers=1)
  ended = 'a loader process ended with status 7; another goes on'
  assert caplog.messages == [ended] * 2  # and none after the third


@pytest.mark.xdist_group('alone')
def test_a_worker_passes_errors_on():
  records = _records(3)
  records[1]['image'] = b'x'
  with pytest.raises(errors.UserError, match=r"'record_1'.*damaged"):
    _take(3, records, (), workers=2, threads=1)
  assert not _workers()


@pytest.mark.xdist_group('alone')
def test_a_program_that_closes_nothing_ends_without_a_word(tmp_path):
  script = tmp_path / 'loads.py'
  script.write_text(_SCRIPT)
  done = subprocess.run(
    [sys.executable, script],
    env={**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[2])},
    input='\n',
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.stdout.endswith('more\n') and done.stderr == ''
  assert not _runs(int(done.stdout.split()[0]))
