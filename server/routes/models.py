"""`GET /v1/models`, vLLM's list and one entry `<model>@<profile>` per profile."""

import json

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from server.engine.openai import show_available_models
from server.routes.admin.route import identity_of
from server.service import SteeringService

router = APIRouter()


@router.get("/v1/models")
async def list_models(raw_request: Request) -> JSONResponse:
    """List the served models; `<model>@<profile>` selects a profile for clients that cannot send extra fields."""
    service: SteeringService = raw_request.app.state.steering
    response = await show_available_models(raw_request)
    models = json.loads(bytes(response.body))
    cards = [card for card in models["data"] if card["id"] in service.model_names]
    models["data"] += [
        {**card, "id": f"{card['id']}@{profile.name}", "parent": card["id"]}
        for card in cards
        for profile in service.profiles.usable_by(identity_of(raw_request))
    ]
    return JSONResponse(models)
