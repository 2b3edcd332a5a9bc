"""Learning rate schedules and optimizers, from optax."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from deeplab_jax.runtime.errors import require

OPTIMIZERS = ('sgd', 'adam')


def poly_schedule(
  learning_rate: float, steps: int, *, power: float = 0.9, warmup_steps: int = 0
) -> optax.Schedule:
  """`learning_rate * (1 - step / steps) ** power`, after a linear warm-up.

  Chen et al., "Rethinking Atrous Convolution" (2017), section 4. The warm-up
  rises from 0 and joins the curve where it then stands.

  Raises:
    ValueError: for a value that makes no such schedule.
  """
  require(learning_rate > 0, 'learning_rate must be above 0', learning_rate)
  require(power >= 0, 'power must be at least 0', power)
  require(warmup_steps >= 0, 'warmup_steps must be at least 0', warmup_steps)

  def schedule(step: jax.Array) -> jax.Array:
    warmup = jax.numpy.minimum(step / max(warmup_steps, 1), 1)
    remaining = jax.numpy.clip(1 - step / steps, 0, 1)
    return learning_rate * warmup * remaining**power

  if warmup_steps:
    return schedule
  return optax.polynomial_schedule(learning_rate, 0, power, steps)


def make_optimizer(
  name: str,
  learning_rate: float | optax.Schedule,
  *,
  momentum: float = 0.9,
  weight_decay: float = 0.0,
  head_multiplier: float = 1.0,
  clip_norm: float | None = None,
) -> optax.GradientTransformation:
  """SGD with momentum, or Adam, as an optax transformation.

  Args:
    name: 'sgd' or 'adam'.
    learning_rate: a number or a schedule of the step.
    momentum: of SGD; Adam uses 0.9 and 0.999.
    weight_decay: factor of the L2 penalty's gradient, added to the gradients of
      the convolution kernels only (not to biases or batch normalisation).
    head_multiplier: factor on the learning rate of everything that is not in
      the backbone.
    clip_norm: gradients of a larger global norm are scaled to it; None for
      never.

  Raises:
    ValueError: for an unknown name or an impossible value.
  """
  require(0 <= momentum < 1, 'momentum must be in [0, 1)', momentum)
  require(weight_decay >= 0, 'weight_decay must be at least 0', weight_decay)
  require(
    head_multiplier >= 0, 'head_multiplier must be at least 0', head_multiplier
  )
  require((clip_norm or 1) > 0, 'clip_norm must be above 0', clip_norm)
  if name not in OPTIMIZERS:
    raise ValueError(f'optimizer must be sgd or adam, got {name!r}')
  # The same parts whatever the numbers, so that a run may go on with others.
  return optax.chain(
    # Even of an infinite norm, clipping keeps all gradients for their norm.
    optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
    optax.add_decayed_weights(weight_decay, mask=_is_kernel),
    optax.trace(momentum) if name == 'sgd' else optax.scale_by_adam(),
    optax.masked(optax.scale(head_multiplier), _is_head),
    optax.scale_by_learning_rate(learning_rate),
  )


def _is_kernel(params: Any) -> Any:
  return _map_paths(lambda path: path[-1] == 'kernel', params)


def _is_head(params: Any) -> Any:
  return _map_paths(lambda path: path[0] != 'backbone', params)


def _map_paths(function: Callable[[list[str]], bool], tree: Any) -> Any:
  return jax.tree_util.tree_map_with_path(
    lambda path, _: function([key.key for key in path]), tree
  )
