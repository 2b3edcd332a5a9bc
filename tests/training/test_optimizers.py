"""Schedules and updates against hand-computed values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from deeplab_jax.training import optimizers
from deeplab_jax.training.optimizers import (
  SCHEDULES,
  frozen_parameters,
  make_optimizer,
  make_schedule,
  poly_schedule,
)

PARAMS = {
  'backbone': {
    'stem': {'kernel': jnp.asarray([2.0])},
    'norm': {'scale': jnp.asarray([3.0])},
  },
  'logits': {'kernel': jnp.asarray([-1.0]), 'bias': jnp.asarray([4.0])},
}
GRADIENTS = jax.tree.map(lambda x: 0.5 * jnp.ones_like(x), PARAMS)


def updated(optimizer, count=1):
  params, state = PARAMS, optimizer.init(PARAMS)
  for _ in range(count):
    updates, state = optimizer.update(GRADIENTS, state, params)
    params = jax.tree.map(jnp.add, params, updates)
  return params


@pytest.mark.parametrize(
  ('step', 'expected'),
  [(0, 0.007), (15_000, 0.007 * 0.5**0.9), (30_000, 0.0), (40_000, 0.0)],
)
def test_poly_schedule_equals_the_formula(step, expected):
  rate = poly_schedule(0.007, 30_000)(step)
  np.testing.assert_allclose(rate, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ('step', 'expected'),
  [(0, 0.2), (250, 0.2 * (1 + 0.5**0.5) / 2), (500, 0.1), (1000, 0), (2000, 0)],
)
def test_cosine_schedule_equals_the_formula(step, expected):
  rate = SCHEDULES['cosine'](0.2, 1000)(step)
  np.testing.assert_allclose(rate, expected, rtol=1e-5, atol=1e-8)


def test_step_schedule_falls_by_the_factor_at_each_milestone():
  steps = 0, 49, 50, 74, 75, 99
  rates = [make_schedule('step', 1.0, 100)(step) for step in steps]
  np.testing.assert_allclose(rates, [1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-5)
  # In a short run two milestones may meet at one step.
  both = {'milestones': (0.5, 0.51), 'milestone_factor': 0.5}
  rates = [make_schedule('step', 8.0, 10, **both)(step) for step in (4, 5)]
  np.testing.assert_allclose(rates, [8, 2], rtol=1e-6)


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    ({'milestones': (0.5, 1.0)}, r'milestones must be .* got \(0.5, 1.0\)'),
    ({'milestones': (30,)}, r'milestones must be shares .* got \(30,\)'),
    ({'milestones': ('half',)}, 'milestones must be shares .* got'),
    ({'milestone_factor': 0.0}, 'milestone_factor must be above 0, got 0.0'),
  ],
)
def test_milestones_that_are_no_shares_are_refused(settings, words):
  with pytest.raises(ValueError, match=words):
    make_schedule('step', 0.1, 100, **settings)


def test_warm_up_rises_from_zero_and_joins_the_curve():
  schedule = make_schedule('poly', 1.0, 100, power=2.0, warmup_steps=10)
  for step, expected in ((0, 0), (5, 0.5 * 0.95**2), (10, 0.9**2), (50, 0.25)):
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-5)


@pytest.mark.parametrize('name', SCHEDULES)
def test_every_schedule_warms_up_and_runs_in_a_step(name):
  plain, warm = (
    jax.jit(make_schedule(name, 0.3, 60, warmup_steps=count))
    for count in (0, 20)
  )
  for step in (0, 7, 20, 45):
    expected = min(step / 20, 1) * plain(jnp.int32(step))
    np.testing.assert_allclose(warm(jnp.int32(step)), expected, rtol=1e-5)


def test_a_schedule_from_outside_is_one_function(monkeypatch):
  def halving(steps, learning_rate):
    return lambda step: learning_rate * 0.5 ** (step / steps)

  monkeypatch.setitem(SCHEDULES, 'halving', halving)
  for name in ('halving', halving):
    rate = make_schedule(name, 0.8, 10, warmup_steps=0, power=3, milestones=())
    np.testing.assert_allclose([rate(0), rate(10), rate(20)], [0.8, 0.4, 0.2])
  with pytest.raises(ValueError, match=r"cosine or step.*, got 'linear'"):
    make_schedule('linear', 0.1, 10)


def test_sgd_with_momentum_equals_two_steps_by_hand():
  params = updated(make_optimizer('sgd', 0.1, momentum=0.9), 2)
  # velocity 0.5, then 0.9 * 0.5 + 0.5
  expected = 3.0 - 0.1 * 0.5 - 0.1 * 0.95
  np.testing.assert_allclose(
    params['backbone']['norm']['scale'], expected, rtol=1e-6
  )


def test_weight_decay_reaches_kernels_only():
  params = updated(make_optimizer('sgd', 0.1, weight_decay=0.25))
  kernel = params['backbone']['stem']['kernel']
  np.testing.assert_allclose(kernel, 2 - 0.1 * (0.5 + 0.25 * 2), rtol=1e-6)
  head = params['logits']['kernel']
  np.testing.assert_allclose(head, -1 - 0.1 * (0.5 - 0.25), rtol=1e-6)
  for plain, start in (
    (params['backbone']['norm']['scale'], 3),
    (params['logits']['bias'], 4),
  ):
    np.testing.assert_allclose(plain, start - 0.05, rtol=1e-6)


def test_head_multiplier_scales_all_but_the_backbone():
  params = updated(make_optimizer('sgd', 0.1, head_multiplier=10.0))
  np.testing.assert_allclose(params['backbone']['stem']['kernel'], 1.95)
  np.testing.assert_allclose(params['logits']['bias'], 4 - 0.5)


def test_adam_moves_by_the_learning_rate_at_first():
  params = updated(make_optimizer('adam', 0.01))
  np.testing.assert_allclose(params['logits']['bias'], 3.99, rtol=1e-5)


def kernels(tree):
  flat = flatten_dict(tree)
  return unflatten_dict({path: path[-1] == 'kernel' for path in flat})


cosine = optax.cosine_decay_schedule(0.1, 5)


@pytest.mark.parametrize('name', ['adamw', optax.lamb, optax.nadamw])
def test_an_optimizer_that_takes_the_rate_equals_that_of_optax(name):
  """It then has neither the L2 penalty nor the rate twice."""
  own = getattr(optax, name) if isinstance(name, str) else name
  for rate in (0.05, cosine):
    ours = updated(make_optimizer(name, rate, weight_decay=0.3), 3)
    theirs = updated(own(rate, weight_decay=0.3, mask=kernels), 3)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_settings_that_a_recipe_fixes_are_left_as_they_are():
  fixed = functools.partial(optax.adamw, b1=0.5, weight_decay=0.2)
  ours = updated(make_optimizer(fixed, 0.05, weight_decay=0.7), 3)
  theirs = updated(optax.adamw(0.05, b1=0.5, weight_decay=0.2, mask=kernels), 3)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_clipping_and_the_head_multiplier_go_around_a_whole_chain():
  def whole(learning_rate):
    return optax.chain(optax.trace(0.9), optax.scale(-learning_rate))

  params = updated(make_optimizer(whole, 1.0, clip_norm=0.2, head_multiplier=3))
  np.testing.assert_allclose(params['logits']['bias'], 4 - 0.3, rtol=1e-5)
  scale = params['backbone']['norm']['scale']
  np.testing.assert_allclose(scale, 3 - 0.1, rtol=1e-5)


@pytest.mark.parametrize(
  ('name', 'moments'), [('sgd', ['trace']), ('adam', ['count', 'mu', 'nu'])]
)
def test_arrays_of_an_optimizer_have_the_names_of_older_checkpoints(
  name, moments
):
  state = make_optimizer(name, 0.1, weight_decay=0.1).init(PARAMS)
  paths = [p for p, _ in jax.tree_util.tree_leaves_with_path(state)]
  names = {
    jax.tree_util.keystr(p[:2], simple=True, separator='/') for p in paths
  }
  assert names == {*(f'2/{moment}' for moment in moments)}
  state = make_optimizer(name, cosine).init(PARAMS)
  assert jax.tree_util.tree_leaves_with_path(state)[-1][0][0].idx == 4


@pytest.mark.parametrize(
  ('patterns', 'frozen'),
  [
    ((), []),
    (('backbone/*',), ['backbone/norm/scale', 'backbone/stem/kernel']),
    (('*/kernel',), ['backbone/stem/kernel', 'logits/kernel']),
    (('logits/bias', '*/scale'), ['backbone/norm/scale', 'logits/bias']),
  ],
)
def test_patterns_freeze_the_parameters_whose_names_they_fit(patterns, frozen):
  found = flatten_dict(frozen_parameters(PARAMS, patterns), sep='/')
  assert found.keys() == flatten_dict(PARAMS, sep='/').keys()
  assert sorted(name for name in found if found[name]) == frozen


@pytest.mark.parametrize(
  ('patterns', 'words'),
  [
    (
      ('backbone/*', 'bakbone/stem/*'),
      r"freeze must name parameters, as backbone/\* or logits/\*, got 'bakbone",
    ),
    (('logits/bais',), "got 'logits/bais'$"),
    ((3,), "got '3'$"),
    (('backbone/*', 'logits/*'), 'freeze must leave some to train, got'),
  ],
)
def test_patterns_that_freeze_nothing_or_all_are_refused(patterns, words):
  with pytest.raises(ValueError, match=words):
    frozen_parameters(PARAMS, patterns)


def test_clipping_scales_the_gradient_to_its_norm():
  # The norm of four gradients of 0.5 is 1.
  params = updated(make_optimizer('sgd', 1.0, clip_norm=0.2))
  np.testing.assert_allclose(params['logits']['bias'], 3.9, rtol=1e-5)


def test_gradients_of_held_parameters_are_clipped_apart():
  optimizer = make_optimizer('sgd', 1.0, clip_norm=0.2)
  held = {'backbone': True, 'logits': False}
  held = {k: jax.tree.map(lambda _, k=k: held[k], PARAMS[k]) for k in PARAMS}
  none = jax.tree.map(lambda _: False, PARAMS)
  state = optimizer.init(PARAMS)
  # Two gradients of 0.5 have the norm 0.5 ** 0.5, and four the norm 1.
  for mask, expected in ((held, 0.2 * 0.5**0.5), (none, 0.1)):
    updates, _ = optimizer.update(GRADIENTS, state, PARAMS, held=mask)
    for update in jax.tree.leaves(updates):
      np.testing.assert_allclose(update, -expected, rtol=1e-6)


def test_without_clipping_no_norm_is_computed():
  def roots(clip_norm):
    optimizer = make_optimizer('sgd', 1.0, clip_norm=clip_norm)
    state = optimizer.init(PARAMS)
    return str(jax.make_jaxpr(optimizer.update)(PARAMS, state, PARAMS)).count(
      'sqrt'
    )

  assert roots(clip_norm=0.2) == 1
  assert roots(clip_norm=None) == 0


def test_an_unknown_optimizer_is_refused():
  with pytest.raises(ValueError, match="sgd or adam or adamw, got 'lamb'"):
    make_optimizer('lamb', 0.1)


def test_an_optimizer_from_outside_is_one_function(monkeypatch):
  def signs(momentum):
    del momentum
    return optax.scale_by_sign()

  monkeypatch.setitem(optimizers.OPTIMIZERS, 'signs', signs)
  for name in ('signs', signs):
    params = updated(make_optimizer(name, 0.1, head_multiplier=2.0))
    np.testing.assert_allclose(params['backbone']['stem']['kernel'], 2 - 0.1)
    np.testing.assert_allclose(params['logits']['bias'], 4 - 0.2)


def test_a_run_can_go_on_with_other_numbers():
  plain = make_optimizer('sgd', 0.1).init(PARAMS)
  other = make_optimizer(
    'sgd', 0.1, weight_decay=0.1, head_multiplier=2.0, clip_norm=1.0
  ).init(PARAMS)
  assert jax.tree.structure(plain) == jax.tree.structure(other)
