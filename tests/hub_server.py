"""A small Hugging Face hub on this machine, for one user.

It knows what huggingface_hub asks to create a repository, to commit small files
and to download them.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import types
from urllib.parse import unquote

from web_server import running


@contextlib.contextmanager
def serving(token):
  """Yields what a test may look at: `repositories`, of commits by their id.

  A commit holds files by name; the last one is `main`. `requests` are those so
  far, (method, path). Writing needs the `token`.
  """
  state = types.SimpleNamespace(repositories={}, requests=[])

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def answer(self, status, body=b'', **headers):
      body = body if isinstance(body, bytes) else json.dumps(body).encode()
      self.send_response(status)
      self.send_header('Content-Length', str(len(body)))
      for name, value in headers.items():
        self.send_header(name.replace('_', '-'), value)
      self.end_headers()
      if self.command != 'HEAD':
        self.wfile.write(body)

    def do_GET(self):
      path = unquote(self.path)
      state.requests.append((self.command, path))
      asked = re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path)
      if not asked or asked[1] not in state.repositories:
        self.answer(404, X_Error_Code='RepoNotFound')
        return
      commits = state.repositories[asked[1]]
      commit = list(commits)[-1] if asked[2] == 'main' else asked[2]
      if asked[3] not in commits[commit]:
        self.answer(404, X_Error_Code='EntryNotFound', X_Repo_Commit=commit)
        return
      content = commits[commit][asked[3]]
      digest = hashlib.sha1(content).hexdigest()
      self.answer(200, content, ETag=f'"{digest}"', X_Repo_Commit=commit)

    do_HEAD = do_GET

    def do_POST(self):
      state.requests.append((self.command, self.path))
      body = self.rfile.read(int(self.headers['Content-Length']))
      if self.headers.get('Authorization') != f'Bearer {token}':
        self.answer(401, {'error': 'Invalid username or password.'})
      elif self.path == '/api/validate-yaml':
        self.answer(200, {'errors': [], 'warnings': []})
      elif self.path == '/api/repos/create':
        asked = json.loads(body)
        name = f'{asked["organization"]}/{asked["name"]}'
        is_new = name not in state.repositories
        state.repositories.setdefault(name, {})
        url = f'{state.address}/{name}'
        self.answer(200 if is_new else 409, {'url': url})
      elif asked := re.fullmatch('/api/models/(.+)/preupload/main', self.path):
        files = json.loads(body)['files']
        use = {'uploadMode': 'regular', 'shouldIgnore': False}
        answer = {'files': [{'path': f['path'], **use} for f in files]}
        self.answer(200, answer)
      elif asked := re.fullmatch('/api/models/(.+)/commit/main', self.path):
        commits, lines = state.repositories[asked[1]], body.splitlines()
        entries = [json.loads(line) for line in lines]
        files = dict(list(commits.values())[-1]) if commits else {}
        for entry in entries:
          if entry['key'] == 'file':
            value = entry['value']
            files[value['path']] = base64.b64decode(value['content'])
        commit = hashlib.sha1(body).hexdigest()
        commits[commit] = files
        url = f'{state.address}/{asked[1]}/commit/{commit}'
        self.answer(200, {'commitUrl': url, 'commitOid': commit})
      else:
        self.answer(404)

    def log_message(self, *args):
      pass

  with running(Handler) as state.address:
    yield state
