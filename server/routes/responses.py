"""`POST /v1/responses`, vLLM's with steering."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from artifacts.errors import quoted
from server.engine.openai import SteeredSampling, validate_json_request
from server.engine.responses import ResponsesRequest, ResponsesResponse, create_responses
from server.routes.admin.route import REFUSALS
from server.routes.answers.response import ResponseAnswer
from server.routes.steered import respond
from server.schema import Receipt, SteeringFields, Unsteerable

router = APIRouter()

# Tools that vLLM runs itself: it then asks the engine again, with earlier answers as a part of the prompt.
_TOOLS_OF_THE_SERVER = frozenset({"code_interpreter", "container", "mcp", "web_search_preview"})


class SteeredResponsesRequest(SteeringFields, SteeredSampling, ResponsesRequest):
    """A request for a response that may name steering profiles."""

    def unsteerable(self) -> Unsteerable | None:
        """What ends after its answer was sent, and what may take several answers of the engine."""
        if self.background:
            return Unsteerable("background", "background")
        for tool in self.tools:
            if tool.type in _TOOLS_OF_THE_SERVER:
                return Unsteerable("tools", f"tools of type {quoted(tool.type)}, which the server runs itself")
        return None


class SteeredResponsesResponse(ResponsesResponse):
    """A response with the receipt of its steering. In a stream the response of the last event carries the receipt."""

    steering: Annotated[
        Receipt | list[Receipt] | None,
        Field(description="What steered this answer; a list when the request gave a list, absent when nothing did."),
    ] = None


@router.post(
    "/v1/responses",
    dependencies=[Depends(validate_json_request)],
    responses={200: {"model": SteeredResponsesResponse, "content": {"text/event-stream": {}}}, **REFUSALS},
)
async def create_steered_response(request: SteeredResponsesRequest, raw_request: Request) -> Any:
    """Answer an input; `steering_profile` steers this answer and no other."""
    return await respond(request, raw_request, create_responses, ResponseAnswer)
