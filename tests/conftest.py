"""Fixtures that several test modules share."""

import os
import pathlib
from collections.abc import Iterator
from unittest import mock

import pytest

from beam_jobs import local_cloud
from schemas import storage

# Modules that run whole months take longest, and begin first, so that several workers end together.
_LONGEST = ("test_end_to_end", "test_faults", "test_month", "test_models", "test_publish", "test_dataflow", "test_serving_load")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST)

    items.sort(key=place)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where every test must run, a skipped one fails the session."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("ADSTOCRAT_NO_SKIPS") and reporter and reporter.stats.get("skipped") and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A local cloud with the bucket `gs://adstocrat`, and this process's environment pointing at it; its state folder is new and empty."""
    state: pathlib.Path = tmp_path_factory.mktemp("cloud")
    try:
        environment = local_cloud.start(state, tied=True)
        # The client is made once a process, for whatever the environment named then.
        storage._client.cache_clear()
        with mock.patch.dict(os.environ, environment):
            yield environment
    finally:
        storage._client.cache_clear()
        local_cloud.stop(state)
