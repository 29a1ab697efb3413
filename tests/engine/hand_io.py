"""Reading and writing by hand, so that a test decides when a disk is done."""

from mlx_mcp.errors import MlxMcpError


class HandIo:
    """Does what the engine gave it when it is told to."""

    def __init__(self):
        self.work, self.closed = [], False
        self.num_patient = 0  # the last pieces of the work, which others pass

    def submit(self, work, tell, urgent=False, patient=False):
        self.num_patient += patient
        at = 0 if urgent else len(self.work) + 1 if patient else len(self.work) - self.num_patient
        self.work.insert(at, (work, tell))

    def breathe(self):
        while len(self.work) > self.num_patient:
            self.run()()

    def run(self):
        """Do one piece; returns what tells the engine."""
        self.num_patient -= len(self.work) == self.num_patient
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
