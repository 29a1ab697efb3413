"""Local MLX language models for agent hosts, over MCP."""

__version__ = "0.1.0"
__all__ = ["__version__"]
