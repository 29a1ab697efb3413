"""What can be done with the engine, in the terms of no protocol."""
