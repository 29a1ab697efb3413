"""The API for sessions over plain HTTP: what the tools do, for programs that speak no MCP."""
