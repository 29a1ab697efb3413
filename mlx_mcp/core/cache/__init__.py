"""What is kept of computed tokens, where it is, and who may go on from it."""
