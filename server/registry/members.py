"""Running processes that share the registry: who is alive, what their engines hold, what is about to be named."""

import builtins
import json
import secrets
import socket
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from artifacts.errors import quoted
from server.registry.database import Database
from server.registry.desired import LIVE_S, Desired
from server.registry.errors import RegistryError, RegistryErrorCode

FORGET_S = 60.0
State = Literal["starting", "ready", "draining"]
_BEAT = (
    "INSERT INTO runtime.members VALUES (:member, :instance, :pid, :host, :now, :observed, :pins, :state, :problem, "
    ":counters) ON CONFLICT (member) DO UPDATE SET heartbeat = :now, observed = :observed, pins = :pins, "
    "state = :state, problem = :problem, counters = coalesce(:counters, counters)"
)
_COLUMNS = "member, instance, pid, host, heartbeat, observed, pins, state, problem, counters"


@dataclass(frozen=True)
class MemberRow:
    """An API process as it last described itself.

    Attributes:
        member: its id.
        instance: the running server that it belongs to.
        pid: its process id.
        host: its machine.
        heartbeat: when that was, by `time.monotonic` of the host.
        observed: generation that its table of profiles shows.
        pins: program keys that its running requests use.
        state: what it does.
        problem: why it is not ready, or what failed last.
        counters: its metrics, JSON.
    """

    member: str
    instance: str
    pid: int
    host: str
    heartbeat: float
    observed: int
    pins: frozenset[str]
    state: State
    problem: str | None
    counters: str | None


class Members:
    """The runtime database. Times are those of `time.monotonic`, which all processes of a machine share."""

    def __init__(self, database: Database, desired: Desired, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._desired = desired
        self._clock = clock
        self._joined: dict[str, tuple[str, int]] = {}

    def join(self, instance: str, pid: int) -> str:
        """Enter a process, state "starting"; forget dead ones.

        Args:
            instance: id of the running server; never used twice.
            pid: of the process.

        Returns:
            Id of the member.
        """
        member = secrets.token_hex(8)
        with self._database.write():
            self.forget_dead()
            self._joined[member] = instance, pid
            self._beat(member, 0, (), "starting", None, None)
        return member

    def leave(self, member: str) -> None:
        """Take a member away, with its intents; with the last one of an instance go the instance's holdings."""
        with self._database.write() as connection:
            # Before the row goes: a late beat must not bring it back.
            self._joined.pop(member, None)
            connection.execute("DELETE FROM runtime.members WHERE member = ?", (member,))
            self._forget_orphans()

    def forget_dead(self) -> None:
        """Take away members that have not been heard of for a minute, with their intents, and what they held."""
        now = self._clock()
        with self._database.write() as connection:
            connection.execute("DELETE FROM runtime.members WHERE heartbeat < ?", (now - FORGET_S,))
            self._forget_orphans()

    def beat(
        self,
        member: str,
        *,
        observed: int,
        pins: Collection[str],
        state: State,
        problem: str | None = None,
        counters: str | None = None,
    ) -> bool:
        """Say that a member of this process is alive, and how it is. What it said before is replaced at once.

        Args:
            member: id from `join`, called on this object.
            observed: generation of the table of profiles that it uses from now on.
            pins: program keys of its running requests, seen after it began to use that table.
            state: what it does.
            problem: why it is not ready, or what failed last.
            counters: its metrics, JSON; None leaves what it said before.

        Returns:
            True also for a member that has left. False when others had given it up for dead. It is a member again,
            without intents, and its instance may have lost its holdings: enter them again.
        """
        with self._database.write() as connection:
            if member not in self._joined:
                return True
            known = connection.execute("SELECT 1 FROM runtime.members WHERE member = ?", (member,)).fetchone()
            self._beat(member, observed, pins, state, problem, counters)
        return known is not None

    def list(self, within_s: float = LIVE_S) -> "builtins.list[MemberRow]":
        """Live members, by instance and then id.

        Args:
            within_s: how long ago a member may have been heard of.
        """
        with self._database.read() as connection:
            rows = connection.execute(
                f"SELECT {_COLUMNS} FROM runtime.members WHERE heartbeat >= ? ORDER BY instance, member",
                (self._clock() - within_s,),
            ).fetchall()
        return [_row(*row) for row in rows]

    def hold(self, instance: str, key: str, checksum: str) -> None:
        """Note that every rank of an instance holds a program.

        Args:
            instance: which one.
            key: of the program.
            checksum: that all ranks agree on.
        """
        with self._database.write() as connection:
            connection.execute("INSERT OR REPLACE INTO runtime.holdings VALUES (?, ?, ?)", (instance, key, checksum))

    def release(self, instance: str, key: str) -> None:
        """Note that an instance no longer holds a program on every rank."""
        with self._database.write() as connection:
            connection.execute("DELETE FROM runtime.holdings WHERE instance = ? AND key = ?", (instance, key))

    def holdings(self, instance: str) -> dict[str, str]:
        """Checksums of the programs that an instance holds, by key."""
        with self._database.read() as connection:
            rows = connection.execute("SELECT key, checksum FROM runtime.holdings WHERE instance = ?", (instance,))
            return dict(rows.fetchall())

    def held(self) -> frozenset[str]:
        """Program keys that any instance with a live member holds."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT DISTINCT key FROM runtime.holdings WHERE instance IN "
                "(SELECT instance FROM runtime.members WHERE heartbeat >= ?)",
                (self._clock() - LIVE_S,),
            )
            return frozenset(key for (key,) in rows.fetchall())

    def instances_without(self, key: str) -> "builtins.list[str]":
        """Instances that serve requests and could not serve those for a program.

        Returns:
            Instances with a live member that is ready, and without the program; all that hold it when their checksums
            differ, since nobody can tell who is right.
        """
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT DISTINCT members.instance, checksum FROM runtime.members LEFT JOIN runtime.holdings "
                "ON holdings.instance = members.instance AND holdings.key = ? "
                "WHERE state = 'ready' AND heartbeat >= ? ORDER BY members.instance",
                (key, self._clock() - LIVE_S),
            ).fetchall()
        agree = len({checksum for _, checksum in rows if checksum is not None}) <= 1
        return [instance for instance, checksum in rows if checksum is None or not agree]

    def intend(self, member: str, key: str) -> None:
        """Ask all instances to hold a program that a profile is about to name.

        Args:
            member: who asks; the intent goes with it.
            key: of the program.

        Raises:
            RegistryError: code not_found; the member is not entered, or others have given it up for dead.
        """
        with self._database.write() as connection:
            known = connection.execute("SELECT 1 FROM runtime.members WHERE member = ?", (member,)).fetchone()
            if known is None:
                raise RegistryError(
                    RegistryErrorCode.NOT_FOUND, f"Member {quoted(member)} is not entered; let it beat and try again."
                )
            connection.execute("INSERT OR IGNORE INTO runtime.intents VALUES (?, ?)", (member, key))

    def forget_intent(self, member: str, key: str) -> None:
        """Take an intent back."""
        with self._database.write() as connection:
            connection.execute("DELETE FROM runtime.intents WHERE member = ? AND key = ?", (member, key))

    def may_unload(self, instance: str, key: str, keep: int) -> bool:
        """Release a program unless somebody may still need it, in one step that no change can come between.

        Args:
            instance: whose engine would unload it.
            key: of the program.
            keep: previous versions of each profile that stay resident.

        Returns:
            Whether it was released: the desired state does not want it, and every live member of the instance has
            seen that state and has no request that uses it.
        """
        with self._database.write():
            state = self._desired.snapshot(keep + 1)
            if key in state.keys_wanted(keep):
                return False
            for member in self.list():
                if member.instance == instance and (member.observed < state.generation or key in member.pins):
                    return False
            self.release(instance, key)
        return True

    def _beat(
        self,
        member: str,
        observed: int,
        pins: Collection[str],
        state: State,
        problem: str | None,
        counters: str | None,
    ) -> None:
        instance, pid = self._joined[member]
        row = {
            "member": member,
            "instance": instance,
            "pid": pid,
            "host": socket.gethostname(),
            "now": self._clock(),
            "observed": observed,
            "pins": json.dumps(sorted(pins)),
            "state": state,
            "problem": problem,
            "counters": counters,
        }
        with self._database.write() as connection:
            connection.execute(_BEAT, row)

    def _forget_orphans(self) -> None:
        with self._database.write() as connection:
            connection.execute(
                "DELETE FROM runtime.holdings WHERE instance NOT IN (SELECT instance FROM runtime.members)"
            )


def _row(
    member: str,
    instance: str,
    pid: int,
    host: str,
    heartbeat: float,
    observed: int,
    pins: str,
    state: State,
    problem: str | None,
    counters: str | None,
) -> MemberRow:
    keys = frozenset(json.loads(pins))
    return MemberRow(member, instance, pid, host, heartbeat, observed, keys, state, problem, counters)
