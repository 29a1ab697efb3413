"""Real hosts and client libraries against this tree. Run with `make hosts`."""
