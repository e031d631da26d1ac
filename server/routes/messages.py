"""`POST /v1/messages` and `POST /v1/messages/count_tokens`, vLLM's with steering."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from server.engine.messages import (
    AnthropicCountTokensRequest,
    AnthropicCountTokensResponse,
    AnthropicMessagesRequest,
    AnthropicMessagesResponse,
    count_tokens,
    create_messages,
)
from server.engine.openai import SteerableRequest, validate_json_request
from server.errors import SteeringRequestError
from server.routes.admin.route import identity_of, service_of
from server.routes.answers.message import MessageAnswer
from server.routes.steered import refuse, respond
from server.schema import ProfileRef, Receipt, SteeringFields

router = APIRouter()


class SteeredMessagesRequest(SteeringFields, SteerableRequest, AnthropicMessagesRequest):
    """A request for a message that may name steering profiles."""


class SteeredMessagesResponse(AnthropicMessagesResponse):
    """A message with the receipt of its steering. In a stream the event `message_delta` carries the receipt."""

    steering: Annotated[
        Receipt | list[Receipt] | None,
        Field(description="What steered this answer; a list when the request gave a list, absent when nothing did."),
    ] = None


class MessageRefusal(BaseModel):
    """What is wrong with a request, in Anthropic's form."""

    model_config = ConfigDict(extra="allow")

    type: str
    message: str
    code: Annotated[str | None, Field(description="Stable code of this server; absent from vLLM's own errors.")] = None
    param: Annotated[str | None, Field(description="Field of the request at fault.")] = None


class MessageError(BaseModel):
    """Body of a refused or failed request."""

    type: Annotated[
        Literal["error"] | None, Field(description="Absent where vLLM itself refuses the form of a body.")
    ] = None
    error: MessageRefusal


_REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": MessageError, "description": "Refused: bad input, no access, or an unknown model or profile."},
    "5XX": {"model": MessageError, "description": "The server or its engine failed."},
}


@router.post(
    "/v1/messages",
    dependencies=[Depends(validate_json_request)],
    responses={200: {"model": SteeredMessagesResponse, "content": {"text/event-stream": {}}}, **_REFUSALS},
)
async def create_steered_message(request: SteeredMessagesRequest, raw_request: Request) -> Any:
    """Answer a conversation; `steering_profile` steers this answer and no other."""
    return await respond(request, raw_request, create_messages, MessageAnswer)


@router.post(
    "/v1/messages/count_tokens",
    dependencies=[Depends(validate_json_request)],
    responses={200: {"model": AnthropicCountTokensResponse}, **_REFUSALS},
)
async def count_message_tokens(request: AnthropicCountTokensRequest, raw_request: Request) -> Any:
    """Count the tokens of a prompt. The model may be `<model>@<profile>`: a profile leaves the prompt as it is."""
    service = service_of(raw_request)
    model, profile = service.split_model(request.model)
    if profile is not None:
        try:
            service.profiles.resolve([ProfileRef(name=profile)], identity_of(raw_request))
        except SteeringRequestError as error:
            return refuse(error, raw_request, [profile])
        request.model = model
    return await count_tokens(request, raw_request)
