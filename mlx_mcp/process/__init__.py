"""One engine process per user and machine: finding it, starting it, relaying to it."""
