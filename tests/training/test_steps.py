"""Steps over several devices against the same step on one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from miniature import CLASSES, global_batch, make, one_device_step, shard_mapped

from deeplab_jax.benchmark.timing import compilations
from deeplab_jax.runtime import distributed
from deeplab_jax.training import steps
from deeplab_jax.training.optimizers import make_optimizer


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


@pytest.fixture
def after_one_step(random_variables):
  model, optimizer = make(), make_optimizer('sgd', 0.1, weight_decay=1e-4)
  state = initial_state(model, optimizer, random_variables(model))
  settings = {'model': model, 'optimizer': optimizer}
  return state, settings


def test_train_step_on_four_devices_matches_one(after_one_step):
  assert jax.device_count() == 4
  state, settings = after_one_step
  batch = global_batch()
  void = (batch['label'] == 255).reshape(4, -1).sum(1)
  assert len(set(void.tolist())) == 4
  four, measures = steps.pmap_train_step(**settings)(
    distributed.replicate(state), distributed.shard(batch)
  )
  one, expected = one_device_step(**settings)(
    state, jax.tree.map(lambda x: x[None], batch)
  )
  np.testing.assert_allclose(
    measures['loss'], np.full(4, expected['loss'][0]), atol=1e-5
  )
  np.testing.assert_allclose(
    measures['grad_norm'], np.full(4, expected['grad_norm'][0]), rtol=1e-4
  )
  valid = batch['label'].size - void.sum()
  assert measures['valid_pixels'].tolist() == [valid] * 4
  assert expected['valid_pixels'].tolist() == [valid]
  for name in ('params', 'batch_stats'):
    ours, theirs = (jax.device_get(getattr(s, name)) for s in (four, one))
    assert_trees_close(ours, theirs, atol=1e-5)
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), four.params, state.params
  )
  assert min(jax.tree.leaves(moved)) > 0


def assert_same_update(ours, theirs):
  (state, measures), (expected, expected_measures) = ours, theirs
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(
      measures[name], expected_measures[name], rtol=1e-5
    )
  assert_trees_close(
    *(jax.device_get(x.variables) for x in (state, expected)), atol=1e-6
  )
  assert int(state.step) == int(expected.step) == 1


def test_train_step_under_plain_jit_is_the_mapped_one_on_one_device(
  random_variables,
):
  model, optimizer = make(sync_bn=False), make_optimizer('sgd', 0.1)
  state = initial_state(model, optimizer, random_variables(model))
  settings = {'model': model, 'optimizer': optimizer, **LOSS}
  batch = global_batch(4)
  plain = functools.partial(steps.train_step, **settings, axis_name=None)
  mapped, measures = one_device_step(**settings)(
    state, jax.tree.map(lambda x: x[None], batch)
  )
  measures = {name: value[0] for name, value in measures.items()}
  assert_same_update(jax.jit(plain)(state, batch), (mapped, measures))


def test_train_step_under_shard_map_is_the_one_under_pmap(after_one_step):
  state, settings = after_one_step
  batch = global_batch()
  step = functools.partial(steps.train_step, **settings)
  ours = shard_mapped(step, PartitionSpec())(state, batch)
  theirs, measures = steps.pmap_train_step(**settings)(
    distributed.replicate(state), distributed.shard(batch)
  )
  measures = {name: value[0] for name, value in measures.items()}
  assert_same_update(ours, (theirs, measures))


def training_logits(state, batch):
  """Those of the whole batch at once, with its own statistics."""
  apply = make(sync_bn=False).apply
  logits, _ = jax.jit(
    functools.partial(apply, train=True, mutable=['batch_stats'])
  )({'params': state.params, 'batch_stats': state.batch_stats}, batch['image'])
  return logits


def test_loss_is_the_mean_over_all_valid_pixels(after_one_step):
  state, settings = after_one_step
  batch = global_batch()
  _, measures = steps.pmap_train_step(**settings)(
    distributed.replicate(state), distributed.shard(batch)
  )
  logits = training_logits(state, batch)
  valid = batch['label'] != 255
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits[valid], batch['label'][valid]
  )
  np.testing.assert_allclose(measures['loss'][0], losses.mean(), rtol=1e-5)


LOSS = {
  'class_weights': (0.5, 0.0, 2.0, 1.3),
  'hardest': 0.3,
  'label_smoothing': 0.1,
}


def test_weighted_mined_and_smoothed_loss_on_four_devices_matches_one(
  after_one_step,
):
  state, settings = after_one_step
  settings = settings | LOSS
  batch = global_batch()
  batch['label'][3:] %= 2  # devices differ in their weights too
  four, measures = steps.pmap_train_step(**settings)(
    distributed.replicate(state), distributed.shard(batch)
  )
  one, expected = one_device_step(**settings)(
    state, jax.tree.map(lambda x: x[None], batch)
  )
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(
      measures[name], np.full(4, expected[name][0]), rtol=1e-4
    )
  for name in ('params', 'batch_stats'):
    ours, theirs = (jax.device_get(getattr(s, name)) for s in (four, one))
    assert_trees_close(ours, theirs, atol=1e-5)


@pytest.mark.parametrize('names', [LOSS, ['hardest']])
def test_loss_is_the_weighted_mean_over_the_hardest_pixels(
  after_one_step, names
):
  state, settings = after_one_step
  chosen = {name: LOSS[name] for name in names}
  batch = global_batch()
  _, measures = steps.pmap_train_step(**settings, **chosen)(
    distributed.replicate(state), distributed.shard(batch)
  )
  logits = training_logits(state, batch)
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
  np.testing.assert_allclose(measures['loss'][0], total / weight, rtol=1e-4)


def test_a_batch_of_weightless_classes_gives_zero_and_not_nan(after_one_step):
  state, settings = after_one_step
  batch = global_batch(4)
  batch['label'][:] = 1
  _, measures = steps.pmap_train_step(**settings, **LOSS)(
    distributed.replicate(state), distributed.shard(batch)
  )
  np.testing.assert_array_equal(measures['loss'], 0)
  assert np.isfinite(measures['grad_norm']).all()


def test_a_batch_of_void_alone_gives_zero_and_not_nan(after_one_step):
  state, settings = after_one_step
  batch = global_batch(4)
  batch['label'][:] = 255
  _, measures = steps.pmap_train_step(**settings)(
    distributed.replicate(state), distributed.shard(batch)
  )
  np.testing.assert_array_equal(measures['loss'], 0)
  assert np.isfinite(measures['grad_norm']).all()


def test_frozen_bn_keeps_statistics_and_normalises_by_them(after_one_step):
  state, settings = after_one_step
  before = jax.tree.map(np.copy, state.batch_stats)
  batch = global_batch()
  after, measures = steps.pmap_train_step(**settings, freeze_bn=True)(
    distributed.replicate(state), distributed.shard(batch)
  )
  jax.tree.map(np.testing.assert_array_equal, after.batch_stats, before)
  logits = jax.jit(functools.partial(make().apply, train=False))(
    {'params': state.params, 'batch_stats': before}, batch['image']
  )
  valid = batch['label'] != 255
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits[valid], batch['label'][valid]
  )
  np.testing.assert_allclose(measures['loss'][0], losses.mean(), rtol=1e-5)


def test_without_synchronised_bn_statistics_are_those_of_the_devices_averaged(
  random_variables,
):
  model, optimizer = make(sync_bn=False), make_optimizer('sgd', 0.1)
  state = initial_state(model, optimizer, random_variables(model))
  batch = distributed.shard(global_batch())
  after, _ = steps.pmap_train_step(model=model, optimizer=optimizer)(
    distributed.replicate(state), batch
  )
  apply = jax.jit(
    functools.partial(model.apply, train=True, mutable=['batch_stats'])
  )
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  each = [apply(variables, x)[1]['batch_stats'] for x in batch['image']]
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
    state, measures = step(state, batch)
    results[kind] = sums, jax.device_get((state.variables, measures))
  sums, expected = results.pop('none')
  assert sums > 0
  for other_sums, other in results.values():
    assert other_sums == sums
    assert_trees_close(other, expected, atol=1e-5)


def test_the_train_step_compiles_once_and_donates_its_state(after_one_step):
  state, settings = after_one_step
  step = steps.pmap_train_step(**settings)
  current = distributed.replicate(state)
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
  updates = []
  for dtype in (jnp.float32, jnp.bfloat16):
    model = make(dtype=dtype)
    state = steps.create_state(model, optimizer, 0)
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
