"""Which GPUs a replica gets: as many as its kind takes, of those that are free, and never one that is taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servicekit.settings import SettingsError, load
from serving_service import gpus
from serving_service.settings import ServingSettings
from tessera.serving.v1 import serving_pb2 as pb

DEVICES = st.lists(st.text("abc", min_size=1, max_size=3), unique=True, max_size=8)


def test_every_kind_with_gpus_says_how_many_it_takes_and_no_other() -> None:
    kinds = set(pb.WorkloadType.keys())
    assert {kind for kind in kinds if gpus.needed(kind)} == {kind for kind in kinds if "GPU" in kind}
    assert (gpus.needed("GPU_XLARGE"), gpus.needed("MULTIGPU_MEDIUM"), gpus.needed("GPU_XLARGE_8")) == (1, 4, 8)


@given(devices=DEVICES, taken=DEVICES, count=st.integers(1, 9))
def test_what_is_chosen_was_free_and_is_enough(devices: list[str], taken: list[str], count: int) -> None:
    found = gpus.chosen(devices, taken, count)
    free = [device for device in devices if device not in taken]
    if found is None:
        assert len(free) < count
    else:
        assert len(found) == len(set(found)) == count
        assert set(found) <= set(free)


@pytest.mark.parametrize(
    ("said", "meant"),
    [({}, None), ({"TESSERA_GPUS": "none"}, set()), ({"TESSERA_GPUS": "GPU-1, GPU-2"}, {"GPU-1", "GPU-2"})],
)
def test_which_gpus_are_given_away_can_be_set(said: dict[str, str], meant: set[str] | None) -> None:
    assert load(ServingSettings, {"HOME": "/", **said}).gpus == meant


@pytest.mark.parametrize("said", ["0", "GPU-1,", "all", "none,GPU-1"])
def test_what_names_no_gpu_is_refused(said: str) -> None:
    with pytest.raises(SettingsError, match="TESSERA_GPUS"):
        load(ServingSettings, {"HOME": "/", "TESSERA_GPUS": said})
