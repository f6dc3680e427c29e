"""A server on a disk of its own that runs dry: `unshare --mount python -m system.dry_disk FOLDER`, which may mount.

Prints what happened, as JSON. Plain SGD at rate 1 from 0: each parameter is minus the number of gradients in it.
"""

import json
import sys
from pathlib import Path

import grpc

from chaos.disk import Disk
from ormo_protos.manifest import FLOAT32, PARAMETER, Manifest, TensorSpec
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from service.wire import Refused, WireWorker, payload
from system.programs import as_flags, staged

# So large that none fits into what is left of a block.
MANIFEST = Manifest.laid_out([TensorSpec("weight", (100_000,), FLOAT32, PARAMETER)])
SETTINGS = {"journal": True, "method": "asgd", "learning_rate": 1.0, "checkpoint_seconds": 0.2, "metrics-listen": ""}


class Story:
    """One worker, and what it was told."""

    def __init__(self) -> None:
        self.worker: WireWorker | None = None
        self.acknowledged = 0
        self.refused: list[str] = []

    def meet(self, address: str) -> None:
        stub = ParameterServerStub(grpc.insecure_channel(address))
        if self.worker is None:
            self.worker = WireWorker(stub, "anna", MANIFEST)
            self.worker.join()
        self.worker.stub = stub

    def train(self, count: int) -> None:
        """As often as it takes; a gradient that was refused comes again with its number."""
        assert self.worker is not None
        for _ in range(count):
            try:
                if not self.refused or self.refused[-1] == "":
                    self.worker.pull()
                self.worker.push(payload(MANIFEST, 1.0))
                self.acknowledged += 1
                self.refused.append("")
            except Refused as refused:
                self.refused.append(refused.reason)
                self.worker.request -= 1


def main() -> None:
    disk, story = Disk(Path(sys.argv[1]), mounting=True), Story()
    assert disk.is_real
    run = SETTINGS | {"directory": disk.path / "run"}
    with staged(Path(sys.argv[1])) as stage:
        server = stage.server(**run)
        story.meet(stage.address)
        story.train(10)
        with disk.full():
            story.train(10)
            alive = server.process.poll() is None
        story.train(10)
        with disk.full():
            story.train(10)
            server.kill()
            second = stage.program("second", "serve", *as_flags(run | {"listen": stage.address}), module="ormo_server")
            code, sentence = second.wait(), second.log.read_text().splitlines()[-1]
        server = stage.server(**run)
        story.meet(stage.address)
        story.train(10)
        assert story.worker is not None
        story.worker.pull(ticket=False)
        values = story.worker.params.unique().tolist()
        said = {
            "alive while it is full": alive,
            "refused": sorted(set(story.refused)),
            "acknowledged": story.acknowledged,
            "parameters": values,
            "a start while it is full": [code, sentence],
            "errors of the last start": server.log.read_text().count("all tickets are void"),
            "exit": server.terminate(),
        }
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main()
