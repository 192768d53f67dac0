"""How ranks find each other, before they have met."""

import os

import pytest

from mica_ds import process
from mica_ds.errors import UserError


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MASTER_ADDR": "no host"}, "no MASTER_ADDR and MASTER_PORT to meet at; export both"),
        ({"MASTER_ADDR": "no host", "MASTER_PORT": "29500"}, "MASTER_ADDR=no host and MASTER_PORT=29500 name no place"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "first"}, "MASTER_PORT=first name no place to meet"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, ""),
    ],
)
def test_a_place_to_meet_must_be_known(variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    if said:
        with pytest.raises(UserError, match=said):
            process.find_ranks()
    else:
        process.find_ranks()


def test_a_rank_of_slurms_is_known_by_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that they are restored
        monkeypatch.delenv(name)
    given = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16"}
    for name, value in {**given, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    process.find_ranks()
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["9", "1", "16"]
