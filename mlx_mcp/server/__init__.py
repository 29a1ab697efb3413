"""The MCP surface: tools over stdio and streamable HTTP, all on one engine client."""
