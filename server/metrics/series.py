"""Table of every series that this server adds to /metrics; docs/operating.md shows it."""

from dataclasses import dataclass
from enum import StrEnum


class SeriesKind(StrEnum):
    """Type of a series as Prometheus knows it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    INFO = "info"


@dataclass(frozen=True)
class Series:
    """One metric family.

    Attributes:
        name: as it is exposed, with `_total` or `_info`; a histogram's without `_bucket`, `_count` and `_sum`.
        kind: its type.
        help: one sentence.
        labels: label names, in the order in which values are given.
    """

    name: str
    kind: SeriesKind
    help: str
    labels: tuple[str, ...] = ()


_RANK = ("replica", "rank")

REQUESTS = Series(
    "steering_requests_total",
    SeriesKind.COUNTER,
    "Requests that name the profile, by outcome: ok, refused, aborted (the client went away) or failed.",
    ("profile", "outcome"),
)
TOKENS = Series(
    "steering_tokens_total",
    SeriesKind.COUNTER,
    "Tokens that the profile steered, as counted by the workers, by phase: prompt or generation.",
    ("profile", "phase"),
)
ACTIVE_REQUESTS = Series(
    "steering_active_requests", SeriesKind.GAUGE, "Admitted requests of the profile that have not ended.", ("profile",)
)
REFUSALS = Series(
    "steering_refusals_total",
    SeriesKind.COUNTER,
    "Requests for steering that were refused, by the error code of the answer.",
    ("code",),
)
OPERATIONS = Series(
    "steering_operations_total",
    SeriesKind.COUNTER,
    "Operations on bundles and profiles, by outcome: ok, refused (the caller's fault), failed or aborted.",
    ("operation", "outcome"),
)
OPERATION_FAILURES = Series(
    "steering_operation_failures_total",
    SeriesKind.COUNTER,
    "Refused and failed operations, by error code.",
    ("operation", "reason"),
)
OPERATION_DURATION = Series(
    "steering_operation_duration_seconds",
    SeriesKind.HISTOGRAM,
    "Duration of operations, however they ended.",
    ("operation",),
)
RESIDENT_BUNDLES = Series(
    "steering_resident_bundles", SeriesKind.GAUGE, "Programs of bundles that the worker holds.", _RANK
)
RESIDENT_BYTES = Series("steering_resident_bytes", SeriesKind.GAUGE, "Bytes of rows that those programs occupy.", _RANK)
ROWS_USED = Series("steering_rows_used", SeriesKind.GAUGE, "Rows of the worker's pool that programs occupy.", _RANK)
ROWS_CAPACITY = Series(
    "steering_rows_capacity", SeriesKind.GAUGE, "Rows of the worker's pool (--steering-rows).", _RANK
)
SLOTS_USED = Series("steering_slots_used", SeriesKind.GAUGE, "Slots of the worker that steerings occupy.", _RANK)
SLOTS_CAPACITY = Series("steering_slots_capacity", SeriesKind.GAUGE, "Slots of the worker.", _RANK)
STEP_HOST = Series(
    "steering_step_host_seconds",
    SeriesKind.HISTOGRAM,
    "Host time that steering adds to an engine step with steered requests.",
    _RANK,
)
ENGINE_REQUESTS = Series(
    "steering_engine_requests",
    SeriesKind.GAUGE,
    "Steered requests in the replica's scheduler, waiting ones included.",
    ("replica",),
)
CACHE_QUERY_TOKENS = Series(
    "steering_prefix_cache_query_tokens_total",
    SeriesKind.COUNTER,
    "Prompt tokens looked up in the prefix cache, by whether their request is steered.",
    ("replica", "steered"),
)
CACHE_HIT_TOKENS = Series(
    "steering_prefix_cache_hit_tokens_total",
    SeriesKind.COUNTER,
    "Prompt tokens found in the prefix cache, by whether their request is steered.",
    ("replica", "steered"),
)
GENERATION_DESIRED = Series(
    "steering_generation_desired", SeriesKind.GAUGE, "Number of changes that the registry has seen."
)
GENERATION_OBSERVED = Series(
    "steering_generation_observed", SeriesKind.GAUGE, "Change up to which every API process of this server serves."
)
MEMBERS = Series("steering_members", SeriesKind.GAUGE, "Live API processes of this server.")
SELF_TEST_PASSED = Series(
    "steering_self_test_passed",
    SeriesKind.GAUGE,
    "1 when the self-test of every layer on every replica passed, else 0.",
)
READY = Series("steering_ready", SeriesKind.GAUGE, "1 when the API process that was scraped is ready, else 0.")
DECLARATION_APPLIED = Series(
    "steering_declaration_applied",
    SeriesKind.GAUGE,
    "0 while a profile is not as the file of --steering-declaration says, or the file cannot be read; else 1.",
)
BUILD = Series(
    "steering_build_info",
    SeriesKind.INFO,
    "Versions of the server and of what it runs on.",
    ("version", "vllm", "torch", "backend", "registry_schema"),
)
RECEIPT_TOKENS_CHECKED = Series(
    "steering_receipt_tokens_checked_total",
    SeriesKind.COUNTER,
    "Tokens of receipts that were held against the workers' own final counts.",
)
RECEIPT_DISCREPANCY_TOKENS = Series(
    "steering_receipt_discrepancy_tokens",
    SeriesKind.GAUGE,
    "Tokens that receipts claimed minus tokens that workers counted, over all receipts checked; always 0.",
)
RECEIPT_MISMATCHES = Series(
    "steering_receipt_mismatches_total",
    SeriesKind.COUNTER,
    "Receipts with a count other than the workers' own; always 0.",
)
RECEIPT_UNCHECKED = Series(
    "steering_receipt_unchecked_total",
    SeriesKind.COUNTER,
    "Receipts given up because the workers' own counts did not come.",
)
PROFILES = Series("steering_profiles", SeriesKind.GAUGE, "Profiles in the registry.")
BUNDLES = Series("steering_bundles", SeriesKind.GAUGE, "Bundles in the registry.")
LAST_CHANGE = Series(
    "steering_last_change_timestamp_seconds",
    SeriesKind.GAUGE,
    "Unix time of the last change in the registry; 0 before the first.",
)

SERIES: tuple[Series, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Series))
