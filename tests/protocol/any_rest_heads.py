"""JSON heads of REST inference requests made up of the members that there are, for Hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

TEXT = st.sampled_from(
    ["X", "Y", "", "FP32", "INT8", "BYTES", "BOOL", "FP16", "\u00e9", "\ud800", "triton_x", "a" * 200]
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(), st.integers(-2, 9), st.floats(), st.sampled_from([2**63, 2**64, -(2**63) - 1])
)  # fmt: skip
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=8,
)
PARAMETERS = st.dictionaries(
    st.sampled_from(["binary_data_size", "binary_data", "binary_data_output", "classification", "shared_memory_region",
                     "shared_memory_byte_size", "priority", "sequence_id", "mine"]),
    VALUES,
    max_size=3,
)  # fmt: skip
TENSORS = st.fixed_dictionaries(
    {"name": TEXT, "shape": st.one_of(st.lists(st.integers(0, 3), max_size=3), VALUES), "datatype": TEXT},
    optional={"data": st.one_of(st.lists(SCALARS, max_size=4), VALUES), "parameters": st.one_of(PARAMETERS, VALUES)},
)
OUTPUTS = st.fixed_dictionaries({"name": TEXT}, optional={"parameters": PARAMETERS})
HEADS = st.fixed_dictionaries(
    {"inputs": st.one_of(st.lists(TENSORS, max_size=2), VALUES)},
    optional={
        "id": VALUES,
        "parameters": st.one_of(PARAMETERS, VALUES),
        "outputs": st.one_of(st.lists(OUTPUTS), VALUES),
    },
)  # fmt: skip
