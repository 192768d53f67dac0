"""One SLURM for all tests of a process that need it."""

from collections.abc import Iterator

import pytest

from ..slurm import Cluster, cluster, obstacle


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := obstacle():
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
