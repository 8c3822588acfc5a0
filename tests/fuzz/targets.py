"""The table of what is fuzzed, with how many inputs of bytes and how many of Hypothesis's a run sends."""

from __future__ import annotations

from fuzz.cached import built_lists, cached_seeds, open_cached
from fuzz.configurations import (
    built_jsons,
    built_loads,
    built_texts,
    json_seeds,
    load_seeds,
    open_jsons,
    open_loads,
    open_texts,
    text_seeds,
)
from fuzz.decoding import built_pairs, built_wire, cache_seeds, open_cache, open_wire, wire_seeds
from fuzz.features import BUCKETS, ENSEMBLES, PRIORITIES, RAGGED, SPLIT
from fuzz.gates import built_gates, gate_seeds, open_gates
from fuzz.inference import (
    built_requests,
    built_rpcs,
    built_streams,
    open_requests,
    open_rpcs,
    open_streams,
    rpc_seeds,
    stream_seeds,
)
from fuzz.mutators import behind, change_json, change_message, in_one
from fuzz.regions import built_regions, open_regions, region_seeds
from fuzz.rest import built_rests, change_request, open_rests, rest_seeds
from fuzz.sequences import built_sequences, open_sequences, sequence_seeds
from fuzz.serving import seeds
from fuzz.subject import Target
from fuzz.together import Feature, built_for, opener, seeds_of
from fuzz.warmups import built_warmups, open_warmups, warmup_seeds


def _together(name: str, feature: Feature) -> Target:
    return Target(
        name,
        opener(feature),
        lambda: seeds_of(feature),
        built_for(feature),
        20_000,
        2_000,
        in_one(change_message),
    )


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("requests", open_requests, seeds, built_requests, 300_000, 3_000, change_message),
        Target("cache", open_cache, cache_seeds, built_pairs, 60_000, 2_000, in_one(change_message)),
        Target("wire", open_wire, wire_seeds, built_wire(), 150_000, 2_000, behind(1, change_message)),
        Target("streams", open_streams, stream_seeds, built_streams, 50_000, 2_000, behind(1, in_one(change_message))),
        Target("rpcs", open_rpcs, rpc_seeds, built_rpcs(), 100_000, 2_000, behind(1, change_message)),
        Target("rest", open_rests, rest_seeds, built_rests(), 100_000, 3_000, change_request),
        Target("config", open_texts, text_seeds, built_texts, 60_000, 2_000),
        Target("json", open_jsons, json_seeds, built_jsons(), 80_000, 2_000, change_json),
        Target("loads", open_loads, load_seeds, built_loads(), 20_000, 2_000, in_one(behind(1, change_message))),
        Target("cached", open_cached, cached_seeds, built_lists(), 40_000, 2_000, in_one(change_message)),
        Target("gates", open_gates, gate_seeds, built_gates(), 60_000, 2_000),
        Target("warmups", open_warmups, warmup_seeds, built_warmups(), 20_000, 1_000, behind(1, change_message)),
        Target(
            "regions", open_regions, region_seeds, built_regions(), 40_000, 2_000, in_one(behind(1, change_message))
        ),
        Target(
            "sequences",
            open_sequences,
            sequence_seeds,
            built_sequences(),
            40_000,
            4_000,
            in_one(behind(1, change_message)),
        ),
        _together("ensembles", ENSEMBLES),
        _together("ragged", RAGGED),
        _together("buckets", BUCKETS),
        _together("split", SPLIT),
        _together("priority", PRIORITIES),
    )
}
