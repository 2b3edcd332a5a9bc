"""What a process sets for a CPU, seen from processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jaxlib.utils
import pytest

import deeplab_jax
from deeplab_jax.runtime import host

pytestmark = pytest.mark.compiles


def run(*arguments, check=True, **environment):
  """Runs Python; None takes a variable out of the environment."""
  environment = {
    name: value
    for name, value in {**os.environ, **environment}.items()
    if value is not None
  }
  return subprocess.run(
    [sys.executable, *arguments],
    capture_output=True,
    text=True,
    check=check,
    env=environment,
    timeout=600,
  )


def test_the_command_starts_by_path():
  done = run(
    Path(deeplab_jax.__file__).with_name('main.py'),
    '--mode=eval',
    '--workdir=missing',
    check=False,
    PYTHONPATH=str(Path(deeplab_jax.__file__).parents[1]),
  )
  (line,) = done.stderr.splitlines()
  assert done.returncode == 1 and line.startswith('error: ')
  assert 'missing' in line


@pytest.mark.parametrize(
  ('platforms', 'xla_flags'),
  [
    ('cpu', '--xla_backend_optimization_level=2'),
    ('cuda', '--xla_backend_optimization_level=2'),
    ('cpu', ''),
  ],
)
def test_options_of_the_user_come_last_and_accelerators_get_none(
  monkeypatch, platforms, xla_flags
):
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  monkeypatch.setenv('XLA_FLAGS', xla_flags)
  host.configure()
  options = os.environ['XLA_FLAGS'].split()
  given = xla_flags.split()
  ours = options[: len(options) - len(given)]
  assert options == ours + given
  assert bool(ours) == (platforms == 'cpu')
  if ours:
    assert '--xla_disable_hlo_passes=cse_barrier_expander' in ours


def test_compiles_with_the_option_of_the_user():
  program = (
    'from deeplab_jax.runtime import host; host.configure(); import jax;'
    'print(jax.jit(lambda x: x + 1).lower(1.0).compile()(1.0))'
  )
  own = '--xla_backend_optimization_level=0 --xla_disable_hlo_passes=dce'
  done = run('-c', program, JAX_PLATFORMS='cpu', XLA_FLAGS=own)
  assert done.stdout == '2.0\n'


@pytest.mark.parametrize(
  ('variable', 'mode', 'expected'),
  [
    (None, 0o755, '{}/deeplab_jax/programs'),
    ('/given', 0o755, '/given'),
    (None, 0o777, None),
  ],
)
def test_programs_are_cached_where_the_environment_says_or_no_other_writes(
  tmp_path, monkeypatch, variable, mode, expected
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  folder = tmp_path / 'deeplab_jax' / 'programs'
  folder.mkdir(parents=True)
  folder.chmod(mode)
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  before = jax.config.jax_compilation_cache_dir
  try:
    jax.config.update('jax_compilation_cache_dir', variable)
    if variable:  # which JAX reads when it is imported
      monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', variable)
    host.cache_programs()
    found = jax.config.jax_compilation_cache_dir
    assert found == (expected and expected.format(tmp_path))
  finally:
    jax.config.update('jax_compilation_cache_dir', before)


ALARM = """
import sys
from deeplab_jax.runtime import host
if sys.argv[1] == 'hide':
  host.hide_alarms()
import threading, os
import jax, jax.numpy as jnp, numpy as np
# Folding this takes XLA more than the second after which it raises an alarm.
threading.Timer(6, lambda: os._exit(0)).start()
x = np.random.default_rng(0).random((2000, 2000), np.float32)
jax.jit(lambda: jax.lax.reduce_window(
  jnp.asarray(x), 0.0, jax.lax.add, (15, 15), (1, 1), 'SAME'))()
"""


def alarms(what, **environment):
  environment = {'TF_CPP_MIN_LOG_LEVEL': None, **environment}
  done = run(
    '-c',
    ALARM,
    what,
    XLA_FLAGS='',
    JAX_ENABLE_COMPILATION_CACHE='0',
    JAX_PLATFORMS='cpu',
    **environment,
  )
  return 'slow_operation_alarm' in done.stderr


@pytest.mark.slow
def test_alarms_of_slow_compiling_are_hidden_unless_the_user_wants_them():
  assert alarms('show')
  assert not alarms('hide')
  assert alarms('hide', TF_CPP_MIN_LOG_LEVEL='0')


def test_importing_the_library_hides_no_alarm():
  program = (
    'import jaxlib.utils as u; levels = []; '
    'u.absl_set_min_log_level = levels.append; '
    'import deeplab_jax, deeplab_jax.train; print(levels)'
  )
  assert run('-c', program, TF_CPP_MIN_LOG_LEVEL=None).stdout == '[]\n'


@pytest.mark.parametrize(
  ('variable', 'levels'), [(None, [3]), ('1', [3]), ('0', []), ('3', [])]
)
def test_alarms_are_hidden_unless_the_environment_shows_them(
  monkeypatch, variable, levels
):
  found = []
  monkeypatch.setattr(jaxlib.utils, 'absl_set_min_log_level', found.append)
  monkeypatch.delenv('TF_CPP_MIN_LOG_LEVEL', raising=False)
  if variable:
    monkeypatch.setenv('TF_CPP_MIN_LOG_LEVEL', variable)
  host.hide_alarms()
  assert found == levels


REMATERIALIZED = """
import functools
from deeplab_jax.runtime import host
host.configure()
import jax, jax.numpy as jnp
from deeplab_jax import deeplab_v3
from deeplab_jax.models.resnet import Block, PreActBottleneckUnit, UnitGeometry

def block(kind):
  unit = functools.partial(PreActBottleneckUnit, 8)
  return Block(unit, (UnitGeometry(1, 1, 1),) * 3, kind)

def network(kind):
  return deeplab_v3(output_stride=8, rematerialization=kind)

for kind in KINDS:
  model = MODEL(kind)
  x = jnp.zeros(SHAPE)
  v = jax.eval_shape(functools.partial(model.init, train=False),
                     jax.random.key(0), x)
  def loss(params, stats, x):
    variables = {'params': params, 'batch_stats': stats}
    y, _ = model.apply(variables, x, train=True, mutable=['batch_stats'])
    return jax.tree.leaves(y)[0].sum()
  compiled = jax.jit(jax.grad(loss)).lower(
    v['params'], v['batch_stats'], x).compile()
  print(compiled.memory_analysis().temp_size_in_bytes)
"""


def gradient_memory(model, kinds, shape):
  """Bytes that the gradient takes beside parameters and results."""
  given = f'KINDS, SHAPE = {kinds}, {shape}'
  program = given + REMATERIALIZED.replace('MODEL', model)
  flags = '--xla_backend_optimization_level=0'  # makes no difference to it
  return map(int, run('-c', program, XLA_FLAGS=flags).stdout.split())


def test_rematerialization_saves_memory():
  none, elementwise, block = gradient_memory(
    'block', ('none', 'elementwise', 'block'), (1, 65, 65, 32)
  )
  assert block < elementwise < none


@pytest.mark.slow
def test_rematerialized_blocks_take_half_the_memory_at_stride_8():
  none, block = gradient_memory('network', ('none', 'block'), (2, 513, 513, 3))
  assert block < none / 2
