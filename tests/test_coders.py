"""Every edge of every pipeline: what it carries, and with which coder. A batch that is pickled is ten times slower and bigger, silently."""

from collections.abc import Callable, Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.pipeline import AppliedPTransform, PipelineVisitor
from apache_beam.runners.pipeline_context import PipelineContext
from apache_beam.typehints import typehints

from beam_jobs import creatives, embed, evaluate, ingest, lookup, realised, score, train
from beam_jobs.arrow import RecordBatchCoder, Section, ShardPair, Unit
from beam_jobs.config import Config
from beam_jobs.inference import Named
from beam_jobs.run import prepare
from schemas import lake
from schemas.lake import Manifest, Receipt
from schemas.sample import write_months
from schemas.storage import open_storage

MONTH, SHARDS = "2026-08", 3
# What Beam itself puts in: no element of ours passes there but once a stage, when its receipts are collected.
BEAMS_OWN = ("/DoOnce/", "/KeyWithVoid", "/CombinePerKey/", "/UnKey", "/InjectDefault", "/MaybeReshuffle", "/Impulse")
SMALL = (Section, Unit, ShardPair, ingest.Part, Receipt, Manifest)

# The edges that carry batches, by pipeline: no more and no fewer.
CARRY_BATCHES = {
    "ingest": {"ReadRows/ParDo(_ReadRows)", "Keys", "FindDuplicates"},
    "creatives pack": {"ReadListing", "ReadKnown"},
    "creatives index": {"ReadListing", "ReadKnown"},
    "realised": {"ReadOutcomes", "ReadScores"},
    "embed pack": {"EmbedPacks/ReadThumbnails", "EmbedPacks/Embed/BeamML_RunInference"},
    "embed gather": {"ReadWanted", "ReadEmbeddings", "FindEmbeddings"},
    "evaluate": set[str](),
    "score": {"Join", "Score/BeamML_RunInference", "Label"},
    "lookup": {"ReadScores"},
    "train": set[str](),
}
# What goes through a shuffle, by pipeline: addresses, names and receipts.
SHUFFLED = {
    "ingest": {
        *("Files/Spread", "GroupByFile", "ShardByImage/GroupByShard", "ShardByKey/GroupByShard", "SpreadKeys"),
        *("ShardByPart/GroupByShard", "SpreadDuplicates", "ShardDuplicates/GroupByShard", "PairShards/CoGroupByKeyImpl", "SpreadPairs"),
    },
    "creatives pack": {
        *("ListingFiles/Spread", "KnownFiles/Spread", "ShardListing/GroupByShard", "ShardKnown/GroupByShard"),
        *("PairShards/CoGroupByKeyImpl", "SpreadPairs"),
    },
    "creatives index": {
        *("ListingFiles/Spread", "KnownFiles/Spread", "ShardListing/GroupByShard", "ShardKnown/GroupByShard"),
        *("PairShards/CoGroupByKeyImpl", "SpreadPairs"),
    },
    "realised": {
        *("OutcomesFiles/Spread", "ScoresFiles/Spread", "ShardOutcomes/GroupByShard", "ShardScores/GroupByShard"),
        *("PairShards/CoGroupByKeyImpl", "SpreadPairs", "GroupSome"),
    },
    "embed pack": {"Packs/Spread"},
    "embed gather": {
        *("WantedFiles/Spread", "EmbeddingsFiles/Spread", "ShardWanted/GroupByShard", "ShardEmbeddings/GroupByShard"),
        *("PairShards/CoGroupByKeyImpl", "SpreadPairs", "ShardByImage/GroupByShard", "SpreadShards"),
    },
    "evaluate": {"Units/Spread", "GroupSome"},
    "score": {"Units/Spread"},
    "lookup": {"ScoresFiles/Spread", "ShardScores/GroupByShard", "SpreadShards"},
    "train": {"Run/Spread"},
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, beam.Pipeline]:
    """All pipelines of a month, built on a small lake whose earlier stages are complete, and not run."""
    uri = str(tmp_path_factory.mktemp("lake"))
    write_months(open_storage(uri), [MONTH], 100, 20, 0, lambda line: None)
    run = prepare(Config(lake=uri), MONTH)
    encoder = run.encoder

    def complete(folder: str, unit: str, **info: Any) -> Manifest:
        receipt = Receipt(unit, f"{folder}/file.parquet", 1)
        return lake.commit(run.storage, folder, Manifest("stage", (receipt,), info))

    complete(run.stage("rows"), "shard/00000.000", shards=SHARDS)
    complete(run.stage("creatives") + "/packs", "pack/00000")
    complete(run.stage("creatives"), "index/00000.000", shards=SHARDS)
    # An encoder that has embedded something, and one that has not.
    complete(lake.embeddings_folder(encoder, run.month, run.id) + "/packs", "another-pack@0")
    complete(lake.embeddings_folder(encoder, run.month, run.id), "shard/00000.000", width=32)
    models = {"encoder": encoder, "ranker": run.version}
    scores = complete(run.stage("scores"), "shard/00000.000@0", **models)
    definitions: dict[str, tuple[Any, ...]] = {
        "ingest": (ingest.define_pipeline, run),
        "creatives pack": (creatives.define_pack_pipeline, run),
        "creatives index": (creatives.define_index_pipeline, run, SHARDS),
        "realised": (realised.define_pipeline, run, run.month, run.id, frozenset()),
        "embed pack": (embed.define_pack_pipeline, run, encoder),
        "embed gather": (embed.define_gather_pipeline, run, encoder, run.month, run.id),
        "evaluate": (evaluate.define_pipeline, run),
        "score": (score.define_pipeline, run, Manifest("evaluate", (), models)),
        "lookup": (lookup.define_pipeline, run, scores),
        "train": (train.define_pipeline, run, train.train_ranker),
    }
    return {name: built(define, *arguments) for name, (define, *arguments) in definitions.items()}


def built(define: Callable[..., Any], *arguments: Any) -> beam.Pipeline:
    root = beam.Pipeline()
    define(root, *arguments)
    return root


def edges(root: beam.Pipeline) -> dict[str, tuple[Any, Any]]:
    """Type and coder of what each step yields, by the step's full label (and the output's tag); a composite has no edge of its own."""
    proto = root.to_runner_api()
    context = PipelineContext(proto.components)
    coder_of = {
        (step.unique_name, tag): context.coders.get_by_id(proto.components.pcollections[output].coder_id)
        for step in proto.components.transforms.values()
        for tag, output in step.outputs.items()
    }
    found: dict[str, tuple[Any, Any]] = {}

    class Visitor(PipelineVisitor):
        def visit_transform(self, step: AppliedPTransform) -> None:
            for tag, output in step.outputs.items():
                label = step.full_label if tag in (None, "None") else f"{step.full_label}[{tag}]"
                found[label] = (typehints.normalize(output.element_type), coder_of[step.full_label, str(tag)])

    root.visit(Visitor())
    return found


def parts(value: Any) -> Iterator[Any]:
    """A coder and all coders in it, or a type and all types in it."""
    yield value
    inner = value._get_component_coders() if isinstance(value, beam.coders.Coder) else _inner_types(value)
    for part in inner:
        yield from parts(part)


def _inner_types(hint: Any) -> list[Any]:
    return list(hint._inner_types()) if isinstance(hint, typehints.TypeConstraint) and hasattr(hint, "_inner_types") else []


def carries_batch(hint: Any) -> bool:
    return any(part is pa.RecordBatch for part in parts(hint))


def undeclared(root: beam.Pipeline) -> set[str]:
    """Edges that might carry anything, and so pickle it, but for Beam's own."""
    return {
        label
        for label, (hint, _) in edges(root).items()
        if not any(own in label for own in BEAMS_OWN)
        and any(part is Any or part is object or part == typehints.Any for part in parts(hint))
    }


def coded(root: beam.Pipeline) -> set[str]:
    """Edges whose coder contains ours."""
    return {label for label, (_, coder) in edges(root).items() if any(isinstance(part, RecordBatchCoder) for part in parts(coder))}


@pytest.mark.parametrize("name", CARRY_BATCHES)
def test_batches_have_our_coder(pipelines: dict[str, beam.Pipeline], name: str) -> None:
    found = edges(pipelines[name])
    assert {label for label, (hint, _) in found.items() if carries_batch(hint)} == CARRY_BATCHES[name]
    assert coded(pipelines[name]) == CARRY_BATCHES[name]


@pytest.mark.parametrize("name", CARRY_BATCHES)
def test_every_edge_is_declared(pipelines: dict[str, beam.Pipeline], name: str) -> None:
    assert undeclared(pipelines[name]) == set()


@pytest.mark.parametrize("name", CARRY_BATCHES)
def test_only_small_things_are_shuffled(pipelines: dict[str, beam.Pipeline], name: str) -> None:
    """A shuffle's output holds no batch, and what has no coder of its own is one of our few small records."""
    root = pipelines[name]
    proto = root.to_runner_api()
    grouping = {t.unique_name for t in proto.components.transforms.values() if t.spec.urn == "beam:transform:group_by_key:v1"}
    shuffles = {label for label in grouping if not any(own in label for own in BEAMS_OWN)}
    named = {label.removesuffix("/GroupByKey").removesuffix("/ReshufflePerKey") for label in shuffles}
    assert named == SHUFFLED[name]
    found = edges(root)
    assert not any(carries_batch(found[label][0]) for label in grouping)


@pytest.mark.parametrize("name", CARRY_BATCHES)
def test_no_row_is_an_element(pipelines: dict[str, beam.Pipeline], name: str) -> None:
    """No edge has a dict or a Row for elements; units by side of a join and sums by model are mappings with two or three members."""
    mappings = {label for label, (hint, _) in edges(pipelines[name]).items() if any(_is_row(part) for part in parts(hint))}
    sides = {"PairShards/CoGroupByKeyImpl/MapTuple(collect_values)"}
    sums = {"JudgeSome", *(label for label in edges(pipelines[name]) if label.startswith("Gather/"))}
    assert mappings <= (sums if name == "evaluate" else sides)
    assert not [label for label, (_, coder) in edges(pipelines[name]).items() for part in parts(coder) if "RowCoder" in type(part).__name__]


def _is_row(hint: Any) -> bool:
    is_mapping = isinstance(hint, typehints.DictConstraint) or getattr(hint, "__origin__", hint) in (dict,)
    return is_mapping or "RowTypeConstraint" in type(hint).__name__ or hint is beam.Row


def test_our_small_records_hold_no_batch() -> None:
    """What Beam pickles for us is made of numbers, strings and one another."""
    for record in SMALL:
        assert not any("RecordBatch" in str(annotation) for annotation in record.__annotations__.values())


# --- the helpers do catch what they are for -----------------------------------------------------------------------------------------------


def batches(start: int) -> Iterator[pa.RecordBatch]:
    yield pa.RecordBatch.from_pydict({"n": [start]})


def named_batches(start: int) -> Iterator[Named]:
    for batch in batches(start):
        yield f"unit@{start}", batch


def says_nothing(start: int) -> Any:
    return list(batches(start))


@beam.typehints.with_output_types(tuple[str, pa.RecordBatch])
def wrongly_declared(start: int) -> Any:
    return list(named_batches(start))


@pytest.mark.parametrize(
    ("step", "caught"),
    [
        (beam.FlatMap(named_batches).with_output_types(Named), False),
        (beam.FlatMap(batches).with_output_types(pa.RecordBatch), False),
        (beam.FlatMap(says_nothing), True),
        (beam.Map(lambda start: {"n": start}), True),
        (beam.FlatMap(named_batches).with_output_types(Any), True),
        (beam.FlatMap(wrongly_declared), True),
    ],
)
def test_an_undeclared_edge_is_caught(step: beam.PTransform, caught: bool) -> None:
    root = built(lambda root: root | "Numbers" >> beam.Create([1, 2]) | "Step" >> step)
    fine = coded(root) == {"Step"} and not undeclared(root)
    assert fine is not caught
