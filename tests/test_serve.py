"""Images over HTTP: right answers, and a right refusal for all that is bad."""

import concurrent.futures
import io
import json
import os
import re
import runpy
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from loopback import (
  StrongestChannel,
  ask,
  encoded,
  error_of,
  flag,
  measured,
  queue_length,
  segment,
  serving,
  wait_until,
)
from PIL import Image
from web_server import without_proxies

from deeplab_jax import serve
from deeplab_jax.runtime.errors import UserError

pytestmark = pytest.mark.xdist_group('alone')


@pytest.fixture
def network():
  return StrongestChannel()


@pytest.fixture
def port():
  with serving(StrongestChannel(), pixels=10**6, bytes=10**6) as port:
    yield port


def test_mask_is_a_palette_png_with_the_values_of_the_label_files(port):
  image, label = flag()
  answer = segment(port, encoded(image))
  assert (answer.status, answer.headers['Content-Type']) == (200, 'image/png')
  with Image.open(io.BytesIO(answer.body)) as mask:
    assert mask.mode == 'P'
    values = np.array([3, 7, 20])[label]
    np.testing.assert_array_equal(np.asarray(mask), values)
    assert np.asarray(mask.convert('RGB'))[0, 0].tolist() == [200, 30, 30]


def test_photo_is_turned_as_a_viewer_shows_it(port):
  image, _ = flag()
  exif = Image.Exif()
  exif[274] = 6  # to be turned by 90 degrees clockwise
  answer = segment(port, encoded(image, 'JPEG', quality=95, exif=exif))
  with Image.open(io.BytesIO(answer.body)) as mask:
    rows = np.asarray(mask)[:, 15]
  assert rows.shape == (60,)
  assert rows[[5, 30, 55]].tolist() == [3, 7, 20]


def test_json_has_shares_and_runs_that_give_the_classes_back(port):
  image, label = flag(10, 40)
  found = json.loads(segment(port, encoded(image), '?format=json').body)
  runs = np.repeat(found['runs']['class'], found['runs']['length'])
  shape = found['height'], found['width']
  np.testing.assert_array_equal(runs.reshape(shape), label)
  shares = [(row['name'], row['share']) for row in found['classes']]
  counts = np.bincount(label.ravel()) / label.size
  assert shares == list(zip(('red', 'green', 'blue'), counts, strict=True))
  assert found['classes'][1] == {
    'class': 1,
    'name': 'green',
    'value': 7,
    'color': '#1ea03c',
    'share': counts[1],
  }


def test_npz_has_classes_and_probabilities(port):
  image, label = flag()
  answer = segment(port, encoded(image), '?format=npz')
  with np.load(io.BytesIO(answer.body)) as found:
    np.testing.assert_array_equal(found['label'], label)
    np.testing.assert_array_equal(found['probabilities'], np.eye(4)[label])
    assert found['probabilities'].dtype == np.float32


@pytest.mark.parametrize(
  ('query', 'accept', 'kind'),
  [
    ('', '*/*', 'image/png'),
    ('', 'application/json', 'application/json'),
    ('', 'application/x-npz', 'application/x-npz'),
    ('?format=png', 'application/json', 'image/png'),
  ],
)
def test_the_format_comes_from_the_address_or_from_accept(
  port, query, accept, kind
):
  answer = segment(port, encoded(flag()[0]), query, Accept=accept)
  assert answer.headers['Content-Type'] == kind


def bomb(width, height):
  """A PNG of a few bytes that announces a large picture."""
  head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  data = zlib.compress(bytes(99))
  chunks = b''.join(
    (len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
    for chunk in (b'IHDR' + head, b'IDAT' + data, b'IEND')
  )
  return b'\x89PNG\r\n\x1a\n' + chunks


EPS = (
  b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n'
)


@pytest.mark.parametrize(
  ('body', 'query', 'status', 'words'),
  [
    (b'no picture', '', 415, 'unreadable image (damaged or unknown)'),
    (b'', '', 415, 'empty'),
    (b'\0\0\0\x18ftypheic' + bytes(40), '', 415, 'HEIC'),
    (EPS, '', 415, 'EPS is not read'),
    (encoded(flag(300, 300)[0], 'JPEG')[:-400], '', 400, 'truncated'),
    (encoded(flag()[0])[:-60], '', 400, 'unreadable image'),
    (encoded(np.ones((4, 4), np.float32), 'TIFF'), '', 400, 'float pixels'),
    (bomb(12_000, 12_000), '', 413, '144.0 megapixels; at most 1 are'),
    (bomb(50_000, 50_000), '', 413, '50000x50000 is too large'),
    (encoded(np.zeros((10_000, 10_000), bool)), '', 413, '100.0 megapixels'),
    (bytes(10**6 + 1), '', 413, 'at most 1 MB'),
    (encoded(flag()[0]), '?format=bmp', 400, 'format=bmp: must be one of png'),
  ],
)
def test_bad_request_is_refused_in_one_line(port, body, query, status, words):
  answer = segment(port, body, query)
  assert (answer.status, words in error_of(answer)) == (status, True)
  assert segment(port, encoded(flag()[0])).status == 200


def test_body_that_announces_no_length_is_limited_too(port):
  answer = segment(port, (bytes(2**16) for _ in range(99)))
  assert (answer.status, error_of(answer)[:9]) == (413, 'at most 1')


def test_probabilities_are_limited_before_the_network_runs(
  network, monkeypatch
):
  monkeypatch.setattr(serve, '_LARGEST_NPZ', 4 * 4 * 1799)
  image = encoded(flag(30, 60)[0])
  with serving(network) as port:
    assert segment(port, image, '?format=npz').status == 413
    assert segment(port, image, '?format=json').status == 200
  assert network.batches == [[(30, 60)]]


@pytest.mark.parametrize('path', ['/nowhere', '/v1/segment', '/v1/examples/5'])
def test_wrong_address_or_method_is_one_line_as_well(port, path):
  answer = ask(port, path)
  assert answer.status == (405 if 'segment' in path else 404)
  assert error_of(answer)


def test_token_is_asked_for_everywhere_but_at_the_page(network):
  with serving(network, token='secret') as port:
    for path in ('/', '/healthz'):
      assert ask(port, path).status == 200
    for path, body in (
      ('/v1/segment', encoded(flag()[0])),
      ('/v1/model', None),
      ('/v1/examples/0', None),
      ('/metrics', None),
    ):
      missing = ask(port, path, body)
      assert missing.status == 401 and 'token missing' in error_of(missing)
      assert missing.headers['WWW-Authenticate'] == 'Bearer'
      wrong = ask(port, path, body, Authorization='Bearer Secret')
      assert (wrong.status, error_of(wrong)) == (403, 'wrong token')
      right = ask(port, path, body, Authorization='Bearer secret')
      assert right.status == (404 if 'examples' in path else 200)
  assert len(network.batches) == 1


def test_images_that_wait_are_segmented_together(network):
  sizes = [(20, 30), (40, 30), (20, 30), (40, 30), (20, 30), (20, 60)]
  network.gate.clear()
  with (
    concurrent.futures.ThreadPoolExecutor(len(sizes)) as clients,
    serving(network, batch=4) as port,
  ):
    answers = []
    for number, size in enumerate(sizes, 1):
      answers.append(clients.submit(segment, port, encoded(flag(*size)[0])))
      wait_until(lambda number=number: queue_length(port) == number)
      time.sleep(0.1)  # decoded
    network.gate.set()
    for answer, (height, width) in zip(answers, sizes, strict=True):
      with Image.open(io.BytesIO(answer.result().body)) as mask:
        assert mask.size == (width, height)
  first, second, third = network.batches
  assert (first, third) == ([(20, 30)], [(20, 60)])
  assert second == sizes[1:5]


def counts(port):
  """Answers and refusals of this process so far, and images."""
  name = 'deeplab_request_seconds_count{status="%s"}'
  names = name % 200, name % 503, 'deeplab_images_total'
  return np.array([measured(port, name) for name in names])


def test_of_200_clients_at_once_those_above_the_queue_may_come_again(network):
  network.gate.clear()
  image = encoded(flag()[0])
  with (
    concurrent.futures.ThreadPoolExecutor(200) as clients,
    serving(network, queue=16) as port,
  ):
    before = counts(port)
    answers = [clients.submit(segment, port, image) for _ in range(200)]
    wait_until(lambda: sum(answer.done() for answer in answers) == 184)
    assert queue_length(port) == 16
    network.gate.set()
    refused = [a.result() for a in answers if a.result().status != 200]
    assert len(refused) == 184
    for answer in refused:
      assert (answer.status, answer.headers['Retry-After']) == (503, '1')
      assert 'busy: 16 requests wait' in error_of(answer)
    assert segment(port, image).status == 200
    after = counts(port)
    assert (after - before).tolist() == [17, 184, 17]


def test_request_that_takes_too_long_is_given_up(network, monkeypatch):
  network.gate.clear()
  refused, refuse = [], serve._refuse

  async def refuse_while_the_network_goes_on(request, error):
    refused.append(error)
    if len(refused) == 2:
      network.gate.set()
      time.sleep(0.5)  # the loop stands still, as on a busy machine
    return await refuse(request, error)

  monkeypatch.setattr(serve, '_refuse', refuse_while_the_network_goes_on)
  first, second = (encoded(flag(*size)[0]) for size in ((20, 30), (20, 60)))
  with serving(network, seconds=1) as port:
    with concurrent.futures.ThreadPoolExecutor(2) as clients:
      answers = [clients.submit(segment, port, first)]
      wait_until(lambda: network.batches)
      answers.append(clients.submit(segment, port, second))
      for answer in answers:
        assert answer.result().status == 504
        assert error_of(answer.result()) == 'not done within 1 s; try again'
    assert segment(port, first).status == 200
  # What still waited is not segmented for nobody.
  assert network.batches == [[(20, 30)], [(20, 30)]]


def test_clients_that_leave_cost_no_place(network):
  network.gate.clear()
  image = encoded(flag(20, 60)[0])
  head = f'POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: {len(image)}'
  with (
    concurrent.futures.ThreadPoolExecutor(2) as clients,
    serving(network, queue=3) as port,
  ):
    first = clients.submit(segment, port, encoded(flag(20, 30)[0]))
    wait_until(lambda: network.batches)
    for sent in (image, image[:50]):  # one leaves while it sends
      with socket.create_connection(('127.0.0.1', port)) as leaving:
        leaving.sendall(f'{head}\r\n\r\n'.encode() + sent)
        wait_until(lambda: queue_length(port) == 2)
      wait_until(lambda: queue_length(port) == 1)
    last = clients.submit(segment, port, encoded(flag(20, 90)[0]))
    wait_until(lambda: queue_length(port) == 2)
    network.gate.set()
    assert [x.result().status for x in (first, last)] == [200, 200]
  assert network.batches == [[(20, 30)], [(20, 90)]]


def test_failure_of_the_network_is_logged_and_the_next_request_is_answered(
  network, caplog
):
  network.error = RuntimeError('out of memory')
  with serving(network) as port:
    answer = segment(port, encoded(flag()[0]))
    assert answer.status == 500
    assert error_of(answer) == 'the server failed; its log says why'
    network.error = None
    assert segment(port, encoded(flag()[0])).status == 200
  assert 'out of memory' in caplog.text


def test_model_is_described_in_strict_json(port):
  def refuse(name):
    raise AssertionError(name)

  found = json.loads(ask(port, '/v1/model').body, parse_constant=refuse)
  assert found['classes'][2] == {
    'class': 2, 'name': 'blue', 'value': 20, 'color': '#283cdc'
  }  # fmt: skip
  assert (found['dataset'], found['step']) == ('colors', 70)
  assert found['metrics'] == {'miou': 0.75, 'iou/absent': None}
  assert found['limits']['pixels'] == 10**6
  assert found['versions'].keys() == {'deeplab_jax', 'jax', 'flax'}


def test_page_uses_nothing_from_elsewhere(port):
  answer = ask(port, '/')
  policy = dict(
    rule.strip().split(' ', 1)
    for rule in answer.headers['Content-Security-Policy'].split(';')
  )
  assert policy['default-src'] == "'none'"
  assert policy['connect-src'] == "'self'"
  assert 'http' not in ' '.join(policy.values())
  page = answer.body.decode().replace('http://www.w3.org/2000/svg', '')
  assert not re.search(r'https?:|["(\x27]//', page)


def test_examples_are_generated_scenes_or_files_of_the_user(tmp_path):
  shapes = serve.DatasetInfo('shapes', ('a',), [[0, 0, 0]])
  scenes = serve.make_examples([], shapes)
  assert [Image.open(io.BytesIO(x)).size for x in scenes] == [(192, 144)] * 3
  assert serve.make_examples([], StrongestChannel.info) == []
  Image.fromarray(flag()[0]).save(tmp_path / 'a.png')
  (example,) = serve.make_examples([str(tmp_path)], StrongestChannel.info)
  with serving(StrongestChannel(), examples=[example]) as port:
    answer = ask(port, '/v1/examples/0')
    with Image.open(io.BytesIO(answer.body)) as picture:
      np.testing.assert_array_equal(np.asarray(picture), flag()[0])
    assert json.loads(ask(port, '/v1/model').body)['examples'] == 1


def test_example_of_the_documentation_runs(port, tmp_path, monkeypatch):
  page = (Path(__file__).parents[1] / 'docs/serving.md').read_text()
  (code,) = re.findall('```python\n(.*?)```', page, re.DOTALL)
  image, label = flag()
  (tmp_path / 'photo.jpg').write_bytes(encoded(image))
  monkeypatch.chdir(tmp_path)
  without_proxies(monkeypatch)
  names = {}
  exec(code.replace('8000', str(port)), names)
  np.testing.assert_array_equal(names['label'], label)
  np.testing.assert_array_equal(names['probabilities'], np.eye(4)[label])


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ([], '--workdir=DIR is missing'),
    (['--workdir=x', 'photo.jpg'], 'photo.jpg: not an option'),
    (['--workdirs=x'], 'did you mean --workdir?'),
    (['--queue=0'], 'option: flag --queue=0'),
    (['--workdir={empty}'], 'no checkpoint in {empty}'),
  ],
)
def test_command_says_what_is_wrong(arguments, words, tmp_path):
  arguments = [text.format(empty=tmp_path) for text in arguments]
  with pytest.raises(UserError) as caught, mock.patch.dict(os.environ):
    serve.main(['serve', *arguments])
  assert words.format(empty=tmp_path) in str(caught.value)
  assert list(tmp_path.iterdir()) == []


def test_missing_extra_is_one_line_with_the_command_of_pip(capsys):
  with (
    mock.patch.dict(sys.modules, {'fastapi': None}),
    pytest.raises(SystemExit) as stop,
  ):
    runpy.run_path(serve.__file__)
  assert stop.value.code == 1
  line = "error: serving needs fastapi: pip install 'deeplab_jax[serve]'\n"
  assert capsys.readouterr().err == line


@pytest.mark.compiles
def test_sigterm_lets_every_accepted_request_be_answered():
  server = subprocess.Popen(
    [sys.executable, '-m', 'loopback', '0', '0.2'],
    cwd=Path(__file__).parent,
    stdout=subprocess.PIPE,
    text=True,
  )
  with server, concurrent.futures.ThreadPoolExecutor(20) as clients:
    port = int(server.stdout.readline().rpartition(':')[2].strip(' /\n'))
    image = encoded(flag()[0])
    answers = [clients.submit(segment, port, image) for _ in range(20)]
    wait_until(lambda: queue_length(port) > 15)
    while queue_length(port) + sum(a.done() for a in answers) < 20:
      time.sleep(0.01)
    server.send_signal(signal.SIGTERM)
    assert {answer.result().status for answer in answers} == {200}
    with pytest.raises(ConnectionError):
      ask(port, '/healthz')
    assert server.wait(30) == 0
    assert 'stopped after 20 images' in server.stdout.read()
