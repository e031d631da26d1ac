"""Text of a scrape, in the format that the client asks for."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import ALLOWUTF8, UNDERSCORES
from prometheus_client.registry import Collector


class _Joined(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def render(families: Sequence[Metric], accept: str | None = None, beside: Collector | None = None) -> tuple[bytes, str]:
    """Write metric families as text.

    Args:
        families: this server's series, see `SteeringMetrics.families`.
        accept: the client's Accept header: OpenMetrics where it asks for that, else Prometheus' text format.
        beside: vLLM's registry, to come first. OpenMetrics ends with a mark, so two texts cannot be put together.

    Returns:
        The text and its content type.
    """
    encode, content_type = choose_encoder(accept or "")
    if isinstance(encode, partial) and encode.keywords.get("escaping") == UNDERSCORES:
        # Names of ours and of vLLM's are valid as they are. The client library would escape the colon too, though only
        # in samples, and Prometheus 2 would not find `vllm:num_requests_waiting`.
        encode = partial(encode, escaping=ALLOWUTF8)
    return encode(_Joined(chain(beside.collect() if beside else (), families))), content_type
