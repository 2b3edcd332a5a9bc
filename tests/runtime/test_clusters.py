"""How a process finds the others, in the environments that JAX knows."""

import http.server
import os
import sys
import threading
import types

import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster, cluster, k8s_cluster

from deeplab_jax.runtime import distributed, watchdog
from deeplab_jax.runtime.errors import UserError

SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'node[03-04],other',
  'SLURM_NTASKS': '8',
  'SLURM_STEP_NUM_TASKS': '8',
  'SLURM_PROCID': '5',
  'SLURM_LOCALID': '1',
}
OPEN_MPI = {
  'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911',
  'OMPI_COMM_WORLD_SIZE': '4',
  'OMPI_COMM_WORLD_RANK': '3',
  'OMPI_COMM_WORLD_LOCAL_RANK': '0',
}
GKE = {
  'TPU_WORKER_HOSTNAMES': '127.0.0.1,b',
  'TPU_WORKER_ID': '1',
  'TPU_SKIP_MDS_QUERY': '1',
}
SLICES = {
  'MEGASCALE_NUM_SLICES': '3',
  'MEGASCALE_SLICE_ID': '2',
  'MEGASCALE_COORDINATOR_ADDRESS': '127.0.0.9:8080',
}
BY_HAND = {
  'JAX_COORDINATOR_ADDRESS': 'a:1',
  'JAX_NUM_PROCESSES': '2',
  'JAX_PROCESS_ID': '1',
}


@pytest.fixture
def joined(monkeypatch):
  """Function (mode, **environment) -> what `initialize` would join, or None."""
  calls = []
  kinds = 'JAX_', 'SLURM', 'OMPI', 'TPU', 'MEGASCALE', 'KUBERNETES', 'JOB_'
  for name in filter(lambda name: name.startswith(kinds), [*os.environ]):
    if not name.startswith(('JAX_COMPILATION', 'JAX_PERSISTENT', 'JAX_PLATF')):
      monkeypatch.delenv(name)
  monkeypatch.setattr(watchdog, 'join', lambda *call: calls.append(call))
  monkeypatch.setattr(distributed, '_share_programs', lambda: None)

  def find(mode='auto', **environment):
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    distributed.initialize(mode)
    return calls[-1] if calls else None

  return find


@pytest.fixture
def on_tpu(monkeypatch):
  """Makes JAX believe that this is a TPU VM."""
  monkeypatch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', True)
  monkeypatch.setattr(cluster, 'running_in_cloud_tpu_vm', True)


@pytest.fixture
def metadata(monkeypatch):
  """A metadata server on loopback: a dict by key, which may be filled."""
  values = {'tpu-env': "ZONE: 'here'\n"}

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      key = self.path.removeprefix('/computeMetadata/v1/instance/attributes/')
      found = self.headers['Metadata-Flavor'] == 'Google' and key in values
      self.send_response(200 if found else 404)
      self.end_headers()
      self.wfile.write(values.get(key, '').encode())

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv('GCE_METADATA_IP', f'127.0.0.1:{server.server_port}')
    yield values
    server.shutdown()
    thread.join()


def test_a_plain_machine_joins_nothing(joined):
  assert joined() is None
  assert not jax.distributed.is_initialized()


def test_the_environment_may_name_all_by_hand(joined):
  assert joined(**BY_HAND) == ('a:1', 2, 1, None)


def test_slurm_is_found_with_its_first_node(joined):
  address = f'node03:{7 + 65535 - 2**12 + 1}'
  assert joined(**SLURM) == (address, 8, 5, [1])


def test_open_mpi_is_found_with_its_launcher(joined):
  address, *rest = joined(**OPEN_MPI)
  assert address.startswith('10.96.0.1:') and rest == [4, 3, [0]]


def test_a_slice_on_gke_is_found(joined, on_tpu, metadata):
  assert joined(**GKE) == ('127.0.0.1:8482', 2, 1, None)


def test_several_slices_on_gke_are_one_cluster(joined, on_tpu):
  assert joined(**GKE, **SLICES) == ('127.0.0.9:8482', 6, 5, None)


@pytest.mark.parametrize('entry', ['{}', 'name:7:{}'])
def test_a_pod_of_tpu_vms_is_found_by_the_metadata_server(
  joined, on_tpu, metadata, entry
):
  hosts = ('127.0.0.1', '10.0.0.2', '10.0.0.3', '10.0.0.4')
  metadata['worker-network-endpoints'] = ','.join(map(entry.format, hosts))
  metadata['agent-worker-number'] = '2'
  assert joined() == ('127.0.0.1:8482', 4, 2, None)


def test_several_slices_of_tpu_vms_are_one_cluster(joined, on_tpu, metadata):
  metadata['worker-network-endpoints'] = '10.0.0.1,10.0.0.2'
  metadata['agent-worker-number'] = '1'
  metadata['tpu-env'] = ''.join(f"{k}: '{v}'\n" for k, v in SLICES.items())
  assert joined() == ('127.0.0.9:8482', 6, 5, None)


def test_a_single_tpu_vm_stays_alone(joined, on_tpu, metadata):
  metadata['worker-network-endpoints'] = '127.0.0.1'
  metadata['agent-worker-number'] = '0'
  assert joined() is None


def test_an_indexed_job_of_kubernetes_is_found(joined, monkeypatch):
  name = types.SimpleNamespace
  pod = name(
    metadata=name(
      name='pod',
      labels={'job-name': 'job'},
      owner_references=[name(controller=True, kind='Job')],
    ),
    spec=name(subdomain='pods'),
  )
  job = name(metadata=name(name='job', labels={}), spec=name(parallelism=3))
  api = name(list_namespaced_pod=lambda **_: name(items=[pod]))
  batch = name(read_namespaced_job=lambda **_: job)
  client = name(
    CoreV1Api=lambda: api,
    BatchV1Api=lambda: batch,
    exceptions=name(ApiException=KeyError),
  )
  package = types.ModuleType('kubernetes')
  package.client, package.config = client, name(load_incluster_config=bool)
  monkeypatch.setitem(sys.modules, 'kubernetes', package)
  monkeypatch.setattr(
    k8s_cluster.K8sCluster, '_namespace', classmethod(lambda _: 'default')
  )
  monkeypatch.setattr(
    k8s_cluster.socket, 'gethostbyname', lambda _: '127.0.0.1'
  )
  found = joined(
    KUBERNETES_SERVICE_HOST='10.0.0.1',
    HOSTNAME='pod',
    JOB_COMPLETION_INDEX='1',
  )
  assert found == ('job-0.pods:55527', 3, 1, None)


@pytest.mark.parametrize(
  'environment',
  [
    {**SLURM, 'SLURM_NTASKS': '1', 'SLURM_STEP_NUM_TASKS': '1'},
    {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '8'},  # a script without srun
    {**OPEN_MPI, 'OMPI_COMM_WORLD_SIZE': '1', 'OMPI_COMM_WORLD_RANK': '0'},
    {**BY_HAND, 'JAX_NUM_PROCESSES': '1', 'JAX_PROCESS_ID': '0'},
    {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'},
  ],
)
def test_a_cluster_of_one_stays_alone(joined, environment):
  if 'SLURM_PROCID' in environment:
    environment = {**environment, 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'}
  assert joined(**environment) is None
  with pytest.raises(
    UserError, match='--distributed=on must find several processes, got'
  ):
    distributed.initialize('on')


@pytest.mark.parametrize(
  ('environment', 'words'),
  [
    ({**SLURM, 'SLURM_STEP_NUM_TASKS': '4'}, 'SLURM_STEP_NUM_TASKS=4, .* is 8'),
    ({'OMPI_COMM_WORLD_SIZE': '4'}, 'OMPI_COMM_WORLD_SIZE=4, but .* is 1'),
    (GKE, 'TPU_WORKER_HOSTNAMES=127.0.0.1,b, but .* is 1'),
    ({'TPU_PROCESS_ADDRESSES': 'a,b,c'}, 'TPU_PROCESS_ADDRESSES=a,b,c, but'),
    (SLICES, 'MEGASCALE_NUM_SLICES=3, but .* is 1'),
    ({'JOB_COMPLETION_INDEX': '0'}, 'JOB_COMPLETION_INDEX=0, but .* is 1'),
    ({**BY_HAND, 'OMPI_COMM_WORLD_SIZE': '4'}, 'WORLD_SIZE=4, but .* is 2'),
  ],
)
def test_another_number_than_the_environment_names_is_refused(
  joined, environment, words
):
  with pytest.raises(UserError, match=words) as error:
    joined(**environment)
  assert '\n' not in str(error.value)
  assert joined('off') is None


def test_on_joins_what_is_found_whatever_the_environment_says(joined):
  assert joined('on', **BY_HAND, OMPI_COMM_WORLD_SIZE='4')[1] == 2


def test_what_a_detector_cannot_read_is_one_line(joined, on_tpu, metadata):
  metadata['agent-worker-number'] = '0'
  metadata['worker-network-endpoints'] = 'a:b'
  with pytest.raises(UserError, match=r'unsupported .* --distributed=off') as e:
    joined()
  assert '\n' not in str(e.value)


def test_missing_process_number_is_named(joined):
  with pytest.raises(UserError, match=r"JAX_PROCESS_ID must be .*'first'"):
    joined(**BY_HAND | {'JAX_PROCESS_ID': 'first'})
