"""What Prometheus is told: the workers' counts added up, and what is served."""

import dataclasses
import datetime
import itertools
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving.counters import BOUNDS, BUCKETS, HISTOGRAMS, KEYS, MISSES, OF_A_ROUTE, ROUTES, STATUS, STATUSES, Counters
from serving.store import Table


@dataclasses.dataclass(eq=False)
class Served(Collector):
    """All workers' counts and what is served, as Prometheus has it.

    Attributes:
        counters: of each worker.
        table: what is offered to the workers; None before the first.
        swaps, refused: how often the served run changed, and how often a run was refused.
        differs: whether `adstocrat status` last found that the tables say otherwise than the lake.
    """

    counters: Sequence[Counters]
    table: Table | None = None
    swaps: int = 0
    refused: int = 0
    differs: bool = False

    def collect(self) -> Iterable[Metric]:
        slots = [sum(each) for each in zip(*(counters.slots for counters in self.counters), strict=True)]
        for route in range(len(ROUTES)):
            first, answers = 2 + route * len(STATUSES), HISTOGRAMS + route * OF_A_ROUTE
            slots[first] = sum(slots[answers : answers + BUCKETS + 1]) - sum(slots[first + 1 : first + len(STATUSES)])
        yield from _requests(slots)
        found = CounterMetricFamily("adstocrat_lookups", "Keys looked up, by whether the month has them.", labels=["result"])
        found.add_metric(["hit"], slots[2 + STATUS[200]] + slots[2 + STATUS[304]] + slots[KEYS] - slots[MISSES])
        found.add_metric(["miss"], slots[2 + STATUS[404]] + slots[MISSES])
        yield found
        yield CounterMetricFamily("adstocrat_swaps", "Changes of the served run.", self.swaps)
        yield CounterMetricFamily(
            "adstocrat_refused_swaps", "Runs that were corrupt or incomplete and not served, by attempt.", self.refused
        )
        yield GaugeMetricFamily("adstocrat_tables_differ", "1 where BigQuery was seen to have another run than the lake.", self.differs)
        if self.table:
            began = datetime.datetime.fromisoformat(f"{self.table.month}-01T00:00:00+00:00").timestamp()
            yield GaugeMetricFamily("adstocrat_month_timestamp_seconds", "When the served month began, in Unix time.", began)
            names = {"month": self.table.month, "run_id": self.table.run, "model_version": self.table.model_version}
            yield InfoMetricFamily("adstocrat_run", "What is served.", names)
            yield GaugeMetricFamily("adstocrat_rows", "Rows of the served run.", self.table.rows)
            yield GaugeMetricFamily("adstocrat_age_days", "Days since the served run was built.", self.table.age_days)


def _requests(slots: Sequence[int]) -> Iterator[Metric]:
    requests = CounterMetricFamily("adstocrat_requests", "Answers, by route and status.", labels=["route", "status"])
    seconds = HistogramMetricFamily("adstocrat_request_seconds", "From a request's headers to its answer's last byte.", labels=["route"])
    for route, name in enumerate(ROUTES):
        first = 2 + route * len(STATUSES)
        for status, count in zip(STATUSES, slots[first : first + len(STATUSES)], strict=True):
            if count:
                requests.add_metric([name, str(status)], count)
        first = HISTOGRAMS + route * OF_A_ROUTE
        totals = map(float, itertools.accumulate(slots[first : first + BUCKETS + 1]))
        seconds.add_metric([name], list(zip([*map(str, BOUNDS), "+Inf"], totals, strict=True)), slots[first + BUCKETS + 1] / 1e9)
    yield requests
    yield seconds
