"""OpenAI's API: chat completions, completions, responses and models, for clients that speak it."""
