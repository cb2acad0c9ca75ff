"""Somebody listens where a replica was going to listen: no query goes there, and the replica runs elsewhere (R13)."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from gateway import app as gateway_app
from gateway.settings import GatewaySettings
from serving_service.launcher import Launch, LocalReplica
from tessera.serving.v1 import serving_pb2 as pb
from tests.support.http import fetch
from tests.support.secrets import data_directory, running_secrets
from tests.support.serving import TINY, MannerLauncher, no_replicas, running_serving, serving_settings

QUERIES = 20


class Ambush(MannerLauncher):
    """A launcher whose first replica meets a stranger: in its place, or in its folder once that was made."""

    def __init__(self, directory: Path, *, in_its_place: bool) -> None:
        super().__init__(directory, None, service_environment={})
        self._in_its_place = in_its_place
        self._strangers = ExitStack()
        self.strangers: list[socket.socket] = []

    async def start(self, launch: Launch) -> LocalReplica:
        if self._in_its_place and not self.strangers:
            (self._directory / launch.replica_id).mkdir(parents=True)
            self._listen(launch.replica_id)
        return await super().start(launch)

    def _make_groups(self, replica_id: str) -> None:
        if not self.strangers:
            self._listen(replica_id)
        super()._make_groups(replica_id)

    def _listen(self, replica_id: str) -> None:
        stranger = self._strangers.enter_context(_listening(self._directory / replica_id / "http.sock"))
        self.strangers.append(stranger)

    def __enter__(self) -> Ambush:
        return self

    def __exit__(self, *_: object) -> None:
        self._strangers.close()


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(QUERIES)
        listener.setblocking(False)
        yield listener


@pytest.mark.parametrize("in_its_place", [True, False], ids=["in its place", "in its folder"])
async def test_no_query_goes_to_a_stranger_that_listens_where_a_replica_was_to_be(in_its_place: bool) -> None:
    with data_directory() as directory:
        settings = serving_settings(directory)
        with Ambush(settings.sockets / "replicas", in_its_place=in_its_place) as launcher:
            async with (
                no_replicas(directory),
                running_secrets(directory) as secrets,
                running_serving(directory, launcher=launcher) as serving,
                gateway_app.running(GatewaySettings(data_dir=directory, listen="127.0.0.1:0")) as url,
            ):
                admin = serving.public(secrets.admin_token)
                await admin.create("demo", TINY, environment={"SAYS": "the model"})
                assert (await admin.settled("demo")).state.ready == pb.EndpointState.READY
                for _ in range(QUERIES):
                    answer = await fetch(
                        url, "POST", "/serving-endpoints/demo/invocations", token=secrets.admin_token, body=b"{}"
                    )
                    assert (answer.status, answer.body) == (200, b"the model")
                failed = [each for each in await admin.events("demo") if each.outcome == pb.LaunchEvent.FAILED]
                assert [pb.LaunchEvent.Phase.Name(each.phase) for each in failed] == ["START"]
            (stranger,) = launcher.strangers
            with pytest.raises(BlockingIOError):
                stranger.accept()
