"""The choice of execution providers for every kind of host, and what is read of the host for it."""

from importlib import metadata
from pathlib import Path

import pytest
from google.protobuf import text_format

from sluice_proto.model_config_pb2 import ModelConfig, ModelInstanceGroup
from sluice_server.errors import InvalidArgument
from sluice_server.execution.parameters import BadOption
from sluice_server.execution.providers import (
    MissingProvider,
    NoGpu,
    ProviderPlan,
    check_distributions,
    choose_providers,
    count_gpus,
)

AUTO, GPU, CPU, MODEL = (ModelInstanceGroup.Kind.Value(f"KIND_{name}") for name in ("AUTO", "GPU", "CPU", "MODEL"))

CPU_BUILD = ("AzureExecutionProvider", "CPUExecutionProvider")
GPU_BUILD = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")


def config(accelerators: str = "", parameters: str = "") -> ModelConfig:
    text = f"name: 'X' optimization {{ execution_accelerators {{ {accelerators} }} }} {parameters}"
    return text_format.Parse(text, ModelConfig())


def gpu(name: str, **parameters: str) -> str:
    return accelerator("gpu_execution_accelerator", name, parameters)


def cpu(name: str, **parameters: str) -> str:
    return accelerator("cpu_execution_accelerator", name, parameters)


def accelerator(field: str, name: str, parameters: dict[str, str]) -> str:
    words = " ".join(f"parameters {{ key: '{key}' value: '{value}' }}" for key, value in parameters.items())
    return f"{field} {{ name: '{name}' {words} }}"


def names(plan: ProviderPlan) -> list[str]:
    return [choice.name.removesuffix("ExecutionProvider") for choice in plan.choices]


def test_a_cpu_instance_runs_on_the_cpu_wherever_it_is() -> None:
    for available, gpus in ((CPU_BUILD, 0), (GPU_BUILD, 0), (GPU_BUILD, 2)):
        plan = choose_providers(config(), CPU, 0, available, gpus)
        assert (names(plan), plan.on_gpu, plan.warnings) == (["CPU"], False, ())


def test_an_auto_instance_takes_the_gpu_only_where_build_and_host_have_one() -> None:
    assert names(choose_providers(config(), AUTO, 0, GPU_BUILD, 1)) == ["CUDA", "CPU"]
    assert names(choose_providers(config(), AUTO, 0, GPU_BUILD, 0)) == ["CPU"]
    assert names(choose_providers(config(), AUTO, 0, CPU_BUILD, 1)) == ["CPU"]


def test_a_gpu_instance_asks_for_cuda_on_its_device() -> None:
    plan = choose_providers(config(), GPU, 1, GPU_BUILD, 2)
    assert (names(plan), plan.on_gpu) == (["CUDA", "CPU"], True)
    assert plan.choices[0].options == {"device_id": "1"}
    assert all(choice.why for choice in plan.choices)


def test_a_gpu_instance_without_a_gpu_is_an_error_that_names_group_and_model() -> None:
    with pytest.raises(NoGpu) as caught:
        choose_providers(config(), GPU, 0, GPU_BUILD, 0, group="G_0")
    assert str(caught.value) == "instance group G_0 of model X has kind KIND_GPU but no GPUs are available"
    assert isinstance(caught.value, InvalidArgument)


def test_an_instance_group_without_a_name_is_called_after_its_model() -> None:
    with pytest.raises(NoGpu, match="instance group X_0 of model X"):
        choose_providers(config(), GPU, 0, CPU_BUILD, 0)


def test_a_gpu_instance_without_a_gpu_runs_on_the_cpu_where_fallback_is_allowed() -> None:
    plan = choose_providers(config(gpu("tensorrt")), GPU, 0, GPU_BUILD, 0, allow_fallback=True)
    assert (names(plan), plan.on_gpu) == (["CPU"], False)
    assert plan.warnings == (
        "instance group X_0 of model X has kind KIND_GPU but no GPUs are available; it runs on the CPU",
    )


def test_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(NoGpu, match="GPU 2 is not among the 2 that are available"):
        choose_providers(config(), GPU, 2, GPU_BUILD, 2)


def test_a_gpu_instance_in_a_cpu_build_is_a_missing_provider() -> None:
    with pytest.raises(MissingProvider) as caught:
        choose_providers(config(), GPU, 0, CPU_BUILD, 1)
    assert caught.value.provider == "CUDAExecutionProvider"
    assert caught.value.model == "X"
    assert caught.value.available == CPU_BUILD
    assert "--allow-provider-fallback" in str(caught.value)


def test_a_missing_provider_is_dropped_with_a_warning_where_fallback_is_allowed() -> None:
    available = ("CUDAExecutionProvider", "CPUExecutionProvider")
    plan = choose_providers(config(gpu("tensorrt")), GPU, 0, available, 1, allow_fallback=True)
    assert (names(plan), plan.on_gpu) == (["CUDA", "CPU"], True)
    assert plan.warnings == (
        "model 'X' runs without TensorrtExecutionProvider, which is not in this build of ONNX Runtime",
    )
    plan = choose_providers(config(), GPU, 0, CPU_BUILD, 1, allow_fallback=True)
    assert (names(plan), plan.on_gpu) == (["CPU"], False)


def test_tensorrt_takes_triton_s_parameters_and_leaves_the_rest_to_cuda() -> None:
    accelerators = gpu(
        "tensorrt",
        precision_mode="FP16",
        max_workspace_size_bytes="1073741824",
        trt_engine_cache_enable="1",
        trt_engine_cache_path="/cache",
        trt_min_subgraph_size="1",
        int8_use_native_calibration_table="false",
    )
    plan = choose_providers(config(accelerators), GPU, 0, GPU_BUILD, 1)
    assert names(plan) == ["Tensorrt", "CUDA", "CPU"]
    assert plan.choices[0].options == {
        "device_id": "0",
        "trt_fp16_enable": "True",
        "trt_max_workspace_size": "1073741824",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": "/cache",
        "trt_min_subgraph_size": "1",
        "trt_int8_use_native_calibration_table": "False",
    }


@pytest.mark.parametrize(
    ("precision", "options"),
    [("FP32", {}), ("FP16", {"trt_fp16_enable": "True"}), ("INT8", {"trt_int8_enable": "True"})],
)
def test_precision_mode_is_an_option_of_tensorrt(precision: str, options: dict[str, str]) -> None:
    plan = choose_providers(config(gpu("tensorrt", precision_mode=precision)), GPU, 0, GPU_BUILD, 1)
    assert plan.choices[0].options == {"device_id": "0", **options}


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"precision": "FP16"}, "parameter 'tensorrt.precision' is 'FP16'"),
        ({"precision_mode": "FP8"}, "parameter 'precision_mode' is 'FP8', expected one of FP32, FP16, INT8"),
        ({"trt_engine_cache_enable": "maybe"}, "parameter 'trt_engine_cache_enable' is 'maybe'"),
    ],
)
def test_a_wrong_parameter_of_tensorrt_is_refused_by_name(parameters: dict[str, str], text: str) -> None:
    with pytest.raises(BadOption, match=text):
        choose_providers(config(gpu("tensorrt", **parameters)), GPU, 0, GPU_BUILD, 1)


def test_cuda_takes_options_from_its_accelerator() -> None:
    accelerators = gpu("cuda", cudnn_conv_use_max_workspace="0", arena_extend_strategy="1", device_id="1")
    plan = choose_providers(config(accelerators), GPU, 0, GPU_BUILD, 2)
    assert names(plan) == ["CUDA", "CPU"]
    assert plan.choices[0].options == {
        "device_id": "1",
        "cudnn_conv_use_max_workspace": "0",
        "arena_extend_strategy": "kSameAsRequested",
    }


def test_cuda_takes_triton_s_older_options_from_the_model_s_parameters() -> None:
    parameters = "parameters { key: 'cudnn_conv_algo_search' value { string_value: '2' } }"
    parameters += "parameters { key: 'gpu_mem_limit' value { string_value: '1000' } }"
    plan = choose_providers(config(parameters=parameters), GPU, 0, GPU_BUILD, 1)
    assert plan.choices[0].options == {"device_id": "0", "cudnn_conv_algo_search": "DEFAULT", "gpu_mem_limit": "1000"}


def test_openvino_comes_before_the_cpu_with_its_options() -> None:
    available = ("OpenVINOExecutionProvider", "CPUExecutionProvider")
    plan = choose_providers(config(cpu("openvino", num_streams="2")), CPU, 0, available, 0)
    assert (names(plan), plan.on_gpu) == (["OpenVINO", "CPU"], False)
    assert plan.choices[0].options == {"num_streams": "2"}
    with pytest.raises(MissingProvider, match="OpenVINOExecutionProvider"):
        choose_providers(config(cpu("openvino")), CPU, 0, CPU_BUILD, 0)


def test_any_provider_can_be_named_in_full() -> None:
    plan = choose_providers(config(cpu("AzureExecutionProvider", key="value")), CPU, 0, CPU_BUILD, 0)
    assert names(plan) == ["Azure", "CPU"]
    assert plan.choices[0].options == {"key": "value"}


def test_options_of_the_cpu_provider_itself_are_kept_and_it_stays_last() -> None:
    accelerators = cpu("CPUExecutionProvider", use_arena="0") + cpu("AzureExecutionProvider")
    plan = choose_providers(config(accelerators), CPU, 0, CPU_BUILD, 0)
    assert names(plan) == ["Azure", "CPU"]
    assert plan.choices[1].options == {"use_arena": "0"}


def test_another_maker_s_gpu_needs_neither_cuda_nor_an_nvidia_gpu() -> None:
    available = ("MIGraphXExecutionProvider", "CPUExecutionProvider")
    for kind in (GPU, AUTO):
        plan = choose_providers(config(gpu("MIGraphXExecutionProvider")), kind, 0, available, 0)
        assert (names(plan), plan.on_gpu) == (["MIGraphX", "CPU"], True)
    assert names(choose_providers(config(gpu("MIGraphXExecutionProvider")), AUTO, 0, CPU_BUILD, 0)) == ["CPU"]


def test_accelerators_of_a_gpu_do_not_count_on_the_cpu_and_the_plan_says_so() -> None:
    plan = choose_providers(config(gpu("tensorrt")), CPU, 0, CPU_BUILD, 0)
    assert names(plan) == ["CPU"]
    assert plan.warnings == ("model 'X' runs on the CPU, so that its gpu_execution_accelerator does not count",)


@pytest.mark.parametrize(
    "accelerators",
    [gpu("gpu_io"), gpu("openvino"), cpu("tensorrt"), cpu("CUDAExecutionProvider"), gpu(""), gpu("Bad Provider")],
)
def test_an_accelerator_that_does_not_exist_is_refused_by_name(accelerators: str) -> None:
    with pytest.raises(BadOption, match=r"execution_accelerators\.name"):
        choose_providers(config(accelerators), CPU, 0, GPU_BUILD, 1)


def test_a_provider_named_twice_is_refused() -> None:
    with pytest.raises(BadOption, match="at most once"):
        choose_providers(config(gpu("cuda") + gpu("CUDAExecutionProvider")), GPU, 0, GPU_BUILD, 1)


def test_kind_model_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match="has kind KIND_MODEL"):
        choose_providers(config(), MODEL, 0, CPU_BUILD, 0)


def host_with_gpus(root: Path, count: int) -> Path:
    for number in range(count):
        (root / f"proc/driver/nvidia/gpus/0000:0{number}:00.0").mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 3),
        ("", 0),
        ("-1", 0),
        ("NoDevFiles", 0),
        ("0", 1),
        ("2,0", 2),
        ("0,7,1", 1),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 1),
        ("MIG-1, MIG-2", 2),
    ],
)
def test_gpus_are_those_present_and_visible(tmp_path: Path, visible: str | None, count: int) -> None:
    assert count_gpus(visible, host_with_gpus(tmp_path, 3)) == count


def test_without_a_driver_there_is_no_gpu_whatever_is_visible(tmp_path: Path) -> None:
    assert count_gpus("0,1", tmp_path) == 0
    assert count_gpus("GPU-1", tmp_path) == 0


def test_device_files_are_counted_where_the_driver_shows_no_list(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / "dev" / name).touch()
    assert count_gpus(None, tmp_path) == 2


def install(site: Path, name: str, package: str) -> None:
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    # Files that are listed but not there are left out of `Distribution.files` from Python 3.12 on.
    (site / package).mkdir(exist_ok=True)
    (site / package / "__init__.py").touch()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{package}/__init__.py,,\n")


def test_one_distribution_of_onnx_runtime_is_right(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime-gpu", "onnxruntime")
    install(tmp_path, "onnxruntime-extensions", "onnxruntime_extensions")
    install(tmp_path, "numpy", "numpy")
    assert check_distributions(metadata.distributions(path=[str(tmp_path)])) is None


def test_two_distributions_of_onnx_runtime_are_named_with_what_to_do(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime", "onnxruntime")
    install(tmp_path, "onnxruntime_gpu", "onnxruntime")
    problem = check_distributions(metadata.distributions(path=[str(tmp_path)]))
    assert problem is not None
    assert "onnxruntime and onnxruntime-gpu are both installed" in problem
    assert "pip uninstall onnxruntime onnxruntime-gpu" in problem


def test_no_distribution_of_onnx_runtime_says_which_extra_to_install(tmp_path: Path) -> None:
    problem = check_distributions(metadata.distributions(path=[str(tmp_path)]))
    assert problem is not None
    assert "sluice[server]" in problem
    assert "sluice[server-gpu]" in problem


def test_this_environment_has_exactly_one() -> None:
    assert check_distributions() is None
