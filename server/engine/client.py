"""The API process's view of the steering engine: load bundles, read state, prove that it works."""

import asyncio
import contextlib
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from server.engine.core import IN_USE
from server.engine.counters import EngineCounters
from server.engine.ended import Ended
from server.engine.program import Program, checksum
from server.engine.receipts import Receipts
from server.engine.self_test import PREFIX, SelfTest

_DEATH_POLL_S = 0.5


class EngineErrorCode(StrEnum):
    """Why the engine did not do what was asked of it."""

    NO_ROOM = "no_room"
    REJECTED = "rejected"
    DISAGREE = "disagree"
    FAILED = "failed"


class SteeringEngineError(RuntimeError):
    """The engine did not do what was asked of it; the message says what was seen where."""

    def __init__(self, message: str, code: EngineErrorCode = EngineErrorCode.FAILED) -> None:
        super().__init__(message)
        self.code = code


class SteeringEngine:
    """Wraps vLLM's `AsyncLLM` client. Every call reaches every data-parallel replica.

    Attributes:
        receipts: counts of steered tokens as the workers report them.
    """

    def __init__(self, engine_client: Any) -> None:
        self._client = engine_client
        self.receipts = Receipts()
        self.receipts.attach(engine_client)

    async def load(self, key: str, program: Program) -> list[dict[str, Any]]:
        """Make a bundle resident on every rank of every replica, or leave everything as it was.

        Args:
            key: program key.
            program: what it does.

        Returns:
            What each rank acknowledged: {"replica", "rank", "checksum"}.

        Raises:
            SteeringEngineError: a rank has no room or refuses, or the ranks disagree about the bytes they hold.
        """
        spec, data = program.to_wire()
        try:
            per_replica = await self._workers("steering_load", key, spec, data)
        except SteeringEngineError as error:
            # Some replicas may have loaded it; the caller did not know it to be anywhere.
            with contextlib.suppress(SteeringEngineError):
                await self.unload(key)
            raise SteeringEngineError(f"Cannot load {key}: {error}") from error
        answers = [{"replica": number, **each} for number, ranks in enumerate(per_replica) for each in ranks]
        failure = _failure(key, answers, checksum(spec, data))
        if failure is not None:
            if stamps := sorted({each["stamp"] for each in answers if "stamp" in each}):
                await self._cores("steering_undo", key, stamps)
            raise failure
        return [{name: each[name] for name in ("replica", "rank", "checksum")} for each in answers]

    async def unload(self, key: str) -> bool:
        """Free a bundle's rows on every rank of every replica.

        Returns:
            False when a request uses it: then it stays, at least wherever it is used.
        """
        if not key.startswith(PREFIX) and any(key in core["users"] for core in await self._core_status()):
            return False
        per_replica = await self._workers("steering_unload", key)
        return all(IN_USE not in ranks for ranks in per_replica)

    async def holds(self) -> set[str]:
        """Keys that are resident on every rank of every replica, without those of self-tests."""
        resident = [set(core["resident"]) for core in await self._core_status()]
        return {key for key in set.intersection(*resident) if not key.startswith(PREFIX)}

    async def users(self) -> dict[str, int]:
        """Requests that are waiting or running, by the bundles that they use, over all replicas."""
        users: dict[str, int] = {}
        for core in await self._core_status():
            for key, count in core["users"].items():
                users[key] = users.get(key, 0) + count
        return users

    async def status(self) -> list[dict[str, Any]]:
        """State of every rank of every replica, see `SteeringWorker.steering_status`, with its "replica"."""
        per_replica = await self._workers("steering_status")
        return [{"replica": number, **each} for number, ranks in enumerate(per_replica) for each in ranks]

    async def counters(self) -> EngineCounters:
        """What a scrape of metrics asks for."""
        return EngineCounters.from_wire(
            await self._workers("steering_counters"), await self._cores("steering_core_status", False)
        )

    async def ended(self, steering_ids: Iterable[str]) -> dict[str, Ended]:
        """Final counts of requests that have ended, as the workers counted them. Each is handed over once.

        Args:
            steering_ids: ids of the steerings whose requests may have ended.

        Returns:
            By id; an id is missing while none of its requests has ended, and for ever once it was handed over. Requests
            of one id may end at different times and on different replicas.
        """
        found: dict[str, Ended] = {}
        for ranks in await self._workers("steering_ended", list(steering_ids)):
            for taken in ranks:
                for key, (num_requests, counts, num_aborted) in (taken or {}).items():
                    ended = Ended(num_requests, tuple(counts), num_aborted)
                    found[key] = found[key] + ended if key in found else ended
        return found

    async def self_test(self) -> None:
        """Prove, by real requests through scheduler, workers and compiled graphs, that every layer can be steered.

        Raises:
            SteeringEngineError: names the layers without effect or the count that is wrong.
        """
        status = await self.status()
        num_replicas = len({each["replica"] for each in status})
        problems = await SelfTest(self, self._client, num_replicas, status[0]["layers"]).run()
        if problems:
            raise SteeringEngineError(f"Self-test: {'; '.join(problems)}; refusing to serve.")

    async def _workers(self, method: str, *args: Any) -> list[list[Any]]:
        """Call a method of every worker; answers by replica and rank."""
        answers: list[list[Any]] = await self._cores("collective_rpc", method, None, args, {})
        return answers

    async def _core_status(self) -> list[dict[str, Any]]:
        return await self._cores("steering_core_status", True)

    async def _cores(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every engine core; answers by replica.

        Raises:
            SteeringEngineError: the engine has died. vLLM would leave the call without an answer for ever, and with it
                the process, which waits for its requests before it ends.
        """
        call = asyncio.ensure_future(self._client.engine_core.call_utility_all_async(method, *args))
        try:
            while not (await asyncio.wait([call], timeout=_DEATH_POLL_S))[0]:
                if self._client.errored:
                    raise SteeringEngineError("The engine has died; this server ends, start it again.")
            answers: list[Any] = call.result()
        except SteeringEngineError:
            raise
        except Exception as error:
            raise SteeringEngineError(str(error)) from error
        finally:
            call.cancel()
        return answers


def _failure(key: str, answers: list[dict[str, Any]], expected: str) -> SteeringEngineError | None:
    """What the ranks' answers to a load say is wrong, with the first rank that says so; None if nothing is."""
    for each in answers:
        place = f"replica {each['replica']}, rank {each['rank']}"
        if "error" in each:
            return SteeringEngineError(f"Cannot load {key} on {place}: {each['error']}", EngineErrorCode(each["code"]))
    for each in answers:
        if each["checksum"] != expected:
            return SteeringEngineError(
                f"Replica {each['replica']}, rank {each['rank']} holds other bytes for {key}: {each['checksum']}, "
                f"expected {expected}.",
                EngineErrorCode.DISAGREE,
            )
    return None
