"""Text of a program that kills itself when it sends something to the disk; it needs `os` and `signal`."""

KILL_AT_A_SYNC = """
import itertools
from samplers.shards.writing import shard_group

sync = os.fsync
# Whether shards get their names one by one, or all but the first together, must not depend on the time that it takes.
shard_group.PATIENCE = float(os.environ.get("PATIENCE", "inf"))

def kill_at(count):
    # Files are flushed in threads; `next` counts them all.
    calls = itertools.count(1)
    def fsync(descriptor):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)
    os.fsync = fsync
"""
