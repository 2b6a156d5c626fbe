"""The pool that starts a TaskManager's Python workers: python deploy/flink/worker_pool.py ADDRESS

TaskManagers number their workers each from one, so a pool serves one of them; Beam's own command would listen on all addresses of the
machine, which leaves no room for a second.
"""

import signal
import sys

import grpc
from apache_beam.portability.api import beam_fn_api_pb2_grpc
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer
from apache_beam.utils.thread_pool_executor import shared_unbounded_instance

# As Beam's command sets them: no output is sent by a timer.
pool = BeamFnExternalWorkerPoolServicer(use_process=True, data_buffer_time_limit_ms=-1)
server = grpc.server(shared_unbounded_instance(), options=[("grpc.so_reuseport", 0)])
server.add_insecure_port(sys.argv[1])
beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(pool, server)
server.start()
signal.pause()
