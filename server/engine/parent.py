"""Ends an engine core whose parent is gone.

vLLM's workers end with their engine core, but the engine core does not end with the API process that started it. Were
that one killed, the model would stay on the device, and its successor would find no room.
"""

import multiprocessing
import os
import signal
import threading


def end_with_parent() -> None:
    """Kill this process as soon as its parent has ended, however that was."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        # Nobody is left for whom to end anything in order.
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()
