"""Anthropic's Messages API on the service: for its SDKs, and for Claude Code."""
