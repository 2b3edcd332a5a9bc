"""Downloads from a small server on this machine that may break off."""

import hashlib
import http.server
import threading
import types

import numpy as np
import pytest

from deeplab_jax import download as module
from deeplab_jax.download import download
from deeplab_jax.errors import UserError

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
  """Serves CONTENT; `limits` gives for each request where it breaks off."""
  state = types.SimpleNamespace(
    content=CONTENT, limits=[], ranges=True, status=200, requests=[]
  )

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked = self.headers.get('Range')
      state.requests.append(asked)
      if state.status != 200:
        self.send_error(state.status)
        return
      start = int(asked[6:-1]) if asked and state.ranges else 0
      if start >= len(state.content):
        self.send_error(416)
        return
      body = state.content[start:]
      self.send_response(206 if start else 200)
      self.send_header('Content-Length', str(len(body)))
      self.end_headers()
      limit = state.limits.pop(0) if state.limits else len(body)
      self.wfile.write(body[:limit])

    def log_message(self, *args):
      pass

  for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
    monkeypatch.delenv(name, raising=False)
  served = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=served.serve_forever, daemon=True)
  thread.start()
  state.address = f'http://127.0.0.1:{served.server_port}'
  state.url = f'{state.address}/weights.h5'
  yield state
  served.shutdown()
  served.server_close()


def fetch(server, folder, *urls, **options):
  options = {'digest': f'md5:{MD5}', 'advice': 'do it by hand', **options}
  return download(urls or [server.url], directory=folder, **options)


def fails(server, folder, *words):
  """Checks the one line, and that no broken file bears the name."""
  with pytest.raises(UserError) as error:
    fetch(server, folder)
  message = str(error.value)
  assert '\n' not in message
  for word in (server.url, 'do it by hand', *words):
    assert word in message, message
  assert not (folder / 'weights.h5').exists()


def test_file_is_downloaded_once_and_then_cached(server, tmp_path):
  path = fetch(server, tmp_path)
  assert path == tmp_path / 'weights.h5' and path.read_bytes() == CONTENT
  assert fetch(server, tmp_path) == path
  assert server.requests == [None]
  assert not list(tmp_path.glob('*.part'))


def test_connection_that_breaks_is_taken_up_where_it_was(server, tmp_path):
  server.limits = [100_000, 50_000]
  path = fetch(server, tmp_path)
  assert path.read_bytes() == CONTENT
  assert server.requests == [None, 'bytes=100000-', 'bytes=150000-']


def test_part_of_an_earlier_try_is_completed(server, tmp_path):
  (tmp_path / 'weights.h5.part').write_bytes(CONTENT[:1000])
  assert fetch(server, tmp_path).read_bytes() == CONTENT
  assert server.requests == ['bytes=1000-']


def test_whole_part_needs_no_byte_more(server, tmp_path):
  (tmp_path / 'weights.h5.part').write_bytes(CONTENT)
  assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_server_without_ranges_starts_from_the_first_byte(server, tmp_path):
  server.ranges, server.limits = False, [100_000]
  assert fetch(server, tmp_path).read_bytes() == CONTENT
  assert server.requests == [None, 'bytes=100000-']


def test_broken_part_is_thrown_away_and_all_is_fetched(server, tmp_path):
  (tmp_path / 'weights.h5.part').write_bytes(b'x' * 1000)
  assert fetch(server, tmp_path).read_bytes() == CONTENT
  assert server.requests == ['bytes=1000-', None]


@pytest.mark.parametrize('broken', [b'', CONTENT[:1000], b'x' + CONTENT[1:]])
def test_broken_cache_is_never_trusted(server, tmp_path, broken):
  (tmp_path / 'weights.h5').write_bytes(broken)
  assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_wrong_hash_is_named_and_nothing_is_kept(server, tmp_path):
  server.content = b'<html>log in first</html>'
  fails(server, tmp_path, 'MD5', f'expected {MD5}')
  assert not list(tmp_path.glob('*.part'))
  server.content = CONTENT
  assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_network_gone_halfway_is_one_line_and_the_next_try_goes_on(
  server, tmp_path
):
  server.limits = [100_000, 0, 0, 0]
  fails(server, tmp_path, 'after 0.1 MB, which are kept')
  server.requests.clear()
  assert fetch(server, tmp_path).read_bytes() == CONTENT
  assert server.requests == ['bytes=100000-']


def test_missing_page_is_one_line(server, tmp_path):
  server.status = 404
  fails(server, tmp_path, 'Not Found')
  assert server.requests == [None]


def test_no_server_is_one_line(server, tmp_path):
  server.url = 'http://127.0.0.1:9/weights.h5'
  fails(server, tmp_path, 'refused')


def test_proxy_of_the_environment_is_used(server, tmp_path, monkeypatch):
  monkeypatch.setenv('http_proxy', server.address)
  path = fetch(server, tmp_path, 'http://elsewhere.invalid/weights.h5')
  assert path.read_bytes() == CONTENT


def test_folder_that_cannot_be_made_is_named(server, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='file'):
    fetch(server, tmp_path / 'file' / 'cache')


def test_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert module.cache_dir() == tmp_path / 'deeplab_jax'
