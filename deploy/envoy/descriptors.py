"""Makes descriptors.binpb, by which Envoy turns JSON into gRPC: the messages of proto/, and paths of RPCs that read.

    python -m deploy.envoy.descriptors            write it
    python -m deploy.envoy.descriptors --check    exit 1 when the committed one is out of date

The .proto files have no HTTP annotations, as Triton's have none, so they are added here. The paths begin with /json:
protobuf's JSON looks different from that of Triton's REST (/v2, which the server answers itself).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from deploy.envoy.bootstrap import DESCRIPTORS
from sluice_proto import grpc_service_pb2

if TYPE_CHECKING:
    from google.protobuf.descriptor import FileDescriptor

GETS: Final = {
    "ServerLive": ("/json/health/live",),
    "ServerReady": ("/json/health/ready",),
    "ServerMetadata": ("/json",),
    "ModelMetadata": ("/json/models/{name}", "/json/models/{name}/versions/{version}"),
    "ModelReady": ("/json/models/{name}/ready", "/json/models/{name}/versions/{version}/ready"),
    "ModelConfig": ("/json/models/{name}/config", "/json/models/{name}/versions/{version}/config"),
    "ModelStatistics": ("/json/models/{name}/stats", "/json/models/{name}/versions/{version}/stats"),
}
"""The RPCs that read, and their paths."""

POSTS: Final = {
    "ModelInfer": ("/json/models/{model_name}/infer", "/json/models/{model_name}/versions/{model_version}/infer"),
    "RepositoryIndex": ("/json/repository/index",),
}
"""The same of those whose request is a body: the message in protobuf's JSON."""


def descriptor_set() -> bytes:
    """The serialised FileDescriptorSet, imports first."""
    found = FileDescriptorSet()
    for file in _with_imports(annotations_pb2.DESCRIPTOR) + _with_imports(grpc_service_pb2.DESCRIPTOR):
        copied = found.file.add()
        file.CopyToProto(copied)
        if file.name == grpc_service_pb2.DESCRIPTOR.name:
            _annotate(copied)
    return found.SerializeToString(deterministic=True)


def _with_imports(file: FileDescriptor) -> list[FileDescriptor]:
    files: dict[str, FileDescriptor] = {}
    for imported in file.dependencies:
        files |= {one.name: one for one in _with_imports(imported)}
    return [*files.values(), file]


def _annotate(file: FileDescriptorProto) -> None:
    file.dependency.append(annotations_pb2.DESCRIPTOR.name)
    (service,) = file.service
    methods = {method.name: method for method in service.method}
    for verb, paths_of in (("get", GETS), ("post", POSTS)):
        for name, (path, *more) in paths_of.items():
            rule = methods[name].options.Extensions[annotations_pb2.http]
            for one, text in ((rule, path), *((rule.additional_bindings.add(), text) for text in more)):
                setattr(one, verb, text)
                one.body = "*" if verb == "post" else ""


def main(arguments: list[str]) -> int:
    """Write or check the file and give the exit status."""
    made = descriptor_set()
    is_current = DESCRIPTORS.exists() and DESCRIPTORS.read_bytes() == made
    if arguments == ["--check"]:
        if not is_current:
            sys.stderr.write(f"out of date: {DESCRIPTORS.name}; run: make envoy-descriptors\n")
        return 0 if is_current else 1
    DESCRIPTORS.write_bytes(made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
