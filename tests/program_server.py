"""Runs Python programs on emulated devices in processes that have torch already.

``import torch`` is two seconds of processor time, which is most of a small program's. A server
process imports it once, before anybody uses a device, and forks for each program. The child gets
the options and the environment of its own, and ends as any Python process does.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import types
from typing import Any

#: What a server's children may not change: the part of the emulator that Python sees depends on it.
HAZARDS = "raise"
_SERVER_FD_VARIABLE = "SPILLOVER_TEST_SERVER_FD"
#: Variables that are read when Python, torch and what they need are loaded. Others may change.
_EARLY_VARIABLES = ("CUDA_VISIBLE", "LD_", "MKL_", "OMP_", "PYTHON", "PYTORCH_", "SPILLOVER")
#: Among them, but read by tests alone.
_TESTS_OWN = "SPILLOVER_TEST_"
_READ_BYTES = 1 << 16


class ProgramServer:
    """The test session's end. Not thread-safe."""

    def __init__(self) -> None:
        self._environment = _early(os.environ)
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={
                    **os.environ,
                    "PYTHONFAULTHANDLER": "1",
                    _SERVER_FD_VARIABLE: str(theirs.fileno()),
                },
            )
        self._answers = self._socket.makefile("r")

    def can_run(self) -> bool:
        """Whether a program would find torch as the server has imported it."""
        return _early(os.environ) == self._environment

    def run(
        self, code: str, arguments: tuple[str, ...], options: dict[str, Any], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run([sys.executable, "-c", code, *arguments])``, its output captured."""
        request = {
            "code": code,
            "arguments": arguments,
            "options": options,
            "folder": os.getcwd(),
            "environment": {**os.environ, "PYTHONFAULTHANDLER": "1"},
        }
        pipes = [os.pipe(), os.pipe()]
        data = json.dumps(request).encode()
        header = len(data).to_bytes(8, "little")
        try:
            socket.send_fds(self._socket, [header], [write for _, write in pipes])
            self._socket.sendall(data)
        finally:
            for _, write in pipes:
                os.close(write)
        child = int(self._answers.readline())
        try:
            output, errors = _read_all([read for read, _ in pipes], time.monotonic() + timeout)
        except TimeoutError:
            os.kill(child, signal.SIGKILL)
            self._answers.readline()
            raise subprocess.TimeoutExpired(sys.executable, timeout) from None
        code_of_exit = int(self._answers.readline())
        return subprocess.CompletedProcess([sys.executable, "-c"], code_of_exit, output, errors)

    def close(self) -> None:
        """End the server."""
        self._answers.close()
        self._socket.close()
        self._process.wait()


def _early(environment: os._Environ[str]) -> dict[str, str]:
    return {
        name: text
        for name, text in environment.items()
        if name.startswith(_EARLY_VARIABLES) and not name.startswith(_TESTS_OWN)
    }


def _read_all(pipes: list[int], deadline: float) -> list[str]:
    parts: dict[int, list[bytes]] = {pipe: [] for pipe in pipes}
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        try:
            while selector.get_map():
                left = deadline - time.monotonic()
                ready = selector.select(max(0.0, left))
                if not ready and left <= 0:
                    raise TimeoutError
                for key, _ in ready:
                    data = os.read(key.fd, _READ_BYTES)
                    parts[key.fd].append(data)
                    if not data:
                        selector.unregister(key.fd)
        finally:
            for pipe in pipes:
                os.close(pipe)
    return [b"".join(parts[pipe]).decode() for pipe in pipes]


# ---- the server's end --------------------------------------------------------------------------


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _serve(connection: socket.socket) -> dict[str, Any] | None:
    """Returns in each child with what it is to run, and with None in the server, at its end."""
    while True:
        header, descriptors, _, _ = socket.recv_fds(connection, 8, 2)
        if not header:
            return None
        header += _read_exactly(connection, 8 - len(header))
        request = json.loads(_read_exactly(connection, int.from_bytes(header, "little")))
        child = os.fork()
        if child == 0:
            connection.close()
            for descriptor, standard in zip(descriptors, (1, 2), strict=True):
                os.dup2(descriptor, standard)
                os.close(descriptor)
            return dict(request)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(f"{child}\n".encode())
        _, status = os.waitpid(child, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _become(request: dict[str, Any]) -> types.CodeType:
    """Make this process what the program would have found, had it been started by itself."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    emulator.reconfigure(**request["options"])
    sys.argv = ["-c", *request["arguments"]]
    sys.path[0] = ""
    sys.modules["__main__"] = types.ModuleType("__main__")
    return compile(request["code"], "<string>", "exec")


if __name__ == "__main__":
    from spillover import emulator

    emulator.enable(hazards=HAZARDS)  # type: ignore[arg-type]
    import torch._dynamo  # noqa: F401  What a first optimizer step imports, as long again.

    gc.collect()
    gc.freeze()
    asked = _serve(socket.socket(fileno=int(os.environ[_SERVER_FD_VARIABLE])))
    if asked is not None:
        program = _become(asked)
        del asked
        exec(program, sys.modules["__main__"].__dict__)
