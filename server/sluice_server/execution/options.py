"""From a model's configuration to ONNX Runtime's session and run options: which parameter sets what, and the defaults.

`plan_options` decides and holds plain data only; `session_options` and `run_options` make ONNX Runtime's objects of it.

    parameter                               sets
    an attribute of SessionOptions          that attribute
    Triton's name for one of them           the same: enable_mem_arena, intra_op_thread_count, inter_op_thread_count
    session.* optimization.* mlas.* ep.*    the session configuration entry of that key
    ort.session.<key>                       the session configuration entry <key>, whatever it is
    a run configuration entry that we know  that entry: memory.enable_memory_arena_shrinkage, gpu_graph_id, ...
    ort.run.<key>                           the attribute of RunOptions or the run configuration entry <key>
    anything else                           nothing; it stays in the configuration and is shown, as with Triton
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import onnxruntime

from sluice_proto.model_config_pb2 import ModelConfig
from sluice_server.execution import runtime
from sluice_server.execution.parameters import BadOption, parameter_values, pick, read_choice, read_int, read_switch
from sluice_server.execution.threads import EXECUTION_MODES, ThreadPlan

Option = bool | int | str

_GRAPH_LEVELS = {0: "ORT_ENABLE_ALL", -1: "ORT_ENABLE_BASIC", 1: "ORT_ENABLE_EXTENDED", 2: "ORT_DISABLE_ALL"}
"""Triton's numbers in `optimization.graph.level`, which are not ONNX Runtime's."""

_GRAPH_LEVEL_NAMES = (
    "ORT_DISABLE_ALL",
    "ORT_ENABLE_BASIC",
    "ORT_ENABLE_EXTENDED",
    "ORT_ENABLE_LAYOUT",
    "ORT_ENABLE_ALL",
)
_EXECUTION_ORDERS = ("DEFAULT", "PRIORITY_BASED", "MEMORY_EFFICIENT")

_MAX_VERBOSITY = 1_000_000
"""ONNX Runtime sets no bound to its verbosity level; this one only has to fit a C int."""


def _same(names: tuple[str, ...]) -> dict[str, str]:
    return {name: name for name in names}


def _text(_model: str, _key: str, value: str) -> str:
    return value


def _severity(model: str, key: str, value: str) -> int:
    return read_int(model, key, value, low=0, high=runtime.FATAL)


def _verbosity(model: str, key: str, value: str) -> int:
    return read_int(model, key, value, low=0, high=_MAX_VERBOSITY)


_LOG_ATTRIBUTES: dict[str, Callable[[str, str, str], Option]] = {
    "log_severity_level": _severity,
    "log_verbosity_level": _verbosity,
    "logid": _text,
}

# Every attribute of SessionOptions but the thread counts, which the thread plan sets.
_SESSION_ATTRIBUTES: dict[str, Callable[[str, str, str], Option]] = {
    **_LOG_ATTRIBUTES,
    "enable_cpu_mem_arena": read_switch,
    "enable_mem_pattern": read_switch,
    "enable_mem_reuse": read_switch,
    "enable_profiling": read_switch,
    "execution_mode": lambda model, key, value: read_choice(model, key, value, EXECUTION_MODES),
    "execution_order": lambda model, key, value: read_choice(model, key, value, _same(_EXECUTION_ORDERS)),
    "graph_optimization_level": lambda model, key, value: read_choice(model, key, value, _same(_GRAPH_LEVEL_NAMES)),
    "optimized_model_filepath": _text,
    "profile_file_prefix": _text,
    "use_deterministic_compute": read_switch,
    "use_per_session_threads": read_switch,
}

_ALIASES = {"enable_cpu_mem_arena": ("enable_mem_arena", "enable_cpu_mem_arena")}

# `terminate` is left out: it would end every run of the model before it began.
_RUN_ATTRIBUTES: dict[str, Callable[[str, str, str], Option]] = {
    **_LOG_ATTRIBUTES,
    "only_execute_path_to_fetches": read_switch,
}

_SESSION_ENTRY_PREFIXES = ("session.", "optimization.", "mlas.", "ep.")
_SESSION_PREFIX = "ort.session."
_RUN_PREFIX = "ort.run."

_ARENA_SHRINKAGE = "memory.enable_memory_arena_shrinkage"
_RUN_ENTRIES = frozenset({_ARENA_SHRINKAGE, "disable_synchronize_execution_providers", "gpu_graph_id"})

_SPINNING = ("session.intra_op.allow_spinning", "session.inter_op.allow_spinning")

_MAX_KEY_CHARS, _MAX_VALUE_CHARS = 1024, 8192
"""ONNX Runtime's own bounds of a configuration entry (session_options.cc: ConfigOptions)."""

_ENUMS = {
    "execution_mode": "ExecutionMode",
    "execution_order": "ExecutionOrder",
    "graph_optimization_level": "GraphOptimizationLevel",
}


@dataclass(frozen=True, slots=True)
class OptionPlan:
    """What a model's session and its runs are made with: attributes and configuration entries by ONNX Runtime's names.

    Enumerations are held as their members' names. An attribute that is not in here keeps ONNX Runtime's default.
    """

    model: str
    session: Mapping[str, Option] = field(default_factory=dict)
    session_entries: Mapping[str, str] = field(default_factory=dict)
    run: Mapping[str, Option] = field(default_factory=dict)
    run_entries: Mapping[str, str] = field(default_factory=dict)


def plan_options(config: ModelConfig, threads: ThreadPlan) -> OptionPlan:
    """Decide the options of a model's session and runs; BadOption names model, parameter, value and what was expected.

    What differs from ONNX Runtime's defaults without being asked for: the thread counts are the plan's; waiting
    threads do not spin, as they would take the CPU from the rest of the server; and a session logs nothing below FATAL,
    as ONNX Runtime writes a line to stderr for each run that fails or warns, while its error is raised and answered.
    """
    model, parameters = config.name, parameter_values(config)
    session: dict[str, Option] = {
        "intra_op_num_threads": threads.intra_op_threads,
        "inter_op_num_threads": threads.inter_op_threads,
        "graph_optimization_level": _graph_level(config, parameters),
        "log_severity_level": runtime.FATAL,
    }
    for name, read in _SESSION_ATTRIBUTES.items():
        if found := pick(model, parameters, _ALIASES.get(name, (name,))):
            session[name] = read(model, *found)
    session_entries = dict.fromkeys(_SPINNING, "0") | _session_entries(model, parameters)
    run, run_entries = _run_settings(model, parameters)
    return OptionPlan(model, session, session_entries, run, run_entries)


def describe(plan: OptionPlan) -> tuple[str, ...]:
    """Say in words what a model's session and runs are made with, one line each."""
    lines = [f"{name} = {_word(value)}" for name, value in sorted(plan.session.items())]
    spinning = [key for key in _SPINNING if plan.session_entries.get(key) != "0"]
    if not spinning:
        lines.append("waiting threads sleep instead of spinning")
    entries = (item for item in sorted(plan.session_entries.items()) if item[0] not in _SPINNING or item[0] in spinning)
    lines += [f"session entry {key} = {value}" for key, value in entries]
    settings = {**plan.run, **plan.run_entries}
    lines += [f"each run: {key} = {_word(value)}" for key, value in sorted(settings.items())]
    return tuple(lines)


def session_options(plan: OptionPlan) -> onnxruntime.SessionOptions:
    """Make ONNX Runtime's SessionOptions of a plan; BadOption for an attribute that this ONNX Runtime does not have."""
    options = onnxruntime.SessionOptions()
    _set_attributes(options, plan.model, plan.session)
    for key, value in plan.session_entries.items():
        options.add_session_config_entry(key, value)
    return options


def run_options(plan: OptionPlan) -> onnxruntime.RunOptions:
    """Make ONNX Runtime's RunOptions of a plan. A run only reads them, so that all threads may share them."""
    options = onnxruntime.RunOptions()
    _set_attributes(options, plan.model, plan.run)
    for key, value in plan.run_entries.items():
        options.add_run_config_entry(key, value)
    return options


def _set_attributes(options: object, model: str, values: Mapping[str, Option]) -> None:
    for name, value in values.items():
        # Older releases lack the newest attributes, and a plain `setattr` would say so in ONNX Runtime's words only.
        if not hasattr(options, name):
            raise BadOption(model, name, str(value), f"an option of ONNX Runtime {runtime.runtime_version()}")
        enum = getattr(onnxruntime, _ENUMS[name]) if name in _ENUMS else None
        setattr(options, name, value if enum is None else getattr(enum, str(value)))


def _graph_level(config: ModelConfig, parameters: Mapping[str, str]) -> str:
    level = config.optimization.graph.level
    if level not in _GRAPH_LEVELS:
        expected = "0 (all), -1 (basic), 1 (extended) or 2 (none)"
        raise BadOption(config.name, "optimization.graph.level", str(level), expected)
    asked = parameters.get("graph_optimization_level")
    if level and asked is not None and asked != _GRAPH_LEVELS[level]:
        expected = f"{_GRAPH_LEVELS[level]} as in optimization.graph.level, or only one of the two"
        raise BadOption(config.name, "graph_optimization_level", asked, expected)
    return _GRAPH_LEVELS[level]


def _session_entries(model: str, parameters: Mapping[str, str]) -> dict[str, str]:
    entries: dict[str, str] = {}
    for key, value in parameters.items():
        if key.startswith(_SESSION_PREFIX):
            name = key.removeprefix(_SESSION_PREFIX)
        elif key.startswith(_SESSION_ENTRY_PREFIXES):
            name = key
        else:
            continue
        if name in _SPINNING:
            value = str(int(read_switch(model, key, value)))
        _put_entry(entries, model, key, name, value)
    return entries


def _run_settings(model: str, parameters: Mapping[str, str]) -> tuple[dict[str, Option], dict[str, str]]:
    attributes: dict[str, Option] = {}
    entries: dict[str, str] = {}
    for key, name, value in _run_parameters(parameters):
        if name == "terminate":
            raise BadOption(model, key, value, "no such parameter: every run of the model would end at once")
        if name == _ARENA_SHRINKAGE and not re.fullmatch(r"(cpu|gpu):\d+(;(cpu|gpu):\d+)*", value):
            raise BadOption(model, key, value, "devices such as 'cpu:0' or 'cpu:0;gpu:0'")
        if name in _RUN_ATTRIBUTES:
            attributes[name] = _RUN_ATTRIBUTES[name](model, key, value)
        else:
            _put_entry(entries, model, key, name, value)
    return attributes, entries


def _run_parameters(parameters: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for key, value in parameters.items():
        if key in _RUN_ENTRIES:
            yield key, key, value
        elif key.startswith(_RUN_PREFIX):
            yield key, key.removeprefix(_RUN_PREFIX), value


def _put_entry(entries: dict[str, str], model: str, key: str, name: str, value: str) -> None:
    if not 0 < len(name) <= _MAX_KEY_CHARS:
        raise BadOption(model, key, value, f"a key of 1 to {_MAX_KEY_CHARS} characters")
    if len(value) > _MAX_VALUE_CHARS:
        raise BadOption(model, key, value[:32] + "...", f"a value of at most {_MAX_VALUE_CHARS} characters")
    if entries.setdefault(name, value) != value:
        raise BadOption(model, key, value, f"the same value wherever '{name}' is given, here '{entries[name]}'")


def _word(value: Option) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
