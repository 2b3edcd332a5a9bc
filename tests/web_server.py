"""A web server on this machine that can break off, refuse or send rubbish."""

import contextlib
import functools
import http.server
import threading
import types


@contextlib.contextmanager
def running(handler):
  """Answers by a class of `http.server` meanwhile; yields the address."""
  served = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  serve = functools.partial(served.serve_forever, poll_interval=0.01)
  threading.Thread(target=serve, daemon=True).start()
  try:
    yield f'http://127.0.0.1:{served.server_port}'
  finally:
    served.shutdown()
    served.server_close()


@contextlib.contextmanager
def serving(files):
  """Serves bytes by path.

  Yields what a test may change: `files`; `limits`, the number of bytes after
  which each answer in turn breaks off, or None; `statuses` by path; `ranges`,
  whether the server knows them; and `requests`, the (path, range) so far.
  """
  state = types.SimpleNamespace(
    files=files, limits=[], statuses={}, ranges=True, requests=[]
  )

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked, path = self.headers.get('Range'), self.path.lstrip('/')
      if '://' in path:  # as a proxy
        path = path.partition('://')[2].partition('/')[2]
      state.requests.append((path, asked))
      status = state.statuses.get(path, 200 if path in state.files else 404)
      content = state.files.get(path, b'')
      start = int(asked[6:-1]) if asked and state.ranges else 0
      if status == 200 and start and start >= len(content):
        status = 416
      if status != 200:
        self.send_error(status)
        return
      body = content[start:]
      self.send_response(206 if start else 200)
      self.send_header('Content-Length', str(len(body)))
      self.end_headers()
      limit = state.limits.pop(0) if state.limits else None
      self.wfile.write(body[:limit])

    def log_message(self, *args):
      pass

  with running(Handler) as state.address:
    yield state


def without_proxies(monkeypatch):
  """Takes the proxies of this machine out of the environment."""
  for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
    monkeypatch.delenv(name, raising=False)
