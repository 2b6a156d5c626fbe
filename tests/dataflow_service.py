"""Dataflow's API on loopback: it takes the jobs that Beam's client sends, and runs their staged graphs in this process."""

import json
import threading
import urllib.parse
from http.server import ThreadingHTTPServer
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import python_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from json_handler import JsonHandler

from schemas.storage import open_storage

METRICS = {"TotalVcpuTime": 3600.0, "TotalGpuTime": 60.0, "SystemLag": 1.0}


class DataflowService(ThreadingHTTPServer):
    """Use as a context. Jobs are done when they are created; while `hold` is set they stay RUNNING, and run once it is cleared.

    Attributes:
        jobs: what was created, in order, as JSON, with `id` and `currentState`.
        execute: whether graphs are really run, as they were staged.
        refuse: name → state that jobs of that name end in.
    """

    daemon_threads = True

    def __init__(self, execute: bool = False):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.jobs: list[dict[str, Any]] = []
        self.execute, self.go, self.refuse = execute, threading.Event(), dict[str, str]()
        self.go.set()

    @property
    def endpoint(self) -> str:
        return f"http://localhost:{self.server_port}"

    def __enter__(self) -> "DataflowService":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def create(self, job: dict[str, Any]) -> dict[str, Any]:
        for other in self.jobs:
            if other["name"] == job["name"] and other["currentState"] == "JOB_STATE_RUNNING":
                return other
        job |= {"id": f"id-{len(self.jobs)}", "currentState": "JOB_STATE_RUNNING"}
        self.jobs.append(job)
        if self.go.is_set():
            self.run(job)
        else:
            threading.Thread(target=lambda: (self.go.wait(), self.run(job)), daemon=True).start()
        return job

    def run(self, job: dict[str, Any]) -> None:
        state = self.refuse.get(job["name"].rpartition("-")[2], "JOB_STATE_DONE")
        if self.execute and state == "JOB_STATE_DONE":
            FnApiRunner().run_via_runner_api(locally(graph(job)), PipelineOptions([]))
        job["currentState"] = state


def graph(job: dict[str, Any]) -> beam_runner_api_pb2.Pipeline:
    """The graph of a job, as it was staged in the bucket."""
    bucket, _, name = job["environment"]["sdkPipelineOptions"]["options"]["pipelineUrl"].removeprefix("gs://").partition("/")
    return beam_runner_api_pb2.Pipeline.FromString(open_storage(f"gs://{bucket}").read(name))


def locally(pipeline: beam_runner_api_pb2.Pipeline) -> beam_runner_api_pb2.Pipeline:
    """The same graph with this process for an image."""
    for environment in pipeline.components.environments.values():
        environment.urn = python_urns.EMBEDDED_PYTHON
        environment.payload = b""
        environment.resource_hints.clear()
    return pipeline


class _Handler(JsonHandler):
    server: DataflowService

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(self.server.create(job))

    def do_GET(self) -> None:
        url = urllib.parse.urlparse(self.path)
        query = urllib.parse.parse_qs(url.query)
        _, _, tail = url.path.partition("/jobs")
        if not tail:
            active = [job for job in self.server.jobs if job["currentState"] == "JOB_STATE_RUNNING"]
            names = query.get("name", [])
            self.answer({"jobs": [job for job in active if not names or job["name"] in names]})
            return
        id, _, what = tail.strip("/").partition("/")
        job = next(job for job in self.server.jobs if job["id"] == id)
        if what == "metrics":
            told = [{"name": {"origin": "dataflow/v1b3", "name": name}, "scalar": value} for name, value in METRICS.items()]
            told.append({"name": {"origin": "dataflow/v1b3", "name": "TotalVcpuTime", "context": {"tentative": "true"}}, "scalar": 9.0})
            self.answer({"metrics": told})
        elif what == "messages":
            self.answer({})
        else:
            self.answer(job)
