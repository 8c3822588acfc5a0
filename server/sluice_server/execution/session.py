"""A model's session on ONNX Runtime: what it needs and gives, what it runs on, and running it.

One session serves all instances of a model on a device; ONNX Runtime allows concurrent runs, and nothing here changes
after construction. What a session runs on is read back from it: ONNX Runtime drops a provider that does not start
with no more than a log line.

How tensors pass through ONNX Runtime's Python interface:

* numbers and booleans: as arrays, without a copy where they are C-contiguous, whether or not writable or aligned;
* FP16: as numpy has it. BF16: numpy and that interface do not share the type, so values are bound by their bits;
* BYTES: only as `str`, which it keeps as UTF-8; NUL is an ordinary character. Given `bytes` it would take their
  *representation* (`b'abc'`) without a word, so they are decoded here, and what is no UTF-8 is refused.
"""

import copy
import ctypes
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

from sluice_server.errors import BackendError, Cancelled, InvalidArgument, Unimplemented
from sluice_server.execution import runtime
from sluice_server.execution.options import OptionPlan, run_options, session_options
from sluice_server.execution.providers import CPU, CUDA, TENSORRT, MissingProvider, ProviderChoice
from sluice_server.graph import VARIABLE, GraphSignature, TensorSpec

Array = npt.NDArray[Any]

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}

_ONNX_BFLOAT16 = 16
"""TensorProto.DataType.BFLOAT16 of the ONNX specification."""

_DEVICE_PROVIDERS = frozenset(
    {CUDA, TENSORRT, "NvTensorRTRTXExecutionProvider", "ROCMExecutionProvider", "MIGraphXExecutionProvider"}
)
"""Providers with memory of their own, for which inputs and outputs are bound."""

_RUNTIME_EXCEPTION = 6
"""ORT_RUNTIME_EXCEPTION, ONNX Runtime's code for a C++ exception; those come without a status in their text."""

# The classes of ONNX Runtime's exceptions have no common base; RuntimeError, ValueError and MemoryError are what
# its binding makes of C++ exceptions that carry no status.
_RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    *(kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
    ValueError,
    MemoryError,
)

_STATUS_TEXT = re.compile(r"\[ONNXRuntimeError\] : (\d+) : \w+ : (.*)", re.DOTALL)


class NotText(InvalidArgument):
    """An element of a BYTES input is not UTF-8; `element` is its place in the array in C order."""

    def __init__(self, input_name: str, element: int, problem: UnicodeDecodeError) -> None:
        super().__init__(
            f"element {element} of input '{input_name}' is not UTF-8 ({problem.reason} at byte {problem.start}), "
            "and ONNX Runtime takes only UTF-8 for BYTES"
        )
        self.input_name = input_name
        self.element = element


class Session:
    """A loaded model, safe to run from several threads at once.

    Attributes: `signature`, the model file's own inputs and outputs; `providers`, what the session really has, in
    order of preference; `fallbacks`, a sentence for each provider that was asked for and is not used.
    """

    __slots__ = (
        "_bfloat16_inputs",
        "_bound",
        "_input_count",
        "_keep",
        "_native",
        "_plan",
        "_required",
        "_run_native",
        "_run_options",
        "_text_inputs",
        "_text_outputs",
        "fallbacks",
        "providers",
        "signature",
    )

    def __init__(
        self,
        model: str | Path | bytes,
        options: OptionPlan,
        providers: Sequence[ProviderChoice],
        *,
        allow_fallback: bool = False,
    ) -> None:
        """Load a model from its file (external data beside it is found) or from the bytes of one.

        Raises BackendError when ONNX Runtime refuses the file or the options, MissingProvider when a provider that is
        asked for is not there or does not start (unless `allow_fallback`), Unimplemented for inputs and outputs
        that are no tensors or of a type that the protocol does not have.
        """
        session, self.fallbacks = _load(model, options, providers, allow_fallback)
        # The Python wrapper checks names again on every run and keeps the bytes of the model; the object below it does
        # neither and is what every release since 1.22 has under this name.
        self._native = session._sess  # noqa: SLF001
        self._run_native = self._native.run
        self._plan = options
        self._run_options = run_options(options)
        # With this option ONNX Runtime goes on reading from the caller's buffer.
        self._keep = model if options.session_entries.get("session.use_ort_model_bytes_directly") == "1" else None
        self.providers: tuple[str, ...] = tuple(self._native.get_providers())
        self.signature = _read_signature(options.model, session)
        self._input_count = len(self.signature.inputs)
        self._required = frozenset(spec.name for spec in self.signature.inputs if not spec.optional)
        self._text_inputs = _names_of(self.signature.inputs, "BYTES")
        self._text_outputs = _names_of(self.signature.outputs, "BYTES")
        self._bfloat16_inputs = _names_of(self.signature.inputs, "BF16")
        has_bfloat16 = bool(self._bfloat16_inputs or _names_of(self.signature.outputs, "BF16"))
        if has_bfloat16 and self._text_inputs:
            # BF16 must be bound, and strings cannot be.
            raise Unimplemented(f"model '{options.model}' mixes BF16 tensors with BYTES inputs, which cannot be served")
        on_device = any(provider in _DEVICE_PROVIDERS for provider in self.providers)
        self._bound = has_bfloat16 or (on_device and not self._text_inputs)

    def stoppable(self) -> "Session":
        """The same session with run options of its own, so that `stop` ends only what runs with them."""
        view = copy.copy(self)
        view._run_options = run_options(self._plan)  # noqa: SLF001 # it is a Session
        return view

    def stop(self) -> None:
        """End the run that is under way, and all that follow until `resume`, with Cancelled; from any thread."""
        self._run_options.terminate = True

    def resume(self) -> None:
        """Allow runs again."""
        self._run_options.terminate = False

    def run(self, output_names: Sequence[str], feeds: dict[str, Array]) -> list[Array]:
        """Run the model and give the arrays of the outputs, in the order of their names.

        Feeds are arrays of the signature's types in native byte order, BYTES as object arrays of `bytes`; outputs
        likewise. Inputs are not changed and not kept. Raises BackendError with ONNX Runtime's code and text when the
        run fails, Cancelled when it was stopped, NotText for a BYTES element that is not UTF-8, InvalidArgument for a
        required input left out.
        """
        if len(feeds) < self._input_count:
            self._check_required(feeds)
        if self._text_inputs:
            feeds = {**feeds, **{name: _decode(name, feeds[name]) for name in self._text_inputs & feeds.keys()}}
        try:
            outputs: list[Array] = (
                self._run_bound(output_names, feeds)
                if self._bound
                else self._run_native(output_names, feeds, self._run_options)
            )
        except _RUNTIME_ERRORS as error:
            if self._run_options.terminate:
                raise Cancelled("the run was ended, as nobody waited for it any more") from error
            raise backend_error(error) from error
        if self._text_outputs:
            outputs = [_encode(array) if array.dtype == object else array for array in outputs]
        return outputs

    def _check_required(self, feeds: dict[str, Array]) -> None:
        """Refuse a run without a required input; ONNX Runtime would give the operators a null pointer."""
        if missing := sorted(self._required - feeds.keys()):
            raise InvalidArgument(f"missing required input(s) {missing}")

    def _run_bound(self, output_names: Sequence[str], feeds: dict[str, Array]) -> list[Array]:
        """Run with inputs bound, which copies each to the device that wants it, and outputs bound to the CPU."""
        binding = native.SessionIOBinding(self._native)
        # A binding holds raw pointers: `held` keeps what it points to until the run is over.
        held = [_bind(binding, name, array, bits=name in self._bfloat16_inputs) for name, array in feeds.items()]
        for name in output_names:
            binding.bind_output(name, _CPU_DEVICE)
        binding.synchronize_inputs()
        self._native.run_with_iobinding(binding, self._run_options)
        binding.synchronize_outputs()
        del held
        values = binding.get_outputs()
        # By index, as the binding's own iterator costs 30 us to end.
        return [_fetch(values[place]) for place in range(len(values))]


_CPU_DEVICE = native.OrtDevice(native.OrtDevice.cpu(), native.OrtDevice.default_memory(), 0)


def backend_error(error: Exception) -> BackendError:
    """Give ONNX Runtime's code and message of an exception that it raised, without its prefix."""
    text = str(error).strip()
    if match := _STATUS_TEXT.fullmatch(text):
        return BackendError(int(match[1]), match[2])
    if isinstance(error, UnicodeDecodeError):
        text = f"a BYTES output is not UTF-8 ({error.reason}), and ONNX Runtime's Python interface gives only UTF-8"
    return BackendError(_RUNTIME_EXCEPTION, text or type(error).__name__)


def not_started(asked: Sequence[ProviderChoice], running: Sequence[str]) -> tuple[str, ...]:
    """Give the providers that were asked for and that a session does not have."""
    return tuple(choice.name for choice in asked if choice.name not in running)


def _load(
    model: str | Path | bytes, options: OptionPlan, providers: Sequence[ProviderChoice], allow_fallback: bool
) -> tuple[onnxruntime.InferenceSession, tuple[str, ...]]:
    """Create a session; give it and a sentence for each provider that it has not."""
    available = runtime.available_providers()
    fallbacks = []
    if unknown := not_started(providers, available):
        if not allow_fallback:
            raise MissingProvider(options.model, unknown[0], available, "is not in this build of ONNX Runtime")
        fallbacks = [f"{name} is not in this build of ONNX Runtime" for name in unknown]
    asked = [choice for choice in providers if choice.name in available]
    try:
        session = _create(model, options, asked)
    except BackendError as error:
        others = [choice.name for choice in asked if choice.name != CPU]
        if not allow_fallback or not others:
            raise
        fallbacks += [f"{name} failed: {error.text}" for name in others]
        asked = []
        session = _create(model, options, asked)
    if lost := not_started(asked, session.get_providers()):
        if not allow_fallback:
            raise MissingProvider(options.model, lost[0], session.get_providers(), "did not start on this host")
        fallbacks += [f"{name} did not start on this host" for name in lost]
    return session, tuple(fallbacks)


def _create(
    model: str | Path | bytes, options: OptionPlan, providers: Sequence[ProviderChoice]
) -> onnxruntime.InferenceSession:
    source = model if isinstance(model, bytes) else os.fspath(model)
    asked = [(choice.name, dict(choice.options)) for choice in providers] or [(CPU, {})]
    try:
        # Left on, ONNX Runtime's own fallback would print to stdout and quietly load the model on the CPU.
        return onnxruntime.InferenceSession(
            source, session_options(options), providers=asked, enable_fallback=0, read_config_from_model=0
        )
    except _RUNTIME_ERRORS as error:
        raise backend_error(error) from error


def _read_signature(model: str, session: onnxruntime.InferenceSession) -> GraphSignature:
    """Read the signature back. ONNX Runtime does not tell an unknown rank from a scalar: both have the shape ()."""
    required = [_spec(model, "input", node) for node in session.get_inputs()]
    # Initializers of old files are all inputs that may be left out; those of types that no request can carry are.
    optional = [
        _spec(model, "input", node, optional=True)
        for node in session.get_overridable_initializers()
        if node.type in _DATATYPES
    ]
    outputs = [_spec(model, "output", node) for node in session.get_outputs()]
    return GraphSignature((*required, *optional), tuple(outputs))


def _spec(model: str, direction: str, node: Any, *, optional: bool = False) -> TensorSpec:
    if node.type not in _DATATYPES:
        raise Unimplemented(
            f"model '{model}': {direction} '{node.name}' has type {node.type}, "
            f"and only tensors of {', '.join(_DATATYPES.values())} can be served"
        )
    shape = tuple(size if isinstance(size, int) else VARIABLE for size in node.shape)
    return TensorSpec(node.name, _DATATYPES[node.type], shape, optional)


def _names_of(specs: Sequence[TensorSpec], datatype: str) -> frozenset[str]:
    return frozenset(spec.name for spec in specs if spec.datatype == datatype)


def _decode(name: str, array: Array) -> Array:
    """Make `str` of an array of `bytes`; NotText names the first element that is not UTF-8."""
    elements = array.ravel().tolist()
    try:
        return _object_array([element.decode() for element in elements], array.shape)
    except UnicodeDecodeError as error:
        raise NotText(name, elements.index(error.object), error) from None


def _encode(array: Array) -> Array:
    return _object_array([element.encode() for element in array.ravel().tolist()], array.shape)


def _object_array(elements: list[Any], shape: tuple[int, ...]) -> Array:
    result = np.empty(len(elements), dtype=object)
    result[:] = elements
    return result.reshape(shape)


def _bind(binding: Any, name: str, array: Array, *, bits: bool) -> object:
    """Bind one input; give what must live until the run is over."""
    # `ascontiguousarray` would make a scalar an array of one element.
    array = array if array.flags.c_contiguous else array.copy(order="C")
    if not bits:
        binding.bind_input(name, array)
        return array
    value = native.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _ONNX_BFLOAT16)
    binding.bind_ortvalue_input(name, value)
    return array, value


def _fetch(value: Any) -> Array:
    """Make an array of an output on the CPU."""
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    shape = tuple(value.shape())
    size_bytes = math.prod(shape) * np.dtype(ml_dtypes.bfloat16).itemsize
    # An empty tensor may have no memory at all.
    data = ctypes.string_at(value.data_ptr(), size_bytes) if size_bytes else b""
    return np.frombuffer(data, ml_dtypes.bfloat16).reshape(shape)
