"""`POST /v1/completions`, vLLM's with steering."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from server.engine.openai import (
    CompletionRequest,
    CompletionResponse,
    SteeredSampling,
    create_completion,
    validate_json_request,
)
from server.routes.admin.route import REFUSALS
from server.routes.answers.choices import ChoicesAnswer
from server.routes.steered import respond
from server.schema import Receipt, SteeringFields, Unsteerable

router = APIRouter()


class SteeredCompletionRequest(SteeringFields, SteeredSampling, CompletionRequest):
    """A text completion request that may name steering profiles."""

    def unsteerable(self) -> Unsteerable | None:
        """A beam search asks the engine many times, not for one answer."""
        return Unsteerable("use_beam_search", "use_beam_search") if self.use_beam_search else None


class SteeredCompletionResponse(CompletionResponse):
    """A text completion with the receipt of its steering. In a stream the last chunk carries the receipt."""

    steering: Annotated[
        Receipt | list[Receipt] | None,
        Field(description="What steered this answer; a list when the request gave a list, absent when nothing did."),
    ] = None


@router.post(
    "/v1/completions",
    dependencies=[Depends(validate_json_request)],
    responses={200: {"model": SteeredCompletionResponse, "content": {"text/event-stream": {}}}, **REFUSALS},
)
async def create_steered_completion(request: SteeredCompletionRequest, raw_request: Request) -> Any:
    """Complete a prompt; `steering_profile` steers this answer and no other."""
    return await respond(request, raw_request, create_completion, ChoicesAnswer)
