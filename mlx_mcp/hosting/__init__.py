"""The processes that serve: their sockets, lines, signals and ends. Connects the faces to them."""
