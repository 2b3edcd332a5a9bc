"""An emulator of Google Cloud Storage, in memory, on this machine.

It knows the JSON API as far as gcsfs and TensorStore use it: objects are put
(media, multipart, resumable), read by ranges, listed by pages, copied, removed.
"""

import base64
import contextlib
import datetime
import functools
import http.server
import json
import re
import threading
import types
import urllib.parse

import google_crc32c

_PAGE = 7  # entries of a list at most, to have pages in tests


@contextlib.contextmanager
def serving():
  """Yields `objects` by 'BUCKET/NAME': bytes, generation and time.

  `environment` lets gcsfs and TensorStore use it; `requests` are those so far;
  `refusal` is a status that answers all, or None.
  """
  state = types.SimpleNamespace(
    objects={}, requests=[], uploads={}, count=0, refusal=None
  )
  state.lock = threading.Lock()
  handler = functools.partial(_Handler, state)
  served = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  serve = functools.partial(served.serve_forever, poll_interval=0.01)
  threading.Thread(target=serve, daemon=True).start()
  state.address = f'http://127.0.0.1:{served.server_port}'
  state.environment = {
    'STORAGE_EMULATOR_HOST': state.address,
    'TENSORSTORE_GCS_HTTP_URL': state.address,
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # it asks for credentials
    'EPATH_USE_TF': 'false',  # TensorFlow has no such setting
  }
  try:
    yield state
  finally:
    served.shutdown()
    served.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def __init__(self, state, *args):
    self.state = state
    with contextlib.suppress(ConnectionError):  # gcsfs calls off requests
      super().__init__(*args)

  def _answer(self, status, body=b'', headers=()):
    if not isinstance(body, bytes):
      body = json.dumps(body).encode()
    self.send_response(status)
    for name, value in {'Content-Length': len(body), **dict(headers)}.items():
      self.send_header(name, str(value))
    self.end_headers()
    self.wfile.write(body)

  def _handle(self):
    url = urllib.parse.urlsplit(self.path)
    self.query = dict(urllib.parse.parse_qsl(url.query))
    size = int(self.headers.get('Content-Length') or 0)
    self.body = self.rfile.read(size)
    found = re.fullmatch(
      r'(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+))?)?'
      r'(?:/(\w+)(?:/b/([^/]+))?/o/([^/]+))?',
      url.path,
    )
    with self.state.lock:
      self.state.requests.append((self.command, self.path))
      if not found or self.state.refusal:
        return self._answer(
          self.state.refusal or 404, {'error': {'message': url.path}}
        )
      kind, bucket, name, copies, *target = map(
        urllib.parse.unquote, (part or '' for part in found.groups())
      )
      key = f'{bucket}/{name}'
      if kind == '/upload':
        return self._upload(bucket)
      if not name and '/o' not in url.path:
        return self._answer(200, {'kind': 'storage#bucket', 'name': bucket})
      if not name:
        return self._list(bucket)
      if key not in self.state.objects:
        return self._answer(404, {'error': {'code': 404, 'message': key}})
      if copies:
        to = f'{target[0] or bucket}/{target[1]}'
        new = self._put(to, self.state.objects[key][0])
        if copies == 'moveTo':
          del self.state.objects[key]
        whole = {'done': True, 'resource': new}
        return self._answer(200, whole if copies == 'rewriteTo' else new)
      if self.command == 'DELETE':
        del self.state.objects[key]
        return self._answer(204)
      if self.query.get('alt') == 'media':
        return self._read(*self.state.objects[key][:2])
      return self._answer(200, self._resource(key))

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _handle

  def _read(self, content, generation):
    status, headers = 200, {'x-goog-generation': generation}
    if asked := re.fullmatch(
      r'bytes=(\d*)-(\d*)', self.headers.get('Range', '')
    ):
      total = len(content)
      start = int(asked[1] or total - int(asked[2]))
      stop = int(asked[2]) + 1 if asked[1] and asked[2] else total
      if start >= total:
        return self._answer(416)
      content, status = content[start:stop], 206
      last = start + len(content) - 1
      headers['Content-Range'] = f'bytes {start}-{last}/{total}'
    return self._answer(status, content, headers)

  def _list(self, bucket):
    prefix, slash = (self.query.get(k, '') for k in ('prefix', 'delimiter'))
    first, end = (self.query.get(k) for k in ('startOffset', 'endOffset'))
    entries = {}  # in order, an object or a folder by name
    for key in sorted(self.state.objects):
      name = key.removeprefix(f'{bucket}/')
      inside = key.startswith(f'{bucket}/{prefix}')
      if inside and name >= (first or '') and (not end or name < end):
        head, found, _ = name[len(prefix) :].partition(slash or '\0')
        folder = f'{prefix}{head}{slash}' if found else None
        entries[folder or name] = None if folder else self._resource(key)
    start = int(self.query.get('pageToken') or 0)
    names = list(entries)[start : start + _PAGE]
    answer = {
      'kind': 'storage#objects',
      'items': [entries[name] for name in names if entries[name]],
      'prefixes': [name for name in names if not entries[name]],
    }
    if start + _PAGE < len(entries):
      answer['nextPageToken'] = str(start + _PAGE)
    return self._answer(200, answer)

  def _upload(self, bucket):
    kind, token = self.query.get('uploadType'), self.query.get('upload_id')
    if kind == 'multipart':
      mark = re.search('boundary="?([^";]+)', self.headers['Content-Type'])[1]
      _, about, content, _ = self.body.split(f'--{mark}'.encode())
      about = json.loads(about.partition(b'{')[1] + about.partition(b'{')[2])
      content = re.split(rb'\r?\n\r?\n', content, maxsplit=1)[1]
      content = re.sub(rb'\r?\n\Z', b'', content)
      name = about['name']
    elif token is not None:
      name, before = self.state.uploads[token]
      content = before + self.body
      self.state.uploads[token] = name, content
      if self.headers.get('Content-Range', '').endswith('/*'):
        headers = {'Range': f'bytes=0-{len(content) - 1}'} if content else {}
        return self._answer(308, b'', headers)
    elif kind == 'resumable':
      about = json.loads(self.body or b'{}')
      token = str(len(self.state.uploads))
      name = self.query.get('name') or about['name']
      self.state.uploads[token] = name, b''
      place = f'{self.path}&upload_id={token}'
      place = f'{self.state.address}{place}'
      return self._answer(200, {}, {'Location': place})
    else:
      name, content = self.query['name'], self.body
    return self._answer(200, self._put(f'{bucket}/{name}', content))

  def _put(self, key, content):
    self.state.count += 1
    self.state.objects[key] = (
      content,
      self.state.count,
      datetime.datetime.now(datetime.UTC),
    )
    return self._resource(key)

  def _resource(self, key):
    bucket, _, name = key.partition('/')
    content, generation, changed = self.state.objects[key]
    check = base64.b64encode(google_crc32c.Checksum(content).digest())
    return {
      'kind': 'storage#object',
      'name': name,
      'bucket': bucket,
      'generation': str(generation),
      'metageneration': '1',
      'size': str(len(content)),
      'crc32c': check.decode(),
      'updated': f'{changed:%FT%T.%f}Z',
      'timeCreated': '2026-01-01T00:00:00.000Z',
    }

  def log_message(self, *args):
    pass
