"""100,000 images through `mrl predict`: memory stays flat, a kill costs nothing."""

import csv
import signal
import time
from pathlib import Path

import pytest

from deploy_load import lines_of, make_links, start_predict, watched

N, SECONDS = 100_000, 600


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model for 32 px and a folder of links to 50 pictures."""
    return make_links(tmp_path_factory.mktemp("many"), N)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is read from /proc")
def test_predict__a_hundred_thousand_images(work):
    status, seconds, memory = watched(work, "whole.csv", N)
    assert status == 0
    assert seconds < SECONDS
    assert len(memory) > 20
    assert max(memory) <= 1.1 * memory[0]
    with (work / "whole.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"{i // 1000:03}/{i:06}.png" for i in range(N)]
    assert not any(row["error"] for row in rows)

    process = start_predict(work, "killed.csv")
    while lines_of(work / "killed.csv.part") < N // 3:
        assert process.poll() is None
        time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (work / "killed.csv").exists()
    assert start_predict(work, "killed.csv").wait() == 0
    assert (work / "killed.csv").read_bytes() == (work / "whole.csv").read_bytes()
    print(f"{N} images in {seconds:.0f} s; resident memory {memory[0]:.0f} to {max(memory):.0f} MB")
