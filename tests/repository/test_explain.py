"""What `sluice check` says of a model, sentence by sentence."""

from sluice_server.graph import GraphSignature, TensorSpec
from sluice_server.repository.autocomplete import complete, normalize
from sluice_server.repository.config import parse_text
from sluice_server.repository.describe import explain

MLP = GraphSignature((TensorSpec("X", "FP32", (-1, 64)),), (TensorSpec("p", "FP32", (-1, 10)),))


def lines(text: str | None, signature: GraphSignature) -> list[str]:
    written = None if text is None else parse_text(text, "")
    return explain(written, complete(normalize(written, name="m"), signature), signature)


def test_a_model_without_config_is_explained_from_its_file() -> None:
    assert lines(None, MLP) == [
        "no config.pbtxt: everything comes from the model file and the defaults",
        "batchable: dimension 0 of every tensor is open; max_batch_size 4 set by auto-complete",
        "dynamic_batching: added by auto-complete; preferred batch sizes 4; queue delay at most 0 us",
        "input 'X': FP32 [64], filled in from the model file; the model file says [-1,64]",
        "output 'p': FP32 [10], filled in from the model file; the model file says [-1,10]",
        "version_policy: the latest 1, the default",
        "instance_group 'm': 2 of KIND_CPU, the default",
    ]


def test_a_model_that_cannot_batch_is_told_with_the_tensor_that_keeps_it_from_it() -> None:
    fixed = GraphSignature((TensorSpec("X", "FP32", (-1, 4)),), (TensorSpec("label", "INT64", (1,)),))
    assert lines(None, fixed)[1:3] == [
        "not batchable: dimension 0 of output 'label' is fixed at 1 (shape [1])",
        "dynamic_batching: none, each request is its own execution",
    ]
    scalar = GraphSignature((TensorSpec("rate", "INT64", ()),), fixed.outputs)
    assert lines(None, scalar)[1] == "not batchable: input 'rate' is a scalar"


def test_a_reshape_is_told_with_the_dims() -> None:
    signature = GraphSignature((TensorSpec("X", "FP32", (-1, 2, 3)),), (TensorSpec("p", "FP32", (-1,)),))
    text = 'max_batch_size: 4 input { name: "X" data_type: TYPE_FP32 dims: 6 reshape { shape: [ 2, 3 ] } }'
    assert lines(text, signature)[2:4] == [
        "input 'X': FP32 [6] reshaped to [2,3], from the configuration; the model file says [-1,2,3]",
        "output 'p': FP32 [1] reshaped to [], filled in from the model file; the model file says [-1]",
    ]


def test_what_was_written_is_told_from_what_was_added() -> None:
    signature = GraphSignature(
        (TensorSpec("X", "FP32", (-1, -1)), TensorSpec("w", "FP32", (3,), optional=True)),
        (TensorSpec("p", "FP32", (-1, 10)), TensorSpec("q", "BYTES", (-1,))),
    )
    text = """
        max_batch_size: 8
        input { name: "X" data_type: TYPE_FP32 dims: 64 }
        output { name: "p" data_type: TYPE_FP32 dims: 10 }
        dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 }
        version_policy { specific { versions: [ 1, 3 ] } }
        instance_group { count: 1 }
    """
    assert lines(text, signature) == [
        "batchable: dimension 0 of every tensor is open; max_batch_size 8 from the configuration",
        "dynamic_batching: from the configuration; preferred batch sizes 4, 8; queue delay at most 100 us",
        "input 'X': FP32 [64], from the configuration; the model file says [-1,-1]",
        "input 'w': FP32 [3] is not listed and keeps its value from the model file",
        "output 'p': FP32 [10], from the configuration; the model file says [-1,10]",
        "output 'q': BYTES [-1] is not listed and is not served",
        "version_policy: versions 1, 3, from the configuration",
        "instance_group 'm_0': 1 of KIND_CPU, from the configuration",
    ]


def test_a_batchable_model_that_is_configured_not_to_batch_is_told() -> None:
    text = """
        input { name: "X" data_type: TYPE_FP32 dims: [ -1, 64 ] }
        output { name: "p" data_type: TYPE_FP32 dims: [ -1, 10 ] }
        version_policy { all {} }
    """
    said = lines(text, MLP)
    assert said[0] == "batchable, but max_batch_size is 0: requests carry whole shapes and are never merged"
    assert said[1] == "dynamic_batching: none, each request is its own execution"
    assert said[-2] == "version_policy: all versions, from the configuration"
    assert lines(text + "dynamic_batching {}", MLP)[1] == "dynamic_batching: merges nothing, as max_batch_size is 0"
    ordered = lines(text + "dynamic_batching { preserve_ordering: true }", MLP)[1]
    assert ordered.endswith("; answers leave in the order of the requests")


def test_a_response_cache_is_told_with_what_the_server_needs_for_it() -> None:
    assert "response_cache: equal requests are answered once, on a server with --cache-config" in lines(
        "response_cache { enable: true }", MLP
    )
    assert not [line for line in lines("response_cache { enable: false }", MLP) if "cache" in line]


def test_samples_of_a_warm_up_are_told_one_by_one() -> None:
    text = 'model_warmup { name: "zeros" batch_size: 1 } model_warmup { name: "real" batch_size: 2 count: 5 }'
    assert [line for line in lines(text, MLP) if "warmup" in line] == [
        "model_warmup 'zeros': run 1 time(s) on each instance before the version is ready",
        "model_warmup 'real': run 5 time(s) on each instance before the version is ready",
    ]
