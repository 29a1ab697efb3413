"""The keys and values of computed tokens: where they are, and which sequences continue from them."""
