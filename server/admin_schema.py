"""Bodies of the admin API: what its routes take and answer, and what its client reads."""

from datetime import datetime
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from artifacts.manifest import MAX_NUM_LAYERS, MAX_STRENGTH, ExcludedSpan, Scope

# As in the manifest: `@` separates name and version in a request, so it cannot be part of a name.
PROFILE_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
DIGEST = r"^sha256:[0-9a-f]{64}$"
# Eight digits at least, so that a prefix that is unique today stays so for a while.
DIGEST_PREFIX = r"^sha256:[0-9a-f]{8,64}$"
MAX_PAGE = 1000
MAX_DRAIN_S = 3600.0
_MAX_DESCRIPTION, _MAX_KEYS, _MAX_PATH, _MAX_URI = 2000, 256, 1024, 2048
_WHITE_SPACE = "\n\t"

Item = TypeVar("Item")
Action = Literal["put", "rollback", "delete", "seed"]


def _listed_once(values: tuple[Item, ...]) -> tuple[Item, ...]:
    if len(set(values)) < len(values):
        raise PydanticCustomError("listed_twice", "an entry is listed twice; keep one")
    return values


def _without_controls(text: str) -> str:
    if any(not char.isprintable() and char not in _WHITE_SPACE for char in text):
        raise PydanticCustomError("control_character", "it holds a control character; leave it out")
    return text


KeyName = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_without_controls)]
KeyNames = Annotated[tuple[KeyName, ...], Field(min_length=1, max_length=_MAX_KEYS), AfterValidator(_listed_once)]
Layer = Annotated[int, Field(strict=True, ge=0, lt=MAX_NUM_LAYERS)]
Layers = Annotated[tuple[Layer, ...], Field(min_length=1, max_length=MAX_NUM_LAYERS), AfterValidator(_listed_once)]
Spans = Annotated[tuple[ExcludedSpan, ...], Field(max_length=8), AfterValidator(_listed_once)]
Description = Annotated[str, Field(max_length=_MAX_DESCRIPTION), AfterValidator(_without_controls)]


class _Asked(BaseModel):
    """A request body: immutable, without unknown keys, NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ProfileSpec(_Asked):
    """What a profile shall be. What is left out or null, the bundle recommends."""

    bundle: Annotated[
        str,
        Field(
            pattern=DIGEST_PREFIX,
            description="Digest of a bundle of this server, or a prefix of 8 hex digits or more that only one has.",
            examples=["sha256:ab12cd34"],
        ),
    ]
    strength: Annotated[
        float | None,
        Field(strict=True, ge=-MAX_STRENGTH, le=MAX_STRENGTH, description="Strength of requests that name none."),
    ] = None
    maximum_strength: Annotated[
        float | None,
        Field(strict=True, gt=0, le=MAX_STRENGTH, description="Bound of the absolute strength in a request."),
    ] = None
    scope: Annotated[Scope | None, Field(description="Scope of requests that name none.")] = None
    layers: Annotated[
        Layers | None, Field(description="Use the bundle's interventions at these layers only; null means all.")
    ] = None
    exclude: Annotated[Spans | None, Field(description="Spans that stay unsteered.")] = None
    allowed_keys: Annotated[
        KeyNames | None, Field(description="Names of the keys that may use it; null means all.")
    ] = None
    description: Annotated[Description | None, Field(description="For people.")] = None

    @model_validator(mode="after")
    def _check_strengths(self) -> "ProfileSpec":
        strength, maximum = self.strength, self.maximum_strength
        if strength is not None and maximum is not None and abs(strength) > maximum:
            raise PydanticCustomError(
                "strength_over_maximum",
                "strength {strength} is over maximum_strength {maximum}; lower it or raise the maximum",
                {"strength": strength, "maximum": maximum},
            )
        return self


class BundleFromRoot(_Asked):
    """Add a file that lies inside the server's bundle root."""

    path: Annotated[str, Field(min_length=1, max_length=_MAX_PATH, description="Name of the file inside the root.")]


class BundleFromRemote(_Asked):
    """Add a file that the server fetches, where its configuration allows that."""

    uri: Annotated[
        str,
        Field(
            min_length=1,
            max_length=_MAX_URI,
            description="hf://OWNER/REPOSITORY@COMMIT/FILE or s3://BUCKET/KEY.",
            examples=["hf://acme/vectors@0123456789abcdef0123456789abcdef01234567/medical.safetensors"],
        ),
    ]
    digest: Annotated[str, Field(pattern=DIGEST, description="Digest that the file must have.")]


class Rollback(_Asked):
    """Which version a profile goes back to."""

    to: Annotated[
        int | None,
        Field(
            strict=True,
            ge=0,
            le=2**62,
            description="Generation of the version to restore; null means the last one that differs from the present.",
        ),
    ] = None


class Problem(BaseModel):
    """Why a request was refused: an OpenAI error with the members of RFC 7807 inside."""

    message: Annotated[str, Field(description="One sentence with the value, the bound and the remedy.")]
    type: Annotated[str, Field(description="Kind of error, as OpenAI names them.")]
    param: Annotated[str | None, Field(description="Field, parameter or header at fault.")] = None
    code: Annotated[str | int | None, Field(description="Stable code; match this, not the message.")] = None
    title: Annotated[str | None, Field(description="Phrase of the HTTP status.")] = None
    status: Annotated[int | None, Field(description="HTTP status.")] = None
    instance: Annotated[str | None, Field(description="Path, or request, that was refused.")] = None


class Refusal(BaseModel):
    """Body of every refusal."""

    error: Problem


class BundleUse(BaseModel):
    """A version of a profile that names a bundle."""

    profile: str
    generation: Annotated[int, Field(description="Generation that made this version.")]
    is_current: Annotated[bool, Field(description="Whether requests for the profile get this version now.")]


class BundleInfo(BaseModel):
    """A bundle of the registry."""

    digest: Annotated[str, Field(description="Identity: SHA-256 of the file.")]
    name: Annotated[str, Field(description="What its maker calls it.")]
    description: str
    licence: str
    target: Annotated[str, Field(description="Model that it was made for.")]
    architecture: str
    hidden_size: int
    num_layers: int
    fingerprint: Annotated[str | None, Field(description="Digest of the weights that it was made for.")]
    layers: Annotated[list[int], Field(description="Decoder layers (0-based) it steers.")]
    kinds: Annotated[list[str], Field(description="Kinds of its interventions.")]
    strength: Annotated[float, Field(description="Recommended strength.")]
    maximum_strength: Annotated[float, Field(description="Recommended bound of the absolute strength.")]
    scope: Annotated[Scope, Field(description="Recommended scope.")]
    exclude: Annotated[list[str], Field(description="Spans that it recommends to leave unsteered.")]
    num_bytes: Annotated[int, Field(description="Size of the file.")]
    added_at: datetime
    added_by: Annotated[str, Field(description="Name of the key, or user of the command line, that added it.")]
    source: Annotated[str, Field(description="Where it came from.")]
    signer: Annotated[str | None, Field(description="Whose signature it carries, as far as that was checked.")]
    is_draining: Annotated[bool, Field(description="On its way out: no profile can take it any more.")]
    used_by: Annotated[list[BundleUse], Field(description="Recent versions of profiles that name it.")]


class BundleResidency(BaseModel):
    """Whether one worker holds a bundle."""

    replica: Annotated[int, Field(description="Data-parallel replica.")]
    rank: Annotated[int, Field(description="Rank among the workers of the replica.")]
    keys: Annotated[list[str], Field(description="Programs of the bundle that the worker holds: all layers, or some.")]


class BundleDetail(BundleInfo):
    """A bundle, and who holds it."""

    residency: Annotated[list[BundleResidency], Field(description="Of every worker of this server.")]


class BundleList(BaseModel):
    """A page of bundles, by digest."""

    bundles: list[BundleInfo]
    next: Annotated[str | None, Field(description="Cursor of the next page; null on the last one.")]


class RowInfo(BaseModel):
    """A runtime tensor of a bundle: what one of its interventions reads or writes."""

    name: str
    layer: Annotated[int, Field(description="Decoder layer (0-based) of the intervention.")]
    kind: Annotated[str, Field(description="Kind of the intervention.")]
    role: Annotated[Literal["read", "write"], Field(description="What the intervention does with it.")]
    norms: Annotated[list[float], Field(description="2-norm of each of its rows.")]


class TensorInfo(BaseModel):
    """A tensor of a bundle that servers skip: evidence of how it was made."""

    name: str
    shape: list[int]
    dtype: str
    num_bytes: int


class BundleTensors(BaseModel):
    """The tensors of a bundle, without their values."""

    digest: str
    rows: Annotated[list[RowInfo], Field(description="Runtime tensors, in the order of the interventions.")]
    evidence: Annotated[list[TensorInfo], Field(description="All others, in the order of the file.")]


class RootList(BaseModel):
    """Names of the files in the server's bundle root that can be added by path."""

    names: Annotated[list[str], Field(description="Folder by folder; each is a `path` of `POST /v1/steering/bundles`.")]
    is_complete: Annotated[bool, Field(description="False when there are more files than are listed.")]


class CheckInfo(BaseModel):
    """A check that a bundle passed."""

    check: str
    found: Annotated[str, Field(description="What was seen.")]


class BundleAnswer(BundleInfo):
    """A bundle that was added, or that was there already."""

    created: Annotated[bool, Field(description="Whether the registry did not have it before.")]
    is_resident: Annotated[bool, Field(description="Whether every worker holds it now.")]
    checks: Annotated[list[CheckInfo], Field(description="What was checked, in order.")]
    dry_run: Annotated[bool, Field(description="Whether only the checks ran and nothing was kept.")]
    duration_s: Annotated[float, Field(description="Time from the last byte to the acknowledgement of the workers.")]


class ProfileInfo(BaseModel):
    """The current version of a profile."""

    name: Annotated[str, Field(description="What a request puts into `steering_profile`.")]
    description: str
    bundle: Annotated[str, Field(description="Content digest.")]
    strength: Annotated[float, Field(description="Default strength.")]
    maximum_strength: Annotated[float, Field(description="Bound of the absolute strength in a request.")]
    scope: Annotated[Scope, Field(description="Default scope.")]
    layers: Annotated[list[int], Field(description="Decoder layers (0-based) it steers.")]
    exclude: Annotated[list[str], Field(description="Spans that it leaves unsteered.")]
    generation: Annotated[int, Field(description="Generation that made this version; also its ETag.")]
    changed_at: datetime
    changed_by: Annotated[str | None, Field(description="Name of the key that made it; null for inference keys.")]
    allowed_keys: Annotated[
        list[str] | None, Field(description="Names of the keys that may use it; null means all, or not shown.")
    ]


class ProfileList(BaseModel):
    """A page of profiles, by name."""

    profiles: list[ProfileInfo]
    next: Annotated[str | None, Field(description="Cursor of the next page; null on the last one.")] = None


class SettingsInfo(BaseModel):
    """What one version of a profile said."""

    bundle: str
    strength: float
    maximum_strength: float
    scope: Scope
    layers: Annotated[list[int] | None, Field(description="Layers it was restricted to; null means all of the bundle.")]
    exclude: list[str]
    allowed_keys: list[str] | None
    description: str


class VersionInfo(BaseModel):
    """One change of a profile."""

    generation: int
    action: Action
    actor: Annotated[str, Field(description="Name of the key, or user of the command line, that made it.")]
    at: datetime
    restored_from: Annotated[int | None, Field(description="Generation that a rollback restored.")]
    settings: Annotated[SettingsInfo | None, Field(description="Null where the profile was deleted.")]


class ProfileDetail(ProfileInfo):
    """A profile and its history."""

    history: Annotated[list[VersionInfo], Field(description="Changes, newest first.")]
    next: Annotated[int | None, Field(description="`before` of the next page; null on the last one.")]


class ProfileAnswer(ProfileInfo):
    """A profile after a change that was asked for."""

    changed: Annotated[bool, Field(description="False when it was so already.")]
    observed: Annotated[bool, Field(description="Whether every API process admits requests with this version now.")]
    dry_run: Annotated[bool, Field(description="Whether only the checks ran and nothing was changed.")]
    previous: Annotated[VersionInfo | None, Field(description="What was current before; null for a new name.")]


class _Open(BaseModel):
    """An answer that newer servers may add to."""

    model_config = ConfigDict(extra="allow")


class WorkerStatus(_Open):
    """State of one worker, as it says itself."""

    replica: Annotated[int, Field(description="Data-parallel replica.")] = 0
    rank: Annotated[int, Field(description="Rank among the workers of the replica.")]
    pid: int | None = None
    uptime_s: Annotated[float | None, Field(description="Time since the worker started.")] = None
    bundles: Annotated[list[str], Field(description="Resident programs: digests, with the layers where not all.")]
    rows_used: Annotated[int, Field(description="Rows of the row pool in use.")]
    rows_total: Annotated[int, Field(description="Rows of the row pool.")]
    slots_used: Annotated[int, Field(description="Slots that the requests in flight need.")]
    slots_total: Annotated[int, Field(description="Slots; always more than a batch can use.")]
    requests: Annotated[int, Field(description="Steered requests in flight.")]
    layers: Annotated[int, Field(description="Steerable layers.")]
    fused_layers: Annotated[list[int], Field(description="Layers whose steering is part of the RMSNorm that follows.")]
    in_place_layers: Annotated[list[int], Field(description="Layers that are steered by an operator of their own.")]
    backend: Annotated[str, Field(description="Kernel backend.")]


class MemberStatus(_Open):
    """State of one API process."""

    member: str
    instance: Annotated[str, Field(description="Server that the process belongs to.")]
    pid: int
    state: Annotated[str, Field(description="starting, ready, draining or failed.")]
    observed: Annotated[int, Field(description="Generation that it admits requests with.")]
    problem: Annotated[str | None, Field(description="What keeps it from the desired state.")] = None


class DeclarationStatus(_Open):
    """State of the profiles of --steering-declaration."""

    file: str
    digest: Annotated[str, Field(description="Of the newest file that could be read.")]
    is_applied: Annotated[bool, Field(description="Whether every profile is as the file says.")]
    problems: Annotated[
        dict[str, str], Field(description="What is not as declared and why, by profile; `(file)` is the file itself.")
    ]


class Status(_Open):
    """State of the server."""

    is_ready: Annotated[bool | None, Field(description="Whether every rank is where the registry wants it.")] = None
    generation_desired: Annotated[int | None, Field(description="Changes that the registry has seen.")] = None
    generation_observed: Annotated[int | None, Field(description="Those that every API process has seen.")] = None
    declaration: Annotated[
        DeclarationStatus | None, Field(description="Of the declaration; null where there is none.")
    ] = None
    members: Annotated[list[MemberStatus], Field(description="API processes on this registry.")] = []
    workers: Annotated[list[WorkerStatus], Field(description="Every worker of every replica of this server.")]


class AuditEntry(_Open):
    """One line of the audit log."""

    at: Annotated[str | None, Field(description="Time, UTC.")] = None
    actor: Annotated[str | None, Field(description="Name of the key.")] = None
    action: str | None = None
    target: Annotated[str | None, Field(description="Profile or bundle that it was about.")] = None
    digest: str | None = None
    before: JsonValue = None
    after: JsonValue = None
    outcome: str | None = None
    reason: Annotated[str | None, Field(description="Code of the refusal.")] = None
    request_id: str | None = None


class AuditPage(BaseModel):
    """Lines of the audit log, newest first."""

    entries: list[AuditEntry]
    next: Annotated[int | None, Field(description="`before` of the next page; null on the last one.")]
