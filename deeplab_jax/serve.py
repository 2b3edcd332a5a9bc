"""Segments images over HTTP and on a page: python -m deeplab_jax.serve.

--workdir=DIR names the folder of a training run. The page is at `/`; programs
post an image file to `/v1/segment`. docs/serving.md says more.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import hmac
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from deeplab_jax.data import image_files, images
from deeplab_jax.data.datasets import DatasetInfo
from deeplab_jax.data.shapes import generate_scene
from deeplab_jax.predict import Predictor
from deeplab_jax.runtime import console, host
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.visualize.labels import MEDIA_TYPES, encode

with console.one_line_errors():
  try:
    import prometheus_client as prometheus
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.exceptions import StarletteHTTPException
    from fastapi.responses import HTMLResponse, JSONResponse
  except ImportError as error:
    advice = "pip install 'deeplab_jax[serve]'"
    raise UserError(f'serving needs {error.name}: {advice}') from error

LIMITS = {
  'bytes': (32_000_000, 'Most bytes of an image file.'),
  'pixels': (40_000_000, 'Most pixels of an image.'),
  'queue': (64, 'Most requests that wait or are worked on.'),
  'batch': (8, 'Most images that are segmented together.'),
  'seconds': (120, 'Most seconds from a request to its answer.'),
}
UVICORN: dict[str, Any] = {
  'ws': 'none',
  'log_config': None,  # failures alone, on stderr
  'server_header': False,
  'headers': [('X-Content-Type-Options', 'nosniff')],
}
_LARGEST_NPZ = 2**27  # bytes
_POLICY = (  # the page may use itself, and nothing from elsewhere
  "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
  " connect-src 'self'; img-src blob: data:; base-uri 'none';"
  " form-action 'none'; frame-ancestors 'none'"
)
_QUEUE = prometheus.Gauge('deeplab_queue_length', 'Requests without an answer')
_IMAGES = prometheus.Counter('deeplab_images', 'Images segmented')
_SECONDS = prometheus.Histogram('deeplab_request_seconds', 'Time', ['status'])


@dataclasses.dataclass(eq=False)
class _Job:
  image: np.ndarray | None  # [H, W, C]; None once nobody waits for it
  scores: bool  # whether probabilities are wanted
  result: Any = None  # classes and probabilities, or an exception


class Server:
  """Answers requests in one event loop; one thread calls the network."""

  def __init__(
    self,
    predictor: Predictor,
    limits: Mapping[str, Any],
    token: str = '',
    examples: Sequence[bytes] = (),
  ) -> None:
    """Takes a number for each of `LIMITS`, and PNG files for the page."""
    self._predictor, self._limits, self._token = predictor, limits, token
    self._examples = examples
    self._places = asyncio.Semaphore(limits['queue'])
    self._decoded = asyncio.Semaphore(2 * limits['batch'])  # bounds the memory
    self._jobs: collections.deque[_Job] = collections.deque()
    self.thread = concurrent.futures.ThreadPoolExecutor(1)

  def app(self) -> FastAPI:
    """Returns the application, for uvicorn."""
    # The documentation that FastAPI offers loads scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None)
    app.add_exception_handler(StarletteHTTPException, _refuse)
    app.add_exception_handler(Exception, _refuse)
    app.post('/v1/segment')(self._segment)
    app.get('/v1/model')(self._model)
    app.get('/v1/examples/{number:int}')(self._example)
    app.get('/metrics')(self._metrics)
    app.get('/healthz')(lambda: {'status': 'ok'})
    app.get('/')(_page)
    return app

  def _authorize(self, request: Request) -> None:
    given = request.headers.get('authorization', '').partition(' ')[2].strip()
    if self._token and not given:
      reason = 'token missing; send the header Authorization: Bearer TOKEN'
      raise HTTPException(401, reason, {'WWW-Authenticate': 'Bearer'})
    token = self._token or given
    if not hmac.compare_digest(given.encode(), token.encode()):
      raise HTTPException(403, 'wrong token')

  async def _model(self, request: Request) -> dict[str, Any]:
    """Describes the network, its classes and the limits."""
    self._authorize(request)
    found = {
      'dataset': self._predictor.info.name,
      'classes': self._predictor.info.list_classes(),
      'step': self._predictor.step,
      'metrics': self._predictor.metrics,
      'settings': self._predictor.settings,
      'limits': dict(self._limits),
      'examples': len(self._examples),
      'versions': host.versions('deeplab_jax', 'jax', 'flax'),
    }
    # A metric may be NaN, which JSON does not have.
    return json.loads(json.dumps(found), parse_constant=lambda _: None)

  async def _example(self, request: Request, number: int) -> Response:
    self._authorize(request)
    if number >= len(self._examples):
      raise HTTPException(404, f'there is no example {number}')
    return Response(self._examples[number], media_type='image/png')

  async def _metrics(self, request: Request) -> Response:
    self._authorize(request)
    kind = prometheus.CONTENT_TYPE_LATEST
    return Response(prometheus.generate_latest(), media_type=kind)

  async def _segment(self, request: Request, format: str = '') -> Response:
    """Segments the image file that is the body of the request."""
    start, status, seconds = time.monotonic(), 500, self._limits['seconds']
    try:
      self._authorize(request)
      accept = request.headers.get('accept', '')
      wanted = (kind for kind, name in MEDIA_TYPES.items() if name in accept)
      kind = format or next(wanted, 'png')
      if kind not in MEDIA_TYPES:
        reason = f'format={kind}: must be one of {", ".join(MEDIA_TYPES)}'
        raise HTTPException(400, reason)
      if self._places.locked():
        reason = f'busy: {self._limits["queue"]} requests wait; try again'
        raise HTTPException(503, reason, {'Retry-After': '1'})
      with _QUEUE.track_inprogress():
        async with self._places, asyncio.timeout(seconds):
          data = await self._answer(request, kind)
      status, spent = 200, time.monotonic() - start
      headers = {'Server-Timing': f'server;dur={1e3 * spent:.1f}'}
      return Response(data, status, headers, MEDIA_TYPES[kind])
    except TimeoutError as error:
      status, reason = 504, f'not done within {seconds} s; try again'
      raise HTTPException(status, reason) from error
    except HTTPException as refusal:
      status = refusal.status_code
      raise
    finally:
      _SECONDS.labels(status).observe(time.monotonic() - start)

  async def _answer(self, request: Request, kind: str) -> bytes:
    """Does the work of a request, unless its client leaves."""
    data = await _body(request, self._limits['bytes'])
    work = asyncio.ensure_future(self._work(data, kind))
    left = asyncio.ensure_future(request.receive())
    try:
      await asyncio.wait((work, left), return_when='FIRST_COMPLETED')
      if work.done():
        return work.result()
      raise HTTPException(499, 'the client has left')
    finally:
      work.cancel()
      left.cancel()
      await asyncio.wait((work, left))  # its job is given up before the answer

  async def _work(self, data: bytes, kind: str) -> bytes:
    info, most = self._predictor.info, self._limits['pixels']
    if kind == 'npz':
      most = min(most, _LARGEST_NPZ // (4 * info.num_classes))
    async with self._decoded:
      image = await asyncio.to_thread(read, data, most, info)
      try:
        self._predictor.check(image.shape[:2])
      except UserError as error:
        raise HTTPException(413, str(error)) from error
      job = _Job(image, kind == 'npz')
      self._jobs.append(job)
      try:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.thread, self._run, job)
      finally:
        job.image = None
      if isinstance(job.result, Exception):
        raise job.result
      return await asyncio.to_thread(encode, kind, info, *job.result)

  def _run(self, own: _Job) -> None:
    """Segments an image with others that wait, unless an earlier call did."""
    while own.result is None and self._jobs:
      size = min(len(self._jobs), self._limits['batch'])
      jobs = [self._jobs.popleft() for _ in range(size)]
      try:
        for scores in (False, True):
          part = [(job, job.image) for job in jobs if job.scores == scores]
          part = [pair for pair in part if pair[1] is not None]
          rows = self._predictor.map([x for _, x in part], probabilities=scores)
          for (job, _), result in zip(part, rows, strict=True):
            job.result = result if scores else (result, None)
            _IMAGES.inc()
      except Exception as error:
        for job in jobs:
          job.result = job.result or error


async def _page() -> Response:
  page = (Path(__file__).parent / 'visualize/page.html').read_text()
  return HTMLResponse(page, headers={'Content-Security-Policy': _POLICY})


async def _refuse(request: Request, error: Any) -> Response:
  reason = getattr(error, 'detail', 'the server failed; its log says why')
  status = getattr(error, 'status_code', 500)
  headers = getattr(error, 'headers', None)
  return JSONResponse({'error': reason}, status, headers)


async def _body(request: Request, most: int) -> bytes:
  data, more = bytearray(), True
  size = int(request.headers.get('content-length', 0))
  while more and size <= most:
    message = await request.receive()
    if message['type'] == 'http.disconnect':
      raise HTTPException(499, 'the client has left')
    data += message.get('body', b'')
    size, more = len(data), message.get('more_body', False)
  if size > most:
    raise HTTPException(413, f'at most {most / 1e6:g} MB are accepted')
  return bytes(data)


def read(data: bytes, most: int, info: DatasetInfo | None = None) -> np.ndarray:
  """Reads an image file, uint8 [H, W, 3], or as stored if `info` says so.

  Raises `HTTPException` if it is no image, if it is damaged, and, before it
  decodes anything, if the image has more than `most` pixels.
  """
  try:
    stored = bool(info and info.mean)
    height, width = images.read_size('image', data, as_stored=stored)
  except UserError as error:
    too_large = isinstance(error.__cause__, image_files.Unusable)
    reason = f'{str(error).partition("; replace")[0]}; send a JPEG or PNG'
    raise HTTPException(413 if too_large else 415, reason) from error
  if width * height > most:
    size = f'{width}x{height}, {width * height / 1e6:.1f} megapixels'
    reason = f'image: {size}; at most {most / 1e6:.3g} are accepted'
    raise HTTPException(413, reason)
  try:
    return images.as_pixels(data, info)
  except UserError as error:
    reason = str(error).partition('; replace')[0]
    raise HTTPException(400, reason) from error


def make_examples(paths: Sequence[str], info: DatasetInfo) -> list[bytes]:
  """Returns images for the page, as PNG: of `paths`, else generated scenes."""
  if paths and info.mean:
    raise UserError('--examples: the page shows RGB, not images as stored')
  if paths:
    files = images.list_images(paths)[:6]
    return [images.encode_image(images.read_image(file)) for file in files]
  if info.name != 'shapes':
    return []
  rngs = (np.random.default_rng((7, i)) for i in range(3))
  return [images.encode_image(generate_scene(rng)[0]) for rng in rngs]


def _options() -> flags.FlagValues:
  """The options of this program; others have options of the same names."""
  options = flags.FlagValues()
  text, number = flags.DEFINE_string, flags.DEFINE_integer
  define: Any
  for define, name, default, help_text in (
    (text, 'workdir', None, 'Folder of the training run.'),
    (text, 'step', 'best', 'Checkpoint: best, latest or a step.'),
    (text, 'host', '127.0.0.1', 'Address to listen at; 0.0.0.0 is every one.'),
    (number, 'port', 8000, 'Port to listen at; 0 takes a free one.'),
    (text, 'token', None, 'What clients must send; else $DEEPLAB_JAX_TOKEN.'),
    (flags.DEFINE_list, 'examples', [], 'Image files or folders for the page.'),
    (flags.DEFINE_bool, 'debug', False, 'Show tracebacks of all errors.'),
    (flags.DEFINE_bool, 'help', False, 'Show this text.'),
  ):
    define(name, default, help_text, flag_values=options)
  for name, (most, help_text) in LIMITS.items():
    number(name, most, help_text, lower_bound=1, flag_values=options)
  return options


def main(argv: Sequence[str]) -> None:
  """Serves until a signal comes, and answers what was accepted before."""
  options = _options()
  with console.named_options(list(options)):
    rest = options(argv)[1:]
  if options.help:
    print(__doc__, options, sep='\n')
    return
  if rest:
    raise UserError(f'{rest[0]}: not an option; images come over HTTP')
  if not options.workdir:
    raise UserError('--workdir=DIR is missing: the folder of a training run')
  host.start(debug=options.debug)
  predictor = Predictor.from_workdir(options.workdir, step=options.step)
  examples = make_examples(options.examples, predictor.info)
  size = predictor.trained_size or (257, 257)
  predictor(np.tile(predictor.info.fill, (*size, 1)))  # compiles
  limits = {name: options[name].value for name in LIMITS}
  token = options.token or os.environ.get('DEEPLAB_JAX_TOKEN', '')
  app = Server(predictor, limits, token, examples).app()
  server = uvicorn.Server(uvicorn.Config(app, **UVICORN))
  with socket.create_server((options.host, options.port)) as place:
    # uvicorn stops at these signals, and then raises them again.
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, lambda *_: setattr(server, 'should_exit', True))
    url = 'http://{}:{}/'.format(*place.getsockname())
    print(f'step {predictor.step} of {options.workdir} at {url}', flush=True)
    server.run(sockets=[place])
  count = prometheus.REGISTRY.get_sample_value('deeplab_images_total')
  print(f'stopped after {count:.0f} images; all accepted requests are answered')


if __name__ == '__main__':
  console.log_to_stderr()
  with console.one_line_errors('--debug' in sys.argv):
    main(sys.argv)
