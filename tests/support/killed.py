"""Text of a program that kills itself when it sends something to the disk; it needs `os` and `signal`."""

KILL_AT_A_SYNC = """
sync, calls = os.fsync, 0

def kill_at(count):
    def fsync(descriptor):
        global calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)
    os.fsync = fsync
"""
