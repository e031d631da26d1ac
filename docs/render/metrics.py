"""Series of /metrics."""

from docs.render.markdown import code, prose, table
from server.metrics.series import SERIES


def series_table() -> str:
    """Every series with its labels."""
    rows = [
        (
            code(series.name + (f"{{{','.join(series.labels)}}}" if series.labels else "")),
            series.kind.value,
            prose(series.help.rstrip(".")),
        )
        for series in SERIES
    ]
    return table(("series", "type", "meaning"), rows)
