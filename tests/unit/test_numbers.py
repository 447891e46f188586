"""A number is what a person would write as one."""

from __future__ import annotations

import pytest

from gms_launch import numbers
from gms_launch.errors import UsageError
from gms_launch.run import dead
from gms_launch.run.topology import from_slurm
from gms_launch.settings.resolve import resolve
from gms_launch.transport import ssh

#: What int() or isdigit() would take, or fall over.
STRANGE = ["١", "²", "1_0", " 7", "7 ", "", "0x10"]


@pytest.mark.parametrize("text", STRANGE)
def test_what_is_no_number_to_people_is_none(text: str) -> None:
    assert numbers.count(text) is None
    for read in (numbers.whole, numbers.real):
        with pytest.raises(ValueError, match="is not a"):
            read(text)
    with pytest.raises(UsageError, match="shadows"):
        resolve({"shadows": text or "-"}, {})
    assert not text or not dead.run_name(f"r+{text}")
    assert dead.tagged_name(f"r/0/1/{text}") is None


def test_numbers() -> None:
    assert (numbers.whole("-3"), numbers.real("1e3"), numbers.real(".5"), numbers.count("007")) == (-3, 1000.0, 0.5, 7)
    for text in ("nan", "inf", "1e999", "1,5"):
        with pytest.raises(ValueError, match="is not a number"):
            numbers.real(text)
    with pytest.raises(UsageError, match="not a valid int"):
        resolve({}, {}, {"shadows": 1.5})


def test_numbers_in_a_host_and_from_slurm() -> None:
    with pytest.raises(UsageError, match="expected"):
        ssh.split("a:٢٢")
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n", "SLURM_GPUS_ON_NODE": "²"}
    assert from_slurm(job) == {"tp": 1}
