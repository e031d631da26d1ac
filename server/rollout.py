"""The two phases of a change: every instance loads what it needs, then every process shows it."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus

from server.errors import ErrorCode, SteeringRequestError
from server.reconciler import Reconciler
from server.registry.errors import RegistryError, RegistryErrorCode
from server.registry.records import ProfileVersion
from server.registry.registry import Registry
from server.tracing import span

logger = logging.getLogger("vllm.expertsteer")

OBSERVE_TIMEOUT_S = 5.0
_STAGE_TIMEOUT_S = 60.0
_COMMIT_ATTEMPTS = 5


class Rollout:
    """Brings programs to every live instance before a change is committed, and waits for every process after it."""

    def __init__(self, registry: Registry, reconciler: Reconciler) -> None:
        """Take what is needed.

        Args:
            registry: the state to change.
            reconciler: of this process.
        """
        self._registry = registry
        self._reconciler = reconciler
        # Changes of this process that wait for a program; the last one takes its intent back.
        self._intents: Counter[str] = Counter()
        self._intending = asyncio.Lock()

    async def commit(self, key: str, change: Callable[[], ProfileVersion]) -> ProfileVersion:
        """Commit a change that needs a program, after every instance has loaded it.

        The registry itself looks whether they have, in the transaction; mostly they have already.

        Args:
            key: of the program.
            change: the transaction; called in a thread.

        Raises:
            StagingError, SteeringRequestError: an instance does not load it; nothing has changed.
            RegistryError: what the transaction refuses.
        """
        for _ in range(_COMMIT_ATTEMPTS):
            try:
                with span("steering.activate", program=key):
                    return await asyncio.to_thread(change)
            except RegistryError as error:
                if error.code is not RegistryErrorCode.NOT_HELD:
                    raise
            async with self.intended(key):
                await self.load_everywhere(key)
                with contextlib.suppress(RegistryError), span("steering.activate", program=key):
                    return await asyncio.to_thread(change)
        # Once more for its reason.
        return await asyncio.to_thread(change)

    async def load_everywhere(self, key: str) -> None:
        """Make every rank of every live instance hold a program that is intended.

        Raises:
            StagingError, SteeringRequestError: one does not.
        """
        with span("steering.stage", program=key):
            await self._reconciler.stage(key)
            lacking = await self._reconciler.wait_staged(key, _STAGE_TIMEOUT_S)
        if lacking:
            raise SteeringRequestError(
                ErrorCode.NOT_STAGED,
                f"Other servers on this registry did not load {key} in {_STAGE_TIMEOUT_S:g} s: {', '.join(lacking)}; "
                "their logs say why. Nothing was changed.",
                HTTPStatus.CONFLICT,
                None,
            )

    @contextlib.asynccontextmanager
    async def intended(self, key: str) -> AsyncIterator[None]:
        """Ask every instance to load a program that nothing in the registry names yet."""
        members, member = self._registry.members, self._reconciler.member
        async with self._intending:
            try:
                await asyncio.to_thread(members.intend, member, key)
            except RegistryError:
                # The others had given this process up; now it is back.
                await self._reconciler.publish()
                await asyncio.to_thread(members.intend, member, key)
            # Not before: what was not noted is not to be taken back.
            self._intents[key] += 1
        try:
            yield
        finally:
            async with self._intending:
                self._intents[key] -= 1
                if not self._intents[key]:
                    del self._intents[key]
                    await asyncio.shield(asyncio.to_thread(members.forget_intent, member, key))

    async def catch_up(self) -> bool:
        """Wait until every process shows what was committed. As it is committed, nothing here may refuse it."""
        try:
            await self._reconciler.refresh(is_forced=True)
            return await self._reconciler.wait_observed(self._reconciler.generation_desired, OBSERVE_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - see above; the next round of every process does the same again
            logger.warning("A change is committed and not yet shown: %s", error)
            return False
