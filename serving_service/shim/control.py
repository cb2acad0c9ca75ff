"""The shim's control socket: one JSON request a line, one JSON answer a line, for processes of the same user only.

Every request holds the `epoch` of who asks. Each Serving has a higher one than its predecessor, and only the highest
that was ever heard is obeyed: one that was paused or cut off, and has a successor by now, does nothing more.

Requests: `state`; `wait` (`state`: answers when it is another one, at the latest after 30 s); `logs` (`max_bytes`, and
`after`: how many lines are known already); `stop` (`grace_seconds`, `dismiss`); `dismiss`, which removes the directory
of a replica that has ended, and ends the shim.
"""

import json
import os
import shutil
import socket
import struct
import threading
import time
from typing import Any

from serving_service.shim.replica import STOPPED, Replica
from serving_service.shim.spec import Spec

_REQUEST_BYTES = 65_536
_WAIT_SECONDS = 30.0  # bounded, so that a caller that has gone is not waited for without end
_PEER = struct.Struct("3i")  # pid, uid, gid


class Control:
    """Answers requests, and ends the shim when it is dismissed."""

    def __init__(self, spec: Spec, replica: Replica) -> None:
        self._spec, self._replica = spec, replica
        self._epoch = spec.epoch
        self._epoch_lock = threading.Lock()
        self.dismissed = threading.Event()
        self.last_contact = time.monotonic()

    def serve(self, listener: socket.socket) -> None:
        """Accepts for ever; each connection has a thread, because `wait` and `stop` take their time."""
        while True:
            connection, _ = listener.accept()
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
            if _PEER.unpack(peer)[1] == os.getuid():
                threading.Thread(target=self._converse, args=(connection,), daemon=True).start()
            else:
                connection.close()

    def end(self, grace_seconds: float) -> None:
        """Stops the replica, leaves no trace of it and ends the shim."""
        self._replica.stop(grace_seconds)
        self._remove()
        self.dismissed.set()

    def _converse(self, connection: socket.socket) -> None:
        is_last = False
        try:
            with connection.makefile("rwb") as stream:
                while not is_last and (request := stream.readline(_REQUEST_BYTES)):
                    answer, is_last = self._answer(request)
                    stream.write(json.dumps(answer).encode() + b"\n")
                    stream.flush()
        except OSError:
            pass  # the caller went away; what it asked for is done all the same
        if is_last:
            # The connection stays open until the process is gone: its end is what the caller waits for.
            self.dismissed.set()
            threading.Event().wait()
        connection.close()

    def _answer(self, request: bytes) -> tuple[dict[str, Any], bool]:
        """The answer, and whether it is the last one this shim gives."""
        try:
            asked = json.loads(request)
            if not self._is_current(int(asked["epoch"])):
                return {"error": f"a later Serving than that of epoch {asked['epoch']} has taken over"}, False
            self.last_contact = time.monotonic()
            operation = asked["op"]
            if operation == "logs":
                said = self._replica.log.since(int(asked.get("after", 0)), int(asked["max_bytes"]))
                return {"logs": said.text, "position": said.position, "missing": said.missing}, False
            if operation == "wait":
                return self._replica.wait_for_change(str(asked["state"]), _WAIT_SECONDS), False
            if operation == "stop":
                self._replica.stop(float(asked["grace_seconds"]))
            elif operation not in ("state", "dismiss"):
                return {"error": f"unknown operation {operation!r}; known are state, wait, logs, stop, dismiss"}, False
            dismiss = operation == "dismiss" or bool(asked.get("dismiss"))
        except (KeyError, TypeError, ValueError) as error:
            return {"error": f"not a request: {type(error).__name__}"}, False
        snapshot = self._replica.snapshot()
        if dismiss and snapshot["state"] != STOPPED:
            return {"error": "the replica runs: stop it before it is dismissed"}, False
        if dismiss:
            self._remove()
        return snapshot, dismiss

    def _is_current(self, epoch: int) -> bool:
        with self._epoch_lock:
            self._epoch = max(self._epoch, epoch)
            return epoch == self._epoch

    def _remove(self) -> None:
        shutil.rmtree(self._spec.directory, ignore_errors=True)
