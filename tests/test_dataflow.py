"""Months on Dataflow: its real client against a stand-in of its API that runs the graphs it gets, and the jobs as they are sent."""

import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner
from dataflow_service import DataflowService, graph

from beam_jobs import creatives, embed, evaluate, ingest, lookup, score, train
from beam_jobs.cli import main
from beam_jobs.config import Config
from beam_jobs.run import MonthRun, StageError, prepare
from beam_jobs.runner import checked_options, dataflow_pipeline, run_step
from beam_jobs.workers import gpu_hints, on_gpu
from model import golden
from schemas import lake
from schemas.lake import Manifest, Receipt
from schemas.sample import write_months
from schemas.storage import Storage, open_storage

TOP = pathlib.Path(__file__).resolve().parent.parent
DEPLOY = TOP / "deploy" / "dataflow"
MONTH, SHARDS = "2026-08", 2000
IMAGE = "europe-west4-docker.pkg.dev/project/adstocrat/worker:1"
FLAGS = ["--runner=DataflowRunner", "--project=project", "--region=europe-west4", "--temp_location=gs://adstocrat/tmp"]
FLAGS += [f"--sdk_container_image={IMAGE}", "--no_auth"]
GPU = "type:nvidia-l4;count:1;machine_type:g2-standard-4;install-nvidia-driver"
LONG = bool(os.environ.get("ADSTOCRAT_LONG"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MonthRun:
    """A run of a billion rows and 30 M creatives, as far as its manifests tell, all stages complete."""
    uri = str(tmp_path_factory.mktemp("lake"))
    write_months(open_storage(uri), [MONTH], 100, 20, 0, lambda line: None)
    run = prepare(Config(lake=uri), MONTH)
    inputs = run.storage.read_json(f"{run.folder}/inputs.json")
    sample = run.ads[0]
    inputs["ads"] = [[f"part-{i:05d}-of-10000-of-the-agency.csv", 10 << 20, "AAAAAA=="] for i in range(10_000)]
    for name, _, _ in inputs["ads"][:8]:
        run.storage.write(lake.raw_ads(MONTH) + name, run.storage.read(sample.name))
    inputs["images"]["count"] = 30_000_000
    run.storage.write(f"{run.folder}/inputs.json", json.dumps(inputs).encode())

    def complete(folder: str, units: list[str], **info: Any) -> Manifest:
        receipts = tuple(Receipt(unit, lake.unique(folder, unit.replace("/", "_"), ".parquet"), 500_000) for unit in units)
        return lake.commit(run.storage, folder, Manifest("stage", receipts, info))

    shards = [f"shard/{i:05d}.000" for i in range(SHARDS)]
    models = {"encoder": run.encoder, "ranker": run.version}
    complete(run.stage("rows"), shards, shards=SHARDS)
    complete(run.stage("creatives") + "/packs", [f"pack/{i:05d}" for i in range(5000)])
    complete(run.stage("creatives"), [f"index/{i:05d}.000" for i in range(SHARDS)], shards=SHARDS)
    complete(lake.embeddings_folder(run.encoder, run.month, run.id), shards, width=32)
    complete(run.stage("scores"), [f"{shard}@0" for shard in shards], **models)
    return run


@pytest.fixture(scope="module")
def defined(run: MonthRun) -> dict[str, Callable[[beam.Pipeline], None]]:
    """All pipelines of a month, by step."""
    models = Manifest("stage", (), {"encoder": run.encoder, "ranker": run.version})
    scores = run.manifest(run.stage("scores"))
    definitions: dict[str, tuple[Any, ...]] = {
        "ingest": (ingest.define_pipeline,),
        "creatives-packs": (creatives.define_pack_pipeline,),
        "creatives-index": (creatives.define_index_pipeline, SHARDS),
        "encoder": (train.define_pipeline, train.train_encoder),
        "embed-packs": (embed.define_pack_pipeline, run.encoder),
        f"embed-{MONTH}": (embed.define_gather_pipeline, run.encoder, run.month, run.id),
        "train": (train.define_pipeline, train.train_ranker),
        "evaluate": (evaluate.define_pipeline,),
        "score": (score.define_pipeline, models),
        "lookup": (lookup.define_pipeline, scores),
    }

    def define(step: str) -> Callable[[beam.Pipeline], None]:
        function, *arguments = definitions[step]
        return lambda root: function(root, run, *arguments)

    return {step: define(step) for step in definitions}


@pytest.fixture(scope="module")
def jobs(run: MonthRun, defined: dict[str, Callable[[beam.Pipeline], None]], cloud: dict[str, str]) -> dict[str, Any]:
    """The jobs that Dataflow's client makes of them, all but sent."""
    made = {}
    for step, define in defined.items():
        options = checked_options([*FLAGS, "--dry_run=true"])
        made[step] = dataflow_pipeline(define, options, run, step, DataflowRunner()).run().job
    return made


def leaves(pipeline: beam_runner_api_pb2.Pipeline) -> dict[str, beam_runner_api_pb2.Environment]:
    """The environment of each step that runs in one, by its full label."""
    components = pipeline.components
    return {
        step.unique_name: components.environments[step.environment_id]
        for step in components.transforms.values()
        if step.environment_id and not step.subtransforms
    }


def accelerator(environment: beam_runner_api_pb2.Environment) -> str:
    return environment.resource_hints.get("beam:resources:accelerator:v1", b"").decode()


def test_gpus_are_asked_for_where_one_computes_and_nowhere_else(jobs: dict[str, Any]) -> None:
    asking = {
        (step, label.partition("/")[0])
        for step, job in jobs.items()
        for label, environment in leaves(job.proto_pipeline).items()
        if accelerator(environment)
    }
    assert asking == {("embed-packs", "EmbedPacks"), ("encoder", "Train"), ("train", "Train")}
    found = {accelerator(environment) for job in jobs.values() for environment in job.proto_pipeline.components.environments.values()}
    assert found == {"", GPU}


def test_one_environment_fetches_unpacks_and_embeds(jobs: dict[str, Any]) -> None:
    """Where an original is fetched and decoded no model is at hand, and where thumbnails are embedded they are fetched and unpacked."""
    pipeline = jobs["embed-packs"].proto_pipeline
    steps = {label for label in leaves(pipeline) if label.startswith("EmbedPacks/")}
    assert {"ReadThumbnails", "Embed", "WriteEmbeddings"} == {label.split("/")[1] for label in steps}
    environments = {step.environment_id for step in pipeline.components.transforms.values() if step.unique_name in steps}
    assert len(environments) == 1
    # And the composite takes all of its steps along: whatever Beam puts between them stays there.
    others = {label for label in leaves(pipeline) if label not in steps}
    assert not any("Thumbnail" in label or "RunInference" in label for label in others)
    fetching = leaves(jobs["creatives-packs"].proto_pipeline)
    assert [label for label in fetching if "FetchAndDecode" in label] == ["FetchAndDecode"] and not accelerator(fetching["FetchAndDecode"])


def test_workers_run_the_image_and_nothing_else(jobs: dict[str, Any]) -> None:
    for job in jobs.values():
        for environment in job.proto_pipeline.components.environments.values():
            assert beam_runner_api_pb2.DockerPayload.FromString(environment.payload).container_image == IMAGE
            # No main session, no package.
            assert not environment.dependencies


def test_a_graph_does_not_grow_with_the_month(jobs: dict[str, Any]) -> None:
    """A graph may have 10 MB, the request 20 MB. The lists of this month would be 10,000 files, 6,000 units and 5,000 packs."""
    assert {step: size for step, job in jobs.items() if (size := len(job.proto_pipeline.SerializeToString())) > 150_000} == {}


def test_lists_are_whole_on_the_worker(run: MonthRun) -> None:
    assert len(ingest.month_parts(run)) == 10_000
    assert len(evaluate.units_of(run)) == SHARDS
    assert len(embed.unseen_packs(run.storage, run.encoder)) == 5000


def test_no_hints_on_the_local_runner(run: MonthRun, defined: dict[str, Callable[[beam.Pipeline], None]]) -> None:
    for step in ("embed-packs", "train"):
        root = beam.Pipeline()
        defined[step](root)
        proto = root.to_runner_api()
        assert not any(environment.resource_hints for environment in proto.components.environments.values())
        assert gpu_hints(root, run.config) == {} and on_gpu(len, {}) is len


def test_a_worker_without_its_gpu_says_so() -> None:
    with pytest.raises(StageError, match=r"TensorFlow 2.* sees no GPU on a worker that was asked to have one: expected a driver"):
        on_gpu(len, {"accelerator": GPU})("abc")


def test_a_worker_of_another_image_says_so(run: MonthRun) -> None:
    from beam_jobs.workers import _listed

    with pytest.raises(StageError, match=r"the worker's image has source \w+, the launcher 0123: expected the same; build the image"):
        _listed(b"", "0123", lambda: [1])


class Ranker:
    def predict(self, rows: pa.RecordBatch) -> Any:
        return rows["bid"].to_numpy() / 10


@pytest.mark.parametrize(("of_first", "expected"), [(0.1, ""), (0.1001, "1 of 2 golden scores are others: the first 0.100000000")])
def test_a_worker_that_scores_otherwise_says_so(tmp_path: pathlib.Path, of_first: float, expected: str) -> None:
    rows = pa.RecordBatch.from_pydict({"bid": [1.0, 2.0], golden.SCORE: [of_first, 0.2]})
    with pa.OSFile(str(tmp_path / golden.FILE), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write(rows)
    found = golden.differences(Ranker(), tmp_path)
    assert expected in found and bool(found) is bool(expected)


# --- submitted, watched, resumed ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def storage(cloud: dict[str, str], tmp_path: pathlib.Path) -> Iterator[Storage]:
    storage = open_storage(f"gs://adstocrat/{tmp_path.name}")
    write_months(storage, [MONTH], 300, 20, 0, lambda line: None)
    yield storage


def command(storage: Storage, service: DataflowService, what: str = "ingest") -> list[str]:
    return [what, MONTH, "--lake", storage.uri, "--gpu-type", "", "--", *FLAGS, f"--dataflow_endpoint={service.endpoint}"]


def test_a_stage_is_a_job_that_is_submitted_and_accounted_for(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    with DataflowService(execute=True) as service:
        assert main(command(storage, service)) == 0
        assert main(command(storage, service)) == 0
    (job,) = service.jobs
    run = prepare(Config(lake=storage.uri), MONTH)
    assert run.manifest(run.stage("rows")).count("ingested") == 300
    assert job["name"] == f"adstocrat-{MONTH}-{run.id}-ingest"
    assert {name: job["labels"][name] for name in ("month", "run", "step")} == {"month": MONTH, "run": run.id, "step": "ingest"}
    assert not storage.names("spill/")
    environment, (pool,) = job["environment"], job["environment"]["workerPools"]
    assert (pool["machineType"], pool["diskSizeGb"], pool["autoscalingSettings"]["maxNumWorkers"]) == ("n2-standard-8", 64, 64)
    assert {image["containerImage"] for image in pool["sdkHarnessContainerImages"]} == {IMAGE}
    assert "use_multiple_sdk_containers" in environment["experiments"]
    assert environment["sdkPipelineOptions"]["options"]["save_main_session"] is False
    assert len(json.dumps(job)) < 50_000 and len(graph(job).SerializeToString()) < 150_000
    (note,) = (storage.read_json(name) for name in storage.names(f"{run.folder}/used/"))
    assert note.pop("seconds") > 0
    assert note == {"step": "ingest", "job": "id-0", "metrics": {"TotalVcpuTime": 3600.0, "TotalGpuTime": 60.0}}


def test_workers_with_a_gpu_run_one_process(
    run: MonthRun, defined: dict[str, Callable[[beam.Pipeline], None]], cloud: dict[str, str]
) -> None:
    with DataflowService() as service:
        flags = [*FLAGS, f"--dataflow_endpoint={service.endpoint}", "--machine_type=n2-highmem-4", "--labels=team=ads"]
        run_step(defined["embed-packs"], flags, run, "embed-packs")
    (job,) = service.jobs
    (pool,) = job["environment"]["workerPools"]
    experiments = job["environment"]["experiments"]
    assert "no_use_multiple_sdk_containers" in experiments and "use_multiple_sdk_containers" not in experiments
    assert pool["numThreadsPerWorker"] == 4 and pool["machineType"] == "n2-highmem-4" and job["labels"]["team"] == "ads"
    assert len(pool["sdkHarnessContainerImages"]) == 2
    sent = {accelerator(environment) for environment in graph(job).components.environments.values()}
    assert sent == {"", GPU}


def test_a_launcher_that_is_killed_and_run_again_waits_for_the_job_that_is_there(storage: Storage) -> None:
    with DataflowService(execute=True) as service:
        service.go.clear()
        first = subprocess.Popen([sys.executable, "-m", "beam_jobs.cli", *command(storage, service)], cwd=TOP)
        wait_until(lambda: bool(service.jobs))
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        spill = f"spill/{service.jobs[0]['labels']['launch']}/left"
        storage.write(spill, b"what the job has spilled so far")
        ended: list[int] = []
        again = threading.Thread(target=lambda: ended.append(main(command(storage, service))))
        again.start()
        time.sleep(1)
        assert again.is_alive() and storage.names(spill)
        service.go.set()
        again.join()
    assert ended == [0] and len(service.jobs) == 1
    run = prepare(Config(lake=storage.uri), MONTH)
    assert run.manifest(run.stage("rows")).count("ingested") == 300
    assert not storage.names("spill/")


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_job_that_fails_is_told_and_submitted_anew(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    with DataflowService() as service:
        for state, told in (("JOB_STATE_FAILED", "came to nothing: Dataflow pipeline failed"), ("JOB_STATE_CANCELLED", "is CANCELLED")):
            service.refuse = {"ingest": state}
            assert main(command(storage, service)) == 1
            assert told in capsys.readouterr().err
    assert [job["currentState"] for job in service.jobs] == ["JOB_STATE_FAILED", "JOB_STATE_CANCELLED"]
    assert len({job["name"] for job in service.jobs}) == 1


if LONG:
    # Eleven jobs take a minute; one of them runs above.
    def test_a_month_is_the_same_as_on_the_local_runner(cloud: dict[str, str], tmp_path: pathlib.Path) -> None:
        """As the schedule runs it: `deploy/dataflow/month`, on its own arguments, and again."""
        tables = []
        with DataflowService(execute=True) as service:
            for name in ("dataflow", "local"):
                storage = open_storage(f"gs://adstocrat/{tmp_path.name}-{name}")
                write_months(storage, [MONTH], 2000, 40, 0, lambda line: None)
                if name == "dataflow":
                    # There is no GPU here.
                    storage.write("config/month.yaml", b"gpu: {type: ''}\n")
                    given = {
                        "MONTH": MONTH,
                        "LAKE": storage.uri,
                        "CONFIG": f"{storage.uri}/config/month.yaml",
                        "PROJECT": "project",
                        "REGION": "europe-west4",
                    }
                    given |= {"IMAGE": IMAGE, "WORKER": "worker@project.iam.gserviceaccount.com"}
                    given["PATH"] = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
                    launch = [str(DEPLOY / "month"), f"--dataflow_endpoint={service.endpoint}", "--no_auth"]
                    for _ in range(2):
                        done = subprocess.run(launch, env={**os.environ, **given}, cwd=TOP, capture_output=True, text=True, check=True)
                        assert "  balanced" in done.stdout.splitlines()
                else:
                    assert main(["month", MONTH, "--lake", storage.uri]) == 0
                run = prepare(Config(lake=storage.uri), MONTH)
                files = run.manifest(run.stage("scores")).files
                from schemas.parquet import read_parquet

                tables.append(pa.Table.from_batches([batch for file in files for batch in read_parquet(storage, file)]).sort_by("key"))
        assert len(service.jobs) == 10 and {job["environment"]["serviceAccountEmail"] for job in service.jobs} == {given["WORKER"]}
        assert tables[0].equals(tables[1]) and len(tables[0]) == 2000


# --- deploy/dataflow ----------------------------------------------------------------------------------------------------------------------


def parameters() -> dict[str, dict[str, Any]]:
    return {parameter["name"]: parameter for parameter in json.loads((DEPLOY / "metadata.json").read_text())["parameters"]}


GOOD = {
    "stage": ["ingest", "realised", "embed"],
    "month": ["2026-10"],
    "lake": ["gs://bucket", "gs://my-bucket/ads/lake"],
    "sdk_container_image": [IMAGE, f"gcr.io/p/worker@sha256:{'0' * 64}"],
    "contract": ["/contracts/ads.pbtxt", "gs://bucket/config/ads.pbtxt"],
    "window_months": ["3", "12"],
    "seed": ["0", "17"],
    "encoder_refresh": ["never", "months 3"],
    "encoder_backbone": ["", "MobileNetV3Small backbones/small.weights.h5"],
    "train_mode": ["auto", "scratch"],
    "train_negatives": ["1", "0.2"],
    "max_ne_loss": ["0", "0.005"],
    "monitor_scratch": ["0.25", "1"],
    "min_gate_clicks": ["1000"],
    "csv_newlines_in_values": ["true", "false"],
    "csv_encoding": ["utf-8", "latin-1"],
    "fetch_threads": ["16"],
    "gpu_type": ["nvidia-tesla-t4", "none"],
}
BAD = {
    "stage": ["publish", "month", "ingest embed"],
    "month": ["2026-13", "2026-1", "October"],
    "lake": ["s3://bucket", "gs://b", "/lake", "gs://bucket//x"],
    "sdk_container_image": ["worker", "worker:1 --flag", ""],
    "contract": ["ads.json", "a b.pbtxt", "s3://bucket/ads.pbtxt"],
    "window_months": ["0", "-1", "3.5"],
    "seed": ["-1", "x"],
    "encoder_refresh": ["months 0", "always"],
    "encoder_backbone": ["MobileNetV3Small", "a b c"],
    "train_mode": ["warm"],
    "train_negatives": ["2", "-0.1"],
    "max_ne_loss": ["1.5", "5%"],
    "monitor_scratch": ["0", "25%"],
    "min_gate_clicks": ["0", "many"],
    "csv_newlines_in_values": ["True", "yes"],
    "csv_encoding": ["utf 8", ""],
    "fetch_threads": ["0", "many"],
    "gpu_type": ["l4", "nvidia l4"],
}


def test_every_parameter_of_the_template_is_checked() -> None:
    known = parameters()
    assert known.keys() == GOOD.keys() == BAD.keys() >= Config("./a").affecting_model().keys()
    for name, parameter in known.items():
        (regex,) = parameter["regexes"]
        assert parameter["label"] and parameter["helpText"]
        assert all(re.fullmatch(regex, value) for value in GOOD[name])
        assert not [value for value in BAD[name] if re.fullmatch(regex, value)]
    assert [name for name, parameter in known.items() if not parameter["isOptional"]] == ["stage", "month", "lake", "sdk_container_image"]


def test_a_stage_is_launched_as_a_template(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    """As the template's launcher does it: parameters and Dataflow's flags alike, and a file to leave the job in."""
    given = {"stage": "ingest", "month": MONTH, "lake": storage.uri, "seed": "3", "gpu_type": "none", "csv_newlines_in_values": "true"}
    assert all(re.fullmatch(parameters()[name]["regexes"][0], value) for name, value in given.items())
    template = f"{storage.uri}/templates/ingest"
    flags = [f"--{name}={value}" for name, value in given.items()] + [*FLAGS, f"--template_location={template}", "--job_name=by-hand"]
    assert main(runpy.run_path(str(DEPLOY / "template.py"))["command"](flags)) == 0
    assert f"the job of ingest is built and written to {template}" in capsys.readouterr().out
    job = json.loads(storage.read("templates/ingest"))
    assert job["name"] == "by-hand" and job["labels"]["run"] == prepare(Config(lake=storage.uri, seed=3), MONTH).id
    assert "ReadRows" in {step.unique_name for step in graph(job).components.transforms.values()}


def test_the_setup_grants_the_least_roles(tmp_path: pathlib.Path) -> None:
    """The script with commands that only note what they were called with: no more than what it is said to grant is granted."""
    for name in ("gcloud", "bq", "docker"):
        stub = tmp_path / name
        stub.write_text(f'#!/bin/sh\nprintf "%s\\t" {name} "$@" >> {tmp_path}/calls; echo >> {tmp_path}/calls\n')
        stub.chmod(0o755)
    given = {"PROJECT": "p", "REGION": "r", "BUCKET": "b", "DATASET": "ads", "IMAGE": "r-docker.pkg.dev/p/adstocrat/worker:1"}
    subprocess.run([str(DEPLOY / "setup")], env={**os.environ, **given, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=True)
    calls = [line.split("\t")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]
    granted: dict[str, set[str]] = {}
    for call in calls:
        flags = dict(word.removeprefix("--").partition("=")[::2] for word in call if word.startswith("--"))
        if "role" in flags:
            on = "project" if call[1] == "projects" else call[1] if call[1] != "run" else "job"
            granted.setdefault(flags["member"].partition(":")[2].partition("@")[0], set()).add(f"{flags['role']} on {on}")
    assert granted == {
        "adstocrat-worker": {
            "roles/dataflow.worker on project",
            "roles/storage.objectUser on storage",
            "roles/artifactregistry.reader on artifacts",
        },
        "adstocrat-launcher": {
            *("roles/dataflow.developer on project", "roles/bigquery.jobUser on project", "roles/storage.objectUser on storage"),
            *("roles/storage.legacyBucketReader on storage", "roles/iam.serviceAccountUser on iam"),
        },
        "adstocrat-scheduler": {"roles/run.invoker on job"},
    }
    granted_on_dataset = (
        "GRANT `roles/bigquery.dataEditor` ON SCHEMA `p`.ads TO 'serviceAccount:adstocrat-launcher@p.iam.gserviceaccount.com'"
    )
    assert [call[-1] for call in calls if call[0] == "bq"] == [granted_on_dataset]
    (deployed,) = (call for call in calls if call[1:4] == ["run", "jobs", "deploy"])
    settings = dict(pair.split("=", 1) for pair in next(w for w in deployed if w.startswith("--set-env-vars="))[15:].split(","))
    # What the job's command asks for is what it is given.
    assert settings.keys() == set(re.findall(r"\$\{?([A-Z]+)", (DEPLOY / "month").read_text())) - {"MONTH"}


def test_the_image_is_of_what_is_locked() -> None:
    locked = dict(line.split("==") for line in (TOP / "requirements.txt").read_text().splitlines())
    text = (DEPLOY / "Dockerfile").read_text()
    assert f"beam_python3.11_sdk:{locked['apache-beam']} " in text
    copied = re.findall(r"deploy/dataflow/[a-z_.]+", text)
    assert copied and all((TOP / path).exists() for path in copied)
    # What TensorFlow names for GPUs is pinned, all of it.
    from importlib.metadata import requires

    wanted = {re.split(r"[<>=\[; ]", name)[0] for name in requires("tensorflow") or () if 'extra == "and-cuda"' in name}
    pinned = [line for line in (DEPLOY / "gpu.txt").read_text().splitlines() if not line.startswith("#")]
    assert {line.split("==")[0] for line in pinned} == wanted


def test_what_is_launched_is_what_the_sdist_holds(cloud: dict[str, str], storage: Storage, tmp_path: pathlib.Path) -> None:
    """From the sdist alone: in a clean environment where there is time for it, else laid beside the installed packages."""
    source = tmp_path / "source"
    shutil.copytree(TOP, source, ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__", "demo-data"))
    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist"], cwd=source, check=True, capture_output=True)
    (sdist,) = (source / "dist").glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path)
    unpacked = tmp_path / "adstocrat-0.1.0"
    assert (unpacked / "deploy" / "dataflow" / "gpu.txt").exists()
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)
    if LONG:
        subprocess.run([sys.executable, "-m", "venv", tmp_path / "clean"], check=True)
        python = tmp_path / "clean" / "bin" / "python"
        install = [python, "-m", "pip", "install", "--quiet", "--constraint", unpacked / "requirements.txt", f"{sdist}[pipeline]"]
        subprocess.run(install, env=environment, check=True)
        environment["PATH"] = f"{python.parent}:{environment['PATH']}"
        sizes = subprocess.run([DEPLOY / "sizes"], env=environment, capture_output=True, text=True, check=True).stdout
        print(sizes)
        assert int(sizes.split("\n")[-2].split()[0]) < 3500
    else:
        target = tmp_path / "clean"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target, sdist]
        subprocess.run(install, env=environment, check=True)
        python, environment["PYTHONPATH"] = pathlib.Path(sys.executable), str(target)
    code = "import sys; from beam_jobs import cli; print(cli.__file__, flush=True); sys.exit(cli.main())"
    with DataflowService() as service:
        launch = [python, "-c", code, *command(storage, service, "ingest")]
        done = subprocess.run(launch, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(str(tmp_path / "clean"))
    # The stand-in says that it is done and has run nothing, so the launcher misses what the job should have left.
    assert "rows" in done.stderr and "is not complete" in done.stderr
    (job,) = service.jobs
    assert job["labels"]["run"] == prepare(Config(lake=storage.uri), MONTH).id
