"""MCP: its tools, their shapes and words, as hosts and calling models see them."""
