"""The checks of PromQL find what they are for."""

import pytest
from queries import QueryError, Scrape, metric_names

TEXT = """
# TYPE requests_total counter
requests_total{profile="a",outcome="ok"} 1
requests_total{profile="a",outcome="failed"} 0
# TYPE rows gauge
rows{rank="0"} 1
# TYPE capacity gauge
capacity{rank="0"} 1
# TYPE ready gauge
ready 1
# TYPE wait histogram
wait_bucket{le="1.0",model="m"} 1
wait_bucket{le="+Inf",model="m"} 1
wait_count{model="m"} 1
wait_sum{model="m"} 1
"""


@pytest.fixture
def scrape() -> Scrape:
    return Scrape(TEXT, {"outcome": ["refused"]})


@pytest.mark.parametrize(
    ("expression", "labels"),
    [
        ("ready", {"job", "instance"}),
        ("up == 0", {"job", "instance"}),
        ('rate(requests_total{outcome=~"ok|refused"}[5m])', {"job", "instance", "profile", "outcome"}),
        ("sum by (profile) (rate(requests_total[5m]))", {"profile"}),
        ("sum without (rank) (rows)", {"job", "instance"}),
        ("sum(rows) or vector(0)", set()),
        ("rows / capacity > 0.9", {"job", "instance", "rank"}),
        ("rows * on (job, instance) group_left () ready", {"job", "instance", "rank"}),
        ("rows unless on (job, instance) ready", {"job", "instance", "rank"}),
        ("rows / on (instance) capacity", {"instance"}),
        ("histogram_quantile(0.9, sum by (le, model) (rate(wait_bucket[5m])))", {"model"}),
        ("time() - (ready > 0)", {"job", "instance"}),
        ('absent(up{job="x"})', {"job"}),
        ("-max_over_time(ready[1h])", {"job", "instance"}),
    ],
)
def test_labels(scrape: Scrape, expression: str, labels: set[str]) -> None:
    assert scrape.labels_of(expression) == labels


@pytest.mark.parametrize(
    "expression",
    [
        "requests",
        "wait",
        'rows{replica="0"}',
        'requests_total{outcome="refuse"}',
        'requests_total{outcome=~"ok|refuse"}',
        "sum by (outcome) (rows)",
        "sum without (outcome) (rows)",
        "rows / ready",
        "rows and ready",
        "rows / on (rank) ready",
        "rows * on (job) group_left (outcome) ready",
        "rate(rows[5m])",
        "histogram_quantile(0.9, sum by (model) (rate(wait_bucket[5m])))",
        "label_replace(rows, 'a', 'b', 'c', 'd')",
        "rows +",
    ],
)
def test_mistakes(scrape: Scrape, expression: str) -> None:
    with pytest.raises(ValueError):
        scrape.labels_of(expression)


def test_recorded_series(scrape: Scrape) -> None:
    scrape.record("job:requests:rate5m", "sum by (job, outcome) (rate(requests_total[5m]))")
    assert scrape.labels_of('job:requests:rate5m{outcome="refused"} > 0') == {"job", "outcome"}
    with pytest.raises(QueryError, match="outcome is never"):
        scrape.labels_of('job:requests:rate5m{outcome="refuse"}')
    with pytest.raises(QueryError, match="no label"):
        scrape.labels_of('job:requests:rate5m{profile="a"}')


def test_metric_names() -> None:
    assert metric_names("sum(rate(requests_total[5m])) / on () ready > 0") == {"requests_total", "ready"}
