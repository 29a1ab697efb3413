"""The processes that serve: their sockets, lines, signals and ends; puts the faces on them."""
