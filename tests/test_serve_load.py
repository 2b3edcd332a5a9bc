"""Many requests: the server keeps up with the network, and its memory flat."""

import concurrent.futures
import http.client
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from loopback import ask, encoded

from deeplab_jax.data.shapes import generate_scene

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group('alone')]
CLIENTS, REQUESTS = 16, 2000
SIZES = [(144, 192), (192, 144), (200, 300), (240, 320), (333, 250), (320, 480)]
ALONE = """
import json, pathlib, sys, time
from deeplab_jax.predict import Predictor
from deeplab_jax.runtime import host
host.configure()
host.cache_programs()
files = [p.read_bytes() for p in sorted(pathlib.Path(sys.argv[2]).iterdir())]
predictor = Predictor.from_workdir(sys.argv[1])
for _ in predictor.map(files):
  pass
start = time.monotonic()
for _ in predictor.map(files[i % len(files)] for i in range(int(sys.argv[3]))):
  pass
print(json.dumps(time.monotonic() - start))
"""


@pytest.fixture(scope='module')
def environment():
  """That of a user: the suite's own compiles programs that run slowly."""
  return {k: v for k, v in os.environ.items() if k[:4] not in ('XLA_', 'JAX_')}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, environment):
  """A run of the default network, and a folder of photos of mixed sizes."""
  root = tmp_path_factory.mktemp('load')
  options = [
    *('--config.train.steps=20', '--config.train.eval_every=20'),
    f'--config.data.prepared_dir={root}/prepared',
  ]
  subprocess.run(
    [sys.executable, '-m', 'deeplab_jax.main', f'--workdir={root}', *options],
    env=environment,
    check=True,
    capture_output=True,
  )
  (root / 'photos').mkdir()
  for index, size in enumerate(SIZES * 4):
    image, _ = generate_scene(np.random.default_rng(index), size)
    (root / f'photos/{index:02}.jpg').write_bytes(encoded(image, 'JPEG'))
  return root


def memory(process):
  """Resident, in MB."""
  text = Path(f'/proc/{process.pid}/status').read_text()
  return int(re.search(r'VmRSS:\s+(\d+) kB', text)[1]) / 1e3


def test_16_clients_get_2000_answers_as_fast_as_the_network_alone(
  workdir, environment, capsys
):
  photos = [p.read_bytes() for p in sorted((workdir / 'photos').iterdir())]
  alone = json.loads(
    subprocess.run(
      [sys.executable, '-c', ALONE, workdir, workdir / 'photos', str(REQUESTS)],
      env=environment,
      check=True,
      stdout=subprocess.PIPE,
    ).stdout
  )
  server = subprocess.Popen(
    [
      sys.executable,
      '-m',
      'deeplab_jax.serve',
      f'--workdir={workdir}',
      '--port=0',
    ],
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
  )
  with server:
    port = int(server.stdout.readline().rpartition(':')[2].strip(' /\n'))
    for photo in photos:  # compiles
      assert ask(port, '/v1/segment', photo).status == 200
    numbers, times, sizes = itertools.count(1), [], {}

    def client(most):
      """Sends requests until enough were sent, or the server closes."""
      connection = http.client.HTTPConnection('127.0.0.1', port, timeout=120)
      answered = 0
      while (number := next(numbers)) <= most:
        start = time.monotonic()
        try:
          connection.request(
            'POST', '/v1/segment', photos[number % len(photos)]
          )
          answer = connection.getresponse()
        except ConnectionError:  # before any byte of an answer
          break
        assert (answer.status, answer.read()[:4]) == (200, b'\x89PNG')
        answered += 1
        times.append(time.monotonic() - start)
        if number in (200, REQUESTS):
          sizes[number] = memory(server)
      connection.close()
      return answered

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
      start = time.monotonic()
      answered = sum(clients.map(client, [REQUESTS] * CLIENTS))
      seconds = time.monotonic() - start
      assert answered == REQUESTS
      tenths = np.quantile(times, (0.5, 0.95, 0.99))

      # The end, in the midst of requests.
      threading.Timer(3, server.send_signal, [signal.SIGTERM]).start()
      answered += sum(clients.map(client, [10**9] * CLIENTS))
    assert server.wait(60) == 0
    said = server.stdout.read()
  growth = sizes[REQUESTS] / sizes[200] - 1
  with capsys.disabled():
    print(
      f'\n{REQUESTS} requests: {REQUESTS / seconds:.1f} a second, alone'
      f' {REQUESTS / alone:.1f}; p50, p95, p99'
      f' {", ".join(f"{1e3 * t:.0f}" for t in tenths)} ms; memory'
      f' {sizes[200]:.0f} MB at request 200, then {growth:+.1%}; {said}',
    )
  # Each image that was segmented has reached its client.
  assert f'stopped after {answered + len(photos)} images' in said
  assert alone / seconds > 0.8
  assert growth < 0.05
