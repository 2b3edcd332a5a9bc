"""A weighted sum of losses: its settings, and steps on one and more devices."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from deeplab_jax.runtime.distributed import AXIS_NAME
from deeplab_jax.training import objective, steps
from deeplab_jax.training.losses import LOSSES, softmax_cross_entropy
from deeplab_jax.training.objective import batch_loss, read_terms

pytestmark = pytest.mark.compiles


def test_examples_in_the_docstrings_hold():
  assert doctest.testmod(objective) == (0, 1)


def gentle(*arguments):
  return 0.5 * softmax_cross_entropy(*arguments)


@pytest.mark.parametrize(
  ('terms', 'expected'),
  [
    (('dice',), {'dice': 1}),
    (('cross_entropy:1', 'dice:0.5'), {'cross_entropy': 1, 'dice': 0.5}),
    ((gentle, ('focal', 2)), {'gentle': 1, 'focal': 2}),
    (
      ((functools.partial(gentle), 0.25), ['dice', 3]),
      {'gentle': 0.25, 'dice': 3},
    ),
  ],
)
def test_terms_are_names_or_functions_with_or_without_weights(terms, expected):
  found = read_terms(terms)
  assert {name: weight for name, (_, weight) in found.items()} == expected
  assert all(callable(loss) for loss, _ in found.values())


@pytest.mark.parametrize(
  ('terms', 'words'),
  [
    ((), 'terms must name a loss'),
    (('dise:1',), "dice or lovasz_softmax, got 'dise'"),
    (('dice:1:2',), "got 'dice:1:2'"),
    (('dice', '0.5'), "got '0.5'"),
    (('dice:x',), "the weight of dice must be a number above 0, got 'x'"),
    (('dice:nan',), "above 0, got 'nan'"),
    (('focal:-1',), "the weight of focal must be a number above 0, got '-1'"),
    (
      ((gentle, None),),
      'the weight of gentle must be a number above 0, got None',
    ),
    (('dice', 'dice:2'), "terms must have different names, got 'dice'"),
  ],
)
def test_other_terms_are_refused(terms, words):
  with pytest.raises(ValueError, match=words):
    read_terms(terms)


@pytest.mark.parametrize(
  'settings', [(0.1, 1.0, None), (0.0, 0.5, None), (0.0, 1.0, (1.0, 2.0))]
)
def test_settings_of_pixels_need_a_loss_of_pixels(settings):
  objective.check_settings(('dice', 'focal:0.1'), *settings)
  with pytest.raises(ValueError, match='need a loss of pixels among the terms'):
    objective.check_settings(('dice', 'lovasz_softmax'), *settings)


class Tiny(nn.Module):
  """A network without batch statistics, so that images stay independent."""

  @nn.compact
  def __call__(self, images, *, train):
    x = images / 255.0
    self.variable('batch_stats', 'none', jnp.zeros, ())
    second = nn.Dense(CLASSES, name='auxiliary')(x)
    self.sow('intermediates', 'auxiliary_logits', second)
    return nn.Dense(CLASSES, name='logits')(x)


CLASSES = 4
TERMS = ('cross_entropy', 'focal:2', 'dice:0.5', 'lovasz_softmax:3')
OPTIMIZER = optax.sgd(1.0)  # a step is the gradient
SHAPING = {'class_weights': (0.5, 0.0, 2, 1.3), 'hardest': 0.4}


def drawn():
  """8 images, unlike in their void; one shows nothing else, one class none."""
  rng = np.random.default_rng(0)
  label = rng.integers(0, CLASSES - 1, (8, 6, 5)).astype(np.uint8)
  for i in range(8):
    label[i, : i // 2] = 255
  label[3] = 255
  image = rng.integers(0, 256, (8, 6, 5, 3), np.uint8)
  return {'image': image, 'label': label}


@functools.cache
def start():
  params = Tiny().init(jax.random.key(0), drawn()['image'], train=True)
  params = jax.tree.map(lambda x: 3 * x, params['params'])
  stats, zero = {'none': np.zeros(())}, np.zeros((), np.int32)
  return steps.TrainState(zero, params, stats, OPTIMIZER.init(params))


@functools.cache
def mapped(devices, **settings):
  settings = {'model': Tiny(), 'optimizer': OPTIMIZER, **settings}
  return jax.pmap(
    functools.partial(steps.train_step, **settings),
    axis_name=AXIS_NAME,
    in_axes=(None, 0),
    out_axes=(None, 0),
    devices=jax.devices()[:devices],
  )


def step(devices, batch, **settings):
  """The gradient and the metrics of a step over a number of devices."""
  parts = {k: x.reshape(devices, -1, *x.shape[1:]) for k, x in batch.items()}
  found = mapped(devices, **settings)(start(), parts)
  after, metrics = jax.device_get(found)
  for value in metrics.values():
    np.testing.assert_array_equal(value, value[0])
  grads = jax.tree.map(np.subtract, start().params, after.params)
  return grads, {name: value[0] for name, value in metrics.items()}


def assert_close(ours, theirs):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6),
    ours,
    theirs,
  )


@functools.cache
def whole():
  return step(1, drawn(), terms=TERMS, auxiliary=0.4, **SHAPING)


@pytest.mark.parametrize('devices', [2, 4])
def test_a_step_on_more_devices_equals_that_on_one(devices):
  assert_close(
    step(devices, drawn(), terms=TERMS, auxiliary=0.4, **SHAPING), whole()
  )


def test_every_term_is_logged_before_its_weight():
  batch, (grads, metrics) = drawn(), whole()
  x, params = batch['image'] / np.float32(255), start().params

  def total(params):
    def of(name, terms):
      logits = x @ params[name]['kernel'] + params[name]['bias']
      return batch_loss(logits, batch['label'], terms=terms, **SHAPING)[0]

    main = of('logits', TERMS)
    second = of('auxiliary', TERMS)['loss']
    return main['loss'] + 0.4 * second, {**main, 'loss_auxiliary': second}

  slope, expected = jax.jit(jax.grad(total, has_aux=True))(params)
  expected['loss'] += 0.4 * expected['loss_auxiliary']
  assert metrics.keys() - expected.keys() == {'grad_norm', 'valid_pixels'}
  assert_close({name: metrics[name] for name in expected}, expected)
  assert_close(grads, slope)
  for name in LOSSES:
    assert metrics[f'loss_{name}'] > 0


def test_accumulated_terms_are_means_over_micro_batches_by_their_pixels():
  batch, count = drawn(), 2
  ours = step(1, batch, terms=TERMS, accumulate=count)
  assert_close(step(4, batch, terms=TERMS, accumulate=count), ours)
  parts = ({k: x[i::count] for k, x in batch.items()} for i in range(count))
  found = [step(1, part, terms=TERMS) for part in parts]
  weights = np.array([m['valid_pixels'] for _, m in found])
  assert weights[0] != weights[1]
  for name in ('loss', *(f'loss_{name}' for name in LOSSES)):
    values = np.array([m[name] for _, m in found])
    np.testing.assert_allclose(
      ours[1][name], values @ weights / weights.sum(), rtol=1e-6
    )
  share = weights / weights.sum()
  grads = [
    jax.tree.map(lambda x, w=w: w * x, g)
    for (g, _), w in zip(found, share, strict=True)
  ]
  assert_close(ours[0], jax.tree.map(np.add, *grads))


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_batch_of_void_gives_zero_and_not_nan(accumulate):
  batch = drawn()
  batch['label'][:] = 255
  grads, metrics = step(1, batch, terms=TERMS, accumulate=accumulate)
  assert not any(metrics.values())
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), grads)


def test_a_loss_of_regions_from_outside_sums_over_the_devices():
  def recall(logits, labels, ignore_label, *, across):
    """One minus the mean probability of the own class, of all classes."""
    p = jnp.where(labels == ignore_label, 0, 1)[..., None]
    own = p * jax.nn.one_hot(labels, logits.shape[-1])
    common = (own * jax.nn.softmax(logits)).sum((0, 1, 2))
    common, true = across(jnp.stack([common, own.sum((0, 1, 2))]))
    return 1 - (common / jnp.maximum(true, 1)).mean()

  terms = ((recall, 0.5), 'cross_entropy')
  one, four = (step(n, drawn(), terms=terms) for n in (1, 4))
  assert_close(four, one)
  assert 0.25 < one[1]['loss_recall'] < 1


def test_a_loss_that_is_neither_of_pixels_nor_of_regions_is_refused():
  def mean(logits, labels, ignore_label, label_smoothing):
    return softmax_cross_entropy(logits, labels, ignore_label).mean()

  logits, labels = jnp.zeros((2, 4, 5, 3)), jnp.zeros((2, 4, 5), jnp.int32)
  with pytest.raises(ValueError, match='mean must return a value per pixel'):
    batch_loss(logits, labels, terms=(mean,))
