"""What a process sets for a CPU, seen from processes of their own."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
from deeplab_jax import host
{prepare}
import jax, jax.numpy as jnp
step = jax.jit(lambda x: (jnp.sin(x @ x) @ x + x).sum())
x = jnp.ones((2000, 2000))
for _ in range(10):
  jax.block_until_ready(step(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
  jax.block_until_ready(step(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(program, **environment):
  environment = {
    name: value
    for name, value in {**os.environ, **environment}.items()
    if value is not None
  }
  done = subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    text=True,
    check=True,
    env=environment,
  )
  return done.stdout.split()


@pytest.mark.skipif(sys.platform != 'linux', reason="glibc's malloc")
def test_steps_map_no_memory_anew():
  unprepared, prepared = (
    int(
      run(FAULTS.format(prepare=line), JAX_PLATFORMS='cpu', XLA_FLAGS=None)[-1]
    )
    for line in ('', 'host.prepare()')
  )
  # Some steps find the heap in pieces and take more of it.
  assert unprepared > 3 * prepared


PROGRAM = """
import os
from deeplab_jax import host
host.prepare()
print(os.environ.get('XLA_FLAGS', ''))
"""


def test_options_of_the_user_come_last_and_accelerators_get_none():
  own = '--xla_backend_optimization_level=2'
  *ours, last = run(PROGRAM, JAX_PLATFORMS='cpu', XLA_FLAGS=own)
  assert '--xla_disable_hlo_passes=cse_barrier_expander' in ours
  assert last == own
  assert run(PROGRAM, JAX_PLATFORMS='cuda', XLA_FLAGS=own) == [own]


def test_compiles_with_the_option_of_the_user():
  program = (
    'from deeplab_jax import host; host.prepare(); import jax;'
    'print(jax.jit(lambda x: x + 1).lower(1.0).compile()(1.0))'
  )
  own = '--xla_backend_optimization_level=0 --xla_disable_hlo_passes=dce'
  assert run(program, JAX_PLATFORMS='cpu', XLA_FLAGS=own) == ['2.0']


def test_programs_are_cached_where_the_environment_says():
  program = (
    'import pathlib, jax; from deeplab_jax import host;'
    "host.cache_programs(pathlib.Path('/w')); "
    'print(jax.config.jax_compilation_cache_dir)'
  )
  assert run(program, JAX_COMPILATION_CACHE_DIR=None) == ['/w']
  assert run(program, JAX_COMPILATION_CACHE_DIR='/own') == ['/own']


REMATERIALIZED = """
import functools
from deeplab_jax import host
host.prepare()
import jax, jax.numpy as jnp
from deeplab_jax import deeplab_v3
for kind in ('none', 'elementwise', 'block'):
  model = deeplab_v3(
    'resnet18', width=0.5, output_stride=8, aspp_rates=(1,), aspp_features=16,
    rematerialization=kind,
  )
  x = jnp.zeros((1, 65, 65, 3))
  v = jax.eval_shape(functools.partial(model.init, train=False),
                     jax.random.key(0), x)
  def loss(params, stats, x):
    variables = {'params': params, 'batch_stats': stats}
    logits, _ = model.apply(variables, x, train=True, mutable=['batch_stats'])
    return logits.sum()
  compiled = jax.jit(jax.grad(loss)).lower(
    v['params'], v['batch_stats'], x).compile()
  print(compiled.memory_analysis().temp_size_in_bytes)
"""


def test_rematerialization_saves_memory():
  none, elementwise, block = map(
    int, run(REMATERIALIZED, XLA_FLAGS='--xla_backend_optimization_level=0')
  )
  assert block < elementwise < none
