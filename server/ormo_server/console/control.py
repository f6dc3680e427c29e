"""`ormo-server control`: what an operator may do to a run that goes on."""

import sys

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.console.client import NoAnswerError, asker
from ormo_server.console.settings import ControlSettings
from ormo_server.console.status import no_answer


def act(settings: ControlSettings) -> int:
    """Have the server do it; returns 1 if it does not, or does not answer."""
    try:
        with asker(settings.server, settings.timeout_seconds, settings.credentials()) as server:
            answer = server.control(_request(settings))
    except NoAnswerError as error:
        sys.stderr.write(no_answer("ormo-server control", settings.server, error))
        return 1
    sys.stdout.write(_said(settings, answer) + "\n")
    return 0


def _request(settings: ControlSettings) -> pb.ControlRequest:
    if settings.checkpoint:
        return pb.ControlRequest(checkpoint=pb.CheckpointNow())
    if settings.drain:
        return pb.ControlRequest(drain=pb.Drain())
    return pb.ControlRequest(set_learning_rate=pb.SetLearningRate(learning_rate=settings.learning_rate or 0.0))


def _said(settings: ControlSettings, answer: pb.ControlResponse) -> str:
    at = f"at iteration {answer.iteration.number}" if answer.HasField("iteration") else "before it had a model"
    if settings.checkpoint:
        return f"checkpoint {answer.checkpoint_path}"
    if settings.drain:
        return f"the server drains and stops, {at}"
    return f"the learning rate is {settings.learning_rate:g} from the next bucket on, {at}"
