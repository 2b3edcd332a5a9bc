"""Schedules and updates against hand-computed values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deeplab_jax.training import optimizers
from deeplab_jax.training.optimizers import make_optimizer, poly_schedule

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


def test_warm_up_rises_from_zero_and_joins_the_curve():
  schedule = poly_schedule(1.0, 100, power=2.0, warmup_steps=10)
  for step, expected in ((0, 0), (5, 0.5 * 0.95**2), (10, 0.9**2), (50, 0.25)):
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-5)


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


def test_clipping_scales_the_gradient_to_its_norm():
  # The norm of four gradients of 0.5 is 1.
  params = updated(make_optimizer('sgd', 1.0, clip_norm=0.2))
  np.testing.assert_allclose(params['logits']['bias'], 3.9, rtol=1e-5)


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
  with pytest.raises(ValueError, match="sgd or adam, got 'lamb'"):
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
