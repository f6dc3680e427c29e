"""The contract: the generated code is its own, it only grows, and its documentation names every reason."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from ormo_protos.refusals import Reason
from ormo_protos.v1 import parameter_server_pb2 as pb

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "protos/ormo_protos/v1/parameter_server.proto"
BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
needs_buf = pytest.mark.skipif(BUF is None, reason="buf is not installed: pip install buf-bin")


def buf(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[bytes]:
    assert BUF is not None
    return subprocess.run([BUF, *arguments], cwd=cwd, capture_output=True, check=False)


def forget_json_names(message: descriptor_pb2.DescriptorProto) -> None:
    """buf writes the default JSON names out, protoc leaves them out."""
    for field in message.field:
        field.ClearField("json_name")
    for nested in message.nested_type:
        forget_json_names(nested)


@needs_buf
def test_generated_code_describes_the_proto_file(tmp_path: Path) -> None:
    image = tmp_path / "contract.binpb"
    assert buf("build", "-o", str(image), "--exclude-source-info").returncode == 0
    built = descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes()).file[0]
    generated = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(generated)
    for message in built.message_type:
        forget_json_names(message)
    assert list(generated.message_type) == list(built.message_type)
    assert generated.enum_type == built.enum_type
    assert generated.service == built.service


@needs_buf
def test_breaking_change_of_the_released_contract_is_found(tmp_path: Path) -> None:
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    released = str(ROOT / "protos/released.binpb")
    assert buf("breaking", "--against", released, cwd=tmp_path).returncode == 0
    copy = tmp_path / PROTO.relative_to(ROOT)
    copy.write_text(copy.read_text().replace("int64 lag_buckets = 4;", "int32 lag_buckets = 4;"))
    changed = buf("breaking", "--against", released, cwd=tmp_path)
    assert changed.returncode != 0
    assert b"lag_buckets" in changed.stdout


def test_every_reason_is_documented_in_the_contract() -> None:
    text = PROTO.read_text()
    assert [reason for reason in Reason if not re.search(rf"\b{reason}\b", text)] == []
