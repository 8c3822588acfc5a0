"""Which execution providers a model's session asks for, as a pure choice from its configuration and what is there.

Also what the choice needs to know of the host: how many GPUs there are, and whether exactly one distribution of
ONNX Runtime is installed. Nothing in this file imports ONNX Runtime, so that it can say what is wrong with it.

The order is: accelerators of a GPU as listed, CUDA, accelerators of the CPU as listed, CPU. ONNX Runtime gives each
node of the graph to the first provider that can run it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from sluice_proto.model_config_pb2 import ModelConfig, ModelInstanceGroup, ModelOptimizationPolicy
from sluice_server.errors import InvalidArgument
from sluice_server.execution.parameters import BadOption, parameter_values, read_choice, read_switch

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"

_NVIDIA = frozenset({CUDA, TENSORRT, "NvTensorRTRTXExecutionProvider"})

_GPU_NAMES = {"tensorrt": TENSORRT, "cuda": CUDA}
_CPU_NAMES = {"openvino": OPENVINO}

_TENSORRT_KEYS = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}
"""Triton's names for options that ONNX Runtime calls otherwise; those that begin with trt_ are the same in both."""

_PRECISIONS = {"FP32": "", "FP16": "trt_fp16_enable", "INT8": "trt_int8_enable"}

_CUDA_WORDS = {
    "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
    "arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
}
"""CUDA options that Triton gives as numbers: the word for 0, 1, ..., which is what ONNX Runtime takes."""

_TENSORRT_SWITCHES = frozenset(
    {
        "trt_detailed_build_log",
        "trt_dump_ep_context_model",
        "trt_dump_subgraphs",
        "trt_force_sequential_engine_build",
        "trt_force_timing_cache",
        "trt_int8_use_native_calibration_table",
        "trt_layer_norm_fp32_fallback",
    }
)
"""TensorRT options, besides those that end with _enable, that ONNX Runtime takes only as True and False."""

_CUDA_MODEL_PARAMETERS = (*_CUDA_WORDS, "gpu_mem_limit", "do_copy_in_default_stream")
"""CUDA options that Triton takes from the model's own `parameters`."""

Accelerator = ModelOptimizationPolicy.ExecutionAccelerators.Accelerator


class MissingProvider(InvalidArgument):
    """A model asks for an execution provider that this ONNX Runtime lacks, or that did not start."""

    def __init__(self, model: str, provider: str, available: Sequence[str], problem: str) -> None:
        super().__init__(
            f"model '{model}' asks for {provider}, which {problem} (there are: {', '.join(available)}); "
            "install what it needs, take it out of the configuration, or start with --allow-provider-fallback"
        )
        self.model = model
        self.provider = provider
        self.available = tuple(available)


class NoGpu(InvalidArgument):
    """An instance group asks for a GPU that this host does not have."""

    def __init__(self, model: str, group: str, problem: str) -> None:
        super().__init__(f"instance group {group} of model {model} has kind KIND_GPU but {problem}")
        self.model = model
        self.group = group


@dataclass(frozen=True, slots=True)
class ProviderChoice:
    """One execution provider to ask for, with its options as ONNX Runtime names them, and why it is asked for."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True, slots=True)
class ProviderPlan:
    """The providers to ask for, in order of preference.

    `on_gpu`: the model runs on a device of its own and CPU threads only wait for it. `warnings` says what the
    configuration asks for and does not get.
    """

    choices: tuple[ProviderChoice, ...]
    on_gpu: bool = False
    warnings: tuple[str, ...] = ()


def choose_providers(
    config: ModelConfig,
    kind: int,
    device_id: int,
    available: Sequence[str],
    gpu_count: int,
    *,
    group: str = "",
    allow_fallback: bool = False,
) -> ProviderPlan:
    """Choose the providers of a model's session for one instance group (`kind`: ModelInstanceGroup.Kind) on one device.

    `available` is what this ONNX Runtime knows, `gpu_count` the NVIDIA GPUs that the process may use.
    Raises MissingProvider and NoGpu unless `allow_fallback`; then what is missing is left out with a warning.
    Raises InvalidArgument for KIND_MODEL and for accelerators or options that do not exist.
    """
    group = group or f"{config.name}_0"
    accelerators = config.optimization.execution_accelerators
    on_gpu = _gpu_choices(config, accelerators.gpu_execution_accelerator, device_id)
    on_cpu = [
        _accelerator_choice(config.name, each, _CPU_NAMES, device_id) for each in accelerators.cpu_execution_accelerator
    ]
    _refuse_duplicates(config.name, [*on_gpu, *on_cpu])
    warnings: list[str] = []
    use_gpu = _use_gpu(kind, on_gpu, available, gpu_count, config.name, group)
    if use_gpu and (problem := _gpu_problem(on_gpu, device_id, gpu_count)):
        error = NoGpu(config.name, group, problem)
        if not allow_fallback:
            raise error
        warnings.append(f"{error}; it runs on the CPU")
        use_gpu = False
    elif not use_gpu and accelerators.gpu_execution_accelerator:
        warnings.append(f"model '{config.name}' runs on the CPU, so that its gpu_execution_accelerator does not count")
    wanted = [*(on_gpu if use_gpu else ()), *on_cpu]
    kept = _drop_missing(config.name, wanted, available, allow_fallback, warnings)
    cpu = [choice for choice in kept if choice.name == CPU] or [ProviderChoice(CPU, {}, "it runs what no other takes")]
    choices = (*(choice for choice in kept if choice.name != CPU), *cpu)
    return ProviderPlan(choices, use_gpu and any(choice in choices for choice in on_gpu), tuple(warnings))


def count_gpus(cuda_visible_devices: str | None, root: Path = Path("/")) -> int:
    """Count the NVIDIA GPUs that this process may use, without loading a driver.

    `cuda_visible_devices` is the variable CUDA_VISIBLE_DEVICES or None when it is not set. As in CUDA, the devices
    after the first one that does not exist are hidden (CUDA programming guide, environment variables).
    """
    present = len(_names(root / "proc/driver/nvidia/gpus")) or sum(
        re.fullmatch(r"nvidia\d+", name) is not None for name in _names(root / "dev")
    )
    if cuda_visible_devices is None or present == 0:
        return present
    visible = 0
    for word in cuda_visible_devices.split(","):
        device = word.strip()
        is_known = device.startswith(("GPU-", "MIG-")) or (device.isdigit() and int(device) < present)
        if not is_known:
            break
        visible += 1
    return visible


def check_distributions(installed: Iterable[metadata.Distribution] | None = None) -> str | None:
    """Give None when exactly one distribution of ONNX Runtime is installed, else what is wrong and what to do.

    All of its distributions install the same module: the last one installed wins, and removing one breaks the other.
    pip notices neither.
    """
    every = metadata.distributions() if installed is None else installed
    found = sorted({name for each in every if (name := _runtime_distribution(each))})
    if len(found) == 1:
        return None
    if not found:
        return "ONNX Runtime is not installed: pip install 'sluice[server]', or 'sluice[server-gpu]' for NVIDIA GPUs"
    return (
        f"{' and '.join(found)} are both installed and overwrite each other's files: "
        f"pip uninstall {' '.join(found)}, then install one of them"
    )


def _runtime_distribution(distribution: metadata.Distribution) -> str | None:
    """Give the distribution's name if it installs the module `onnxruntime`."""
    name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
    if not name.startswith(("onnxruntime", "ort-")):
        return None
    files = distribution.files or ()
    return name if any(file.as_posix() == "onnxruntime/__init__.py" for file in files) else None


def _gpu_choices(config: ModelConfig, accelerators: Iterable[Accelerator], device_id: int) -> list[ProviderChoice]:
    """Give what a GPU instance asks for: the accelerators, and CUDA unless they are another maker's."""
    choices = [_accelerator_choice(config.name, each, _GPU_NAMES, device_id) for each in accelerators]
    names = {choice.name for choice in choices}
    parameters = parameter_values(config)
    options = {key: parameters[key] for key in _CUDA_MODEL_PARAMETERS if key in parameters}
    if CUDA not in names and names <= _NVIDIA:
        choices.append(
            ProviderChoice(CUDA, _cuda_options(config.name, options, device_id), "the instance group is on a GPU")
        )
    return choices


def _accelerator_choice(
    model: str, accelerator: Accelerator, short_names: Mapping[str, str], device_id: int
) -> ProviderChoice:
    name = short_names.get(accelerator.name, accelerator.name)
    wrong_list = short_names is _CPU_NAMES and name in _NVIDIA
    if wrong_list or not re.fullmatch(r"\w+ExecutionProvider", name):
        expected = f"one of {', '.join(sorted(short_names))}, or the full name of a provider of ONNX Runtime for it"
        raise BadOption(model, "execution_accelerators.name", accelerator.name, expected)
    options = dict(accelerator.parameters)
    if name == TENSORRT:
        options = _tensorrt_options(model, options, device_id)
    elif name == CUDA:
        options = _cuda_options(model, options, device_id)
    return ProviderChoice(name, options, f"execution_accelerators names {accelerator.name}")


def _cuda_options(model: str, parameters: Mapping[str, str], device_id: int) -> dict[str, str]:
    options = {"device_id": str(device_id), **parameters}
    for key, words in _CUDA_WORDS.items():
        if key in options:
            spellings = {**{word: word for word in words}, **{str(number): word for number, word in enumerate(words)}}
            options[key] = read_choice(model, key, options[key], spellings)
    return options


def _tensorrt_options(model: str, parameters: Mapping[str, str], device_id: int) -> dict[str, str]:
    options = {"device_id": str(device_id)}
    for key, value in parameters.items():
        name = _TENSORRT_KEYS.get(key, key)
        if key == "precision_mode":
            name = read_choice(model, key, value, _PRECISIONS)
            value = "true"
        elif not name.startswith("trt_"):
            expected = ", ".join(["precision_mode", *_TENSORRT_KEYS]) + " or an option that begins with trt_"
            raise BadOption(model, f"tensorrt.{key}", value, f"no such key; there are {expected}")
        if name.endswith("_enable") or name in _TENSORRT_SWITCHES:
            value = str(read_switch(model, key, value))
        if name:
            options[name] = value
    return options


def _refuse_duplicates(model: str, choices: Sequence[ProviderChoice]) -> None:
    names = [choice.name for choice in choices]
    for name in names:
        if names.count(name) > 1:
            raise BadOption(model, "execution_accelerators.name", name, "each provider at most once")


def _use_gpu(
    kind: int, on_gpu: Sequence[ProviderChoice], available: Sequence[str], gpu_count: int, model: str, group: str
) -> bool:
    if kind == ModelInstanceGroup.KIND_AUTO:
        names = {choice.name for choice in on_gpu}
        is_nvidia = names <= _NVIDIA
        return (CUDA in available and gpu_count > 0) if is_nvidia else bool((names - _NVIDIA) & set(available))
    if kind in (ModelInstanceGroup.KIND_GPU, ModelInstanceGroup.KIND_CPU):
        return kind == ModelInstanceGroup.KIND_GPU
    raise InvalidArgument(
        f"instance group {group} of model {model} has kind {ModelInstanceGroup.Kind.Name(kind)}, "
        "which ONNX models cannot have; use KIND_CPU, KIND_GPU or KIND_AUTO"
    )


def _gpu_problem(on_gpu: Sequence[ProviderChoice], device_id: int, gpu_count: int) -> str | None:
    """Say why the GPU cannot be used. Only NVIDIA's are counted, so that another maker's provider speaks for itself."""
    if not any(choice.name in _NVIDIA for choice in on_gpu):
        return None
    if gpu_count == 0:
        return "no GPUs are available"
    if device_id >= gpu_count:
        return f"GPU {device_id} is not among the {gpu_count} that are available"
    return None


def _drop_missing(
    model: str, wanted: Sequence[ProviderChoice], available: Sequence[str], allow_fallback: bool, warnings: list[str]
) -> list[ProviderChoice]:
    kept = []
    for choice in wanted:
        if choice.name in available:
            kept.append(choice)
            continue
        error = MissingProvider(model, choice.name, available, "is not in this build of ONNX Runtime")
        if not allow_fallback:
            raise error
        warnings.append(f"model '{model}' runs without {choice.name}, which is not in this build of ONNX Runtime")
    return kept


def _names(directory: Path) -> list[str]:
    try:
        return [entry.name for entry in directory.iterdir()]
    except OSError:
        return []
