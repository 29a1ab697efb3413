"""Reading and writing by hand, so that a test decides when a disk is done."""

from mlx_mcp.errors import MlxMcpError


class HandIo:
    """Does what the engine gave it when it is told to."""

    def __init__(self):
        self.work, self.closed = [], False

    def submit(self, work, tell, urgent=False):
        self.work.insert(0, (work, tell)) if urgent else self.work.append((work, tell))

    def run(self):
        """Do one piece; returns what tells the engine."""
        work, tell = self.work.pop(0)
        try:
            outcome = work()
        except MlxMcpError as error:
            outcome = error
        return lambda: tell(outcome)

    def close(self, last, timeout_s):
        while self.work:
            self.run()
        last()
        self.closed = True
        return True

    def run_all(self):
        """Do everything there is, and what comes of it."""
        while self.work:
            self.run()()
