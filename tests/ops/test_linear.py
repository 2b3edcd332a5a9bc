"""A product with its transpose written out against JAX's own derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.ops.linear import linear_call

pytestmark = pytest.mark.compiles


def plain(x, y):
  return jnp.sin(x @ y)


def make(calls):
  """`plain` whose product notes when its transpose is asked for."""

  def transpose(x, y, gradient):
    calls.append(gradient.shape)
    return gradient @ y.T, x.T @ gradient

  @jax.custom_jvp
  def product(x, y):
    return x @ y

  @product.defjvp
  def _(values, tangents):
    z = product(*values)
    return z, linear_call(
      lambda x, y, x_dot, y_dot: product(x_dot, y) + product(x, y_dot),
      transpose,
      values,
      tangents,
      like=z,
    )

  return lambda x, y: jnp.sin(product(x, y))


def arguments():
  rng = np.random.default_rng(0)
  return rng.normal(size=(3, 4)), rng.normal(size=(4, 5))


def directions():
  rng = np.random.default_rng(1)
  return rng.normal(size=(3, 4)), rng.normal(size=(4, 5))


def sum_of_squares(function):
  return lambda *values: jnp.square(function(*values)).sum()


def gradient(function):
  return jax.grad(sum_of_squares(function), (0, 1))


def slope(function):
  """The derivative along the directions."""
  return lambda *values: jax.jvp(function, values, directions())[1]


def mapped(function, axes):
  """The function over two of what has an axis, from one of each."""

  def run(*values):
    values = [
      value if axis is None else jnp.stack([value, 2 * value], axis)
      for value, axis in zip(values, axes, strict=True)
    ]
    return jax.vmap(function, axes)(*values)

  return run


def rows_squared(function):
  """The whole gradient as one array, for derivatives of second order."""
  return lambda *values: jnp.concatenate(
    [jnp.ravel(part) for part in gradient(function)(*values)]
  )


DERIVATIVES = {
  'jvp': slope,
  'jacfwd': lambda f: jax.jacfwd(f, (0, 1)),
  'jacrev': lambda f: jax.jacrev(f, (0, 1)),
  'linearize': lambda f: lambda *v: jax.linearize(f, *v)[1](*directions()),
  'grad': gradient,
  'grad of one': lambda f: jax.grad(sum_of_squares(f), 1),
  'jvp of jvp': lambda f: slope(slope(f)),
  'jvp of grad': lambda f: slope(rows_squared(f)),
  'grad of jvp': lambda f: gradient(slope(f)),
  'grad of grad': lambda f: gradient(rows_squared(f)),
  'grad of remat': lambda f: gradient(jax.checkpoint(f)),
  'jvp of remat': lambda f: slope(jax.checkpoint(f)),
  **{
    f'{name} of vmap {axes}': lambda f, outer=outer, axes=axes: outer(
      mapped(f, axes)
    )
    for name, outer in (('grad', gradient), ('jvp', slope))
    for axes in ((0, None), (None, 1), (1, 0))
  },
  'vmap of grad': lambda f: mapped(gradient(f), (0, 1)),
  'vmap of jvp': lambda f: mapped(slope(f), (None, 0)),
}


@pytest.mark.parametrize('name', DERIVATIVES)
def test_derivatives_are_those_that_jax_derives(name):
  with jax.enable_x64(True):
    ours, theirs = (
      jax.tree.leaves(jax.jit(DERIVATIVES[name](function))(*arguments()))
      for function in (make([]), plain)
    )
    for a, b in zip(ours, theirs, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-10)
      assert np.abs(b).max() > 0.01


def test_reverse_mode_alone_asks_for_the_transpose():
  calls = []
  function = make(calls)
  slope(function)(*arguments())
  assert calls == []
  gradient(function)(*arguments())
  assert calls == [(3, 5)]
  gradient(mapped(function, (0, None)))(*arguments())
  assert calls == [(3, 5)] * 2
