"""Engine core's part of steering: which bundles are resident on every rank, and which requests may use them.

Seams: `vllm.v1.engine.core.EngineCore.add_request` and `.collective_rpc`, replaced on the class when the scheduler is
built. Both run between two engine steps and in the order in which the API processes sent them, so a bundle that a
request was admitted with cannot go before the request does, and a request whose bundle has gone never reaches the
scheduler, the prefix cache or the workers.
"""

import os
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from server.engine.cache_counts import CacheCounts
from server.engine.compat import require_signature
from server.engine.steering import Steering, keys_of
from steering_kernels import MAX_OPS, NUM_GATES

# Answer of `steering_unload` in the place of the ranks' own when a request uses the bundle.
IN_USE = "in_use"
# Streamed sessions that were refused and whose last message is still to come; the oldest are forgotten.
_MAX_REFUSED_SESSIONS = 1024


class _Resident:
    """A bundle that every rank holds: the stamp of the call that loaded it, and what it takes of each layer."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.stamp = uuid.uuid4().hex
        self.steps = Counter(step["layer"] for step in spec["steps"])
        self.num_gates: int = spec["num_gates"]


class SteeringCore:
    """What one engine core, that is one replica, knows about steering.

    Args:
        scheduler: vLLM's scheduler; its `requests` are those that are waiting or running.
        spans: names of the spans that the workers can leave unsteered.

    Attributes:
        cache: prefix-cache lookups, split by whether the request is steered.
    """

    def __init__(self, scheduler: Any, spans: Collection[str]) -> None:
        self.cache = CacheCounts()
        self._scheduler = scheduler
        self._spans = frozenset(spans)
        self._resident: dict[str, _Resident] = {}
        self._refused_sessions: OrderedDict[str, None] = OrderedDict()

    def refusal(self, request: Any) -> str | None:
        """Why a request cannot run here; None when it can.

        Args:
            request: vLLM's `Request`.
        """
        if request.request_id in self._refused_sessions and not request.resumable:
            # The message that ends a session which was refused; taken for a request, it would run.
            del self._refused_sessions[request.request_id]
            return "its session was refused"
        try:
            steering = Steering.from_sampling_params(request.sampling_params)
        except (KeyError, TypeError, ValueError) as error:
            return f"its steering cannot be read ({error!r})"
        if steering is None:
            return None
        if getattr(request, "resumable", False):
            # A later message makes the prompt longer, and with it moves what every scope means.
            self._refused_sessions[request.request_id] = None
            while len(self._refused_sessions) > _MAX_REFUSED_SESSIONS:
                self._refused_sessions.popitem(last=False)
            return "a request whose input is streamed cannot be steered"
        return self._misfit(steering)

    def _misfit(self, steering: Steering) -> str | None:
        steps: Counter[int] = Counter()
        num_gates = 0
        for term in steering.terms:
            resident = self._resident.get(term.bundle)
            if resident is None:
                return f"{term.bundle} is not resident"
            if unknown := [span for span in term.spans if span not in self._spans]:
                return f"this engine cannot leave out {', '.join(unknown)}"
            steps.update(resident.steps)
            num_gates += resident.num_gates
        if max(steps.values(), default=0) > MAX_OPS or num_gates > NUM_GATES:
            return f"its bundles have more than {MAX_OPS} interventions at one layer or {NUM_GATES} gates together"
        return None

    def load(self, bundle: str, spec: Mapping[str, Any], call: Callable[[], list[Any]], undo: Callable[[], Any]) -> Any:
        """Make a bundle resident on all ranks or on none.

        Args:
            bundle: program key.
            spec: its program as it travels.
            call: loads it on every rank.
            undo: unloads it on every rank.

        Returns:
            The ranks' answers; with a `stamp` for `undo` where this call was the one that made it resident.
        """
        try:
            answers = call()
        except RuntimeError as error:
            # How an executor reports that a rank failed; the others may have loaded it.
            answers = [{"rank": -1, "error": str(error), "code": "failed"}]
        if bundle in self._resident:
            return answers
        if any("error" in answer for answer in answers) or len({answer["checksum"] for answer in answers}) != 1:
            undo()
            return answers
        resident = self._resident[bundle] = _Resident(spec)
        return [{**answer, "stamp": resident.stamp} for answer in answers]

    def unload(self, bundle: str, call: Callable[[], list[Any]]) -> list[Any]:
        """Free a bundle on every rank, unless a request uses it: then nothing is done and [IN_USE] returned."""
        if self.users()[bundle]:
            return [IN_USE]
        self._resident.pop(bundle, None)
        return call()

    def has_stamp(self, bundle: str, stamps: Collection[str]) -> bool:
        """Whether a bundle is resident through one of these load calls."""
        return bundle in self._resident and self._resident[bundle].stamp in stamps

    def users(self) -> Counter[str]:
        """Requests that are waiting or running, by the bundles that they use."""
        return Counter(key for request in self._scheduler.requests.values() for key in keys_of(request.sampling_params))

    def status(self, with_bundles: bool) -> dict[str, Any]:
        """Figures of this replica; the resident bundles and their users only if asked for, because they may be many."""
        requests = self._scheduler.requests.values()
        status = {
            "pid": os.getpid(),
            "requests": sum(bool(keys_of(request.sampling_params)) for request in requests),
            "cache": self.cache.to_wire(),
        }
        if with_bundles:
            status |= {"resident": sorted(self._resident), "users": dict(self.users())}
        return status


def install() -> None:
    """Put this module between vLLM's engine core and its clients, in this process. Idempotent.

    An engine core whose scheduler is not a steering one keeps vLLM's behaviour.

    Raises:
        IncompatibleVllmError: engine core does not look as this module expects.
    """
    from vllm.v1.engine.core import EngineCore

    core_class: Any = EngineCore
    if hasattr(core_class, "steering_core_status"):
        return
    require_signature(core_class.add_request, ("self", "request", "request_wave"))
    require_signature(core_class.collective_rpc, ("self", "method", "timeout", "args", "kwargs"))
    core_class.unguarded_add_request = core_class.add_request
    core_class.unguarded_collective_rpc = core_class.collective_rpc
    for function in (add_request, collective_rpc, steering_undo, steering_core_status):
        setattr(core_class, function.__name__, function)


def add_request(self: Any, request: Any, request_wave: int = 0) -> None:
    """`EngineCore.add_request`: refuses a request that cannot be steered as it asks; all others go on."""
    steering = _steering_of(self)
    reason = steering.refusal(request) if steering is not None else None
    if reason is None:
        self.unguarded_add_request(request, request_wave)
    else:
        _refuse(self, request, request_wave, reason)


def collective_rpc(
    self: Any, method: Any, timeout: float | None = None, args: Any = (), kwargs: dict[str, Any] | None = None
) -> Any:
    """`EngineCore.collective_rpc`: loading and unloading bundles goes through `SteeringCore`."""

    def call() -> Any:
        return self.unguarded_collective_rpc(method, timeout, args, kwargs)

    def undo() -> Any:
        return self.unguarded_collective_rpc("steering_unload", timeout, (args[0],), {})

    steering = _steering_of(self)
    if steering is not None and method == "steering_load":
        return steering.load(args[0], args[1], call, undo)
    if steering is not None and method == "steering_unload":
        return steering.unload(args[0], call)
    return call()


def steering_undo(self: Any, bundle: str, stamps: list[str]) -> Any:
    """Unload a bundle if it is one of these load calls that made it resident."""
    if self.scheduler.steering.has_stamp(bundle, stamps):
        return self.collective_rpc("steering_unload", None, (bundle,), {})
    return []


def steering_core_status(self: Any, with_bundles: bool = True) -> dict[str, Any]:
    """`SteeringCore.status` of this replica."""
    status: dict[str, Any] = self.scheduler.steering.status(with_bundles)
    return status


def _steering_of(core: Any) -> SteeringCore | None:
    # Engine core calls its workers before it has a scheduler.
    return getattr(getattr(core, "scheduler", None), "steering", None)


def _refuse(core: Any, request: Any, request_wave: int, reason: str) -> None:
    """End one request with an error before it began."""
    from vllm.logger import init_logger
    from vllm.v1.engine.core import DPEngineCoreProc, EngineCoreProc

    if request.request_id in core.scheduler.requests:
        # A later message of a session that began without steering.
        core.abort_requests([request.request_id])
    init_logger("vllm.expertsteer").warning("Request %s was refused: %s.", request.request_id, reason)
    if not isinstance(core, EngineCoreProc):
        _answer_with_next_step(core, request)
        return
    core._send_error_outputs_to_client([request.request_id], request.client_index)
    if isinstance(core, DPEngineCoreProc) and request_wave >= core.current_wave:
        # The other replicas may have been told to step because of this request, and wait for this one in each step.
        core.engines_running = True


def _answer_with_next_step(core: Any, request: Any) -> None:
    """Hand an error over as `LLM` gets its outputs in its own process: from a step.

    An exception would do harm: vLLM has taken the request up already and would wait for its end in every later call.
    """
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

    original = core.step_fn

    def step_fn() -> tuple[dict[int, Any], bool]:
        core.step_fn = original
        outputs, is_executed = original()
        outputs = outputs or {}
        of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
        of_client.outputs.append(EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR))
        return outputs, is_executed

    core.step_fn = step_fn
