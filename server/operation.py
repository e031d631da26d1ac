"""One change that somebody asks for: timed, its failure turned into a refusal, and written into the audit log."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from artifacts.errors import BundleError
from server.auth.audit import REQUEST_ID, AuditLog
from server.engine.client import SteeringEngineError
from server.errors import SteeringRequestError
from server.metrics.metrics import SteeringMetrics
from server.metrics.operation_counters import outcome_of
from server.reconciler import StagingError
from server.refusals import refusal_of
from server.registry.errors import RegistryError
from server.sources.errors import SourceError

_KNOWN_ERRORS = (BundleError, SourceError, RegistryError, StagingError, SteeringEngineError, ValueError)


@dataclass
class Operation:
    """What the audit log says about a change; who makes it fills in what is known by then.

    Attributes:
        digest: of the bundle.
        before: generation of the profile's version before it.
        after: generation that it made.
        outcome: "ok", "refused" or "failed".
        reason: why it is not ok.
    """

    digest: str | None = None
    before: int | None = None
    after: int | None = None
    outcome: str = "ok"
    reason: str | None = None


class OperationRecorder:
    """Keeps metrics and the audit log of all changes of one process."""

    def __init__(self, metrics: SteeringMetrics, audit: AuditLog) -> None:
        """Take what is needed.

        Args:
            metrics: of this process.
            audit: where every change is written.
        """
        self._metrics = metrics
        self._audit = audit

    @contextlib.asynccontextmanager
    async def record(self, name: str, actor: str, target: str, *, is_dry: bool = False) -> AsyncIterator[Operation]:
        """Run a change in the body of the context.

        Args:
            name: of the operation, as "profile.put".
            actor: name of the key.
            target: what is changed.
            is_dry: it only checks.

        Raises:
            SteeringRequestError: the body refused it, or failed with an error of the server's parts.
        """
        operation = Operation()
        try:
            with self._metrics.operation(name):
                try:
                    yield operation
                except _KNOWN_ERRORS as error:
                    raise refusal_of(error) from error
        except SteeringRequestError as error:
            operation.outcome, operation.reason = outcome_of(error), f"{error.code.value}: {error}"
            raise
        except BaseException as error:
            operation.outcome, operation.reason = "failed", repr(error)
            raise
        finally:
            await asyncio.shield(
                asyncio.to_thread(
                    self._audit.write,
                    actor=actor,
                    action=f"{name}.dry_run" if is_dry else name,
                    target=target,
                    digest=operation.digest,
                    before=operation.before,
                    after=operation.after,
                    outcome=operation.outcome,
                    reason=operation.reason,
                    request_id=REQUEST_ID.get(),
                )
            )
