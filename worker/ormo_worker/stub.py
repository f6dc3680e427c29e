"""The server's methods that carry tensors, without generated code, which would copy them through protobuf objects."""

import grpc

from ormo_protos.framing import Framing
from ormo_protos.limits import Parser
from ormo_protos.v1 import parameter_server_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["ParameterServer"].full_name


class TensorStub:
    """Starts calls on a channel.

    Attributes:
        push_pull, describe_model, pull_params, offer_model: the methods, as `parameter_server.proto` documents them.
            Messages with tensors are `Headed` or `Chunk`; what comes in may be `Malformed`.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self.push_pull = channel.stream_stream(
            f"/{_SERVICE}/PushPull",
            request_serializer=Framing(pb.PushPullRequest).encode,
            response_deserializer=Framing(pb.PushPullResponse).decode,
        )
        self.describe_model = channel.unary_stream(
            f"/{_SERVICE}/DescribeModel",
            request_serializer=pb.DescribeModelRequest.SerializeToString,
            response_deserializer=Parser(pb.DescribeModelResponse).parse,
        )
        self.pull_params = channel.unary_stream(
            f"/{_SERVICE}/PullParams",
            request_serializer=pb.PullParamsRequest.SerializeToString,
            response_deserializer=Framing(pb.PullParamsResponse).decode,
        )
        self.offer_model = channel.stream_unary(
            f"/{_SERVICE}/OfferModel",
            request_serializer=Framing(pb.OfferModelRequest).encode,
            response_deserializer=pb.OfferModelResponse.FromString,
        )
