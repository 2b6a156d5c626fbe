"""What the workers of a Dataflow job are, and what is made sure of on a worker before any work is done.

The image that workers run is this package, so nothing is staged: no main session, no setup file, no packages.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.options.pipeline_options import DebugOptions, PipelineOptions, StandardOptions, WorkerOptions

from beam_jobs.arrow import Repartition
from beam_jobs.config import Config
from beam_jobs.run import MonthRun, StageError, source_digest

# Beam's own flags, where they are not given.
_DEFAULTS = {
    # 4 GB a vCPU: each vCPU has a process of its own, and what one holds at most is the rows of two units, about 1 GiB (docs/scale.md).
    "machine_type": "n2-standard-8",
    # Spills and outputs lie in the bucket; the disk takes the image and, for each vCPU, a file or two that are being written.
    "disk_size_gb": 64,
    # Beam would go up to 1,000, and no bucket starts at what those ask of it: it doubles about every 20 minutes.
    "max_num_workers": 64,
}
# A GPU is shared best by one process: several would each hold a model and a part of its memory. While one thread computes, others read.
_GPU_EXPERIMENT, _GPU_THREADS = "no_use_multiple_sdk_containers", 4


def on_dataflow(options: PipelineOptions) -> bool:
    return (options.view_as(StandardOptions).runner or "").rpartition(".")[2].lower() == "dataflowrunner"


def set_defaults(options: PipelineOptions, uses_gpu: bool) -> None:
    """Settle what the job's workers are wherever no flag does."""
    workers, debug = options.view_as(WorkerOptions), options.view_as(DebugOptions)
    for name, value in _DEFAULTS.items():
        if getattr(workers, name) is None:
            setattr(workers, name, value)
    if uses_gpu:
        debug.add_experiment(_GPU_EXPERIMENT)
        debug.number_of_worker_harness_threads = debug.number_of_worker_harness_threads or _GPU_THREADS


def gpu_hints(root: beam.Pipeline, config: Config) -> dict[str, str]:
    """Resource hints of a step that computes on a GPU; none on other runners, where each hint would only start another process."""
    if not on_dataflow(root.options) or not config.gpu_type:
        return {}
    machine = f"machine_type:{config.gpu_machine_type};" if config.gpu_machine_type else ""
    return {"accelerator": f"type:{config.gpu_type};count:{config.gpu_count};{machine}install-nvidia-driver"}


def on_gpu(step: Callable[..., Any], hints: dict[str, str]) -> Callable[..., Any]:
    """`step`, which on a worker that was asked to have a GPU makes sure of it first.

    Raises:
        StageError: (on the worker) TensorFlow sees none.
    """
    return functools.partial(_with_gpu, step) if hints else step


def _with_gpu(step: Callable[..., Any], *arguments: Any) -> Any:
    _make_sure_of_gpu()
    return step(*arguments)


@functools.cache
def _make_sure_of_gpu() -> None:
    from model import tensorflow

    tensorflow.load()
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        raise StageError(
            f"TensorFlow {tf.__version__} sees no GPU on a worker that was asked to have one: expected a driver and the libraries of "
            "deploy/dataflow/gpu.txt in the image; build it again, or set gpu_type to '' to do without"
        )
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)


@dataclasses.dataclass(eq=False)
class Listed(beam.PTransform):
    """Where a pipeline begins: what there is to do, PBegin → PCollection[kind], listed on a worker and spread over all of them.

    A job's graph could not carry it: that may have 10 MB; the units of a billion rows in three months, or the packs of 100 M creatives,
    have more.

    Attributes:
        make: lists it, from the lake's manifests.
        kind: type of its elements.
    """

    make: Callable[[], Iterable[Any]]
    kind: Any

    def expand(self, root: Any) -> beam.PCollection:
        listed = root | beam.Impulse() | "List" >> beam.FlatMap(_listed, source_digest(), self.make).with_output_types(self.kind)
        return listed | "Spread" >> beam.Reshuffle()


def _listed(_: bytes, source: str, make: Callable[[], Iterable[Any]]) -> Iterable[Any]:
    if source_digest() != source:
        raise StageError(
            f"the worker's image has source {source_digest()}, the launcher {source}: expected the same; build the image from what "
            "launches, and name it with --sdk_container_image"
        )
    return make()


def read_by_shard(
    root: beam.Pipeline,
    name: str,
    run: MonthRun,
    files: Callable[[], Iterable[Any]],
    read: Callable[[Any], Iterable[pa.RecordBatch]],
    shards: int,
    assign: Callable[..., np.ndarray],
    kind: Any = str,
) -> beam.PCollection:
    """The batches that are `read` of the lake's `files`, of type `kind`, in shards: PBegin → PCollection[Unit], one for each shard."""
    return (
        root
        | f"{name}Files" >> Listed(files, kind)
        | f"Read{name}" >> beam.FlatMap(read).with_output_types(pa.RecordBatch)
        | f"Shard{name}" >> Repartition(run.storage, run.spill, shards, functools.partial(assign, shards=shards), unit_rows=None)
    )
