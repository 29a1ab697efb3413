"""What can be served."""
