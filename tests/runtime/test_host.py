"""What a process sets for a CPU, seen from processes of their own."""

import json
import mmap
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from deeplab_jax.runtime import host


def launch(*arguments, check=True, cwd=None, timeout=60, **environment):
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
    cwd=cwd,
    env=environment,
    timeout=timeout,
  )


def run(*arguments, **environment):
  return launch(*arguments, timeout=300, **environment).stdout.split()


PROBE = """
import ctypes, json, os, pathlib, resource, sys
from deeplab_jax.runtime import host
before = os.environ.get('GLIBC_TUNABLES')
host._HUGE_PAGES = pathlib.Path(sys.argv[1])
os.confstr = lambda name: sys.argv[2]
{fault}
host.restart_on_huge_pages('probe')
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
start, size = faults(), 2**28
libc.memset(libc.malloc(size), 1, size)
print(json.dumps({{
  'faults': faults() - start,
  'at_start': before,
  'now': os.environ.get('GLIBC_TUNABLES'),
  'marked': host._RESTARTED in os.environ,
  'argument': sys.argv[3],
}}))
"""
# Runs a module as a debugger or a profiler does.
TOOL = """
import runpy, sys
del sys.argv[:2]
runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
"""
HUGE = 'glibc.malloc.hugetlb=1'


def path(folder):
  return os.pathsep.join([str(folder), str(Path(host.__file__).parents[2])])


@pytest.fixture
def probe(tmp_path):
  """Runs the probe, as a module unless told otherwise; gives what it saw."""

  def run_probe(
    setting='always [madvise] never',
    libc='glibc 2.35',
    start=('-m', 'probe'),
    fault='',
    **environment,
  ):
    (tmp_path / 'probe.py').write_text(PROBE.format(fault=fault))
    (tmp_path / 'tool.py').write_text(TOOL)
    setting_file = tmp_path / 'enabled'
    setting_file.write_text(setting)
    given = {'GLIBC_TUNABLES': None, 'JAX_PLATFORMS': 'cpu', **environment}
    done = launch(
      *start,
      setting_file,
      libc,
      'an argument',
      cwd=tmp_path,
      PYTHONPATH=path(tmp_path),
      **given,
    )
    seen = json.loads(done.stdout)
    assert seen['argument'] == 'an argument' and not seen['marked']
    return seen

  return run_probe


@pytest.mark.parametrize(
  'start', [('-m', 'probe'), ('-u', '-X', 'utf8', '-m', 'probe')]
)
def test_restart_asks_malloc_for_huge_pages(probe, start):
  seen = probe(start=start)
  assert seen['at_start'] == HUGE and seen['now'] is None


def test_restart_keeps_the_settings_of_the_user(probe):
  own = 'glibc.malloc.check=0'
  seen = probe(GLIBC_TUNABLES=own)
  assert seen['at_start'] == f'{own}:{HUGE}' and seen['now'] == own


def test_restarts_once_though_the_setting_is_lost(probe):
  lose = "os.environ.pop('GLIBC_TUNABLES', None)"
  seen = probe(fault=lose)
  assert seen['at_start'] == HUGE and seen['now'] is None


@pytest.mark.parametrize('program', ['/missing/python', '', None])
def test_goes_on_where_no_program_can_be_started(probe, program):
  seen = probe(fault=f'sys.executable = {program!r}')
  assert seen['at_start'] is None and seen['now'] is None


@pytest.mark.parametrize(
  'circumstances',
  [
    {'setting': '[always] madvise never'},
    {'setting': 'always madvise [never]'},
    {'libc': 'glibc 2.34'},
    {'libc': 'musl 1.2'},
    {'JAX_PLATFORMS': 'cuda'},
    {'start': ('-c', 'import probe')},
    {'start': ('-m', 'tool', '-m', 'probe')},
    {'start': ('tool.py', '-m', 'probe')},
  ],
)
def test_no_restart_without_need(probe, circumstances):
  assert probe(**circumstances)['at_start'] is None


def test_a_setting_of_the_user_stays(probe):
  own = 'glibc.malloc.hugetlb=0'
  seen = probe(GLIBC_TUNABLES=own)
  assert seen['at_start'] == seen['now'] == own


@pytest.fixture
def faults_by_huge_pages():
  """Page faults of 256 MB in huge pages; skips where there are none."""
  if not host._gives_huge_pages_on_request():
    pytest.skip('glibc before 2.35, or no huge pages on request')
  with mmap.mmap(-1, 2**28, flags=mmap.MAP_PRIVATE) as memory:
    memory.madvise(mmap.MADV_HUGEPAGE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for start in range(0, 2**28, mmap.PAGESIZE):
      memory[start] = 1
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  faults = after - before
  if not 0 < faults < 2**28 // mmap.PAGESIZE / 8:
    pytest.skip('this kernel gave no huge pages or counts no page faults')
  return faults


def test_memory_is_mapped_by_huge_pages(probe, faults_by_huge_pages):
  ends = 2 * 2**21 // mmap.PAGESIZE  # the block need not begin at a huge page
  assert probe()['faults'] <= faults_by_huge_pages + ends
  assert probe('never')['faults'] > 8 * (faults_by_huge_pages + ends)


@pytest.mark.parametrize(
  ('program', 'arguments'),
  [
    ('main.py', ['--mode=eval', '--workdir=missing']),
    ('measure.py', ['--mode=forward', '--config=missing.py']),
  ],
)
def test_the_programs_start_by_path(tmp_path, program, arguments):
  done = launch(
    Path(host.__file__).with_name(program),
    *arguments,
    check=False,
    cwd=tmp_path,
    JAX_PLATFORMS='cpu',
    PYTHONPATH=path(tmp_path),
  )
  (line,) = done.stderr.splitlines()
  assert done.returncode == 1 and line.startswith('error: ')
  assert 'missing' in line


CUSTOMIZED = """
import os, pathlib
from deeplab_jax.runtime import host
host._HUGE_PAGES = pathlib.Path(__file__).with_name('enabled')
os.confstr = lambda name: 'glibc 2.36'
def execv(program, arguments):
  print(os.environ['GLIBC_TUNABLES'], *arguments[1:], flush=True)
  os._exit(0)
os.execv = execv
"""


@pytest.mark.parametrize(
  'command',
  [
    ['deeplab_jax.main', '--mode=eval', '--workdir=w'],
    ['deeplab_jax.benchmark.measure', '--mode=forward', '--crop=17'],
  ],
)
def test_the_programs_restart(tmp_path, command):
  (tmp_path / 'sitecustomize.py').write_text(CUSTOMIZED)
  (tmp_path / 'enabled').write_text('always [madvise] never')
  output = run(
    '-m',
    *command,
    PYTHONPATH=path(tmp_path),
    JAX_PLATFORMS='cpu',
    GLIBC_TUNABLES=None,
  )
  assert output == [HUGE, '-m', *command]


PROGRAM = """
import os
from deeplab_jax.runtime import host
host.prepare()
print(os.environ.get('XLA_FLAGS', ''))
"""


def test_options_of_the_user_come_last_and_accelerators_get_none():
  own = '--xla_backend_optimization_level=2'
  *ours, last = run('-c', PROGRAM, JAX_PLATFORMS='cpu', XLA_FLAGS=own)
  assert '--xla_disable_hlo_passes=cse_barrier_expander' in ours
  assert last == own
  assert run('-c', PROGRAM, JAX_PLATFORMS='cuda', XLA_FLAGS=own) == [own]


def test_compiles_with_the_option_of_the_user():
  program = (
    'from deeplab_jax import host; host.prepare(); import jax;'
    'print(jax.jit(lambda x: x + 1).lower(1.0).compile()(1.0))'
  )
  own = '--xla_backend_optimization_level=0 --xla_disable_hlo_passes=dce'
  assert run('-c', program, JAX_PLATFORMS='cpu', XLA_FLAGS=own) == ['2.0']


def test_programs_are_cached_where_the_environment_says():
  program = (
    'import pathlib, jax; from deeplab_jax import host;'
    "host.cache_programs(pathlib.Path('/w')); "
    'print(jax.config.jax_compilation_cache_dir)'
  )
  assert run('-c', program, JAX_COMPILATION_CACHE_DIR=None) == ['/w']
  assert run('-c', program, JAX_COMPILATION_CACHE_DIR='/own') == ['/own']


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
  done = launch(
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
    'import deeplab_jax, deeplab_jax.train; print(levels); '
    'from deeplab_jax import host; host.hide_alarms(); print(levels)'
  )
  assert run('-c', program, TF_CPP_MIN_LOG_LEVEL=None) == ['[]', '[3]']
  assert run('-c', program, TF_CPP_MIN_LOG_LEVEL='0') == ['[]', '[]']


def test_limits_are_those_of_this_machine(monkeypatch):
  limits = host.limits()
  text = Path('/proc/meminfo').read_text()
  kilobytes = int(text.split('MemTotal:')[1].split()[0])
  assert limits['memory'] == 1024 * kilobytes
  assert 100 < limits['threads'] < 2**31 and limits['hosts'] == 1

  def unknown(name):
    raise ValueError('unrecognized configuration name')

  monkeypatch.setattr(host.os, 'sysconf', unknown)
  monkeypatch.setattr(host, '_MAPPINGS', Path('/nope'))
  assert host.limits() == {'memory': None, 'threads': None, 'hosts': 1}


GIVES_BACK = """
import types
import jax
from deeplab_jax.runtime import host
from deeplab_jax.benchmark.timing import compilations
given_back = []
system = types.SimpleNamespace(malloc_trim=given_back.append)
host.ctypes = types.SimpleNamespace(CDLL=lambda _: system)
host.prepare()
host.prepare()
with compilations() as compiled:
  jax.jit(lambda x: x + 1)(1.0)
print(len(compiled) > 0, len(given_back) == len(compiled))
"""


def test_memory_is_given_back_once_a_compilation():
  assert run('-c', GIVES_BACK) == ['True', 'True']


REMATERIALIZED = """
import functools
from deeplab_jax.runtime import host
host.prepare()
import jax, jax.numpy as jnp
from deeplab_jax import deeplab_v3
for kind in KINDS:
  model = deeplab_v3(**NETWORK, output_stride=8, rematerialization=kind)
  x = jnp.zeros((BATCH, CROP, CROP, 3))
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


def gradient_memory(*kinds, batch, crop, **network):
  """Bytes that the gradient takes beside parameters and results."""
  names = f'KINDS, BATCH, CROP, NETWORK = {kinds}, {batch}, {crop}, {network}'
  program = f'{names}\n{REMATERIALIZED}'
  flags = '--xla_backend_optimization_level=0'  # makes no difference to it
  return map(int, run('-c', program, XLA_FLAGS=flags))


def test_rematerialization_saves_memory():
  none, elementwise, block = gradient_memory(
    *('none', 'elementwise', 'block'),
    batch=1,
    crop=65,
    backbone='resnet18',
    width=0.5,
    aspp_rates=(1,),
    aspp_features=16,
  )
  assert block < elementwise < none


@pytest.mark.slow
def test_rematerialized_blocks_take_half_the_memory_at_stride_8():
  none, block = gradient_memory('none', 'block', batch=2, crop=513)
  assert block < none / 2
