"""Learning rate schedules and optimizers, from optax."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from flax.traverse_util import path_aware_map

from deeplab_jax.runtime.errors import choose, require

# To add an optimizer: a function of the momentum, which it may ignore, that
# makes the core of the chain below.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  'sgd': lambda momentum: optax.trace(momentum),
  'adam': lambda momentum: optax.scale_by_adam(),
}


def poly_schedule(
  learning_rate: float, steps: int, *, power: float = 0.9, warmup_steps: int = 0
) -> optax.Schedule:
  """Returns `learning_rate * (1 - step / steps) ** power`, after a warm-up.

  Chen et al., "Rethinking Atrous Convolution" (2017), section 4. The warm-up
  rises linearly from 0 and meets the curve after `warmup_steps` steps. A value
  that makes no such schedule raises `ValueError`.
  """
  require(learning_rate > 0, 'learning_rate must be above 0', learning_rate)
  require(power >= 0, 'power must be at least 0', power)
  require(warmup_steps >= 0, 'warmup_steps must be at least 0', warmup_steps)
  poly = optax.polynomial_schedule(learning_rate, 0, power, steps)
  if not warmup_steps:
    return poly
  return lambda step: jnp.minimum(step / warmup_steps, 1) * poly(step)


def make_optimizer(
  name: str | Callable[..., optax.GradientTransformation],
  learning_rate: float | optax.Schedule,
  *,
  momentum: float = 0.9,
  weight_decay: float = 0.0,
  head_multiplier: float = 1.0,
  clip_norm: float | None = None,
) -> optax.GradientTransformation:
  """Makes an optax optimizer from one of `OPTIMIZERS`.

  `name` may also be a function like its values. SGD has the `momentum`; Adam
  uses 0.9 and 0.999. `weight_decay` is the factor of the L2 penalty on
  convolution kernels, and `head_multiplier` multiplies the learning rate
  outside the backbone. Gradients of a larger global norm than `clip_norm` are
  scaled to it. Raises `ValueError` for an unknown name or an impossible value.
  """
  core, rule = choose('optimizer', name, OPTIMIZERS), 'must be at least 0'
  require(0 <= momentum < 1, 'momentum must be in [0, 1)', momentum)
  require(weight_decay >= 0, f'weight_decay {rule}', weight_decay)
  require(head_multiplier >= 0, f'head_multiplier {rule}', head_multiplier)
  require((clip_norm or 1) > 0, 'clip_norm must be above 0', clip_norm)
  # The same parts for all numbers: a run may go on with others.
  return optax.chain(
    optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
    optax.add_decayed_weights(
      weight_decay,
      mask=lambda tree: path_aware_map(lambda p, _: p[-1] == 'kernel', tree),
    ),
    core(momentum=momentum),
    optax.masked(
      optax.scale(head_multiplier),
      lambda tree: path_aware_map(lambda p, _: p[0] != 'backbone', tree),
    ),
    optax.scale_by_learning_rate(learning_rate),
  )
