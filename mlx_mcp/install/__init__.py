"""Registers this server with hosts: the commands and files in which each host keeps its MCP servers."""
