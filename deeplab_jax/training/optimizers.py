"""Learning rate schedules and optimizers, from optax."""

import fnmatch
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, path_aware_map

from deeplab_jax.runtime.errors import choose, require

# To add an optimizer: a function that takes, by keyword, what it needs of
# `momentum`, `weight_decay`, `mask` (of what decays) and `learning_rate`. Of
# these it does the decay and the scaling itself if it takes them.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  'sgd': lambda momentum: optax.trace(momentum),
  'adam': optax.scale_by_adam,
  'adamw': optax.adamw,
}


def poly_schedule(
  learning_rate: float, steps: int, power: float = 0.9
) -> optax.Schedule:
  """Returns `learning_rate * (1 - step / steps) ** power`.

  Chen et al., "Rethinking Atrous Convolution" (2017), section 4.
  """
  require(power >= 0, 'power must be at least 0', power)
  return optax.polynomial_schedule(learning_rate, 0, power, steps)


def step_schedule(
  learning_rate: float,
  steps: int,
  milestones: Sequence[float] = (0.5, 0.75),
  milestone_factor: float = 0.1,
) -> optax.Schedule:
  """Multiplies the rate by a factor at each milestone, a share of the steps.

  He et al., "Deep Residual Learning" (2016), section 4.2, has these defaults.
  """
  factor = milestone_factor
  inside = [isinstance(x, float) and 0 < x < 1 for x in milestones]
  require(all(inside), 'milestones must be shares in (0, 1)', milestones)
  require(factor > 0, 'milestone_factor must be above 0', factor)
  at = [round(share * steps) for share in milestones]
  return lambda step: learning_rate * factor ** sum(step >= x for x in at)


# To add a schedule: a function that takes, by keyword, what it needs of the
# settings above, and returns a function from the step to the learning rate.
SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
  'poly': poly_schedule,
  # Loshchilov and Hutter, "SGDR" (2017), equation 5, without restarts.
  'cosine': lambda learning_rate, steps: optax.cosine_decay_schedule(
    learning_rate, steps
  ),
  'step': step_schedule,
}


def make_schedule(
  name: str | Callable[..., optax.Schedule],
  learning_rate: float,
  steps: int,
  *,
  warmup_steps: int = 0,
  **settings: Any,
) -> optax.Schedule:
  """Makes one of `SCHEDULES`, or what a function like its values returns.

  During the first `warmup_steps` it is multiplied by `step / warmup_steps`.
  Raises `ValueError` for an unknown name or an impossible value.
  """
  schedule = choose('schedule', name, SCHEDULES)
  require(learning_rate > 0, 'learning_rate must be above 0', learning_rate)
  require(warmup_steps >= 0, 'warmup_steps must be at least 0', warmup_steps)
  rate = _call(schedule, learning_rate=learning_rate, steps=steps, **settings)
  if not warmup_steps:
    return rate
  return lambda step: jnp.minimum(step / warmup_steps, 1) * rate(step)


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

  `name` may also be a function like its values, or one of optax, as
  `optax.lamb`. SGD has the `momentum`; Adam uses 0.9 and 0.999. `weight_decay`
  is the factor of the L2 penalty on convolution kernels, unless the optimizer
  takes it, as AdamW does (Loshchilov and Hutter, 2019: the kernels shrink by
  it times the learning rate). `head_multiplier` multiplies the learning rate
  outside the backbone. Gradients of a larger global norm than `clip_norm` are
  scaled to it; those that `update` is told are `held`, a tree of bools, apart.
  Raises `ValueError` for an unknown name or an impossible value.
  """
  core, rate = choose('optimizer', name, OPTIMIZERS), learning_rate
  rule = 'must be at least 0'
  require(0 <= momentum < 1, 'momentum must be in [0, 1)', momentum)
  require(weight_decay >= 0, f'weight_decay {rule}', weight_decay)
  require(head_multiplier >= 0, f'head_multiplier {rule}', head_multiplier)
  require((clip_norm or 1) > 0, 'clip_norm must be above 0', clip_norm)
  takes, none = inspect.signature(core).parameters, optax.identity()
  decay = {
    'weight_decay': weight_decay,
    'mask': lambda tree: path_aware_map(lambda p, _: p[-1] == 'kernel', tree),
  }
  # The same parts for all numbers: a run may go on with others.
  return optax.chain(
    _clip_by_norm(clip_norm) if clip_norm else none,
    none if 'weight_decay' in takes else optax.add_decayed_weights(**decay),
    _call(core, learning_rate=rate, momentum=momentum, **decay),
    optax.masked(
      optax.scale(head_multiplier),
      lambda tree: path_aware_map(lambda p, _: p[0] != 'backbone', tree),
    ),
    none if 'learning_rate' in takes else optax.scale_by_learning_rate(rate),
  )


def _clip_by_norm(largest: float) -> optax.GradientTransformation:
  clip = optax.clip_by_global_norm(largest)

  def update(grads: Any, state: Any, _: Any, held: Any = None) -> Any:
    if held is None:
      return clip.update(grads, state)
    free = jax.tree.map(lambda g, h: jnp.where(h, 0, g), grads, held)
    parts = free, jax.tree.map(jnp.subtract, grads, free)
    clipped = [clip.update(part, state)[0] for part in parts]
    return jax.tree.map(jnp.add, *clipped), state

  return optax.GradientTransformationExtraArgs(clip.init, update)


def _call(function: Callable[..., Any], **settings: Any) -> Any:
  """Calls a function with those settings that it names and has not fixed."""
  fixed = getattr(function, 'keywords', {})  # by functools.partial
  takes = [x for x in inspect.signature(function).parameters if x not in fixed]
  return function(**{key: settings[key] for key in takes if key in settings})


def frozen_parameters(params: Any, patterns: Sequence[str]) -> Any:
  """Marks, in a tree of bools, the parameters whose name fits a pattern.

  A name is a path, as 'backbone/stem/kernel', and `*` stands for any part of
  it, slashes too. Raises `ValueError` if a pattern fits none, or all are fit.
  """
  names, found = list(flatten_dict(params, sep='/')), set[str]()
  rule = f'freeze must name parameters, as {"/* or ".join(sorted(params))}/*'
  for pattern in map(str, patterns):
    fits = fnmatch.filter(names, pattern)
    require(bool(fits), rule, pattern)
    found.update(fits)
  require(len(found) < len(names), 'freeze must leave some to train', patterns)
  return path_aware_map(lambda p, _: '/'.join(map(str, p)) in found, params)
