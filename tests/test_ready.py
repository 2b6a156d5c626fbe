import os
import pathlib
import time

import pytest

from beam_jobs.cli import main
from beam_jobs.ready import NotReadyError, check_delivery
from schemas.storage import Folder

MONTH = "2026-10"
HEADER = "ad_id,advertiser,campaign,format,placement,device,hour,bid,position,image,impressions,clicks"
ADS = f"raw/{MONTH}/ads/a.csv"


@pytest.fixture
def lake(tmp_path: pathlib.Path) -> Folder:
    storage = Folder(str(tmp_path))
    good = [f"ad{i},a,c,f,p,d,3,0.5,1,,10,{i % 2}" for i in range(98)]
    storage.write(ADS, "\n".join([HEADER, *good, "bad,a,c,f,p,d,x,0.5,1,,10,1", "worse"]).encode())
    return storage


def test_a_marker_is_waited_for(lake: Folder) -> None:
    check_delivery(lake, MONTH, "always")
    with pytest.raises(NotReadyError, match=f"{MONTH} is not ready: waiting for .*/_SUCCESS"):
        check_delivery(lake, MONTH, "marker _SUCCESS")
    lake.write(f"raw/{MONTH}/_SUCCESS", b"")
    check_delivery(lake, MONTH, "marker _SUCCESS")


def test_a_month_must_be_quiet_for_the_time_that_is_asked(lake: Folder) -> None:
    with pytest.raises(NotReadyError, match="waiting until it is quiet for 30m"):
        check_delivery(lake, MONTH, "quiet 30m")
    an_hour_ago = time.time() - 3600
    os.utime(pathlib.Path(lake.uri) / ADS, (an_hour_ago, an_hour_ago))
    check_delivery(lake, MONTH, "quiet 30m")
    with pytest.raises(NotReadyError):
        check_delivery(lake, MONTH, "quiet 2h")
    with pytest.raises(NotReadyError):
        check_delivery(lake, "2026-11", "quiet 1s")


def test_the_command_exits_75_while_a_month_is_not_ready(lake: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["month", MONTH, "--lake", lake.uri, "--ingest-ready", "marker _SUCCESS"]) == os.EX_TEMPFAIL
    assert "_SUCCESS" in capsys.readouterr().err
    assert lake.names("runs/") == []


def test_too_many_rejects_stop_the_month_before_anything_is_trained(lake: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    # The second time the rows are there, and the month stops all the same.
    for _ in range(2):
        assert main(["month", MONTH, "--lake", lake.uri]) == 1
        told = capsys.readouterr().err
        assert "2 of 100 rows of 2026-10 were rejected, 2.00%" in told and "max_reject_share is 1.00%" in told
        assert "unparsable 1 times, such as a.csv row 99, column 'hour', value 'x'" in told
        assert "field_count 1 times, such as a.csv row 100" in told and "Traceback" not in told
    assert main(["train", MONTH, "--lake", lake.uri]) == 1
    assert not lake.names("models/") and not lake.names("creatives/")
    assert main(["creatives", MONTH, "--lake", lake.uri, "--max-reject-share", "0.02"]) == 0
