"""A server of `deeplab_jax.serve` in a thread, and a stand-in for its network.

`python -m loopback PORT SECONDS` serves the stand-in as the command does.
"""

import contextlib
import http.client
import io
import json
import socket
import sys
import threading
import time
import types

import numpy as np
import uvicorn
from PIL import Image

from deeplab_jax import serve
from deeplab_jax.data.datasets import DatasetInfo

DEFAULTS = {name: most for name, (most, _) in serve.LIMITS.items()}


class StrongestChannel:
  """Stands for a Predictor: a pixel is red, green or blue, never absent.

  `batches` holds the (height, width) of the images of each call. A test may
  close the `gate`, at which calls wait, or set the `error` that they raise.
  """

  info = DatasetInfo(
    'colors',
    ('red', 'green', 'blue', 'absent'),
    np.array(
      [[200, 30, 30], [30, 160, 60], [40, 60, 220], [9, 9, 9]], np.uint8
    ),
    values=(3, 7, 20, 21),
  )
  step, settings, trained_size = 70, {'backbone': 'none'}, None
  metrics = {'miou': 0.75, 'iou/absent': float('nan')}  # noqa: RUF012

  def __init__(self, seconds=0):
    self.batches, self.error, self.gate = [], None, threading.Event()
    self.seconds = seconds
    self.gate.set()

  def check(self, size):
    return True

  def __call__(self, image):
    return next(self.map([image]))

  def map(self, images, probabilities=False):
    if images:
      self.batches.append([image.shape[:2] for image in images])
      time.sleep(self.seconds)
      assert self.gate.wait(60)
    for image in images:
      if self.error:
        raise self.error
      label = image.argmax(-1).astype(np.uint8)
      scores = np.eye(4, dtype=np.float32)[label]
      yield (label, scores) if probabilities else label


@contextlib.contextmanager
def serving(predictor, token='', examples=(), **limits):
  """Serves at a free port, which it yields."""
  server = serve.Server(predictor, DEFAULTS | limits, token, examples)
  loop = uvicorn.Server(uvicorn.Config(server.app(), **serve.UVICORN))
  with socket.create_server(('127.0.0.1', 0)) as place:
    thread = threading.Thread(target=loop.run, args=([place],))
    thread.start()
    try:
      yield place.getsockname()[1]
    finally:
      loop.should_exit = True
      thread.join()
      server.thread.shutdown()


def ask(port, path, body=None, **headers):
  """Sends a request, a POST if it has a body; returns status, headers, body."""
  client = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
  with contextlib.closing(client):
    names = {name.replace('_', '-'): value for name, value in headers.items()}
    client.request('GET' if body is None else 'POST', path, body, names)
    answer = client.getresponse()
    return types.SimpleNamespace(
      status=answer.status, headers=answer.headers, body=answer.read()
    )


def segment(port, body, query='', **headers):
  return ask(port, f'/v1/segment{query}', body, **headers)


def queue_length(port):
  return int(measured(port, 'deeplab_queue_length'))


def measured(port, name):
  """The value of a metric; 0 before it is there."""
  for line in ask(port, '/metrics').body.decode().splitlines():
    if line.startswith(f'{name} '):
      return float(line.rpartition(' ')[2])
  return 0


def wait_until(holds):
  end = time.monotonic() + 30
  while not holds():
    assert time.monotonic() < end
    time.sleep(0.01)


def flag(height=30, width=60):
  """Three upright stripes, red, green and blue: image and classes."""
  label = np.broadcast_to(np.arange(width) * 3 // width, (height, width))
  label = label.astype(np.uint8)
  return np.eye(3, dtype=np.uint8)[label] * 200 + 20, label


def encoded(image, kind='PNG', **options):
  file = io.BytesIO()
  Image.fromarray(image).save(file, kind, **options)
  return file.getvalue()


def error_of(answer):
  """The one line of a refusal."""
  (line,) = answer.body.decode().splitlines()
  (error,) = json.loads(line).values()
  assert '\n' not in error
  return error


if __name__ == '__main__':
  network = StrongestChannel(float(sys.argv[2]))
  serve.Predictor = types.SimpleNamespace(from_workdir=lambda *_, **__: network)
  serve.main(['serve', '--workdir=.', f'--port={sys.argv[1]}'])
