"""The plan counts what is really there and what is left to do; its estimate grows with the work and the prices."""

import dataclasses

import pytest

from beam_jobs import plan
from beam_jobs.cli import main
from beam_jobs.config import Config
from beam_jobs.plan import Delivery
from beam_jobs.run import prepare
from schemas import lake
from schemas.lake import Manifest
from schemas.parquet import read_parquet, write_parquet
from schemas.sample import write_months
from schemas.storage import Folder

MONTH = "2026-08"
BILLION = Delivery(1_000_000_000, 3_000_000_000, 100_000_000, 100_000_000, 10_000_000_000_000, 100_000_000)


def test_the_plan_of_a_month_is_told_and_nothing_runs(tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]) -> None:
    storage = Folder(str(tmp_path_factory.mktemp("lake")))
    write_months(storage, [MONTH], 2000, 60, 0, lambda line: None)
    assert main(["month", MONTH, "--lake", storage.uri, "--plan"]) == 0
    told = capsys.readouterr().out.splitlines()
    run = prepare(Config(lake=storage.uri), MONTH)
    images = len(storage.names(lake.raw_images(MONTH)))
    month = plan.delivery(run)
    assert 1900 < month.rows < 2100 and month.window_rows == month.rows
    assert month.images == month.new_images == month.to_embed == images
    assert month.new_bytes == sum(entry.size for entry in storage.entries(lake.raw_images(MONTH)))
    assert f"{images:,} images, {images:,} of them new" in told[1]
    assert [line.split()[0] for line in told[2:-2]] == [stage.name for stage in plan.STAGES]
    assert not storage.names("rows/")


def test_only_what_is_new_and_not_complete_is_counted(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Ten of the images were looked at by an earlier run, one of them under another size; ingest is complete."""
    storage = Folder(str(tmp_path_factory.mktemp("lake")))
    write_months(storage, [MONTH], 200, 60, 0, lambda line: None)
    run = prepare(Config(lake=storage.uri), MONTH)
    listing = next(read_parquet(storage, storage.read_json(f"{run.folder}/inputs.json")["listing"]))
    looked = listing.slice(0, 10).to_pylist()
    looked[0]["size"] += 1
    folder = "creatives/2026-07/r/packs"
    receipt = write_parquet(storage, folder, "pack/00000", [listing.from_pylist(looked, listing.schema)])
    lake.commit(storage, folder, Manifest("packs", (receipt,)))
    new, size = plan.new_images(run)
    assert new == listing.num_rows - 9 and size == sum(listing["size"].to_pylist()[10:]) + listing["size"][0].as_py()
    before = plan.show(plan.numbers(run))
    lake.commit(storage, run.stage("rows"), Manifest("ingest", (), {"shards": 1}))
    after = plan.show(plan.numbers(run))
    assert "ingest     complete" in after and "ingest     complete" not in before


@pytest.mark.parametrize("field", ["rows", "images", "new_images", "new_bytes", "to_embed", "window_rows"])
def test_more_to_do_costs_more(field: str) -> None:
    config = Config(lake="./lake")
    twice = dataclasses.replace(BILLION, **{field: 2 * getattr(BILLION, field)})
    assert cost(twice, config) > cost(BILLION, config) > 0


@pytest.mark.parametrize("price", [field.name for field in dataclasses.fields(Config) if field.name.startswith("prices_")])
def test_every_price_counts(price: str) -> None:
    config = Config(lake="./lake")
    dearer = dataclasses.replace(config, **{price: 2 * getattr(config, price)})
    assert cost(BILLION, dearer) > cost(BILLION, config)


def test_an_hour_costs_what_the_table_says() -> None:
    config = Config("./lake", prices_vcpu_hour=1, prices_gb_hour=0.5, prices_disk_gb_hour=0.25, prices_gpu_hour=10, prices_shuffle_gb=7)
    assert plan.Work("s", 1, "rows", vcpu_hours=2).cost(config) == 2 * (1 + 4 * 0.5 + 8 * 0.25)
    assert plan.Work("s", 1, "rows", gpu_hours=1).cost(config) == 10 + 4 * 5
    assert plan.Work("s", 1, "rows", shuffled=2_000_000_000).cost(config) == 14


def cost(month: Delivery, config: Config) -> float:
    return sum(work.cost(config) for work in plan.work(month))
