"""A server that comes back under another address, as its name says by then."""

import socket
import struct
import threading
import time
from concurrent import futures

import grpc

from ormo_runtime.channels import Dialer

NAME = "server.test"
PATIENT_SECONDS = 20.0  # less than gRPC waits by itself before it asks again


class NameServer(threading.Thread):
    """Says of every name that it has one address, in IPv4."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.address = address
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.start()

    def run(self) -> None:
        while True:
            question, asker = self._socket.recvfrom(512)
            if not question:
                return
            end = question.index(b"\0", 12) + 5
            (kind,) = struct.unpack("!H", question[end - 4 : end - 2])
            answers = [b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 0, 4) + socket.inet_aton(self.address)] * (kind == 1)
            head = question[:2] + struct.pack("!HHHHH", 0x8180, 1, len(answers), 0, 0)
            self._socket.sendto(b"".join([head, question[12:end], *answers]), asker)

    def close(self) -> None:
        self._socket.sendto(b"", ("127.0.0.1", self.port))
        self.join()
        self._socket.close()


def serving(host: str, port: int = 0) -> tuple[grpc.Server, int]:
    """A server that answers with its address."""

    class Answering(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
            return grpc.unary_unary_rpc_method_handler(lambda _, __: host.encode())

    server = grpc.server(futures.ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((Answering(),))
    port = server.add_insecure_port(f"{host}:{port}")
    server.start()
    return server, port


def test_a_server_is_found_where_its_name_leads_by_now() -> None:
    names = NameServer("127.0.0.2")
    first, port = serving("127.0.0.2")
    backoff = [("grpc.max_reconnect_backoff_ms", 500), ("grpc.enable_http_proxy", 0)]
    with Dialer(f"dns://127.0.0.1:{names.port}/{NAME}:{port}", None, backoff).dial() as channel:
        ask = channel.unary_unary("/any/method")
        assert ask(b"", timeout=PATIENT_SECONDS) == b"127.0.0.2"
        second, _ = serving("127.0.0.3", port)
        names.address = "127.0.0.3"
        first.stop(None).wait()
        deadline = time.monotonic() + PATIENT_SECONDS
        while True:
            try:
                assert ask(b"", timeout=1) == b"127.0.0.3"
                break
            except grpc.RpcError:
                assert time.monotonic() < deadline, "it is still looked for where it was"
                time.sleep(0.1)
        second.stop(None).wait()
    names.close()
