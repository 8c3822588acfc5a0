"""Says in plain sentences what a model's configuration became and why, for `sluice check`."""

from collections.abc import Iterator, Sequence

from sluice_proto.model_config_pb2 import BatchInput, BatchOutput, ModelConfig, ModelInput, ModelInstanceGroup
from sluice_proto.tensors import BY_CONFIG_TYPE
from sluice_server.graph import GraphSignature, TensorSpec, format_shape
from sluice_server.repository.autocomplete import fixed_tensor
from sluice_server.repository.ensembles import graph_of, version_of
from sluice_server.repository.ragged import made_inputs
from sluice_server.repository.validate import Tensor

ANSWERS_IN_ORDER = "; answers leave in the order of the requests"


def explain(written: ModelConfig | None, completed: ModelConfig, signature: GraphSignature) -> list[str]:
    """Give one sentence for each decision: batching, scheduler, tensors, versions, instances.

    `written` is the configuration as it was read (None without a config.pbtxt), `completed` what `complete` made.
    """
    before = ModelConfig() if written is None else written
    lines = [] if written is not None else ["no config.pbtxt: everything comes from the model file and the defaults"]
    lines.append(_batching(before, completed, signature))
    lines.append(_scheduler(before, completed))
    if completed.response_cache.enable:
        lines.append("response_cache: equal requests are answered once, on a server with --cache-config")
    lines += [
        f"model_warmup '{sample.name}': run {max(1, sample.count)} time(s) on each instance before the version is ready"
        for sample in completed.model_warmup
    ]
    lines += _ragged(completed)
    lines += _tensors("input", before.input, completed.input, signature.inputs, made_inputs(completed))
    lines += _tensors("output", before.output, completed.output, signature.outputs)
    lines.append(_versions(before, completed))
    lines += _instances(before, completed)
    return lines


def explain_ensemble(written: ModelConfig, completed: ModelConfig, parts: Sequence[ModelConfig]) -> list[str]:
    """Give the same for an ensemble; `parts` are the completed configurations of its steps' models, one for each."""
    graph = graph_of(completed)
    plan = graph.plan([item.name for item in completed.output])
    most = completed.max_batch_size
    rows = f"of up to {most} rows, which go whole from step to step" if most else "without a batch dimension"
    lines = [f"ensemble of {len(graph.steps)} step(s) for requests {rows}; no instances of its own"]
    for number in graph.order:
        step, part = completed.ensemble_scheduling.step[number], parts[number]
        takes = ", ".join(f"{name} <- {tensor}" for name, tensor in sorted(step.input_map.items()))
        makes = ", ".join(f"{name} -> {tensor}" for name, tensor in sorted(step.output_map.items()))
        version = version_of(step)
        which = "the latest version" if version is None else f"version {version}"
        when = f"after {plan.waits[number]} other(s)" if plan.waits[number] else "at once"
        lines.append(f"step {number}: '{part.name}', {which}, {when}: {takes}; {makes}")
    places = completed.ensemble_scheduling.max_inflight_requests
    limit = f"{places} in each step at a time, others wait before it" if places else "no limit"
    lines.append(f"max_inflight_requests: {limit}")
    for kind, items in (("input", completed.input), ("output", completed.output)):
        lines += [
            f"{kind} '{item.name}': {BY_CONFIG_TYPE[item.data_type].name} {format_shape(item.dims)}" for item in items
        ]
    lines.append(_versions(written, completed))
    return lines


def _batching(written: ModelConfig, completed: ModelConfig, signature: GraphSignature) -> str:
    fixed = fixed_tensor(signature)
    if fixed:
        return f"not batchable: {fixed}"
    if not completed.max_batch_size:
        return "batchable, but max_batch_size is 0: requests carry whole shapes and are never merged"
    origin = "from the configuration" if written.max_batch_size else "set by auto-complete"
    return f"batchable: dimension 0 of every tensor is open; max_batch_size {completed.max_batch_size} {origin}"


def _sequences(completed: ModelConfig) -> str:
    batching = completed.sequence_batching
    states = ", ".join(f"{each.output_name} to {each.input_name}" for each in batching.state) or "none"
    idle_us = batching.max_sequence_idle_microseconds
    if batching.HasField("oldest"):
        slots = f"oldest, {batching.oldest.max_candidate_sequences} sequences at a time"
    else:
        rows = max(1, completed.max_batch_size)
        groups = sum(group.count * max(1, len(group.gpus)) for group in completed.instance_group)
        slots = f"direct, {groups} x {rows} sequences at a time"
    ordered = ANSWERS_IN_ORDER if batching.oldest.preserve_ordering else ""
    return f"sequence_batching: {slots}; states {states}; one that is idle for {idle_us} us ends{ordered}"


def _scheduler(written: ModelConfig, completed: ModelConfig) -> str:
    if completed.HasField("sequence_batching"):
        return _sequences(completed)
    if not completed.HasField("dynamic_batching"):
        return "dynamic_batching: none, each request is its own execution"
    ordered = ANSWERS_IN_ORDER if completed.dynamic_batching.preserve_ordering else ""
    if not completed.max_batch_size:
        return f"dynamic_batching: merges nothing, as max_batch_size is 0{ordered}"
    origin = "from the configuration" if written.HasField("dynamic_batching") else "added by auto-complete"
    policy = completed.dynamic_batching
    sizes = ", ".join(map(str, policy.preferred_batch_size))
    delay = policy.max_queue_delay_microseconds
    return f"dynamic_batching: {origin}; preferred batch sizes {sizes}; queue delay at most {delay} us{ordered}"


def _ragged(completed: ModelConfig) -> Iterator[str]:
    for tensor in completed.input:
        if tensor.allow_ragged_batch:
            yield f"input '{tensor.name}': ragged, requests of any shapes share a batch; the model gets it flat"
    for made in completed.batch_input:
        names = ", ".join(f"'{name}'" for name in made.target_name)
        yield f"batch_input {names}: {BatchInput.Kind.Name(made.kind)} of '{made.source_input[0]}', made for each batch"
    for cut in completed.batch_output:
        names = ", ".join(f"'{name}'" for name in cut.target_name)
        yield f"batch_output {names}: {BatchOutput.Kind.Name(cut.kind)}, cut by the shapes of '{cut.source_input[0]}'"


def _tensors(
    kind: str,
    written: Sequence[Tensor],
    completed: Sequence[Tensor],
    specs: tuple[TensorSpec, ...],
    made: frozenset[str] = frozenset(),
) -> Iterator[str]:
    origin = "from the configuration" if written else "filled in from the model file"
    shapes = {spec.name: spec.shape for spec in specs}
    for tensor in completed:
        datatype = BY_CONFIG_TYPE[tensor.data_type].name
        model = format_shape(shapes[tensor.name])
        optional = ", optional" if isinstance(tensor, ModelInput) and tensor.optional else ""
        dims = format_shape(tensor.dims)
        if tensor.HasField("reshape"):
            dims += f" reshaped to {format_shape(tensor.reshape.shape)}"
        yield f"{kind} '{tensor.name}': {datatype} {dims}{optional}, {origin}; the model file says {model}"
    listed = {tensor.name for tensor in completed} | made
    for spec in specs:
        if spec.name not in listed:
            why = "keeps its value from the model file" if kind == "input" else "is not served"
            yield f"{kind} '{spec.name}': {spec.datatype} {format_shape(spec.shape)} is not listed and {why}"


def _versions(written: ModelConfig, completed: ModelConfig) -> str:
    origin = "from the configuration" if written.HasField("version_policy") else "the default"
    policy = completed.version_policy
    if policy.HasField("all"):
        return f"version_policy: all versions, {origin}"
    if policy.HasField("specific"):
        return f"version_policy: versions {', '.join(map(str, policy.specific.versions))}, {origin}"
    return f"version_policy: the latest {policy.latest.num_versions}, {origin}"


def _instances(written: ModelConfig, completed: ModelConfig) -> Iterator[str]:
    origin = "from the configuration" if written.instance_group else "the default"
    for group in completed.instance_group:
        gpus = f" on each of the GPUs {', '.join(map(str, group.gpus))}" if group.gpus else ""
        kind = ModelInstanceGroup.Kind.Name(group.kind)
        yield f"instance_group '{group.name}': {group.count} of {kind}{gpus}, {origin}"
