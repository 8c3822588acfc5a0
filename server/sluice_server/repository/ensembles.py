"""Configurations of ensembles: the rules that one must keep on its own, and towards the models that it is made of.

As in Triton, an ensemble has no file of its own, no instances, no warm-up and no optimization, and says all of its
tensors itself. The first family of errors is ConfigError, the second ModelLoadError.

Towards the models (compatibility, section 10): a tensor has the same datatype wherever it is named, and shapes that can
be equal. A model without a batch dimension may stand in an ensemble with one, and the other way around: then either the
whole shapes agree, or the shapes without the batch dimension do, and a request has one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from sluice_proto.model_config_pb2 import ModelConfig
from sluice_proto.tensors import BY_CONFIG_TYPE
from sluice_server.dataflow import Graph, GraphError, Step
from sluice_server.graph import VARIABLE, format_shape
from sluice_server.repository.errors import ConfigError, ModelLoadError

PLATFORM: Final = "ensemble"

LATEST: Final = -1
"""The `model_version` of a step that means the latest one served; so does leaving it out."""

MAX_STEPS: Final = 1024
"""Each takes some microseconds of a request; the largest pipelines in use have tens."""

_NOT_FOR_ENSEMBLES: Final = ("instance_group", "optimization", "model_warmup", "default_model_filename")


def is_ensemble(config: ModelConfig | None) -> bool:
    """Whether a configuration, as written or completed, is meant to be an ensemble's."""
    return config is not None and (config.platform == PLATFORM or config.HasField("ensemble_scheduling"))


def part_names(config: ModelConfig | None) -> tuple[str, ...]:
    """The models that an ensemble names, each once, in the order of the steps; none for any other model."""
    if config is None or not is_ensemble(config):
        return ()
    return tuple(dict.fromkeys(step.model_name for step in config.ensemble_scheduling.step))


def version_of(step: object) -> int | None:
    """The version that a step names; None for the latest."""
    number: int = step.model_version  # type: ignore[attr-defined] # a ModelEnsembling.Step
    return None if number in (0, LATEST) else number


def graph_of(config: ModelConfig) -> Graph:
    """The graph of a checked ensemble."""
    steps = [Step(dict(step.input_map), dict(step.output_map)) for step in config.ensemble_scheduling.step]
    return Graph(steps, [item.name for item in config.input], [item.name for item in config.output])


_PARAMETERS_OF_MODELS = (
    "slo_p99_ms",
    "shape_buckets",
    "batch_buckets",
    "split_requests",
    "batch_proof",
    "batch_proof_tolerance",
    "batch_curve",
)
"""Ours, which say how requests are queued and merged."""


def check_ensemble(config: ModelConfig, model: str) -> None:
    """Check what is written, apart from what every model has; raises ConfigError with the field that breaks a rule."""
    if config.platform not in ("", PLATFORM):
        what = f"cannot be set for a model whose platform is '{config.platform}', expected '{PLATFORM}'"
        raise _config_error(model, "ensemble_scheduling", what)
    if config.backend:
        raise _config_error(model, "backend", f"is '{config.backend}', and an ensemble has none")
    for field in _NOT_FOR_ENSEMBLES:
        has_it = getattr(config, field) if field != "optimization" else config.HasField("optimization")
        if has_it:
            raise _config_error(model, field, "should not be specified for an ensemble: its steps' models have it")
    for key in _PARAMETERS_OF_MODELS:
        if key in config.parameters:
            what = "should not be specified for an ensemble: its steps' models have it"
            raise _config_error(model, f'parameters["{key}"]', what)
    for kind in ("input", "output"):
        if not getattr(config, kind):
            raise _config_error(model, kind, "is missing: an ensemble has no model file that says its tensors")
    _check_steps(config, model)
    try:
        graph_of(config)
    except GraphError as error:
        raise _config_error(model, "ensemble_scheduling", str(error)) from error


def check_uploaded(config: ModelConfig, model: str) -> None:
    """Check an ensemble whose directory comes with a load call: it is read again when a part is replaced."""
    for index, output in enumerate(config.output):
        if output.label_filename:
            what = f"is '{output.label_filename}': label files of an ensemble have to be in a model repository"
            raise _config_error(model, f"output[{index}].label_filename", what)


def _check_steps(config: ModelConfig, model: str) -> None:
    steps = config.ensemble_scheduling.step
    if not 1 <= len(steps) <= MAX_STEPS:
        what = f"must have 1 to {MAX_STEPS} steps, and has {len(steps)}"
        raise _config_error(model, "ensemble_scheduling.step", what)
    for number, step in enumerate(steps):
        where = f"ensemble_scheduling.step[{number}]"
        for field in ("model_name", "input_map", "output_map"):
            if not getattr(step, field):
                raise _config_error(model, f"{where}.{field}", "is missing")
        if step.model_name == model:
            raise _config_error(model, f"{where}.model_name", "is the ensemble itself")
        if step.model_version < LATEST:
            what = f"is {step.model_version}, expected a version, or {LATEST} for the latest"
            raise _config_error(model, f"{where}.model_version", what)
        for field, names in (("input_map", step.input_map), ("output_map", step.output_map)):
            for key, tensor in sorted(names.items()):
                if not (key and tensor):
                    raise _config_error(model, f'{where}.{field}["{key}"]', "leads to no tensor, or from none")


def _config_error(model: str, field: str, what: str) -> ConfigError:
    return ConfigError(f"ensemble '{model}': {field} {what}", model=model, field=field)


@dataclass(frozen=True, slots=True)
class _Use:
    """A tensor as one of the configurations has it; `dims` without a batch dimension."""

    model: str
    datatype: int
    dims: tuple[int, ...]
    batches: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole shape."""
        return (VARIABLE, *self.dims) if self.batches else self.dims


def check_parts(config: ModelConfig, parts: Sequence[ModelConfig]) -> None:
    """Check an ensemble towards the completed configurations of its steps' models, one for each step.

    Raises ModelLoadError for the first thing that does not fit.
    """
    ensemble = config.name
    tensors = {item.name: _ensemble_use(config, item) for item in config.input}
    tensors |= {item.name: _ensemble_use(config, item) for item in config.output if item.name not in tensors}
    for number, part in zip(graph_of(config).order, _in_order(config, parts), strict=True):
        if part.HasField("sequence_batching"):
            raise _load_error(
                ensemble, f"model '{part.name}' has sequence_batching, which is not implemented in an ensemble"
            )
        if 0 < part.max_batch_size < config.max_batch_size:
            raise ModelLoadError(
                f"ensemble '{ensemble}' allows maximum batch size {config.max_batch_size}, but it contains model"
                f" '{part.name}' which only allows maximum batch size to be {part.max_batch_size}",
                model=ensemble,
            )
        for tensor, use in _uses(config, number, part):
            known = tensors.setdefault(tensor, use)
            _check_agreement(ensemble, tensor, known, use)


def _in_order(config: ModelConfig, parts: Sequence[ModelConfig]) -> list[ModelConfig]:
    return [parts[number] for number in graph_of(config).order]


def _ensemble_use(config: ModelConfig, item: object) -> _Use:
    has_reshape = item.HasField("reshape")  # type: ignore[attr-defined] # a ModelInput or ModelOutput
    dims = item.reshape.shape if has_reshape else item.dims  # type: ignore[attr-defined]
    return _Use(config.name, item.data_type, tuple(dims), config.max_batch_size > 0)  # type: ignore[attr-defined]


def _uses(config: ModelConfig, number: int, part: ModelConfig) -> Iterator[tuple[str, _Use]]:
    """The ensemble's tensors that a step takes and makes, as its model has them."""
    step, ensemble = config.ensemble_scheduling.step[number], config.name
    optional_inputs = {item.name for item in config.input if item.optional}
    for kind, names, items in (("input", step.input_map, part.input), ("output", step.output_map, part.output)):
        by_name = {item.name: item for item in items}
        way = "to" if kind == "input" else "from"
        for name, tensor in sorted(names.items()):
            if name not in by_name:
                what = f"ensemble tensor '{tensor}' is mapped {way} non-existing {kind} '{name}' in model '{part.name}'"
                raise _load_error(ensemble, f"{what}, which has {', '.join(by_name) or 'none'}")
            item = by_name[name]
            if tensor in optional_inputs and not getattr(item, "optional", False):
                what = f"input '{tensor}' is optional, but input '{name}' in model '{part.name}' is not"
                raise _load_error(ensemble, what)
            yield tensor, _Use(part.name, item.data_type, tuple(item.dims), part.max_batch_size > 0)
    for item in part.input:
        if not item.optional and item.name not in step.input_map:
            what = f"input '{item.name}' in model '{part.name}' is not mapped to any ensemble tensors, in step {number}"
            raise _load_error(ensemble, what)


def _check_agreement(ensemble: str, tensor: str, known: _Use, use: _Use) -> None:
    if known.datatype != use.datatype:
        raise _load_error(
            ensemble,
            f"ensemble tensor '{tensor}': inconsistent data type: {BY_CONFIG_TYPE[known.datatype].name} is inferred"
            f" from model '{known.model}' while {BY_CONFIG_TYPE[use.datatype].name} is inferred from model"
            f" '{use.model}'",
        )
    if not (agree(known.dims, use.dims) or agree(known.shape, use.shape)):
        raise _load_error(
            ensemble,
            f"ensemble tensor '{tensor}': inconsistent shape: {format_shape(known.shape)} is inferred from model"
            f" '{known.model}' while {format_shape(use.shape)} is inferred from model '{use.model}'",
        )


def agree(dims: Sequence[int], others: Sequence[int]) -> bool:
    """Whether two shapes can be equal: a dimension that one leaves open may be anything in the other."""
    return len(dims) == len(others) and all(
        VARIABLE in (dim, other) or dim == other for dim, other in zip(dims, others, strict=True)
    )


def _load_error(ensemble: str, what: str) -> ModelLoadError:
    return ModelLoadError(f"in ensemble '{ensemble}', {what}", model=ensemble)
