"""The launch document: arrives whole or counts as nothing."""

from io import BytesIO

import pytest

from serving_service.shim.confinement import Confinement
from serving_service.shim.spec import IncompleteSpecError, Spec, read_spec


def a_spec() -> Spec:
    return Spec(
        replica_id="r1",
        epoch=1,
        directory="/d",
        lock_fd=5,
        working_directory="/d/work",
        command=["/bin/true", "{listen_fd}"],
        environment={"KEY": "value-é\n"},
        masked_values=["value-é\n"],
        confinement=Confinement(open_files=100),
        supervisor_lock=None,
        orphan_seconds=60,
        idle_seconds=100,
        log_bytes=1_000,
        log_line_bytes=100,
    )


def test_a_spec_survives_its_frame() -> None:
    assert read_spec(BytesIO(a_spec().to_frame() + b"more")) == a_spec()


def test_every_truncation_of_a_frame_is_refused() -> None:
    frame = a_spec().to_frame()
    for size in range(len(frame)):
        with pytest.raises(IncompleteSpecError):
            read_spec(BytesIO(frame[:size]))


def test_a_spec_does_not_show_its_values() -> None:
    assert "value" not in repr(a_spec()).replace("masked_values", "")
