"""Steps over several devices against the same step on one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from miniature import CLASSES, global_batch, make, one_device_step, shard_mapped

from deeplab_jax.benchmark.timing import compilations
from deeplab_jax.runtime import distributed
from deeplab_jax.training import losses, steps
from deeplab_jax.training.optimizers import make_optimizer

pytestmark = pytest.mark.compiles


def initial_state(model, optimizer, variables):
  return steps.TrainState(
    step=np.zeros((), np.int32),
    params=variables['params'],
    batch_stats=variables['batch_stats'],
    opt_state=jax.device_get(optimizer.init(variables['params'])),
  )


def assert_trees_close(ours, theirs, atol):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for path, a in jax.tree_util.tree_leaves_with_path(ours):
    b = functools.reduce(
      lambda t, k: t[getattr(k, 'key', getattr(k, 'idx', None))], path, theirs
    )
    np.testing.assert_allclose(
      a, b, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path)
    )


LOSS = {
  'class_weights': (0.5, 0.0, 2.0, 1.3),
  'hardest': 0.3,
  'label_smoothing': 0.1,
}


class Start:
  """A network at its start, and its steps, each traced and compiled once."""

  def __init__(self, model, variables):
    self.model = model
    self.optimizer = make_optimizer('sgd', 0.1, weight_decay=1e-4)
    self.state = initial_state(model, self.optimizer, variables)
    self.settings = {'model': model, 'optimizer': self.optimizer}

  @functools.cached_property
  def plain(self):
    return steps.pmap_train_step(**self.settings)

  @functools.cached_property
  def with_loss(self):
    return steps.pmap_train_step(**self.settings, **LOSS)

  def four(self, step, batch):
    """The step over four devices; its metrics, the same on each."""
    state, metrics = step(
      distributed.replicate(self.state), distributed.shard(batch)
    )
    metrics = jax.device_get(metrics)
    for value in metrics.values():
      np.testing.assert_array_equal(value, np.full(4, value[0]))
    return state, {name: value[0] for name, value in metrics.items()}

  def one(self, batch, **settings):
    """The step over one device, which has the whole batch."""
    state, metrics = one_device_step(**self.settings, **settings)(
      self.state, jax.tree.map(lambda x: x[None], batch)
    )
    metrics = jax.device_get(metrics)
    return state, {name: value[0] for name, value in metrics.items()}


@pytest.fixture(scope='module')
def start(random_variables):
  model = make()
  return Start(model, random_variables(model))


@pytest.fixture(scope='module')
def training_logits(start):
  """Function of images: logits of all at once, with their own statistics."""
  apply = jax.jit(
    functools.partial(
      make(sync_bn=False).apply, train=True, mutable=['batch_stats']
    )
  )
  return lambda images: apply(start.state.variables, images)[0]


def test_train_step_on_four_devices_matches_one(start):
  assert jax.device_count() == 4
  batch = global_batch()
  void = (batch['label'] == 255).reshape(4, -1).sum(1)
  assert len(set(void.tolist())) == 4
  four, metrics = start.four(start.plain, batch)
  one, expected = start.one(batch)
  np.testing.assert_allclose(metrics['loss'], expected['loss'], atol=1e-5)
  np.testing.assert_allclose(
    metrics['grad_norm'], expected['grad_norm'], rtol=1e-4
  )
  valid = batch['label'].size - void.sum()
  assert metrics['valid_pixels'] == expected['valid_pixels'] == valid
  for name in ('params', 'batch_stats'):
    ours, theirs = (jax.device_get(getattr(s, name)) for s in (four, one))
    assert_trees_close(ours, theirs, atol=1e-5)
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), four.params, start.state.params
  )
  assert min(jax.tree.leaves(moved)) > 0


def assert_same_update(ours, theirs):
  (state, metrics), (expected, expected_metrics) = ours, theirs
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5)
  assert_trees_close(
    *(jax.device_get(x.variables) for x in (state, expected)), atol=1e-6
  )
  assert int(state.step) == int(expected.step) == 1


def test_pmap_shard_map_and_jit_with_and_without_a_mesh_take_the_same_step(
  start,
):
  batch = global_batch()
  expected = start.four(start.with_loss, batch)
  step = functools.partial(steps.train_step, **start.settings, **LOSS)
  shard_map = shard_mapped(step, PartitionSpec())
  assert_same_update(shard_map(start.state, batch), expected)
  # Without a named axis the program is that of the whole batch, so its batch
  # statistics are global in any case.
  whole = functools.partial(step, model=make(sync_bn=False), axis_name=None)
  assert_same_update(jax.jit(whole)(start.state, batch), expected)
  mesh = Mesh(np.array(jax.devices()), ('images',))
  rows = NamedSharding(mesh, PartitionSpec('images'))
  everywhere = NamedSharding(mesh, PartitionSpec())
  meshed = jax.jit(whole, in_shardings=(everywhere, rows), out_shardings=None)
  state, metrics = meshed(start.state, jax.device_put(batch, rows))
  assert len(state.step.sharding.device_set) == 4
  assert_same_update((state, metrics), expected)


@pytest.mark.parametrize('count', [2, 4])
@pytest.mark.parametrize('devices', [1, 4])
def test_micro_batches_take_the_step_of_the_whole_batch_with_frozen_bn(
  start, devices, count
):
  batch = global_batch(devices * 4)
  batch['label'][: devices * 2] %= 2  # of small weight, or none
  whole = start.one(batch, **LOSS, freeze_bn=True)
  settings = {**LOSS, 'freeze_bn': True, 'accumulate': count}
  if devices == 1:
    ours = start.one(batch, **settings)
  else:
    step = steps.pmap_train_step(**start.settings, **settings)
    ours = start.four(step, batch)
  assert_same_update(ours, whole)
  assert ours[1]['valid_pixels'] == whole[1]['valid_pixels']


def test_statistics_move_with_each_micro_batch(start, random_variables):
  model = make(sync_bn=False)
  batch, count = global_batch(4), 2
  start = Start(model, random_variables(model))
  state, _ = start.one(batch, accumulate=count)
  apply = jax.jit(
    functools.partial(model.apply, train=True, mutable=['batch_stats'])
  )
  stats = start.state.batch_stats
  for part in range(count):
    variables = {'params': start.state.params, 'batch_stats': stats}
    stats = apply(variables, batch['image'][part::count])[1]['batch_stats']
  assert_trees_close(jax.device_get(state.batch_stats), stats, atol=1e-5)


def test_micro_batches_of_void_alone_give_zero_and_not_nan(start):
  batch = global_batch(4)
  batch['label'][:] = 255
  _, metrics = start.one(batch, **LOSS, accumulate=2)
  assert metrics['loss'] == 0 and np.isfinite(metrics['grad_norm'])


def test_loss_is_the_mean_over_all_valid_pixels(start, training_logits):
  batch = global_batch()
  _, metrics = start.four(start.plain, batch)
  logits = training_logits(batch['image'])
  valid = batch['label'] != 255
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits[valid], batch['label'][valid]
  )
  np.testing.assert_allclose(metrics['loss'], losses.mean(), rtol=1e-5)


def test_a_loss_from_outside_is_one_function(start, training_logits):
  def focal(logits, labels, ignore_label, label_smoothing):
    assert label_smoothing == 0
    each = losses.softmax_cross_entropy(logits, labels, ignore_label)
    return (1 - jnp.exp(-each)) ** 2 * each

  batch = global_batch()
  step = steps.pmap_train_step(**start.settings, terms=(focal,))
  _, metrics = start.four(step, batch)
  logits = np.asarray(training_logits(batch['image']), np.float64)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  valid = batch['label'] != 255
  p = np.take_along_axis(p[valid], batch['label'][valid][:, None], -1)
  expected = -((1 - p) ** 2 * np.log(p)).mean()
  np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)


def test_weighted_mined_and_smoothed_loss_on_four_devices_matches_one(start):
  batch = global_batch()
  batch['label'][3:] %= 2  # devices differ in their weights too
  four, metrics = start.four(start.with_loss, batch)
  one, expected = start.one(batch, **LOSS)
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4)
  for name in ('params', 'batch_stats'):
    ours, theirs = (jax.device_get(getattr(s, name)) for s in (four, one))
    assert_trees_close(ours, theirs, atol=1e-5)


@pytest.mark.parametrize('names', [LOSS, ['hardest']])
def test_loss_is_the_weighted_mean_over_the_hardest_pixels(
  start, training_logits, names
):
  chosen = {name: LOSS[name] for name in names}
  step = start.with_loss
  if chosen != LOSS:
    step = steps.pmap_train_step(**start.settings, **chosen)
  batch = global_batch()
  _, metrics = start.four(step, batch)
  logits = training_logits(batch['image'])
  target = np.eye(256)[batch['label']][..., :CLASSES]
  smoothing = chosen.get('label_smoothing', 0)
  target = target * (1 - smoothing) + smoothing / CLASSES
  losses = -(target * np.asarray(jax.nn.log_softmax(logits))).sum(-1)
  table = np.zeros(256)
  table[:CLASSES] = chosen.get('class_weights', 1)
  total = weight = 0
  for image, label in zip(losses, batch['label'], strict=True):
    weights = table[label]
    counted = np.sort(image[weights > 0])
    if counted.size:
      kept = max(1, round(chosen.get('hardest', 1) * counted.size))
      kept = (image >= counted[-kept]) * weights
      total, weight = total + (kept * image).sum(), weight + kept.sum()
  np.testing.assert_allclose(metrics['loss'], total / weight, rtol=1e-4)


@pytest.mark.parametrize('label', [1, 255])  # of the weight 0, and void
def test_a_batch_that_weighs_nothing_gives_zero_and_not_nan(start, label):
  batch = global_batch()
  batch['label'][:] = label
  _, metrics = start.four(start.with_loss, batch)
  assert metrics['loss'] == 0 and metrics['valid_pixels'] == 0
  assert np.isfinite(metrics['grad_norm'])


def test_a_batch_of_void_alone_gives_zero_and_not_nan(start):
  batch = global_batch()
  batch['label'][:] = 255
  _, metrics = start.four(start.plain, batch)
  assert metrics['loss'] == 0 and metrics['valid_pixels'] == 0
  assert np.isfinite(metrics['grad_norm'])


def test_frozen_bn_keeps_statistics_and_normalizes_by_them(start):
  before = jax.tree.map(np.copy, start.state.batch_stats)
  batch = global_batch()
  step = steps.pmap_train_step(**start.settings, freeze_bn=True)
  after, metrics = start.four(step, batch)
  jax.tree.map(np.testing.assert_array_equal, after.batch_stats, before)
  logits = jax.jit(functools.partial(make().apply, train=False))(
    {'params': start.state.params, 'batch_stats': before}, batch['image']
  )
  valid = batch['label'] != 255
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits[valid], batch['label'][valid]
  )
  np.testing.assert_allclose(metrics['loss'], losses.mean(), rtol=1e-5)


def test_without_synchronized_bn_statistics_are_those_of_the_devices_averaged(
  random_variables,
):
  model = make(sync_bn=False)
  start = Start(model, random_variables(model))
  batch = global_batch()
  after, _ = start.four(start.plain, batch)
  apply = jax.jit(
    functools.partial(model.apply, train=True, mutable=['batch_stats'])
  )
  each = [
    apply(start.state.variables, x)[1]['batch_stats']
    for x in distributed.shard(batch)['image']
  ]
  mean = jax.tree.map(lambda *x: np.mean(x, 0), *each)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    jax.device_get(after.batch_stats),
    mean,
  )


def test_rematerialization_changes_no_value_and_adds_no_collective(
  random_variables,
):
  optimizer = make_optimizer('sgd', 0.1)
  batch = distributed.shard(global_batch())
  results = {}
  for kind in ('none', 'elementwise', 'block'):
    model = make(rematerialization=kind)
    state = initial_state(model, optimizer, random_variables(model))
    state = distributed.replicate(state)
    step = steps.pmap_train_step(model=model, optimizer=optimizer)
    program = step.lower(state, batch).compile()
    sums = len(re.findall(r' all-reduce(?:-start)?\(', program.as_text()))
    state, metrics = step(state, batch)
    results[kind] = sums, jax.device_get((state.variables, metrics))
  sums, expected = results.pop('none')
  assert sums > 0
  for other_sums, other in results.values():
    assert other_sums == sums
    assert_trees_close(other, expected, atol=1e-5)


def test_the_train_step_compiles_once_and_donates_its_state(start):
  step = start.plain
  current = distributed.replicate(start.state)
  batch = distributed.shard(global_batch())
  first = current
  current, _ = step(current, batch)
  with compilations() as later:
    current, _ = step(current, batch)
    jax.block_until_ready(step(current, batch))
  assert not later
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))


def test_initial_state_depends_on_the_seed_alone():
  model, optimizer = make(), make_optimizer('sgd', 0.1)
  a, b, c = (steps.create_state(model, optimizer, s) for s in (0, 0, 1))
  kernel = a.params['backbone']['stem']['kernel']
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
  assert np.abs(kernel - c.params['backbone']['stem']['kernel']).max() > 0.01


def test_an_update_in_bfloat16_points_where_that_in_float32_does():
  # By the running statistics: those of a batch, at initial weights, amplify
  # rounding until the gradients of deep layers have nothing in common.
  optimizer = make_optimizer('sgd', 0.01, weight_decay=0.0)
  batch = {name: value[None] for name, value in global_batch(2).items()}
  state, updates = steps.create_state(make(), optimizer, 0), []
  for dtype in (jnp.float32, jnp.bfloat16):
    model = make(dtype=dtype)
    step = one_device_step(model=model, optimizer=optimizer, freeze_bn=True)
    after, _ = step(state, batch)
    update = jax.tree.map(lambda a, b: a - b, after.params, state.params)
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(update)]
    updates.append(np.concatenate(leaves))
  one, other = updates
  assert not np.array_equal(one, other)
  lengths = np.linalg.norm(one), np.linalg.norm(other)
  np.testing.assert_allclose(lengths[1], lengths[0], rtol=0.02)
  assert one @ other > 0.995 * np.prod(lengths)
