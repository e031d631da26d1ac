"""`GET /metrics`: vLLM's series, and those of steering over all processes of this server."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.engine.launch import metrics_registry
from server.metrics.exposition import render
from server.refusals import refusal_of
from server.registry.errors import RegistryError
from server.scrape import Scraper

router = APIRouter()


@router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
async def show_metrics(raw_request: Request) -> Response:
    """Prometheus' text format, or OpenMetrics where the client asks for it."""
    scraper: Scraper = raw_request.app.state.steering_scraper
    try:
        families = await scraper.scrape()
    except RegistryError as error:
        raise refusal_of(error) from error
    text, content_type = render(families, raw_request.headers.get("accept"), metrics_registry())
    return Response(text, media_type=content_type)
