"""Averages, frozen parameters, dropout and schedules, in steps and resumed.

The network is one convolution before the head: its steps compile in a second.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from miniature import CLASSES, global_batch, make_config, one_device_step

from deeplab_jax import DeepLabV3, build
from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.distributed import AXIS_NAME
from deeplab_jax.training import steps
from deeplab_jax.weights.checkpoints import Checkpoints

pytestmark = pytest.mark.compiles


class Stem(nn.Module):
  output_stride: int = 8

  @nn.compact
  def __call__(self, x, *, train):
    x = nn.Conv(6, (3, 3), 8, padding=1, name='stem')(x)
    own = {'use_running_average': not train, 'axis_name': AXIS_NAME}
    return {'postnorm': nn.relu(nn.BatchNorm(**own, name='norm')(x))}


class Head(nn.Module):
  @nn.compact
  def __call__(self, x, *, train, mask):
    del train, mask
    return nn.relu(nn.Dense(8, name='project')(x))


MODEL = DeepLabV3(Stem(), Head(), CLASSES)
BATCHES = [
  {**global_batch(8, seed), 'place': np.arange(8, dtype=np.int32)}
  for seed in range(6)
]


class Run:
  """What `train.py` makes of settings, for this network."""

  def __init__(self, **changes):
    settings = {'train.steps': 6, 'optimizer.learning_rate': 0.05}
    config = make_config(settings, **changes)
    self.settings = changes
    self.ema = config.train.ema is not None
    _, self.optimizer = build.make_schedule_and_optimizer(config)
    self.step = build.make_train_step(config, MODEL, self.optimizer)

  def start(self):
    return jax.device_get(steps.create_state(MODEL, self.optimizer, 0))

  def go(self, state, first, last):
    """Takes the steps after `first`; returns the state after each."""
    state, states = distributed.replicate(state.with_ema(self.ema)), []
    for step in range(first, last):
      state, _ = self.step(state, distributed.shard(BATCHES[step]))
      states.append(jax.device_get(state))
    return states


def changed(before, after):
  """The names of arrays that differ in any bit."""
  before, after = (flatten_dict(tree, sep='/') for tree in (before, after))
  assert before.keys() == after.keys()
  return {k for k in before if before[k].tobytes() != after[k].tobytes()}


def of_backbone(names):
  return {name for name in names if name.startswith('backbone/')}


BACKBONE = ('backbone/*',)
DROPS = {'train__ema': 0.3, 'train__dropout': 0.5}
RUNS = {
  'ema and dropout': DROPS,
  'parts': {**DROPS, 'train__accumulate': 2, 'train__freeze_bn': True},
  'adamw and cosine': {
    'optimizer__name': 'adamw',
    'optimizer__schedule': 'cosine',
    'optimizer__warmup_steps': 4,
  },
  'step, frozen for good': {
    'optimizer__schedule': 'step',
    'train__freeze': ('backbone/stem/*',),
  },
  'adam, frozen at first': {
    'optimizer__name': 'adam',
    'train__freeze': BACKBONE,
    'train__freeze_steps': 4,
    'train__ema': 0.3,
  },
  'clipped, frozen at first': {
    'optimizer__clip_norm': 0.05,
    'train__freeze': BACKBONE,
    'train__freeze_steps': 4,
  },
}


@pytest.fixture(scope='module')
def made():
  """Function of a name in RUNS: the run, compiled once."""
  return functools.cache(lambda name: Run(**RUNS[name]))


@pytest.mark.parametrize('name', RUNS)
def test_steps_cut_by_a_checkpoint_are_those_in_one_go_bit_for_bit(
  made, name, tmp_path
):
  run, settings = made(name), RUNS[name]
  whole = run.go(run.start(), 0, 6)
  with Checkpoints(tmp_path) as saved:
    saved.save(whole[2], {})
  with Checkpoints(tmp_path) as saved:
    state = saved.open('latest').fill(run.start())
  assert (state.ema is not None) == run.ema
  cut = run.go(state, 3, 6)[-1]
  assert int(cut.step) == 6
  assert jax.tree.structure(cut) == jax.tree.structure(whole[-1])
  jax.tree.map(np.testing.assert_array_equal, cut, whole[-1])
  if 'train__freeze' in settings:
    start = jax.device_get(run.start().params)
    held = of_backbone(changed(start, whole[3].params))
    ends = of_backbone(changed(whole[3].params, whole[4].params))
    if 'train__freeze_steps' in settings:
      assert not held and len(ends) == 4
    else:
      assert held == ends == {'backbone/norm/scale', 'backbone/norm/bias'}


def test_averages_equal_a_loop_in_numpy(made):
  run = made('ema and dropout')
  start = run.start()
  expected = jax.tree.map(np.float64, start.params)
  for step, state in enumerate(run.go(start, 0, 6)):
    decay = min(0.3, (1 + step) / (10 + step))
    expected = jax.tree.map(
      lambda a, x, decay=decay: decay * a + (1 - decay) * x,
      expected,
      state.params,
    )
    for ours, theirs in zip(
      jax.tree.leaves(state.ema), jax.tree.leaves(expected), strict=True
    ):
      np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert state.variables == {
      'params': state.ema,
      'batch_stats': state.batch_stats,
    }


def test_averages_start_at_the_parameters_and_are_dropped(tmp_path):
  state = Run(optimizer__schedule='cosine').start()
  assert state.ema is None and state.variables['params'] is state.params
  on = state.with_ema(True)
  jax.tree.map(np.testing.assert_array_equal, on.ema, state.params)
  later = on.replace(step=4, ema=jax.tree.map(lambda x: x + 1, on.ema))
  kept = later.with_ema(True)
  jax.tree.map(np.testing.assert_array_equal, kept.ema, later.ema)
  with Checkpoints(tmp_path) as saved:
    saved.save(later, {})
  with Checkpoints(tmp_path) as saved:
    found = saved.open('latest')
    jax.tree.map(
      np.testing.assert_array_equal, found.variables, later.variables
    )
    off = found.fill(state).with_ema(False)
  assert off.ema is None
  jax.tree.map(np.testing.assert_array_equal, off.params, state.params)


@pytest.mark.parametrize('name', ['ema and dropout', 'parts'])
def test_averages_and_dropout_on_four_devices_match_one(made, name):
  run = made(name)
  four = run.go(run.start(), 0, 2)[-1]
  step = one_device_step(
    model=MODEL,
    optimizer=run.optimizer,
    ema=0.3,
    dropout=0.5,
    freeze_bn=name == 'parts',  # else the parts are normalized apart
  )
  one = run.start().with_ema(True)
  for batch in BATCHES[:2]:
    one, _ = step(one, jax.tree.map(lambda x: x[None], batch))
  for name in ('params', 'ema', 'batch_stats'):
    ours, theirs = getattr(four, name), jax.device_get(getattr(one, name))
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-6)


def test_dropout_depends_on_seed_step_and_place_of_the_image_alone():
  draw = functools.partial(steps._dropped, 0.25, 400)
  scale = draw(0, 5, jnp.arange(6))
  assert scale.shape == (6, 1, 1, 400)
  np.testing.assert_allclose(np.unique(scale), [0, 4 / 3], rtol=1e-6)
  np.testing.assert_allclose(scale.mean((1, 2, 3)), 1, atol=0.12)
  np.testing.assert_array_equal(draw(0, 5, jnp.array([4, 1])), scale[4:0:-3])
  others = scale[0], draw(0, 6, jnp.arange(1))[0], draw(1, 5, jnp.arange(1))[0]
  assert all((scale[1] != other).mean() > 0.2 for other in others)


def test_dropout_scales_the_input_of_the_class_layer():
  images = jnp.asarray(BATCHES[0]['image'][:2])
  variables = jax.jit(functools.partial(MODEL.init, train=False))(
    jax.random.key(0), images
  )
  apply = jax.jit(functools.partial(MODEL.apply, train=False))
  assert variables.keys() == {'params', 'batch_stats'}
  bias = variables['params']['logits']['bias'] = jnp.arange(CLASSES) + 0.5
  plain = apply(variables, images)
  variables['dropout'] = {'scale': jnp.array([0, 3.0]).reshape(2, 1, 1, 1)}
  first, second = apply(variables, images)
  np.testing.assert_allclose(first, jnp.broadcast_to(bias, first.shape))
  np.testing.assert_allclose(
    second - bias, 3 * (plain[1] - bias), rtol=1e-4, atol=1e-5
  )


def test_what_is_frozen_for_good_stays_and_has_no_gradient(made):
  plain = made('adamw and cosine')
  run = Run(**plain.settings, train__freeze=BACKBONE)
  before = plain.go(plain.start(), 0, 2)[-1]  # with moments of all
  after = run.go(before, 2, 4)[-1]
  names = changed(before.params, after.params)
  assert len(names) == 4 and not of_backbone(names)
  assert len(changed(before.batch_stats, after.batch_stats)) == 2
  counts = []
  for one in (plain, run):
    state = distributed.replicate(one.start())
    program = one.step.lower(state, distributed.shard(BATCHES[0])).as_text()
    counts.append(program.count('stablehlo.convolution'))
  assert counts == [2, 1]  # of the images, and of the kernel's gradient


def test_what_is_frozen_at_first_does_not_count_in_the_norm_that_is_clipped(
  made,
):
  run = made('clipped, frozen at first')
  for_good = Run(optimizer__clip_norm=0.05, train__freeze=BACKBONE)
  found, expected = (x.go(x.start(), 0, 4)[-1].params for x in (run, for_good))
  for ours, theirs in zip(
    *map(jax.tree.leaves, (found, expected)), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
  # Its own gradients are clipped apart, so its first updates are no larger.
  trace = run.go(run.start(), 0, 1)[0].opt_state[2].trace['backbone']
  norm = sum((x**2).sum() for x in jax.tree.leaves(trace)) ** 0.5
  np.testing.assert_allclose(norm, 0.05, rtol=0.02)
