"""What a process sets for a CPU, seen from processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path('/sys/kernel/mm/transparent_hugepage/enabled')


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


PROBE = """
import ctypes, os, pathlib, resource, sys
from deeplab_jax import host
host._HUGE_PAGES = pathlib.Path(sys.argv[1])
host.restart_on_huge_pages('probe')
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before, size = faults(), 2**28
libc.memset(libc.malloc(size), 1, size)
print(faults() - before, os.environ.get('GLIBC_TUNABLES', ''), *sys.argv[2:])
"""


@pytest.fixture
def probe(tmp_path):
  """Runs the probe as a module; gives its page faults, setting and argument."""
  (tmp_path / 'probe.py').write_text(PROBE)

  def run_probe(
    setting='always [madvise] never', start=('-m', 'probe'), **environment
  ):
    setting_file = tmp_path / 'enabled'
    setting_file.write_text(setting)
    done = subprocess.run(
      [sys.executable, *start, setting_file, 'an argument'],
      capture_output=True,
      text=True,
      check=True,
      env={
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'GLIBC_TUNABLES': '',
        'PYTHONPATH': str(tmp_path),
        **environment,
      },
    )
    faults, tunables, argument = done.stdout.split(' ', 2)
    assert argument == 'an argument\n'
    return int(faults), tunables

  return run_probe


def test_restart_asks_malloc_for_huge_pages(probe):
  assert probe()[1] == 'glibc.malloc.hugetlb=1'
  own = 'glibc.malloc.check=0'
  assert probe(GLIBC_TUNABLES=own)[1] == f'{own}:glibc.malloc.hugetlb=1'


@pytest.mark.skipif(
  not HUGE_PAGES.exists() or '[madvise]' not in HUGE_PAGES.read_text(),
  reason='this system gives no huge pages on request',
)
def test_memory_is_mapped_by_huge_pages(probe):
  without, _ = probe('never')
  if without < 2**28 // 4096:
    pytest.skip('this system does not count page faults')
  assert probe()[0] < without / 8


@pytest.mark.parametrize(
  'circumstances',
  [
    {'setting': '[always] madvise never'},
    {'setting': 'always madvise [never]'},
    {'JAX_PLATFORMS': 'cuda'},
    {'start': ('-c', 'import probe')},
  ],
)
def test_no_restart_without_need(probe, circumstances):
  assert probe(**circumstances)[1] == ''


def test_a_setting_of_the_user_stays(probe):
  own = 'glibc.malloc.hugetlb=0'
  assert probe(GLIBC_TUNABLES=own)[1] == own


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
