"""The protocol is Triton's to the last number: our descriptors against those that tritonclient carries."""

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2 as triton_config
from tritonclient.grpc import service_pb2 as triton_service

from sluice_proto import POOL, grpc_service_pb2, model_config_pb2

# What the Open Inference Protocol has and Triton has not.
ADDITIONS = {
    "ModelMetadataResponse.properties",
    "ModelMetadataResponse.PropertiesEntry",
    "ModelMetadataResponse.PropertiesEntry.key",
    "ModelMetadataResponse.PropertiesEntry.value",
}


def facts(file: FileDescriptor) -> dict[str, object]:
    """Everything about a file that a peer can notice, by full name."""
    proto = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(proto)
    found: dict[str, object] = {"package": proto.package, "syntax": proto.syntax}
    for message in proto.message_type:
        _add_message(found, message.name, message)
    for enum in proto.enum_type:
        _add_enum(found, enum.name, enum)
    for service in proto.service:
        for method in service.method:
            kind = (method.input_type, method.output_type, method.client_streaming, method.server_streaming)
            found[f"rpc {service.name}.{method.name}"] = kind
    return found


def _add_message(found, path, message):
    found[path] = "map entry" if message.options.map_entry else "message"
    oneofs = [oneof.name for oneof in message.oneof_decl]
    for field in message.field:
        oneof = oneofs[field.oneof_index] if field.HasField("oneof_index") else None
        found[f"{path}.{field.name}"] = (field.number, field.type, field.type_name, field.label, oneof)
    for enum in message.enum_type:
        _add_enum(found, f"{path}.{enum.name}", enum)
    for nested in message.nested_type:
        _add_message(found, f"{path}.{nested.name}", nested)


def _add_enum(found, path, enum):
    found[path] = "enum"
    for value in enum.value:
        found[f"{path}.{value.name}"] = value.number


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (grpc_service_pb2.DESCRIPTOR, triton_service.DESCRIPTOR),
        (model_config_pb2.DESCRIPTOR, triton_config.DESCRIPTOR),
    ],
    ids=["grpc_service", "model_config"],
)
def test_every_name_number_type_and_oneof_is_the_public_protocols(ours, theirs):
    mine, public = facts(ours), facts(theirs)
    assert len(public) > 200
    assert {name: fact for name, fact in mine.items() if name not in ADDITIONS} == public


def test_the_listed_additions_are_there():
    assert facts(grpc_service_pb2.DESCRIPTOR).keys() >= ADDITIONS
    assert grpc_service_pb2.ModelMetadataResponse.PROPERTIES_FIELD_NUMBER == 6


def test_the_service_has_twenty_calls():
    assert len(grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods) == 20


def test_messages_live_in_our_pool_and_name_our_modules():
    assert POOL.FindMessageTypeByName("inference.ModelInferRequest") is grpc_service_pb2.ModelInferRequest.DESCRIPTOR
    assert grpc_service_pb2.ModelInferRequest.__module__ == "sluice_proto.grpc_service_pb2"
    assert model_config_pb2.ModelConfig.__module__ == "sluice_proto.model_config_pb2"
    assert triton_service.ModelInferRequest.DESCRIPTOR is not grpc_service_pb2.ModelInferRequest.DESCRIPTOR


def request(module) -> Message:
    message = module.ModelInferRequest(
        model_name="digits", model_version="3", id="a", raw_input_contents=[b"\0\1", b""]
    )
    message.parameters["priority"].uint64_param = 2**63
    message.inputs.add(name="X", datatype="FP32", shape=[1, -1]).contents.fp32_contents.extend([0.5, -1.0])
    message.outputs.add(name="Y").parameters["classification"].int64_param = 3
    return message


@pytest.mark.parametrize(
    ("writer", "reader"), [(triton_service, grpc_service_pb2), (grpc_service_pb2, triton_service)], ids=["in", "out"]
)
def test_requests_cross_between_the_two_sets_of_classes(writer, reader):
    data = request(writer).SerializeToString(deterministic=True)
    assert reader.ModelInferRequest.FromString(data) == request(reader)


def test_configurations_cross_between_the_two_sets_of_classes():
    theirs = triton_config.ModelConfig(
        name="m",
        max_batch_size=8,
        dynamic_batching={"preferred_batch_size": [4, 8], "max_queue_delay_microseconds": 100},
        instance_group=[{"kind": "KIND_CPU", "count": 2}],
        parameters={"intra_op_thread_count": {"string_value": "1"}},
    )
    ours = model_config_pb2.ModelConfig.FromString(theirs.SerializeToString())
    assert ours.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert list(ours.dynamic_batching.preferred_batch_size) == [4, 8]
    assert triton_config.ModelConfig.FromString(ours.SerializeToString()) == theirs


def test_a_client_that_does_not_know_the_properties_reads_the_rest_of_the_metadata():
    ours = grpc_service_pb2.ModelMetadataResponse(name="m", versions=["1"], properties={"k": "v"})
    theirs = triton_service.ModelMetadataResponse.FromString(ours.SerializeToString())
    assert (theirs.name, list(theirs.versions)) == ("m", ["1"])
